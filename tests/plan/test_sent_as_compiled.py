"""Compiled steps on eight fake devices: every collective has a reason, and together they send what the plan states.

Every array here has a shape of its own. Axis letters: B rows, T text, both of one device; D decoder width, F mlp width, Q and K
widths of queries and keys, R rank, M supervised positions, V vocabulary.
"""

import ast
import dataclasses
from collections import Counter
from functools import cache
from pathlib import Path

import jax
import pytest
from small import knows_lines, small
from small_pairs import ENCODER, PATCHES, SHARED, TEXT, TOWER, small_pairs

import jaxmed
from jaxmed.plan import collectives, hlo, programs
from jaxmed.plan.counts import gathered_shapes
from jaxmed.plan.sent import stated
from jaxmed.sharding import make_mesh

LAYERS, D, F, HEADS, KV_HEADS, HEAD_DIM, R, M = 3, 48, 112, 4, 2, 40, 6, 20
Q, K, V, LENGTH, FEATURES, ADDED = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, 768, 384, 18, 5
MESHES = [(2, 2, 1, 2), (1, 2, 2, 2), (1, 4, 2, 1)]
MORE = [
    ((1, 1, 2, 4), {"remat": "attention"}),
    ((2, 1, 4, 1), {"microbatches": 2}),
    ((1, 2, 2, 2), {"trainable": "all"}),
    ((1, 8, 1, 1), {"remat": "none"}),
]


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Of machine code, which nobody runs here; the module is the same"""


@cache
def step(shape, remat="full", microbatches=1, trainable="adapter", what="train"):
    """-> what the plan states, and what the compiled module holds"""
    experiment = small(shape, LENGTH, remat=remat, microbatches=microbatches)
    decoder = dataclasses.replace(
        experiment.model.decoder, width=D, mlp=F, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, layers=LAYERS
    )
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, decoder=decoder),
        train=dataclasses.replace(experiment.train, trainable=trainable),
        data=dataclasses.replace(experiment.data, supervised=M),
    )
    return planned_and_compiled(experiment, what)


@cache
def step_of_pairs(shape, microbatches):
    """The same of the contrastive step."""
    return planned_and_compiled(small_pairs(shape, microbatches=microbatches), "train")


def planned_and_compiled(experiment, what):
    mesh = make_mesh(experiment.mesh)
    sizes = dict(mesh.shape)
    with jax.set_mesh(mesh):
        program = programs.trace(experiment, mesh, what, LENGTH, "cpu")
        trained, frozen = programs.parameter_counts(experiment, mesh)
        planned = stated(program.traced.jaxpr.jaxpr, sizes, gathered_shapes(trained | frozen), folds=False)
        text = program.traced.lower().compile(QUICK).as_text()
    return planned, collectives.found(hlo.parse(text), sizes)


def totals(found):
    """Bytes one device sends by kind and mesh axes; apart, those that say whose keys these are, or which pairs are there."""
    sums = Counter()
    for c in found:
        marks = c.axes == ("context",) and c.kind == "all-gather" and c.dtype in ("int32", "s32")
        marks |= c.kind == "all-gather" and c.dtype in ("bool", "pred")
        sums["marks" if marks else (c.kind, c.axes)] += c.total
    return dict(sums)


def same_bytes(planned, compiled):
    """To the byte, but for positions and segments over context: XLA takes their gathers out of the loop over layers; and for
    which pairs are there, which is asked twice and comes once."""
    planned, compiled = totals(planned), totals(compiled)
    each, once = planned.pop("marks", 0), compiled.pop("marks", 0)
    assert planned == compiled
    assert once <= each and (once > 0) == (each > 0)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_plan_states_what_the_compiled_step_sends(shape):
    same_bytes(*step(shape))


@pytest.mark.parametrize("what", ["prefill", "decode"])
@pytest.mark.parametrize("shape", MESHES[:2], ids=str)
def test_so_it_does_in_generation(shape, what):
    same_bytes(*step(shape, what=what))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "settings"), MORE, ids=str)
def test_so_it_does_with_other_policies(shape, settings):
    same_bytes(*step(shape, **settings))


PAIRS = [
    ((2, 4, 1, 1), 2),
    pytest.param((1, 8, 1, 1), 1, marks=pytest.mark.slow),
    pytest.param((8, 1, 1, 1), 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "microbatches"), PAIRS)
def test_so_it_does_with_pairs(shape, microbatches):
    """Weights that no layer has come once for all microbatches: XLA takes their gathers out of that loop."""
    planned, compiled = step_of_pairs(shape, microbatches)
    lone = [c.kind == "all-gather" and c.times == microbatches for c in planned]
    same_bytes([dataclasses.replace(c, times=1.0) if once else c for c, once in zip(planned, lone, strict=True)], compiled)


# -- a reason for each ------------------------------------------------------------------------------------------------------

ROOT = Path(jaxmed.__file__).parent.parent


def function(source):
    """`jaxmed/nn/linear.py:128` -> ("nn/linear.py", "product")"""
    file, line = source.rsplit(":", 1)
    if not file.startswith("jaxmed/"):
        return Path(file).name, ""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    around = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.lineno <= int(line) <= n.end_lineno]
    return file.removeprefix("jaxmed/"), max(around, key=lambda n: n.lineno).name


def reasons(shape):
    """Name -> kind, possible groups of mesh axes, shapes on one device, and the functions that ask for it."""
    _, _, context, tensor = shape
    b, t, q, k, f, v = 1, LENGTH // context, Q // tensor, K // tensor, F // tensor, V // tensor
    heads = (KV_HEADS // tensor, HEAD_DIM)
    keys = {(context, b, t, *heads), (b, LENGTH, *heads)}
    rows = {("data",), ("fsdp",), ("data", "fsdp")}
    matrices = {(q, D), (k, D), (f, D), (D, q), (D, f)}
    adapters = {(R, D), (D, R), (R, q), (R, f), (q, R), (k, R), (f, R)}
    projector = {(D, FEATURES), (D, D), (D,)}
    linear = {("nn/linear.py", name) for name in ("plain", "_reduce", "__call__")}
    loss = {("train/loss.py", name) for name in ("add", "pick", "token_losses")}
    lookup, table = ("models/decoder.py", "_lookup"), ("models/decoder.py", "__call__")
    gathered, attention = ("nn/param.py", "gathered"), ("nn/attention.py", "whole")
    return {
        "frozen weights": ("all-gather", {("fsdp",)}, matrices | {(v, D), (D,)}, {gathered}),
        "trained weights": ("all-gather", {("fsdp",)}, projector | {(ADDED, D)}, {gathered}),
        "adapters": ("all-gather", {("fsdp",), ("fsdp", "tensor")}, adapters, linear),
        "keys and values": ("all-gather", {("context",)}, keys, {attention}),
        "whose keys they are": ("all-gather", {("context",)}, {(context, b, t), (b, LENGTH)}, {attention}),
        "gradients of keys and values": (
            "reduce-scatter", {("context",)}, {(1, b, t, *heads), (b, t, *heads)}, {attention},
        ),
        "outputs of o and down, gradients of inputs": ("all-reduce", {("tensor",)}, {(b, t, D)}, linear),
        "narrow outputs of adapters, their gradients": ("all-reduce", {("tensor",)}, {(b, t, R)}, linear),
        "rows of the vocabulary": ("all-reduce", {("tensor",)}, {(b, t, D)}, {lookup}),
        "statistics of logits": ("all-reduce", {("tensor",)}, {(b, M)}, loss),
        "gradient of what the head reads": ("all-reduce", {("tensor",)}, {(b, M, D)}, linear),
        "supervised positions": ("all-reduce", {("context",)}, {(b, M, D)}, loss),
        "gradients of adapters": ("all-reduce", rows | {("context",)}, adapters, linear),
        "gradients of trained weights": ("all-reduce", rows | {("context",)}, projector | {(ADDED, D)}, linear | {table}),
        "sums of the loss": ("all-reduce", rows, {()}, loss | {("train/step.py", "loss"), ("train/step.py", "value_and_grad")}),
        "norm of the gradient": ("all-reduce", rows | {("fsdp", "tensor"), ("tensor",)}, {()}, {("_tree_math.py", "")}),
    }  # fmt: skip


def reason(c, known):
    """Names of the reasons that fit a collective."""
    asked = function(c.source)
    return [
        name
        for name, (kind, axes, shapes, functions) in known.items()
        if c.kind == kind and c.axes in axes and c.shape in shapes and asked in functions
    ]


@knows_lines
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_collective_is_one_that_the_rules_call_for(shape):
    known, counted = reasons(shape), Counter()
    unknown = []
    for c in step(shape)[1]:
        fits = reason(c, known)
        unknown += [] if fits else [(c.kind, c.axes, c.shape, c.source)]
        counted.update(dict.fromkeys(fits, c.times))
    assert not unknown
    tensor, context = shape[3] > 1, shape[2] > 1
    assert counted["outputs of o and down, gradients of inputs"] == 5 * LAYERS * tensor, "o, down, o again, two groups"
    assert counted["keys and values"] == 2 * 2 * LAYERS * context, "forward and recomputed"
    assert counted["gradients of keys and values"] == 2 * LAYERS * context
    assert counted["rows of the vocabulary"] == tensor and counted["supervised positions"] == context
    assert counted["gradient of what the head reads"] == tensor


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_no_gradient_of_a_frozen_weight_is_sent(shape):
    """By shape; a norm's scale is as long as a bias of the projector, of which there are two."""
    sums = [c for c in step(shape)[1] if c.kind in ("all-reduce", "reduce-scatter")]
    frozen = reasons(shape)["frozen weights"][2] - {(D,)} | reasons((1, 1, 1, 1))["frozen weights"][2] - {(D,)}
    assert not {c.shape for c in sums} & frozen
    biases = Counter((c.axes, c.times) for c in sums if c.shape == (D,))
    assert biases and set(biases.values()) == {2} and {times for _, times in biases} == {1}


