"""Generated answers beside their references: reads a `*_vqa.json`, strips end tokens and pairs it with the records.

The file has BTB3D's layout: a list of {"image", "conversations_out": [{"id", "question", "answer", "token_ids"?}, ...]}, one
element a study and one entry a question, in data-set order. The k-th entry of a study answers the record's k-th question.
Questions with choices that were answered by likelihood have `prediction` (a letter) and `probabilities` ({letter: share}) too.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmed.data.embeddings import npz_name
from jaxmed.data.placeholders import question_text
from jaxmed.data.records import Record
from jaxmed.errors import UserError

_END = re.compile(r"(?:\s*(?:<\|[a-z0-9_]+\|>|</s>|<eos>|<pad>|\[PAD\]|<end_of_turn>))+\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Study:
    """One record with what was written for it; the tuples have one entry a question."""

    id: str
    image: str
    """The volume as the record names it ("" for text alone)."""
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...]
    region: str = ""
    """Of the body, where the record is one region's report"""
    question_type: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text, for multiple choice; empty for a question that was asked without them"""
    letter: str = ""
    """The right one"""
    likelihoods: "tuple[Likelihood, ...]" = ()
    """One an answer where all answers have one, else empty"""
    patient: str = ""
    """Where the data set names them"""

    @property
    def volume(self) -> str:
        """The volume, where the record is one of several parts of what is asked about it; "": it is a study of its own."""
        return self.image if self.region or self.options or self.question_type else ""


@dataclass(frozen=True)
class Likelihood:
    """What the model holds for likely, among the choices."""

    prediction: str
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class Written:
    """One element of the file."""

    id: str
    images: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    likelihoods: tuple[Likelihood, ...] = ()


def strip_end(text: str) -> str:
    """The text without end-of-turn tokens and the spaces around it."""
    return _END.sub("", _writable(text)).strip()


def _writable(text: str) -> str:
    """Halves of a character, which JSON can hold and no file, as they are escaped there."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _element(path: str, index: int, element: Any) -> Written:
    where, hint = f"{path}: element {index}", "give the file that `jaxmed generate` wrote"
    turns = element.get("conversations_out") if isinstance(element, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{where} has no "conversations_out"; {hint}')
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("question", "answer")):
            raise UserError(f'{where} has an entry without the texts "question" and "answer"; {hint}')
    ids = {turn.get("id") for turn in turns}
    if len(ids) != 1 or None in ids:
        raise UserError(f"{where} has the ids {sorted(map(str, ids))}; all its entries must carry the one id of their record")
    image = element.get("image") or ""
    images = tuple(str(name) for name in (image if isinstance(image, list) else [image]) if name)
    questions = tuple(_writable(turn["question"]) for turn in turns)
    answers = tuple(strip_end(turn["answer"]) for turn in turns)
    return Written(str(ids.pop()), images, questions, answers, _likelihoods(turns, where))


def _likelihoods(turns: list[dict[str, Any]], where: str) -> tuple[Likelihood, ...]:
    found = []
    for turn in turns:
        shares = turn.get("probabilities")
        if shares is None:
            return ()
        usable = (
            isinstance(shares, dict) and shares and all(isinstance(v, int | float) and 0 <= v <= 1 for v in shares.values())
        )
        if not usable or not isinstance(turn.get("prediction"), str) or abs(sum(shares.values()) - 1) > 0.01:
            raise UserError(
                f"{where}: its probabilities must be shares of the letters with sum 1, and its prediction a letter; write the "
                "file again with `jaxmed generate`"
            )
        found.append(Likelihood(turn["prediction"], {str(letter): float(share) for letter, share in shares.items()}))
    return tuple(found)


def read_answers(path: str) -> list[Written]:
    """All elements of a `*_vqa.json`."""
    try:
        elements = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the file that `jaxmed generate` wrote") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give the final *_vqa.json, not the .jsonl of a process") from error
    if not isinstance(elements, list) or not elements:
        raise UserError(f"{path} holds no list of studies; give the file that `jaxmed generate` wrote")
    return [_element(path, i, element) for i, element in enumerate(elements)]


