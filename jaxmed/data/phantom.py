"""Phantom chest CTs: body, lungs, heart, spine, vessels and noise in Hounsfield units, with findings drawn into them.

Study i of a seed is a pure function of (seed, i). Millimetres, axes as the array's: x from the patient's right to left,
y from front to back, z from feet to head, 0 in the middle of the grid. Shapes here: [Z, Y, X] while drawing, [X, Y, Z] in
files. Findings are large and dense enough to be seen in voxels of 8 mm; small faint ones are beyond so coarse a grid.
"""

from dataclasses import dataclass

import numpy as np

from jaxmed.data.phantom_reports import FINDINGS, MIDLINE

SHAPE = (48, 48, 32)
SPACING = (8.0, 8.0, 10.5)
# Studies without any finding, and how often each finding is drawn for the others (at least one of them has to come).
EMPTY_SHARE = 0.08
FINDING_SHARE = 0.35
NOISE_SD = 25.0
AIR, FAT, TISSUE, LUNG, EMPHYSEMA, BONE, NODULE = -1000.0, -100.0, 40.0, -860.0, -945.0, 350.0, 400.0
LUNG_AXES = (58.0, 80.0, 128.0)
LUNG_CENTRE = (73.0, 4.0, 8.0)
# Upper, middle and lower zone in the lung's own coordinates, and how far from their middles nodules lie. Anywhere in the
# lung would be fair as well, but takes several times the studies to learn (a linear probe: F1 0.8 instead of 0.95). They
# are calcified (NODULE): at the density of soft parts a small model hardly learns them in 800 steps.
NODULE_ZONES = ((0.1, 0.0, 0.5), (0.1, 0.0, 0.1), (0.1, 0.0, -0.3))
NODULE_SPREAD = 0.15
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Study:
    """What a phantom shows, before any voxel is drawn."""

    findings: dict[str, str]
    """finding -> side; absent ones are left out"""
    seed: tuple[int, int]
    """Of the random numbers that draw it"""


def sample_study(seed: int, index: int) -> Study:
    rng = np.random.default_rng((seed, index, 0))
    findings: dict[str, str] = {}
    if rng.random() >= EMPTY_SHARE:
        while not findings:
            present = rng.random(len(FINDINGS)) < FINDING_SHARE
            findings = {name: _side(name, rng) for name, is_there in zip(FINDINGS, present, strict=True) if is_there}
    return Study(findings, (seed, index))


def _side(name: str, rng: np.random.Generator) -> str:
    return MIDLINE if name == "cardiomegaly" else ("left", "right")[rng.integers(2)]


@dataclass(frozen=True)
class _Region:
    """Coverage of voxels, 0 to 1, within a box of the grid; outside it is 0."""

    box: tuple[slice, slice, slice]
    coverage: np.ndarray
    """Of the box's shape [z, y, x], or with z = 1 for what is the same in every slice"""


class _Canvas:
    """The grid's coordinates and the voxels [Z, Y, X] in HU, painted layer over layer with edges one voxel soft."""

    def __init__(self, shape: tuple[int, int, int], spacing: Triple):
        self.axes = [
            (np.arange(n, dtype=np.float32) - (n - 1) / 2) * np.float32(s) for n, s in zip(shape, spacing, strict=True)
        ]
        self.voxel = float(np.mean(spacing))
        self.shape = shape
        self.spacing = spacing
        self.hu = np.full(shape[::-1], AIR, np.float32)

    def ellipsoid(self, centre: Triple, axes: Triple) -> _Region:
        """An infinite axis along z makes a cylinder."""
        squares, box = [], []
        for grid, c, a in zip(self.axes, centre, axes, strict=True):
            # Two voxels beyond the surface, so that the soft edge is whole.
            first, last = np.searchsorted(grid, (c - a - 2 * self.voxel, c + a + 2 * self.voxel))
            box.append(slice(int(first), int(last)))
            squares.append(np.square((grid[first:last] - np.float32(c)) / np.float32(a)))
        x, y, z = squares
        z = z if np.isfinite(axes[2]) else np.zeros(1, np.float32)
        radius = np.sqrt(x[None, None, :] + y[None, :, None] + z[:, None, None])
        # Distance to the surface in voxels, taken along the mean of the finite axes.
        scale = np.float32(np.mean([a for a in axes if np.isfinite(a)]) / self.voxel)
        return _Region((box[2], box[1], box[0]), np.clip((1 - radius) * scale + np.float32(0.5), 0, 1))

    def paint(self, region: _Region, hu: float, within: np.ndarray | None = None) -> None:
        """Blend towards `hu`, by the coverage times `within` [Z, Y, X]."""
        old = self.hu[region.box]
        coverage = region.coverage if within is None else region.coverage * within[region.box]
        old += coverage * (np.float32(hu) - old)


