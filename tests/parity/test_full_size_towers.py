"""Towers of the published widths against torch, where rounding has more to add up: minutes on a laptop."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from tower_pair import RULES, Dino, Vit3d, at_root, channels_last, filled, one_device, randomise, state_of
from transformers import SiglipVisionConfig, SiglipVisionModel

from jaxmed.checkpoint.tower_tables import TOWER_PREFIX, tower_rows
from jaxmed.models.presets_towers import DINO_VITB16, SIGLIP_SO400M_384, VIT3D
from jaxmed.models.vit import Vit

pytestmark = pytest.mark.slow


def ours(config, tensors, x):
    with jax.set_mesh(one_device()):
        graphdef, params = filled(lambda: Vit(config, jax.random.key(0)), at_root(tower_rows(config)), tensors)
        return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, RULES))(params, channels_last(x)))


def test_vit3d_of_its_published_size():
    model = randomise(Vit3d(VIT3D.image, VIT3D.patch, 1, 768, 3072, 12, 12, 1e-5), seed=1, spread=0.02)
    x = np.random.default_rng(0).random((1, 1, *VIT3D.image), np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x))[0].numpy()
    config = dataclasses.replace(VIT3D, select_feature="cls_patch")
    tensors = state_of(model, TOWER_PREFIX)
    assert np.abs(ours(config, tensors, x) - want).max() < 2e-5
    for changed in ({"activation": "gelu_tanh"}, {"norm_eps": 1e-6}):
        assert np.abs(ours(dataclasses.replace(config, **changed), tensors, x) - want).max() > 1e-4, changed


def test_dino_of_its_published_size():
    model = randomise(Dino(224, 16, 768, 3072, 12, 12, 1e-6), seed=1, spread=0.02)
    x = np.random.default_rng(0).random((2, 3, 224, 224), np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x))[:, :1].numpy()
    tensors = state_of(model, TOWER_PREFIX)
    assert np.abs(ours(DINO_VITB16, tensors, x) - want).max() < 5e-5
    for changed in ({"activation": "gelu_tanh"}, {"norm_eps": 1e-5}):
        assert np.abs(ours(dataclasses.replace(DINO_VITB16, **changed), tensors, x) - want).max() > 5e-5, changed


def test_siglip_of_its_published_width():
    hf = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=2, num_attention_heads=16, image_size=384, patch_size=14
    )
    hf._attn_implementation = "eager"
    model = randomise(SiglipVisionModel(hf), seed=1, spread=0.02)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 384, 384)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x), output_hidden_states=True).hidden_states[-2].numpy()
    config = dataclasses.replace(SIGLIP_SO400M_384, layers=2)
    got = ours(config, state_of(model, f"{TOWER_PREFIX}vision_model."), x)
    assert np.abs(got - want).max() < 2e-4
