"""The wrong image on purpose: does a model's report depend on what it is shown?"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from jaxmed.data.inputs import VisualInput
from jaxmed.data.records import Record
from jaxmed.errors import UserError

KINDS = ("shuffled", "zeros", "noise")


def exchanged(records: Sequence[Record], seed: int) -> dict[str, Record]:
    """Record id -> the record whose images it is shown: never its own, and as many; depends on records and seed alone."""
    result: dict[str, Record] = {}
    groups: dict[int, list[Record]] = {}
    for record in records:
        if record.images:
            groups.setdefault(len(record.images), []).append(record)
    for count, group in groups.items():
        files = sorted({record.images for record in group})
        if len(files) < 2:
            raise UserError(
                f"--control shuffled: all {len(group)} studies with {count} images show the same; none can be exchanged"
            )
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, count]))).permutation(len(files))
        turned = {files[a]: files[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
        by_files = {record.images: record for record in group}
        result |= {record.id: by_files[turned[record.images]] for record in group}
    return result


def controlled(image: VisualInput, kind: str, name: str, seed: int) -> VisualInput:
    """An image of the same size with `zeros`, or `noise` of the same mean and spread in each feature (codes: random bits)."""
    values = image.values
    if kind == "zeros":
        return dataclasses.replace(image, values=np.zeros_like(values))
    digest = hashlib.sha256(f"{seed}\x00{name}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    if values.dtype == np.uint32:
        return dataclasses.replace(image, values=rng.integers(0, 1 << 18, values.shape, dtype=np.uint32))
    features = tuple(range(values.ndim - 1))
    noise = rng.standard_normal(values.shape, dtype=np.float32) * values.std(axis=features) + values.mean(axis=features)
    return dataclasses.replace(image, values=noise.astype(np.float32))