def _pair_one(written: Written, record: Record, path: str) -> Study:
    where, hint = f"{path}: study {written.id!r}", "give the records it was written from"
    for image, expected in zip(written.images, record.images, strict=False):
        if npz_name(image) != npz_name(expected):
            raise UserError(f"{where} was written for {image}, its record names {expected}; {hint}")
    asked, references = record.turns[::2], record.turns[1::2]
    if len(asked) != len(written.answers):
        raise UserError(f"{where} has {len(written.answers)} answers, its record {len(asked)} questions; {hint}")
    image, scored = record.images[0] if record.images else "", len(references)  # the last question may lack its reference
    texts = tuple(turn.value.strip() for turn in references)
    for said in written.likelihoods if record.options else ():
        if said.probabilities.keys() != record.options.keys() or said.prediction not in record.options:
            chosen = f"{said.prediction} among {', '.join(said.probabilities)}"
            raise UserError(f"{where} chooses {chosen}, its record has the options {', '.join(record.options)}; {hint}")
    return Study(
        _writable(written.id),
        _writable(image),
        written.questions[:scored],
        written.answers[:scored],
        texts,
        region=record.region,
        question_type=record.question_type,
        options=record.options if _names_choices(record) or written.likelihoods else {},
        letter=record.answer,
        likelihoods=written.likelihoods[:scored],
        patient=record.patient,
    )


def _names_choices(record: Record) -> bool:
    """Whether a question with options shows them: asked openly, its answer is a text like any other."""
    right = f"{record.answer}. {record.options.get(record.answer, '')}".lower()
    return bool(record.options) and any(right in turn.value.lower() for turn in record.turns[::2])


def _check_ids(ours: Counter[str], theirs: Counter[str], path: str) -> None:
    strangers = [name for name in ours if name not in theirs]
    if strangers:
        few = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
        raise UserError(
            f"{path}: {len(strangers)} studies ({few}) are not in the records; give the records it was written from"
        )
    for name, count in ours.items():
        if count != theirs[name]:
            times = f"{count} times here and {theirs[name]} times in the records"
            raise UserError(f"{path}: the id {name!r} occurs {times}; make the ids unique")


def pair(written: list[Written], records: list[Record], path: str) -> tuple[list[Study], list[str]]:
    """Studies in the order of the file, and notices: records without an answer, answers without a reference, other questions.

    An id that occurs several times is matched in order, and only if both sides have it equally often.
    """
    ours, theirs = Counter(element.id for element in written), Counter(record.id for record in records)
    _check_ids(ours, theirs, path)
    by_id: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_id[record.id].append(record)
    queues = {name: iter(found) for name, found in by_id.items()}
    studies, reworded = [], 0
    for element in written:
        record = next(queues[element.id])
        studies.append(_pair_one(element, record, path))
        # whether a question names its image's place is the template's matter
        asked = [question_text(turn.value).strip() for turn in record.turns[::2]]
        reworded += asked != [question_text(question).strip() for question in element.questions]
    notices = []
    missing = sum(count for name, count in theirs.items() if name not in ours)
    if missing:
        notices.append(f"{missing} of {len(records)} records have no answer in {Path(path).name}; the scores leave them out")
    if reworded:
        notices.append(f"{reworded} studies were asked other questions than their records now hold")
    unscored = sum(not study.references for study in studies)
    if unscored:
        notices.append(f"{unscored} studies have no reference answer in the records; the scores leave them out")
    studies = [study for study in studies if study.references]
    if not studies:
        raise UserError(f"{path}: none of its studies has a reference answer in the records; there is nothing to score")
    return studies, notices


def control_answers(path: str, studies: list[Study]) -> list[tuple[str, ...]]:
    """The answers written with the wrong images, in the order of `studies`: the same ids with as many answers each."""
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for element in read_answers(path):
        found[element.id].append(element.answers)
    queues = {name: iter(answers) for name, answers in found.items()}
    hint = "write the control from the same records (jaxmed generate … --control shuffled)"
    answers = []
    for study in studies:
        theirs = next(queues.get(study.id, iter(())), None)
        if theirs is None:
            missing = sum(other.id not in found for other in studies)
            raise UserError(f"{path} lacks {max(missing, 1)} of the studies, {study.id!r} among them; {hint}")
        if len(theirs) < len(study.answers):
            raise UserError(f"{path}: study {study.id!r} has {len(theirs)} answers, {len(study.answers)} are needed; {hint}")
        answers.append(theirs[: len(study.answers)])
    return answers
