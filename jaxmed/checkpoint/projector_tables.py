"""What lies between the image tower and the decoder, as upstream names it: projectors, SAMF's aggregator and fusion.

Rows for the conversion table, and the configs of these parts from a folder's config.json and the shapes of its tensors. Names
are canonical (see `hf_tables`): `model.mm_projector.` and `model.mm_fusion.` before a part's own. Sources: haotian-liu/LLaVA,
llava/model/multimodal_projector; BAAI-DCAI/M3D, LaMed/src/model/multimodal_projector; serag-ai/SAMF.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal

from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.checkpoint.transforms import Leading, Part
from jaxmed.config import AggregatorConfig, ConfigError, Experiment, FusionConfig, ProjectorConfig, VisualConfig
from jaxmed.errors import UserError

PROJECTOR = "model.mm_projector."
FUSION = "model.mm_fusion."
SLICE_POSITIONS = f"{PROJECTOR}slice_positions"

Shapes = Mapping[str, tuple[int, ...]]
"""Canonical name of a tensor -> its shape"""

_AGGREGATOR_BLOCK = f"{PROJECTOR}transformer_encoder.layers.{LAYER}."
_FUSION_PARTS = {"project_3d": "project_3d", "project_2d": "project_2d", "project_text": "project_text", "out": "fusion_layer"}
_PROJECTORS = ("spp", "linear", "identity", "minigpt", "vanilla", "aggregator")


def bridge_rows(experiment: Experiment) -> list[Row]:
    """Everything between tower and decoder."""
    model = experiment.model
    return part_rows(experiment.visual, model.projector, model.aggregator, model.fusion)


def part_rows(
    visual: VisualConfig, projector: ProjectorConfig, aggregator: AggregatorConfig, fusion: FusionConfig
) -> list[Row]:
    """The same, of the parts by themselves."""
    if visual.kind == "none":
        return []
    rows = projector_rows(visual, projector)
    if projector.kind == "aggregator":
        rows += aggregator_rows(aggregator, visual.features)
    return rows + fusion_rows(fusion)


def projector_rows(visual: VisualConfig, projector: ProjectorConfig) -> list[Row]:
    """The projector's layers as upstream numbers them, CT-CHAT's names for the attention pool.

    Upstream has no statistics and no position table; theirs are names of our own in the same style.
    """
    if visual.kind == "none":
        return []
    rows = [
        Row(f"{PROJECTOR}{stem}{part}", ("projector", "layers", str(i), part))
        for i, stem in enumerate(_layer_stems(visual, projector))
        for part in ("weight", "bias")
    ]
    if projector.pooled:
        rows += _pool_rows()
    names = ("norm_mean", "norm_sd") if visual.norm else ()
    names += ("positions",) if visual.positions else ()
    return rows + [Row(f"{PROJECTOR}{name}", ("projector", name)) for name in names]


def _layer_stems(visual: VisualConfig, projector: ProjectorConfig) -> list[str]:
    """What stands before `weight` of each linear layer. GELUs count in the numbers."""
    kind, depth = projector.kind, projector.depth
    if kind == "spp":
        step = 2 if projector.spp_head == "mlp" else 1
        return [f"projector.{step * i}." for i in range(depth)]
    if kind in ("minigpt", "vanilla") or (kind == "linear" and visual.kind == "volumes"):
        return ["linear."]  # M3D's modules hold their matrix in a field; LLaVA's `linear` is the matrix itself
    stem = "proj." if kind.startswith("attn_pool+") else ""
    numbered = kind.removeprefix("attn_pool+").startswith("mlp")
    return [f"{stem}{2 * i}." if numbered else stem for i in range(depth)]


def _pool_rows() -> list[Row]:
    stem, pool = f"{PROJECTOR}attn_pool.", ("projector", "pool")
    rows = [Row(f"{stem}query", (*pool, "query"))]
    rows += [Row(f"{stem}{name}.weight", (*pool, name, "weight")) for name in ("to_q", "to_kv", "to_out")]
    norms = {f"{stem}ln_q": (*pool, "ln_q"), f"{stem}ln_k": (*pool, "ln_k"), f"{PROJECTOR}ln": ("projector", "pool_norm")}
    for theirs, ours in norms.items():
        rows += [Row(f"{theirs}.weight", (*ours, "scale")), Row(f"{theirs}.bias", (*ours, "bias"))]
    return rows


def aggregator_rows(aggregator: AggregatorConfig, width: int) -> list[Row]:
    """SAMF's aggregator over features of `width`: torch's TransformerEncoder, whose q, k and v are one matrix."""
    layers, blocks = aggregator.layers, ("aggregator", "blocks", LAYER)
    # the table of positions is ours, in upstream's style
    positions = [Row(SLICE_POSITIONS, ("aggregator", "positions"))] if aggregator.slice_pos == "learned" else []
    rows = [*positions, Row(f"{PROJECTOR}cls_token", ("aggregator", "class_token"), transform=Leading(2))]
    for number, name in enumerate("qkv"):
        part = Part(number * width, 3 * width)
        for end in ("weight", "bias"):
            theirs = f"{_AGGREGATOR_BLOCK}self_attn.in_proj_{end}"
            rows.append(Row(theirs, (*blocks, "attn", name, end), layers, part))
    linears = {"self_attn.out_proj": ("attn", "o"), "linear1": ("mlp", "up"), "linear2": ("mlp", "down")}
    for theirs, ours in linears.items():
        rows += [Row(f"{_AGGREGATOR_BLOCK}{theirs}.{end}", (*blocks, *ours, end), layers) for end in ("weight", "bias")]
    for norm in ("norm1", "norm2"):
        rows.append(Row(f"{_AGGREGATOR_BLOCK}{norm}.weight", (*blocks, norm, "scale"), layers))
        rows.append(Row(f"{_AGGREGATOR_BLOCK}{norm}.bias", (*blocks, norm, "bias"), layers))
    return rows + [Row(f"{PROJECTOR}volume_proj.{end}", ("aggregator", "out", end)) for end in ("weight", "bias")]


def fusion_rows(fusion: FusionConfig) -> list[Row]:
    """SAMF's fusion; none where there is none."""
    if fusion.kind == "none":
        return []
    parts = {ours: theirs for ours, theirs in _FUSION_PARTS.items() if ours != "project_text" or fusion.kind == "ao2d"}
    ends = ("weight", "bias")
    return [Row(f"{FUSION}{theirs}.{end}", ("fusion", ours, end)) for ours, theirs in parts.items() for end in ends]


