"""Pairs of a volume and its report, for contrastive pretraining: the data set, and the arrays of a batch's rows.

A record's image is the volume, its last answer the report. A report is cut or shortened to T = `data.max_length` tokens, those
at its ends included; what is drawn for a pair depends on (seed, epoch, sample, repeat) alone.

Axis letters: R rows of the batch, D, H, W depth, rows and columns of a volume, T text.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxmed.config import DataConfig, Experiment
from jaxmed.data.augment import augment
from jaxmed.data.conversation import reading_of
from jaxmed.data.dataset import sample_draw
from jaxmed.data.input_files import check_files
from jaxmed.data.inputs import input_folder, input_path, read_input
from jaxmed.data.mixture import GroupDraw
from jaxmed.data.plan import GlobalBatch, Plan, SampleSize, evaluation_plan
from jaxmed.data.records import Record, load_records, where
from jaxmed.data.rows import Arrays
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import BadRecords, Problem, UserError

_SHORTENING = 7
"""Last word of the key under which sentences are drawn"""


@dataclass(frozen=True)
class Pair:
    """A record that can be used."""

    record: Record
    path: str
    """File of the volume"""
    text: str
    """The report, whole"""
    size: SampleSize


@dataclass(frozen=True)
class PairSet:
    experiment: Experiment
    tokenizer: Tokenizer
    samples: tuple[Pair, ...]
    problems: tuple[Problem, ...] = ()
    """Records left out because they cannot be used (`on_bad_record skip`)"""
    voided: tuple[Problem, ...] = ()
    encoder: str = ""
    notices: tuple[str, ...] = ()
    draw: GroupDraw | None = None
    """Which pairs an epoch has, where that is not every pair once"""

    def plan(self) -> Plan:
        """The training plan, by step: every row holds one pair."""
        return Plan(self._sizes, self._data, 1, self.experiment.train.seed, self.draw)

    def evaluation_plan(self) -> list[GlobalBatch]:
        """Every pair once, in the order of the file."""
        return evaluation_plan(self._sizes, self._data, 1)

    @property
    def _sizes(self) -> tuple[SampleSize, ...]:
        return tuple(pair.size for pair in self.samples)

    @property
    def _data(self) -> DataConfig:
        """Texts are all of one length, that of the longest that may be."""
        return dataclasses.replace(self.experiment.data, buckets=(self.experiment.data.max_length,))

    def text(self, index: int, key: tuple[int, int, int]) -> str:
        """The report of a pair, shortened as `contrastive.truncate` says; `key`: see GlobalBatch.key."""
        whole, data = self.samples[index].text, self.experiment.data
        if self.experiment.contrastive.truncate == "head":
            return whole
        epoch, sample, repeat = key
        return shorten(whole, self.tokenizer, data.max_length, (self.experiment.train.seed, max(epoch, 0), sample, repeat))

    def build_rows(self, batch: GlobalBatch, rows: Sequence[int]) -> tuple[Arrays, list[Problem]]:
        """`images` [R, D, H, W, C] in the dtype of the computation, `tokens` and `mask` [R, T], `samples` [R] (0: no pair, else
        1 + the pair's number in the batch), and the pairs that were left out."""
        experiment, length = self.experiment, self.experiment.data.max_length
        dtype = ml_dtypes.bfloat16 if experiment.model.dtype == "bfloat16" else np.float32
        arrays = {
            "images": np.zeros((len(rows), *experiment.visual.volume, experiment.visual.channels), dtype),
            "tokens": np.full((len(rows), length), self.tokenizer.pad_id, np.int32),
            "mask": np.zeros((len(rows), length), np.int32),
            "samples": np.zeros(len(rows), np.int32),
        }
        arrays["mask"][:, 0] = 1  # a text of padding alone would attend to nothing
        problems, offsets = [], batch.offsets
        for place, row in enumerate(rows):
            for index in batch.rows[row]:
                pair, key = self.samples[index], batch.key(offsets[row])
                try:
                    arrays["images"][place] = self.volume(pair.path, key)
                except UserError as error:
                    problem = Problem(where(pair.record), str(error))
                    if experiment.data.on_bad_record == "stop":
                        raise UserError(f"{problem}; or pass --on-bad-record skip to go on without it") from None
                    problems.append(problem)
                    continue
                ids, mask = self.tokenizer.encode_batch([self.text(index, key)], length)
                arrays["tokens"][place], arrays["mask"][place] = ids[0], mask[0]
                arrays["samples"][place] = 1 + offsets[row]
        return arrays, problems

    def volume(self, path: str, key: tuple[int, int, int]) -> np.ndarray:
        """[D, H, W, C] float32, changed at random in training as `visual.prepare.augment` says; UserError names the file."""
        visual = self.experiment.visual
        return augment(read_input(path, visual).values, visual.prepare.augment, self.experiment.train.seed, key)


def scan_pairs(experiment: Experiment, tokenizer: Tokenizer, records_path: str) -> PairSet:
    """The usable pairs of a records file. BadRecords lists all that is wrong, unless `data.on_bad_record` is skip."""
    data, visual = experiment.data, experiment.visual
    records, problems = pair_records(experiment, records_path)
    folder = input_folder(data, visual)
    if not folder and not all(os.path.isabs(image) for record in records for image in record.images):
        raise UserError(f"{records_path}: give the folder of the volumes, --data.volumes")
    paths = [input_path(folder, record.images[0], visual) if record.images else "" for record in records]
    files = check_files([path for path in paths if path], visual, records_path)
    samples = []
    for record, path in zip(records, paths, strict=True):
        text = report_of(record)
        faults = faults_of(record, text) or ([files[path].problem] if files[path].problem else [])
        if faults:
            problems.append(Problem(where(record), "; ".join(faults)))
            continue
        samples.append(Pair(record, path, text, SampleSize(data.max_length, 0, 1, len(text.split()))))
    if problems and data.on_bad_record == "stop":
        raise BadRecords(problems)
    if not samples:
        raise UserError(f"{records_path}: no record is a pair of a volume and a report; the first: {problems[0]}")
    draw = sample_draw([pair.record for pair in samples], records_path, experiment)
    return PairSet(experiment, tokenizer, tuple(samples), tuple(problems), draw=draw)


def pair_records(experiment: Experiment, records_path: str) -> tuple[list[Record], list[Problem]]:
    """The records of a file, read as pairs, and what cannot be read."""
    # where an image would stand in a question is nothing to a pair
    return load_records(
        records_path, dataclasses.replace(reading_of(experiment), missing_image_token="prepend", placeholders=False)
    )


def report_of(record: Record) -> str:
    return next((turn.value for turn in reversed(record.turns) if turn.role == "gpt"), "")


def faults_of(record: Record, text: str) -> list[str]:
    """What keeps a record from being a pair, before its file is looked at."""
    if len(record.images) != 1:
        return [f"it has {len(record.images)} images; a pair is one volume and its report"]
    return [] if text.strip() else ["it has no report; write one, or take the record out"]


def shorten(text: str, tokenizer: Tokenizer, length: int, key: Sequence[int]) -> str:
    """A report of more than `length` tokens by M3D's rule: its first sentence, uncounted, then sentences drawn at random as
    long as they fit together, each counted with the tokens at its ends; in the order drawn. A chosen sentence stays in the
    pool until it is drawn again. A report without a full stop is left to the tokenizer's cut."""

    def tokens(sentence: str) -> int:
        return len(tokenizer.encode(sentence))

    if tokens(text) <= length:
        return text
    first, *pool = text.split(".")
    chosen, count = [first], 0
    # each sentence is drawn twice at most
    draws = iter(np.random.Philox(np.random.SeedSequence([*key, _SHORTENING])).random_raw(2 * len(pool)).tolist())
    while pool:
        sentence = pool[next(draws) % len(pool)]
        more = tokens(sentence)
        if count + more <= length and sentence not in chosen:
            chosen.append(sentence)
            count += more
        else:
            pool.remove(sentence)
    return ".".join(chosen)
