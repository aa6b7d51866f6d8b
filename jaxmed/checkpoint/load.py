"""Fills our parameter trees from weight folders, tensor by tensor and slice by slice; and names our trees as upstream does.

First everything is matched by names, shapes and dtypes, strictly both ways: every tensor of the folders has a row or a reason
to be ignored, every parameter of ours is filled; all offenders are told at once, before a value is read. Then each parameter
is read in the pieces that this process's devices hold, a large one some rows or layers at a time, and what was read of a file
gives its pages back: host memory beside the devices' never holds more than about one tensor of theirs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.checkpoint.hf_io import TensorFolder, is_finite
from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.mapped import release
from jaxmed.checkpoint.names import PEFT_PREFIX, canonical_names, ignored_reason
from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.checkpoint.transforms import Transform
from jaxmed.config import Experiment
from jaxmed.errors import UserError

Path = tuple[str, ...]
Surplus = Callable[[str], str]

_COMPARED_ROWS = 4096
_PIECE_BYTES = 1 << 27
"""Of host memory that a read takes at once, where a parameter can be cut"""


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs that fills a parameter, or one layer of it."""

    theirs: np.ndarray
    """View of the file"""
    where: str
    transform: Transform


@dataclass(frozen=True)
class Match:
    """What fills what."""

    filled: dict[Path, list[Piece]]
    """Our path -> its tensor, or one a layer where ours is stacked"""
    stacked: frozenset[Path]
    ignored: dict[str, str]
    """Their tensors that nothing needs, with the reason"""


def no_surplus(name: str) -> str:
    return ""


def read_params(
    rows: Sequence[Row], sources: Sequence[TensorFolder], abstract: Any, partial: bool = False, surplus: Surplus = no_surplus
) -> Any:
    """The tree `abstract` (jax.ShapeDtypeStruct leaves, with shardings or without) as arrays on their devices.

    Later sources overlay earlier ones: [base, adapter] takes the adapter's embed_tokens where it has one. `partial`: the tree
    holds a part of what the rows describe, such as the trainable half. `surplus`: why a tensor (canonical name) that no row
    names is not needed, "" if it is unknown. NaN and infinite values are refused.
    """
    match = match_params(rows, sources, abstract, partial, surplus)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    return structure.unflatten([_read_leaf(_path(keys), leaf, match) for keys, leaf in leaves])


def match_params(
    rows: Sequence[Row], sources: Sequence[TensorFolder], abstract: Any, partial: bool = False, surplus: Surplus = no_surplus
) -> Match:
    """Checks names, shapes and dtypes without reading values. Raises one UserError that lists every offender."""
    matcher = _Matcher(sources, {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]})
    for row in rows:
        if row.same_as:
            matcher.compare(row)
        elif not matcher.place(row) and not (partial or row.shared):
            matcher.problems.append(f"{row.theirs}: the model has no parameter {'/'.join(row.ours)}")
    ignored = matcher.leftovers({name for row in rows for name in row.names()}, surplus)
    problems = list(dict.fromkeys(matcher.problems))
    if problems:
        head = f"{matcher.folders}: {len(problems)} tensor{'s do' if problems[1:] else ' does'} not fit the model: "
        raise UserError(head + "".join(f"\n  {p}" if problems[1:] else p for p in problems))
    return Match(matcher.filled, frozenset(matcher.stacked), ignored)


