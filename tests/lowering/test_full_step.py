"""The whole 8B train step at 32,768 tokens on sixteen devices that are not there: what it computes and what it never holds."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from full_step import abstract_batch, abstract_mesh, equations, on_mesh, trace_step

from jaxmed._configs import btb3d
from jaxmed.models.decoder import padded_vocab
from jaxmed.sharding import Rules, make_mesh
from jaxmed.train.init import blueprint

LENGTH = 32768
SHAPES = [(1, 8, 2, 1), (2, 4, 1, 2), (1, 2, 4, 2)]
FORWARD, RECOMPUTED, BACKWARD = 2, 2, 5
"""products of queries and keys in attention, a pair of chunks"""


@pytest.fixture(scope="module")
def lowered():
    """(shape, remat) -> experiment and equations of the lowered step; each is traced once."""
    known = {}

    def of(shape, remat="full", **train):
        key = (shape, remat, *sorted(train.items()))
        if key not in known:
            experiment = on_mesh(btb3d.get_config(), shape, remat=remat, **train)
            mesh = abstract_mesh(shape)
            with jax.sharding.use_abstract_mesh(mesh):
                traced = trace_step(experiment, mesh, LENGTH)
                traced.lower(lowering_platforms=("tpu",))
            known[key] = experiment, list(equations(traced.jaxpr.jaxpr))
        return known[key]

    return of


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_program_grows_with_neither_layers_nor_length(lowered, shape):
    """It lowers in a second or two because it has a few thousand equations, whatever the model's size."""
    experiment, found = lowered(shape)
    assert len(found) < 10_000
    assert max(e.times for e in found) >= experiment.model.decoder.layers * 100, "the walk went into the scans"


