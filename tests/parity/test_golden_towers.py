"""Towers, text encoder and contrastive model against arrays of upstream's own code (M3D, SAMF, TinyLLaVA, LLaVA-Med), from
upstream's files: blocks, features, other input sizes, loss and gradients."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tower_pair import GOLDEN, RULES, at_root, filled, one_device, theirs

from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.tower_config import text_encoder_config, tower_config
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX, contrastive_rows, surplus_reason, text_surplus_reason, tower_rows
from jaxmed.config import PixelConfig
from jaxmed.data.images import SIGLIP_MEAN, SIGLIP_SD, load_pixels
from jaxmed.data.slices import load_slices
from jaxmed.models.contrastive import Contrastive
from jaxmed.models.vit import Vit


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with jax.set_mesh(one_device()) as mesh:
        yield mesh


def read(*parts):
    with open(os.path.join(GOLDEN, *parts), encoding="utf-8") as file:
        return json.load(file)


def check(system, name, got):
    """As the case's own checker: strides, then tolerances."""
    case = next(c for c in read(system, "case.json")["checks"] if c["name"] == name)
    want = np.load(os.path.join(GOLDEN, system, case["golden"]), allow_pickle=False)
    got = np.asarray(got)
    if got.shape != want.shape:
        got = got[(..., *(slice(None, None, n) for n in case["stride"]))]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=case.get("rtol", 0), atol=case["atol"])


def loaded(system, folder, select_layer, select_feature, heads=0, prefix=TOWER_PREFIX):
    """(config, graphdef, params) of the tower in a folder"""
    path = os.path.join(GOLDEN, system, folder)
    tensors = open_folder(path)
    found = tower_config(read(system, folder, "config.json"), path, tensors, select_layer, select_feature, heads)
    named = dict(tensors.arrays)
    if not any(name.startswith(prefix) for name in named):
        named = {prefix + name: array for name, array in named.items()}
    config = found.config
    rows = at_root(tower_rows(config, prefix))
    unknown = {n for n in named if n.startswith(prefix)} - {n for row in rows for n in row.names()}
    assert all(surplus_reason(name, config, prefix) for name in unknown)
    return config, *filled(lambda: Vit(config, jax.random.key(0)), rows, named)


def run(graphdef, params, x):
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, RULES))(params, jnp.asarray(x)))


def volume(folder):
    path = os.path.join(GOLDEN, "vit3d", "data", "M3D_Cap_npy", "ct_case", folder)
    (name,) = (n for n in os.listdir(path) if n.endswith(".npy"))
    return np.moveaxis(np.load(os.path.join(path, name), allow_pickle=False), 0, -1)


def test_m3d_volumes_give_upstreams_blocks_and_features():
    config, graphdef, params = loaded("vit3d", "lamed_merged", -1, "cls_patch", heads=3)
    assert config.grid == (4, 6, 7)
    x = jnp.asarray(np.stack([volume("013305"), volume("004217")]), jnp.float32)

    def outputs(params):
        tower = nnx.merge(graphdef, params)
        return tower.hidden_states(x, RULES), tower(x, RULES)

    blocks, last = jax.jit(outputs)(params)
    for i, h in enumerate(blocks):
        check("vit3d", f"vit_hidden_{i}", h)
    check("vit3d", "vit_last", last)
    check("vit3d", "image_features", last[:, 1:])


@pytest.mark.parametrize(("run_name", "heads"), [("samf", 5), ("ao2d", 0)])
def test_samf_slices_and_crops_give_upstreams_features(run_name, heads):
    """Crops of another size: the position table is resized. ao2d's one head is what 64 a head makes."""
    config, graphdef, params = loaded("samf", f"{run_name}_merged", -2, "patch", heads=heads)
    cases = read("samf", "case.json")["prompts"][run_name][:4]
    assert [case["id"] for case in cases] == [f"caption_{i}" for i in range(4)]
    slices = np.stack([load_slices(os.path.join(GOLDEN, "samf", case["image"])) for case in cases])
    x = np.repeat(slices.reshape(96, 224, 224, 1), 3, axis=-1)
    check("samf", f"slice_features_{run_name}", run(graphdef, params, x).reshape(4, 24, config.width))
    crops = np.repeat(slices[2][::6, 40:136, 64:128, None], 3, axis=-1)
    check("samf", f"dino_crop_{run_name}", run(graphdef, params, crops)[:, 0])


