"""Parts of a model that stand alone: an image tower, a pair of encoders (M3D-CLIP), a projector.

A part is known by rows of the conversion table and a module that they fill. Its values are in a folder that others wrote, or in
a checkpoint of ours: a run that trained it, or what `jaxmed convert --to orbax` made. Then config.json is a `PartConfig`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.sources import WeightSources
from jaxmed.checkpoint.values import Parameters, module_shapes, read_trained
from jaxmed.config import (
    AggregatorConfig,
    FusionConfig,
    MeshConfig,
    ProjectorConfig,
    TowerConfig,
    VisualConfig,
    from_dict,
)
from jaxmed.errors import UserError
from jaxmed.sharding import Rules, state_specs, to_shardings, tower_axis

PartKind = Literal["tower", "m3d_clip", "projector"]
KIND_NAMES: dict[PartKind, str] = {"tower": "an image tower", "m3d_clip": "M3D-CLIP", "projector": "a projector"}


@dataclass(frozen=True)
class PartConfig:
    """config.json of a folder of our own form that holds a part of a model. (M3D-CLIP's is a run's.)"""

    part: Literal["tower", "projector"]
    visual: VisualConfig
    """How files become the tower's input; what the projector reads"""
    tower: TowerConfig = field(default_factory=TowerConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    width: int = 0
    """What a projector projects to"""


@dataclass(frozen=True, kw_only=True)
class PartFolder:
    path: str
    kind: PartKind
    sources: WeightSources
    """The table's rows, and the files that others wrote (none in a folder of ours)"""
    visual: VisualConfig
    run: str = ""
    """The folder of ours that holds the values, "" where files do"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """config.json as others wrote it"""
    tokenizer: str = ""
    """Folder of the text encoder's tokenizer"""

    def build(self) -> nnx.Module:
        """Structure alone, under `jax.eval_shape`."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that may be split over fsdp."""
        raise NotImplementedError

    @property
    def native_config(self) -> tuple[str, dict[str, Any]]:
        """config.json of our own form, and the lines of a checkpoint's `meta` that repeat it."""
        raise NotImplementedError

    def check_divisible(self, mesh: MeshConfig) -> None:
        """UserError where a mesh cannot split the part; an encoder that it does not divide lies on every device instead."""

    def rules(self, mesh: Mesh) -> Rules:
        return Rules(tower=tower_axis(self.widths, mesh.shape["fsdp"]))

    def parameters(self) -> Parameters:
        """Matched, not read."""
        return Parameters(module_shapes(self.build), self.sources, [read_trained(self.run)] if self.run else [])

    def place(self, mesh: Mesh, dtypes: Mapping[str, np.dtype] | np.dtype) -> tuple[nnx.GraphDef, Any]:
        """Structure, and a nested dict of arrays on the mesh (which is entered). `dtypes`: one, or {path as text: dtype}."""
        graphdef, state = nnx.split(jax.eval_shape(self.build))
        shardings = to_shardings(state_specs(state, self.rules(mesh)), mesh)
        leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
        names = ["/".join(str(key.key) for key in keys) for keys, _ in leaves]
        wanted = [
            jax.ShapeDtypeStruct(leaf.shape, dtypes[name] if isinstance(dtypes, Mapping) else dtypes, sharding=sharding)
            for name, (_, leaf), sharding in zip(names, leaves, jax.tree.leaves(shardings), strict=True)
        ]
        if not self.run:
            tree = structure.unflatten(wanted)
            return graphdef, read_params(self.sources.rows, self.sources.folders, tree, False, self.sources.surplus)
        self.parameters()  # refuses another model's arrays
        found = manager.restore_part(self.run, manager.newest(self.run), dict(zip(names, wanted, strict=True)))
        return graphdef, structure.unflatten([found[name] for name in names])


def read_part_config(folder: str) -> PartConfig:
    where = os.path.join(folder, "config.json")
    try:
        with open(where, encoding="utf-8") as file:
            return from_dict(PartConfig, json.load(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read as the config of a part of a model ({error})") from error
