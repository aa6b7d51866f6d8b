"""Parameters one at a time, from wherever they are: base folder, upstream folder, runs, the later over the earlier.

What `train.init.materialise` puts on devices in one go is read here slice by slice, for exports that never hold a model whole.
Paths are those of the stacked tree: blocks have a leading L.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import chain, tower_run
from jaxmed.checkpoint.folder_kinds import is_own
from jaxmed.checkpoint.load import Path, match_params, read_slice
from jaxmed.checkpoint.sources import WeightSources, weight_sources
from jaxmed.config import Experiment, MeshConfig
from jaxmed.errors import UserError
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trainable half of a run's newest checkpoint."""

    run: str
    step: int
    leaves: dict[str, jax.ShapeDtypeStruct]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: leaf.shape for name, leaf in self.leaves.items()}

    @property
    def path(self) -> str:
        return os.path.join(self.run, manager.FOLDER, str(self.step), "trainable")


@dataclasses.dataclass(frozen=True)
class Origin:
    file: str
    """Or a checkpoint's folder; "": nothing holds the parameter"""
    name: str
    """Theirs"""
    rule: str
    whole: bool
    """Whether it is one array for all layers"""


class Parameters:
    """Parameters of whatever consists of rows of the table: a model, an encoder alone, a projector alone.

    Everything is matched when it is made (names, shapes, dtypes; all offenders at once); values are read when asked for.
    """

    def __init__(self, shapes: dict[Path, jax.ShapeDtypeStruct], sources: WeightSources, runs: Sequence[Trained]):
        self.shapes, self.runs = shapes, list(runs)
        self.ignored: dict[str, str] = {}
        """Canonical name of a tensor that the model does not compute with -> why"""
        self.surplus: dict[str, np.ndarray] = {}
        """The same names -> the tensors, views of their files"""
        self.places: dict[str, str] = {}
        """The same names -> `FILE: NAME`"""
        self.base_dtypes: dict[str, np.dtype] = {}
        """Canonical name -> dtype in the folder over which others lie"""
        self._match = None
        if sources.folders:
            wanted = {path: leaf for path, leaf in self.shapes.items() if sources.covers(path)}
            self._match = match_params(sources.rows, sources.folders, _nested(wanted), True, sources.surplus)
            self.ignored = dict(self._match.ignored)
            for folder in sources.folders:
                for key, name in sources.names(folder).items():
                    if key in self.ignored:
                        self.surplus[key], self.places[key] = folder.arrays[name], folder.where(name)
        self._check_runs()
        self._kept: tuple[str, np.ndarray] | None = None

    def _check_runs(self) -> None:
        named = {"/".join(path): leaf.shape for path, leaf in self.shapes.items()}
        for trained in self.runs:
            wrong = [f"{name} {shape}" for name, shape in trained.shapes.items() if named.get(name) != shape]
            if wrong:
                raise UserError(f"{trained.run}: holds {', '.join(wrong[:3])}, for which this model has no place")

    def trained_by(self, path: Path) -> Trained | None:
        """The newest run that trained the parameter."""
        return next((trained for trained in self.runs if "/".join(path) in trained.shapes), None)

    def stored(self, path: Path) -> bool:
        return self.trained_by(path) is not None or (self._match is not None and path in self._match.filled)

    def source(self, path: Path, layer: int) -> str:
        """The file, or the checkpoint's folder, that holds a parameter (one layer of it)."""
        return self.origin(path, layer).file

    def origin(self, path: Path, layer: int) -> "Origin":
        """Where a parameter (one layer of it) comes from, for the table; a run holds all layers in one array."""
        if trained := self.trained_by(path):
            return Origin(trained.path, "/".join(path), "Identity()", True)
        if not self.stored(path):
            return Origin("", "-", "initial values", True)
        piece = self._piece(path, layer)
        file, name = piece.where.rsplit(": ", 1)
        return Origin(file, name, repr(piece.transform), False)

    def is_stacked(self, path: Path) -> bool:
        return is_stacked(path)

    def dtype(self, path: Path, layer: int) -> np.dtype:
        """As it is stored."""
        trained = self.trained_by(path)
        return trained.leaves["/".join(path)].dtype if trained else self._piece(path, layer).theirs.dtype

    def shape(self, path: Path) -> tuple[int, ...]:
        """Without the layers."""
        shape = self.shapes[path].shape
        return shape[1:] if is_stacked(path) else shape

    def read(self, path: Path, layer: int) -> np.ndarray:
        """A parameter, or one layer of a stacked one, in the dtype in which it is stored."""
        name = "/".join(path)
        if trained := self.trained_by(path):
            if self._kept is None or self._kept[0] != name:
                self._kept = None  # before the next one is read
                self._kept = (name, _read_array(trained, name))
            return self._kept[1][layer] if is_stacked(path) else self._kept[1]
        shape = self.shapes[path].shape
        index = tuple(slice(None) for _ in shape)
        if is_stacked(path):
            index = (slice(layer, layer + 1), *index[1:])
        found = read_slice(self._match.filled[path], shape, self.dtype(path, layer), index, path in self._match.stacked)
        return found[0] if is_stacked(path) else found

    def _piece(self, path: Path, layer: int) -> Any:
        pieces = self._match.filled[path]
        return pieces[layer if is_stacked(path) else 0]


