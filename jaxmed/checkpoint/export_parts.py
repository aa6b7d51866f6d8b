"""Parts of a model as others read them, or in our own form: a tower, M3D-CLIP, a projector.

- CLIP and SigLIP towers: transformers' folder (`hf`). Blocks that our tower does not run are copied where the source has them;
  where it has not, blocks that pass their input on stand in their place, so that a layer counted from the end stays the same.
- ViT3D and DINO: tensors under upstream's names, in safetensors (`hf`) or in the file that upstream's code loads (`lamed`: a
  pretrained_ViT.bin, `samf`: a .pth).
- M3D-CLIP: its save_pretrained folder (`hf`), or its tower alone as pretrained_ViT.bin (`lamed`).
- A projector: mm_projector.bin (`llava`, `lamed`, `samf`, whose kind it is).
"""

import dataclasses
import math
import os
import shutil
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmed.checkpoint.encoder_documents import m3d_clip_documents, tower_documents
from jaxmed.checkpoint.encoder_folders import EncoderFolder
from jaxmed.checkpoint.export_config import TOKENIZER_FILES
from jaxmed.checkpoint.export_multimodal import HEAD_OF_TOWER, belongs, every_block, kept_layers, post_norm
from jaxmed.checkpoint.export_plan import DTYPES, MODEL, Format, Plan, Planner
from jaxmed.checkpoint.native_writer import STEP, parameter_rows
from jaxmed.checkpoint.part_folders import KIND_NAMES, PartFolder
from jaxmed.checkpoint.passthrough import copied, unused
from jaxmed.checkpoint.projector_folders import TABLE_BESIDE, ProjectorFolder
from jaxmed.checkpoint.row import LAYER
from jaxmed.checkpoint.tensor_files import Tensor
from jaxmed.checkpoint.tower_tables import M3D_IMAGE_PREFIX, M3D_TEXT_PREFIX, TOWER_PREFIX, tower_rows
from jaxmed.checkpoint.values import Parameters
from jaxmed.config import LoraConfig, MeshConfig
from jaxmed.errors import UserError
from jaxmed.sharding import make_mesh

VIT3D_FILE, DINO_FILE, PROJECTOR_FILE = "pretrained_ViT.bin", "dino_vitbase16_pretrain.pth", "mm_projector.bin"
_TOKENIZER = (*TOKENIZER_FILES, "vocab.txt")
_BESIDE_A_TOWER = ("preprocessor_config.json",)


@dataclasses.dataclass(frozen=True)
class PartPlan(Plan):
    part: PartFolder = dataclasses.field(kw_only=True)
    copies: dict[str, str] = dataclasses.field(default_factory=dict, kw_only=True)
    """Files that go along as they are: name in the folder -> where it is"""

    def about(self) -> dict[str, Any]:
        return {"part": KIND_NAMES[self.part.kind], "tokenizer": self.part.tokenizer, "encoder": self.part.visual.encoder}

    def write_beside(self, folder: str) -> str:
        for name, place in self.copies.items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            shutil.copyfile(place, path)
        return ""


@dataclasses.dataclass(frozen=True)
class PartNative:
    """A part on its way into our own form."""

    part: PartFolder
    dtypes: dict[str, np.dtype]
    """Path as text -> dtype"""

    @property
    def config(self) -> str:
        return self.part.native_config[0]

    @property
    def meta(self) -> dict[str, Any]:
        return self.part.native_config[1]

    def mesh(self, asked: MeshConfig) -> Mesh:
        if asked == MeshConfig() and jax.process_count() == 1:
            fsdp = math.gcd(len(jax.devices()), *self.part.widths)
            return make_mesh(MeshConfig(data=1, fsdp=fsdp), jax.devices()[:fsdp])
        self.part.check_divisible(asked)
        return make_mesh(asked)

    def values(self, mesh: Mesh) -> dict[str, jax.Array]:
        leaves = jax.tree_util.tree_flatten_with_path(self.part.place(mesh, self.dtypes)[1])[0]
        return {"/".join(str(key.key) for key in keys): leaf for keys, leaf in leaves}


