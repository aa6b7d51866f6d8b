"""The same numbers on every mesh, and proof that the mesh is used: bytes a device, attention's work, the merge's silence."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_case import EXPERIMENT, LENGTH, ROWS, Outcome, make_batch, train

from jaxmed.config import LoraConfig, MeshConfig, TrainConfig
from jaxmed.models.vlm import gather_tokens
from jaxmed.nn.attention import Layout, Mask, attention
from jaxmed.sharding import Rules, balanced_order, device_bytes, make_mesh, mesh_notices
from jaxmed.train.init import abstract_state, blueprint, flatten, initialised

SHAPES = [(8, 1, 1, 1), (2, 2, 1, 2), (1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 4, 1), (1, 2, 1, 4)]
MORE = [(2, 1, 4, 1), (1, 1, 4, 2), (1, 4, 2, 1), (1, 1, 2, 4), (4, 2, 1, 1), (1, 1, 8, 1), (2, 1, 1, 4)]
"""Four tensor shards have half a kv head each: there the kv heads are replicated"""
COLLECTIVE = re.compile(r"all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast")


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """For programs that run three times on small arrays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def one_device() -> Outcome:
    with compiled_quickly():
        return train((1, 1, 1, 1))


def test_dropout_and_adapter_are_at_work(one_device: Outcome) -> None:
    """Otherwise equal losses would say little: after a step B is not zero, so the dropout before it changes the loss."""
    assert all(np.any(np.asarray(x)) for path, x in flatten(one_device.state.trainable).items() if path[-1] == "lora_b")
    still = dataclasses.replace(EXPERIMENT, lora=dataclasses.replace(EXPERIMENT.lora, dropout=0.0))
    without = train((1, 1, 1, 1), still)
    assert without.losses[0] == pytest.approx(one_device.losses[0], abs=1e-6)
    assert abs(without.losses[2] - one_device.losses[2]) > 1e-4


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in MORE)], ids=str)
def test_losses_and_parameters_agree_with_one_device(shape: tuple[int, ...], one_device: Outcome) -> None:
    with compiled_quickly():
        agree(train(shape), one_device)


@pytest.mark.slow
def test_one_kv_head_on_two_tensor_shards_gives_the_same() -> None:
    decoder = dataclasses.replace(EXPERIMENT.model.decoder, kv_heads=1)
    single = dataclasses.replace(EXPERIMENT, model=dataclasses.replace(EXPERIMENT.model, decoder=decoder))
    with compiled_quickly():
        agree(train((1, 2, 2, 2), single), train((1, 1, 1, 1), single))


def test_replicated_kv_heads_are_said() -> None:
    shape = {"data": 1, "fsdp": 2, "context": 1, "tensor": 4}
    (said,) = mesh_notices(EXPERIMENT, shape)
    assert "mesh.tensor is 4" in said and "2 kv heads" in said and "replicated" in said
    assert not mesh_notices(EXPERIMENT, shape | {"tensor": 2})


def agree(outcome: Outcome, one_device: Outcome) -> None:
    np.testing.assert_allclose(outcome.losses, one_device.losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(outcome.grad_norms, one_device.grad_norms, atol=1e-5, rtol=1e-5)
    assert outcome.compilations == one_device.compilations == 1
    ours, theirs = (flatten(o.state.trainable) for o in (outcome, one_device))
    for path, value in theirs.items():
        # Adam divides by the root of the second moment: where a gradient is nearly 0 its rounding shows
        np.testing.assert_allclose(np.asarray(ours[path]), np.asarray(value), atol=2e-4, err_msg=str(path))


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 8, 1, 1)], ids=str)
def test_initial_values_do_not_depend_on_the_mesh(shape: tuple[int, ...]) -> None:
    values = []
    for s in ((1, 1, 1, 1), shape):
        with jax.set_mesh(mesh_of(s)):
            model = blueprint(EXPERIMENT, mesh_of(s))
            values.append(initialised(EXPERIMENT, flatten(model.trainable) | flatten(model.frozen)))
    for path, value in values[0].items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(values[1][path]), err_msg=str(path))


