"""The contrastive model: unit vectors, the loss of the global batch on every mesh, the scale as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmed.config import MeshConfig, TextEncoderConfig
from jaxmed.models.contrastive import Contrastive, normalised
from jaxmed.models.presets_towers import VIT3D
from jaxmed.sharding import Rules, make_mesh, state_specs, to_shardings

RULES = Rules()
TOWER = dataclasses.replace(
    VIT3D, image=(4, 6, 10), patch=(2, 3, 5), width=12, layers=2, heads=3, mlp=14, select_feature="cls_patch"
)
SCALE = 4.37
TEXT = TextEncoderConfig(vocab=29, width=20, layers=1, heads=5, mlp=18, norm_eps=1e-3, positions=9, types=2)


def results_on(mesh):
    """(image tokens, text tokens), and the loss with its gradients by the vectors and the scale."""
    rng = np.random.default_rng(0)
    batch = {
        "volumes": rng.normal(size=(8, 4, 6, 10, 1)).astype(np.float32),
        "ids": rng.integers(0, 29, (8, 9)).astype(np.int32),
    }
    batch["mask"] = (np.arange(9) < rng.integers(1, 10, (8, 1))).astype(np.int32)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(jax.eval_shape(lambda: Contrastive(TOWER, TEXT, 6, jax.random.key(0))))
        params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), nnx.to_pure_dict(state))
        params["logit_scale"] = np.float32(SCALE)
        shardings = to_shardings(state_specs(state, RULES), mesh)
        params = jax.device_put(params, shardings)
        sharded = {k: jax.device_put(v, RULES.sharding(mesh, "batch", *[None] * (v.ndim - 1))) for k, v in batch.items()}

        def features(params, batch):
            model = nnx.merge(graphdef, params)
            text = model.encode_text(batch["ids"], batch["mask"], RULES, jnp.float32)
            return model.encode_image(batch["volumes"], RULES), text

        def loss(params, image, text):
            return nnx.merge(graphdef, params).loss(image[:, 0], text[:, 0], RULES)

        tokens = jax.jit(features)(params, sharded)
        value, (d_params, *d_tokens) = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(params, *tokens)
        whole = jax.jit(jax.grad(lambda p: loss(p, *features(p, sharded)))).trace(params).out_info
        assert jax.tree.map(lambda g: g.sharding.spec, whole) == jax.tree.map(lambda s: s.spec, shardings)
        return jax.device_get((tokens, value, d_params["logit_scale"], d_tokens))


def test_the_loss_is_the_global_batchs_on_every_mesh():
    one = results_on(make_mesh(MeshConfig(1), jax.devices()[:1]))
    (image, text), value, _, _ = one
    assert (image.shape, text.shape) == ((8, 1 + 8, 6), (8, 9, 6))
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([image, text], 1), axis=-1), 1, atol=1e-6)
    # by hand: the scale multiplies the cosine, without an exponential
    logits = SCALE * (image[:, 0] @ text[:, 0].T).astype(np.float64)
    entropies = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)]
    np.testing.assert_allclose(value, np.mean(entropies), rtol=1e-6)
    other = results_on(make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), other, one)


def test_lengths_below_the_smallest_count_as_it():
    x = jnp.asarray([[3e-13, -4e-13], [0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(normalised(x), [[0.3, -0.4], [0, 0], [0.6, 0.8]], rtol=1e-5)
    gradient = jax.grad(lambda x: normalised(x).sum())(x)
    assert np.isfinite(gradient).all()


def test_a_tower_without_class_token_is_refused():
    with pytest.raises(ValueError, match="select_feature"):
        Contrastive(dataclasses.replace(TOWER, select_feature="patch"), TEXT, 6, jax.random.key(0))
