"""What training will make of a records file: every record's size, bucket and faults, without reading voxels or tokens.

Unlike jaxmed.data.dataset.scan it stops at nothing and works before the token files exist (images then count as the largest
that the config allows), since it is there to be looked at. `check_values` reads every file for what headers can't tell.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jaxmed.config import Experiment
from jaxmed.data.conversation import check_template
from jaxmed.data.dataset import text_places
from jaxmed.data.embeddings import Header, encoder_problem, header_problem, load_tokens, merged_grid, npz_path
from jaxmed.data.plan import bucket_for, capacity
from jaxmed.data.records import Record, load_records, where
from jaxmed.data.sizes import Progress, TextSize, read_headers, text_sizes
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import Problem, UserError


@dataclass(frozen=True)
class Row:
    """One readable record as training would take it."""

    record: Record
    text: TextSize
    places: tuple[int, ...]
    """Places in the text of each image"""
    headers: tuple[Header, ...]
    """Of the token files that can be read"""
    length: int
    """Tokens after splicing"""
    bucket: int
    """0 where none holds it"""
    faults: tuple[str, ...]
    """Why training would refuse it; a voided sample has none (see text.voided)"""


@dataclass(frozen=True)
class Survey:
    rows: tuple[Row, ...]
    unreadable: tuple[Problem, ...]
    """Records that are no records"""
    encoder: str
    """Encoder that signed the token files, "" if none did"""

    @property
    def refused(self) -> list[Problem]:
        found = [Problem(where(row.record), "; ".join(row.faults)) for row in self.rows if row.faults]
        return [*self.unreadable, *found]

    @property
    def voided(self) -> list[Problem]:
        return [Problem(where(row.record), row.text.voided) for row in self.rows if row.text.voided and not row.faults]


def survey(experiment: Experiment, tokenizer: Tokenizer, path: str, progress: Progress | None = None) -> Survey:
    """All records of a file. Lengths and headers are cached where training looks for them."""
    data, visual = experiment.data, experiment.visual
    check_template(data.template, tokenizer)
    records, unreadable = load_records(path)
    texts = text_sizes(records, path, tokenizer, data.template, progress)
    headers: dict[str, Header | UserError] = {}
    if data.embeddings and visual.kind != "none":
        headers = read_headers([npz_path(data.embeddings, image) for r in records for image in r.images], path)
    signed = (header.encoder for header in headers.values() if isinstance(header, Header) and header.encoder)
    encoder = visual.encoder or next(signed, "")
    rows = [_row(r, text, headers, experiment, encoder) for r, text in zip(records, texts, strict=True)]
    return Survey(tuple(rows), tuple(unreadable), encoder)


def _row(record: Record, text: TextSize, headers: dict[str, Header | UserError], experiment: Experiment, encoder: str) -> Row:
    data, visual = experiment.data, experiment.visual
    faults, places, good = [], [], []
    if record.images and visual.kind == "none":
        faults.append("it has an image, but visual.kind is none")
    elif len(record.images) > visual.images:
        faults.append(f"{len(record.images)} images, visual.images is {visual.images}")
    for image in record.images:
        header = headers.get(npz_path(data.embeddings, image))
        places.append(experiment.image_tokens)
        if isinstance(header, UserError):
            faults.append(str(header))
        elif header is not None:
            fault = header_problem(header, visual) or encoder_problem(header, encoder)
            faults += [fault] if fault else []
            good.append(header)
            places[-1] = places[-1] if fault else text_places(experiment, math.prod(merged_grid(header, visual)))
    if text.places != len(record.images):
        faults.append(f"{text.places} places for images, {len(record.images)} images")
    length = text.length + sum(places[: text.places])
    bucket = bucket_for(length, data.buckets)
    if not bucket:
        faults.append(f"{length:,} tokens, the largest bucket is {data.buckets[-1]:,}")
    elif text.supervised > capacity(data, 0, bucket)[1]:
        faults.append(f"{text.supervised:,} supervised tokens, data.supervised is {data.supervised:,}")
    return Row(record, text, tuple(places), tuple(good), length, bucket, tuple(dict.fromkeys(faults)))


def check_values(
    found: Survey, experiment: Experiment, read_volume: Callable[[str], str] | None, progress: Progress | None = None
) -> list[Problem]:
    """Reads the token file of every image, and its volume through `read_volume(image)` (which returns "" or a fault)."""
    folder, visual = experiment.data.embeddings, experiment.visual
    images = list({image: row.record for row in reversed(found.rows) for image in row.record.images}.items())

    def faults(image: str) -> list[str]:
        lines = []
        if folder and visual.kind != "none":
            try:
                load_tokens(npz_path(folder, image), visual)
            except UserError as error:
                lines.append(str(error))
        fault = read_volume(image) if read_volume else ""
        return lines + ([fault] if fault else [])

    problems = []
    with ThreadPoolExecutor(max(experiment.data.threads, 1)) as pool:
        for done, (record, lines) in enumerate(_in_order(pool, faults, images), 1):
            problems += [Problem(where(record), line) for line in lines]
            if progress:
                progress(done, len(images))
    return problems


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[str], list[str]], images: Sequence[tuple[str, Record]]
) -> Iterator[tuple[Record, list[str]]]:
    results = pool.map(work, [image for image, _ in images])
    return zip([record for _, record in images], results, strict=True)
