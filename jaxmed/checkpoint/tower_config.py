"""From config.json and tensors' shapes to an image tower's fields, and to a text encoder's.

CLIP and SigLIP say everything in a config.json (their own, or as `vision_config` of a larger one). M3D's and SAMF's configs say
little about the tower, LLaVA's nothing but its name: there the shapes of the tensors decide. What no file holds (head counts)
is the published default, and is named in `assumed`, so that the log can say so.
"""

import difflib
import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from jaxmed.checkpoint.hf_io import TensorFolder
from jaxmed.checkpoint.tower_shapes import LANDMARKS, TowerShapes, head_count, kind_of_tensors
from jaxmed.errors import UserError
from jaxmed.model_config import ConfigError, TextEncoderConfig, TowerConfig
from jaxmed.models.presets_towers import BERT_BASE, CLIP_B32, CLIP_L14_336, DINO_VITB16, SIGLIP_SO400M_384, VIT3D

# Whose config.json it is -> the kind of tower.
FAMILIES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "m3d_clip": "vit3d",
}
# M3D's and SAMF's field `vision_tower` -> the kind of tower.
TOWER_NAMES = {"vit3d": "vit3d", "dino_large": "dino", "dino_vitb16": "dino"}

# What transformers takes where a config is silent (saved configs leave defaults out).
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_DEFAULTS = _CLIP_DEFAULTS | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True)
class FoundTower:
    config: TowerConfig
    assumed: tuple[str, ...]
    """Fields that no file holds: published defaults"""


@dataclass(frozen=True)
class FoundText:
    config: TextEncoderConfig
    assumed: tuple[str, ...]
    """Fields that no file holds: published defaults"""


@dataclass(frozen=True)
class _Selection:
    layer: int
    feature: Any


def tower_config(
    config: dict[str, Any],
    where: str,
    tensors: TensorFolder | None,
    select_layer: int,
    select_feature: str,
    heads: int = 0,
) -> FoundTower:
    """The tower that a config.json and the tensors beside it describe. `where` names the file in messages.

    `select_layer`, `select_feature`: as upstream's configs have them (`mm_vision_select_layer`; transformers' `default` is
    `patch`, `full` is `cls_patch`). DINO gives its class token and a SigLIP folder the output before the last block,
    whatever they say, as SAMF and TinyLLaVA have it. `heads`: the count where no file says it (0: the published default).
    """
    select = _Selection(select_layer, select_feature)
    kind, inner = _kind(config, where, tensors)
    try:
        if kind in ("clip", "siglip"):
            alone = inner is config or config.get("model_type") in FAMILIES  # a contrastive model holds a tower too
            found = _hf(inner, where, kind, select, alone) if inner else _hf_from_shapes(tensors, kind, where, select, heads)
        elif kind == "dino":
            found = _dino(tensors, where, int(_number(inner, "num_heads", where, 0)) or heads)
        else:
            found = _vit3d(config, where, tensors, select, heads)
        found.config.check_heads()
        return found
    except ConfigError as error:  # sizes that are each a number, but don't go together
        raise UserError(f"{where}: {error}") from error


def _kind(config: dict[str, Any], where: str, tensors: TensorFolder | None) -> tuple[str, dict[str, Any]]:
    """The kind of tower, and the part of the config that describes it ({}: the tensors do)."""
    nested = config.get("vision_config")
    if isinstance(nested, dict):
        family = nested.get("model_type") or config.get("model_type", "")
        if family in FAMILIES:
            return FAMILIES[family], nested
        raise _unknown(where, family)
    family = config.get("model_type", "")
    if family in FAMILIES:
        return FAMILIES[family], config
    tower = config.get("vision_tower")
    if isinstance(tower, str) and tower in TOWER_NAMES:
        return TOWER_NAMES[tower], config
    about_a_language_model = not config or any(name.startswith("mm_") for name in config) or tower is not None
    if about_a_language_model and tensors is not None and (kind := kind_of_tensors(tensors)):
        return kind, {}
    raise _unknown(where, tower or family)


