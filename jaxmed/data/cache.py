"""Small caches beside the records file (or in the user's cache folder, where that one cannot be written).

A cache is one .npz of plain arrays and a key; with another key it counts as absent. Losing one costs time, never correctness.
"""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterator

import numpy as np


def file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _places(records_path: str, kind: str) -> Iterator[str]:
    yield f"{records_path}.jaxmed-{kind}.npz"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.path.abspath(records_path).encode()).hexdigest()[:24]
    yield os.path.join(home, "jaxmed", f"{name}.jaxmed-{kind}.npz")


def read(records_path: str, kind: str, key: str) -> dict[str, np.ndarray]:
    """The arrays stored under `key`, {} if there are none."""
    for place in _places(records_path, kind):
        try:
            with np.load(place, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
        if str(arrays.pop("key", "")) == key:
            return arrays
    return {}


def write(records_path: str, kind: str, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Stores the arrays in the first place that can be written; several processes may do so at once."""
    for place in _places(records_path, kind):
        partial = f"{place}.{os.getpid()}.partial"
        try:
            os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
            with open(partial, "wb") as file:
                np.savez(file, key=np.array(key), **arrays)
            os.replace(partial, place)
            return
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(partial)
