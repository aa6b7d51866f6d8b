"""Twenty updates against torch.optim.AdamW with transformers' schedules and torch's clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxmed.config import OptimConfig
from jaxmed.train.init import flatten, unflatten
from jaxmed.train.optim import clip, label, make_optimizer, own_rates, schedule

STEPS = 20
SHAPES = {
    ("decoder", "blocks", "attn", "q", "lora_a"): (3, 2, 7),
    ("decoder", "blocks", "attn_norm", "scale"): (3, 7),
    ("decoder", "embed", "added"): (2, 7),
    ("projector", "layers", 0, "weight"): (7, 5),
    ("projector", "layers", 0, "bias"): (7,),
    ("projector", "norm_mean"): (4, 5),
}
NO_DECAY = ("bias", "scale")


def values(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path, shape in SHAPES.items()}


def gradients(step: int) -> dict:
    """Of very unlike size from step to step, so that clipping is at work in some of them."""
    return values(100 + step, 0.02 if step % 3 else 1.5)


def torchs(optim: OptimConfig) -> dict:
    params = {path: torch.nn.Parameter(torch.from_numpy(x.copy())) for path, x in values(0).items() if path[-1] != "norm_mean"}
    groups = []
    for part, rate in ((True, optim.projector_learning_rate or optim.learning_rate), (False, optim.learning_rate)):
        for decays in (True, False):
            of = [p for path, p in params.items() if (path[0] == "projector") == part and (path[-1] not in NO_DECAY) == decays]
            groups.append({"params": of, "lr": rate, "weight_decay": optim.weight_decay if decays else 0.0})
    adamw = torch.optim.AdamW(groups, betas=(optim.b1, optim.b2), eps=optim.eps)
    arguments = transformers.TrainingArguments(
        output_dir="unused", warmup_steps=optim.warmup_steps or optim.warmup_ratio, report_to=[], use_cpu=True
    )
    kind = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[optim.schedule]
    rates = transformers.get_scheduler(
        kind, adamw, num_warmup_steps=arguments.get_warmup_steps(STEPS), num_training_steps=STEPS
    )
    norms = []
    for step in range(STEPS):
        for path, gradient in gradients(step).items():
            if path in params:
                params[path].grad = torch.from_numpy(gradient)
        if optim.max_grad_norm:
            norms.append(float(torch.nn.utils.clip_grad_norm_(list(params.values()), optim.max_grad_norm)))
        adamw.step()
        rates.step()
    return {path: p.detach().numpy() for path, p in params.items()}


def ours(optim: OptimConfig) -> dict:
    params = jax.tree.map(jnp.asarray, unflatten(values(0)))
    optimizer = make_optimizer(optim, STEPS, params)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grads):
        grads, norm = clip(grads, optim.max_grad_norm)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, norm

    for step in range(STEPS):
        grads = gradients(step)
        grads["projector", "norm_mean"] *= 0.0  # nothing flows there
        params, state, norm = update(params, state, unflatten(grads))
        assert float(norm) == pytest.approx(np.sqrt(sum((g**2).sum() for g in grads.values())), rel=1e-5), "before clipping"
    return flatten(params)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_ratio": 0.03, "max_grad_norm": 0.0},
        {"warmup_ratio": 0.28, "schedule": "linear"},
        {"schedule": "linear", "projector_learning_rate": 0.0, "max_grad_norm": 0.0},
        {"schedule": "constant", "warmup_steps": 3, "weight_decay": 0.0, "b1": 0.7, "b2": 0.8, "eps": 1e-3},
    ],
    ids=str,
)
def test_twenty_updates(changes):
    options = {
        "learning_rate": 3e-2,
        "projector_learning_rate": 7e-3,
        "weight_decay": 0.3,
        "max_grad_norm": 0.9,
        "schedule": "cosine",
    }
    optim = OptimConfig(**options | changes)
    start, found, wanted = values(0), ours(optim), torchs(optim)
    for path, value in wanted.items():
        assert np.abs(value - start[path]).max() > 0.02
        np.testing.assert_allclose(found[path], value, atol=1e-6 * np.abs(value).max(), err_msg=str(path), rtol=1e-6)
    fixed = ("projector", "norm_mean")
    np.testing.assert_array_equal(found[fixed], start[fixed])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup_ratio", "steps"), [(0.0, 701), (0.03, 701), (0.03, 100), (0.1, 100)])
def test_rates_over_a_whole_run(kind, warmup_ratio, steps):
    rate = schedule(OptimConfig(schedule=kind, warmup_ratio=warmup_ratio), 2e-5, steps)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    warmup = -int(-steps * warmup_ratio // 1)
    theirs = transformers.get_scheduler(kind, adamw, num_warmup_steps=warmup, num_training_steps=steps)
    wanted = []
    for _ in range(steps):
        wanted.append(theirs.get_last_lr()[0])
        adamw.step()
        theirs.step()
    found = jax.vmap(rate)(jnp.arange(steps))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)  # to the last step, where little is left
    assert float(found[0]) == (0.0 if warmup_ratio else pytest.approx(2e-5, rel=1e-6))


def test_final_fraction_is_reached():
    rate = schedule(OptimConfig(schedule="cosine", final_fraction=0.1), 1.0, 10)
    assert float(rate(10)) == pytest.approx(0.1) and float(rate(0)) == pytest.approx(1.0)
    assert float(rate(5)) == pytest.approx(0.55)


def test_clipping():
    grads = unflatten(gradients(0))
    norm = np.sqrt(sum((g**2).sum() for g in gradients(0).values()))
    clipped, before = clip(grads, 0.25)
    assert float(before) == pytest.approx(norm, rel=1e-6)
    assert float(optax.global_norm(clipped)) == pytest.approx(0.25, rel=1e-4)
    for unchanged in (clip(grads, 0.0)[0], clip(grads, 2 * norm)[0]):
        jax.tree.map(np.testing.assert_array_equal, unchanged, grads)


def test_groups():
    groups = {
        ("decoder", "blocks", "mlp", "up", "lora_b"): "other_decay",
        ("decoder", "norm", "scale"): "other_no_decay",
        ("decoder", "blocks", "attn", "q", "bias"): "other_no_decay",
        ("projector", "layers", 1, "weight"): "projector_decay",
        ("projector", "layers", 1, "bias"): "projector_no_decay",
        ("projector", "pool_norm", "scale"): "projector_no_decay",
        ("projector", "pool", "query"): "projector_decay",
        ("projector", "norm_sd"): "fixed",
    }
    apart = {
        ("tower", "patch", "weight"): "tower_decay",
        ("tower", "norm", "bias"): "tower_no_decay",
        ("decoder", "embed", "added"): "embed_decay",
        ("decoder", "head", "weight"): "embed_decay",
    }
    alike = {path: f"other_{name.split('_', 1)[1]}" for path, name in apart.items()}
    for optim, expected in ((OptimConfig(), alike), (OptimConfig(tower_learning_rate=1e-3, embed_learning_rate=1e-4), apart)):
        wanted = groups | expected
        assert {path: label(path, own_rates(optim)) for path in wanted} == wanted