def _unknown(where: str, family: Any) -> UserError:
    known = [*FAMILIES, *TOWER_NAMES]
    near = difflib.get_close_matches(str(family), known, n=1, cutoff=0.0)[0]
    return UserError(
        f"{where}: the image tower {family!r} is not supported; known are {', '.join(known)} (the nearest: {near})"
    )


def _number(config: dict[str, Any], name: str, where: str, default: Any) -> Any:
    """A positive number from the config. Null counts as absent, as transformers has it."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"{where}: {name} is {value!r}, a positive number is needed")
    return value


def _sizes(value: Any, axes: int, name: str, where: str) -> tuple[int, ...]:
    """A size along every axis; one number serves for all of a 2-D tower's."""
    sizes = [value] * axes if isinstance(value, int) and axes == 2 else value
    fine = isinstance(sizes, list | tuple) and len(sizes) == axes and all(isinstance(n, int) and n > 0 for n in sizes)
    if not fine:
        raise UserError(f"{where}: {name} is {value!r}, {axes} whole numbers are needed")
    return tuple(sizes)


def _hf(config: dict[str, Any], where: str, kind: str, select: _Selection, alone: bool) -> FoundTower:
    """CLIP's and SigLIP's own config. `alone`: it is the tower's folder's, and not a part of a whole model's."""
    filled = (_CLIP_DEFAULTS if kind == "clip" else _SIGLIP_DEFAULTS) | {k: v for k, v in config.items() if v is not None}
    activation = filled["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {activation!r}; known are {', '.join(_ACTIVATIONS)}")
    number = {name: _number(filled, name, where, 0) for name in _CLIP_DEFAULTS if name != "hidden_act" and "_size" not in name}
    preset = CLIP_B32 if kind == "clip" else SIGLIP_SO400M_384
    sizes = replace(
        preset,
        image=_sizes(filled["image_size"], 2, "image_size", where),
        patch=_sizes(filled["patch_size"], 2, "patch_size", where),
        channels=number["num_channels"],
        width=_number(filled, "hidden_size", where, 0),
        layers=number["num_hidden_layers"],
        heads=number["num_attention_heads"],
        mlp=_number(filled, "intermediate_size", where, 0),
        norm_eps=number["layer_norm_eps"],
        activation=_ACTIVATIONS[activation],
        select_layer=-1,
    )
    return FoundTower(_selected(sizes, select, alone), ())


def _selected(config: TowerConfig, select: _Selection, alone: bool) -> TowerConfig:
    """`config` with the layer and the tokens that upstream takes from a tower of its kind."""
    if config.kind == "siglip":
        if select.feature == "default":
            raise ConfigError(
                "vision_feature_select_strategy 'default' drops the first token, a patch in SigLIP; 'full' is supported"
            )
        layer = -2 if alone else select.layer
        return replace(config, select_layer=_from_the_end(layer, config), select_feature="patch")
    feature = {"default": "patch", "full": "cls_patch"}.get(select.feature, select.feature)
    known = get_args(TowerConfig.__dataclass_fields__["select_feature"].type)
    if feature not in known:
        raise ConfigError(f"the selected feature is {select.feature!r}; known are {', '.join(known)}")
    return replace(config, select_layer=_from_the_end(select.layer, config), select_feature=feature)


def _from_the_end(layer: int, config: TowerConfig) -> int:
    """Upstream may count from the front too: k is the output of the k-th block."""
    return layer - config.layers - 1 if layer > 0 else layer


