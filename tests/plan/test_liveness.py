"""Peaks of small programs, counted by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmed.plan.jaxprs import nbytes
from jaxmed.plan.liveness import Machine, Value

N = 4 * 250 * 250
"""Bytes of one float32 [250, 250]"""


def peak(f, *shapes, keep=True, fuses=False):
    jaxpr = jax.make_jaxpr(f)(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]).jaxpr
    machine = Machine(fuses, 1.0, lambda eqn, out, machine: "made")
    arguments = []
    for v in jaxpr.invars:
        buffer = machine.make(nbytes(v.aval), "given", "")
        buffer.readers += 2 if keep else 1
        arguments.append(Value((buffer,)))
    machine.check()
    machine.run(jaxpr, arguments)
    return machine.peak


SQUARE = (250, 250)


def test_elementwise_chains_cost_their_result_alone():
    assert peak(lambda x: jnp.exp(x * 2.0) + x, SQUARE).classes == {"given": N, "made": N}


def test_a_dying_argument_is_written_over():
    assert peak(lambda x: jnp.exp(x * 2.0) + x, SQUARE, keep=False).bytes == N


def test_products_need_operands_and_result():
    assert peak(lambda x, y: (x @ y) @ y, SQUARE, SQUARE).classes == {"given": 2 * N, "made": 2 * N}


def test_a_chain_that_a_product_reads_is_written_first():
    assert peak(lambda x, y: jnp.exp(x) @ y, SQUARE, SQUARE).classes == {"given": 2 * N, "made": 2 * N}


def test_chains_through_inner_functions_are_fused_where_the_platform_does():
    def f(x):
        return jnp.sum(jax.nn.silu(x) * 2.0)

    assert peak(f, SQUARE, fuses=True).classes["made"] < N
    assert peak(f, SQUARE).classes["made"] >= N


def test_loops_hold_what_they_stack_and_one_body():
    def f(x, y):
        def body(carry, _):
            return jnp.tanh(carry @ y), carry

        return jax.lax.scan(body, x, length=7)

    # seven stacked carries, the carry, and the product beside it
    assert peak(f, SQUARE, SQUARE).classes == {"given": 2 * N, "made": (7 + 2) * N}


def test_the_backward_pass_of_a_loop_keeps_its_residuals_unless_rematerialised():
    def loss(x, y, wrap):
        def body(carry, _):
            return jnp.sin(jnp.sin(carry @ y) @ y), None

        return jnp.sum(jax.lax.scan(wrap(body), x, length=9)[0])

    def bytes_with(wrap):
        return peak(lambda x, y: jax.grad(loss)(x, y, wrap), SQUARE, SQUARE).bytes

    saved, recomputed = bytes_with(lambda f: f), bytes_with(jax.checkpoint)
    assert 2 * 9 * N < saved < 2 * 9 * N + 8 * N
    assert 9 * N < recomputed < 9 * N + 8 * N


def test_the_worst_moment_is_found_inside_calls():
    @jax.jit
    def inner(x):
        big = jnp.concatenate([x, x, x]) @ x
        return jnp.sum(big)

    assert peak(lambda x: inner(x) + 1.0, SQUARE).bytes >= 7 * N


def test_what_is_only_read_in_a_narrower_type_is_gathered_in_it():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    of_rows, whole = PartitionSpec("fsdp", None), PartitionSpec(None, None)

    def f(w, narrow):
        w = jax.sharding.reshard(w, whole)
        w = w.astype(jnp.bfloat16) if narrow else w * 2.0
        return jnp.sum((w @ w).astype(jnp.float32))

    def largest(narrow):
        with jax.set_mesh(mesh):
            given = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, of_rows))
            jaxpr = jax.make_jaxpr(lambda w: f(w, narrow))(given).jaxpr
        machine = Machine(True, 1.0, lambda eqn, out, machine: "made")
        held = machine.make(nbytes(jaxpr.invars[0].aval), "frozen", "")
        held.readers += 2
        machine.run(jaxpr, [Value((held,), weight=True)])
        return machine.peak.classes["gathered weights"]

    assert largest(narrow=True) == 2 * 256 * 256 * 2, "the gathered weight and its square"
    assert largest(narrow=False) >= 4 * 256 * 256


def test_several_gpus_gather_weights_ahead_of_their_reader_but_not_before_a_loop():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    whole, weight = PartitionSpec(None, None), 4 * 256 * 512

    def straight(x, a, b, w):
        z = jnp.tanh(x @ a) @ b
        return z[:1] @ jax.sharding.reshard(w, whole)

    def looped(x, a, b, w):
        z = jax.lax.scan(lambda z, _: (jnp.tanh(z @ a) @ b, None), x, length=3)[0]
        return z[:1] @ jax.sharding.reshard(w, whole)

    def largest(f, ahead):
        with jax.set_mesh(mesh):
            parts = [((256, 256), whole), ((256, 8192), whole), ((8192, 256), whole), ((256, 512), PartitionSpec("fsdp", None))]
            given = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in parts]
            jaxpr = jax.make_jaxpr(f)(*given).jaxpr
        machine = Machine(True, 2.0, lambda eqn, out, machine: "made", ahead)
        held = [machine.make(nbytes(v.aval), "frozen", "") for v in jaxpr.invars]
        for buffer in held:
            buffer.readers += 2
        machine.run(jaxpr, [Value((b,), weight=n == 3) for n, b in enumerate(held)])
        return machine.peak.bytes

    assert largest(straight, ahead=True) == largest(straight, ahead=False) + weight
    assert largest(looped, ahead=True) == largest(looped, ahead=False)
