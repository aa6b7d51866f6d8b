"""Bytes sent: counted by hand, from the traced program, and from the compiled module; on fake devices and in a TPU's text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from jaxmed.plan import collectives, hlo
from jaxmed.plan.sent import stated, wire_bytes
from jaxmed.sharding import AXES, Rules

SIZES = dict(zip(AXES, (1, 4, 1, 2), strict=True))
LAYERS, WIDTH, ROWS = 5, 48, 8


@pytest.fixture(scope="module")
def program():
    """A scan of products with a weight split over fsdp, and a sum over tensor in each: -> mesh, traced, compiled text."""
    mesh = jax.make_mesh(tuple(SIZES.values()), AXES, axis_types=(AxisType.Explicit,) * 4)
    rules = Rules()
    weight = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=rules.sharding(mesh, None, "mlp", "embed"))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rules.sharding(mesh, "batch", "mlp"))

    def f(weight, x):
        def body(x, w):
            w = jax.sharding.reshard(w, rules.spec("mlp", None))
            y = jnp.einsum("bi,io->bo", x, w, out_sharding=rules.spec("batch", None))
            return jax.sharding.reshard(jnp.tanh(y), rules.spec("batch", "mlp")), None

        return jax.lax.scan(body, x, weight)[0]

    with jax.set_mesh(mesh):
        traced = jax.jit(f).trace(weight, x)
        text = traced.lower().compile().as_text()
    return traced, text


GATHERED = LAYERS * 3 / 4 * (WIDTH // 2) * WIDTH * 4
"""Each layer's half (tensor) of the weight, whole over fsdp"""
SUMMED = LAYERS * 2 * 1 / 2 * (ROWS // 4) * WIDTH * 4


def totals(found):
    sums = {}
    for c in found:
        sums[c.kind, c.axes] = sums.get((c.kind, c.axes), 0.0) + c.total
    return sums


def test_the_traced_program_states_what_the_hand_counts(program):
    traced, _ = program
    found = totals(stated(traced.jaxpr.jaxpr, SIZES, {(WIDTH, WIDTH)}))
    assert found == {("all-gather", ("fsdp",)): GATHERED, ("all-reduce", ("tensor",)): SUMMED}


def test_the_compiled_module_sends_what_the_hand_counts(program):
    _, text = program
    module = hlo.parse(text)
    found = collectives.found(module, SIZES)
    sums = totals(found)
    assert sums["all-gather", ("fsdp",)] == GATHERED
    sent_over_tensor = sum(v for (kind, axes), v in sums.items() if axes == ("tensor",))
    assert sent_over_tensor in (SUMMED, SUMMED / 2), "an all-reduce, or the reduce-scatter that it becomes"
    assert all("test_collectives.py" in c.source for c in found), [c.source for c in found]


def test_gathers_of_weights_are_known_as_such(program):
    traced, _ = program
    found = stated(traced.jaxpr.jaxpr, SIZES, {(WIDTH, WIDTH)})
    assert [c.weight for c in found if c.kind == "all-gather"] == [True]
    assert not any(c.weight for c in stated(traced.jaxpr.jaxpr, SIZES, set()))


TPU = """HloModule jit_f, is_scheduled=true

%region_cond (arg: (s32[], bf16[64,128])) -> pred[] {
  %arg = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %constant.7 = s32[]{:T(128)} constant(11)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %compare.3 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.7), direction=LT
}

%region_body (arg.1: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %arg.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.2 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
  %collective-permute-start.1 = (bf16[64,128]{1,0:T(8,128)(2,1)}, \
bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%get-tuple-element.2), channel_id=1, \
source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}, \
metadata={op_name="jit(f)/while/body/reshard" source_file="/x/jaxmed/nn/param.py" source_line=33}
  %collective-permute-done.1 = bf16[64,128]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start.1)
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%get-tuple-element.3, %collective-permute-done.1)
}

ENTRY %main (p0: bf16[64,128]) -> bf16[64,128] {
  %p0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.9 = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%constant.9, %p0)
  %while.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%region_cond, body=%region_body
  ROOT %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%p0), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add
}
"""


def test_a_tpu_loop_of_permutes_is_counted_by_its_conditions_bound():
    found = {c.kind: c for c in collectives.found(hlo.parse(TPU), SIZES)}
    permute = found["permute"]
    assert (permute.bytes, permute.times, permute.axes) == (64 * 128 * 2, 11, ("fsdp",))
    assert permute.source == "jaxmed/nn/param.py:33"
    assert (found["all-reduce"].bytes, found["all-reduce"].axes) == (64 * 128 * 2, ("tensor",))


@pytest.mark.parametrize(
    ("rest", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2] {'b'}, dimensions={1}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={1}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_replica_groups_in_all_their_spellings(rest, groups):
    assert collectives.groups_of(hlo.Instruction("x", "all-reduce", "f32[]", [], rest)) == groups


def test_bytes_on_the_wire():
    assert wire_bytes("all-gather", 4, 100) == 75
    assert wire_bytes("all-reduce", 4, 100) == 150
    assert wire_bytes("permute", 2, 100) == 100
    assert wire_bytes("all-gather", 1, 100) == 0


CHAIN = """HloModule jit_f, is_scheduled=true

%first (p: bf16[24,128]) -> (bf16[24,128], bf16[96,128]) {
  %p = bf16[24,128]{1,0} parameter(0)
  %all-gather.1 = bf16[96,128]{1,0} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %custom-call.1 = (bf16[24,128]{1,0}, bf16[96,128]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%last (p.1: bf16[24,128]) -> bf16[96,128] {
  %p.1 = bf16[24,128]{1,0} parameter(0)
  %all-gather.2 = bf16[96,128]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %custom-call.2 = bf16[96,128]{1,0} custom-call(%p.1, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p0: bf16[24,128]) -> bf16[96,128] {
  %p0 = bf16[24,128]{1,0} parameter(0)
  %fusion.1 = (bf16[24,128]{1,0}, bf16[96,128]{1,0}) fusion(%p0), kind=kCustom, calls=%first
  ROOT %fusion.2 = bf16[96,128]{1,0} fusion(%p0), kind=kCustom, calls=%last
}
"""


def test_a_fused_asynchronous_gather_counts_once():
    (gather,) = collectives.found(hlo.parse(CHAIN), SIZES)
    assert (gather.kind, gather.axes, gather.bytes) == ("all-gather", ("fsdp",), 3 / 4 * 96 * 128 * 2)


BROKEN = """HloModule jit_f, is_scheduled=true

%body (arg: (s32[], bf16[24,128])) -> (s32[], bf16[24,128]) {
  %arg = (s32[], bf16[24,128]{1,0}) parameter(0)
  %get-tuple-element.1 = bf16[24,128]{1,0} get-tuple-element(%arg), index=1
  %kernel.1 = bf16[24,128]{1,0} custom-call(%get-tuple-element.1), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/kernel" source_file="/x/jaxmed/nn/attention.py" source_line=7}
  %all-gather.9 = bf16[96,128]{1,0} all-gather(%kernel.1), channel_id=5, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %tuple.1 = (s32[], bf16[24,128]{1,0}) tuple(%get-tuple-element.1)
}, execution_thread="main"

ENTRY %main (p0: (s32[], bf16[24,128])) -> (s32[], bf16[24,128]) {
  %p0 = (s32[], bf16[24,128]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[24,128]{1,0}) while(%p0), condition=%none, body=%body, \
backend_config={"known_trip_count":{"n":"13"}}
}
"""


def test_what_stands_after_a_kernel_with_metadata_of_several_lines_is_read():
    module = hlo.parse(BROKEN)
    (gather,) = collectives.found(module, SIZES)
    assert (gather.kind, gather.times, gather.bytes) == ("all-gather", 13, 3 / 4 * 96 * 128 * 2)
    (kernel,) = (i for i in module.computations["body"] if i.opcode == "custom-call")
    assert hlo.place(module, kernel) == "jaxmed/nn/attention.py:7"


BETWEEN = """HloModule jit_f, is_scheduled=true

ENTRY %main (p0: bf16[12,8,128]) -> bf16[12,8,128] {
  %p0 = bf16[12,8,128]{2,1,0} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (bf16[12,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%p0, %after-all.1), channel_id=8, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[12,8,128]{2,1,0}, u32[]{:S(2)}, token[]) recv(%after-all.1), channel_id=7, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %recv-done.1 = bf16[12,8,128]{2,1,0} recv-done(%recv.1), channel_id=7
}
"""


def test_what_slices_send_each_other_is_counted_apart():
    (summed,) = collectives.found(hlo.parse(BETWEEN), {"data": 4, "fsdp": 4, "context": 1, "tensor": 1})
    assert (summed.kind, summed.axes, summed.far) == ("all-reduce", ("data",), True)
    assert summed.bytes == 2 * 3 / 4 * 12 * 8 * 128 * 2