def _hf_from_shapes(tensors: TensorFolder | None, kind: str, where: str, select: _Selection, heads: int) -> FoundTower:
    """A CLIP or SigLIP tower inside a LLaVA folder, whose own config.json is elsewhere."""
    if tensors is None:
        raise UserError(f"{where}: says nothing of the tower's sizes; give the tower's folder")
    landmark = next(mark for mark, of in LANDMARKS.items() if of == kind)
    shapes = TowerShapes(tensors, landmark, where)
    width, channels, *patch = shapes("embeddings.patch_embedding.weight", 4)
    positions, _ = shapes("embeddings.position_embedding.weight", 2)
    layers, mlp = shapes.layers("encoder.layers."), shapes("encoder.layers.0.mlp.fc1.weight", 2)[0]
    if kind == "siglip" and "head.probe" not in shapes:
        layers += 1  # TinyLLaVA stores neither the pooling head nor the last block, which it never runs
    side = math.isqrt(positions)
    image = tuple(side * p for p in patch)
    presets = (CLIP_L14_336, CLIP_B32) if kind == "clip" else (SIGLIP_SO400M_384,)
    same = [p for p in presets if (p.width, p.layers, p.mlp, p.patch) == (width, layers, mlp, tuple(patch))]
    near = same[0] if same else presets[0]
    if near.patch == tuple(patch) and math.prod(near.grid) == side * side:
        image = near.image  # pixels that no patch covers leave no trace in the shapes
    count, assumed = (near.heads, ["heads"]) if same and not heads else head_count(width, heads, near.heads, where)
    sizes = replace(
        near,
        image=image,
        patch=tuple(patch),
        channels=channels,
        width=width,
        layers=layers,
        heads=count,
        mlp=mlp,
        pre_norm="pre_layrnorm.weight" in shapes,
        select_layer=-1,
    )
    return FoundTower(_selected(sizes, select, True), (*assumed, "image", "norm_eps", "activation"))


def _dino(tensors: TensorFolder | None, where: str, heads: int) -> FoundTower:
    """SAMF's config.json holds M3D's sizes, which its slice encoder does not have: the shapes alone count."""
    if tensors is None:
        return FoundTower(replace(DINO_VITB16, heads=heads or DINO_VITB16.heads), ("width", "layers", "heads", "mlp", "image"))
    shapes = TowerShapes(tensors, "patch_embed.proj.weight", where)
    width, channels, *patch = shapes("patch_embed.proj.weight", 4)
    rows = shapes("pos_embed", 3)[1]
    side = math.isqrt(rows - 1)
    if side * side + 1 != rows:
        raise UserError(
            f"{tensors.path}: pos_embed has {rows} rows, not one more than a square (the class token, then patches)"
        )
    count, assumed = head_count(width, heads, DINO_VITB16.heads, where)
    config = replace(
        DINO_VITB16,
        image=tuple(side * p for p in patch),
        patch=tuple(patch),
        channels=channels,
        width=width,
        layers=shapes.layers("blocks."),
        heads=count,
        mlp=shapes("blocks.0.mlp.fc1.weight", 2)[0],
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
    )
    return FoundTower(config, tuple(assumed))


