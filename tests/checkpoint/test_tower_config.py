"""From config.json and shapes to a tower's fields: the published configs, transformers' spellings, silent and wrong files."""

import dataclasses
import math

import numpy as np
import pytest
from transformers import BertConfig, CLIPConfig, CLIPVisionConfig, LlavaConfig, SiglipConfig, SiglipVisionConfig

from jaxmed.checkpoint.hf_io import TensorFolder
from jaxmed.checkpoint.tower_config import text_encoder_config, tower_config
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX, text_encoder_rows, tower_rows
from jaxmed.errors import UserError
from jaxmed.model_config import TextEncoderConfig
from jaxmed.models.presets_towers import BERT_BASE, CLIP_B32, CLIP_L14_336, DINO_VITB16, SIGLIP_SO400M_384, VIT3D

L14 = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
)
SO400M = SiglipVisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14
)


def read(config, tensors=None, layer=-2, feature="patch", heads=0):
    return tower_config(config, "F/config.json", tensors, layer, feature, heads)


def folder_of(config, prefix=TOWER_PREFIX, without=()):
    """A folder with a tower's tensors: shapes alone count, so they are views of one zero."""
    d, f = config.width, config.mlp
    shapes = {"weight": {"fc1": (f, d), "linear1": (f, d), "fc2": (d, f), "linear2": (d, f), "qkv": (3 * d, d)}}
    arrays = {}
    for row in tower_rows(config, prefix):
        for name in row.names():
            module, _, end = name.rpartition(".")
            shape = shapes.get(end, {}).get(module.rpartition(".")[2], (d,))
            arrays[name] = np.broadcast_to(np.float32(0), shape)
    special = {
        "patch_embedding.weight": (d, config.channels, *config.patch),
        "proj.weight": (d, config.channels, *config.patch),
        "patch_embeddings.1.weight": (d, config.patch_features),
        "position_embedding.weight": (math.prod(config.grid) + config.class_position, d),
        "pos_embed": (1, math.prod(config.grid) + 1, d),
        "position_embeddings": (1, math.prod(config.grid), d),
        "cls_token": (1, 1, d),
    }
    for name in arrays:
        end = next((e for e in special if f".{name}".endswith(f".{e}")), "")
        if end and "attn" not in name:
            arrays[name] = np.broadcast_to(np.float32(0), special[end])
    arrays = {name: array for name, array in arrays.items() if name.removeprefix(prefix) not in without}
    return TensorFolder("F", arrays, dict.fromkeys(arrays, "model.safetensors"))


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (L14.to_dict(), CLIP_L14_336),
        (CLIPConfig(vision_config=L14.to_dict()).to_dict(), CLIP_L14_336),
        (LlavaConfig(vision_config=L14).to_dict(), CLIP_L14_336),
        ({"model_type": "clip_vision_model"}, CLIP_B32),  # saved configs leave out what is transformers' default
        (SO400M.to_dict(), SIGLIP_SO400M_384),
        (SiglipConfig(vision_config=SO400M.to_dict()).to_dict(), SIGLIP_SO400M_384),
        (LlavaConfig(vision_config=SO400M).to_dict(), SIGLIP_SO400M_384),
    ],
)
def test_published_configs_are_the_presets(config, preset):
    found = read(config)
    assert (found.config, found.assumed) == (preset, ())


def test_siglip_of_its_own_folder_ignores_the_selected_layer():
    assert read(SO400M.to_dict(), layer=-1, feature="cls_patch").config == SIGLIP_SO400M_384
    contrastive = SiglipConfig(vision_config=SO400M.to_dict()).to_dict()  # as Google publishes it, the text's half beside it
    assert read(contrastive, layer=-3).config == SIGLIP_SO400M_384
    whole = read(LlavaConfig(vision_config=SO400M).to_dict(), layer=-1, feature="full").config
    assert whole == dataclasses.replace(SIGLIP_SO400M_384, select_layer=-1)
    with pytest.raises(UserError, match="drops the first token, a patch in SigLIP"):
        read(LlavaConfig(vision_config=SO400M).to_dict(), feature="default")


