"""Frozen dataclasses of the image side: how files become what a tower or a projector reads, and how volumes become tokens."""

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from jaxmed.model_config import require


@dataclass(frozen=True)
class PixelConfig:
    """From an image file to the tower's input, as CLIP's and SigLIP's image processors do it with Pillow."""

    aspect: Literal["pad", "crop", "squash"] = "pad"
    """`pad`: onto a square of the mean colour first; `crop`: the middle of it; `squash`: both sides resized alike."""
    shortest: int = 336
    """Pixels of the shorter side after resizing (bicubic)."""
    crop: int = 336
    """Side of the square cut from the middle (0: none is cut, and `squash` resizes to `shortest` squared)."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from values in [0, 1], channel by channel."""
    sd: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Divided by, channel by channel."""
    pad_grey: bool = False
    """Pad greyscale files before they become RGB, as LLaVA-Med's evaluation does (`--upstream-exact pad_grey`)."""

    @property
    def side(self) -> int:
        """Pixels of a side of the square that comes out."""
        return self.crop or self.shortest


@dataclass(frozen=True)
class PrepareConfig:
    """From a CT volume (NIfTI, a DICOM series, a folder of slices) to the tower's input: kind `volumes` alone."""

    preset: Literal["m3d", "amos_challenge", "hu_window", "m3d_seg", "m3d_refseg"] = "m3d"
    """Which numbers become 0 and 1, foreground crop, resize. `m3d`: darkest and brightest voxel, crop, half-pixel;
    `amos_challenge`: the same without crop, corners aligned; `hu_window`: clipped to `window` first; `m3d_seg`, `m3d_refseg`:
    percentiles, as those data sets were made. Folders of slices are always `m3d`."""
    axes: Literal["preset", "radiological", "zyx", "zxy"] = "preset"
    """Order of (depth, rows, columns): `radiological` turns every volume to (head, back, left); `zyx` and `zxy` take the
    file's axes as stored, unturned (`zxy`: amos_challenge as its authors ran it); `preset`: radiological but for m3d_seg (zyx)
    and m3d_refseg (zxy)."""
    window: tuple[float, float] = (-1000.0, 1000.0)
    """Hounsfield units at which `hu_window` clips."""
    crop: bool = True
    """Cut `hu_window` to the voxels brighter than the darkest; the other presets do as published."""
    hu: Literal["auto", "header", "csv", "none"] = "auto"
    """Which scaling makes Hounsfield units for `hu_window`: the one that gives air, the header's, the metadata's over it, or
    stored numbers as they are. The other presets do not depend on the scale and take the header's."""
    metadata: str = ""
    """CSV of CT-RATE's kind with slope and intercept of every NIfTI file, for `hu`."""
    index: int = -1
    """Which volume of a NIfTI file of four axes, from 0 (-1: such a file is refused)."""
    series: str = ""
    """Which series of DICOM folders that hold several: its UID, number or description (none: such a folder is refused)."""
    cache: str = ""
    """Folder where prepared volumes are kept (none: each is prepared whenever it is read). A changed file or setting never
    reuses what was kept."""
    augment: Literal["none", "intensity", "m3d"] = "none"
    """In training: `intensity` scales and shifts by up to a tenth; `m3d` first turns and mirrors too, which makes left right:
    not where reports name sides."""

    def __post_init__(self):
        for name in ("preset", "axes", "hu", "augment"):  # overrides come as text that no parser has checked
            known = get_args(get_type_hints(PrepareConfig)[name])
            given = getattr(self, name)
            require(given in known, f"visual.prepare.{name} is {given!r}; known are {', '.join(known)}")
        low, high = self.window
        require(low < high, f"visual.prepare.window is {self.window}; the first must be smaller")
        require(self.index >= -1, f"visual.prepare.index is {self.index}; it counts from 0 (-1: no file of four axes)")
        known = self.hu != "csv" or self.metadata
        require(known, "visual.prepare.hu is csv, which takes slope and intercept of a CSV; give it as visual.prepare.metadata")

    def for_data_of(self, other: "PrepareConfig") -> "PrepareConfig":
        """The numbers that a tower is used to, as here; where files lie and how training varies them, as `other` says."""
        own = ("metadata", "index", "series", "cache", "augment")
        return replace(self, **{name: getattr(other, name) for name in own})


