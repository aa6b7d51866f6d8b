"""Image towers and the text encoder against transformers' (CLIP, SigLIP, BERT) and against torch (DINO, ViT3D): outputs of
every block, features, other input sizes, gradients. Tiny models with sizes that no published one has."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from spec_fill import fill, filled_by_name
from tower_pair import (
    RULES,
    Dino,
    Vit3d,
    at_root,
    channels_last,
    check_gradients,
    close,
    filled,
    one_device,
    randomise,
    state_of,
    value_and_gradients,
)
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from jaxmed.checkpoint.tower_config import text_encoder_config, tower_config
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX, text_encoder_rows, tower_rows
from jaxmed.model_config import TowerConfig
from jaxmed.models.presets_towers import DINO_VITB16, VIT3D
from jaxmed.models.text_encoder import TextEncoder
from jaxmed.models.vit import Vit

HF_PREFIX = f"{TOWER_PREFIX}vision_model."
HF = {
    "clip": (
        CLIPVisionModel,
        CLIPVisionConfig(
            hidden_size=42,
            intermediate_size=53,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=37,
            patch_size=7,
            layer_norm_eps=3e-2,
        ),
    ),
    "siglip": (
        SiglipVisionModel,
        SiglipVisionConfig(
            hidden_size=45,
            intermediate_size=31,
            num_hidden_layers=4,
            num_attention_heads=5,
            image_size=29,
            patch_size=6,
            layer_norm_eps=2e-2,
        ),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with jax.set_mesh(one_device()) as mesh:
        yield mesh


def images(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tower_pair(model: torch.nn.Module, config: TowerConfig, prefix: str) -> tuple[nnx.GraphDef, dict]:
    rows = at_root(tower_rows(config))
    return filled(lambda: Vit(config, jax.random.key(0)), rows, state_of(model, prefix))


@functools.cache
def hf_model(name: str) -> tuple[torch.nn.Module, TowerConfig]:
    cls, hf = HF[name]
    hf._attn_implementation = "eager"
    # as a part of a whole model's config, where SigLIP's layer is free too
    found = tower_config({"model_type": "llava", "vision_config": hf.to_dict()}, "config.json", None, -2, "patch")
    assert found.assumed == ()
    return randomise(cls(hf), seed=5), found.config


@pytest.mark.parametrize("name", HF)
def test_hidden_states_of_every_block_equal_transformers(name):
    model, config = hf_model(name)
    config = dataclasses.replace(config, select_layer=-1)
    graphdef, params = tower_pair(model, config, HF_PREFIX)
    size = [2 * n + 3 for n in config.image]  # another size, where positions are resized
    x = images((2, config.channels, *size), 1)
    with torch.no_grad():
        out = model(torch.from_numpy(x), output_hidden_states=True, interpolate_pos_encoding=True)
    ours = jax.jit(lambda p, x: nnx.merge(graphdef, p).hidden_states(x, RULES))(params, channels_last(x))
    assert len(ours) == config.layers
    for i in range(config.layers - 1):
        close(ours[i], out.hidden_states[i + 1], 1e-5, f"block {i}")
    last = torch.from_numpy(np.array(ours[-1]))
    close(model.post_layernorm(last).detach() if name == "siglip" else last, out.last_hidden_state, 1e-5)


@pytest.mark.parametrize("name", HF)
def test_the_selected_layer_and_its_gradients_equal_transformers(name):
    model, config = hf_model(name)
    graphdef, params = tower_pair(model, config, HF_PREFIX)
    x = images((3, config.channels, *config.image), 2)
    want = model(torch.from_numpy(x), output_hidden_states=True).hidden_states[-2][:, int(config.class_token) :]
    assert want.shape[1:] == (config.tokens, config.width)
    weights = images(tuple(want.shape), 3)
    model.zero_grad()
    (want * torch.from_numpy(weights)).sum().backward()
    got, grads = value_and_gradients(lambda p: nnx.merge(graphdef, p)(channels_last(x), RULES), params, weights)
    close(got, want.detach(), 1e-5)
    check_gradients(at_root(tower_rows(config)), grads, state_of(model, HF_PREFIX, gradients=True), 1e-4)


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("factors", [(1.0, 1.5), (0.6, 2.2), (2.0, 2.0), (1.0, 1.0)])
def test_positions_at_other_input_sizes_equal_transformers(name, factors):
    model, config = hf_model(name)
    graphdef, params = tower_pair(model, config, HF_PREFIX)
    size = [int(i * f) + 1 for i, f in zip(config.image, factors, strict=True)]
    count = math.prod(n // p for n, p in zip(size, config.patch, strict=True)) + config.class_token
    want = model.embeddings.interpolate_pos_encoding(torch.zeros(1, count, config.width), *size)
    close(nnx.merge(graphdef, params).position_table(tuple(size), RULES), want.reshape(count, -1).detach(), 1e-5)


BERT = BertConfig(
    vocab_size=61,
    hidden_size=42,
    num_hidden_layers=3,
    num_attention_heads=7,
    intermediate_size=33,
    max_position_embeddings=23,
    type_vocab_size=3,
    layer_norm_eps=2e-2,
    attn_implementation="eager",
)


def test_bert_equals_transformers_forward_and_backward():
    """Padding attends to text in both."""
    model = randomise(BertModel(BERT), seed=8)
    config = text_encoder_config(BERT.to_dict(), "config.json", None).config
    rows = at_root(text_encoder_rows(config, ""))
    graphdef, params = filled(lambda: TextEncoder(config, jax.random.key(0)), rows, state_of(model, ""))
    ids = np.random.default_rng(0).integers(1, 61, (4, 19)).astype(np.int32)  # torch gives the row of id 0 no gradient
    mask = (np.arange(19) < np.array([[19], [7], [1], [12]])).astype(np.int32)
    out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    want = out.last_hidden_state
    blocks = jax.jit(lambda p: nnx.merge(graphdef, p).hidden_states(ids, mask, RULES, jnp.float32))(params)
    assert len(blocks) == 3
    for i, block in enumerate(blocks):
        close(block, out.hidden_states[i + 1].detach(), 1e-5, f"block {i}")
    weights = images((4, 19, 42), 6)
    (want * torch.from_numpy(weights)).sum().backward()
    got, grads = value_and_gradients(lambda p: nnx.merge(graphdef, p)(ids, mask, RULES, jnp.float32), params, weights)
    close(got, want.detach(), 1e-5)
    check_gradients(rows, grads, state_of(model, "", gradients=True), 1e-4)


VIT3D_TINY = dataclasses.replace(
    VIT3D, image=(4, 9, 10), patch=(2, 3, 5), channels=2, width=39, layers=3, heads=3, mlp=28, norm_eps=3e-2
)
DINO_TINY = dataclasses.replace(DINO_VITB16, image=(35, 35), patch=(7, 7), width=40, layers=2, heads=5, mlp=66, norm_eps=4e-2)


@functools.cache
def vit3d() -> torch.nn.Module:
    c = VIT3D_TINY
    return randomise(Vit3d(c.image, c.patch, c.channels, c.width, c.mlp, c.layers, c.heads, c.norm_eps), seed=3)


@functools.cache
def dino() -> torch.nn.Module:
    c = DINO_TINY
    return randomise(Dino(c.image[0], c.patch[0], c.width, c.mlp, c.layers, c.heads, c.norm_eps), seed=3)


def test_vit3d_equals_torch_forward_and_backward():
    model, config = vit3d(), dataclasses.replace(VIT3D_TINY, select_feature="cls_patch")
    graphdef, params = tower_pair(model, config, TOWER_PREFIX)
    x = images((2, 2, 4, 9, 10), 1)
    want = model(torch.from_numpy(x))[0]
    weights = images(tuple(want.shape), 2)
    (want * torch.from_numpy(weights)).sum().backward()
    got, grads = value_and_gradients(lambda p: nnx.merge(graphdef, p)(channels_last(x), RULES), params, weights)
    close(got, want.detach(), 1e-5)
    check_gradients(at_root(tower_rows(config)), grads, state_of(model, TOWER_PREFIX, gradients=True), 1e-4)


def test_an_earlier_block_of_vit3d_is_taken_without_the_norm():
    model, config = vit3d(), dataclasses.replace(VIT3D_TINY, select_layer=-2, final_norm=False)
    graphdef, params = tower_pair(model, config, TOWER_PREFIX)
    x = images((2, 2, 4, 9, 10), 1)
    got = jax.jit(lambda p: nnx.merge(graphdef, p)(channels_last(x), RULES))(params)
    close(got, model(torch.from_numpy(x))[1][1][:, 1:].detach(), 1e-5)


@pytest.mark.parametrize("size", [(4, 9, 10), (9, 7, 26), (2, 20, 5)])
def test_vit3d_positions_are_resized_as_torch_resizes_volumes(size):
    model, config = vit3d(), VIT3D_TINY
    graphdef, params = tower_pair(model, config, TOWER_PREFIX)
    grid = [n // p for n, p in zip(size, config.patch, strict=True)]
    table = model.patch_embedding.position_embeddings.detach().reshape(1, *config.grid, -1).permute(0, 4, 1, 2, 3)
    want = torch.nn.functional.interpolate(table, size=grid, mode="trilinear").flatten(2).transpose(1, 2)[0]
    close(nnx.merge(graphdef, params).position_table(size, RULES), want, 1e-6)


def test_dino_equals_torch_forward_and_backward():
    model, config = dino(), DINO_TINY
    graphdef, params = tower_pair(model, config, TOWER_PREFIX)
    x = images((2, 3, 50, 63), 1)
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out.detach())) for block in model.blocks]
    want = model(torch.from_numpy(x))[:, :1]
    blocks = jax.jit(lambda p: nnx.merge(graphdef, p).hidden_states(channels_last(x), RULES))(params)
    assert len(blocks) == len(outputs) == config.layers
    for i, (block, output) in enumerate(zip(blocks, outputs, strict=True)):
        close(block, output, 1e-5, f"block {i}")
    for hook in hooks:
        hook.remove()
    weights = images(tuple(want.shape), 2)
    (want * torch.from_numpy(weights)).sum().backward()
    got, grads = value_and_gradients(lambda p: nnx.merge(graphdef, p)(channels_last(x), RULES), params, weights)
    close(got, want.detach(), 1e-5)
    check_gradients(at_root(tower_rows(config)), grads, state_of(model, TOWER_PREFIX, gradients=True), 1e-4)


@pytest.mark.parametrize("size", [(35, 35), (36, 40), (38, 38), (21, 35), (96, 64)])
def test_dino_positions_are_resized_as_its_own_code_does(size):
    """(36, 40): as many patches as the table has rows, but not square; DINO's code then resizes all the same."""
    model, config = dino(), DINO_TINY
    graphdef, params = tower_pair(model, config, TOWER_PREFIX)
    want = model.positions(*size, (size[0] // 7) * (size[1] // 7))[0].detach()
    close(nnx.merge(graphdef, params).position_table(size, RULES), want, 1e-6)


def test_dino_gives_the_values_that_upstreams_modules_gave():
    """Class tokens of two slices, and of an image of another size, where a plain resize by the sizes' ratio would fail."""
    config = dataclasses.replace(DINO_VITB16, image=(32, 32), width=24, layers=2, heads=3, mlp=96)
    model = Dino(32, 16, 24, 96, 2, 3, 1e-6)
    tensors = {name: filled_by_name(name, array.shape) for name, array in state_of(model, TOWER_PREFIX).items()}
    graphdef, params = filled(lambda: Vit(config, jax.random.key(0)), at_root(tower_rows(config)), tensors)
    run = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, RULES)[:, 0, :4])
    slices = (fill((5, 3, 32, 32), 7) + 0.5).astype(np.float32)
    want = [[-2.319216894, 0.842505022, -0.212972111, 1.244481983], [-2.247624845, 0.856188392, -0.125517137, 1.232094204]]
    np.testing.assert_allclose(np.asarray(run(params, channels_last(slices)))[[0, 4]], want, atol=2e-6)
    other = (fill((1, 3, 64, 48), 7) + 0.5).astype(np.float32)
    want = [[-2.260450715, 0.838267499, -0.144145015, 1.278488771]]
    np.testing.assert_allclose(run(params, channels_last(other)), want, atol=1e-5)
