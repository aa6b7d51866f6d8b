"""Image files as a tower's pixels: file formats, array inputs, processors' configs, bad files."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jaxmed.config import PixelConfig
from jaxmed.data import images
from jaxmed.data.images import default_pixels, header_problem, load_pixels, pixel_config
from jaxmed.errors import UserError

MEAN, SD = (0.31, 0.52, 0.44), (0.21, 0.27, 0.33)
PAD = PixelConfig("pad", 26, 22, MEAN, SD)
PREPROCESSOR = {
    "crop_size": {"height": 22, "width": 22},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(MEAN),
    "image_std": list(SD),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 26},
}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def expected(array, config):
    """As the processors do it, with Pillow: `array` [H, W, 3] is what is resized."""
    h, w = array.shape[:2]
    size = (26, int(26 * h / w)) if w <= h else (int(26 * w / h), 26)
    size = (26, 26) if config.aspect == "squash" else size
    resized = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - 22) // 2, (resized.shape[1] - 22) // 2
    values = resized[top : top + 22, left : left + 22].astype(np.float64) / 255
    return (values - np.array(MEAN)) / np.array(SD)


def padded(array, colour):
    h, w = array.shape[:2]
    side = max(h, w)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = colour
    top, left = (side - h) // 2, (side - w) // 2
    square[top : top + h, left : left + w] = array
    return square


@pytest.mark.parametrize("shape", [(31, 58), (57, 40), (45, 45), (9, 8)])
@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
def test_aspects(shape, aspect):
    array, config = noise(*shape, 3), dataclasses.replace(PAD, aspect=aspect)
    source = padded(array, [79, 132, 112]) if aspect == "pad" else array
    pixels = load_pixels(array, config)
    assert pixels.shape == (22, 22, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected(source, config), rtol=0, atol=1e-5)


def test_greyscale_is_padded_in_colour_or_in_grey():
    grey = noise(33, 60)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_pixels(grey, PAD), load_pixels(rgb, PAD))
    in_grey = load_pixels(grey, dataclasses.replace(PAD, pad_grey=True))
    np.testing.assert_allclose(in_grey, expected(padded(rgb, 107), PAD), rtol=0, atol=1e-5)  # int(255 * 0.42333)
    # Only greyscale files: RGB that happens to be grey keeps the colour.
    np.testing.assert_array_equal(load_pixels(rgb, dataclasses.replace(PAD, pad_grey=True)), load_pixels(rgb, PAD))


def modes(tmp_path):
    """(path, the RGB array that it stands for): transparency dropped, palettes looked up, 16 bits scaled."""
    rgb, alpha = noise(30, 41, 3), noise(30, 41, 1, seed=1)
    grey = noise(30, 41, seed=2)
    deep = np.random.default_rng(3).integers(0, 65536, (30, 41), dtype=np.uint16)
    palette = Image.fromarray(rgb).quantize(17)
    deep_rgb = np.repeat(np.rint(deep / 257).astype(np.uint8)[..., None], 3, axis=2)
    files = {
        "rgba.png": (Image.fromarray(np.concatenate([rgb, alpha], axis=2)), rgb),
        "la.png": (Image.fromarray(np.stack([grey, alpha[..., 0]], axis=2)), np.repeat(grey[..., None], 3, axis=2)),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "bilevel.png": (Image.fromarray(grey > 127), np.repeat(((grey > 127) * 255).astype(np.uint8)[..., None], 3, axis=2)),
        "deep.png": (Image.fromarray(deep), deep_rgb),
        "deep.tif": (Image.fromarray(deep), deep_rgb),
        "rgb.bmp": (Image.fromarray(rgb), rgb),
        "rgb.webp": (Image.fromarray(rgb), rgb),
    }
    for name, (image, array) in files.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        yield str(tmp_path / name), array


def test_modes_and_formats(tmp_path):
    for path, array in modes(tmp_path):
        np.testing.assert_array_equal(load_pixels(path, PAD), load_pixels(array, PAD), err_msg=path)
        assert header_problem(path) == ""


def test_a_jpeg_is_decoded_as_pillow_does(tmp_path):
    Image.fromarray(noise(50, 33, 3)).save(tmp_path / "x.jpg", quality=60)
    np.testing.assert_array_equal(
        load_pixels(tmp_path / "x.jpg", PAD), load_pixels(np.asarray(Image.open(tmp_path / "x.jpg").convert("RGB")), PAD)
    )


def encoded(form, shape=(40, 30, 3)):
    buffer = io.BytesIO()
    Image.fromarray(noise(*shape)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF"])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path, form):
    path = tmp_path / "cut"
    whole = encoded(form, (80, 60, 3))
    path.write_bytes(whole[: len(whole) * 4 // 5])
    with pytest.raises(UserError) as error:
        load_pixels(path, PAD)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "again" in str(error.value)


def test_damaged_files_never_end_in_another_error(tmp_path):
    path, rng = tmp_path / "damaged", np.random.default_rng(5)
    refused = 0
    for form in ("PNG", "JPEG", "GIF", "PPM"):
        whole = np.frombuffer(encoded(form), np.uint8)
        for _ in range(40):
            spoilt = whole.copy()
            spoilt[rng.integers(0, min(len(whole), 300), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(spoilt[: rng.integers(1, len(whole) + 1)].tobytes())
            header_problem(str(path))
            try:
                load_pixels(path, PAD)
            except UserError:
                refused += 1
    assert refused > 100


def test_bad_sources(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    Image.fromarray(noise(20, 20, 3).astype(np.float32)[..., 0]).save(tmp_path / "float.tif")
    for name, message in (
        ("text.png", "not an image file"),
        ("drawing.eps", "not an image file"),
        ("gone.png", "no such file"),
        (".", "is a folder"),
        ("float.tif", "float32"),
    ):
        with pytest.raises(UserError, match=message):
            load_pixels(tmp_path / name, PAD)
        assert (message in header_problem(str(tmp_path / name))) == (name != "float.tif")
    for array in (noise(4, 5, 4), noise(4, 5).astype(np.float32), noise(4), noise(0, 5)):
        with pytest.raises(UserError, match=r"uint8 \[H, W\] or \[H, W, 3\] is needed"):
            load_pixels(array, PAD)
    monkeypatch.setattr(images, "MOST_PIXELS", 2000)
    Image.fromarray(noise(50, 41)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large.png: 41 x 50 pixels, more than 2,000"):
        load_pixels(tmp_path / "large.png", PAD)
    assert "more than 2,000" in header_problem(str(tmp_path / "large.png"))
    for aspect in ("pad", "crop"):
        with pytest.raises(UserError, match="too narrow a strip"):
            load_pixels(noise(400, 2), dataclasses.replace(PAD, aspect=aspect))


def test_a_bomb_is_refused_by_its_head(tmp_path):
    """Pillow itself refuses at its own limit; here the file says 30000 x 30000."""
    whole = bytearray(encoded("BMP"))
    whole[18:26] = (30000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(whole)
    with pytest.raises(UserError, match=r"bomb\.bmp: more than 80,000,000 pixels"):
        load_pixels(tmp_path / "bomb.bmp", PAD)


def test_processor_configs():
    assert pixel_config(PREPROCESSOR, "p.json", 22, "pad") == PAD
    assert pixel_config(PREPROCESSOR | {"size": 26, "crop_size": 22}, "p.json", 22, "") == dataclasses.replace(
        PAD, aspect="crop"
    )
    llava = PREPROCESSOR | {"image_processor_type": "LlavaImageProcessorFast"}
    assert pixel_config(llava | {"do_pad": True}, "p.json", 22, "") == PAD
    assert pixel_config(llava | {"do_pad": False}, "p.json", 22, "").aspect == "crop"
    siglip = PREPROCESSOR | {"size": {"height": 22, "width": 22}, "do_center_crop": None}
    del siglip["crop_size"]
    assert pixel_config(siglip, "p.json", 22, "pad") == PixelConfig("pad", 22, 0, MEAN, SD)
    assert pixel_config(siglip, "p.json", 22, "").aspect == "squash"
    assert default_pixels("siglip", 98, "") == PixelConfig("squash", 98, 0, (0.5,) * 3, (0.5,) * 3)
    assert default_pixels("clip", 98, "pad") == PixelConfig("pad", 98, 98)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 2}, r"p.json: resample is 2; only 3 \(bicubic\)"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"do_resize": False, "do_pad": True}, "do_resize is False, do_pad is True"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"height": 22, "width": 23}}, "size is"),
        ({"size": {"longest_edge": 30}}, "size is"),
        ({"crop_size": {"height": 40, "width": 40}}, "crop_size 40 is more than the 26 pixels"),
        ({"crop_size": 21}, "makes images of 21 pixels a side.*image_size 22"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is"),
        ({"image_std": [0.5, 0.0, 0.5]}, "above 0"),
    ],
)
def test_processor_configs_that_are_not_known(change, message):
    with pytest.raises(UserError, match=message):
        pixel_config(PREPROCESSOR | change, "p.json", 22, "pad")
    with pytest.raises(UserError, match="image_aspect_ratio is 'anyres'"):
        pixel_config(PREPROCESSOR, "p.json", 22, "anyres")
