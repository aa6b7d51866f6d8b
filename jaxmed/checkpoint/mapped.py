"""Memory of mapped files: what a tensor's values cost this process, and giving it back."""

import mmap

import numpy as np


def release(array: np.ndarray) -> None:
    """Gives back the memory of a mapped tensor that was read: its pages count as this process's as long as they are there."""
    mapped = array
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "base", None) if isinstance(mapped, np.ndarray) else getattr(mapped, "obj", None)
    if mapped is None or not array.size or not hasattr(mapped, "madvise"):
        return
    begin = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    low, high = np.lib.array_utils.byte_bounds(array)
    start = -(-(low - begin) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages alone: its neighbours may be in use
    stop = (high - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)
