"""What an encoder tells apart in a volume: its tokens' three principal components as colours, and likeness to one token.

Axis letters: N tokens of a volume, C features of a token, (D, H, W) their grid along depth, rows and columns, N = D*H*W.
"""

from dataclasses import dataclass

import numpy as np

from jaxmed.errors import UserError

Grid = tuple[int, int, int]
COMPONENTS = 3
TAILS = (1.0, 99.0)
"""Percentiles of a component that become dark and bright; a few extreme tokens would leave the others grey"""


@dataclass(frozen=True)
class Components:
    colours: np.ndarray
    """[D, H, W, 3] uint8: red, green and blue are the first, second and third component"""
    scores: np.ndarray
    """[N, 3] float64, centred"""
    shares: tuple[float, float, float]
    """Of the variance of this volume's tokens"""


def components(tokens: np.ndarray, grid: Grid) -> Components:
    """tokens [N, C]. Each component's largest loading is positive, so that the same tokens give the same colours always."""
    centred = tokens.astype(np.float64) - tokens.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    total = float(values.sum())
    first = vectors[:, ::-1][:, :COMPONENTS]
    first = first * np.where(np.take_along_axis(first, np.abs(first).argmax(0)[None], 0) < 0, -1.0, 1.0)
    scores = np.zeros((len(tokens), COMPONENTS))
    scores[:, : first.shape[1]] = centred @ first
    shares = np.zeros(COMPONENTS)
    shares[: first.shape[1]] = np.maximum(values[::-1][:COMPONENTS], 0) / total if total > 0 else 0.0
    low, high = np.percentile(scores, TAILS, axis=0)
    flat = high - low <= 1e-9 * max(float(np.sqrt(total / max(len(tokens), 1))), 1e-30)
    bright = np.where(flat, 0.5, (scores - low) / np.where(flat, 1.0, high - low))
    colours = np.rint(np.clip(bright, 0, 1) * 255).astype(np.uint8)
    return Components(colours.reshape(*grid, COMPONENTS), scores, (float(shares[0]), float(shares[1]), float(shares[2])))


def patch_place(text: str, grid: Grid) -> Grid:
    """`D,H,W` of a person as a place of the grid."""
    parts = text.split(",")
    try:
        d, h, w = (int(part) for part in parts)
    except ValueError:
        raise UserError(f"--patch is {text!r}; give its place on the grid of patches as D,H,W, such as 3,8,5") from None
    if not all(0 <= place < size for place, size in zip((d, h, w), grid, strict=True)):
        last = ",".join(str(size - 1) for size in grid)
        raise UserError(f"--patch {text}: the grid has {' x '.join(map(str, grid))} patches; give 0,0,0 to {last}")
    return d, h, w


def similarity(tokens: np.ndarray, grid: Grid, place: Grid) -> np.ndarray:
    """[D, H, W] float32: the cosine of every token [N, C] with the one at `place`, 1 there; a token of zeros is like none."""
    lengths = np.linalg.norm(tokens.astype(np.float64), axis=1, keepdims=True)
    unit = tokens / np.where(lengths > 0, lengths, 1.0)
    return (unit @ unit[np.ravel_multi_index(place, grid)]).reshape(grid).astype(np.float32)
