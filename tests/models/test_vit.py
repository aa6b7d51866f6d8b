"""The vision transformer: what its tokens may depend on, its parameters, other input sizes, meshes, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmed.config import ConfigError, MeshConfig, TowerConfig
from jaxmed.models.position_table import cubic_matrix, linear_matrix
from jaxmed.models.presets_towers import CLIP_L14_336, SIGLIP_SO400M_384, TOWERS, VIT3D
from jaxmed.models.vit import Vit, cut_patches
from jaxmed.nn.encoder_block import encoder_rules
from jaxmed.sharding import Rules, make_mesh, state_specs, to_shardings

RULES = Rules()
TINY = dataclasses.replace(CLIP_L14_336, image=(11, 16), patch=(5, 3), width=12, layers=3, heads=3, mlp=18, channels=2)
TINY_3D = dataclasses.replace(VIT3D, image=(4, 9, 10), patch=(2, 3, 5), width=12, layers=2, heads=3, mlp=14)


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])) as mesh:
        yield mesh


def tower_of(config):
    """(graphdef, random parameters)"""
    graphdef, state = nnx.split(jax.eval_shape(lambda: Vit(config, jax.random.key(0))))
    rng = np.random.default_rng(3)
    return graphdef, jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), nnx.to_pure_dict(state))


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, x):
    return nnx.merge(graphdef, params)(x, RULES)


def images(config, count=2, size=None):
    x = np.random.default_rng(0).normal(size=(count, *(size or config.image), config.channels))
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [
        ("clip_l14_336", 576, 1024),
        ("clip_b32", 49, 768),
        ("siglip_so400m_384", 729, 1152),
        ("vit3d", 2048, 768),
        ("dino_vitb16", 1, 768),
    ],
)
def test_published_towers_give_their_tokens(name, tokens, width, one_device):
    config = TOWERS[name]
    x = jax.ShapeDtypeStruct((2, *config.image, config.channels), jnp.bfloat16)
    out = jax.eval_shape(lambda x: Vit(config, jax.random.key(0))(x, RULES), x)
    assert (out.shape, out.dtype) == ((2, tokens, width), jnp.bfloat16)
    assert config.tokens == tokens


def test_a_patch_holds_its_own_pixels_in_raster_order_with_channels_last(one_device):
    """(row, column, channel) of a pixel is written into it."""
    config = dataclasses.replace(TINY_3D, channels=2)
    d, h, w, c = np.meshgrid(*(np.arange(n) for n in (5, 9, 11, 2)), indexing="ij")
    x = jnp.asarray((1000 * d + 100 * h + 10 * w + c)[None], jnp.float32)
    patches = np.asarray(cut_patches(x, config, encoder_rules(RULES)))
    assert patches.shape == (1, 2 * 3 * 2, 2 * 3 * 5 * 2)
    # patch (1, 2, 0): planes 2 and 3, rows 6 to 8, columns 0 to 4; what is left over in depth and width is in none
    want = [1000 * i + 100 * j + 10 * k + n for i in (2, 3) for j in (6, 7, 8) for k in range(5) for n in range(2)]
    np.testing.assert_array_equal(patches[0, 1 * 6 + 2 * 2 + 0], want)
    assert patches.max() < 4000


def test_left_over_pixels_and_other_images_change_nothing(one_device):
    graphdef, params = tower_of(TINY)
    x = images(TINY)
    before = np.asarray(run(graphdef, params, x))
    after = np.asarray(run(graphdef, params, x.at[:, 10:].set(9.0).at[1].multiply(-2)))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_tokens_that_go_on(one_device):
    """Class token first, then the patches."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 12)), jnp.float32)
    picked = {}
    for feature in ("patch", "cls_patch", "cls"):
        tower = nnx.merge(*tower_of(dataclasses.replace(TINY, select_feature=feature)))
        picked[feature] = np.asarray(tower.selected(h))
    np.testing.assert_array_equal(picked["cls_patch"], h)
    np.testing.assert_array_equal(picked["patch"], h[:, 1:])
    np.testing.assert_array_equal(picked["cls"], h[:, :1])
    siglip = nnx.merge(*tower_of(dataclasses.replace(TINY, class_token=False, class_position=False)))
    np.testing.assert_array_equal(siglip.selected(h), h)