@pytest.mark.slow
def test_training_everything_does_send_gradients_of_weights():
    """The control of the tests above."""
    known = reasons((1, 2, 2, 2))
    sums = [c for c in step((1, 2, 2, 2), trainable="all")[1] if c.kind == "all-reduce" and not reason(c, known)]
    assert known["frozen weights"][2] <= {c.shape for c in sums}


def reasons_of_pairs(pairs):
    """The same of the contrastive step; `pairs` of all devices."""
    rows = {("data",), ("fsdp",), ("data", "fsdp")}
    d, f, e, g, p = TOWER.width, TOWER.mlp, ENCODER.width, ENCODER.mlp, SHARED
    matrices = {
        (d, d),
        (f, d),
        (d, f),
        (e, e),
        (g, e),
        (e, g),
        (p, d),
        (p, e),
    }  # a patch has as many numbers as the tower is wide
    rowed = {(PATCHES, d), (ENCODER.vocab, e), (ENCODER.positions, e), (ENCODER.types, e)}
    towers = {(d,), (e,)}
    linear = {("nn/linear.py", name) for name in ("plain", "__call__")}
    loss = {("models/contrastive.py", name) for name in ("losses", "products")}
    loss |= {("train/contrastive.py", name) for name in ("_loss", "_metrics", "value_and_grad")}
    tables = {("models/vit.py", "embed"), ("models/text_encoder.py", "embed")}
    return {
        "weights": ("all-gather", {("fsdp",)}, matrices | rowed | towers, {("nn/param.py", "gathered")}),
        "vectors, to be told from all": ("all-gather", rows, {(pairs, p)}, loss),
        "which pairs are there": ("all-gather", rows, {(pairs,)}, loss),
        "gradients of vectors": ("all-reduce", rows, {(pairs, p)}, loss),
        "gradients of products": ("all-reduce", rows, matrices, linear),
        "gradients of biases": ("all-reduce", rows, towers | {(f,), (g,), (p,)}, linear),
        "gradients of norms": ("all-reduce", rows, towers, {("nn/norm.py", "__call__")}),
        "gradients of words": ("all-reduce", rows, {(ENCODER.vocab, e)}, tables),
        "gradients of positions": ("all-reduce", rows, {(PATCHES + 1, d), (TEXT, e)}, tables),
        "sums of the loss": ("all-reduce", rows, {()}, loss),
        "norm of the gradient": ("all-reduce", {("fsdp",)}, {()}, {("_tree_math.py", "")}),
    }


@knows_lines
@pytest.mark.parametrize(("shape", "microbatches"), PAIRS)
def test_every_collective_between_pairs_has_a_reason(shape, microbatches):
    known, counted, unknown = reasons_of_pairs(3 * 8 * microbatches), Counter(), []
    for c in step_of_pairs(shape, microbatches)[1]:
        fits = reason(c, known)
        unknown += [] if fits else [(c.kind, c.axes, c.shape, c.source)]
        counted.update(dict.fromkeys(fits, c.times))
    assert not unknown
    assert counted["vectors, to be told from all"] == counted["gradients of vectors"] == 2, "of volumes, of texts: once a step"
    assert counted["gradients of words"] == microbatches