@dataclass(frozen=True)
class _Lung:
    centre: Triple
    axes: Triple
    outward: int
    """+1 where x grows away from the midline"""
    coverage: np.ndarray
    """[Z, Y, X]"""

    def at(self, u: Triple) -> Triple:
        """A point in the lung's own coordinates (unit ball; the first one grows outward), in millimetres."""
        x, y, z = (c + a * v for c, a, v in zip(self.centre, self.axes, (u[0] * self.outward, *u[1:]), strict=True))
        return x, y, z


def draw(study: Study, shape: tuple[int, int, int] = SHAPE, spacing: Triple = SPACING) -> np.ndarray:
    """[X, Y, Z] int16 in HU (Fortran order, as NIfTI files have it)."""
    rng = np.random.default_rng((*study.seed, 1))
    canvas = _Canvas(shape, spacing)
    shift = rng.normal(0.0, 2.0, 3)
    size = float(rng.normal(1.0, 0.02))
    lungs = _draw_anatomy(canvas, study, shift, size, rng)
    for name, drawer in _DRAWERS.items():
        if name in study.findings:
            drawer(canvas, lungs[study.findings[name]], rng)
    noise = rng.standard_normal(canvas.hu.shape, np.float32)
    noise *= np.float32(NOISE_SD)
    noise += canvas.hu
    return np.clip(np.rint(noise), -1024, 3071).astype(np.int16).T


def _draw_anatomy(canvas: _Canvas, study: Study, shift: np.ndarray, size: float, rng: np.random.Generator) -> dict[str, _Lung]:
    def placed(x: float, y: float, z: float) -> Triple:
        return x * size + shift[0], y * size + shift[1], z * size + shift[2]

    def sized(*axes: float) -> Triple:
        x, y, z = (a * size for a in axes)
        return x, y, z

    canvas.paint(canvas.ellipsoid(placed(0, 0, 0), sized(172, 118, np.inf)), FAT)
    canvas.paint(canvas.ellipsoid(placed(0, 0, 0), sized(158, 104, np.inf)), TISSUE)
    # The liver's dome stands higher than the spleen's; both end the lungs below.
    domes = {"right": ((-70, -5, -128), (75, 95, 60)), "left": ((75, -5, -142), (75, 95, 60))}
    large = rng.uniform(1.35, 1.65) if "cardiomegaly" in study.findings else rng.uniform(0.88, 1.1)
    heart = canvas.ellipsoid(placed(16, -24, -38), sized(44 * large, 38 * large, 46 * large))
    lungs = {}
    for side, outward in (("right", -1), ("left", 1)):
        centre, axes = placed(LUNG_CENTRE[0] * outward, *LUNG_CENTRE[1:]), sized(*LUNG_AXES)
        coverage = np.zeros_like(canvas.hu)
        whole = canvas.ellipsoid(centre, axes)
        coverage[whole.box] = whole.coverage
        for organ in (heart, canvas.ellipsoid(placed(*domes[side][0]), sized(*domes[side][1]))):
            coverage[organ.box] *= 1 - organ.coverage
        canvas.hu += coverage * (np.float32(LUNG) - canvas.hu)
        lungs[side] = _Lung(centre, axes, outward, coverage)
        _draw_vessels(canvas, lungs[side], rng)
    canvas.paint(heart, TISSUE + 10)
    canvas.paint(canvas.ellipsoid(placed(20, 44, 0), sized(13, 13, np.inf)), TISSUE + 10)
    canvas.paint(canvas.ellipsoid(placed(0, 0, 120), sized(9, 9, 60)), AIR)
    canvas.paint(canvas.ellipsoid(placed(0, 76, 0), sized(19, 19, np.inf)), BONE)
    return lungs


