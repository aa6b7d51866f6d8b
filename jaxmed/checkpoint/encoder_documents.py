"""config.json (and what else is JSON) of towers and of M3D-CLIP, as others read them.

What the source says is kept as it stands there; only what the export changes is set.
"""

from typing import Any

from jaxmed.checkpoint.encoder_folders import EncoderFolder, text_folder
from jaxmed.checkpoint.export_documents import Document, preprocessor, vision_config
from jaxmed.checkpoint.folder_parts import json_of
from jaxmed.model_config import TextEncoderConfig
from jaxmed.models.presets_towers import BERT_BASE

TEXT_ENCODER = "text_encoder"
"""Folder with the text encoder's settings in an M3D-CLIP folder, where no published model has them"""
_CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def tower_documents(part: EncoderFolder, head: bool, dtype: str) -> dict[str, Document]:
    """`head`: whether SigLIP's pooling head is written. ViT3D and DINO have no config.json upstream: ours says their sizes."""
    tower = part.tower
    if tower.kind not in _CLASSES:
        name = "vit3d" if tower.kind == "vit3d" else "dino_vitb16"
        sizes = {"image_size": list(tower.image), "patch_size": list(tower.patch), "num_heads": tower.heads}
        return {"config.json": {"vision_tower": name, **sizes, "image_channel": tower.channels}}
    own = part.settings.get("model_type") == f"{tower.kind}_vision_model"
    config = dict(part.settings) if own else vision_config(tower, tower.layers, head)
    config |= {"architectures": [_CLASSES[tower.kind]], "dtype" if "dtype" in config else "torch_dtype": dtype}
    if tower.kind == "siglip" and not head:
        config["vision_use_head"] = False
    pixels = {name: value for name, value in preprocessor(part.visual.pixels).items() if name != "processor_class"}
    return {"config.json": config, "preprocessor_config.json": pixels}


def m3d_clip_documents(part: EncoderFolder, dtype: str) -> tuple[dict[str, Document], list[str]]:
    """(JSON files, what to say of them). The text encoder's sizes are in the folder that config.json names."""
    config = dict(part.settings) or _m3d_clip_config(part)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    named = config.get("language_model_name_or_path") or ""
    found = text_folder(part.path, part.settings)
    if part.run:
        settings = {} if named != TEXT_ENCODER else bert_config(part.text)
    else:
        settings = json_of(found) if named in found and "/" not in named else {}
    if not settings:
        return {"config.json": config}, []
    note = f"config.json names the text encoder's folder {named}: its settings go along, upstream's code asks for its weights"
    return {"config.json": config, f"{named}/config.json": settings}, [note]


def _m3d_clip_config(part: EncoderFolder) -> dict[str, Any]:
    tower = part.tower
    return {
        "architectures": ["M3DCLIP"],
        "model_type": "m3d_clip",
        "dropout_rate": 0.0,
        "gather_loss": True,
        "hidden_size": tower.width,
        "img_size": list(tower.image),
        "in_channels": tower.channels,
        "language_model_name_or_path": "bert-base-uncased" if part.text == BERT_BASE else TEXT_ENCODER,
        "local_loss": False,
        "max_text_len": part.text.positions,
        "mlp_dim": tower.mlp,
        "num_heads": tower.heads,
        "num_layers": tower.layers,
        "patch_size": list(tower.patch),
        "pos_embed": "perceptron",
        "spatial_dims": 3,
        "vocab_size": part.text.vocab,
    }


def bert_config(text: TextEncoderConfig) -> Document:
    """As transformers has it."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "layer_norm_eps": text.norm_eps,
        "max_position_embeddings": text.positions,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "type_vocab_size": text.types,
        "vocab_size": text.vocab,
    }