def total_bytes(tree: object) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 1, 2)], ids=str)
def test_parameters_and_optimizer_are_split_over_fsdp_and_tensor(shape: tuple[int, ...]) -> None:
    """Per device: total / (fsdp x tensor), with 6% for norms (never split) and the projector (not split over tensor)."""
    full = dataclasses.replace(EXPERIMENT, lora=LoraConfig(rank=0), train=TrainConfig(steps=3, trainable="all"))
    parts = shape[1] * shape[3]
    with jax.set_mesh(mesh_of(shape)):
        model = blueprint(full, mesh_of(shape))
        state = abstract_state(model)
    for half in (state.trainable, state.opt_state):
        ratio = device_bytes(half) / (total_bytes(half) / parts)
        assert 1.0 <= ratio < 1.06, ratio


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 8, 1, 1)], ids=str)
def test_moments_lie_as_their_parameters_do(shape: tuple[int, ...]) -> None:
    """Among them LoRA's, split over fsdp and tensor whichever axis their weight has there."""
    with jax.set_mesh(mesh_of(shape)):
        model = blueprint(EXPERIMENT, mesh_of(shape))
        state = abstract_state(model)
    frozen = device_bytes(model.frozen) / (total_bytes(model.frozen) / (shape[1] * shape[3]))
    assert 1.0 <= frozen < 1.06
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape]
    assert sorted((x.shape, str(x.sharding.spec)) for x in moments) == sorted(
        2 * [(x.shape, str(x.sharding.spec)) for x in jax.tree.leaves(state.trainable)]
    )
    adapters = [x for path, x in flatten(model.trainable).items() if path[-1] in ("lora_a", "lora_b")]
    assert device_bytes(adapters) == total_bytes(adapters) // (shape[1] * shape[3])


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 4, 1)], ids=str)
def test_merge_has_no_collective(shape: tuple[int, ...]) -> None:
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        model = blueprint(EXPERIMENT, mesh)
        batch = make_batch(model)
        compiled = jax.jit(gather_tokens, static_argnums=2).lower(batch.images, batch.image_index, model.rules).compile()
        text = compiled.as_text()
        assert "gather" in text
        assert not COLLECTIVE.search(text)
        # the same search finds one where there is one: every row of the batch on every device
        spread = jax.jit(lambda x: x + 0, out_shardings=jax.sharding.NamedSharding(mesh, Rules().spec(None, None, None, None)))
        control = spread.lower(batch.images).compile().as_text()
        assert (shape[0] * shape[1] == 1) == (not COLLECTIVE.search(control))


def dot_flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    """FLOPs of all dot_generals, bodies of scans times their lengths; inside shard_map shapes are a shard's."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contract)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * dot_flops(inner)
    return total


@pytest.mark.parametrize("context", [1, 2, 4])
def test_attention_does_half_of_the_square_on_every_shard(context: int) -> None:
    """Forward and backward, of 2 and of 5 products a pair of chunks."""
    batch, length, heads, kv_heads, width = 1, 1024, 4, 2, 16
    rules = Rules()
    layout = Layout("balanced" if context > 1 else "natural", 32, "xla", True)

    def run(q, k, v, positions, segments):
        def total(q, k, v):
            return jnp.sum(attention(q, k, v, positions, segments, Mask(causal=True, window=0), layout, rules))

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    mesh = mesh_of((1, 1, context, 1))
    with jax.set_mesh(mesh):
        order = balanced_order(length, context) if context > 1 else np.arange(length)
        place = rules.sharding(mesh, "batch", "length")
        q = jnp.zeros((batch, length, heads, width), out_sharding=rules.spec("batch", "length", "heads", None))
        kv = jnp.zeros((batch, length, kv_heads, width), out_sharding=rules.spec("batch", "length", "kv_heads", None))
        positions = jax.device_put(order[None].astype(np.int32), place)
        segments = jax.device_put(np.ones((1, length), np.int32), place)
        jaxpr = jax.make_jaxpr(run)(q, kv, kv, positions, segments).jaxpr
    square = 2.0 * batch * heads * length * length * width / context
    assert 0.5 <= dot_flops(jaxpr) / (7 * square) <= 0.6


def test_microbatches_change_nothing_and_rows_stay_in_order(one_device: Outcome) -> None:
    pieces = dataclasses.replace(EXPERIMENT, data=dataclasses.replace(EXPERIMENT.data, microbatches=4))
    outcome = train((1, 2, 1, 1), pieces)
    np.testing.assert_allclose(outcome.losses, one_device.losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(outcome.grad_norms, one_device.grad_norms, rtol=1e-4)
    assert outcome.compilations == 1
    assert (ROWS, LENGTH) == (8, 48)