class _Matcher:
    """Collects what fills what, and everything that is wrong, so that it is all told at once."""

    def __init__(self, sources: Sequence[TensorFolder], leaves: dict[Path, Any]):
        self.leaves = leaves
        self.sources = [(source, canonical_names(source.names(), source.path, source.role)) for source in sources]
        self.tensors = {key: (source, name) for source, names in self.sources for key, name in names.items()}
        self.folders = " and ".join(source.path for source in sources)
        self.filled: dict[Path, list[Piece]] = {}
        self.stacked: set[Path] = set()
        self.problems: list[str] = []

    def place(self, row: Row) -> bool:
        """Finds the tensors for a row's parameters. False: the tree has none of them."""
        places, stacked = _places(row, self.leaves)
        if not any(path in self.leaves for path, _ in places):
            return False
        for path, names in places:
            if path not in self.leaves:
                self.problems.append(f"{names[0]}: the model has no parameter {'/'.join(path)}")
                continue
            leaf = self.leaves[path]
            if stacked:
                self.stacked.add(path)
                if leaf.shape[0] != row.layers:
                    self.problems.append(f"{'/'.join(path)}: has {leaf.shape[0]} layers, config.json {row.layers}")
            shape = leaf.shape[1:] if stacked else leaf.shape
            pieces = [self.piece(name, row.transform, shape, leaf.dtype) for name in names]
            self.filled[path] = [piece for piece in pieces if piece is not None]
        return True

    def piece(self, name: str, transform: Transform, shape: tuple[int, ...], dtype: Any) -> Piece | None:
        if name not in self.tensors:
            self.problems.append(f"{name} is missing (shape {transform.wanted(shape)})")
            return None
        source, found = self.tensors[name]
        where, found_shape, found_dtype = source.where(found), source.shape(found), source.dtype(found)
        if not transform.fits(found_shape, shape):
            self.problems.append(f"{where}: has shape {list(found_shape)}, the model needs {transform.wanted(shape)}")
        elif jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(found_dtype, jnp.floating):
            self.problems.append(f"{where}: holds {found_dtype}, not floating-point numbers (quantised weights?)")
        return Piece(source.arrays[found], where, transform)

    def compare(self, row: Row) -> None:
        """A tensor that must equal another of its folder, if it is there; a few thousand rows at a time."""
        for source, names in self.sources:
            if row.theirs not in names or row.same_as not in names:
                continue
            one, two = (source.arrays[names[key]] for key in (row.theirs, row.same_as))
            pieces = (slice(i, i + _COMPARED_ROWS) for i in range(0, len(one), _COMPARED_ROWS))
            if one.shape != two.shape or not all(np.array_equal(one[rows], two[rows]) for rows in pieces):
                where = source.where(names[row.theirs])
                self.problems.append(f"{where}: differs from {row.same_as}, though config.json ties them (tie_word_embeddings)")

    def leftovers(self, claimed: set[str], surplus: Surplus) -> dict[str, str]:
        """Our parameters and their tensors that nothing has claimed; returns those that may be ignored."""
        unfilled = [path for path in self.leaves if path not in self.filled]
        self.problems += [f"{'/'.join(path)}: no tensor fills this parameter" for path in unfilled]
        ignored = {}
        for key, (source, name) in self.tensors.items():
            if key in claimed:
                continue
            if reason := ignored_reason(key) or surplus(key):
                ignored[key] = reason
            else:
                self.problems.append(f"{source.where(name)}: the model has no place for it")
        return ignored


def _path(keys: Iterable[Any]) -> Path:
    """A pytree path as texts, whether layers are keys of a dict or places in a list."""
    return tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys)


def _places(row: Row, leaves: Mapping[Path, Any]) -> tuple[list[tuple[Path, list[str]]], bool]:
    """Our paths for a row, each with their names, and whether it is one array for all layers."""
    if not row.layers:
        return [(row.ours, row.names())], False
    split = [tuple(str(i) if part == LAYER else part for part in row.ours) for i in range(row.layers)]
    if any(path in leaves for path in split):
        return [(path, [name]) for path, name in zip(split, row.names(), strict=True)], False
    return [(tuple(part for part in row.ours if part != LAYER), row.names())], True


def _read_leaf(path: Path, leaf: Any, match: Match) -> jax.Array:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole = sharding.shard_shape(leaf.shape)
    row_bytes = math.prod(whole[1:]) * leaf.dtype.itemsize * len(sharding.addressable_devices)
    at_once = max(1, _PIECE_BYTES // max(row_bytes, 1))
    if whole[:1] == leaf.shape[:1] and at_once < math.prod(leaf.shape[:1]):
        return _read_rows(path, leaf, sharding, match, at_once)
    return _placed(path, leaf, leaf.shape, sharding, match, 0)


def _read_rows(path: Path, leaf: Any, sharding: jax.sharding.Sharding, match: Match, at_once: int) -> jax.Array:
    """A parameter, `at_once` rows (or layers) at a time into an array that lies on its devices from the start."""
    array = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    put = jax.jit(
        lambda whole, part, first: jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0),
        out_shardings=sharding,
        donate_argnums=0,
    )
    for first in range(0, leaf.shape[0], at_once):
        shape = (min(at_once, leaf.shape[0] - first), *leaf.shape[1:])
        part = _placed(path, leaf, shape, sharding, match, first)
        array = put(array, part, first).block_until_ready()
        part.delete()
    return array


