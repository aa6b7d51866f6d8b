"""A folder of CT volumes to a flat folder of signed token files, going on where it stopped; with the Haar encoder.

`x.nii.gz` anywhere below the folder becomes `OUT/x.nii_embedded.npz`, `arr` (1, C, T, H, W) float32, with the encoder's
signature. A file that is there is whole (it is renamed into place), so it is left alone; one of another encoder is refused.
`plan_folder` and `collect` serve any encoder.
"""

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from jaxmed.config import EncodeConfig
from jaxmed.data import haar
from jaxmed.data.embeddings import npz_name, write_npz
from jaxmed.data.embeddings import read_header as read_npz_header
from jaxmed.data.metadata import Metadata, VolumeMetadata
from jaxmed.data.parallel import over_items
from jaxmed.data.volume_sources import files_below
from jaxmed.data.volumes import Override, preprocess, read_header, read_volume
from jaxmed.errors import BadRecords, Problem, UserError

ENDINGS = (".nii.gz", ".nii")
# Canvases below this many voxels are encoded in milliseconds.
SMALL = 2**20
LEARNED = "btb3d-"
"""How the signature of a learned encoder begins"""
OnBadRecord = Literal["stop", "skip"]


@dataclass(frozen=True)
class EncodeSummary:
    written: int
    present: int
    """Files that were there already"""
    skipped: tuple[Problem, ...]
    readings: dict[str, int]
    """Which rule gave the Hounsfield units -> number of volumes"""
    seconds: float


@dataclass(frozen=True)
class Job:
    """A volume to encode."""

    path: str
    metadata: VolumeMetadata | None
    out: str


@dataclass(frozen=True)
class Work:
    """What a folder asks for, known before a voxel is read."""

    jobs: tuple[Job, ...]
    problems: tuple[Problem, ...]
    """Volumes that cannot be jobs"""
    present: int
    """Files that are there already"""


def unpublished_preprocessing(encode: EncodeConfig) -> tuple[str, ...]:
    """What of the preprocessing is not as BTB3D published it, for the signature of a learned encoder's files."""
    published = EncodeConfig()
    other = [name for name in ("canvas", "spacing", "hu_range") if getattr(encode, name) != getattr(published, name)]
    return tuple(f"{name}={','.join(f'{v:g}' for v in getattr(encode, name))}" for name in other)


def same_preprocessing(encoder: str, encode: EncodeConfig) -> bool:
    """Whether the signature of a file says that its volume was prepared as `encode` says. Unsigned files say nothing."""
    if encoder.startswith(LEARNED):
        return tuple(word for word in encoder.split()[1:] if "=" in word) == unpublished_preprocessing(encode)
    return encoder in ("", haar.signature(encode))


def find_volumes(folder: str) -> list[str]:
    """Every NIfTI file below a folder, sorted. Token files lie flat, so names must differ over all subfolders."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; --volumes takes the folder of the NIfTI files")
    found: dict[str, str] = {}
    for parent, files in files_below(folder):
        for file in files:
            if not file.endswith(ENDINGS):
                continue
            path, name = os.path.join(parent, file), npz_name(file)
            if name in found:
                raise UserError(f"{found[name]} and {path} would both become {name}; rename one of them")
            found[name] = path
    if not found:
        raise UserError(f"{folder}: no .nii or .nii.gz file in it or below")
    return sorted(found.values())


def encode_folder(
    volumes: str,
    out: str,
    config: EncodeConfig,
    metadata: str = "",
    override: Override = "auto",
    on_bad_record: OnBadRecord = "stop",
    processes: int = 0,
) -> EncodeSummary:
    """Encode every volume that has no token file yet with the Haar encoder."""
    started = time.monotonic()
    names = haar.band_names(config)
    haar.check_bands(config)
    work = plan_folder(volumes, out, haar.signature(config), metadata, override, on_bad_record)
    job = functools.partial(_encode_one, config=config, override=override)
    small = config.canvas[0] * config.canvas[1] * config.canvas[2] <= SMALL
    results = over_items(job, work.jobs, processes, f"Encoding ({len(names)} features)", small)
    return collect(work, results, out, on_bad_record, started)


def plan_folder(volumes: str, out: str, signature: str, metadata: str, override: Override, on_bad_record: OnBadRecord) -> Work:
    """The volumes without a token file of the encoder that signs with `signature`; makes the folder `out`.

    Headers and metadata rows of all of them are checked first and their problems listed at once; what only the voxels
    tell (no air, NaN, a cut file) is found on the way. `skip` lists both in OUT/skipped.jsonl.
    """
    paths = find_volumes(volumes)
    table = Metadata(metadata) if metadata else None
    if override == "csv" and not table:
        raise UserError("--hu csv needs the rescale of a metadata CSV; pass --metadata")
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from None
    missing = [path for path in paths if not is_written(os.path.join(out, npz_name(os.path.basename(path))), signature)]
    jobs, problems = _check(missing, table, out)
    if problems and on_bad_record == "stop":
        raise BadRecords(problems)
    return Work(tuple(jobs), tuple(problems), len(paths) - len(missing))


def collect(
    work: Work, results: Generator[str | Problem, None, None], out: str, on_bad_record: OnBadRecord, started: float
) -> EncodeSummary:
    """Runs the encoding; each result is the rule that gave the Hounsfield units, in words, or a problem."""
    readings: Counter[str] = Counter()
    problems = list(work.problems)
    for result in results:
        if isinstance(result, str):
            readings[result] += 1
            continue
        problems.append(result)
        if on_bad_record == "stop":
            results.close()
            raise BadRecords(problems)
    _write_skipped(out, problems)
    return EncodeSummary(readings.total(), work.present, tuple(problems), dict(readings), time.monotonic() - started)


def is_written(path: str, signature: str) -> bool:
    """Whether the file is there and whole. Tokens of two encoders in one folder would be mistaken for each other."""
    if not os.path.exists(path):
        return False
    try:
        header = read_npz_header(path)
    except UserError:
        # Damaged on disk (files are renamed into place when complete): it is written again.
        return False
    if header.encoder != signature:
        raise UserError(
            f"{path} was written by {header.encoder or 'an encoder that did not sign'}, this is {signature}; "
            "give another --out, or remove the old files"
        )
    return True


def _check(paths: list[str], table: Metadata | None, out: str) -> tuple[list[Job], list[Problem]]:
    """What can be told without voxels."""
    jobs, problems = [], []
    for path in paths:
        try:
            read_header(path)
            row = table.of(path) if table else None
        except UserError as error:
            problems.append(problem_of(path, error))
        else:
            jobs.append(Job(path, row, os.path.join(out, npz_name(os.path.basename(path)))))
    return jobs, problems


def _encode_one(job: Job, config: EncodeConfig, override: Override) -> str | Problem:
    """The rule that gave the Hounsfield units, in words, or what keeps the volume from being encoded."""
    try:
        volume = read_volume(job.path, job.metadata, override)
        tokens = haar.encode(preprocess(volume, config), config)
    except UserError as error:
        return problem_of(job.path, error)
    write_npz(job.out, tokens, haar.signature(config))
    return volume.reading.chosen


def problem_of(path: str, error: UserError) -> Problem:
    """The message without the path that it begins with."""
    return Problem(path, str(error).removeprefix(f"{path}: "))


def _write_skipped(out: str, problems: list[Problem]) -> None:
    """What this call left out; a call that leaves nothing out removes an older list."""
    path = os.path.join(out, "skipped.jsonl")
    if problems:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"where": p.where, "what": p.what}) + "\n" for p in problems)
    elif os.path.exists(path):
        os.unlink(path)
