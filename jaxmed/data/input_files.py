"""The heads of all image files of a records file, read by several threads before the first step, cached beside the records."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jaxmed.config import VisualConfig
from jaxmed.data import cache
from jaxmed.data.embeddings import Grid, Header, encoder_problem, header_problem, merged_grid
from jaxmed.data.inputs import TOKEN_KINDS, check_header
from jaxmed.data.sizes import PIECE, READERS, read_headers
from jaxmed.data.volume_sources import stamp
from jaxmed.errors import UserError

# Raise it when check_header comes to refuse more.
VERSION = "3"


@dataclass(frozen=True)
class ImageFile:
    problem: str
    """"" or why the file cannot serve"""
    grid: Grid = (0, 0, 0)
    """Token grid of a file that can"""
    encoder: str = ""
    """What wrote a token file; "": it does not say"""


def check_files(paths: Sequence[str], visual: VisualConfig, records_path: str) -> dict[str, ImageFile]:
    """Every file's head under `visual`. Token files that two encoders wrote are refused as `visual.encoder` says, or else by
    the first that is signed. Files whose size and time are as they were are not opened again."""
    if visual.kind == "none":
        return {}
    if visual.kind in TOKEN_KINDS:
        return _check_tokens(paths, visual, records_path)
    paths = sorted(set(paths))
    key = f"{VERSION} {visual.kind} {_asked_of_volumes(visual) if visual.kind == 'volumes' else ''}"
    known = _unpack(cache.read(records_path, "files", key))
    pieces = [paths[start : start + PIECE] for start in range(0, len(paths), PIECE)]
    with ThreadPoolExecutor(READERS) as pool:
        found = [
            entry for piece in pool.map(lambda piece: [_check(p, visual, known) for p in piece], pieces) for entry in piece
        ]
    good = {path: stamp for path, (stamp, problem) in zip(paths, found, strict=True) if not problem}
    if any(known.get(path) != stamp for path, stamp in good.items()):
        cache.write(records_path, "files", key, {"files": np.frombuffer(json.dumps(good).encode(), np.uint8)})
    grid = (visual.slices, 1, 1) if visual.kind == "slices" else visual.grid
    return {path: ImageFile(problem, grid) for path, (_, problem) in zip(paths, found, strict=True)}


def _asked_of_volumes(visual: VisualConfig) -> tuple[object, ...]:
    """All that the heads of volumes are checked against."""
    prepare = visual.prepare
    return visual.volume, prepare.preset, prepare.index, prepare.series, prepare.metadata, stamp(prepare.metadata)


def _check_tokens(paths: Sequence[str], visual: VisualConfig, records_path: str) -> dict[str, ImageFile]:
    headers = read_headers(paths, records_path)
    encoder = expected_encoder(visual, (h.encoder for path in paths if isinstance(h := headers[path], Header)))
    files = {}
    for path, header in headers.items():
        if isinstance(header, UserError):
            files[path] = ImageFile(str(header))
        else:
            problem = header_problem(header, visual) or encoder_problem(header, encoder)
            files[path] = ImageFile(problem, (0, 0, 0) if problem else merged_grid(header, visual), header.encoder)
    return files


def expected_encoder(visual: VisualConfig, signatures: Iterable[str]) -> str:
    """`visual.encoder`, else the first signature, "" if there is none."""
    return visual.encoder or next((s for s in signatures if s), "")


def _check(path: str, visual: VisualConfig, known: dict[str, tuple[int, int]]) -> tuple[tuple[int, int], str]:
    """((size, time) of the file or folder, what is wrong with it)"""
    now = stamp(path)
    return now, "" if known.get(path) == now else check_header(path, visual)


def _unpack(stored: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    files = json.loads(stored["files"].tobytes()) if stored else {}
    return {path: (size, time) for path, (size, time) in files.items()}
