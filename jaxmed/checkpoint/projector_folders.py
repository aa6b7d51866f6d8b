"""A projector by itself: `mm_projector.bin` of LLaVA's, M3D's and SAMF's alignment stages, or our own form of it.

What is beside it (the embedding table, in M3D's) is a language model's. config.json says the kind where there is one, else the
names and shapes of the tensors do.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxmed.checkpoint.decoder_tables import EMBED
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.folder_parts import json_of
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.names import canonical_names
from jaxmed.checkpoint.part_folders import PartConfig, PartFolder, read_part_config
from jaxmed.checkpoint.projector_tables import (
    FUSION,
    PROJECTOR,
    SLICE_POSITIONS,
    Shapes,
    aggregator_from,
    fusion_from,
    part_rows,
    projector_from,
)
from jaxmed.checkpoint.sources import WeightSources, part_of
from jaxmed.config import AggregatorConfig, FusionConfig, MeshConfig, ProjectorConfig, VisualConfig, to_dict, to_json
from jaxmed.distributed import say
from jaxmed.errors import UserError
from jaxmed.models.aggregator import Aggregator
from jaxmed.models.fusion import Fusion
from jaxmed.models.projector import Projector
from jaxmed.sharding import Rules

Family = Literal["llava", "lamed", "samf"]

TABLE_BESIDE = "the embedding table of the language model, which is no part of the projector; --model.adapter reads SRC with it"
_M3D_GRID = (8, 16, 16)
"""Patches of M3D's published tower, where no config says others"""


class Bridge(nnx.Module):
    """Gives a projector, or SAMF's aggregator and fusion, the paths that the table has for them."""

    def __init__(self, folder: "ProjectorFolder"):
        key = jax.random.key(0)
        if folder.projector.kind != "aggregator":
            self.projector = Projector(folder.projector, folder.visual, folder.width, key)
            return
        self.aggregator = Aggregator(folder.aggregator, folder.visual.features, folder.visual.slices, key)
        if folder.fusion.kind != "none":
            widths = (folder.aggregator.features, folder.visual.features, folder.width)
            self.fusion = Fusion(folder.fusion, *widths, key)


@dataclass(frozen=True, kw_only=True)
class ProjectorFolder(PartFolder):
    projector: ProjectorConfig
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    width: int
    """What it projects to"""

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width, self.fusion.width) if self.fusion.kind != "none" else (self.width,)

    def check_divisible(self, mesh: MeshConfig) -> None:
        wrong = [width for width in self.widths if width % mesh.fsdp]
        if wrong:
            raise UserError(f"--mesh.fsdp {mesh.fsdp} does not divide the projector's width {wrong[0]}; give another, or none")

    def rules(self, mesh: Mesh) -> Rules:
        """The aggregator lies on every device."""
        return Rules(tower=())

    @property
    def family(self) -> Family:
        """Whose code has such a projector."""
        if self.projector.kind == "aggregator":
            return "samf"
        return "lamed" if self.visual.kind == "volumes" else "llava"

    def build(self) -> nnx.Module:
        return Bridge(self)

    @property
    def native_config(self) -> tuple[str, dict[str, Any]]:
        parts = (self.projector, self.aggregator, self.fusion)
        config = PartConfig(
            "projector", self.visual, projector=parts[0], aggregator=parts[1], fusion=parts[2], width=self.width
        )
        return to_json(config), {"config": to_dict(config), "encoder": self.visual.encoder}


def open_projector(path: str, overrides: Mapping[str, Any]) -> ProjectorFolder:
    """A folder with mm_projector.bin, that file itself, or our own form. Assumptions are told on stderr."""
    unknown = sorted(set(overrides) - {"aggregator.heads"})
    if unknown:
        raise UserError(f"{path}: holds a projector alone, {', '.join(unknown)} cannot be set; known is aggregator.heads")
    if detect(path) == "part":
        return _own(path)
    tensors = open_folder(path)
    names = canonical_names(tensors.names(), path)
    shapes = {key: tensors.shape(name) for key, name in names.items()}
    settings = json_of(path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path)))
    where = os.path.join(tensors.path, "config.json") if settings else tensors.where(tensors.names()[0]).rsplit(": ", 1)[0]
    projector, volumes = _kind(settings, shapes, where)
    aggregator, fusion = AggregatorConfig(), FusionConfig()
    if projector.kind == "aggregator":
        heads = overrides.get("aggregator.heads", 0)
        aggregator = aggregator_from(shapes, where)
        if str(heads).isdecimal() and int(heads):
            aggregator = replace(aggregator, heads=int(heads))
        else:
            say(f"{path}: no file says the aggregator's heads; the published {aggregator.heads} are assumed")
        if any(name.startswith(FUSION) for name in shapes):
            fusion = fusion_from({"mm_fuse_type": settings.get("mm_fuse_type")}, shapes, where)
    visual, width = _sizes(projector, fusion, shapes, settings, volumes, where)
    rows = part_rows(visual, projector, aggregator, fusion)
    return ProjectorFolder(
        path=path,
        kind="projector",
        sources=WeightSources(rows, [tensors], frozenset(part_of(row.ours) for row in rows), _surplus),
        visual=visual,
        settings=settings,
        projector=projector,
        aggregator=aggregator,
        fusion=fusion,
        width=width,
    )