@dataclass(frozen=True)
class VisualConfig:
    """The image input of a batch: its kind and its static sizes (so that nothing need be read to compile a step)."""

    kind: Literal["none", "embeddings", "codes", "pixels", "volumes", "slices"] = "embeddings"
    """`embeddings`: float tokens from .npz files; `codes`: packed uint32 codes, unpacked on the device; for a tower `pixels`
    (2-D images), `volumes` (prepared volumes) or `slices` (2-D slices of a volume); `none`: text alone."""
    images: int = 1
    """Images a row holds at most (I); with packing, of all its samples together."""
    tokens: int = 31744
    """Tokens of one image at most (N), after merging neighbours; images may have fewer."""
    features: int = 18
    """Features of a token as the projector takes them (C), after merging neighbours."""
    grid: tuple[int, int, int] = (31, 32, 32)
    """Token grid (depth, rows, columns) after merging; needed by `codes`, by the pool's position code and by planning."""
    merge: tuple[int, int, int] = (1, 1, 1)
    """Neighbours (depth, rows, columns) merged into one token's features as a file is read; (1, 2, 2) for 8x8x8 files."""
    channel_order: Literal["identity", "reverse"] = "identity"
    """`reverse` flips the channels of the file before merging."""
    encoder: str = ""
    """Encoder that must have written the files; "": the first file decides. Unsigned files pass with a notice."""
    norm: bool = False
    """Fixed statistics per token position and feature, computed on the training set and saved with the checkpoint."""
    positions: bool = False
    """A learned position table added after the projector, one row a token of an image."""
    slices: int = 24
    """Slices of a volume (kind `slices` alone)."""
    window: tuple[float, float] = (0.0, 0.0)
    """Intensities that become 0 and 1 (kind `slices` alone); equal ones: whole numbers modulo 256, as SAMF was trained."""
    volume: tuple[int, int, int] = (32, 256, 256)
    """Voxels (depth, rows, columns) of a prepared volume (kind `volumes` alone)."""
    channels: int = 1
    """Numbers of a voxel of kind `volumes`, which are the tower's; only .npy files, [channel, depth, row, column], hold
    several."""
    pixels: PixelConfig = PixelConfig()
    """How images become pixels (kind `pixels`); its `shortest` and `crop` hold for `slices` as well."""
    prepare: PrepareConfig = PrepareConfig()
    """How CT volumes become the tower's input (kind `volumes`)."""

    def __post_init__(self):
        require(self.images >= 0 and self.tokens >= 0, "visual.images and visual.tokens must not be negative")
        require(self.channels >= 1, f"visual.channels is {self.channels}; a voxel has one number at least")
        require(all(m >= 1 for m in self.merge), f"visual.merge is {self.merge}; every entry must be at least 1")
        turned = self.kind != "volumes" or self.prepare.augment != "m3d" or self.volume[1] == self.volume[2]
        require(turned, f"visual.prepare.augment m3d turns slices by 90 degrees; visual.volume {self.volume} is not square")
        if self.kind == "codes":
            t, h, w = self.grid
            fits = t * h * w == self.tokens
            require(
                fits, f"visual.grid {self.grid} has {t * h * w} tokens, visual.tokens is {self.tokens}; codes need them equal"
            )

    @property
    def file_features(self) -> int:
        """Channels of a token in the file, before merging."""
        return self.features // (self.merge[0] * self.merge[1] * self.merge[2])


@dataclass(frozen=True)
class EncodeConfig:
    """From a CT volume to the tokens of a file: the preprocessing of BTB3D and a weight-free multi-level 3-D Haar encoder."""

    canvas: tuple[int, int, int] = (512, 512, 241)
    """Voxels along the file's axes 0, 1, 2 (x, y, z) to which a resampled volume is cropped or padded."""
    spacing: tuple[float, float, float] = (0.75, 0.75, 1.5)
    """Millimetres along the same axes to which a volume is resampled."""
    hu_range: tuple[float, float] = (-1000.0, 1000.0)
    """Hounsfield units at which intensities are clipped; they become -1 and 1."""
    levels: tuple[int, int, int] = (3, 4, 4)
    """Haar levels along depth (z), rows (x) and columns (y): a token covers 2**levels voxels."""
    bands: tuple[str, ...] = ()
    """Features of a token, by name (see jaxmed.data.haar); none given: 18 that serve any number of levels."""

    def __post_init__(self):
        require(all(n > 0 for n in self.canvas), f"encode.canvas is {self.canvas}; every side must be positive")
        require(all(s > 0 for s in self.spacing), f"encode.spacing is {self.spacing}; every spacing must be positive")
        require(self.hu_range[0] < self.hu_range[1], f"encode.hu_range is {self.hu_range}; the first must be smaller")
        some = min(self.levels) >= 0 and max(self.levels) >= 1
        require(some, f"encode.levels is {self.levels}; give 0 or more per axis and at least 1 in one of them")
        for name, side, levels in zip(("rows", "columns"), self.canvas[:2], self.levels[1:], strict=True):
            fits = side % 2**levels == 0
            require(fits, f"encode.canvas {self.canvas}: its {side} {name} are not a multiple of 2**{levels} (encode.levels)")
