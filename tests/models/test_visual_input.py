"""From a batch's image input to the decoder's: packed codes, statistics, position table, who may see which image token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxmed.config import (
    DecoderConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ProjectorConfig,
    RopeConfig,
    VisualConfig,
)
from jaxmed.data.embeddings import merge_neighbours, pack_codes
from jaxmed.models.vlm import Vlm, gather_tokens, unpack_codes
from jaxmed.sharding import Rules, batch_specs, make_mesh
from jaxmed.types import Batch

RULES = Rules()
DECODER = DecoderConfig(
    vocab=30, width=12, layers=1, heads=2, kv_heads=1, head_dim=6, mlp=8, norm_eps=1e-5, rope=RopeConfig(50.0), max_positions=64
)
TEXT = 14


def one_device():
    return make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.mark.parametrize("order", ["identity", "reverse"])
@pytest.mark.parametrize(("grid", "merge"), [((2, 3, 4), (1, 1, 1)), ((2, 3, 2), (1, 2, 2)), ((1, 2, 3), (2, 1, 3))])
def test_codes_unpack_as_the_loader_would(grid, merge, order):
    """On the device: bits, channel order, merge of neighbours; on the host the same from floats."""
    full = [g * m for g, m in zip(grid, merge, strict=True)]
    signs = np.where(np.random.default_rng(3).random((2, 18, *full)) < 0.5, -1.0, 1.0).astype(np.float32)
    wanted = []
    for volume in signs:
        channels = volume[::-1] if order == "reverse" else volume
        merged = merge_neighbours(channels, merge)
        wanted.append(merged.reshape(len(merged), -1).T)
    tokens = int(np.prod(grid))
    visual = VisualConfig(
        "codes", tokens=tokens, features=18 * int(np.prod(merge)), grid=grid, merge=merge, channel_order=order
    )
    packed = np.stack([pack_codes(v).reshape(-1) for v in signs])[:, None]
    with jax.set_mesh(one_device()):
        ours = unpack_codes(jnp.asarray(packed), visual)
    np.testing.assert_array_equal(ours[:, 0], np.stack(wanted))


def experiment(**visual) -> Experiment:
    made = {"images": 2, "tokens": 6, "features": 18, "grid": (1, 2, 3)} | visual
    model = ModelConfig(decoder=DECODER, projector=ProjectorConfig("mlp2x_gelu"), dtype="float32")
    return Experiment(model=model, visual=VisualConfig(**made), lora=LoraConfig(rank=0))


def build(made: Experiment):
    """-> graphdef, random weights (the same for the same experiment and for those without more parameters)."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: Vlm(made, jax.random.key(0), split=False)))
    rng = np.random.default_rng(6)

    def draw(x):
        return (0.4 * rng.standard_normal(x.shape)).astype(np.float32)

    return graphdef, jax.tree.map(draw, nnx.to_pure_dict(state))


def embedded(graphdef, params, batch):
    """-> model input [B, T, D], image tokens [B, I * N, D], text alone [B, T, D]"""

    def run(params, batch):
        model = nnx.merge(graphdef, params)
        text = model.decoder.embed(batch.tokens, RULES, jnp.float32)
        return model.embed(batch, RULES), model.image_tokens(batch, RULES), text

    return [np.asarray(x) for x in jax.jit(run)(params, batch)]


def batch_of(images, index) -> Batch:
    rows, count, tokens = images.shape[:3]
    t = np.tile(np.arange(TEXT, dtype=np.int32), (rows, 1))
    none = np.full((rows, 1), -1, np.int32)
    made = Batch(
        tokens=t,
        positions=t,
        segment_ids=np.ones_like(t),
        image_index=np.asarray(index, np.int32),
        supervised=none,
        labels=none * 0,
        images=images,
        image_token_mask=np.ones((rows, count, tokens), bool),
        image_grid=np.tile(np.asarray([1, 2, 3], np.int32), (rows, count, 1)),
    )
    specs = batch_specs(RULES, image_ndim=images.ndim)
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(one_device(), s)), made, specs)


INDEX = [[-1, *range(12), -1], [-1, -1, 6, 7, 8, 9, 10, 11, 3, 3, 0, -1, -1, -1]]


def features(seed=0):
    return np.random.default_rng(seed).standard_normal((2, 2, 6, 18)).astype(np.float32)


def test_each_row_takes_its_own_tokens():
    with jax.set_mesh(one_device()):
        x = batch_of(features(), INDEX)
        ours = np.asarray(gather_tokens(x.images, x.image_index, RULES))
    flat = features().reshape(2, 12, 18)
    for row in range(2):
        for t, i in enumerate(INDEX[row]):
            if i >= 0:
                np.testing.assert_array_equal(ours[row, t], flat[row, i])


def test_text_keeps_its_embeddings_and_images_give_theirs():
    with jax.set_mesh(one_device()):
        graphdef, params = build(experiment())
        batch = batch_of(features(), INDEX)
        merged, images, text = embedded(graphdef, params, batch)
        none = nnx.merge(graphdef, params).embed(dataclasses.replace(batch, images=batch.images[:, :0]), RULES)
    for row in range(2):
        for t, i in enumerate(INDEX[row]):
            np.testing.assert_allclose(merged[row, t], images[row, i] if i >= 0 else text[row, t], atol=1e-5)
    np.testing.assert_allclose(none, text, atol=1e-6)


def test_statistics_and_positions_go_by_the_token_within_its_image():
    """The statistics get no gradient; every image starts at the table's first row."""
    with jax.set_mesh(one_device()):
        plain, _ = build(experiment())
        graphdef, params = build(experiment(norm=True, positions=True))
        own = params["projector"]
        own["norm_sd"] = 0.5 + np.abs(own["norm_sd"])
        by_hand = ((features() - own["norm_mean"]) / own["norm_sd"]).astype(np.float32)
        without = {"decoder": params["decoder"], "projector": {"layers": own["layers"]}}
        wanted = embedded(plain, without, batch_of(by_hand, INDEX))[1] + np.tile(own["positions"], (2, 1))
        batch = batch_of(features(), INDEX)
        merged, images, _ = embedded(graphdef, params, batch)
        np.testing.assert_allclose(images, wanted, atol=2e-5)
        for t, i in enumerate(INDEX[1]):
            if i >= 0:
                np.testing.assert_allclose(merged[1, t], wanted[1, i], atol=2e-5)

        def loss(p):
            return jnp.sum(nnx.merge(graphdef, p).embed(batch, RULES) ** 2)

        grads = jax.jit(jax.grad(loss))(params)["projector"]
    assert not np.any(grads["norm_mean"]) and not np.any(grads["norm_sd"]) and np.any(grads["positions"])


def test_codes_and_their_floats_give_the_same_model_input():
    signs = np.where(np.random.default_rng(7).random((2, 2, 18, 1, 2, 3)) < 0.5, -1.0, 1.0).astype(np.float32)
    codes = np.stack([[pack_codes(v).reshape(-1) for v in row] for row in signs])
    floats = signs.reshape(2, 2, 18, 6).transpose(0, 1, 3, 2)
    with jax.set_mesh(one_device()):
        found = [
            embedded(*build(experiment(kind=k)), batch_of(x, INDEX))[0] for k, x in (("embeddings", floats), ("codes", codes))
        ]
    np.testing.assert_allclose(*found, atol=1e-5)
