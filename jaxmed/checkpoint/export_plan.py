"""What an export will write, and how rows of the conversion table become tensors of a file.

A plan is made without reading a value: every tensor of theirs with its shape, dtype, our path and the rule, from the same rows
of the table that read them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxmed.checkpoint.decoder_tables import EMBED, lora_rows
from jaxmed.checkpoint.load import Path
from jaxmed.checkpoint.names import PEFT_PREFIX
from jaxmed.checkpoint.projector_tables import projector_rows
from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.checkpoint.tensor_files import Tensor, cast
from jaxmed.checkpoint.transforms import mean_row
from jaxmed.checkpoint.values import Parameters, Values
from jaxmed.config import LoraConfig, MeshConfig
from jaxmed.errors import UserError
from jaxmed.nn.block import adapter_paths
from jaxmed.nn.linear import Adapter, merged_weight

Format = Literal["orbax", "hf", "peft", "llava", "lamed", "samf"]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
MODEL = "model.safetensors"
"""Written as shards with an index where it is larger than one"""
TABLE, ADDED = ("decoder", "embed", "table"), ("decoder", "embed", "added")


class Native(Protocol):
    """How a folder of our own form is made, by all processes together."""

    config: str
    """config.json"""
    meta: dict[str, Any]
    """What `manager.read_meta` will find"""

    def mesh(self, asked: MeshConfig) -> Mesh: ...

    def values(self, mesh: Mesh) -> dict[str, jax.Array]:
        """{path as text: array on the mesh}; the mesh is entered."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an export will write."""

    to: Format
    files: dict[str, list[Tensor]]
    documents: dict[str, dict[str, Any]]
    """JSON files"""
    ignored: dict[str, str]
    """What the source holds and the export leaves out, with the reason"""
    notes: list[str]
    texts: dict[str, str] = dataclasses.field(default_factory=dict, kw_only=True)
    """Other files, by name"""
    native: Native | None = dataclasses.field(default=None, kw_only=True)
    """With `orbax`, whose `files` are not written as files"""

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensors in self.files.values() for tensor in tensors]

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Path of ours as text -> dtype in which it is written."""
        return {name.partition("[")[0]: tensor.dtype for tensor in self.tensors for name in (tensor.ours, *tensor.also)}

    def about(self) -> dict[str, Any]:
        """Lines of the manifest that only this kind of model has."""
        return {}

    def settings(self) -> list[str]:
        """Folders whose config files were read."""
        return []

    def write_beside(self, folder: str) -> str:
        """What is no tensor and no JSON, such as a tokenizer; returns what the person should know, "" for nothing."""
        return ""


class Planner:
    """Rows of the table -> tensors to write."""

    def __init__(self, values: Parameters, dtype: np.dtype | None, lora: LoraConfig):
        self.values, self.chosen, self.adapter = values, dtype, Adapter(lora.rank, lora.alpha)

    def tensors(
        self, rows: Sequence[Row], name: Callable[[str], str], merge: bool = False, longer: Mapping[str, int] | None = None
    ) -> list[Tensor]:
        """Layer after layer of one parameter, so that each array of a checkpoint is read once.

        `name`: canonical name -> the one in the file. `longer`: rows that a table (by canonical name) gets after its own.
        """
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.ours:
                groups.setdefault(row.theirs, []).append(row)
        lost = [
            "/".join(stacked_path(row))
            for group in groups.values()
            for row in group
            if not self.values.stored(stacked_path(row))
        ]
        if lost:
            raise UserError(f"{', '.join(lost[:5])}: no folder of this model holds them; give the base (--base)")
        return [
            self._tensor(group, layer, shape, name, merge, (longer or {}).get(group[0].theirs, 0))
            for group in groups.values()
            for shape in [self._shape(group)]
            for layer in range(max(group[0].layers, 1))
        ]

    def _tensor(
        self, group: list[Row], layer: int, shape: tuple[int, ...], named: Callable[[str], str], merge: bool, longer: int
    ) -> Tensor:
        values, paths = self.values, [stacked_path(row) for row in group]
        name = group[0].theirs.replace(LAYER, str(layer))
        shape = (shape[0] + longer, *shape[1:]) if longer else shape
        adapters = [adapter_paths(path, values.shapes) if merge else None for path in paths]
        adapters = [pair if pair and values.stored(pair[1]) else None for pair in adapters]
        used = [*paths, *(path for pair in adapters if pair for path in pair)]
        rule = " + ".join(repr(row.transform) for row in group)
        if longer:
            rule += f" + {longer} rows of their mean"
        if any(adapters):
            rule += f" + merged LoRA, {self.adapter.alpha:g} / {self.adapter.rank} * B A in float32"

        dtype = self._dtype(name, paths, layer, merge)

        def make() -> np.ndarray:
            theirs = None
            for row, path, pair in zip(group, paths, adapters, strict=True):
                ours = values.read(path, layer)
                if pair:
                    ours = _merge(ours, *(values.read(half, layer) for half in pair), self.adapter)
                if len(group) > 1:  # or joining two dtypes takes a wider array
                    ours = cast(ours, dtype)
                theirs = row.transform.write(ours, theirs)
            return _lengthened(theirs, longer) if longer else theirs

        return Tensor(
            named(name),
            shape,
            dtype,
            make,
            "/".join(paths[0]),
            rule,
            tuple(dict.fromkeys(values.source(path, layer) for path in used)),
            tuple("/".join(path) for path in paths[1:]),
        )

    def _shape(self, group: list[Row]) -> tuple[int, ...]:
        """Of theirs, from arrays that take little memory; rows that are laid over others change no shape."""
        theirs = None
        for row in group:
            if not row.shared:
                theirs = row.transform.write(np.broadcast_to(np.uint8(0), self.values.shape(stacked_path(row))), theirs)
        return theirs.shape

    def _dtype(self, name: str, paths: list[Path], layer: int, merge: bool) -> np.dtype:
        if self.chosen is not None:
            return self.chosen
        if merge and name in self.values.base_dtypes:
            return self.values.base_dtypes[name]
        return max((self.values.dtype(path, layer) for path in paths), key=lambda dtype: dtype.itemsize)


def _lengthened(rows: np.ndarray, count: int) -> np.ndarray:
    """A table with the mean of its rows `count` times after them: in a head they can never win over the best of the others."""
    whole = np.empty((len(rows) + count, *rows.shape[1:]), rows.dtype)
    whole[: len(rows)] = rows
    whole[len(rows) :] = mean_row(rows)
    return whole


def _merge(weight: np.ndarray, a: np.ndarray, b: np.ndarray, adapter: Adapter) -> np.ndarray:
    """The merged weight in float32; on an accelerator products would round without being told not to."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(merged_weight(weight.astype(np.float32), a, b, adapter.scale))


def peft_name(name: str) -> str:
    """As PEFT saves an adapter."""
    return PEFT_PREFIX + name


def stacked_path(row: Row) -> Path:
    return tuple(part for part in row.ours if part != LAYER)


def adapter_rows(values: Values) -> list[Row]:
    """None where the adapters were never trained: their B is zero."""
    rows = lora_rows(values.experiment.lora, values.experiment.model.decoder)
    return rows if rows and values.stored(stacked_path(rows[0])) else []


def stored_projector(values: Values) -> list[Row]:
    rows = projector_rows(values.experiment.visual, values.experiment.model.projector)
    return rows if rows and values.stored(stacked_path(rows[0])) else []


def table_trained(values: Values) -> bool:
    return values.trained_by(TABLE) is not None or EMBED in values.upstream_names


def optimizer_state(values: Values) -> dict[str, str]:
    return {f"{trained.run}: optimizer state": "an export holds weights alone" for trained in values.runs}
