"""A small step compiled for a TPU slice that is not there: what its module sends (Linux x86-64 with libtpu)."""

import importlib.util

import pytest
from small import small

from jaxmed.plan.analysis import analyse
from jaxmed.plan.collectives import from_rows
from jaxmed.plan.lowering import compile_step
from jaxmed.plan.topology import parse_topology

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
LENGTH = 1024


@pytest.fixture(scope="module")
def step():
    """-> what the plan states, and what the compiler made of it"""
    experiment = small(mesh=(1, 4, 2, 1), length=LENGTH, dtype="bfloat16")
    topology = parse_topology("v5p:2x2x2")
    return analyse(experiment, topology, "train", LENGTH), compile_step(experiment, topology, "train", LENGTH)


def test_the_module_can_be_read_although_libtpu_cannot_print_it(step):
    _, compiled = step
    assert compiled.text == "" and compiled.collectives and compiled.memory["argument"] > 0


def test_weights_are_sent_twice_and_no_more(step):
    """Gathers and permutes over fsdp, times their loops' lengths: what the plan states, adapters cast before they are gathered,
    and at most 2 (n - 1) / n of the frozen bytes but for those."""
    found, compiled = step
    rows = from_rows(compiled.collectives)
    sent = sum(c.total for c in rows if "fsdp" in c.axes and c.kind in ("all-gather", "permute", "all-to-all"))
    stated = sum(c.total for c in found.sent if c.axes == ("fsdp",) and c.kind == "all-gather" and c.dtype == "bfloat16")
    adapters = sum(c.total for c in found.sent if c.axes == ("fsdp",) and c.kind == "all-gather" and c.dtype == "float32")
    assert sent == pytest.approx(stated + adapters, rel=0.03)
    assert sent <= 1.05 * found.frozen_twice + adapters


def test_gradients_of_keys_and_values_are_scattered_not_summed(step):
    """Over context, a layer each: every shard gets its own part of them, half the bytes of an all-reduce."""
    found, compiled = step
    stated = sum(c.total for c in found.sent if (c.kind, c.axes) == ("reduce-scatter", ("context",)))
    rows = [c for c in from_rows(compiled.collectives) if c.axes == ("context",)]
    assert sum(c.total for c in rows if c.kind == "reduce-scatter") == stated > 0
    assert not [c for c in rows if c.kind == "all-reduce" and c.times > 1], "in a loop over layers"


def test_gradients_that_are_summed_are_the_adapters(step):
    """Nothing of a frozen matrix's size is summed over fsdp."""
    _, compiled = step
    sums = [c for c in from_rows(compiled.collectives) if c.kind in ("all-reduce", "reduce-scatter")]
    summed = {(tuple(sorted(n for n in c.shape if n > 1)), c.times > 1) for c in sums}
    frozen = {((n, m), True) for n, m in ((128, 128), (64, 128), (128, 384))} | {((128, 768), False)}
    assert not summed & frozen
    assert ((128, 128), False) in summed, "the projector's, which is trained, is"
    assert any(6 in shape for shape, _ in summed), "the adapters' are"


def test_the_module_computes_what_the_traced_program_states(step):
    """Products and convolutions, times their loops' lengths; TPUs write products as convolutions over padding."""
    found, compiled = step
    assert compiled.products * 8 == pytest.approx(found.products, rel=0.02)
    assert found.flops <= 1.05 * found.policy_flops
