"""Where the weights of contrastive pretraining start: `model.base` (M3D-CLIP, whole), `model.tower_folder` (an image tower) and
`contrastive.text_folder` (BERT), the later over the earlier. What none of them holds starts at random."""

import os
from dataclasses import replace
from typing import Any

from jaxmed.checkpoint.folder_kinds import is_own
from jaxmed.checkpoint.hf_io import TensorFolder, open_folder
from jaxmed.checkpoint.load import Surplus, read_params
from jaxmed.checkpoint.row import Row
from jaxmed.checkpoint.tower_tables import (
    M3D_IMAGE_PREFIX,
    M3D_TEXT_PREFIX,
    contrastive_rows,
    surplus_reason,
    text_encoder_rows,
    text_surplus_reason,
    tower_rows,
)
from jaxmed.config import Experiment
from jaxmed.errors import UserError

Path = tuple[str | int, ...]
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}
"""Of LayerNorm's parameters, as the first BERT files have them"""


def read_encoders(experiment: Experiment, leaves: dict[Path, Any]) -> dict[Path, Any]:
    """Those of `leaves` ({path: jax.ShapeDtypeStruct with sharding}) that the folders hold, as arrays."""
    found: dict[Path, Any] = {}
    model, tower, text = experiment.model, experiment.model.tower, experiment.contrastive.text
    if model.base:

        def surplus(name: str) -> str:
            return surplus_reason(name, tower, M3D_IMAGE_PREFIX) or text_surplus_reason(name)

        found |= _read(contrastive_rows(tower, text), open_folder(model.base), leaves, surplus)
    # a run is no folder of tensors: jaxmed.checkpoint.adapter overlays it
    if model.tower_folder and model.tower_source != "random" and not is_own(model.tower_folder):
        folder = replace(open_folder(model.tower_folder), role="tower")
        wanted = {path: leaf for path, leaf in leaves.items() if path[0] == "tower"}
        found |= _read(tower_rows(tower), folder, wanted, lambda name: surplus_reason(name, tower))
    if experiment.contrastive.text_folder:
        wanted = {path: leaf for path, leaf in leaves.items() if path[0] == "text"}
        found |= _read(text_encoder_rows(text), open_bert(experiment.contrastive.text_folder), wanted, text_surplus_reason)
    return found


def open_bert(path: str) -> TensorFolder:
    """A BERT folder's tensors under the names that M3D-CLIP gives them."""
    folder = open_folder(path)
    names = {name: _canonical(name) for name in folder.names()}
    if f"{M3D_TEXT_PREFIX}embeddings.word_embeddings.weight" not in names.values():
        raise UserError(f"{path}: holds no BERT (embeddings.word_embeddings.weight is not there); give a BERT model's folder")
    arrays = {names[name]: array for name, array in folder.arrays.items()}
    return replace(folder, arrays=arrays, files={names[name]: file for name, file in folder.files.items()})


def _canonical(name: str) -> str:
    stem, end = os.path.splitext(name.removeprefix("bert."))
    return M3D_TEXT_PREFIX + stem + _OLD_NAMES.get(end, end)


def _read(rows: list[Row], folder: TensorFolder, leaves: dict[Path, Any], surplus: Surplus) -> dict[Path, Any]:
    """Parameters that the folder fills, all of `leaves`."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        place = tree
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = leaf
    read = read_params(rows, [folder], tree, True, surplus)
    found = {}
    for path in leaves:
        value = read
        for name in path:
            value = value[name]
        found[path] = value
    return found