def projector_from(config: Mapping[str, Any], shapes: Shapes, where: str) -> ProjectorConfig:
    """The projector of an M3D or SAMF folder, from its config.json and its tensors. `where` names the file in messages.

    What config.json leaves out is read from the tensors' names; the pooling, which no tensor shows, is then the published one.
    """
    told = {f"{PROJECTOR}cls_token": "aggregator", f"{PROJECTOR}linear.weight": "linear"}
    kind = config.get("mm_projector_type") or next((kind for name, kind in told.items() if name in shapes), "spp")
    if kind not in _PROJECTORS:
        near = difflib.get_close_matches(str(kind), _PROJECTORS, n=1, cutoff=0.0)[0]
        known = ", ".join(_PROJECTORS)
        raise UserError(f"{where}: mm_projector_type {kind!r} is not supported; known are {known} (the nearest: {near})")
    if kind != "spp":
        return ProjectorConfig(kind=kind)
    head, depth = _head(config, shapes, where)
    try:
        return ProjectorConfig(
            kind="spp",
            spp_pooling=_one_of(config, "proj_pooling_type", ("spatial", "sequence"), where),
            spp_size=_whole(config, "proj_pooling_size", 2, where),
            spp_head=head,
            spp_depth=depth,
        )
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from error


def _head(config: Mapping[str, Any], shapes: Shapes, where: str) -> tuple[Literal["mlp", "linear"], int]:
    """Kind and number of layers of `spp`'s head; config.json and tensors must agree where both speak."""
    head = _one_of(config, "proj_layer_type", ("mlp", "linear"), where)
    depth = _whole(config, "proj_layer_num", 2, where)
    pattern = re.compile(re.escape(PROJECTOR) + r"projector\.(\d+)\.weight")
    numbers = sorted(int(match.group(1)) for match in map(pattern.fullmatch, shapes) if match)
    if not numbers:
        return head, depth
    if not config.get("proj_layer_type"):
        head = "mlp" if numbers == list(range(0, 2 * len(numbers), 2)) else "linear"
    if not config.get("proj_layer_num"):
        depth = len(numbers)
    wanted = list(range(0, 2 * depth, 2)) if head == "mlp" else list(range(depth))
    if numbers != wanted:
        held, needed = (", ".join(map(str, n)) for n in (numbers, wanted))
        raise UserError(
            f"{where}: a head of proj_layer_type {head} and proj_layer_num {depth} has the layers {needed} under "
            f"{PROJECTOR}projector, the tensors are {held}; mend config.json"
        )
    return head, depth


