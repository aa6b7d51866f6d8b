"""How much memory a traced program needs at its worst moment, and for what, by playing it through. No compiler is asked.

The jaxpr is walked in its order on one device's shapes. A buffer lives from the equation that makes it to its last reader.
Which values get a buffer follows what XLA does: products, collectives, gathers, loops and kernels write theirs. A chain of
elementwise operations or views is fused into its readers and costs what it is made of; it gets a buffer where a product or a
collective reads it, and as soon as it is smaller than what it alone keeps alive (twice as small on GPUs, whose compiler holds
the terms of a sum longer), in place of a part of that, if one has its size. A loop holds its stacked inputs and outputs whole,
and once what its body needs.

Every buffer carries a class from its birth (see jaxmed.plan.memory), so the peak is a sum of classes, none of them a remainder.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmed.plan.jaxprs import CALLS, explicit, gathers, inner_jaxprs, is_kernel, nbytes, on_host, source
from jaxmed.plan.readers import cast_before, gathered_ahead, gradients_last, is_var, last_readers

VIEWS = {
    "reshape", "squeeze", "expand_dims", "transpose", "slice", "rev", "broadcast_in_dim", "pvary", "pcast", "copy", "copy_p",
    "reduce_precision", "stop_gradient", "name", "sharding_constraint", "optimization_barrier", "mesh_cast", "iota",
    "dynamic_slice", "split", "device_put", "random_wrap", "random_unwrap", "layout_constraint",
}  # fmt: skip
WRITERS = {
    "dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "scatter_add", "sort", "concatenate", "pad",
    "all_gather", "all_gather_invariant", "psum", "psum_invariant", "pmax", "pmin", "reduce_scatter", "all_to_all", "ppermute",
    "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin", "cumsum", "cumlogsumexp", "cummax",
    "custom_call", "random_bits", "threefry2x32", "top_k", "while", "dynamic_update_slice",
}  # fmt: skip
PRODUCTS = {
    "dot_general", "conv_general_dilated", "concatenate", "sort", "all_gather", "all_gather_invariant", "psum", "reshard",
    "psum_invariant", "reduce_scatter", "all_to_all", "ppermute",
}  # fmt: skip
"""Of the writers those whose operands must lie in memory; the others compute them as they read"""


@dataclass(eq=False)
class Buffer:
    bytes: int
    label: str
    what: str
    """Shape, dtype and source line"""
    readers: int = 0


@dataclass
class Value:
    """What a variable stands for: buffers that must live as long as it does."""

    buffers: tuple[Buffer, ...]
    weight: bool = False
    """Whether it is made of parameters alone"""
    ready: bool = True
    """Whether it has its own buffer (or is one's view); False: a chain that its reader will compute"""
    size: int = 0
    """Bytes that a chain would take"""
    what: Any = None
    """(equation, variable) that made a chain"""


@dataclass(frozen=True)
class Peak:
    bytes: int
    classes: dict[str, int]
    largest: list[tuple[int, str, str]]
    """(bytes, class, what) of the largest buffers at that moment"""


@dataclass
class Machine:
    """One device's memory while the program is played."""

    fuses: bool
    """Whether chains are fused across inner functions (silu, where, ...) as well: all but CPUs do"""
    patience: float
    """How many times its own size a chain may keep alive, alone, before it is written"""
    label: Callable[[Any, Any, "Machine"], str]
    """(equation, variable, machine) -> class of a new buffer"""
    ahead: bool = False
    """Whether weights are gathered before their reader's turn, outside of loops: by several GPUs"""
    matrices: frozenset[tuple] = frozenset()
    """Shapes of a layer's weights whose gradients are made last in it, likewise"""
    depth: int = 0
    """Loops over layers around the equation"""
    loops: int = 0
    now: int = 0
    live: set[Buffer] = field(default_factory=set)
    peak: Peak = Peak(0, {}, [])

    def make(self, size: int, label: str, what: str) -> Buffer:
        buffer = Buffer(size, label, what)
        self.live.add(buffer)
        self.now += size
        return buffer

    def check(self) -> None:
        if self.now > self.peak.bytes:
            classes: Counter[str] = Counter()
            for b in self.live:
                classes[b.label] += b.bytes
            large = sorted(((b.bytes, b.label, b.what) for b in self.live), reverse=True)[:40]
            self.peak = Peak(self.now, dict(classes), large)

    def hold(self, value: Value) -> Value:
        for b in value.buffers:
            b.readers += 1
        return value

    def drop(self, value: Value) -> None:
        for b in value.buffers:
            b.readers -= 1
            if b.readers == 0 and b in self.live:
                self.live.remove(b)
                self.now -= b.bytes

    # -- the walk ----------------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, arguments: Sequence[Value], written: bool = True) -> list[Value]:
        """Plays a jaxpr; takes over one hold of each argument and returns held results, which lie in memory if `written`."""
        env: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        for v in jaxpr.constvars:
            env[v] = Value(())
        eqns = gradients_last(jaxpr, self.matrices) if self.matrices and self.loops else jaxpr.eqns
        if self.ahead and not self.loops:
            eqns = gathered_ahead(jaxpr)
        last, casts = last_readers(jaxpr, eqns), cast_before(jaxpr)
        for v in [*jaxpr.invars, *jaxpr.constvars]:
            if v not in last:
                self.drop(env.pop(v))
        for index, eqn in enumerate(eqns):
            read = [env.get(v, Value(())) if is_var(v) else Value(()) for v in eqn.invars]
            dying = {v for v in eqn.invars if is_var(v) and last.get(v) == index and v in env}
            if eqn.primitive.name in PRODUCTS or is_kernel(eqn):
                self.settle(eqn, env)
                read = [env.get(v, Value(())) if is_var(v) else Value(()) for v in eqn.invars]
            made = self.step(eqn, read, dying, env, casts)
            for v in dying:
                if v in env:
                    self.drop(env.pop(v))
            for v, value in zip(eqn.outvars, made, strict=True):
                if v in last:
                    env[v] = value
                else:
                    self.drop(value)
            self.compact(env)
        results = []
        for v in jaxpr.outvars:
            if written and is_var(v) and v in env and not env[v].ready:
                env[v] = self.materialise(env[v])
            results.append(self.hold(env[v]) if is_var(v) and v in env else Value(()))
        for value in env.values():
            self.drop(value)
        return results

    def step(self, eqn: Any, read: list[Value], dying: set, env: dict, casts: dict) -> list[Value]:
        """-> a held value an output; `casts`: bytes of gathered arrays that are only read in a narrower type"""
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, read, dying, env)
        if name in CALLS and inner_jaxprs(eqn):
            inner = inner_jaxprs(eqn)[0]
            return self.run(getattr(inner, "jaxpr", inner), self._pass_on(eqn.invars, read, dying, env), written=not self.fuses)
        if name == "cond":
            return self.branch(eqn, read)
        cuts = name == "reshard" and not gathers(eqn) and nbytes(eqn.outvars[0].aval) < nbytes(eqn.invars[0].aval)
        if (name == "reshard" and not gathers(eqn)) or not all(explicit(v.aval) for v in eqn.outvars):
            name = "reshape"
        fetched = name == "device_put" and on_host(eqn.invars[0].aval)
        writes = (name in WRITERS or name == "reshard" or is_kernel(eqn) or fetched) and name != "reshape"
        weight = bool(read) and all(v.weight for v in read if v.buffers) and any(v.buffers for v in read)
        made = []
        for out in eqn.outvars:
            if not writes:
                sources = tuple(dict.fromkeys(b for v in read for b in v.buffers))
                viewed = name in VIEWS or (name == "convert_element_type" and _is_cast(read[0], out))
                ready = viewed and not cuts and all(v.ready for v in read)  # a shard of a whole array is copied out of it
                read_size = sum(nbytes(v.aval) for v in eqn.invars)
                size = min(nbytes(out.aval), read_size) if name == "broadcast_in_dim" else nbytes(out.aval)
                made.append(self.hold(Value(sources, weight, ready, size, (eqn, out))))
                continue
            made.append(self.write(eqn, out, read, dying, env, weight, casts.get(out, nbytes(out.aval))))
        return made

    def settle(self, eqn: Any, env: dict) -> None:
        """Gives a buffer to the chains that an equation reads from memory."""
        for v in {v for v in eqn.invars if is_var(v) and v in env and not env[v].ready}:
            env[v] = self.materialise(env[v])

    def compact(self, env: dict) -> None:
        """Gives a buffer to chains that keep more alive, alone, than they would take."""
        for v, value in env.items():
            if not value.ready and self.patience * value.size < sum(b.bytes for b in value.buffers if b.readers == 1):
                env[v] = self.materialise(value)

    def materialise(self, value: Value) -> Value:
        """A chain's own buffer, in place of one that it alone reads where there is one of that size."""
        eqn, out = value.what
        for b in value.buffers:
            if b.readers == 1 and b.bytes == value.size and b.label not in ("frozen", "batch"):
                b.readers += 1
                self.drop(value)
                return Value((b,), value.weight)
        label = "gathered weights" if value.weight else self.label(eqn, out, self)
        fresh = self.hold(Value((self.make(value.size, label, _what(eqn, out)),), value.weight))
        self.check()
        self.drop(value)
        return fresh

    def write(self, eqn: Any, out: Any, read: list[Value], dying: set, env: dict, weight: bool, size: int) -> Value:
        """A buffer for an output, in place of one that dies here where the operation allows it."""
        name = eqn.primitive.name
        in_place = name not in WRITERS and not is_kernel(eqn) and name != "reshard"
        candidates = eqn.invars[:1] if name == "dynamic_update_slice" else eqn.invars if in_place else ()
        for v in candidates:
            if not (is_var(v) and v in dying and v in env):
                continue
            for b in env[v].buffers:
                if b.bytes == size and b.readers == 1 and b.label not in ("frozen", "batch"):
                    b.readers += 1
                    return Value((b,), weight)
        buffer = self.make(size, self.label(eqn, out, self) if not weight else self._weights(eqn, out), _what(eqn, out))
        self.check()
        return self.hold(Value((buffer,), weight))

    def _weights(self, eqn: Any, out: Any) -> str:
        return "gathered weights"

    def _pass_on(self, invars: Sequence[Any], read: list[Value], dying: set, env: dict) -> list[Value]:
        """Held values for an inner jaxpr; what dies with this equation dies inside, where its last reader is."""
        passed = [self.hold(Value(v.buffers, v.weight, v.ready, v.size, v.what)) for v in read]
        for v in {v for v in invars if is_var(v)} & dying:
            self.drop(env.pop(v))
        return passed

    def branch(self, eqn: Any, read: list[Value]) -> list[Value]:
        """The branch that needs most."""
        outs = [self.make(nbytes(o.aval), self.label(eqn, o, self), _what(eqn, o)) for o in eqn.outvars]
        self.check()
        return [self.hold(Value((b,))) for b in outs]

    def scan(self, eqn: Any, read: list[Value], dying: set, env: dict) -> list[Value]:
        p = eqn.params
        body = p["jaxpr"].jaxpr
        consts, carries = _scan_counts(eqn)
        ys = eqn.outvars[carries:]
        stacked = [self.make(nbytes(y.aval), self.label(eqn, y, self), _what(eqn, y)) for y in ys]
        held = [self.hold(Value((b,))) for b in stacked]
        arguments = []
        for number, (v, value) in enumerate(zip(eqn.invars, read, strict=True)):
            if consts <= number < consts + carries:
                arguments.append(self._carry(eqn, v, body.invars[number], value, dying, env))
            else:  # constants and stacked inputs stay whole until the loop ends
                arguments.append(self.hold(Value(value.buffers, value.weight, True)))
        self.check()
        self.loops += 1
        results = self.run(body, arguments)
        self.loops -= 1
        for value in results[carries:]:
            self.drop(value)
        done = []
        for out, value in zip(eqn.outvars[:carries], results[:carries], strict=True):
            done.append(self._own(eqn, out, value))
        return [*done, *held]

    def _carry(self, eqn: Any, v: Any, inner: Any, value: Value, dying: set, env: dict) -> Value:
        """The loop's own buffer for a carried value: the initial one if nobody else reads it."""
        size = nbytes(inner.aval)
        if is_var(v) and v in dying and v in env and [b.bytes for b in value.buffers] == [size]:
            (b,) = value.buffers
            if b.readers == 1 and b.label not in ("frozen", "batch"):
                del env[v]
                dying.discard(v)
                return Value((b,))
        return self.hold(Value((self.make(size, self.label(eqn, inner, self), _what(eqn, inner)),)))

    def _own(self, eqn: Any, out: Any, value: Value) -> Value:
        """A carried result that is a fused chain gets its buffer at last."""
        if value.ready and len(value.buffers) == 1 and value.buffers[0].bytes == nbytes(out.aval):
            return value
        buffer = self.hold(Value((self.make(nbytes(out.aval), self.label(eqn, out, self), _what(eqn, out)),)))
        self.check()
        self.drop(value)
        return buffer


def _is_cast(value: Value, out: Any) -> bool:
    """Whether a gathered array was cast already, before it was gathered."""
    gathered_ = value.weight and len(value.buffers) == 1 and value.buffers[0].label == "gathered weights"
    return gathered_ and value.buffers[0].bytes == nbytes(out.aval)


def _what(eqn: Any, out: Any) -> str:
    return f"{out.aval.str_short(short_dtypes=True)} {eqn.primitive.name} {source(eqn)}"


def _scan_counts(eqn: Any) -> tuple[int, int]:
    """Constants and carries of a scan, by shapes: what is stacked has one axis more outside. (Versions of JAX name them
    differently.)"""
    body = eqn.params["jaxpr"].jaxpr
    carries = sum(a.aval.shape == b.aval.shape for a, b in zip(eqn.outvars, body.outvars, strict=True))
    whole = sum(a.aval.shape == b.aval.shape for a, b in zip(eqn.invars, body.invars, strict=True))
    return whole - carries, carries