def test_only_the_blocks_that_are_run_exist(one_device):
    for layer in (-1, -3):
        graphdef, params = tower_of(dataclasses.replace(TINY, select_layer=layer))
        assert params["blocks"]["norm1"]["scale"].shape[0] == 4 + layer
        states = jax.jit(lambda p, x, g=graphdef: nnx.merge(g, p).hidden_states(x, RULES))(params, images(TINY))
        assert len(states) == 4 + layer and states[0].shape == (2, 11, 12)
    np.testing.assert_allclose(run(graphdef, params, images(TINY)), states[-1][:, 1:], atol=1e-5)


def test_same_tokens_and_gradients_on_a_mesh_and_with_rematerialisation():
    """(2, 2, 1, 2), at a size for which positions are resized; parameters are split, gradients come back so split."""
    graphdef, params = tower_of(TINY)
    x = np.asarray(images(TINY, 4, (17, 20)))
    meshes = make_mesh(MeshConfig(1), jax.devices()[:1]), make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2))
    results = []
    for mesh, remat in zip(meshes, ("none", "full"), strict=True):
        with jax.set_mesh(mesh):
            state = nnx.split(jax.eval_shape(lambda: Vit(TINY, jax.random.key(0))))[1]
            shardings = to_shardings(state_specs(state, RULES), mesh)
            rows = jax.device_put(x, RULES.sharding(mesh, "batch", None, None, None))

            def loss(params, rows, remat=remat):
                tokens = nnx.merge(graphdef, params)(rows, RULES, remat)
                return jnp.mean(tokens**2), tokens

            split = jax.device_put(params, shardings)
            (_, tokens), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(split, rows)
            assert tokens.sharding == RULES.sharding(mesh, "batch", None, None)
            assert jax.tree.map(lambda g: g.sharding, grads) == shardings
            results.append(jax.device_get((tokens, grads)))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(results[0][1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), *results)


def test_resizing_matrices_keep_constants_and_the_table_itself():
    for new, old in ((7, 5), (3, 8), (5, 5), (1, 4)):
        for matrix in (cubic_matrix(new, old, new / old), cubic_matrix(new, old, (new + 0.1) / old), linear_matrix(new, old)):
            np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(cubic_matrix(6, 6, 1.0), np.eye(6), atol=1e-6)
    np.testing.assert_allclose(linear_matrix(6, 6), np.eye(6), atol=1e-6)


def test_images_that_do_not_fit_are_refused(one_device):
    tower = nnx.merge(*tower_of(TINY))
    for shape in ((1, 11, 16, 3), (1, 4, 16, 2), (1, 3, 11, 16, 2)):
        with pytest.raises(ValueError, match=r"for a tower with patches \(5, 3\) of 2"):
            tower(jnp.zeros(shape), RULES)


def test_configs_that_cannot_be_are_refused():
    for changes in (
        {"select_layer": -4},
        {"patch": (5,)},
        {"final_norm": True},
        {"class_token": False, "select_feature": "cls"},
    ):
        with pytest.raises(ConfigError, match="tower"):
            dataclasses.replace(TINY, **changes)
    with pytest.raises(ConfigError, match=r"no multiple of tower\.heads 5"):
        jax.eval_shape(lambda: Vit(dataclasses.replace(TINY, heads=5), jax.random.key(0)))
    assert TowerConfig().kind == "none"
    assert (SIGLIP_SO400M_384.blocks, SIGLIP_SO400M_384.grid) == (26, (27, 27))
