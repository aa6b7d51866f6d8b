"""Whole vision-language models as others read them: transformers' Llava, and the folders of LLaVA, M3D-LaMed and SAMF.

One file of weights in shards, tower and projector in it. What our model does not compute with (a tower's later blocks, its last
norm) is copied from the source where it has it. `lamed` and `samf` keep adapters apart in `model_with_lora.bin`, as their
training saves them, unless they are merged.
"""

import dataclasses
import os
import re
from collections.abc import Callable

import numpy as np

from jaxmed.checkpoint import export_documents
from jaxmed.checkpoint.chat_templates import chat_template
from jaxmed.checkpoint.decoder_tables import EMBED, HEAD, decoder_rows, lora_rows
from jaxmed.checkpoint.export_config import TOWER_FOLDER
from jaxmed.checkpoint.export_plan import MODEL, Format, Planner, adapter_rows, optimizer_state, stacked_path
from jaxmed.checkpoint.model_plan import ModelPlan
from jaxmed.checkpoint.names import BESIDE, PEFT_PREFIX, TOWER_PREFIX
from jaxmed.checkpoint.passthrough import copied, unused
from jaxmed.checkpoint.projector_tables import FUSION, PROJECTOR, bridge_rows
from jaxmed.checkpoint.row import Row
from jaxmed.checkpoint.tensor_files import Tensor
from jaxmed.checkpoint.tower_tables import tower_rows
from jaxmed.checkpoint.values import Parameters, Values
from jaxmed.config import Experiment, TowerConfig
from jaxmed.errors import UserError

WITH_LORA = "model_with_lora.bin"
ROWS_MULTIPLE = 64
"""To which conversions for transformers pad a vocabulary that they lengthen"""

HEAD_OF_TOWER = ".vision_model.head."
_LAYOUTS = {"llava": ("clip", "siglip"), "lamed": ("vit3d",), "samf": ("dino",)}


def whole_rows(experiment: Experiment) -> list[Row]:
    """Every row but the adapters'."""
    model = experiment.model
    return decoder_rows(model.decoder, len(model.added_tokens)) + tower_rows(model.tower) + bridge_rows(experiment)


# -- upstream's layouts ------------------------------------------------------------------------------------------------------


def plan_upstream(values: Values, planner: Planner, to: Format, merge: bool) -> ModelPlan:
    """LLaVA's (adapters merged), M3D-LaMed's or SAMF's folder."""
    experiment = values.experiment
    check_layout(experiment, to)
    lora = adapter_rows(values)
    apart = bool(lora) and not merge and to != "llava"
    named = _wrapped_names(experiment) if apart else str
    tensors = planner.tensors(whole_rows(experiment) + (lora if apart else []), named, merge=not apart)
    tensors += copied(values, named, _beside_tower(values), planner.chosen)
    embed = next(tensor for tensor in tensors if tensor.ours == "decoder/embed/table")
    dtype = embed.dtype
    if apart and experiment.model.decoder.tied:
        tensors.append(dataclasses.replace(embed, name=named(HEAD)))  # a state dict has what two modules share twice
    layers, head = kept_layers(values, experiment.model.tower), any(HEAD_OF_TOWER in name for name in values.surplus)
    documents = export_documents.upstream_documents(experiment, to, dtype.name, apart, layers, head)
    files = {WITH_LORA if apart else MODEL: tensors}
    if f"{TOWER_FOLDER}/config.json" in documents:
        files[f"{TOWER_FOLDER}/model.safetensors"] = _tower_alone(values, planner, layers, dtype)
    written = {tensor.name for tensor in tensors}
    kept = {name: reason for name, reason in values.ignored.items() if named(name) not in written}
    notes = []
    if experiment.visual.norm or experiment.visual.positions:
        notes.append("statistics and position table of the visual input are ours; upstream's own loader has no place for them")
    if experiment.model.aggregator.slice_pos != "none":
        notes.append("positions of slices are ours; upstream's own code does not compute with them")
    return ModelPlan(to, files, documents, kept | optimizer_state(values), notes, experiment=experiment, source=experiment)