def plan_part(part: PartFolder, to: Format, dtype: str = "") -> PartPlan:
    """`dtype` "": each tensor as the source has it. UserError where the part has no such layout."""
    known = layouts(part)
    if to not in known:
        what = part.tower.kind + " tower alone" if isinstance(part, EncoderFolder) and not part.contrastive else ""
        what = what or f"{KIND_NAMES[part.kind].removeprefix('a ')} alone"
        can = " or ".join(f"--to {name}" for name in known)
        raise UserError(f"--to {to}: {part.path} is a {what}, which has no such layout; give {can}")
    values = part.parameters()
    chosen = DTYPES[dtype] if dtype else None
    if to == "orbax":
        return _plan_native(part, values, chosen)
    planner = Planner(values, chosen, LoraConfig(rank=0))
    if isinstance(part, ProjectorFolder):
        return _plan_projector(part, to, values, planner)
    if part.contrastive:
        return _plan_m3d_clip(part, values, planner) if to == "hf" else _plan_vit3d_file(part, to, values, planner)
    if part.tower.kind in ("clip", "siglip"):
        return _plan_tower(part, values, planner)
    return _plan_vit3d_file(part, to, values, planner)


def layouts(part: PartFolder) -> tuple[Format, ...]:
    """What a part can be written as."""
    if isinstance(part, ProjectorFolder):
        return (part.family, "orbax")
    tower = part.tower.kind
    return ("hf", *{"vit3d": ("lamed",), "dino": ("samf",)}.get(tower, ()), "orbax")


def _plan_native(part: PartFolder, values: Parameters, chosen: np.dtype | None) -> PartPlan:
    tensors = [row for path in values.shapes for row in parameter_rows(values, path, chosen)]
    native = PartNative(part, {tensor.ours.partition("[")[0]: tensor.dtype for tensor in tensors})
    copies = {os.path.join("tokenizer", name): place for name, place in _files(part.tokenizer, _TOKENIZER).items()}
    beside = [f"{name} was left out: {reason}" for name, reason in values.ignored.items() if reason == TABLE_BESIDE]
    return PartPlan(
        "orbax", {STEP: tensors}, {}, values.ignored | _optimizer(values), beside, native=native, part=part, copies=copies
    )


def _optimizer(values: Parameters) -> dict[str, str]:
    """Of runs that were trained; what was converted has none."""
    held = [trained for trained in values.runs if os.path.isdir(os.path.join(os.path.dirname(trained.path), "opt"))]
    return {f"{trained.run}: optimizer state": "an export holds weights alone" for trained in held}


def _files(folder: str, names: tuple[str, ...]) -> dict[str, str]:
    """Those that are there."""
    places = {name: os.path.join(folder, name) for name in names} if folder else {}
    return {name: place for name, place in places.items() if os.path.isfile(place)}


# -- towers ------------------------------------------------------------------------------------------------------------------


def _tower_name(name: str) -> str:
    return name.removeprefix(TOWER_PREFIX)


def _plan_tower(part: EncoderFolder, values: Parameters, planner: Planner) -> PartPlan:
    """CLIP's and SigLIP's."""
    tower, notes = part.tower, []
    layers = kept_layers(values, tower)
    tensors = planner.tensors(part.sources.rows, _tower_name)
    tensors += copied(values, _tower_name, lambda name: belongs(name, layers), planner.chosen)
    dtype = next(tensor.dtype for tensor in tensors if tensor.ours == "tower/patch/weight")
    if layers < tower.layers:
        tensors += _passing_blocks(part, tensors, dtype)
        notes.append(
            f"the source lacks the tower's blocks after {layers}, which are never read: blocks that change nothing stand there"
        )
    if made := post_norm(tower, {tensor.name for tensor in tensors}, dtype, _tower_name):
        tensors += made
        notes.append("the source lacks the tower's last norm, which is never read: ones and zeros stand in its place")
    head = any(HEAD_OF_TOWER in tensor.name for tensor in tensors) or any("vision_model.head." in t.name for t in tensors)
    documents = tower_documents(part, head, dtype.name)
    copies = _files(os.path.dirname(part.path) if os.path.isfile(part.path) else part.path, _BESIDE_A_TOWER)
    if part.run or copies:
        documents = {name: document for name, document in documents.items() if name not in copies}
    else:
        documents.pop("preprocessor_config.json")
    left = _left(values, tensors, _tower_name)
    return PartPlan("hf", {MODEL: tensors}, documents, left, notes, part=part, copies=copies)


