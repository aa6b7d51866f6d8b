"""Published image towers and text encoders. A tower's files decide; these serve without them, and where files are silent."""

from jaxmed.model_config import TextEncoderConfig, TowerConfig

CLIP_L14_336 = TowerConfig(kind="clip")
CLIP_B32 = TowerConfig(kind="clip", image=(224, 224), patch=(32, 32), width=768, layers=12, heads=12, mlp=3072)
SIGLIP_SO400M_384 = TowerConfig(
    kind="siglip",
    image=(384, 384),
    patch=(14, 14),
    width=1152,
    layers=27,
    heads=16,
    mlp=4304,
    norm_eps=1e-6,
    activation="gelu_tanh",
    class_token=False,
    class_position=False,
    pre_norm=False,
    patch_bias=True,
)
VIT3D = TowerConfig(
    kind="vit3d",
    image=(32, 256, 256),
    patch=(4, 16, 16),
    channels=1,
    width=768,
    layers=12,
    heads=12,
    mlp=3072,
    activation="gelu",
    class_position=False,
    pre_norm=False,
    final_norm=True,
    patch_bias=True,
    qkv_bias=False,
    select_layer=-1,
)
"""M3D-CLIP's, which M3D-LaMed reads too."""
DINO_VITB16 = TowerConfig(
    kind="dino",
    image=(224, 224),
    patch=(16, 16),
    width=768,
    layers=12,
    heads=12,
    mlp=3072,
    norm_eps=1e-6,
    activation="gelu",
    pre_norm=False,
    final_norm=True,
    patch_bias=True,
    select_layer=-1,
    select_feature="cls",
)
"""SAMF's slice encoder, upstream named `dino_large`."""

BERT_BASE = TextEncoderConfig()
"""bert-base-uncased, as M3D-CLIP reads reports with it."""

TOWERS = {
    "clip_l14_336": CLIP_L14_336,
    "clip_b32": CLIP_B32,
    "siglip_so400m_384": SIGLIP_SO400M_384,
    "vit3d": VIT3D,
    "dino_vitb16": DINO_VITB16,
}
