"""Who reads a variable of a jaxpr, and how: for jaxmed.plan.liveness."""

from typing import Any

from jaxmed.plan.jaxprs import CALLS, gathers, inner_jaxprs, nbytes


def last_readers(jaxpr: Any) -> dict[Any, int]:
    """Index of the last equation that reads each variable; results are read after the last one."""
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last |= {v: index for v in eqn.invars if is_var(v)}
    return last | {v: len(jaxpr.eqns) for v in jaxpr.outvars if is_var(v)}


def is_var(v: Any) -> bool:
    return not hasattr(v, "val")


def cast_before(jaxpr: Any) -> dict[Any, int]:
    """Gathered arrays that nothing but casts to a narrower type read, and the bytes of those: compilers cast, then gather."""
    made = (v for eqn in jaxpr.eqns if eqn.primitive.name in ("reshard", "all_gather") for v in eqn.outvars)
    found = ((v, _cast_to(v, jaxpr)) for v in made)
    return {v: size for v, size in found if 0 < size < nbytes(v.aval)}


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