@pytest.mark.parametrize("remat", ["full", "attention", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_array_has_two_axes_of_the_sequences_length(lowered, shape, remat):
    """Neither [B, T, V] nor [T, T], as a whole or as one shard's part of it."""
    _, found = lowered(shape, remat)
    for equation in found:
        long = LENGTH // shape[2] if equation.shard else LENGTH
        for shape_ in equation.shapes:
            assert sum(n >= long for n in shape_) < 2, (equation.name, shape_)
    vocab = padded_vocab(128261)
    heads = [s for e in found for s in e.shapes if vocab in s and len(s) >= 3]
    assert heads, "logits exist"
    assert max(int(np.prod(s)) for s in heads) <= 8 * 256 * vocab, "for a chunk of supervised positions"


@pytest.mark.parametrize(
    ("shape", "remat", "products"),
    [
        ((1, 8, 2, 1), "full", FORWARD + RECOMPUTED + BACKWARD),
        ((1, 2, 4, 2), "full", FORWARD + RECOMPUTED + BACKWARD),
        ((2, 4, 1, 2), "attention", FORWARD + BACKWARD),
        ((1, 2, 4, 2), "attention", FORWARD + BACKWARD),
        ((1, 8, 2, 1), "none", FORWARD + BACKWARD),
    ],
    ids=str,
)
def test_attention_does_half_of_the_square_on_every_shard(lowered, shape, remat, products):
    """And it is computed a second time only where the policy says so."""
    experiment, found = lowered(shape, remat)
    decoder = experiment.model.decoder
    flops = sum(e.flops * e.times for e in found if e.shard)
    rows, heads = experiment.data.batch // (shape[0] * shape[1]), decoder.heads // shape[3]
    square = 2.0 * rows * heads * LENGTH * LENGTH * decoder.head_dim * decoder.layers / shape[2]
    assert 0.5 <= flops / (products * square) <= 0.52


@pytest.mark.parametrize(("remat", "passes"), [("full", 3), ("none", 2)])
def test_frozen_weights_get_no_gradient(lowered, remat, passes):
    """No product has a frozen weight's shape, and the work is that of `passes` products a weight and token."""
    experiment, found = lowered((1, 8, 2, 1), remat)
    decoder = experiment.model.decoder
    width, mlp = decoder.width, decoder.mlp
    kv, vocab = decoder.kv_heads * decoder.head_dim, padded_vocab(128261)
    weights = {(width, width), (kv, width), (mlp, width), (width, mlp), (vocab, width)}
    dots = [e for e in found if e.name == "dot_general"]
    made = {e.shapes[0] for e in dots if e.times >= decoder.layers or vocab in e.shapes[0]}
    assert not made & (weights | {shape[::-1] for shape in weights})
    assert {(128, width), (128, mlp)} & made, "the adapters do"
    per_layer = 2 * width * width + 2 * kv * width + 3 * mlp * width
    tokens = experiment.data.batch * LENGTH
    products = passes * per_layer - (passes - 2) * mlp * width  # the last product of a block is not needed a second time
    flops = sum(e.flops * e.times for e in found if not e.shard)
    assert 1.0 <= flops / (2.0 * decoder.layers * products * tokens) <= 1.1


def test_full_training_does_have_gradients_of_weights(lowered):
    """The control of the test above."""
    _, found = lowered((1, 8, 2, 1), trainable="all")
    made = {tuple(s) for e in found if e.name == "dot_general" for s in e.shapes}
    assert {(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)} <= made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_and_projector_have_no_collective(shape):
    """The one sum is that of the text's lookup over `tensor`; weights are gathered by `reshard`, image tokens never move."""
    experiment = on_mesh(btb3d.get_config(), shape)
    mesh, rules = abstract_mesh(shape), Rules()
    with jax.sharding.use_abstract_mesh(mesh):
        plan = blueprint(experiment, mesh)
        batch = abstract_batch(experiment, mesh, rules, LENGTH)
        merged = jax.make_jaxpr(lambda *x: nnx.merge(plan.graphdef, *x[:2]).embed(x[2], rules))(
            plan.trainable, plan.frozen, batch
        )
    found = list(equations(merged.jaxpr))
    moved = [(e.name, e.shapes[0]) for e in found if e.moves]
    lookup = (experiment.data.batch // (shape[0] * shape[1]), LENGTH // shape[2], 4096)
    assert [m for m in moved if m[0] != "reshard"] == [("psum_invariant", lookup)]
    gathered = {s for name, s in moved if name == "reshard"}
    assert gathered == {(padded_vocab(128261), 4096), (5, 4096), (4096, 18), (4096, 4096), (4096,)}


def test_compiled_merge_and_projector_move_no_activations():
    """Forward and backward on eight devices: of three axes only the text's lookup, summed over `tensor`."""
    experiment = on_mesh(btb3d.get_config(), (1, 2, 2, 2))
    decoder = dataclasses.replace(experiment.model.decoder, vocab=250, width=32, layers=1, mlp=64, head_dim=4)
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, decoder=decoder),
        visual=dataclasses.replace(experiment.visual, images=2, tokens=12, grid=(1, 3, 4), positions=True),
        lora=dataclasses.replace(experiment.lora, rank=2),
        data=dataclasses.replace(experiment.data, buckets=(48,), supervised=5),
    )
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        plan = blueprint(experiment, mesh)
        batch = abstract_batch(experiment, mesh, plan.rules, 48)

        def embedded(trainable, frozen, batch):
            h = nnx.merge(plan.graphdef, trainable, frozen).embed(batch, plan.rules)
            return jnp.sum(jnp.square(h.astype(jnp.float32))), h

        program = jax.jit(jax.value_and_grad(embedded, has_aux=True)).lower(plan.trainable, plan.frozen, batch)
        text = program.compile().as_text()
    collective = re.findall(r"= (.*?) ((?:all|reduce|collective)-[a-z-]+)\(", text)
    of_three = [(shape, name) for result, name in collective for shape in re.findall(r"\w+\[\d+,\d+,\d+\]", result)]
    assert of_three in ([("bf16[4,24,32]", "all-reduce")], [("f32[4,24,32]", "all-reduce")]), of_three
    assert {name for _, name in collective} >= {"all-gather"}, "weights are gathered over fsdp"


def test_walk_finds_a_square_inside_everything():
    """The control of the tests above: scan, checkpoint, custom_vjp and shard_map are walked through."""

    def bad(x):
        @jax.checkpoint
        def body(carry, _):
            square = jnp.einsum("ti,si->ts", carry, carry)
            return carry + jnp.sum(square), None

        return jnp.sum(jax.lax.scan(body, x, length=3)[0])

    found = list(equations(jax.make_jaxpr(jax.grad(bad))(jnp.ones((40, 2))).jaxpr))
    squares = [e for e in found if e.name == "dot_general" and any(s == (40, 40) for s in e.shapes)]
    assert squares and all(e.times == 3 for e in squares)
    assert squares[0].flops == 2 * 40 * 40 * 2
