"""What contrastive training will make of a records file: every report's length, what is cut, whose words repeat, faults.

As jaxmed.report.survey it stops at nothing, reads no voxels, and works before the volumes exist.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from jaxmed.config import Experiment
from jaxmed.data.input_files import ImageFile, check_files
from jaxmed.data.inputs import input_folder, input_path, is_placed
from jaxmed.data.pairs import faults_of, pair_records, report_of, shorten
from jaxmed.data.records import Record, where
from jaxmed.data.sizes import Progress
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import Problem

UNKNOWN = ("[UNK]", "<unk>")
"""Tokens for what a vocabulary cannot spell"""


@dataclass(frozen=True)
class PairRow:
    """One readable record as training would take it."""

    record: Record
    text: str
    """The report, whole"""
    given: str
    """What of it the text encoder's tokenizer gets in the first epoch"""
    length: int
    """Tokens of the whole report, those at its ends included"""
    given_length: int
    """Of what is given, before the tokenizer's own cut"""
    unknown: int
    """Of the whole report's tokens those that stand for no word"""
    placed: bool
    """Whether the volume's file can be read"""
    faults: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class Repeated:
    """Usable pairs that share their words, or their volume."""

    what: str
    rows: tuple[PairRow, ...]


@dataclass(frozen=True)
class PairSurvey:
    rows: tuple[PairRow, ...]
    unreadable: tuple[Problem, ...]
    """Records that are no records"""
    limit: int
    """Tokens that the text encoder is given"""
    told_apart: int
    """Pairs of a batch that are told from each other"""
    voided: tuple[Problem, ...] = ()
    """None: a report is always compared"""

    @property
    def usable(self) -> list[PairRow]:
        return [row for row in self.rows if row.usable]

    @property
    def refused(self) -> list[Problem]:
        return [*self.unreadable, *(Problem(where(row.record), "; ".join(row.faults)) for row in self.rows if row.faults)]

    @property
    def long(self) -> list[PairRow]:
        """Usable pairs whose report is not given whole."""
        return [row for row in self.usable if row.length > self.limit]

    @property
    def repeated_texts(self) -> list[Repeated]:
        return _repeated([(row.text, row) for row in self.usable])

    @property
    def repeated_volumes(self) -> list[Repeated]:
        return _repeated([(row.record.images[0], row) for row in self.usable])

    @property
    def false_negatives(self) -> float:
        """Pairs of an average batch that are told from another with the same words."""
        sizes = [len(group.rows) for group in self.repeated_texts]
        return with_twins(sizes, len(self.usable), self.told_apart)

    def described(self) -> list[str]:
        """Lines for a terminal, beside the count of usable pairs."""
        lines = []
        if self.long:
            lines.append(f"{len(self.long):,} reports have more than {self.limit:,} tokens and are shortened")
        if unknown := sum(row.unknown > 0 for row in self.usable):
            lines.append(f"{unknown:,} reports have words that the vocabulary cannot spell")
        if groups := self.repeated_texts:
            pairs, batch = sum(len(group.rows) for group in groups), self.told_apart
            lines.append(
                f"{pairs:,} pairs share their words with another ({len(groups):,} texts): of {batch:,} told from each other "
                f"{self.false_negatives:.1f} on average have such a twin among them"
            )
        if groups := self.repeated_volumes:
            lines.append(f"{len(groups):,} volume{'s' * (len(groups) > 1)} in more than one pair")
        return lines


def survey_pairs(experiment: Experiment, tokenizer: Tokenizer, path: str, progress: Progress | None = None) -> PairSurvey:
    """All records of a file."""
    data, visual = experiment.data, experiment.visual
    records, unreadable = pair_records(experiment, path)
    folder = input_folder(data, visual)
    images = {image for record in records for image in record.images if is_placed(folder, image)}
    files = check_files([input_path(folder, image, visual) for image in images], visual, path)
    rows: list[PairRow] = []
    usable = 0
    for done, record in enumerate(records, 1):
        row = _row(record, usable, files, experiment, tokenizer)
        usable += row.usable
        rows.append(row)
        if progress and (done % 100 == 0 or done == len(records)):
            progress(done, len(records))
    told_apart = experiment.contrastive.group or data.batch
    return PairSurvey(tuple(rows), tuple(unreadable), data.max_length, min(told_apart, max(usable, 1)))


def _row(record: Record, number: int, files: dict[str, ImageFile], experiment: Experiment, tokenizer: Tokenizer) -> PairRow:
    """`number`: of usable pairs before it, by which its sentences are drawn."""
    data, visual, text = experiment.data, experiment.visual, report_of(record)
    found = [files.get(input_path(input_folder(data, visual), image, visual)) for image in record.images[:1]]
    faults = faults_of(record, text) or [file.problem for file in found if file is not None and file.problem]
    ids, given = tokenizer.encode(text), text
    if len(ids) > data.max_length and experiment.contrastive.truncate == "sentences":
        given = shorten(text, tokenizer, data.max_length, (experiment.train.seed, 0, number, 0))
    unknown = ids.count(unknown_id(tokenizer))
    given_length = len(ids) if given == text else len(tokenizer.encode(given))
    placed = bool(found) and found[0] is not None and not found[0].problem
    return PairRow(record, text, given, len(ids), given_length, unknown, placed, tuple(faults))


def unknown_id(tokenizer: Tokenizer) -> int:
    """-1 where the vocabulary has no such token."""
    found = (tokenizer.token_id(name) for name in UNKNOWN)
    return next((token for token in found if token is not None), -1)


def _repeated(pairs: Sequence[tuple[str, PairRow]]) -> list[Repeated]:
    """The most frequent first."""
    groups: dict[str, list[PairRow]] = defaultdict(list)
    for what, row in pairs:
        groups[what].append(row)
    found = [Repeated(what, tuple(rows)) for what, rows in groups.items() if len(rows) > 1]
    return sorted(found, key=lambda group: -len(group.rows))


def with_twins(sizes: Sequence[int], total: int, batch: int) -> float:
    """Of `batch` pairs drawn from `total` without replacement, how many on average have another of their group among them;
    `sizes`: of the groups of more than one."""
    if batch < 2 or total < 2:
        return 0.0
    return batch / total * sum(size * (1 - _misses(size - 1, total - 1, batch - 1)) for size in sizes)


def _misses(marked: int, total: int, drawn: int) -> float:
    """The chance that none of `marked` among `total` is drawn."""
    if marked + drawn > total:
        return 0.0
    logs = [math.lgamma(n + 1) for n in (total - marked, total - drawn, total - marked - drawn, total)]
    return math.exp(logs[0] + logs[1] - logs[2] - logs[3])
