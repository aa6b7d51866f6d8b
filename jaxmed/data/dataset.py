"""The data set of a run: every record checked before the first step, and the size of each sample.

What can be known without the values of the images is checked here, all of it in one list: records, image places, headers of
the image files, lengths, supervised tokens. Values (NaN, pixels) are checked when a file is read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxmed.config import Experiment, VisualConfig
from jaxmed.data.asking import asked_sizes, variants
from jaxmed.data.conversation import TextOptions, check_template, encode_training, reading_of, text_options
from jaxmed.data.examples import spliced_counts
from jaxmed.data.input_files import ImageFile, check_files, expected_encoder
from jaxmed.data.inputs import FOLDERS, TOKEN_KINDS, input_folder, input_path, token_count
from jaxmed.data.mixture import GroupDraw, group_draw, read_mixture
from jaxmed.data.plan import GlobalBatch, Plan, SampleSize, bucket_for, capacity, evaluation_plan
from jaxmed.data.records import Record, load_records, where
from jaxmed.data.sizes import Progress, TextSize
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
    """File of each image"""
    tokens: tuple[int, ...]
    """Tokens of each image before the projector: in its file, after merging, or out of the tower"""
    places: tuple[int, ...]
    """Places of each image in the text, were nothing cut off"""


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
    draw: GroupDraw | None = None
    """Which samples an epoch has, where that is not every sample once"""

    @property
    def sizes(self) -> tuple[SampleSize, ...]:
        return tuple(sample.size for sample in self.samples)

    def plan(self) -> Plan:
        """The training plan, by step."""
        return Plan(self.sizes, self.experiment.data, images_per_row(self.experiment), self.experiment.train.seed, self.draw)

    def evaluation_plan(self) -> list[GlobalBatch]:
        """Every sample once, without shuffling."""
        return evaluation_plan(self.sizes, self.experiment.data, images_per_row(self.experiment))


def images_per_row(experiment: Experiment) -> int:
    return 0 if experiment.visual.kind == "none" else experiment.visual.images


def scan(experiment: Experiment, tokenizer: Tokenizer, records_path: str, progress: Progress | None = None) -> Dataset:
    """The usable samples of a records file. BadRecords lists all that is wrong, unless `data.on_bad_record` is skip."""
    data, visual = experiment.data, experiment.visual
    check_template(data.template, tokenizer)
    options = text_options(experiment)
    records, problems = load_records(records_path, reading_of(experiment))
    folder = input_folder(data, visual)
    _check_folder(records, records_path, folder, experiment)
    texts = asked_sizes(records, records_path, tokenizer, data.template, progress, options)
    paths = [tuple(input_path(folder, image, visual) for image in record.images) for record in records]
    wanted = [path for group in paths for path in group]
    files = check_files(wanted, visual, records_path)
    encoder = expected_encoder(visual, (files[path].encoder for path in wanted if path in files))
    samples, voided = [], []
    for record, text, group in zip(records, texts, paths, strict=True):
        faults = _file_faults(record, text, [files[path] for path in group if path in files], experiment)
        if not faults and text.voided:
            voided.append(Problem(where(record), text.voided))
            continue
        sample = None if faults else _sample(record, text, group[: text.places], files, experiment, tokenizer, options)
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
    notices, draw = _notices(files, visual), sample_draw([sample.record for sample in samples], records_path, experiment)
    return Dataset(experiment, tokenizer, tuple(samples), tuple(problems), tuple(voided), encoder, notices, draw)


def sample_draw(records: Sequence[Record], records_path: str, experiment: Experiment) -> GroupDraw | None:
    """What an epoch takes of these usable records of a file, where that is not each of them once."""
    keys = [(record.dataset, record.region) for record in records]
    return group_draw(keys, read_mixture(records_path), experiment.data.region_weights)


def _check_folder(records: list[Record], records_path: str, folder: str, experiment: Experiment) -> None:
    with_images = sum(1 for record in records if not all(map(os.path.isabs, record.images)))
    if with_images and experiment.visual.kind != "none" and not folder:
        field = FOLDERS[experiment.visual.kind]
        what = {"embeddings": "tokens", "images": "files", "volumes": "volumes"}[field]
        raise UserError(f"{records_path}: {with_images} records have images; give the folder of their {what}, --data.{field}")


def _file_faults(record: Record, text: TextSize, files: list[ImageFile], experiment: Experiment) -> list[str]:
    """What is wrong with a record's images, before its lengths can be known."""
    visual = experiment.visual
    if record.images and visual.kind == "none":
        return ["it has an image, but visual.kind is none; set visual.kind, or train on records of text alone"]
    faults = []
    # The cut of a text can take the place of an image with it.
    lacking = text.places < len(record.images) and not experiment.data.max_length
    if lacking or text.places > len(record.images):
        faults.append(f"{text.places} places for images, {len(record.images)} images; write one <image> for each image")
    if len(record.images) > visual.images and visual.kind != "none":
        faults.append(
            f"{len(record.images)} images, visual.images is {visual.images}; set visual.images to the most a record has"
        )
    return faults + list(dict.fromkeys(file.problem for file in files if file.problem))


def _sample(
    record: Record,
    text: TextSize,
    paths: tuple[str, ...],
    files: dict[str, ImageFile],
    experiment: Experiment,
    tokenizer: Tokenizer,
    options: TextOptions,
) -> Sample:
    grids = [files[path].grid for path in paths]
    tokens = tuple(token_count(grid, experiment.visual) for grid in grids)
    places = tuple(experiment.places(count, grid) for count, grid in zip(tokens, grids, strict=True))
    sizes = [spliced_size(each, text, places, experiment, tokenizer, options) for each in variants(record, tokenizer)]
    length, supervised = (max(size) for size in zip(*sizes, strict=True))
    return Sample(record, SampleSize(length, supervised, len(tokens), text.words), paths, tokens, places)


def spliced_size(
    record: Record, text: TextSize, places: Sequence[int], experiment: Experiment, tokenizer: Tokenizer, options: TextOptions
) -> tuple[int, int]:
    """(length, supervised tokens) of a sample whose images take these places."""
    if not options.max_length or all(count == options.places for count in places):
        return text.length + sum(places), text.supervised
    # The text's size was taken with images of the largest size; what is cut off depends on this sample's own.
    example = encode_training(record, tokenizer, experiment.data.template, options)
    return spliced_counts(example, places, options.max_length)


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


def _notices(files: dict[str, ImageFile], visual: VisualConfig) -> tuple[str, ...]:
    good = [file for file in files.values() if not file.problem]
    unsigned = sum(not file.encoder for file in good)
    if visual.kind not in TOKEN_KINDS or not unsigned:
        return ()
    return (f"{unsigned} of {len(good)} token files do not name their encoder; make sure that they are of one encoder",)
