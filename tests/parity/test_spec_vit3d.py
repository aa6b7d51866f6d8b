"""M3D-LaMed in a tiny size against torch: logits, loss, every gradient, what the splice reads; its projectors over all their
settings, the special tokens of three vocabularies.

Axis letters: B batch, T text, N tokens of a volume, C features, D decoder width.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from flax import nnx
from spec_pair import TorchParts, logits, one_program, placeholder_rows
from torch_pair import RULES, one_device, torch_llama
from tower_pair import Vit3d, randomise

from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.load import named_arrays
from jaxmed.checkpoint.projector_tables import PROJECTOR
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.checkpoint.transforms import Vocabulary
from jaxmed.config import (
    DataConfig,
    DecoderConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    RopeConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.models.presets_towers import VIT3D
from jaxmed.models.projector import Projector
from jaxmed.train.loss import token_losses
from jaxmed.types import Batch

pytestmark = pytest.mark.usefixtures("compiled_quickly")
DECODER = DecoderConfig(304, 64, 2, 4, 2, 16, 90, 1e-5, RopeConfig(5e5), 128, initializer_range=0.25)
TOWER = dataclasses.replace(VIT3D, image=(8, 64, 64), width=48, layers=2, heads=4, mlp=80)
TOKENS, PLACES, LENGTH, VOCAB = 32, 4, 20, 512
PLACEHOLDER, END = 300, 301
LORA = LoraConfig(3, 7.5, 0.0)
PROMPTS = ([1, *[PLACEHOLDER] * PLACES, 17, 40, 8, 133], [1, *[PLACEHOLDER] * PLACES, 95, 3])
ANSWERS = ([61, 7, 250, END], [77, 12, 5, 205, 9, END])


def experiment(rank: int, dtype: str = "float32") -> Experiment:
    model = ModelConfig(DECODER, tower=TOWER, projector=ProjectorConfig("spp"), dtype=dtype)
    visual = VisualConfig("volumes", tokens=TOKENS, features=48, grid=TOWER.grid, volume=TOWER.image)
    train = TrainConfig(remat="none", attention_chunk=8, loss_chunk=3, trainable="all")
    lora = dataclasses.replace(LORA, rank=rank)
    return Experiment(model, visual, lora, train=train, data=DataConfig(batch=2))


class Spp(torch.nn.Module):
    """Means over cubes of a grid, or over as many tokens in a row, then a head."""

    def __init__(self, features: int, width: int, config: ProjectorConfig):
        super().__init__()
        layers = [torch.nn.Linear(features, width)]
        for _ in range(config.spp_depth - 1):
            layers += ([torch.nn.GELU()] if config.spp_head == "mlp" else []) + [torch.nn.Linear(width, width)]
        self.projector, self.config = torch.nn.Sequential(*layers), config

    def forward(self, x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """[B, N, C] -> [B, N', D]"""
        x, size = x.transpose(1, 2), self.config.spp_size
        if self.config.spp_pooling == "spatial":
            x = torch.nn.functional.avg_pool3d(x.unflatten(2, grid), size).flatten(2)
        else:
            x = torch.nn.functional.avg_pool1d(x, size**3)
        return self.projector(x.transpose(1, 2))


@functools.cache
def upstream() -> TorchParts:
    tower = randomise(Vit3d(TOWER.image, TOWER.patch, 1, 48, 80, 2, 4, 1e-5), seed=7, spread=0.1)
    parts = {TOWER_PREFIX: tower, PROJECTOR: randomise(Spp(48, 64, ProjectorConfig("spp")), seed=8), "": torch_llama(DECODER)}
    return TorchParts(parts, LORA.rank, LORA.alpha / LORA.rank)


def volumes() -> np.ndarray:
    """[B, I, D, H, W, 1]"""
    return np.random.default_rng(3).random((2, 1, *TOWER.image, 1), np.float32)


def torch_logits(row: int) -> torch.Tensor:
    """[T, V]"""
    model, ids = upstream(), PROMPTS[row] + ANSWERS[row]
    features = model.run(TOWER_PREFIX, torch.from_numpy(volumes()[row][None, ..., 0]))[0][:, 1:]
    tokens = model.run(PROJECTOR, features, TOWER.grid)[0]
    text = model.tensors["model.embed_tokens.weight"][ids]
    embeds = torch.cat([text[:1], tokens, text[1 + PLACES :]])
    return model.run("", inputs_embeds=embeds[None]).logits[0]


def labels(row: int) -> list[int]:
    return [-100] * len(PROMPTS[row]) + ANSWERS[row]


def batch(prompts=PROMPTS, images: np.ndarray | None = None) -> Batch:
    rows = [(prompt + answer, labels(n), 1) for n, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True))]
    return placeholder_rows(rows, PLACES, LENGTH, volumes() if images is None else images, TOKENS)