class Values(Parameters):
    """A whole model's: base folder, upstream folder and runs together."""

    def __init__(self, experiment: Experiment):
        model, sources = experiment.model, weight_sources(experiment)
        folders = list(chain(model.adapter))
        self.experiment = experiment
        self.upstream = next((folder for folder in folders if not is_own(folder)), "")
        self.upstream_names: set[str] = set()
        """Canonical names in the upstream folder"""
        runs = [read_trained(folder) for folder in folders if is_own(folder)]
        if tower := tower_run(experiment):
            runs.append(read_trained(tower, "tower/"))
        super().__init__(parameter_shapes(experiment), sources, runs)
        for folder in sources.folders:
            names = sources.names(folder)
            if folder.path == model.base:
                self.base_dtypes = {key: folder.dtype(name) for key, name in names.items()}
            elif folder.path == self.upstream:
                self.upstream_names = set(names)


def parameter_shapes(experiment: Experiment) -> dict[Path, jax.ShapeDtypeStruct]:
    """{path: shape} of a whole model, layers stacked, parts of a path as texts."""
    return module_shapes(lambda: Vlm(experiment, jax.random.key(0), split=False))


def module_shapes(build: Callable[[], nnx.Module]) -> dict[Path, jax.ShapeDtypeStruct]:
    """The same of any module."""
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.local_devices()[:1])):
        state = nnx.state(nnx.eval_shape(build))
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    return {tuple(str(key.key) for key in keys): jax.ShapeDtypeStruct(leaf.shape, np.float32) for keys, leaf in leaves}


def is_stacked(path: Path) -> bool:
    """Whether a parameter has a leading dimension of layers."""
    return path[1:2] == ("blocks",)


def _nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        place = tree
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = leaf
    return tree


def read_trained(run: str, part: str = "") -> Trained:
    """Shapes and dtypes of a folder of ours; `part`: of what begins so alone."""
    step = manager.newest(run)
    leaves = manager.trainable_leaves(run, step)
    return Trained(run, step, {name: leaf for name, leaf in leaves.items() if name.startswith(part)})


def _read_array(trained: Trained, name: str) -> np.ndarray:
    """One array of a checkpoint, in host memory alone."""
    args = ocp.args.PyTreeRestore(
        item={name: 0}, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
    )
    path = os.path.abspath(trained.path)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            return np.asarray(reader.restore(path, args=args)[name])
        except Exception as error:  # whatever a damaged file raises in Orbax or tensorstore
            raise UserError(f"{path}: cannot be read ({(str(error).splitlines() or [''])[0][:300]})") from error
