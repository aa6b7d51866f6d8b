"""The tables of towers, BERT and M3D-CLIP: every tensor of the published models by name and shape, both ways to the bit."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from jaxmed.checkpoint.hf_io import TensorFolder
from jaxmed.checkpoint.load import named_arrays, read_params
from jaxmed.checkpoint.tower_tables import (
    M3D_IMAGE_PREFIX,
    M3D_TEXT_PREFIX,
    TOWER_PREFIX,
    contrastive_rows,
    surplus_reason,
    text_encoder_rows,
    text_surplus_reason,
    tower_rows,
)
from jaxmed.model_config import TextEncoderConfig, TowerConfig
from jaxmed.models.contrastive import Contrastive
from jaxmed.models.presets_towers import BERT_BASE, CLIP_B32, CLIP_L14_336, DINO_VITB16, SIGLIP_SO400M_384, VIT3D
from jaxmed.models.text_encoder import TextEncoder
from jaxmed.models.vit import Vit

HF_PREFIX = f"{TOWER_PREFIX}vision_model."


def hf_shapes(model_class, config, prefix=HF_PREFIX):
    with torch.device("meta"):
        model = model_class(config)
    return {prefix + name: tuple(p.shape) for name, p in model.named_parameters()}


def clip_shapes(c: TowerConfig):
    sizes = {"hidden_size": c.width, "intermediate_size": c.mlp, "num_hidden_layers": c.layers, "num_attention_heads": c.heads}
    return hf_shapes(CLIPVisionModel, CLIPVisionConfig(image_size=c.image[0], patch_size=c.patch[0], **sizes))


def siglip_shapes(c: TowerConfig, layers: int, head: bool):
    sizes = {"hidden_size": c.width, "intermediate_size": c.mlp, "num_hidden_layers": layers, "num_attention_heads": c.heads}
    config = SiglipVisionConfig(image_size=c.image[0], patch_size=c.patch[0], vision_use_head=head, **sizes)
    return hf_shapes(SiglipVisionModel, config)


def block_shapes(c: TowerConfig, out: str, up: str, down: str):
    """The names of timm's ViT, as DINO and M3D have them."""
    d, shapes = c.width, {}
    for i in range(c.layers):
        block = {"norm1": (d,), "norm2": (d,), f"attn.{out}": (d, d), f"mlp.{up}": (c.mlp, d), f"mlp.{down}": (d, c.mlp)}
        for name, shape in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * d, d)
        if c.qkv_bias:
            shapes[f"blocks.{i}.attn.qkv.bias"] = (3 * d,)
    return shapes | {"norm.weight": (d,), "norm.bias": (d,), "cls_token": (1, 1, d)}


def vit3d_shapes(c: TowerConfig, prefix=TOWER_PREFIX):
    shapes = block_shapes(c, "out_proj", "linear1", "linear2")
    stem = "patch_embedding."
    shapes |= {f"{stem}position_embeddings": (1, math.prod(c.grid), c.width), f"{stem}patch_embeddings.1.bias": (c.width,)}
    shapes[f"{stem}patch_embeddings.1.weight"] = (c.width, math.prod(c.patch) * c.channels)
    return {prefix + name: shape for name, shape in shapes.items()}


def dino_shapes(c: TowerConfig):
    shapes = block_shapes(c, "proj", "fc1", "fc2")
    shapes |= {"pos_embed": (1, 1 + math.prod(c.grid), c.width), "patch_embed.proj.bias": (c.width,)}
    shapes["patch_embed.proj.weight"] = (c.width, c.channels, *c.patch)
    return {TOWER_PREFIX + name: shape for name, shape in shapes.items()}


def bert_shapes(c: TextEncoderConfig, prefix=M3D_TEXT_PREFIX):
    sizes = {"hidden_size": c.width, "intermediate_size": c.mlp, "num_hidden_layers": c.layers, "num_attention_heads": c.heads}
    config = BertConfig(vocab_size=c.vocab, max_position_embeddings=c.positions, type_vocab_size=c.types, **sizes)
    return hf_shapes(BertModel, config, prefix)


def m3d_clip_shapes(tower: TowerConfig, text: TextEncoderConfig, features: int):
    shapes = vit3d_shapes(tower, M3D_IMAGE_PREFIX) | bert_shapes(text) | {"logit_scale": ()}
    for name, width in (("mm_vision_proj", tower.width), ("mm_language_proj", text.width)):
        shapes |= {f"{name}.weight": (features, width), f"{name}.bias": (features,)}
    return shapes


