"""What a traced program computes and sends, counted from its jaxpr: every equation, how often it runs, and what it costs on one
device. No compiler is asked: compilers count a loop's body once, and the GPU's counts nothing.

Shapes are one device's: outside `shard_map` an array's explicit sharding says them, inside they are so already. A `scan` runs
its body `length` times; a `while` whose trip count the jaxpr does not know counts once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax._src import source_info_util  # the public API gives no source line of an equation

CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat2",
    "checkpoint",
    "remat",
    "shard_map",
    "custom_jvp_call",
    "custom_vjp_call",
}
"""Primitives that run an inner jaxpr once"""


@dataclass(frozen=True)
class Equation:
    """One equation, wherever it stands."""

    eqn: Any
    times: float
    """How often it runs: the product of the lengths of the loops around it"""
    loops: int = 0
    """Loops around it"""

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def source(self) -> str:
        return source(self.eqn)

    @property
    def flops(self) -> float:
        """Of one run on one device; products and convolutions alone."""
        if self.name == "dot_general":
            (contract, _), _ = self.eqn.params["dimension_numbers"]
            left = local_shape(self.eqn.invars[0].aval)
            return 2.0 * math.prod(local_shape(self.eqn.outvars[0].aval)) * math.prod(left[i] for i in contract)
        if self.name == "conv_general_dilated":
            kernel = self.eqn.invars[1].aval.shape
            features = kernel[self.eqn.params["dimension_numbers"].rhs_spec[0]]
            return 2.0 * math.prod(local_shape(self.eqn.outvars[0].aval)) * math.prod(kernel) / features
        return kernel_flops(self.eqn) if is_kernel(self.eqn) else 0.0

    @property
    def host_traffic(self) -> float:
        """Bytes that one run moves between the device's memory and the host's."""
        if self.name != "device_put":
            return 0.0
        pairs = zip(self.eqn.invars, self.eqn.outvars, strict=True)
        return float(sum(size_of(b.aval) for a, b in pairs if on_host(a.aval) != on_host(b.aval)))

    def traffic(self, on_chip: float) -> float:
        """Bytes that one run moves between memory and the chip: what products, kernels and gathers read and write once. What is
        elementwise rides along with them, and so does what an inner loop (attention over chunks) can keep on the chip."""
        if not (self.flops or self.name in ("gather", "scatter", "scatter-add", "sort") or is_kernel(self.eqn)):
            return 0.0
        sizes = [nbytes(v.aval) for v in (*self.eqn.invars, *self.eqn.outvars)]
        return float(sum(s for s in sizes if self.loops < 2 or s > on_chip / 3))


def is_kernel(eqn: Any) -> bool:
    """Kernels that are opaque to XLA: Pallas (splash attention), cuDNN's flash attention."""
    return "pallas" in eqn.primitive.name or "dot_product_attention" in eqn.primitive.name


def kernel_flops(eqn: Any) -> float:
    """Of an attention kernel, by formula: the square of each product, or half of it where a mask by order leaves the rest out.

    Forward are two products of queries and keys; backward five, in one kernel or as three for dq and four for dk and dv.
    """
    floats = [v.aval for v in eqn.invars if getattr(v.aval, "ndim", 0) >= 3 and jnp.issubdtype(v.aval.dtype, jnp.floating)]
    arrays = [local_shape(aval) for aval in floats]
    if len(arrays) < 2:
        return 0.0
    q, k = arrays[0], arrays[1]
    name = f"{eqn.primitive.name} {eqn.params.get('name', '')} {eqn.params.get('name_and_src_info', '')}"
    products = 4 if "dkv" in name else 3 if "dq" in name else 5 if "bwd" in name else 2
    if "dot_product_attention" in name:  # [B, T, heads, width]
        rows, heads, width, length, keys = q[0], q[2], q[3], q[1], k[1]
    else:  # [..., heads, T, width]
        rows, heads, width, length, keys = math.prod(q[:-3]), q[-3], q[-1], q[-2], k[-2]
    return products * 2.0 * rows * heads * length * keys * width / (2 if _ordered(eqn) else 1)