@pytest.mark.parametrize(
    ("layer", "feature", "selected"),
    [(-1, "patch", (-1, "patch")), (23, "default", (-2, "patch")), (-5, "full", (-5, "cls_patch")), (1, "cls", (-24, "cls"))],
)
def test_layers_and_features_in_upstreams_and_transformers_words(layer, feature, selected):
    config = read(L14.to_dict(), layer=layer, feature=feature).config
    assert (config.select_layer, config.select_feature) == selected


def test_activations_and_sizes_are_read():
    config = {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "image_size": [30, 44],
        "patch_size": 7,
        "num_channels": 1,
    }
    found = read(config | {"layer_norm_eps": 3e-4, "num_attention_heads": 6}).config
    assert (found.activation, found.image, found.patch, found.channels) == ("gelu", (30, 44), (7, 7), 1)
    assert (found.norm_eps, found.heads) == (3e-4, 6)


def test_a_tower_inside_a_llava_folder_is_told_from_its_shapes():
    config = {"model_type": "llava_mistral", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096}
    found = read(config, folder_of(dataclasses.replace(CLIP_L14_336, select_layer=-1)))
    assert (found.config, found.assumed) == (CLIP_L14_336, ("heads", "image", "norm_eps", "activation"))
    tiny = {"model_type": "tiny_llava", "mm_vision_tower": "somewhere"}
    assert read(tiny, folder_of(SIGLIP_SO400M_384)).config == SIGLIP_SO400M_384  # 26 blocks in the file
    narrow = dataclasses.replace(SIGLIP_SO400M_384, width=24, heads=3, mlp=37, layers=3)
    found = read(tiny, folder_of(narrow), heads=3).config
    assert (found, found.image) == (narrow, (384, 384))  # 27 x 27 patches of 14 pixels leave 6 over


