"""From our parameters to folders that others read: `hf` (merged), `peft` (adapter), `llava` (upstream's LoRA layout).

First a plan: every tensor of theirs with its shape, dtype, our path and the rule, from the same rows of the table that read
them, and what is left out and why; no value is read for it. Then the folder, written under a temporary name, tensor by tensor,
and renamed when it is complete.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from jaxmed.checkpoint import export_config
from jaxmed.checkpoint.decoder_tables import EMBED, decoder_rows, lora_rows
from jaxmed.checkpoint.load import Path
from jaxmed.checkpoint.names import PEFT_PREFIX
from jaxmed.checkpoint.projector_tables import projector_rows
from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.checkpoint.tensor_files import Tensor, cast
from jaxmed.checkpoint.values import Values
from jaxmed.config import Experiment
from jaxmed.errors import UserError
from jaxmed.nn.block import adapter_paths
from jaxmed.nn.linear import Adapter, merged_weight

Format = Literal["orbax", "hf", "peft", "llava", "lamed", "samf"]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
MODEL = "model.safetensors"
"""Written as shards with an index where it is larger than one"""
TABLE, ADDED = ("decoder", "embed", "table"), ("decoder", "embed", "added")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an export will write."""

    experiment: Experiment
    """Of what is written"""
    to: Format
    files: dict[str, list[Tensor]]
    documents: dict[str, dict[str, Any]]
    """JSON files"""
    tokenizer: bool
    """Whether the tokenizer goes along"""
    ignored: dict[str, str]
    """What the source holds and the export leaves out, with the reason"""
    notes: list[str]
    source: Experiment
    """Where the values are"""

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensors in self.files.values() for tensor in tensors]


def plan_export(experiment: Experiment, to: Format, dtype: str = "") -> Plan:
    """`dtype` "": as the source has it (`hf`: as the base has it, tensor by tensor). UserError where a format can't hold it."""
    values = Values(experiment)
    planner = _Planner(values, DTYPES[dtype] if dtype else None)
    return {"hf": _plan_hf, "peft": _plan_peft, "llava": _plan_llava}[to](values, planner)


class _Planner:
    """Rows of the table -> tensors to write."""

    def __init__(self, values: Values, dtype: np.dtype | None):
        lora = values.experiment.lora
        self.values, self.chosen, self.adapter = values, dtype, Adapter(lora.rank, lora.alpha)

    def tensors(self, rows: Sequence[Row], prefix: str, merge: bool = False) -> list[Tensor]:
        """Layer after layer of one parameter, so that each array of a checkpoint is read once."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.ours:
                groups.setdefault(row.theirs, []).append(row)
        lost = ["/".join(_stacked(row)) for group in groups.values() for row in group if not self.values.stored(_stacked(row))]
        if lost:
            raise UserError(f"{', '.join(lost[:5])}: no folder of this model holds them; give the base (--base)")
        return [
            self._tensor(group, layer, shape, prefix, merge)
            for group in groups.values()
            for shape in [self._shape(group)]
            for layer in range(max(group[0].layers, 1))
        ]

    def _tensor(self, group: list[Row], layer: int, shape: tuple[int, ...], prefix: str, merge: bool) -> Tensor:
        values, paths = self.values, [_stacked(row) for row in group]
        name = group[0].theirs.replace(LAYER, str(layer))
        adapters = [adapter_paths(path, values.shapes) if merge else None for path in paths]
        adapters = [pair if pair and values.stored(pair[1]) else None for pair in adapters]
        used = [*paths, *(path for pair in adapters if pair for path in pair)]
        rule = " + ".join(repr(row.transform) for row in group)
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
            return theirs

        return Tensor(
            prefix + name,
            shape,
            dtype,
            make,
            "/".join(paths[0]),
            rule,
            tuple(dict.fromkeys(values.source(path, layer) for path in used)),
        )

    def _shape(self, group: list[Row]) -> tuple[int, ...]:
        """Of theirs, from arrays that take little memory; rows that are laid over others change no shape."""
        theirs = None
        for row in group:
            if not row.shared:
                theirs = row.transform.write(np.broadcast_to(np.uint8(0), self.values.shape(_stacked(row))), theirs)
        return theirs.shape

    def _dtype(self, name: str, paths: list[Path], layer: int, merge: bool) -> np.dtype:
        if self.chosen is not None:
            return self.chosen
        if merge and name in self.values.base_dtypes:
            return self.values.base_dtypes[name]
        return max((self.values.dtype(path, layer) for path in paths), key=lambda dtype: dtype.itemsize)


def _merge(weight: np.ndarray, a: np.ndarray, b: np.ndarray, adapter: Adapter) -> np.ndarray:
    """The merged weight in float32; on an accelerator products would round without being told not to."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(merged_weight(weight.astype(np.float32), a, b, adapter.scale))


def _stacked(row: Row) -> Path:
    return tuple(part for part in row.ours if part != LAYER)