def check_layout(experiment: Experiment, to: str) -> None:
    model = experiment.model
    fused = model.fusion.kind != "none"
    if model.tower.kind not in _LAYOUTS[to] or fused != (to == "samf"):
        have = f"the tower {model.tower.kind} and the fusion {model.fusion.kind}"
        fit = [name for name, kinds in _LAYOUTS.items() if model.tower.kind in kinds and fused == (name == "samf")]
        hint = f"give --to {fit[0]}" if fit else "give --to hf or --to orbax"
        raise UserError(f"--to {to}: is a layout for the tower {' or '.join(_LAYOUTS[to])}; this model has {have}; {hint}")


def _tower_alone(values: Values, planner: Planner, layers: int, dtype: np.dtype) -> list[Tensor]:
    """The tower as a folder of its own has it, from which upstream's loader takes it."""

    def named(name: str) -> str:
        return name.removeprefix(TOWER_PREFIX)

    tower = values.experiment.model.tower
    tensors = planner.tensors(tower_rows(tower), named) + copied(
        values, named, lambda name: belongs(name, layers), planner.chosen
    )
    return tensors + post_norm(tower, {tensor.name for tensor in tensors}, dtype, named)


def _beside_tower(values: Values) -> Callable[[str], bool]:
    """Which surplus tensors go along: those of the folder that the tower comes from."""
    row = tower_rows(values.experiment.model.tower)[0]
    home = os.path.dirname(values.source(stacked_path(row), 0))

    def wanted(name: str) -> bool:
        return not name.startswith(BESIDE) and os.path.dirname(values.places[name].rsplit(": ", 1)[0]) == home

    return wanted


def _wrapped_names(experiment: Experiment) -> Callable[[str], str]:
    """Names of PEFT's wrapped modules, as a state dict of a model with adapters has them."""
    rows = lora_rows(experiment.lora, experiment.model.decoder)
    modules = {name.rsplit(".lora_", 1)[0] for row in rows for name in row.names()}

    def named(name: str) -> str:
        if match := re.fullmatch(r"(.*\.lora_[AB])\.weight", name):
            return f"{PEFT_PREFIX}{match[1]}.default.weight"
        module, _, end = name.rpartition(".")
        return PEFT_PREFIX + (f"{module}.base_layer.{end}" if module in modules else name)

    return named


# -- transformers' Llava -----------------------------------------------------------------------------------------------------


def fits_llava(experiment: Experiment) -> bool:
    """Whether LlavaForConditionalGeneration computes what this model computes."""
    model = experiment.model
    tower = model.tower.kind in ("clip", "siglip") and model.tower.select_feature != "cls"
    plain = not (experiment.visual.norm or experiment.visual.positions) and model.fusion.kind == "none"
    return tower and plain and model.projector.kind == "mlp2x_gelu" and not model.decoder.fused


