"""The data set of a run: every record checked before the first step, and the size of each sample.

What can be known without the values of the tokens is checked here, all of it in one list: records, image places, headers of
the token files, lengths, supervised tokens. Values (NaN) are checked when a file is read.
"""

import math
from dataclasses import dataclass, field

from jaxmed.config import Experiment
from jaxmed.data.conversation import check_template
from jaxmed.data.embeddings import Header, encoder_problem, header_problem, merged_grid, npz_path
from jaxmed.data.plan import GlobalBatch, Plan, SampleSize, bucket_for, capacity, evaluation_plan
from jaxmed.data.records import Record, load_records, where
from jaxmed.data.sizes import Progress, TextSize, read_headers, text_sizes
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import BadRecords, Problem, UserError

# A bucket that would hold too long a sample is suggested as a multiple of this.
BUCKET_STEP = 256


@dataclass(frozen=True)
class Sample:
    """A record that can be used."""

    record: Record
    size: SampleSize
    paths: tuple[str, ...]
    """Token file of each image"""
    tokens: tuple[int, ...]
    """Tokens of each image in its file, after merging"""


@dataclass(frozen=True)
class Dataset:
    experiment: Experiment
    tokenizer: Tokenizer
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...] = ()
    """Records left out because they cannot be used (`on_bad_record skip`)"""
    voided: tuple[Problem, ...] = ()
    """Records left out because none of their tokens is supervised, and why"""
    encoder: str = ""
    """Encoder of the token files: `visual.encoder`, else what the first signed file names, "" if there is none"""
    notices: tuple[str, ...] = field(default=())
    """What the user should be told once"""

    @property
    def sizes(self) -> tuple[SampleSize, ...]:
        return tuple(sample.size for sample in self.samples)

    def plan(self) -> Plan:
        """The training plan, by step."""
        return Plan(self.sizes, self.experiment.data, images_per_row(self.experiment), self.experiment.train.seed)

    def evaluation_plan(self) -> list[GlobalBatch]:
        """Every sample once, without shuffling."""
        return evaluation_plan(self.sizes, self.experiment.data, images_per_row(self.experiment))


def images_per_row(experiment: Experiment) -> int:
    return 0 if experiment.visual.kind == "none" else experiment.visual.images


def text_places(experiment: Experiment, tokens: int) -> int:
    """Places that an image of `tokens` tokens takes in the text."""
    return experiment.model.projector.pool_queries if experiment.model.projector.pooled else tokens


def scan(experiment: Experiment, tokenizer: Tokenizer, records_path: str, progress: Progress | None = None) -> Dataset:
    """The usable samples of a records file. BadRecords lists all that is wrong, unless `data.on_bad_record` is skip."""
    data, visual = experiment.data, experiment.visual
    check_template(data.template, tokenizer)
    records, problems = load_records(records_path)
    with_images = sum(1 for record in records if record.images)
    if visual.kind != "none" and with_images and not data.embeddings:
        raise UserError(
            f"{records_path}: {with_images} records have images; give the folder of their tokens, --data.embeddings"
        )
    texts = text_sizes(records, records_path, tokenizer, data.template, progress)
    paths = [tuple(npz_path(data.embeddings, image) for image in record.images) for record in records]
    wanted = [path for group in paths for path in group] if visual.kind != "none" else []
    headers = read_headers(wanted, records_path)
    signed = (header.encoder for path in wanted if isinstance(header := headers[path], Header) and header.encoder)
    encoder = visual.encoder or next(signed, "")
    samples, voided = [], []
    for record, text, files in zip(records, texts, paths, strict=True):
        faults = _file_faults(record, text, [headers[path] for path in files if path in headers], experiment, encoder)
        if not faults and text.voided:
            voided.append(Problem(where(record), text.voided))
            continue
        sample = None if faults else _sample(record, text, files, headers, experiment)
        if sample is not None:
            faults = _size_faults(text, sample, experiment)
        if faults:
            problems.append(Problem(where(record), "; ".join(faults)))
        else:
            samples.append(sample)
    if problems and data.on_bad_record == "stop":
        raise BadRecords(problems)
    if not samples:
        raise UserError(_nothing_left(records_path, problems, voided))
    return Dataset(experiment, tokenizer, tuple(samples), tuple(problems), tuple(voided), encoder, _notices(headers))


def _file_faults(
    record: Record, text: TextSize, headers: list[Header | UserError], experiment: Experiment, encoder: str
) -> list[str]:
    """What is wrong with a record's images, before its lengths can be known."""
    visual = experiment.visual
    if record.images and visual.kind == "none":
        return ["it has an image, but visual.kind is none; set visual.kind, or train on records of text alone"]
    faults = []
    if text.places != len(record.images):
        faults.append(f"{text.places} places for images, {len(record.images)} images; write one <image> for each image")
    if len(record.images) > visual.images and visual.kind != "none":
        faults.append(
            f"{len(record.images)} images, visual.images is {visual.images}; set visual.images to the most a record has"
        )
    for header in headers:
        if isinstance(header, UserError):
            fault = str(header)
        else:
            fault = header_problem(header, visual) or encoder_problem(header, encoder)
        if fault and fault not in faults:
            faults.append(fault)
    return faults


def _sample(
    record: Record, text: TextSize, files: tuple[str, ...], headers: dict[str, Header | UserError], experiment: Experiment
) -> Sample:
    tokens = tuple(math.prod(merged_grid(headers[path], experiment.visual)) for path in files)
    places = sum(text_places(experiment, count) for count in tokens)
    size = SampleSize(text.length + places, text.supervised, len(tokens), text.words)
    return Sample(record, size, files, tokens)


def _size_faults(text: TextSize, sample: Sample, experiment: Experiment) -> list[str]:
    """What keeps a sample from fitting any row."""
    data, size = experiment.data, sample.size
    bucket = bucket_for(size.length, data.buckets)
    if not bucket:
        parts = f"{text.length} of text" + (f", {size.length - text.length} of images" if sample.tokens else "")
        would = -(-size.length // BUCKET_STEP) * BUCKET_STEP
        return [
            f"{size.length} tokens ({parts}), the largest bucket is {data.buckets[-1]}; add one of {would} to data.buckets "
            "or shorten the text"
        ]
    if size.supervised > capacity(data, 0, bucket)[1]:
        return [f"{size.supervised} supervised tokens, data.supervised is {data.supervised}; raise it to {size.supervised}"]
    return []


def _nothing_left(path: str, problems: list[Problem], voided: list[Problem]) -> str:
    first = (problems + voided)[0]
    return (
        f"{path}: no record can be trained on ({len(problems)} cannot be used, {len(voided)} have no supervised token); "
        f"the first: {first}"
    )


def _notices(headers: dict[str, Header | UserError]) -> tuple[str, ...]:
    good = [header for header in headers.values() if isinstance(header, Header)]
    unsigned = sum(not header.encoder for header in good)
    if not unsigned:
        return ()
    return (f"{unsigned} of {len(good)} token files do not name their encoder; make sure that they are of one encoder",)
