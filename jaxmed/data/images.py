"""From an image file to a tower's input, to the bit as CLIP's and SigLIP's image processors make it with Pillow.

RGB first, then padding to a square where the config says so, Pillow's bicubic resize of whole numbers, the square in the
middle, and per channel (value / 255 - mean) / sd: [H, W, 3] float32 with H = W = `PixelConfig.side`. What may surprise:
transparency is dropped, not blended; a greyscale file of 16 bits is scaled to 8, whatever its values; orientation tags of
cameras are not read; a file that is cut short is refused, where upstream fills up with grey.
"""

import os
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from jaxmed.config import PixelConfig
from jaxmed.errors import UserError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
"""Only those that Pillow decodes by itself; its EPS reader would start another program"""
MOST_PIXELS = 80_000_000
"""Of a file; a larger one is more likely to be made for exhausting memory than by a scanner"""
SIGLIP_MEAN = SIGLIP_SD = (0.5, 0.5, 0.5)
BICUBIC = int(Image.Resampling.BICUBIC)
RESCALE = 1 / 255
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
"""Greyscale of more than 8 bits, as Pillow names it"""
# What Pillow raises at damaged files, plugin by plugin; the last is its warning where warnings are made errors.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError)
DAMAGE += (NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_pixels(source: str | os.PathLike | np.ndarray, config: PixelConfig) -> np.ndarray:
    """A file, or its pixels as uint8, [H, W] greyscale or [H, W, 3] RGB -> [side, side, 3] float32."""
    if isinstance(source, np.ndarray):
        name, image = "an image array", _from_array(source)
    else:
        name = os.fspath(source)
        image = _decoded(name)
    size = _resized_size(image.size, config, name)
    image = _square(image, config) if config.aspect == "pad" else _rgb(image)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    return _table(config)[_middle(pixels, config.side, name), np.arange(3)]


def _resized_size(size: tuple[int, int], config: PixelConfig, name: str) -> tuple[int, int]:
    """(width, height) that `size` becomes; UserError where that, or padding before it, would fill the memory."""
    width, height = size
    shorter, longer = min(size), max(size)
    resized = (config.shortest, config.shortest)
    if config.aspect == "crop":
        resized = tuple(config.shortest if n == shorter else int(config.shortest * n / shorter) for n in size)
    if longer**2 * (config.aspect == "pad") > MOST_PIXELS or resized[0] * resized[1] > MOST_PIXELS:
        raise UserError(f"{name}: {width} x {height} pixels are too narrow a strip to be made a square; cut the image")
    return resized


def load_grey(path: str) -> np.ndarray:
    """[H, W]: an image file in grey, uint16 where it holds grey of more than 8 bits, else uint8, colours weighted as Pillow
    weights them."""
    image = _decoded(path, deep=True)
    return np.asarray(image, np.uint16) if image.mode in DEEP_MODES else np.asarray(image.convert("L"))


def image_size(path: str) -> tuple[int, int]:
    """(H, W) as the head of the file says."""
    with _open(path) as image:
        return image.size[1], image.size[0]


def header_problem(path: str) -> str:
    """What the head of a file says against it, "" if nothing does. Its pixels are not decoded."""
    try:
        _open(path).close()
    except UserError as error:
        return str(error)
    return ""


def _open(path: str) -> Image.Image:
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the folder of the images") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; an image file is needed") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image file that is read here ({', '.join(FORMATS)}); save it as PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than {MOST_PIXELS:,} pixels; make the image smaller") from None
    except DAMAGE as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file again") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise UserError(f"{path}: {width} x {height} pixels, more than {MOST_PIXELS:,}; make the image smaller")
    return image


def _decoded(path: str, deep: bool = False) -> Image.Image:
    """Every pixel must be there: upstream fills what a cut file lacks with grey and trains on it. `deep`: more than 8 bits of
    grey stay."""
    with _open(path) as image:
        try:
            image.load()
        except DAMAGE as error:
            what = "is cut short" if "truncated" in str(error) else f"is damaged ({error})"
            raise UserError(f"{path}: the image {what}; copy the file again") from None
        if image.mode not in (*DEEP_MODES, "F"):
            return image.copy()
        _check_levels(image, path)
        return image.copy() if deep else _eight_bits(image)


def _check_levels(image: Image.Image, path: str) -> None:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"{path}: holds {values.dtype} from {values.min()} to {values.max()}; save it with 8 or 16 bits a pixel"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise UserError(f"an image array has shape {array.shape} and dtype {array.dtype}; uint8 [H, W] or [H, W, 3] is needed")
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _square(image: Image.Image, config: PixelConfig) -> Image.Image:
    """RGB in the middle of a square of the mean colour, the odd pixel of the margin below or to the right."""
    grey = config.pad_grey and image.mode == "L"
    image = image if grey else _rgb(image)
    width, height = image.size
    side = max(width, height)
    if width == height:
        return _rgb(image)
    colour = int(255 * sum(config.mean) / 3) if grey else tuple(int(255 * mean) for mean in config.mean)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return _rgb(square)