@functools.cache
def forward(rank: int, dtype: str = "float32"):
    graphdef, params = upstream().ours(experiment(rank, dtype))
    return functools.partial(one_program(logits, graphdef), params)


def test_logits_loss_and_gradients_equal_torch():
    """Of tower, projector, tables and adapters; adapters' B is zero, so their A has none."""

    graphdef, params = upstream().ours(experiment(LORA.rank))

    def loss(params, batch):
        sums, counts, _ = token_losses(nnx.merge(graphdef, params), batch, RULES, None, 3)
        return jnp.sum(sums) / jnp.sum(counts)

    with jax.set_mesh(one_device()):
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch())
    ours, total, count = forward(0)(batch()), 0.0, 0
    for row in range(2):
        wanted, n = torch_logits(row), len(labels(row))
        np.testing.assert_allclose(ours[row, :n, :304], wanted.detach(), atol=2e-4)
        total = total + torch.nn.functional.cross_entropy(wanted[:-1], torch.tensor(labels(row)[1:]), reduction="sum")
        count += len(ANSWERS[row])
    (total / count).backward()
    assert float(value) == pytest.approx(total.item() / count, rel=1e-5)
    found = named_arrays(jax.device_get(grads), experiment_rows(experiment(LORA.rank)))
    tensors = upstream().tensors
    assert found.keys() == tensors.keys() and sum("lora_B" in name for name in found) == 14
    largest = max(float(x.grad.abs().max()) for x in tensors.values())
    for name, x in tensors.items():
        np.testing.assert_allclose(found[name], x.grad, rtol=1e-3, atol=2e-6 * largest, err_msg=name)
        assert np.any(found[name]) != ("lora_A" in name), name


def test_ids_under_the_image_are_never_read():
    """Not a bit of the logits depends on them; it does on the volume and on any other id."""
    first = forward(0)(batch())
    other = [[1, 5, 301, 0, 77, *prompt[5:]] for prompt in PROMPTS]
    np.testing.assert_array_equal(forward(0)(batch(other)), first)
    changed = volumes()
    changed[1, 0, 5, 40, 20] += 1.0
    found = forward(0)(batch(images=changed))
    np.testing.assert_array_equal(found[0], first[0])
    assert np.abs(found[1, :13] - first[1, :13]).max() > 1e-4
    assert (forward(0)(batch([[2, *prompt[1:]] for prompt in PROMPTS])) != first).any()


def test_adapters_without_b_change_no_bit():
    np.testing.assert_array_equal(forward(LORA.rank)(batch()), forward(0)(batch()))


def test_bfloat16_is_near_float32():
    exact, short = (f(batch())[..., :304] for f in (forward(0), forward(0, "bfloat16")))
    for row in range(2):
        n = len(labels(row))
        cosine = (exact[row, :n] * short[row, :n]).sum(-1) / np.linalg.norm(exact[row, :n], axis=-1)
        assert (cosine / np.linalg.norm(short[row, :n], axis=-1)).min() > 0.999


# -- parts -----------------------------------------------------------------------------------------------------------------


