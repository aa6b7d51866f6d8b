"""What a program sends between devices, in one form for what the jaxpr states and what a compiled module holds.

Bytes are those one device sends for one run of a collective over n devices:

    all-gather       (n - 1) / n of the gathered array
    reduce-scatter   (n - 1) / n of the array before it
    all-reduce       2 (n - 1) / n of the array
    all-to-all       (n - 1) / n of the array
    permute          the array
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxmed.plan.jaxprs import Equation, equations, explicit, gathers, nbytes, spec_axes, unreduced
from jaxmed.plan.readers import casts


@dataclass(frozen=True)
class Collective:
    kind: str
    axes: tuple[str, ...]
    """Mesh axes it runs over, in the mesh's order"""
    bytes: float
    """One device sends in one run"""
    times: float
    source: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    """Of the result on one device"""
    weight: bool = False
    """Whether a parameter is what is sent"""
    far: bool = False
    """Whether it goes between slices alone"""

    @property
    def total(self) -> float:
        return self.bytes * self.times


def wire_bytes(kind: str, n: int, whole: float) -> float:
    """`whole`: bytes of the larger of operand and result on one device."""
    if n <= 1:
        return 0.0
    share = {"all-reduce": 2 * (n - 1) / n, "permute": 1.0}.get(kind, (n - 1) / n)
    return share * whole


_MANUAL = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "permute",
}


def stated(jaxpr: Any, sizes: Mapping[str, int], parameters: set[tuple], folds: bool = True) -> list[Collective]:
    """The collectives that a jaxpr states: manual ones, changes of sharding, and sums over split dimensions.

    sizes: of the mesh axes; parameters: shapes of gathered weights, so that those are known as such; folds: whether a sum over
    several split dimensions is one collective, and what is read in a narrower type alone is cast before it is gathered
    (TPUs' compiler joins what the partitioner makes of each, and casts; CPUs' does neither).
    """
    found = []
    cast = casts(jaxpr) if folds else {}
    laid_out: dict[
        int, Any
    ] = {}  # id of what leaves the explicit axes for an operation with an out_sharding -> as it was before
    for equation in equations(jaxpr):
        if equation.name == "reshard" and not explicit(equation.eqn.outvars[0].aval):
            laid_out[id(equation.eqn.outvars[0])] = equation.eqn.invars[0].aval
        for kind, axes, aval, whole in _of(equation, laid_out, folds):
            axes = tuple(a for a in sizes if a in axes and sizes[a] > 1)
            if not axes:
                continue
            n = math.prod(sizes[a] for a in axes)
            sent = wire_bytes(kind, n, cast.get(equation.eqn.outvars[0], whole) if kind == "all-gather" else whole)
            weight = tuple(aval.shape) in parameters and kind in ("all-gather", "all-to-all")
            found.append(
                Collective(kind, axes, sent, equation.times, equation.source, str(aval.dtype), tuple(aval.shape), weight)
            )
    return found


def _of(equation: Equation, laid_out: Mapping[int, Any], folds: bool) -> Iterable[tuple[str, tuple[str, ...], Any, float]]:
    """(kind, axes, result, bytes of the larger side) of what one equation sends."""
    eqn, name = equation.eqn, equation.name
    if name in _MANUAL:
        axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        axes = axes if isinstance(axes, tuple) else (axes,)
        for before, after in zip(eqn.invars, eqn.outvars, strict=True):
            yield (
                _MANUAL[name],
                tuple(a for a in axes if isinstance(a, str)),
                after.aval,
                max(map(nbytes, (before.aval, after.aval))),
            )
    elif name == "reshard" and gathers(eqn):
        before, after = eqn.invars[0].aval, eqn.outvars[0].aval
        old, new = spec_axes(before), spec_axes(after)
        lost = tuple(a for entry in old for a in entry if a not in {b for e in new for b in e})
        moved = tuple(a for i, entry in enumerate(old) for a in entry if a not in new[i] and a not in lost)
        if lost:
            yield "all-gather", lost, after, float(nbytes(after))
        if moved:
            yield "all-to-all", moved, after, float(max(nbytes(before), nbytes(after)))
        if summed := unreduced(before) - unreduced(after):
            yield "all-reduce", tuple(summed), after, float(nbytes(after))
    elif name == "argmax":  # each shard's largest value and its index come to all
        before, after = eqn.invars[0].aval, eqn.outvars[0].aval
        for over in (axes for i in eqn.params["axes"] if (axes := spec_axes(before)[i])):
            shards = math.prod(before.sharding.mesh.shape[a] for a in over)
            one = nbytes(after) // after.dtype.itemsize * (after.dtype.itemsize + before.dtype.itemsize)
            yield "all-gather", over, after, float(shards * one)
    else:
        for summed in _sums(eqn, laid_out, folds):
            yield "all-reduce", summed, eqn.outvars[0].aval, float(nbytes(eqn.outvars[0].aval))


def _sums(eqn: Any, laid_out: Mapping[int, Any], folds: bool) -> list[tuple[str, ...]]:
    """Mesh axes over which an equation sums dimensions that are split: of each collective."""
    name, split, summed = eqn.primitive.name, [], []
    if name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        later = unreduced(eqn.outvars[0].aval)
        split = [tuple(a for a in axes if a not in later) for axes in spec_axes(eqn.invars[0].aval)]
    elif name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"):
        split, summed = spec_axes(eqn.invars[0].aval), eqn.params["axes"]
    elif name == "scatter-add" and id(eqn.invars[2]) in laid_out:  # the gradient of a table that rows are taken from
        split = spec_axes(laid_out[id(eqn.invars[2])])
        summed = sorted(set(range(len(split))) - set(eqn.params["dimension_numbers"].update_window_dims))
    found = [split[i] for i in summed if split[i]]
    return [tuple(a for axes in found for a in axes)] if folds and found else found


def merged(collectives: Iterable[Collective]) -> list[Collective]:
    """One row a (kind, axes, source), most bytes first; `bytes` then is the sum over all runs and `times` 1."""
    groups: dict[tuple, list[Collective]] = defaultdict(list)
    for c in collectives:
        groups[c.kind, c.axes, c.source, c.weight, c.far].append(c)
    rows = [replace(max(g, key=lambda c: c.total), bytes=sum(c.total for c in g), times=1.0) for g in groups.values()]
    return sorted(rows, key=lambda c: -c.bytes)


def by_axis(collectives: Iterable[Collective]) -> dict[tuple[str, ...], float]:
    """Bytes one device sends over each group of mesh axes."""
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for c in collectives:
        sums[c.axes] += c.total
    return dict(sums)