def _passing_blocks(part: EncoderFolder, tensors: list[Tensor], dtype: np.dtype) -> list[Tensor]:
    """Blocks whose attention and MLP give zeros, after those that the source has."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return [
        unused(
            _tower_name(row.theirs.replace(LAYER, str(layer))),
            shapes[_tower_name(row.theirs.replace(LAYER, "0"))],
            float(row.ours[-1] == "scale"),
            dtype,
        )
        for row in tower_rows(every_block(part.tower))
        if LAYER in row.theirs
        for layer in range(part.tower.blocks, part.tower.layers)
    ]


def _left(values: Parameters, tensors: list[Tensor], named: Any) -> dict[str, str]:
    written = {tensor.name for tensor in tensors}
    return {name: reason for name, reason in values.ignored.items() if named(name) not in written} | _optimizer(values)


def _plan_vit3d_file(part: EncoderFolder, to: Format, values: Parameters, planner: Planner) -> PartPlan:
    """ViT3D's and DINO's tensors under their own names, of M3D-CLIP its tower's."""
    prefix = M3D_IMAGE_PREFIX if part.contrastive else TOWER_PREFIX

    def named(name: str) -> str:
        return name.removeprefix(prefix)

    tensors = planner.tensors(tower_rows(part.tower, prefix), named)
    file = {"lamed": VIT3D_FILE, "samf": DINO_FILE}.get(to, MODEL)
    documents = tower_documents(part, False, tensors[0].dtype.name)
    left = _left(values, tensors, named)
    if part.contrastive:
        others = [path for path in values.shapes if path[0] != "tower"]
        left |= {"/".join(path): "no part of the image tower, for which alone the file is" for path in others}
    return PartPlan(to, {file: tensors}, documents, left, [], part=part)


# -- M3D-CLIP ----------------------------------------------------------------------------------------------------------------


def _plan_m3d_clip(part: EncoderFolder, values: Parameters, planner: Planner) -> PartPlan:
    tensors = planner.tensors(part.sources.rows, str)
    pooler = f"{M3D_TEXT_PREFIX}pooler.dense."
    tensors += copied(values, str, lambda name: name.startswith(pooler), planner.chosen)
    dtype, width = tensors[0].dtype, part.text.width
    notes = []
    if all(tensor.name != f"{pooler}weight" for tensor in tensors):
        tensors += [unused(f"{pooler}weight", (width, width), 0.0, dtype), unused(f"{pooler}bias", (width,), 0.0, dtype)]
        notes.append("the source lacks BERT's pooler, which is never read: zeros stand in its place")
    if part.exp_scale:
        tensors = [_exponential(tensor) if tensor.name == "logit_scale" else tensor for tensor in tensors]
        notes.append("logit_scale is written as its exponential: upstream multiplies by it as it is")
    documents, said = m3d_clip_documents(part, dtype.name)
    left = _left(values, tensors, str)
    copies = _files(part.tokenizer, _TOKENIZER)
    return PartPlan("hf", {MODEL: tensors}, documents, left, [*notes, *said], part=part, copies=copies)


def _exponential(tensor: Tensor) -> Tensor:
    return dataclasses.replace(tensor, make=lambda: np.exp(tensor.make().astype(np.float32)), rule=f"{tensor.rule}, exp")


# -- projectors --------------------------------------------------------------------------------------------------------------


def _plan_projector(part: ProjectorFolder, to: Format, values: Parameters, planner: Planner) -> PartPlan:
    """Upstream's file; what stood beside the projector stays there."""
    tensors = planner.tensors(part.sources.rows, str) + copied(values, str, lambda name: True, planner.chosen)
    documents = {"config.json": dict(part.settings) or _projector_settings(part, to)}
    return PartPlan(to, {PROJECTOR_FILE: tensors}, documents, _left(values, tensors, str), [], part=part)


def _projector_settings(part: ProjectorFolder, to: Format) -> dict[str, Any]:
    """What upstream's config.json says of a projector."""
    spp = part.projector
    fields: dict[str, Any] = {"mm_projector_type": spp.kind, "mm_hidden_size": part.visual.features}
    if spp.kind == "spp":
        fields |= {"proj_layer_type": spp.spp_head, "proj_layer_num": spp.spp_depth}
        fields |= {"proj_pooling_type": spp.spp_pooling, "proj_pooling_size": spp.spp_size}
    return fields | ({"mm_fuse_type": part.fusion.kind} if to == "samf" and part.fusion.kind != "none" else {})