def test_heads_and_qkv_in_the_other_order_would_be_noticed():
    """The fused matrix is [q, k, v][head][feature]; read as [head][q, k, v][feature], or with the other GELU, it fails."""
    module = upstream().modules[TOWER_PREFIX]
    x = torch.from_numpy(volumes()[:, 0, ..., 0])[:, None]
    tensors = dict(module.named_parameters())
    swapped = {
        name: w.reshape(4, 3, 12, 48).transpose(0, 1).reshape(w.shape)
        for name, w in tensors.items()
        if name.endswith("qkv.weight")
    }
    assert len(swapped) == 2
    exact, other = (torch.func.functional_call(module, tensors | change, (x,))[0] for change in ({}, swapped))
    assert (exact - other).abs().max() > 1e-2


def test_spp_in_all_of_its_settings():
    """Heads, depths, poolings and sizes on a grid that leaves remainders: values and how many tokens come out."""
    grid, seen = (5, 9, 7), 0
    count = math.prod(grid)
    x = np.random.default_rng(1).standard_normal((2, count, 6)).astype(np.float32)
    visual = VisualConfig("volumes", tokens=count, features=6, grid=grid)
    with jax.set_mesh(one_device()):
        placed = jax.device_put(x[:, None], RULES.sharding(jax.sharding.get_mesh(), "batch", None, None, None))
        rest = jnp.ones((2, 1, count), bool), jnp.tile(jnp.asarray(grid), (2, 1, 1)), RULES
        for head, depth, pooling, size in itertools.product(["mlp", "linear"], [1, 2, 3], ["spatial", "sequence"], [1, 2, 4]):
            config = ProjectorConfig("spp", spp_head=head, spp_depth=depth, spp_pooling=pooling, spp_size=size)
            module = Spp(6, 9, config)
            linears = [m for m in module.projector if isinstance(m, torch.nn.Linear)]
            layers = {i: {"weight": m.weight, "bias": m.bias} for i, m in enumerate(linears)}
            params = jax.tree.map(lambda p: jnp.asarray(p.detach().numpy()), {"layers": layers})
            shape = functools.partial(Projector, config, visual, 9, jax.random.key(0))
            graphdef, abstract = nnx.split(jax.eval_shape(shape))
            assert jax.tree.map(jnp.shape, nnx.to_pure_dict(abstract)) == jax.tree.map(jnp.shape, params)
            wanted = module(torch.from_numpy(x), grid).detach().numpy()
            found = np.asarray(nnx.merge(graphdef, params)(placed, *rest))
            places = math.prod(n // size for n in grid) if pooling == "spatial" else count // size**3
            assert found.shape == wanted.shape == (2, places, 9) and config.places(count, grid) == places
            np.testing.assert_allclose(found, wanted, atol=1e-5)
            seen += 1
    assert seen == 36


@pytest.mark.parametrize(
    ("name", "size", "rows"), [("LLaMA-2", 32000, 32000), ("Phi-3", 32011, 32064), ("Llama-3", 128256, 128256)]
)
def test_special_tokens_of_three_vocabularies(name, size, rows):
    """Placeholder, box and segmentation tokens come behind the tokenizer's last; the tables follow it and become shorter where
    they were longer (Phi-3's). New rows are the mean of the others."""
    added = ("<im_patch>", "<bx_start>", "<bx_end>", "[SEG]")
    words = {f"w{i}": i for i in range(size)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(raw, {}, (2,), added)
    assert [tokenizer.token_id(token) for token in added] == list(range(size, size + 4))
    assert (tokenizer.base_size, tokenizer.size) == (size, size + 4)
    assert tokenizer.encode("<im_patch><im_patch>w7", special=False) == [size, size, 7]
    table = np.random.default_rng(0).standard_normal((rows, 2)).astype(np.float32)
    transform = Vocabulary(size, 4, rows - size)
    resized = transform.write(transform.read(table, (size + 512, 2), (slice(None), slice(None))), None)
    assert resized.shape == (size + 4, 2)
    np.testing.assert_array_equal(resized[:size], table[:size])
    np.testing.assert_allclose(resized[size:], np.tile(table[:size].astype(np.float64).mean(0), (4, 1)), atol=1e-6)
