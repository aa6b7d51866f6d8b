"""The compiled step of a small BTB3D model: which collectives stand where, and how its memory grows with T.

Every matrix of the decoder has a shape of its own here, so a collective says what it carries.

Axis letters: D decoder width, F mlp width, L layers, T text.
"""

import dataclasses
import itertools
import re

import jax
import pytest
from full_step import on_mesh, trace_step

from jaxmed._configs import btb3d
from jaxmed.sharding import make_mesh

LAYERS, D, F, RANK, HEADS, KV_HEADS, HEAD_DIM = 3, 48, 112, 4, 4, 2, 40
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
REDUCTIONS = ("all-reduce", "reduce-scatter")


def compiled_step(shape, length, layers=LAYERS, tokens=12, **train):
    experiment = on_mesh(btb3d.get_config(), shape, **train)
    decoder = dataclasses.replace(
        experiment.model.decoder, vocab=250, width=D, layers=layers, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, mlp=F
    )
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, decoder=decoder, dtype="float32"),
        visual=dataclasses.replace(experiment.visual, tokens=tokens, grid=(1, 1, tokens)),
        lora=dataclasses.replace(experiment.lora, rank=RANK),
        data=dataclasses.replace(experiment.data, batch=shape[0] * shape[1], buckets=(length,), supervised=5),
    )
    mesh = make_mesh(experiment.mesh, jax.devices()[: shape[0] * shape[1] * shape[2] * shape[3]])
    with jax.set_mesh(mesh):
        return trace_step(experiment, mesh, length).lower().compile()


def collectives(text):
    """(kind, whether it stands in a loop's body, shape) of every result of every collective."""
    bodies, where, found = set(re.findall(r"body=%?([\w.\-]+)", text)), "", []
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        where = head[1] if head else where
        match = COLLECTIVE.search(line)
        for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]) if match else ():
            found.append((match[2], where in bodies, tuple(int(n) for n in shape.split(",") if n)))
    return found


def matrices(tensor):
    """Of one layer, as one of `tensor` shards has them when they are gathered over fsdp; some shapes in both orientations."""
    q, kv, f = HEADS * HEAD_DIM // tensor, KV_HEADS * HEAD_DIM // tensor, F // tensor
    return {(q, D), (D, q), (kv, D), (f, D), (D, f)}


@pytest.fixture(scope="module")
def adapters():
    return collectives(compiled_step((1, 4, 1, 2), 64, remat="attention", attention_chunk=32).as_text())


def test_weights_are_gathered_inside_the_loop_one_layer_at_a_time(adapters):
    gathered = {(inside, shape) for kind, inside, shape in adapters if kind == "all-gather"}
    assert {(True, shape) for shape in matrices(2)} <= gathered
    for inside, shape in gathered:
        stacked = shape[0] == LAYERS and len(shape) == 3
        assert not stacked and shape not in ({(HEADS * HEAD_DIM, D), (F, D), (D, F)}), "of all layers, or over tensor too"
        assert inside or shape not in matrices(2), "outside of the loop all layers would be there at once"


def test_no_collective_carries_a_gradient_of_a_frozen_weight(adapters):
    reduced = {shape for kind, _, shape in adapters if kind in REDUCTIONS}
    frozen = matrices(2) | matrices(1) | {(256, D), (128, D)}
    frozen |= {(n // 4, m) for n, m in frozen} | {(n, m // 4) for n, m in frozen}
    assert not reduced & frozen
    assert {(RANK, D), (HEADS * HEAD_DIM // 2, RANK)} <= reduced, "the adapters' gradients are summed"


def test_tensor_shards_sum_a_layers_activations_five_times(adapters):
    """After o and down, again after o where it is recomputed, and once for the gradients of q, k and v together and of gate and
    up together: shards add those before they send them."""
    sums = [shape for kind, inside, shape in adapters if kind in REDUCTIONS and inside and shape[1:] == (64, D)]
    assert sums == [(1, 64, D)] * 5


@pytest.mark.slow
def test_full_training_does_sum_gradients_of_weights():
    """The control of the test above."""
    text = compiled_step((1, 4, 1, 2), 64, remat="attention", attention_chunk=32, trainable="all").as_text()
    assert matrices(2) <= {shape for kind, inside, shape in collectives(text) if kind in REDUCTIONS and inside}


def temporaries(length, remat):
    step = compiled_step((1, 1, 1, 1), length, layers=2, tokens=length - 64, remat=remat, attention_chunk=256)
    return step.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    short, long = (temporaries(length, "attention") for length in (8192, 16384))
    assert 1.7 < long / short < 2.3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_memory_is_linear_up_to_32k(remat):
    found = [temporaries(length, remat) for length in (4096, 8192, 16384, 32768)]
    assert all(1.7 < long / short < 2.3 for short, long in itertools.pairwise(found)), found