def _vit3d(config: dict[str, Any], where: str, tensors: TensorFolder | None, select: _Selection, heads: int) -> FoundTower:
    """M3D-LaMed's config.json holds the sizes of volume and patch, M3D-CLIP's all of them; the shapes know the rest."""
    for name, wanted in {"pos_embed": "perceptron", "spatial_dims": 3}.items():  # MONAI's names
        if config.get(name, wanted) != wanted:
            raise ConfigError(f"{name} is {config[name]!r}; {wanted!r} is supported")
    own = config.get("model_type") == "m3d_clip"  # elsewhere hidden_size is the language model's
    fields = {"hidden_size": "width", "num_layers": "layers", "mlp_dim": "mlp", "num_heads": "heads"}
    known = {ours: int(_number(config, name, where, 0)) for name, ours in fields.items() if own or ours == "heads"}
    assumed = []
    if tensors is not None:
        shapes = TowerShapes(tensors, "patch_embedding.position_embeddings", where)
        known["width"] = shapes("cls_token", 3)[-1]
        known |= {"layers": shapes.layers("blocks."), "mlp": shapes("blocks.0.mlp.linear1.weight", 2)[0]}
    for name in ("width", "layers", "mlp"):
        if not known.get(name):
            known[name] = getattr(VIT3D, name)
            assumed.append(name)
    if not known.get("heads"):
        known["heads"], more = head_count(known["width"], heads, VIT3D.heads, where)
        assumed += more
    if not select.layer < 0:
        raise ConfigError(f"the selected layer is {select.layer}; M3D's tower counts from the end (-1, -2, ...)")
    for ours, names in {"image": ("image_size", "img_size"), "patch": ("patch_size",)}.items():
        name = next((n for n in names if config.get(n) is not None), "")
        known[ours] = _sizes(config[name], 3, name, where) if name else getattr(VIT3D, ours)
        assumed += [] if name else [ours]
    if any(side % part for side, part in zip(known["image"], known["patch"], strict=True)):
        raise ConfigError(f"volumes of {known['image']} are no whole patches of {known['patch']}, which M3D's tower needs")
    channels = _number(config, "in_channels", where, _number(config, "image_channel", where, VIT3D.channels))
    sizes = replace(VIT3D, channels=channels, final_norm=select.layer == -1, select_layer=select.layer, **known)
    if tensors is not None:
        sizes = replace(sizes, qkv_bias="blocks.0.attn.qkv.bias" in shapes)
        _check_vit3d(sizes, shapes, where)
    return FoundTower(_selected(sizes, select, False), tuple(assumed))


def _check_vit3d(config: TowerConfig, shapes: TowerShapes, where: str) -> None:
    """The config's sizes against the shapes, which hold products of them."""
    positions, features = (
        shapes("patch_embedding.position_embeddings", 3)[1],
        shapes("patch_embedding.patch_embeddings.1.weight", 2)[1],
    )
    if (positions, features) != (math.prod(config.grid), config.patch_features):
        raise UserError(
            f"{where}: a volume of {config.image} in patches of {config.patch} has {math.prod(config.grid)} patches of "
            f"{config.patch_features} numbers, the tensors are for {positions} of {features}; correct image_size and patch_size"
        )


def text_encoder_config(config: dict[str, Any], where: str, tensors: TensorFolder | None, heads: int = 0) -> FoundText:
    """The text encoder that BERT's config.json describes; {}: that the tensors of M3D-CLIP or BERT describe."""
    if not config:
        return _text_from_shapes(tensors, where, heads)
    if config.get("model_type") != "bert":
        raise UserError(f"{where}: the text encoder {config.get('model_type')!r} is not supported; known is bert")
    for name, wanted in {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}.items():
        if config.get(name, wanted) != wanted:
            raise UserError(f"{where}: {name} is {config[name]!r}; {wanted!r} is supported")
    fields = {
        "vocab": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "positions": "max_position_embeddings",
        "types": "type_vocab_size",
    }
    return FoundText(TextEncoderConfig(**{k: _number(config, v, where, getattr(BERT_BASE, k)) for k, v in fields.items()}), ())


def _text_from_shapes(tensors: TensorFolder | None, where: str, heads: int) -> FoundText:
    if tensors is None:
        return FoundText(BERT_BASE, tuple(BERT_BASE.__dataclass_fields__))
    shapes = TowerShapes(tensors, "embeddings.word_embeddings.weight", where)
    vocab, width = shapes("embeddings.word_embeddings.weight", 2)
    count, assumed = head_count(width, heads, BERT_BASE.heads, where, "text encoder", "text.heads")
    config = replace(
        BERT_BASE,
        vocab=vocab,
        width=width,
        layers=shapes.layers("encoder.layer."),
        heads=count,
        mlp=shapes("encoder.layer.0.intermediate.dense.weight", 2)[0],
        positions=shapes("embeddings.position_embeddings.weight", 2)[0],
        types=shapes("embeddings.token_type_embeddings.weight", 2)[0],
    )
    return FoundText(config, (*assumed, "norm_eps"))