def _placed(
    path: Path, leaf: Any, shape: tuple[int, ...], sharding: jax.sharding.Sharding, match: Match, first: int
) -> jax.Array:
    """A parameter on its devices, or `shape` of its rows from `first` on."""
    read: dict[Any, np.ndarray] = {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in read:  # copies of a shard on several devices are read once
            moved = [slice(start + (0 if i else first), stop + (0 if i else first)) for i, (start, stop) in enumerate(bounds)]
            read[bounds] = read_slice(match.filled[path], leaf.shape, leaf.dtype, tuple(moved), path in match.stacked)
        return read[bounds]

    array = jax.make_array_from_callback(shape, sharding, piece, dtype=leaf.dtype)
    return array.block_until_ready()  # or the next parameters pile up in host memory


def read_slice(
    pieces: Sequence[Piece], shape: tuple[int, ...], dtype: Any, index: tuple[slice, ...], stacked: bool
) -> np.ndarray:
    """`index` of a parameter, in its dtype: a copy that shares no memory with the file."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], dtype)
    slices = tuple(slice(*b) for b in bounds)
    if not stacked:
        _fill(out, pieces[0], shape, slices)
        return out
    for i, layer in enumerate(range(*bounds[0])):
        _fill(out[i, ...], pieces[layer], shape[1:], slices[1:])
    return out


def _fill(out: np.ndarray, piece: Piece, shape: tuple[int, ...], index: tuple[slice, ...]) -> None:
    """A transform may make an array of its own, so large ones are filled some rows at a time."""
    rows = max(1, _PIECE_BYTES // 4 // max(out[:1].nbytes, 1)) if out.ndim else 0
    if not out.ndim or rows >= len(out):
        out[...] = piece.transform.read(piece.theirs, shape, index)
        release(piece.theirs)
    else:
        start = index[0].indices(shape[0])[0]
        for i in range(0, len(out), rows):
            stop = min(i + rows, len(out))
            out[i:stop] = piece.transform.read(piece.theirs, shape, (slice(start + i, start + stop), *index[1:]))
            release(piece.theirs)
    if not is_finite(out):
        raise UserError(
            f"{piece.where}: holds NaN or infinite values; download the file again, or go back to an earlier checkpoint"
        )


def export_names(tree: Any, experiment: Experiment) -> dict[str, np.ndarray]:
    """{upstream's tensor name: float32 array} of a tree with our parameters' paths: the trainable half, or its gradients.

    With LoRA the names are PEFT's, without `.default`. Rows of added tokens alone (`embed/added` without the table) have no
    name upstream and are left out.
    """
    return named_arrays(tree, experiment_rows(experiment), PEFT_PREFIX if experiment.lora.rank else "")


def named_arrays(tree: Any, rows: Sequence[Row], prefix: str = "") -> dict[str, np.ndarray]:
    """{`prefix` and canonical name: float32 array} of a tree with our parameters' paths."""
    leaves = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    named: dict[str, np.ndarray] = {}
    used = set()
    for row in rows:
        places, stacked = _places(row, leaves)
        for path, names in places:
            if path not in leaves:
                continue
            used.add(path)
            array = np.asarray(jax.device_get(leaves[path])).astype(np.float32)
            for name, ours in zip(names, array if stacked else [array], strict=True):
                theirs = row.transform.write(ours, named.get(prefix + name))
                if theirs is not None:
                    named[prefix + name] = theirs
    lost = [path for path in leaves if path not in used]
    if lost:
        raise ValueError(f"no row of the table for {', '.join('/'.join(path) for path in lost)}")
    return named
