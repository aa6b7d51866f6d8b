"""What training will make of a records file: every record's size, bucket and faults, without reading voxels or tokens.

Unlike jaxmed.data.dataset.scan it stops at nothing and works before the image files exist (images then count as the largest
that the config allows), since it is there to be looked at. `check_values` reads every file for what headers can't tell.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jaxmed.config import Experiment
from jaxmed.data.asking import asked_sizes
from jaxmed.data.conversation import check_template, reading_of, text_options
from jaxmed.data.dataset import spliced_size
from jaxmed.data.input_files import ImageFile, check_files, expected_encoder
from jaxmed.data.inputs import input_folder, input_path, is_placed, read_input, token_count
from jaxmed.data.plan import bucket_for, capacity
from jaxmed.data.records import Record, load_records, where
from jaxmed.data.sizes import Progress, TextSize
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import Problem, UserError
from jaxmed.report.survey_pairs import PairSurvey


@dataclass(frozen=True)
class Row:
    """One readable record as training would take it."""

    record: Record
    text: TextSize
    places: tuple[int, ...]
    """Places in the text of each image"""
    files: tuple[ImageFile, ...]
    """Of its images, those that can serve"""
    length: int
    """Tokens after splicing and the cut"""
    supervised: int
    bucket: int
    """0 where none holds it"""
    faults: tuple[str, ...]
    """Why training would refuse it; a voided sample has none (see text.voided)"""

    @property
    def usable(self) -> bool:
        return not self.faults and not self.text.voided


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
    records, unreadable = load_records(path, reading_of(experiment))
    texts = asked_sizes(records, path, tokenizer, data.template, progress, text_options(experiment))
    folder = input_folder(data, visual)
    images = [image for record in records for image in record.images if is_placed(folder, image)]
    paths = [input_path(folder, image, visual) for image in images]
    files = check_files(paths, visual, path)
    encoder = expected_encoder(visual, (file.encoder for file in files.values()))
    rows = [_row(r, text, files, experiment, tokenizer) for r, text in zip(records, texts, strict=True)]
    return Survey(tuple(rows), tuple(unreadable), encoder)


def _row(record: Record, text: TextSize, files: dict[str, ImageFile], experiment: Experiment, tokenizer: Tokenizer) -> Row:
    data, visual = experiment.data, experiment.visual
    folder = input_folder(data, visual)
    faults, places, good = [], [], []
    if record.images and visual.kind == "none":
        faults.append("it has an image, but visual.kind is none")
    elif len(record.images) > visual.images:
        faults.append(f"{len(record.images)} images, visual.images is {visual.images}")
    for image in record.images:
        file = files.get(input_path(folder, image, visual))
        places.append(experiment.image_tokens)
        if file is not None and file.problem:
            faults.append(file.problem)
        elif file is not None:
            good.append(file)
            places[-1] = experiment.places(token_count(file.grid, visual), file.grid)
    if text.places > len(record.images) or (text.places < len(record.images) and not data.max_length):
        faults.append(f"{text.places} places for images, {len(record.images)} images")
    shown = places[: text.places]
    length, supervised = spliced_size(record, text, shown, experiment, tokenizer, text_options(experiment))
    bucket = bucket_for(length, data.buckets)
    if not bucket:
        faults.append(f"{length:,} tokens, the largest bucket is {data.buckets[-1]:,}")
    elif supervised > capacity(data, 0, bucket)[1]:
        faults.append(f"{supervised:,} supervised tokens, data.supervised is {data.supervised:,}")
    return Row(record, text, tuple(places), tuple(good), length, supervised, bucket, tuple(dict.fromkeys(faults)))


def check_values(
    found: Survey | PairSurvey,
    experiment: Experiment,
    read_volume: Callable[[str], str] | None,
    progress: Progress | None = None,
) -> list[Problem]:
    """Reads the file of every image, and its volume through `read_volume(image)` (which returns "" or a fault)."""
    visual = experiment.visual
    folder = input_folder(experiment.data, visual)
    images = list({image: row.record for row in reversed(found.rows) for image in row.record.images}.items())

    def faults(image: str) -> list[str]:
        lines = []
        if is_placed(folder, image):
            try:
                read_input(input_path(folder, image, visual), visual)
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
