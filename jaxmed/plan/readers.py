"""Who reads a variable of a jaxpr, and how: for jaxmed.plan.liveness."""

from collections.abc import Sequence, Set
from typing import Any

from jaxmed.plan.jaxprs import CALLS, gathers, inner_jaxprs, nbytes


def last_readers(jaxpr: Any, eqns: Sequence[Any]) -> dict[Any, int]:
    """Index of the last equation that reads each variable, `eqns` being the jaxpr's; results are read after the last one."""
    last: dict[Any, int] = {}
    for index, eqn in enumerate(eqns):
        last |= {v: index for v in eqn.invars if is_var(v)}
    return last | {v: len(eqns) for v in jaxpr.outvars if is_var(v)}


def gathered_ahead(jaxpr: Any, products: int = 3) -> list[Any]:
    """The equations in an order in which arguments are gathered before the last three products ahead of their reader, as GPUs'
    compiler does to hide the transfer. No gather goes before a loop."""
    inputs, ordered = set(jaxpr.invars), []
    for eqn in jaxpr.eqns:
        place = len(ordered)
        if eqn.primitive.name == "reshard" and is_var(eqn.invars[0]) and eqn.invars[0] in inputs and gathers(eqn):
            seen = 0
            for index in range(len(ordered) - 1, -1, -1):
                if ordered[index].primitive.name in ("scan", "while") or seen == products:
                    break
                if ordered[index].primitive.name == "dot_general":
                    seen, place = seen + 1, index
        ordered.insert(place, eqn)
    return ordered


def gradients_last(jaxpr: Any, matrices: Set[tuple]) -> list[Any]:
    """The equations in an order in which what makes gradients of weights, of shapes `matrices`, comes last: several GPUs leave
    those products to the end of a layer, to hide transfers behind them, and hold their factors until then."""
    left: set[int] = set()
    wanted: set[Any] = set()  # what equations read that are not left to the end
    for eqn in reversed(jaxpr.eqns):
        shapes = (tuple(v.aval.shape) for v in eqn.outvars)
        makes = any(shape in matrices or shape[::-1] in matrices for shape in shapes)
        if makes and not wanted & set(eqn.outvars):
            left.add(id(eqn))
        else:
            wanted |= {v for v in eqn.invars if is_var(v)}
    moved = [eqn for eqn in jaxpr.eqns if id(eqn) in left]
    return [eqn for eqn in jaxpr.eqns if id(eqn) not in left] + moved


def is_var(v: Any) -> bool:
    return not hasattr(v, "val")


def cast_before(jaxpr: Any) -> dict[Any, int]:
    """Gathered arrays that nothing but casts to a narrower type read, and the bytes of those: compilers cast, then gather."""
    made = (v for eqn in jaxpr.eqns if eqn.primitive.name in ("reshard", "all_gather") for v in eqn.outvars)
    found = ((v, _cast_to(v, jaxpr)) for v in made)
    return {v: size for v, size in found if 0 < size < nbytes(v.aval)}


def casts(jaxpr: Any) -> dict[Any, int]:
    """`cast_before` of a jaxpr and of all inside it."""
    found = cast_before(jaxpr)
    for eqn in jaxpr.eqns:
        for inner in inner_jaxprs(eqn):
            found |= casts(getattr(inner, "jaxpr", inner))
    return found


def _cast_to(v: Any, jaxpr: Any) -> int:
    """Bytes of what all readers of a variable cast it to, inside loops and calls too; 0 where one reads it as it is."""
    readers = [eqn for eqn in jaxpr.eqns if any(x is v for x in eqn.invars)]
    sizes = [0] if any(x is v for x in jaxpr.outvars) or not readers else []
    for eqn in readers:
        name, inner = eqn.primitive.name, inner_jaxprs(eqn)
        if name == "convert_element_type":
            sizes.append(nbytes(eqn.outvars[0].aval))
        elif name == "reshard" and not gathers(eqn):
            sizes.append(_cast_to(eqn.outvars[0], jaxpr))
        elif (name == "scan" or name in CALLS) and inner:
            body = getattr(inner[0], "jaxpr", inner[0])
            places = [n for n, x in enumerate(eqn.invars) if x is v]
            sizes += [_cast_to(body.invars[n], body) for n in places]
        else:
            sizes.append(0)
    return min(sizes) and max(sizes)
