"""Twenty updates beside torch's AdamW, Hugging Face's schedules and torch's clipping: four groups, warm-up, decay."""

import jax
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxmed.config import OptimConfig
from jaxmed.train.optim import clip, make_optimizer

STEPS = 20
SHAPES = {
    ("projector", "layers", 0, "weight"): (5, 7),
    ("projector", "layers", 0, "bias"): (5,),
    ("decoder", "blocks", "q", "lora_a"): (2, 3, 7),
    ("decoder", "norm", "scale"): (7,),
    ("decoder", "embed", "table"): (9, 5),
    ("decoder", "head", "weight"): (9, 5),
    ("tower", "patch", "weight"): (4, 6),
    ("tower", "patch", "bias"): (4,),
}


def nested(values: dict) -> dict:
    tree: dict = {}
    for (*rooms, last), value in values.items():
        place = tree
        for room in rooms:
            place = place.setdefault(room, {})
        place[last] = value
    return tree


def rate_of(path: tuple, optim: OptimConfig) -> float:
    own = {"projector": optim.projector_learning_rate, "tower": optim.tower_learning_rate}
    embeds = path[1] in ("embed", "head")
    return (optim.embed_learning_rate if embeds else own.get(path[0], 0.0)) or optim.learning_rate


def theirs(optim: OptimConfig, params: dict, grads: list[dict]) -> dict:
    """torch and transformers, as Hugging Face's trainer puts them together."""
    tensors = {path: torch.nn.Parameter(torch.from_numpy(x.copy())) for path, x in params.items()}
    groups = [
        {
            "params": [tensor],
            "weight_decay": 0.0 if path[-1] in ("bias", "scale") else optim.weight_decay,
            "lr": rate_of(path, optim),
        }
        for path, tensor in tensors.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(optim.b1, optim.b2), eps=optim.eps)
    warmup = optim.warmup_steps or int(np.ceil(optim.warmup_ratio * STEPS))
    kinds = {
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, warmup, STEPS),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup, STEPS),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    }
    schedule = kinds[optim.schedule]()
    for step in grads:
        for path, tensor in tensors.items():
            tensor.grad = torch.from_numpy(step[path].copy())
        if optim.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(tensors.values(), optim.max_grad_norm)
        optimizer.step()
        schedule.step()
    return {path: tensor.detach().numpy() for path, tensor in tensors.items()}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("warmup", "max_norm", "tower", "embed"), [(0.0, 0.0, 0.0, 0.0), (0.13, 0.0, 2e-3, 0.0), (0.13, 1.7, 2e-3, 9e-3)]
)
def test_twenty_updates(schedule: str, warmup: float, max_norm: float, tower: float, embed: float) -> None:
    optim = OptimConfig(
        learning_rate=3e-3,
        projector_learning_rate=7e-3,
        tower_learning_rate=tower,
        embed_learning_rate=embed,
        weight_decay=0.3,
        b1=0.87,
        b2=0.96,
        eps=3e-7,
        schedule=schedule,
        warmup_ratio=warmup,
        max_grad_norm=max_norm,
    )
    rng = np.random.default_rng(3)
    params = {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}
    grads = [{path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()} for _ in range(STEPS)]
    tree = jax.tree.map(jax.numpy.asarray, nested(params))
    optimizer = make_optimizer(optim, STEPS, tree)
    state = optimizer.init(tree)

    @jax.jit
    def update(tree: dict, state: optax.OptState, grads: dict) -> tuple[dict, optax.OptState]:
        grads, _ = clip(grads, optim.max_grad_norm)
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    for step in grads:
        tree, state = update(tree, state, nested(step))
    for path, value in theirs(optim, params, grads).items():
        ours = tree
        for name in path:
            ours = ours[name]
        np.testing.assert_allclose(np.asarray(ours), value, rtol=1e-5, atol=2e-6, err_msg=str(path))