def abstract(make, root=""):
    """Our parameters as shapes, under `root` where the table has one."""
    state = nnx.to_pure_dict(nnx.split(jax.eval_shape(make))[1])
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return {root: state} if root else state


def tower_tree(config):
    return abstract(lambda: Vit(config, jax.random.key(0)), "tower")


def size(shapes):
    return sum(math.prod(shape) for shape in shapes)


def check_fits(rows, shapes, tree):
    """Every row's tensors exist and fit, and every parameter of ours has a row. Returns the tensors without a row."""
    left, paths = dict(shapes), set()
    for row in rows:
        leaf = tree
        for key in row.ours:
            leaf = leaf if key == "{layer}" else leaf[key]
        ours = leaf.shape[1:] if row.layers else leaf.shape
        assert not row.layers or leaf.shape[0] == row.layers
        paths.add(tuple(key for key in row.ours if key != "{layer}"))
        for name in row.names():
            assert row.transform.fits(shapes[name], ours), (name, shapes[name], ours)
            left.pop(name, None)
    assert len(paths) == len(jax.tree.leaves(tree))
    return left


@pytest.mark.parametrize(
    ("config", "shapes", "theirs", "ours", "tensors"),
    [
        (CLIP_L14_336, clip_shapes, 303_507_456, 290_909_184, 391),
        (CLIP_B32, clip_shapes, 87_456_000, 80_366_592, 199),
        (SIGLIP_SO400M_384, lambda c: siglip_shapes(c, 26, False), 397_747_744, 397_745_440, 421),
        (VIT3D, vit3d_shapes, 87_389_184, 87_389_184, 138),
        (DINO_VITB16, dino_shapes, 85_798_656, 85_798_656, 150),
    ],
)
def test_published_towers(config, shapes, theirs, ours, tensors):
    """The parameters that upstream counts, and those that are kept."""
    shapes, tree = shapes(config), tower_tree(config)
    left = check_fits(tower_rows(config), shapes, tree)
    assert (len(shapes), size(shapes.values())) == (tensors, theirs)
    assert size(leaf.shape for leaf in jax.tree.leaves(tree)) == ours == theirs - size(left.values())
    assert all(surplus_reason(name, config) for name in left)
    assert not any(surplus_reason(name, config) for row in tower_rows(config) for name in row.names())


def test_siglip_sources_of_26_and_of_27_layers_fit():
    """Google's file has the last block and the pooling head, TinyLLaVA's neither."""
    rows, tree = tower_rows(SIGLIP_SO400M_384), tower_tree(SIGLIP_SO400M_384)
    left = check_fits(rows, siglip_shapes(SIGLIP_SO400M_384, 27, True), tree)
    assert len(left) == 16 + 2 + 11
    assert all(surplus_reason(name, SIGLIP_SO400M_384) for name in left)
    assert len(check_fits(rows, siglip_shapes(SIGLIP_SO400M_384, 26, False), tree)) == 2


def test_published_m3d_clip():
    tower = dataclasses.replace(VIT3D, select_feature="cls_patch")
    shapes = m3d_clip_shapes(tower, BERT_BASE, 768)
    tree = abstract(lambda: Contrastive(tower, BERT_BASE, 768, jax.random.key(0)))
    left = check_fits(contrastive_rows(tower, BERT_BASE), shapes, tree)
    assert len(shapes) == 342
    assert sorted(left) == ["language_encoder.pooler.dense.bias", "language_encoder.pooler.dense.weight"]
    assert all(text_surplus_reason(name) for name in left)


TINY_TEXT = TextEncoderConfig(vocab=31, width=12, layers=2, heads=3, mlp=17, norm_eps=1e-3, positions=9, types=2)
TINY = {
    "clip": dataclasses.replace(CLIP_B32, image=(11, 15), patch=(5, 3), width=12, layers=3, heads=3, mlp=17, channels=2),
    "siglip": dataclasses.replace(SIGLIP_SO400M_384, image=(9, 9), patch=(4, 4), width=12, layers=3, heads=3, mlp=17),
    "vit3d": dataclasses.replace(VIT3D, image=(4, 6, 5), patch=(2, 3, 5), width=12, layers=3, heads=3, mlp=17, channels=2),
    "dino": dataclasses.replace(DINO_VITB16, image=(9, 9), patch=(4, 4), width=12, layers=2, heads=3, mlp=17),
}


