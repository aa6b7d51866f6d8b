"""A folder of volumes to the tokens of a tower, so that training with a frozen tower need not run it again.

`x.nii.gz`, `x.npy` or a folder `x` of slices becomes `x.nii_embedded.npz` at the same place below OUT: `arr` (1, C, D, H, W),
one token a patch, signed with the tower's weights and the preparation. Threads prepare volumes ahead, a batch at a time goes
through the tower over all devices, and while one computes the one before it is written. A file that is there is whole, so
it is left alone.

Axis letters: C features, (D, H, W) patches of a volume along depth, rows and columns.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmed.config import ConfigError, Experiment, PrepareConfig, TowerConfig, VisualConfig, replace_field
from jaxmed.data.embeddings import npz_name, write_npz
from jaxmed.data.encode import EncodeSummary, Job, OnBadRecord, Work, collect, is_written, problem_of
from jaxmed.data.inputs import check_header, read_prepared
from jaxmed.data.parallel import usable_cores
from jaxmed.data.volume_cache import VERSION
from jaxmed.data.volume_sources import find_volumes
from jaxmed.data.windows import ahead
from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.generate.tower import Tower, check_signature

Store = Literal["float32", "float16"]
STORES: dict[Store, type[np.floating]] = {"float32": np.float32, "float16": np.float16}
_PREPARATION = ("axes", "window", "crop", "hu")
"""Fields of the preparation that change what becomes of a volume; all but the first those of hu_window alone"""
SIGNED = ("preset", *_PREPARATION)
"""Fields of the preparation that a signature tells"""
# A raw CT takes about 1 GB while it is prepared.
MOST_PREPARED = 4


def check(config: TowerConfig, visual: VisualConfig, name: str) -> None:
    """Whether the tower's tokens can lie on a grid, and a model of this config would take them from files."""
    if visual.kind != "volumes":
        raise UserError(f"{name}: its tower reads {visual.kind}; tokens are written of towers that read volumes (vit3d)")
    if config.select_feature != "patch":
        raise UserError(
            f"{name}: model.tower.select_feature is {config.select_feature}; a file's tokens lie on a grid, which holds "
            "patches alone; set it to patch"
        )
    wanted = {"volume": config.image, "channels": config.channels, "grid": config.grid, "tokens": math.prod(config.grid)}
    wanted |= {"features": config.width, "merge": (1, 1, 1)}
    wrong = [
        f"visual.{field} is {getattr(visual, field)}, not {w}" for field, w in wanted.items() if getattr(visual, field) != w
    ]
    if wrong:
        raise UserError(f"{name}: {'; '.join(wrong)}, which is what its tower reads and gives; make them agree")


def names_below(folder: str) -> dict[str, str]:
    """{token file below OUT: volume} of all volumes of a folder."""
    found: dict[str, str] = {}
    for path in find_volumes(folder):
        name = os.path.relpath(path, folder)
        if name == ".":
            raise UserError(f"{folder}: is a folder of slices, one volume; --volumes takes the folder above it")
        target = npz_name(name)
        if target in found:
            raise UserError(f"{found[target]} and {path} would both become {target}; rename one of them")
        found[target] = path
    return found


def signature(tower: Tower) -> str:
    """The `encoder` of a file: what its tokens depend on but the volume."""
    return f"{tower.name} {preparation(tower.visual)}"


def preparation(visual: VisualConfig) -> str:
    """Preset and version, sizes, and what is not as the preset has it."""
    own, usual = asdict(visual.prepare), asdict(PrepareConfig(preset=visual.prepare.preset))
    names = _PREPARATION if visual.prepare.preset == "hu_window" else _PREPARATION[:1]
    other = [f"{name}={_word(own[name])}" for name in names if own[name] != usual[name]]
    return " ".join([f"{visual.prepare.preset}@{VERSION}", "x".join(map(str, visual.volume)), *other])


def prepared_as(signed: str, visual: VisualConfig) -> VisualConfig:
    """`visual` with the preparation that a signature tells of."""
    _, preset, _, *others = signed.split(" ")
    usual = PrepareConfig(preset=preset.partition("@")[0])
    fields = {name: getattr(usual, name) for name in _PREPARATION}
    for name, word in (other.split("=") for other in others):
        fields[name] = getattr(replace_field(usual, name, word.lower()), name)
    return replace(visual, prepare=replace(visual.prepare, preset=usual.preset, **fields))


def seen_as_trained(experiment: Experiment, name: str, prepared: bool) -> Experiment:
    """A run that was trained on a tower's signed tokens and shall run the tower itself: it reads volumes as the tower did then.
    UserError for another tower, and for another preparation. `prepared`: the person has said how volumes are prepared."""
    signed = experiment.visual.encoder
    try:
        visual = experiment.visual if prepared else prepared_as(signed, experiment.visual)
    except (ValueError, ConfigError) as error:
        raise UserError(f"{name}: was trained on tokens of {signed!r}, whose volumes cannot be prepared: {error}") from None
    experiment = replace(experiment, visual=visual)
    check(experiment.model.tower, visual, name)
    check_signature(Tower(experiment, "float32", devices=jax.local_devices()[:1]), experiment, name)
    then = signed.partition(" ")[2]
    if then != preparation(visual):
        raise UserError(f"{name}: was trained on volumes prepared by {then!r}, these would be by {preparation(visual)!r}")
    return experiment


