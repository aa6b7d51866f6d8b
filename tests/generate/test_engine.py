"""The sampler against the plain forward pass, on meshes and in both drivers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
from jaxmed.data.inputs import VisualInput
from jaxmed.generate.engine import Engine, Limits
from jaxmed.generate.prompts import Bucket, Prompt, left_padded, put
from jaxmed.generate.sampling import Sampling, choose
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import make_mesh, rules_for, state_specs, to_shardings

DECODER = DecoderConfig(
    vocab=90,
    width=24,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=4,
    mlp=40,
    norm_eps=3e-5,
    rope=RopeConfig(theta=700.0),
    max_positions=256,
    initializer_range=0.4,
)
EXPERIMENT = Experiment(
    model=ModelConfig(decoder=DECODER, projector=ProjectorConfig("mlp2x_gelu"), dtype="float32", added_tokens=("<a>", "<b>")),
    visual=VisualConfig(images=2, tokens=6, features=5, grid=(1, 2, 3)),
    lora=LoraConfig(rank=0),
)

BUCKET = Bucket(images=2, tokens=8, stride=8, text=24)


def build(split: bool, shape=(1, 1, 1, 1), experiment=EXPERIMENT):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    rules = dataclasses.replace(rules_for(experiment, dict(mesh.shape)), length=())
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(jax.eval_shape(lambda: Vlm(experiment, jax.random.key(3), split=split)))
        shardings = to_shardings(state_specs(state, rules), mesh)
        make = jax.jit(
            lambda: nnx.to_pure_dict(nnx.split(Vlm(experiment, jax.random.key(3), split=split))[1]), out_shardings=shardings
        )
        return graphdef, make(), mesh, rules


def prompts(seed=0):
    rng = np.random.default_rng(seed)

    def image(t: int, h: int, w: int) -> VisualInput:
        return VisualInput(rng.standard_normal((t * h * w, 5)).astype(np.float32), (t, h, w))

    def ids(*pieces) -> np.ndarray:
        return np.concatenate([np.atleast_1d(p) for p in pieces]).astype(np.int32)

    def word(n: int) -> np.ndarray:
        return rng.integers(0, 92, n)

    return [
        Prompt(ids(word(3), -200, word(4)), (image(1, 2, 3),)),
        Prompt(word(11).astype(np.int32), ()),
        Prompt(ids(-200, word(2), -200, word(1)), (image(1, 1, 2), image(1, 2, 2))),
    ]


def last_logits(model, batch, rules):
    return model.decoder.logits(model(batch, rules, None), rules, None)[0, -1]


def greedy_without_cache(graphdef, params, mesh, rules, prompt, steps, penalty=1.0):
    """The oracle: the whole sequence through the training forward pass for every token."""
    made: list[int] = []
    forward = jax.jit(lambda params, batch: last_logits(nnx.merge(graphdef, params), batch, rules))
    for _ in range(steps):
        grown = Prompt(np.concatenate([prompt.ids, np.asarray(made, np.int32)]), prompt.images)
        with jax.set_mesh(mesh):
            batch = put(left_padded([grown], 1, BUCKET, EXPERIMENT), mesh, rules)
            logits = np.array(forward(params, batch))
        for token in set(made):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[90:] = -np.inf
        made.append(int(logits.argmax()))
    return made


@pytest.fixture(scope="module")
def oracle():
    graphdef, params, mesh, rules = build(split=True)
    return [greedy_without_cache(graphdef, params, mesh, rules, p, 7) for p in prompts()]


@pytest.mark.parametrize(("split", "shape"), [(True, (1, 1, 1, 1)), (False, (1, 1, 1, 1)), (True, (2, 1, 1, 2))])
def test_cached_greedy_ids_equal_those_without_a_cache(oracle, split, shape):
    graphdef, params, mesh, rules = build(split, shape)
    engine = Engine(graphdef, params, EXPERIMENT, mesh, rules, Limits(eos_ids=(), blocked=(90, 91)))
    batch = put(left_padded(prompts(), 4, BUCKET, EXPERIMENT), mesh, rules)
    tokens, lengths = engine(batch, jax.random.split(jax.random.key(0), 4), Sampling(), 7)
    assert [list(t) for t in tokens[:3]] == oracle
    assert list(lengths) == [7, 7, 7, 0], "the empty row makes no token"


def test_an_end_token_stops_its_row_alone_and_is_kept(oracle):
    graphdef, params, mesh, rules = build(True)
    end = oracle[0][2]
    engine = Engine(graphdef, params, EXPERIMENT, mesh, rules, Limits(eos_ids=(end,), blocked=(90, 91)))
    batch = put(left_padded(prompts(), 3, BUCKET, EXPERIMENT), mesh, rules)
    tokens, lengths = engine(batch, jax.random.split(jax.random.key(0), 3), Sampling(), 7)
    first = oracle[0].index(end) + 1
    assert list(tokens[0, :first]) == oracle[0][:first] and lengths[0] == first
    assert not tokens[0, first:].any()
    for row in (1, 2):
        wanted = oracle[row][: oracle[row].index(end) + 1] if end in oracle[row] else oracle[row]
        assert list(tokens[row, : lengths[row]]) == wanted


def test_repetition_penalty_counts_the_answer_and_not_the_prompt():
    graphdef, params, mesh, rules = build(True)
    engine = Engine(graphdef, params, EXPERIMENT, mesh, rules, Limits(eos_ids=(), blocked=(90, 91)))
    batch = put(left_padded(prompts(), 3, BUCKET, EXPERIMENT), mesh, rules)
    tokens, _ = engine(batch, jax.random.split(jax.random.key(0), 3), Sampling(repetition_penalty=1.7), 7)
    assert list(tokens[0]) == greedy_without_cache(graphdef, params, mesh, rules, prompts()[0], 7, penalty=1.7)


def test_a_draw_depends_on_its_key_and_not_on_the_batch():
    graphdef, params, mesh, rules = build(True)
    engine = Engine(graphdef, params, EXPERIMENT, mesh, rules, Limits(eos_ids=()))
    keys = jax.random.split(jax.random.key(5), 3)
    warm = Sampling(temperature=1.3, top_k=20, top_p=0.9)
    whole = engine(put(left_padded(prompts(), 3, BUCKET, EXPERIMENT), mesh, rules), keys, warm, 7)[0]
    turned = engine(put(left_padded(prompts()[::-1], 3, BUCKET, EXPERIMENT), mesh, rules), keys[::-1], warm, 7)[0]
    np.testing.assert_array_equal(whole, turned[::-1])
    other = engine(
        put(left_padded(prompts(), 3, BUCKET, EXPERIMENT), mesh, rules), jax.random.split(jax.random.key(6), 3), warm, 7
    )[0]
    assert (whole != other).any()


def test_top_k_and_top_p_keep_what_they_say():
    logits = jnp.log(jnp.asarray([[0.5, 0.02, 0.3, 0.1, 0.08]] * 400))
    keys = jax.random.split(jax.random.key(1), 400)
    seen = jnp.zeros((400, 0), bool)

    def drawn(**kwargs) -> set[int]:
        return set(np.asarray(choose(Sampling(temperature=1.0, **kwargs), logits, seen, keys)).tolist())

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=3) == {0, 2, 3}
    assert drawn(top_p=0.75) == {0, 2}, "0.5 + 0.3 reaches 0.75"
    assert drawn(top_p=0.81) == {0, 2, 3}
    assert drawn(top_k=2, top_p=0.5) == {0}


def test_draws_follow_the_distribution():
    p = np.asarray([0.5, 0.02, 0.3, 0.1, 0.08])
    logits = jnp.log(jnp.asarray(np.tile(p, (6000, 1)), jnp.float32)) * 2.0
    drawn = choose(Sampling(temperature=2.0), logits, jnp.zeros((6000, 0), bool), jax.random.split(jax.random.key(2), 6000))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 6000, p, atol=0.02)