def aggregator_from(shapes: Shapes, where: str = "the folder") -> AggregatorConfig:
    """SAMF's aggregator from its tensors. No file says how many heads it has: the published 8."""
    pattern = re.compile(re.escape(_AGGREGATOR_BLOCK).replace(re.escape(LAYER), r"(\d+)") + r"linear1\.weight")
    numbers = sorted(int(match.group(1)) for match in map(pattern.fullmatch, shapes) if match)
    if numbers != list(range(len(numbers))) or not numbers:
        raise UserError(f"{where}: the aggregator's layers are {numbers or 'missing'}, they must count from 0")
    mlp = _rows(shapes, f"{_AGGREGATOR_BLOCK}linear1.weight".replace(LAYER, "0"), where)
    places = "learned" if SLICE_POSITIONS in shapes else "none"
    features = _rows(shapes, f"{PROJECTOR}volume_proj.weight", where)
    return AggregatorConfig(layers=len(numbers), mlp=mlp, features=features, slice_pos=places)


def fusion_from(config: Mapping[str, Any], shapes: Shapes, where: str = "config.json") -> FusionConfig:
    """SAMF's fusion from config.json and its tensors, which must agree: upstream's scripts default to different fusions."""
    projects_text = f"{FUSION}project_text.weight" in shapes
    held = any(name.startswith(FUSION) for name in shapes)
    found = ("ao2d" if projects_text else "samf") if held else "none"
    kind = config.get("mm_fuse_type") or found
    kind = "none" if kind == "identity" else kind
    if kind not in ("none", "samf", "ao2d"):
        raise UserError(f"{where}: mm_fuse_type {kind!r} is not supported; known are samf, ao2d and identity")
    if kind != found:
        tensors = {"none": "no fusion", "samf": "a fusion without project_text", "ao2d": "a fusion with project_text"}[found]
        raise UserError(
            f"{where}: mm_fuse_type is {config.get('mm_fuse_type')!r}, but the tensors hold {tensors}; mend config.json"
        )
    if kind == "none":
        return FusionConfig()
    return FusionConfig(kind=kind, width=_rows(shapes, f"{FUSION}project_3d.weight", where))


def _rows(shapes: Shapes, name: str, where: str) -> int:
    if not shapes.get(name):
        raise UserError(f"{where}: {name} is missing")
    return shapes[name][0]


def _one_of(config: Mapping[str, Any], name: str, known: tuple[Any, ...], where: str) -> Any:
    """A word from the config; absent or empty, the first of `known`."""
    value = config.get(name) or known[0]
    if value not in known:
        raise UserError(f"{where}: {name} {value!r} is not supported; known are {' and '.join(known)}")
    return value


def _whole(config: Mapping[str, Any], name: str, default: int, where: str) -> int:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: {name} is {value!r}, a whole number is needed")
    return value