def test_vit3d_of_m3d_lamed_and_of_m3d_clip():
    lamed = {"model_type": "lamed_llama", "hidden_size": 4096, "vision_tower": "vit3d", "image_channel": 1}
    sizes = {"patch_size": [4, 16, 16], "image_size": [32, 256, 256]}
    assert read(lamed | sizes, folder_of(VIT3D), layer=-1).assumed == ("heads",)
    assert read(lamed | sizes, folder_of(VIT3D), layer=-1).config == VIT3D
    old = {"patch_size": [4, 16, 16], "img_size": [32, 256, 256]}
    assert read(lamed | old, None, layer=-1).config == VIT3D
    own = {"model_type": "m3d_clip", "hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 8, "in_channels": 1}
    found = read(own | old, folder_of(VIT3D, "vision_encoder."), layer=-1, feature="cls_patch")
    assert found.config == dataclasses.replace(VIT3D, heads=8, select_feature="cls_patch")
    assert found.assumed == ()
    early = read(lamed | sizes, folder_of(VIT3D), layer=-3).config
    assert (early.final_norm, early.blocks) == (False, 10)


def test_dino_is_told_from_its_shapes_alone():
    samf = {"model_type": "llava_phi3", "vision_tower": "dino_large", "image_size": [32, 256, 256], "patch_size": [4, 16, 16]}
    found = read(samf, folder_of(DINO_VITB16), feature="cls_patch")
    assert (found.config, found.assumed) == (DINO_VITB16, ("heads",))
    assert read({}, folder_of(DINO_VITB16, "")).config == DINO_VITB16  # the released file has no config
    wide = dataclasses.replace(DINO_VITB16, width=40, heads=5, layers=2, mlp=100)
    assert read(samf, folder_of(wide), heads=5).config == wide


def test_head_counts_that_no_file_says():
    """64 a head where the width allows it, else the published count, else nothing can be assumed."""
    samf = {"vision_tower": "dino_large"}
    widths = {64: 1, 36: 12, 640: 10}
    for width, heads in widths.items():
        assert read(samf, folder_of(dataclasses.replace(DINO_VITB16, width=width, heads=1))).config.heads == heads
    with pytest.raises(UserError, match="published 12 do not divide its width 40; give their number"):
        read(samf, folder_of(dataclasses.replace(DINO_VITB16, width=40, heads=1)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip2_vision_model"}, r"'siglip2_vision_model' is not supported.*nearest: siglip_vision_model"),
        ({"model_type": "clipseg"}, r"'clipseg' is not supported.*nearest: clip\)"),
        ({"model_type": "llava", "vision_config": {"model_type": "dinov2"}}, "'dinov2' is not supported"),
        ({"model_type": "lamed_llama", "vision_tower": "vit_3d"}, r"'vit_3d'.*nearest: vit3d\)"),
        ({"model_type": "m3d_clip", "pos_embed": "conv"}, r"config\.json: pos_embed is 'conv'; 'perceptron' is supported"),
        ({"model_type": "m3d_clip", "spatial_dims": 2}, "spatial_dims is 2; 3 is supported"),
        ({"model_type": "clip_vision_model", "hidden_act": "silu"}, "hidden_act is 'silu'; known are quick_gelu"),
        ({"model_type": "clip_vision_model", "hidden_size": 77}, "tower.width 77 is no multiple of tower.heads 12"),
        ({"model_type": "clip_vision_model", "hidden_size": "big"}, "hidden_size is 'big', a positive number is needed"),
        ({"model_type": "clip_vision_model", "image_size": [3, 3, 3]}, r"image_size is \[3, 3, 3\], 2 whole numbers"),
        ({"model_type": "clip_vision_model", "num_hidden_layers": 1}, "tower.select_layer is -2"),
        ({"model_type": "llava_llama", "mm_vision_tower": "x"}, "'llava_llama' is not supported"),
    ],
)
def test_configs_that_cannot_be_used(config, message):
    with pytest.raises(UserError, match=message) as error:
        read(config)
    assert str(error.value).startswith("F/config.json: ")


def test_shapes_against_the_config():
    lamed = {"vision_tower": "vit3d", "patch_size": [4, 16, 16], "image_size": [32, 256, 128]}
    with pytest.raises(UserError, match="has 1024 patches of 1024 numbers, the tensors are for 2048 of 1024"):
        read(lamed, folder_of(VIT3D), layer=-1)
    with pytest.raises(UserError, match="the selected layer is 3"):
        read(lamed, folder_of(VIT3D), layer=3)
    with pytest.raises(UserError, match=r"has no tensor patch_embed\.proj\.weight"):
        read({"vision_tower": "dino_large"}, folder_of(VIT3D))
    gone = folder_of(DINO_VITB16, without=("blocks.0.mlp.fc1.weight",))
    with pytest.raises(UserError, match="has no tensor"):
        read({"vision_tower": "dino_large"}, gone)


def test_text_encoders():
    assert text_encoder_config(BertConfig().to_dict(), "F", None).config == BERT_BASE
    with pytest.raises(UserError, match="text encoder 'roberta' is not supported"):
        text_encoder_config({"model_type": "roberta"}, "F", None)
    with pytest.raises(UserError, match="hidden_act is 'relu'"):
        text_encoder_config({"model_type": "bert", "hidden_act": "relu"}, "F", None)
    config = TextEncoderConfig(vocab=31, width=128, layers=3, heads=2, mlp=17, positions=9, types=3)
    names = [name for row in text_encoder_rows(config, "language_encoder.") for name in row.names()]
    sizes = {"word_embeddings": (31, 128), "position_embeddings": (9, 128), "token_type_embeddings": (3, 128)}
    arrays = {name: np.zeros(sizes.get(name.split(".")[-2], (17, 128)), np.float32) for name in names}
    found = text_encoder_config({}, "F", TensorFolder("F", arrays, dict.fromkeys(arrays, "f")))
    assert (found.config, found.assumed) == (config, ("heads", "norm_eps"))
