"""Tensors that our model does not compute with and another layout needs: copied from the source's files bit for bit.

A tower's later blocks, its norm after the last of them, a pooling head: what is there is kept, whatever was trained beside it.
"""

from collections.abc import Callable

import numpy as np

from jaxmed.checkpoint.mapped import release
from jaxmed.checkpoint.tensor_files import Tensor
from jaxmed.checkpoint.values import Parameters

RULE = "copied"


def copied(
    values: Parameters, named: Callable[[str], str], wanted: Callable[[str], bool], dtype: np.dtype | None
) -> list[Tensor]:
    """The surplus tensors whose canonical names are `wanted`; `named`: canonical name -> the one in the file."""
    return [_tensor(values, key, named(key), dtype) for key in values.surplus if wanted(key)]


def _tensor(values: Parameters, key: str, name: str, dtype: np.dtype | None) -> Tensor:
    array = values.surplus[key]

    def make() -> np.ndarray:
        found = np.array(array)
        release(array)
        return found

    floating = array.dtype.kind not in "iub"
    file = values.places[key].rsplit(": ", 1)[0]
    return Tensor(name, array.shape, dtype if dtype and floating else array.dtype, make, "-", RULE, (file,))


def unused(name: str, shape: tuple[int, ...], value: float, dtype: np.dtype) -> Tensor:
    """A tensor that a layout asks for and nothing ever reads, where no source has it."""
    return Tensor(name, shape, dtype, lambda: np.full(shape, value, dtype), "-", f"{value:g}, never read")
