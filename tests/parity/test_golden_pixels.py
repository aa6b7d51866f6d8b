"""Pixels and slices against arrays of upstream's own code (LLaVA, LLaVA-Med, TinyLLaVA-Med-F, SAMF) and against
transformers' image processors."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from jaxmed.data.images import default_pixels, load_pixels, pixel_config
from jaxmed.data.slices import load_slices

GOLDEN = Path(__file__).parents[1] / "golden"


def checks(system, prefix):
    case = json.loads((GOLDEN / system / "case.json").read_text())
    found = {c["name"]: c for c in case["checks"] if c["name"].startswith(prefix)}
    assert found
    return found


def compare(system, check, array):
    """`array` has the golden's axes in full; the check says which of them are strided, from the last one backwards."""
    strided = array[(..., *(slice(None, None, step) for step in check["stride"]))]
    golden = np.load(GOLDEN / system / check["golden"])
    assert strided.shape == golden.shape and array.dtype == np.float32
    np.testing.assert_allclose(strided, golden, rtol=0, atol=check["atol"])


CLIP = checks("mistral_llava", "pixels_")
SIGLIP = checks("tinyllava", "pixels_")
SLICES = checks("samf", "slices_")


def clip_config(**changes):
    path = GOLDEN / "mistral_llava" / "clip_small46" / "preprocessor_config.json"
    return dataclasses.replace(pixel_config(json.loads(path.read_text()), str(path), 46, "pad"), **changes)


@pytest.mark.parametrize("name", CLIP)
def test_pixels_of_llava_med(name):
    """Evaluation pads greyscale in grey, training pads it in colour; without image_aspect_ratio nothing is padded."""
    image = name.removeprefix("pixels_").removeprefix("rgb_").removeprefix("crop_")
    aspect = "crop" if "crop_" in name else "pad"
    config = clip_config(aspect=aspect, pad_grey=name == "pixels_grey_52x67")
    pixels = load_pixels(GOLDEN / "mistral_llava" / "images" / f"{image}.png", config)
    compare("mistral_llava", CLIP[name], pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("name", SIGLIP)
def test_pixels_of_tinyllava(name):
    """A tower folder without preprocessor_config.json: SigLIP's own settings at its image_size."""
    tower = json.loads((GOLDEN / "tinyllava" / "siglip_mini" / "config.json").read_text())
    config = default_pixels("siglip", tower["image_size"], "pad")
    pixels = load_pixels(str(GOLDEN / "tinyllava" / "images" / f"{name.removeprefix('pixels_')}.png"), config)
    compare("tinyllava", SIGLIP[name], pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("name", SLICES)
def test_slices_of_samf(name):
    with open(GOLDEN / "samf" / "reports.csv", encoding="utf-8", newline="") as file:
        row = list(csv.DictReader(file))[int(name.removeprefix("slices_caption_"))]
    compare("samf", SLICES[name], load_slices(GOLDEN / "samf" / "data" / row["image"]))


PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 61}, crop_size={"height": 54, "width": 54}, image_std=[0.3, 0.2, 0.4]),
    "llava": LlavaImageProcessorPil(size={"shortest_edge": 61}, crop_size={"height": 54, "width": 54}, do_pad=True),
    "siglip": SiglipImageProcessorPil(size={"height": 54, "width": 54}),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(90, 47), (33, 170), (54, 54), (200, 211)])
def test_pixels_of_transformers_processors(name, shape):
    """By the settings that the processor itself would save."""
    array = np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = PROCESSORS[name]
    config = pixel_config(json.loads(processor.to_json_string()), name, 54, "")
    assert config.aspect == {"clip": "crop", "llava": "pad", "siglip": "squash"}[name]
    theirs = processor(images=Image.fromarray(array), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(load_pixels(array, config).transpose(2, 0, 1), theirs, rtol=0, atol=1e-6)