def _ordered(eqn: Any) -> bool:
    """Whether an attention kernel looks at the order of tokens (causal, a window). cuDNN's says so; splash then has indices of
    the queries as an input, beside the segments, which come in pairs."""
    if "mask_type" in eqn.params:
        return "CAUSAL" in str(eqn.params["mask_type"])
    return sum(getattr(v.aval, "dtype", None) == jnp.int32 for v in eqn.invars) % 2 == 1


def source(eqn: Any) -> str:
    """`file.py:line (function)` in this package, in an installed one, or in the caller's code."""
    text = source_info_util.summarize(eqn.source_info)
    path, _, rest = text.partition(":")
    path = path[path.rfind("jaxmed/") :] if "jaxmed/" in path else path.rpartition("site-packages/")[2]
    return f"{path}:{rest}".replace(":0 ", " ")


def equations(jaxpr: Any, times: float = 1.0, loops: int = 0) -> Iterator[Equation]:
    """All equations, those of inner jaxprs included; of a branch the one that computes most."""
    for eqn in jaxpr.eqns:
        if not eqn.outvars:  # a recomputation of which nothing is needed: compilers drop it
            continue
        yield Equation(eqn, times, loops)
        name = eqn.primitive.name
        inner = [getattr(j, "jaxpr", j) for j in inner_jaxprs(eqn)]
        if name == "cond" and inner:
            inner = [max(inner, key=lambda j: sum(e.flops * e.times for e in equations(j)))]
        inner = [] if is_kernel(eqn) else inner
        repeat = eqn.params["length"] if name == "scan" else 1
        for jaxpr_ in inner:
            yield from equations(jaxpr_, times * repeat, loops + (name in ("scan", "while")))


def inner_jaxprs(eqn: Any) -> list[Any]:
    import jax

    found = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [x for x in found if _is_jaxpr(x)]


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def local_shape(aval: Any) -> tuple[int, ...]:
    """The shape of one device's part."""
    sizes = aval.sharding.mesh.shape if getattr(aval, "sharding", None) is not None else {}
    parts = (math.prod(sizes[a] for a in axes) for axes in spec_axes(aval))
    return tuple(-(-n // part) for n, part in zip(getattr(aval, "shape", ()), parts, strict=True))


def nbytes(aval: Any) -> int:
    """Of one device's part, in its own memory."""
    return 0 if on_host(aval) else size_of(aval)


def size_of(aval: Any) -> int:
    """Bytes of one device's part, wherever they lie."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not hasattr(dtype, "itemsize"):
        return 0
    return math.prod(local_shape(aval)) * dtype.itemsize


def on_host(aval: Any) -> bool:
    """Whether an array lies in the host's memory (remat `offload`)."""
    return "Host" in str(getattr(aval, "memory_space", ""))


def spec_axes(aval: Any) -> list[tuple[str, ...]]:
    """Mesh axes of each dimension."""
    sharding = getattr(aval, "sharding", None)
    entries = list(sharding.spec.partitions) if sharding is not None and not sharding.mesh.empty else []
    entries += [None] * (len(getattr(aval, "shape", ())) - len(entries))
    return [() if e is None else e if isinstance(e, tuple) else (e,) for e in entries]


def explicit(aval: Any) -> bool:
    """Whether the array's sharding is stated. A gather with an out_sharding leaves the explicit axes for a moment: there the
    compiler decides, and the next reshard says what it must come to."""
    sharding = getattr(aval, "sharding", None)
    return sharding is None or sharding.mesh.empty or not any("Auto" in str(t) for t in sharding.mesh.axis_types)


def unreduced(aval: Any) -> frozenset[str]:
    """Mesh axes over whose shards an array is still to be summed."""
    sharding = getattr(aval, "sharding", None)
    return frozenset(sharding.spec.unreduced) if sharding is not None and not sharding.mesh.empty else frozenset()


def gathers(eqn: Any) -> bool:
    """Whether a reshard fetches anything from other devices; cutting an array up does not."""
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if not (explicit(before) and explicit(after)):
        return False
    if unreduced(before) - unreduced(after):
        return True
    kept = [set(old) <= set(new) for old, new in zip(spec_axes(before), spec_axes(after), strict=True)]
    return not all(kept)
