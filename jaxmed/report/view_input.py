"""An image file as the model that a config describes gets it, ready for the contact sheet.

a tower's input (visual.kind volumes, slices, pixels)   what `read_input` gives the tower
a NIfTI file and a config of BTB3D's kind               the canvas that `jaxmed encode` makes tokens of
a token file (.npz)                                     its tokens; there is no picture of them
"""

import os
from dataclasses import replace

import nibabel
import numpy as np

from jaxmed.config import EncodeConfig, PrepareConfig, VisualConfig
from jaxmed.data.embeddings import load_tokens, read_header
from jaxmed.data.hounsfield import Override
from jaxmed.data.inputs import read_input, read_prepared
from jaxmed.data.metadata import Metadata
from jaxmed.data.prepare import Frame, Prepared
from jaxmed.data.volumes import preprocess, read_volume
from jaxmed.report.view_planes import Grid, Seen

_FORMS = {"nifti": "NIfTI", "dicom": "a DICOM series", "slices": "a folder of slices"}
_WORDS = {"S": "head", "I": "feet", "A": "front", "P": "back", "L": "left", "R": "right"}


def numbers(values: tuple[float, ...], between: str = " × ") -> str:
    return between.join(f"{value:g}" for value in values).replace("-", "−")


def name_of(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def of_tower(path: str, visual: VisualConfig) -> tuple[Seen, np.ndarray]:
    """What a tower gets, and the same as an array [...] for it."""
    if visual.kind == "volumes":
        found = read_prepared(path, visual)
        return of_prepared(path, found, visual), found.values
    values = read_input(path, visual).values
    return (_pixels if visual.kind == "pixels" else _slices)(path, values, visual), values


def of_prepared(path: str, prepared: Prepared, visual: VisualConfig) -> Seen:
    values, frame, config = prepared.values[..., 0], prepared.frame, visual.prepare
    voxels = f"{numbers(values.shape)} voxels (depth D, rows H, columns W)"
    if frame.source == "prepared":
        window = (float(values.min()), float(values.max()))
        facts = (("As the model gets it", f"{voxels}, as the file has them: it was prepared before"),)
        ends = " to ".join(f"{end:.3g}" for end in window).replace("-", "−")
        facts += (("Window", f"values {ends} are drawn black to white"),)
        return Seen(name_of(path), values, window, facts, visual.grid, notices=prepared.notices)
    spacing = frame.spacing if all(frame.spacing) else ()
    unit = "grey levels" if frame.source == "slices" else "HU" if config.preset == "hu_window" else "HU by the header's scaling"
    interval = tuple(round(end, 2) for end in frame.interval)
    other = "" if frame.preset == config.preset else f" (always, for slices; the config says {config.preset})"
    facts = (
        ("In the file", f"{_FORMS[frame.source]}, {numbers(frame.shape)} voxels as D, H, W{_cropped(frame)}"),
        ("As the model gets it", voxels + (f" of {numbers(tuple(round(s, 2) for s in spacing))} mm" if spacing else "")),
        ("Preset", frame.preset + other),
        ("Window", f"{numbers(interval, ' to ')} {unit} become 0 to 1, drawn black to white"),
        ("Hounsfield rule", _rule(frame, config)),
        ("Orientation", _orientation(frame.axes)),
    )
    sides = tuple(frame.axes)
    return Seen(name_of(path), values, (0.0, 1.0), facts, visual.grid, spacing, sides, prepared.notices)


def _cropped(frame: Frame) -> str:
    whole = all(box == (0, length) for box, length in zip(frame.box, frame.shape, strict=True))
    return "" if whole else f", cut to the foreground {numbers(tuple(stop - start for start, stop in frame.box))}"


def _rule(frame: Frame, config: PrepareConfig) -> str:
    if frame.source == "slices":
        return "none: pictures have no Hounsfield units"
    return frame.reading + ("" if config.preset == "hu_window" else f"; {frame.preset} does not depend on it")


def _orientation(sides: str) -> str:
    if not sides:
        return "not known; shown as it is"
    return ", ".join(f"{axis} grows to the {_WORDS[side]}" for axis, side in zip("DHW", sides, strict=True))


def _pixels(path: str, values: np.ndarray, visual: VisualConfig) -> Seen:
    """[H, W, 3] normalised"""
    shown = values * np.array(visual.pixels.sd) + np.array(visual.pixels.mean)
    pixels = visual.pixels
    how = {"pad": "padded to a square", "crop": "the middle of it", "squash": "both sides resized alike"}[pixels.aspect]
    facts = (("As the model gets it", f"{numbers(values.shape[:2])} pixels ({how}, {pixels.side} a side)"),)
    return Seen(name_of(path), shown[None].astype(np.float32), (0.0, 1.0), facts, visual.grid, flat=True)


def _slices(path: str, values: np.ndarray, visual: VisualConfig) -> Seen:
    """[S, H, W] from 0 to 1"""
    same = visual.window[0] == visual.window[1]
    window = "intensities modulo 256, as SAMF was trained" if same else f"{numbers(visual.window, ' to ')} become 0 to 1"
    facts = (
        ("As the model gets it", f"{len(values)} slices of {numbers(values.shape[1:])} pixels, each by itself"),
        ("Window", window),
    )
    return Seen(name_of(path), values, (0.0, 1.0), facts, (len(values), 1, 1), flat=True)


def of_canvas(path: str, encode: EncodeConfig, metadata: Metadata | None, hu: Override, grid: Grid) -> Seen:
    """What BTB3D's encoders get: axes as in the file, whatever its orientation. `grid`: of the tokens that it becomes."""
    volume = read_volume(path, metadata.of(path) if metadata else None, hu)
    values = preprocess(volume, encode)
    # [D, H, W] are the file's axes 2, 0, 1
    codes = nibabel.aff2axcodes(nibabel.load(path).affine)
    sides = () if None in codes else (codes[2], codes[0], codes[1])
    spacing = (encode.spacing[2], encode.spacing[0], encode.spacing[1])
    reading = volume.reading
    scaling = "" if (reading.slope, reading.intercept) == (1, 0) else f" ({reading.slope:g} × stored {reading.intercept:+g})"
    facts = (
        ("In the file", f"{numbers(volume.stored.shape)} voxels of {numbers(volume.spacing)} mm"),
        ("As the model gets it", f"{numbers(values.shape)} voxels of {numbers(spacing)} mm (depth D, rows H, columns W)"),
        ("Window", f"{numbers(encode.hu_range, ' to ')} HU become −1 to 1, drawn black to white"),
        ("Hounsfield rule", reading.chosen + scaling.replace("-", "−")),
        ("Orientation", f"{_orientation(''.join(sides))}; axes as in the file, only this sheet turns them"),
    )
    first_alone = values.shape[0] % 8 == 1 and grid[0] == 1 + values.shape[0] // 8
    return Seen(name_of(path), values, (-1.0, 1.0), facts, grid, spacing, sides, first_alone=first_alone)


def of_tokens(path: str, visual: VisualConfig) -> tuple[Seen, np.ndarray]:
    """A token file: nothing to see but its tokens [N, C]."""
    tokens, grid = tokens_of(path, visual)
    facts = (("Tokens", f"{numbers(grid)} of {tokens.shape[1]} features"), ("Encoder", read_header(path).encoder or "unsigned"))
    return Seen(name_of(path), np.zeros((*grid, 0), np.float32), (0.0, 1.0), facts, grid), tokens


def tokens_of(path: str, visual: VisualConfig) -> tuple[np.ndarray, Grid]:
    """[N, C] and the grid, as the projector reads them"""
    return load_tokens(path, replace(visual, kind="embeddings"))