def _word(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def describe(tower: Tower, store: Store) -> str:
    """The way of a volume, in numbers."""
    config, device = tower.config, tower.mesh.devices.flat[0].device_kind
    size = math.prod(config.grid) * config.width * np.dtype(STORES[store]).itemsize / 1e6
    return (
        f"Each volume: {' x '.join(map(str, config.image))} voxels ({tower.visual.prepare.preset}) to tokens "
        f"{(1, config.width, *config.grid)}, {size:.2g} MB as {store}\n"
        f"Tower {tower.name}: {tower.parameters:,} parameters; {tower.rows} at once on {tower.mesh.size} {device}"
    )


@dataclass(frozen=True)
class _Prepared:
    job: Job
    reading: str
    values: np.ndarray
    """[D, H, W, 1] voxels"""


def encode_folder(
    volumes: str,
    out: str,
    tower: Tower,
    store: Store = "float32",
    on_bad_record: OnBadRecord = "stop",
    threads: int = 0,
) -> EncodeSummary:
    """Encode every volume that has no token file yet; `threads`: volumes prepared at once (0: one a core, 4 at most)."""
    started = time.monotonic()
    work = _plan(volumes, out, signature(tower), tower.visual, on_bad_record)
    threads = threads or min(usable_cores(), MOST_PREPARED)
    return collect(work, _encode(work, tower, store, threads), out, on_bad_record, started)


def _plan(volumes: str, out: str, signed: str, visual: VisualConfig, on_bad_record: OnBadRecord) -> Work:
    """The volumes without a token file that is `signed` so. What headers tell against any of them is told at once."""
    targets = {path: os.path.join(out, name) for name, path in names_below(volumes).items()}
    try:
        for folder in sorted({os.path.dirname(target) for target in targets.values()}):
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from None
    missing = [path for path, target in targets.items() if not is_written(target, signed)]
    faults = {path: fault for path in missing if (fault := check_header(path, visual))}
    problems = tuple(Problem(path, fault.removeprefix(f"{path}: ")) for path, fault in faults.items())
    if problems and on_bad_record == "stop":
        raise BadRecords(problems)
    jobs = tuple(Job(path, None, targets[path]) for path in missing if path not in faults)
    return Work(jobs, problems, len(targets) - len(missing))


def _prepare(job: Job, visual: VisualConfig) -> _Prepared | Problem:
    try:
        found = read_prepared(job.path, visual)
    except UserError as error:
        return problem_of(job.path, error)
    frame = found.frame
    words = ("prepared before",) if frame.source == "prepared" else (frame.source, frame.preset, frame.reading or "grey levels")
    return _Prepared(job, ", ".join(words), found.values)


def _batches(items: Iterator[_Prepared | Problem], rows: int) -> Iterator[list[_Prepared] | Problem]:
    """Volumes in groups of `rows`, problems as they come."""
    group: list[_Prepared] = []
    for item in items:
        if isinstance(item, Problem):
            yield item
            continue
        group.append(item)
        if len(group) == rows:
            yield group
            group = []
    if group:
        yield group


def _encode(work: Work, tower: Tower, store: Store, threads: int) -> Generator[str | Problem, None, None]:
    """Per volume how it was read, once its file is written, or what is wrong with it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), disable=not work.jobs)
    prepare = functools.partial(_prepare, visual=tower.visual)
    running: list[tuple[list[_Prepared], jax.Array]] = []
    with progress, contextlib.closing(ahead(prepare, work.jobs, threads)) as prepared:
        task = progress.add_task("Encoding (volumes)", total=len(work.jobs))
        finish = functools.partial(_finish, tower=tower, store=store, advance=lambda: progress.advance(task))
        for item in _batches(prepared, tower.rows):
            if isinstance(item, Problem):
                progress.advance(task)
                yield item
                continue
            running.append((item, tower.start(np.stack([one.values for one in item]))))
            if len(running) == 2:
                yield from finish(*running.pop(0))
        for begun in running:
            yield from finish(*begun)


def _finish(
    group: list[_Prepared], computed: jax.Array, tower: Tower, store: Store, advance: Callable[[], None]
) -> Iterator[str | Problem]:
    """Writes a batch's files. Values that float16 cannot hold are no reason to lose the others."""
    tokens = tower.wait(computed, len(group))
    for one, values in zip(group, tokens, strict=True):
        advance()
        largest = np.abs(values).max()
        if not np.isfinite(largest):
            yield Problem(one.job.path, "the tower's output is NaN or infinite; try --dtype float32")
        elif largest > np.finfo(STORES[store]).max:
            yield Problem(one.job.path, f"the tower's output reaches {largest:.3g}, beyond {store}; give --store float32")
        else:
            grid = values.T.reshape(-1, *tower.config.grid)
            write_npz(one.job.out, grid, signature(tower), STORES[store])
            yield one.reading
