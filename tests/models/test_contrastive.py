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


def loss_and_gradients(mesh):
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
        params = jax.device_put(params, to_shardings(state_specs(state, RULES), mesh))
        sharded = {k: jax.device_put(v, RULES.sharding(mesh, "batch", *[None] * (v.ndim - 1))) for k, v in batch.items()}

        def loss(params, batch):
            model = nnx.merge(graphdef, params)
            image = model.encode_image(batch["volumes"], RULES)
            text = model.encode_text(batch["ids"], batch["mask"], RULES, jnp.float32)
            return model.loss(image[:, 0], text[:, 0], RULES), (image, text)

        out, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, sharded)
        return jax.device_get((out, grads))


def test_the_loss_is_the_global_batchs_on_every_mesh():
    (value, (image, text)), grads = loss_and_gradients(make_mesh(MeshConfig(1), jax.devices()[:1]))
    assert (image.shape, text.shape) == ((8, 1 + 8, 6), (8, 9, 6))
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([image, text], 1), axis=-1), 1, atol=1e-6)
    # by hand: the scale multiplies the cosine, without an exponential
    logits = SCALE * (image[:, 0] @ text[:, 0].T).astype(np.float64)
    entropies = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)]
    np.testing.assert_allclose(value, np.mean(entropies), rtol=1e-6)
    (other, features), other_grads = loss_and_gradients(make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2)))
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (features, other_grads), ((image, text), grads)
    )


def test_lengths_below_the_smallest_count_as_it():
    x = jnp.asarray([[3e-13, -4e-13], [0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(normalised(x), [[0.3, -0.4], [0, 0], [0.6, 0.8]], rtol=1e-5)
    gradient = jax.grad(lambda x: normalised(x).sum())(x)
    assert np.isfinite(gradient).all()


def test_a_tower_without_class_token_is_refused():
    with pytest.raises(ValueError, match="select_feature"):
        Contrastive(dataclasses.replace(TOWER, select_feature="patch"), TEXT, 6, jax.random.key(0))
