"""The same greedy ids on every mesh, prompts and caches split over context shards among them, each compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import BUCKET, DECODER, EXPERIMENT, build, prompts

from jaxmed.config import MeshConfig
from jaxmed.generate.engine import Engine, Limits
from jaxmed.generate.prompts import balanced, left_padded
from jaxmed.generate.sampling import Sampling
from jaxmed.models.decoder import empty_cache
from jaxmed.nn.cache import last_token
from jaxmed.sharding import Rules, balanced_order, generation_rules, make_mesh

NEW = 9
SHAPES = [(1, 1, 4, 2), (1, 2, 1, 4), (2, 2, 2, 1)]
MORE = [
    (1, 1, 2, 1),
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (2, 2, 1, 2),
    (1, 2, 2, 2),
    (2, 1, 4, 1),
    (1, 4, 2, 1),
    (1, 1, 2, 4),
]
WIDE = dataclasses.replace(DECODER, width=32, layers=2, heads=8, mlp=48)
"""Eight heads and two kv heads: on four tensor shards the kv heads are replicated"""


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def experiment(**decoder):
    model = dataclasses.replace(EXPERIMENT.model, decoder=dataclasses.replace(WIDE, **decoder))
    return dataclasses.replace(EXPERIMENT, model=model, train=dataclasses.replace(EXPERIMENT.train, attention_chunk=4))


def answers(shape, split=True, **decoder):
    """Ids of two batches of the same shape."""
    chosen = experiment(**decoder)
    graphdef, params, mesh, _ = build(split, shape, chosen)
    rules = generation_rules(chosen, dict(mesh.shape))
    engine = Engine(graphdef, params, chosen, mesh, rules, Limits(eos_ids=(), blocked=(90, 91)))
    made = []
    for seed in (0, 1):
        batch = engine.placed(left_padded(prompts(seed), 8, BUCKET, chosen))
        tokens, lengths = engine(batch, jax.random.split(jax.random.key(0), 8), Sampling(), NEW)
        assert list(lengths) == [NEW] * 3 + [0] * 5
        made.append(tokens[:3].tolist())
    assert engine.compilations == 1
    return made


@pytest.fixture(scope="module")
def one_device():
    return answers((1, 1, 1, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_ids_are_those_of_one_device(shape, one_device):
    assert answers(shape) == one_device
    assert len({tuple(row) for batch in one_device for row in batch}) == 6, "prompts differ in their answers"


@pytest.mark.slow
@pytest.mark.parametrize("shape", MORE, ids=str)
def test_greedy_ids_are_those_of_one_device_on_more_meshes(shape, one_device):
    assert answers(shape) == one_device


def test_a_stacked_model_with_a_window_gives_the_same_over_context_shards():
    assert answers((1, 1, 4, 1), split=False, window=7) == answers((1, 1, 1, 1), split=False, window=7)


def test_a_cache_is_split_over_context_and_tensor():
    mesh = make_mesh(MeshConfig(1, 1, 4, 2))
    rules = generation_rules(experiment(), dict(mesh.shape))
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: empty_cache(WIDE, 8, 30, jnp.float32, True, rules))()
    assert (cache.spare, cache.positions.shape) == (2, (8, 32)), "slots are rounded up to whole shards"
    assert {x.sharding.shard_shape(x.shape) for x in (*cache.keys, *cache.values)} == {(8, 1, 8, 4)}
    assert cache.valid.sharding.shard_shape(cache.valid.shape) == (8, 8)


def test_one_context_shard_knows_nothing_of_it():
    assert generation_rules(experiment(), {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}).length == ()
    batch = left_padded(prompts(), 3, BUCKET, experiment())
    assert balanced(batch, 1) is batch


def test_prompts_are_lengthened_on_the_left_and_balanced():
    short = dataclasses.replace(BUCKET, text=21)  # 8 + 8 + 21 positions
    batch = left_padded(prompts(), 3, short, experiment())
    moved = balanced(batch, 3)
    back = np.argsort(balanced_order(42, 3))
    assert moved.order == "balanced"
    for name in ("tokens", "positions", "segment_ids", "image_index"):
        np.testing.assert_array_equal(getattr(moved, name)[:, back][:, 5:], getattr(batch, name), err_msg=name)
    assert not moved.segment_ids[:, back][:, :5].any() and (moved.image_index[:, back][:, :5] == -1).all()


@pytest.mark.parametrize("order", ["natural", "balanced"])
def test_the_last_token_is_found_on_its_shard(order):
    mesh = make_mesh(MeshConfig(2, 1, 4, 1))
    rules, x = Rules(), np.random.default_rng(3).standard_normal((2, 24, 5)).astype(np.float32)
    moved = x[:, balanced_order(24, 4)] if order == "balanced" else x
    with jax.set_mesh(mesh):
        found = last_token(jax.device_put(moved, rules.sharding(mesh, "batch", "length", None)), order, rules)
    np.testing.assert_array_equal(found, x[:, -1])