def _plan_hf(values: Values, planner: _Planner) -> Plan:
    experiment = values.experiment
    added = len(experiment.model.added_tokens)
    files = {MODEL: planner.tensors(decoder_rows(experiment.model.decoder, added), "", merge=True)}
    notes = _projector_beside(values, planner, files)
    dtype = next(tensor.dtype for tensor in files[MODEL] if tensor.name == EMBED)
    documents = export_config.hf_documents(experiment, dtype.name)
    return Plan(experiment, "hf", files, documents, True, values.ignored | _optimizer(values), notes, experiment)


def _projector_beside(values: Values, planner: _Planner, files: dict[str, list[Tensor]]) -> list[str]:
    rows = _projector(values)
    if not rows:
        return []
    files["mm_projector.safetensors"] = planner.tensors(rows, "")
    return ["the projector has no place in this layout; it stands beside it in mm_projector.safetensors"]


def _plan_peft(values: Values, planner: _Planner) -> Plan:
    experiment = values.experiment
    _check_adapter(values, "peft")
    rows = _lora(values)
    if not rows:
        raise UserError(f"{experiment.model.adapter or experiment.model.base}: has no LoRA adapter for --to peft; try --to hf")
    ignored = values.ignored | _optimizer(values)
    if _table_trained(values):
        # PEFT loads it over the base's table, which has no rows for added tokens
        rows += [row for row in decoder_rows(experiment.model.decoder, 0) if row.theirs == EMBED]
    if experiment.model.added_tokens:
        reason = "rows of added tokens, which the base lacks; --to hf or --to llava keeps them"
        ignored["/".join(ADDED)] = reason
    files = {"adapter_model.safetensors": planner.tensors(rows, PEFT_PREFIX)}
    notes = _projector_beside(values, planner, files)
    documents = {"adapter_config.json": export_config.adapter_config(experiment, values.upstream)}
    return Plan(experiment, "peft", files, documents, False, ignored, notes, experiment)


def _plan_llava(values: Values, planner: _Planner) -> Plan:
    experiment = values.experiment
    _check_adapter(values, "llava")
    lora, projector = _lora(values), _projector(values)
    if not projector:
        raise UserError(f"{experiment.model.adapter or experiment.model.base}: has no projector for --to llava; try peft or hf")
    table = _table_trained(values) or values.trained_by(ADDED) is not None
    documents = {"config.json": export_config.llava_config(experiment, values.upstream)}
    notes = []
    if not lora:
        if table:
            raise UserError("rows of added tokens were trained without LoRA, for which upstream has no layout; give --to hf")
        files = {"mm_projector.bin": planner.tensors(projector, "")}
        notes.append("there is no adapter: this is upstream's alignment stage, mm_projector.bin and config.json")
        return Plan(experiment, "llava", files, documents, True, values.ignored | _optimizer(values), notes, experiment)
    rest = list(projector)
    if table:
        whole = decoder_rows(experiment.model.decoder, len(experiment.model.added_tokens))
        rest = [row for row in whole if row.theirs == EMBED] + rest
        notes.append("embed_tokens is in non_lora_trainables.bin (its rows were trained); upstream's own loader rejects that")
    if experiment.visual.norm or experiment.visual.positions:
        notes.append("statistics and position table of the visual input are ours; upstream's own loader has no place for them")
    files = {"adapter_model.safetensors": planner.tensors(lora, PEFT_PREFIX)}
    files["non_lora_trainables.bin"] = planner.tensors(rest, PEFT_PREFIX)
    documents["adapter_config.json"] = export_config.adapter_config(experiment, values.upstream)
    return Plan(experiment, "llava", files, documents, True, values.ignored | _optimizer(values), notes, experiment)


def _check_adapter(values: Values, to: str) -> None:
    """An adapter folder holds no other weights of the language model than LoRA and the embedding table."""
    if not values.experiment.model.base:
        raise UserError(
            f"{values.experiment.model.adapter}: has no base model, so --to {to} has nothing to adapt; give --to hf"
        )
    others = [
        name
        for trained in values.runs
        for name in trained.shapes
        if name.startswith("decoder/") and not name.endswith(("/lora_a", "/lora_b", *map("/".join, (TABLE, ADDED))))
    ]
    if others:
        raise UserError(f"{values.runs[0].run}: trained the language model itself ({others[0]}, ...); give --to hf")


def _lora(values: Values) -> list[Row]:
    """None where the adapters were never trained: their B is zero."""
    rows = lora_rows(values.experiment.lora, values.experiment.model.decoder)
    return rows if rows and values.stored(_stacked(rows[0])) else []


def _projector(values: Values) -> list[Row]:
    rows = projector_rows(values.experiment.visual, values.experiment.model.projector)
    return rows if rows and values.stored(_stacked(rows[0])) else []


def _table_trained(values: Values) -> bool:
    return values.trained_by(TABLE) is not None or EMBED in values.upstream_names


def _optimizer(values: Values) -> dict[str, str]:
    return {f"{trained.run}: optimizer state": "an export holds weights alone" for trained in values.runs}