def _middle(pixels: np.ndarray, side: int, name: str) -> np.ndarray:
    """[H, W, 3] -> [side, side, 3]"""
    height, width = pixels.shape[:2]
    if min(height, width) < side:
        raise UserError(
            f"{name}: {side} pixels cannot be cut from {height} x {width}; set visual.pixels.crop to a smaller side"
        )
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _table(config: PixelConfig) -> np.ndarray:
    """[256, 3] float32: what each value of each channel becomes, in the processors' own order of roundings."""
    scaled = (np.arange(256, dtype=np.float64) * RESCALE).astype(np.float32)
    return (scaled[:, None] - np.array(config.mean, np.float32)) / np.array(config.sd, np.float32)


# -- what a folder says ----------------------------------------------------------------------------------------------------


def pixel_config(preprocessor: dict[str, Any], where: str, image_size: int, aspect: str) -> PixelConfig:
    """From a tower folder's preprocessor_config.json.

    `aspect`: the model's `image_aspect_ratio`, `pad` or, where the config has none, "" (what the processor does by itself:
    transformers' own processor of Llava can pad). `image_size`: the tower's, which the pixels must have. `where`: the file,
    for messages.
    """
    shortest, square = _resized(preprocessor, where)
    crop = 0
    if _switch(preprocessor, "do_center_crop", where):
        crop = _side(preprocessor.get("crop_size", image_size), "crop_size", where)
    if preprocessor.get("do_pad") and str(preprocessor.get("image_processor_type")).startswith("Llava"):
        aspect, preprocessor = "pad", {**preprocessor, "do_pad": False}
    mean, sd = (_three(preprocessor, name, where) for name in ("image_mean", "image_std"))
    resample, factor = preprocessor.get("resample", BICUBIC), preprocessor.get("rescale_factor", RESCALE)
    if resample != BICUBIC:
        raise UserError(f"{where}: resample is {resample}; only {BICUBIC} (bicubic) is known")
    if not isinstance(factor, int | float) or abs(factor - RESCALE) > 1e-9:
        raise UserError(f"{where}: rescale_factor is {factor}; only 1/255 is known")
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if preprocessor.get(name, True) is not True]
    on = [name for name in ("do_pad", "do_reduce_labels", "do_flip_channel_order") if preprocessor.get(name)]
    if off or on:
        wrong = [f"{name} is {preprocessor[name]}" for name in (*off, *on)]
        raise UserError(f"{where}: {', '.join(wrong)}; images prepared in that way are not known here")
    config = PixelConfig(_aspect(aspect, square, where), shortest, crop, mean, sd)
    if crop > shortest:
        raise UserError(f"{where}: crop_size {crop} is more than the {shortest} pixels that it is cut from")
    if config.side != image_size:
        raise UserError(
            f"{where}: makes images of {config.side} pixels a side, the tower's config.json has image_size {image_size}"
        )
    return config


def default_pixels(kind: str, image_size: int, aspect: str) -> PixelConfig:
    """Where a tower folder has no preprocessor_config.json: published settings of `clip` or `siglip` at the tower's size."""
    if kind == "siglip":
        return PixelConfig(_aspect(aspect, True, kind), image_size, 0, SIGLIP_MEAN, SIGLIP_SD)
    return PixelConfig(_aspect(aspect, False, kind), image_size, image_size)


def _aspect(aspect: str, square: bool, where: str) -> str:
    known = {"pad": "pad", "": "squash" if square else "crop", "square": "squash" if square else "crop"}
    known |= {"crop": "crop", "squash": "squash"}
    if aspect not in known:
        raise UserError(f"{where}: image_aspect_ratio is {aspect!r}; known are pad, square and none at all")
    return known[aspect]


def _resized(preprocessor: dict[str, Any], where: str) -> tuple[int, bool]:
    """Side after resizing, and whether both sides get it."""
    size = preprocessor.get("size")
    if isinstance(size, dict) and "shortest_edge" not in size:
        return _side(size, "size", where), True
    if isinstance(size, dict):
        size = size["shortest_edge"]
    return _side(size, "size", where), False


def _side(size: Any, name: str, where: str) -> int:
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        size = size.get("height")
    if type(size) is not int or size < 1:
        raise UserError(
            f"{where}: {name} is {size!r}; a side in pixels is needed (a square's height and width, or shortest_edge)"
        )
    return size


def _switch(preprocessor: dict[str, Any], name: str, where: str) -> bool:
    value = preprocessor.get(name, "crop_size" in preprocessor)
    if value not in (True, False, None):
        raise UserError(f"{where}: {name} is {value!r}; true or false is needed")
    return bool(value)


def _three(preprocessor: dict[str, Any], name: str, where: str) -> tuple[float, float, float]:
    values = preprocessor.get(name)
    numbers = isinstance(values, list | tuple) and len(values) == 3 and all(type(v) in (int, float) for v in values)
    if not numbers or (name == "image_std" and min(values) <= 0):
        raise UserError(f"{where}: {name} is {values!r}; three numbers are needed" + ", above 0" * (name == "image_std"))
    return tuple(float(v) for v in values)