def _own(path: str) -> ProjectorFolder:
    config = read_part_config(path)
    if config.part != "projector":
        raise UserError(f"{path}: holds a {config.part} and no projector; give it as --model.tower-folder")
    rows = part_rows(config.visual, config.projector, config.aggregator, config.fusion)
    return ProjectorFolder(
        path=path,
        kind="projector",
        sources=WeightSources(rows, [], frozenset(), _surplus),
        visual=config.visual,
        run=path,
        projector=config.projector,
        aggregator=config.aggregator,
        fusion=config.fusion,
        width=config.width,
    )


def _surplus(name: str) -> str:
    return TABLE_BESIDE if name == EMBED else ""


def _kind(settings: Mapping[str, Any], shapes: Shapes, where: str) -> tuple[ProjectorConfig, bool]:
    """(the projector, whether it is one of M3D's over volumes)."""
    stems = {name.removeprefix(PROJECTOR).rsplit(".", 1)[0] for name in shapes if name.startswith(PROJECTOR)}
    heads, said = {stem.partition(".")[0] for stem in stems}, settings.get("mm_projector_type", "")
    if heads & {"attn_pool", "proj"}:
        query = shapes.get(f"{PROJECTOR}attn_pool.query")
        kind = said or f"attn_pool+{_plain(stems, 'proj.')}"
        return ProjectorConfig(kind=kind, bypass_pool=query is None, pool_queries=query[0] if query else 256), False
    if heads & {"projector", "linear", "cls_token"}:
        guessed = {} if said or "linear" not in heads else {"mm_projector_type": "linear"}
        if guessed:
            say(f"{where}: a matrix `linear` is M3D's `linear`, `minigpt` or `vanilla`; taken for `linear`")
        return projector_from({**settings, **guessed}, shapes, where), "cls_token" not in heads
    return ProjectorConfig(kind=said or _plain(stems, "")), False


def _plain(stems: set[str], before: str) -> str:
    """`mlpNx_gelu` for layers that are numbered 0, 2, ..., else `linear`."""
    count = 0
    while f"{before}{2 * count}" in stems:
        count += 1
    return f"mlp{count}x_gelu" if count else "linear"


def _sizes(
    projector: ProjectorConfig, fusion: FusionConfig, shapes: Shapes, settings: Mapping[str, Any], volumes: bool, where: str
) -> tuple[VisualConfig, int]:
    """(what is read, the width it becomes), from the shapes of the first and the last matrix."""
    if projector.kind == "aggregator":
        features = shapes[f"{PROJECTOR}cls_token"][-1]
        width = (
            shapes[f"{FUSION}fusion_layer.weight"][0] if fusion.kind != "none" else shapes[f"{PROJECTOR}volume_proj.weight"][0]
        )
        slices = shapes.get(SLICE_POSITIONS, (VisualConfig().slices,))[0]
        return VisualConfig(kind="slices", features=features, slices=slices, tokens=slices, grid=(slices, 1, 1)), width
    probe = VisualConfig(kind="volumes" if volumes else "embeddings", features=1)
    matrices = [
        row.theirs for row in part_rows(probe, projector, AggregatorConfig(), FusionConfig()) if row.theirs.endswith(".weight")
    ]
    layers = [name for name in matrices if ".attn_pool." not in name and not name.startswith(f"{PROJECTOR}ln.")]
    lost = [name for name in layers if name not in shapes]
    if lost or not layers:
        held = ", ".join(sorted(name for name in shapes if name.startswith(PROJECTOR))[:6])
        raise UserError(f"{where}: a projector {projector.kind} has {', '.join(lost) or 'no tensors'}; the file holds {held}")
    features = shapes[layers[0]][-1] // (4 if projector.kind in ("minigpt", "vanilla") else 1)
    visual = VisualConfig(kind="volumes" if volumes else "embeddings", features=features)
    if volumes:
        grid = _grid(settings)
        visual = replace(visual, grid=grid, tokens=grid[0] * grid[1] * grid[2])
    if norm := shapes.get(f"{PROJECTOR}norm_mean"):
        visual = replace(visual, norm=True, tokens=norm[0], grid=(norm[0], 1, 1))
    if positions := shapes.get(f"{PROJECTOR}positions"):
        visual = replace(visual, positions=True)
        if not projector.pooled:
            visual = replace(visual, tokens=positions[0], grid=(positions[0], 1, 1))
    return visual, shapes[layers[-1]][0]


def _grid(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    image, patch = settings.get("image_size"), settings.get("patch_size")
    if not (isinstance(image, list) and isinstance(patch, list) and len(image) == len(patch) == 3):
        return _M3D_GRID
    depth, rows, columns = (n // p for n, p in zip(image, patch, strict=True))
    return depth, rows, columns