def both_ways(rows, tree):
    """Random tensors of theirs, read into our tree and named again."""
    rng = np.random.default_rng(4)
    start = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)
    theirs = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in named_arrays(start, rows).items()}
    ours = read_params(rows, [TensorFolder("memory", theirs, dict.fromkeys(theirs, "file"))], tree)
    again = named_arrays(ours, rows)
    assert again.keys() == theirs.keys() == {name for row in rows for name in row.names()}
    for name, array in theirs.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    return theirs, ours


@pytest.mark.parametrize("name", TINY)
def test_towers_go_both_ways_to_the_bit(name):
    both_ways(tower_rows(TINY[name]), tower_tree(TINY[name]))


def test_m3d_clip_goes_both_ways_to_the_bit():
    tower = dataclasses.replace(TINY["vit3d"], select_feature="cls_patch")
    tree = abstract(lambda: Contrastive(tower, TINY_TEXT, 7, jax.random.key(0)))
    both_ways(contrastive_rows(tower, TINY_TEXT), tree)


def test_bert_of_its_own_folder_goes_both_ways_to_the_bit():
    tree = abstract(lambda: TextEncoder(TINY_TEXT, jax.random.key(0)), "text")
    theirs, _ = both_ways(text_encoder_rows(TINY_TEXT, "bert."), tree)
    assert theirs.keys() == bert_shapes(TINY_TEXT, "bert.").keys() - {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_fused_rows_and_kernels_lie_where_the_specs_say():
    theirs, ours = both_ways(tower_rows(TINY["dino"]), tower_tree(TINY["dino"]))
    fused = theirs[f"{TOWER_PREFIX}blocks.1.attn.qkv.weight"].reshape(3, 12, 12)  # (qkv, head and dim, in)
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(ours["tower"]["blocks"]["attn"][name]["weight"][1], fused[i])
    kernel = theirs[f"{TOWER_PREFIX}patch_embed.proj.weight"]  # [D, C, rows, columns]
    patch = np.asarray(ours["tower"]["patch"]["weight"]).reshape(12, 4, 4, 3)
    np.testing.assert_array_equal(patch[5, 1, 2, 0], kernel[5, 0, 1, 2])


@pytest.mark.parametrize(
    ("name", "kind", "known"),
    [
        (f"{HF_PREFIX}post_layernorm.weight", "clip", True),
        (f"{HF_PREFIX}encoder.layers.2.mlp.fc1.bias", "clip", True),
        (f"{HF_PREFIX}encoder.layers.1.mlp.fc1.bias", "clip", False),  # it is needed
        (f"{HF_PREFIX}encoder.layers.3.mlp.fc1.bias", "clip", False),  # the config has three layers
        (f"{HF_PREFIX}encoder.layers.2.mlp.fc3.bias", "clip", False),
        (f"{HF_PREFIX}head.probe", "clip", False),
        (f"{HF_PREFIX}head.probe", "siglip", True),
        (f"{HF_PREFIX}head.attention.in_proj_bias", "siglip", True),
        (f"{HF_PREFIX}head.attention.q_proj.weight", "siglip", False),
        (f"{HF_PREFIX}embeddings.position_ids", "siglip", True),
        ("vision_model.post_layernorm.weight", "clip", False),  # not a canonical name
        (f"{TOWER_PREFIX}norm.weight", "vit3d", False),
        (f"{TOWER_PREFIX}norm.weight", "vit3d_early", True),
        (f"{TOWER_PREFIX}blocks.2.attn.qkv.weight", "vit3d_early", True),
        (f"{TOWER_PREFIX}blocks.2.attn.qkv.bias", "vit3d_early", False),  # q, k and v have no bias
        (f"{TOWER_PREFIX}head.weight", "dino", False),
    ],
)
def test_what_is_left_out_is_known_by_name(name, kind, known):
    configs = TINY | {"vit3d_early": dataclasses.replace(TINY["vit3d"], select_layer=-2, final_norm=False)}
    assert bool(surplus_reason(name, configs[kind])) == known