def test_siglip_images_give_upstreams_features():
    config, graphdef, params = loaded("tinyllava", "siglip_mini", -1, "cls_patch", prefix=TOWER_PREFIX)
    assert (config.layers, config.blocks, config.select_feature) == (5, 4, "patch")
    pixels = PixelConfig(aspect="pad", shortest=384, crop=0, mean=SIGLIP_MEAN, sd=SIGLIP_SD)
    names = ("gray_117x66", "rgba_70x93", "tall_88x139", "wide_452x301")
    x = [load_pixels(os.path.join(GOLDEN, "tinyllava", "images", f"{name}.png"), pixels) for name in names]
    for name, got in zip(names, run(graphdef, params, np.stack(x)), strict=True):
        check("tinyllava", f"image_features_{name}", got)


@pytest.mark.parametrize(("run_name", "layer"), [("full", -2), ("short", -3)])
def test_clip_images_give_upstreams_features(run_name, layer):
    _, graphdef, params = loaded("mistral_llava", "clip_small46", layer, "patch")
    settings = read("mistral_llava", "clip_small46", "preprocessor_config.json")
    mean, sd = tuple(settings["image_mean"]), tuple(settings["image_std"])
    pixels = PixelConfig(aspect="pad", shortest=50, crop=46, mean=mean, sd=sd, pad_grey=True)
    names = ("grey_52x67", "tall_79x41", "wide_37x88") if run_name == "full" else ("tall_79x41",)
    x = [load_pixels(os.path.join(GOLDEN, "mistral_llava", "images", f"{name}.png"), pixels) for name in names]
    for name, got in zip(names, run(graphdef, params, np.stack(x)), strict=True):
        check("mistral_llava", f"image_features_{name}_{run_name}", got)


def test_m3d_clip_gives_upstreams_features_loss_and_gradients():
    """The weights of bert_tiny, from before training, must not count: only its config does."""
    folder = os.path.join(GOLDEN, "vit3d", "m3d_clip")
    tensors = open_folder(folder)
    tower = tower_config(read("vit3d", "m3d_clip", "config.json"), folder, tensors, -1, "cls_patch")
    text = text_encoder_config(read("vit3d", "bert_tiny", "config.json"), folder, None)
    assert (tower.assumed, text.assumed) == ((), ())
    rows = contrastive_rows(tower.config, text.config)
    left = set(tensors.names()) - {name for row in rows for name in row.names()}
    assert left and all(text_surplus_reason(name) for name in left)
    graphdef, params = filled(lambda: Contrastive(tower.config, text.config, 30, jax.random.key(0)), rows, tensors.arrays)
    golden = read("vit3d", "golden", "clip.json")
    images = [path.split("/")[-2] for path in read("vit3d", "case.json")["runs"]["clip"]["images"]]
    volumes = jnp.asarray(np.stack([volume(name) for name in images]), jnp.float32)
    ids, mask = (jnp.asarray(golden[name], jnp.int32) for name in ("input_ids", "attention_mask"))

    def loss(params):
        model = nnx.merge(graphdef, params)
        image, text = model.encode_image(volumes, RULES), model.encode_text(ids, mask, RULES, jnp.float32)
        hidden = model.text(ids, mask, RULES, jnp.float32), model.tower(volumes, RULES)
        return model.loss(image[:, 0], text[:, 0], RULES), (*hidden, image, text)

    (value, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    bert, vit, image, text = (np.asarray(x) for x in outputs)
    check("vit3d", "clip_bert_last", bert[:2])
    check("vit3d", "clip_vit_last", vit[:2])
    check("vit3d", "clip_image_features_all_tokens", image[0])
    check("vit3d", "clip_text_features_all_tokens", text[-1])
    check("vit3d", "clip_image_features", image[:, 0])
    check("vit3d", "clip_text_features", text[:, 0])
    check("vit3d", "clip_similarity", image[:, 0] @ text[:, 0].T)
    for name in ("loss", "loss_gather"):
        np.testing.assert_allclose(value, golden[name], rtol=1e-5)
    named = theirs(rows, jax.device_get(grads))
    np.testing.assert_allclose(named["logit_scale"], golden["grad_logit_scale"], rtol=1e-3)
    for module in ("mm_vision_proj", "mm_language_proj"):
        np.testing.assert_allclose(np.linalg.norm(named[f"{module}.weight"]), golden[f"grad_norm_{module}"], rtol=1e-3)
    want = np.load(os.path.join(GOLDEN, "vit3d", "golden", "clip_grads.npz"), allow_pickle=False)
    for name in want.files:
        np.testing.assert_allclose(named[name], want[name], rtol=1e-3, atol=1e-5, err_msg=name)