def plan_llava_hf(values: Values, planner: Planner) -> ModelPlan:
    """Adapters merged; an `<image>` token of its own after the vocabulary, where transformers puts the image."""
    experiment = values.experiment
    extra = export_documents.extra_tokens(experiment)
    rows = experiment.model.decoder.vocab + len(experiment.model.added_tokens)
    size = -(-(rows + len(extra)) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    longer = {EMBED: size - rows, HEAD: size - rows}
    tensors = planner.tensors(whole_rows(experiment), _hf_name, merge=True, longer=longer)
    layers = kept_layers(values, experiment.model.tower)
    passed = copied(values, _hf_name, lambda name: belongs(name, layers), planner.chosen)
    tensors += passed
    dtype = next(tensor.dtype for tensor in tensors if tensor.ours == "decoder/embed/table")
    notes = []
    made = post_norm(experiment.model.tower, {tensor.name for tensor in passed}, dtype, _hf_name)
    if made:
        tensors += made
        notes.append("the source lacks the tower's last norm, which is never read: ones and zeros stand in its place")
    tower = experiment.model.tower
    if layers == tower.blocks < tower.layers:
        notes.append(
            f"the source lacks the tower's blocks after {layers}, which are never read: it is written as one of {layers}"
        )
    head = any(HEAD_OF_TOWER in name for name in values.surplus)
    documents = export_documents.llava_hf_documents(experiment, dtype.name, size, extra, layers, head)
    place = documents["config.json"]["image_token_index"]
    notes.append(f"an image stands at the token <image>, id {place}; rows of the tables after the model's own are their mean")
    if experiment.visual.pixels.aspect == "pad":
        notes.append("images are padded: AutoProcessor needs a transformers with LlavaImageProcessor (4.44 lacks it)")
    written = {tensor.name for tensor in passed}
    left = {name: reason for name, reason in values.ignored.items() if _hf_name(name) not in written}
    text = chat_template(experiment.data.template)
    texts = {"chat_template.jinja": text} if text else {}
    plan = ModelPlan(
        "hf", {MODEL: tensors}, documents, left | optimizer_state(values), notes, experiment=experiment, source=experiment
    )
    return dataclasses.replace(plan, texts=texts, extra_tokens=extra)


def _hf_name(name: str) -> str:
    """Canonical -> transformers 4's spelling, which version 5 reads too."""
    for theirs, ours in {f"{PROJECTOR}0.": "linear_1.", f"{PROJECTOR}2.": "linear_2."}.items():
        if name.startswith(theirs):
            return f"multi_modal_projector.{ours}{name.removeprefix(theirs)}"
    if name.startswith(TOWER_PREFIX):
        return f"vision_tower.{name.removeprefix(TOWER_PREFIX)}"
    return f"language_model.{name}"


_BLOCK = re.compile(re.escape(f"{TOWER_PREFIX}vision_model.encoder.layers.") + r"(\d+)\.")


def kept_layers(values: Parameters, tower: TowerConfig) -> int:
    """Blocks of the tower that can be written: those that are run, and the later ones where the source has them all."""
    wanted = {name for row in tower_rows(every_block(tower)) for name in row.names() if _BLOCK.match(name)}
    own = {name for row in tower_rows(tower) for name in row.names()}
    return tower.layers if wanted - own <= values.surplus.keys() else tower.blocks


def every_block(tower: TowerConfig) -> TowerConfig:
    return dataclasses.replace(tower, select_layer=-1)


def belongs(name: str, layers: int) -> bool:
    """Whether transformers has a place for a surplus tensor of a tower."""
    if not name.startswith(TOWER_PREFIX) or name.endswith(".position_ids"):
        return False
    block = _BLOCK.match(name)
    return not block or int(block[1]) < layers


def post_norm(tower: TowerConfig, passed: set[str], dtype: np.dtype, named: Callable[[str], str]) -> list[Tensor]:
    stem = named(f"{TOWER_PREFIX}vision_model.post_layernorm.")
    parts = {"weight": 1.0, "bias": 0.0}
    return [unused(stem + end, (tower.width,), value, dtype) for end, value in parts.items() if stem + end not in passed]


# -- what has no place -------------------------------------------------------------------------------------------------------


def bridge_beside(values: Values, planner: Planner, files: dict[str, list[Tensor]]) -> list[str]:
    """Everything between tower and decoder in a file of its own, for layouts of a language model; what to say of it."""
    rows = [row for row in bridge_rows(values.experiment) if values.stored(stacked_path(row))]
    notes = []
    if rows:
        files["mm_projector.safetensors"] = planner.tensors(rows, str)
        what = "projector and fusion have" if any(row.theirs.startswith(FUSION) for row in rows) else "the projector has"
        notes = [f"{what} no place in this layout; it stands beside it in mm_projector.safetensors"]
    if values.experiment.model.tower.kind != "none":
        notes.append("the image tower has no place in this layout and was left out")
    return notes


def left_out(values: Values) -> dict[str, str]:
    """The tower's tensors, where a layout has no place for it."""
    rows = tower_rows(values.experiment.model.tower)
    stem = "the image tower" if rows else ""
    return {stem: f"{sum(len(row.names()) for row in rows)} tensors; no place in this layout"} if stem else {}