def _draw_vessels(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> None:
    """Thin straight vessels from the hilum outward, as dense points along lines."""
    count, points = 14, 24
    ends = rng.normal(0.0, 1.0, (count, 3))
    ends *= 0.9 / np.linalg.norm(ends, axis=1, keepdims=True)
    hilum = np.array([-0.7, 0.1, -0.05])
    along = np.linspace(0.0, 1.0, points)[None, :, None]
    u = hilum + along * (ends[:, None, :] - hilum)
    u[..., 0] *= lung.outward
    mm = np.array(lung.centre) + u * np.array(lung.axes)
    half = (np.array(canvas.shape) - 1) / 2
    index = np.rint(mm / np.array(canvas.spacing) + half).astype(np.int64)
    index = np.clip(index, 0, np.array(canvas.shape) - 1).reshape(-1, 3)
    x, y, z = index.T
    strength = np.float32(160.0) * lung.coverage[z, y, x]
    # Points that fall into one voxel count once, so that thickness does not depend on the grid.
    canvas.hu[z, y, x] = canvas.hu[z, y, x] + strength


def _draw_emphysema(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> None:
    canvas.hu += lung.coverage * np.float32(EMPHYSEMA - LUNG)
    for _ in range(rng.integers(3, 7)):
        radius = rng.uniform(10, 18)
        canvas.paint(canvas.ellipsoid(lung.at(_inside(rng, 0.75)), (radius,) * 3), AIR, lung.coverage)


def _draw_consolidation(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> None:
    """A ball of tissue with air left in some of its voxels."""
    radius = rng.uniform(30, 45)
    u = _inside(rng, 0.5)
    ball = canvas.ellipsoid(lung.at((abs(u[0]) * 0.6, u[1], u[2] + 0.15)), (radius,) * 3)
    filled = rng.random(ball.coverage.shape, np.float32) < np.float32(rng.uniform(0.75, 0.95))
    canvas.paint(_Region(ball.box, ball.coverage * filled), TISSUE - 10, lung.coverage)


def _draw_effusion(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> None:
    """Fluid behind and below: what lies beyond a tilted plane, deeper with `depth`."""
    depth = rng.uniform(0.15, 0.55)
    y, z = ((canvas.axes[i] - np.float32(lung.centre[i])) / np.float32(lung.axes[i]) for i in (1, 2))
    beyond = np.float32(0.55) * y[None, :, None] - np.float32(0.835) * z[:, None, None] - np.float32(0.9 - 1.3 * depth)
    # The lung's own soft edge counts double: no rim of half-aerated voxels stays between fluid and chest wall.
    coverage = np.clip(beyond * 8 + np.float32(0.5), 0, 1) * np.minimum(lung.coverage * 2, 1)
    canvas.hu += coverage * (10 - canvas.hu)


def _draw_nodule(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> None:
    """Calcified, off the pleura, outside other disease: of some places tried, the first where nearly all around it is lung."""
    radius = rng.uniform(18, 27)
    best, best_air = lung.centre, -1.0
    for _ in range(12):
        zone = NODULE_ZONES[rng.integers(len(NODULE_ZONES))]
        x, y, z = _inside(rng, NODULE_SPREAD)
        centre = lung.at((zone[0] + x, zone[1] + y, zone[2] + z))
        around = canvas.ellipsoid(centre, (radius * 1.35,) * 3)
        air = float((around.coverage * (canvas.hu[around.box] < -650)).sum() / around.coverage.sum())
        if air > best_air:
            best, best_air = centre, air
        if air > 0.93:
            break
    canvas.paint(canvas.ellipsoid(best, (radius,) * 3), NODULE)


def _inside(rng: np.random.Generator, radius: float) -> Triple:
    """A uniform point in a ball around the origin."""
    while True:
        u = rng.uniform(-radius, radius, 3)
        if u @ u <= radius * radius:
            return float(u[0]), float(u[1]), float(u[2])


# In this order, so that fluid covers what it drowns, and the nodule finds a free place.
_DRAWERS = {
    "emphysema": _draw_emphysema,
    "consolidation": _draw_consolidation,
    "effusion": _draw_effusion,
    "nodule": _draw_nodule,
}
