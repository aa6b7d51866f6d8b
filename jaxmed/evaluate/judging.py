"""Asks a judge about every answer, keeps what it said, and turns it into numbers: GREEN and M3D's percentage.

Replies are kept in a file of JSON lines as they come, so that a restart asks only what is missing; a reply that says nothing
is not kept and will be asked for again. What a judge cannot be got to say is a Problem with its study's name, and its pair
has no score.
"""

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.evaluate import green, percentage
from jaxmed.evaluate.judges import Judge, JudgeError, prompt_key, read_lines
from jaxmed.evaluate.studies import Study

Measure = Literal["green", "percentage"]
MEASURES: tuple[Measure, ...] = ("green", "percentage")
GIVE_UP, GIVE_UP_LATER = 5, 20
"""Calls in succession without an answer, at the start and later on, after which a judge that may be absent is taken for it"""
UPSTREAM_ZERO = "green_zero"
"""Name of the defect (`--upstream-exact`): a reply without any section scores 0"""


@dataclass(frozen=True)
class Settings:
    """What shapes the questions and how replies are read; recorded with the scores."""

    measures: tuple[Measure, ...] = ("green",)
    version: green.Version = "challenge"
    wording: green.Wording = green.OUR_WORDING
    zero: bool = False
    """Upstream's defect `green_zero`"""


@dataclass(frozen=True)
class Question:
    """One pair that a judge is asked about."""

    study: int
    """Index of the study"""
    turn: int
    name: str
    """The study's id"""
    measure: Measure
    prompt: str
    file: str = ""
    """Of the answers"""

    @property
    def where(self) -> str:
        return f"{self.file}: study {self.name!r}" if self.file else f"study {self.name!r}"


@dataclass
class Judged:
    """One measure of all studies."""

    measure: Measure
    judge: str
    values: np.ndarray
    """[S] float64, the mean over a study's answers; NaN where it has none"""
    counts: list[list[green.Counts]] = field(default_factory=list)
    """GREEN's, by study and answer"""
    asked: int = 0
    answered: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """What is recorded with the score"""


def questions(studies: Sequence[Study], settings: Settings, file: str = "") -> list[Question]:
    """Prompts for every answer with a reference, in the studies' order; none for multiple choice. GREEN is for reports and is
    not asked about answers to questions with a type. `file`: of the answers, for messages."""
    found = []
    words = green.WORDS[settings.version]
    for i, study in enumerate(studies):
        for turn, (question, answer, reference) in enumerate(
            zip(study.questions, study.answers, study.references, strict=True)
        ):
            if study.options or not reference.strip():
                continue
            plain = question.replace("<image>", "").strip()
            made = {
                "green": lambda r=reference, a=answer: settings.wording.prompt(r, a, words),
                "percentage": lambda q=plain, r=reference, a=answer: percentage.prompt(q, r, a),
            }
            for measure in settings.measures:
                if measure == "percentage" or not study.question_type:
                    found.append(Question(i, turn, study.id, measure, made[measure](), file))
    return found


def write_requests(path: str, asked: Sequence[Question]) -> int:
    """Prompts for somebody else's judge, each once; how many."""
    rows = {prompt_key(q.prompt): {"study": q.name, "measure": q.measure, "prompt": q.prompt} for q in asked}
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"key": key} | row) + "\n" for key, row in rows.items())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --judge-requests") from error
    return len(rows)


class Kept:
    """Replies on disk, by prompt and judge."""

    def __init__(self, path: str, judge: str, anew: bool = False):
        """`anew`: the judge has its answers at hand, which count before those that are kept."""
        self.path, self.judge, self.found = path, judge, dict[str, str]()
        if os.path.exists(path):
            _cut_torn_line(path)
            for row in read_lines(path):
                if row.get("judge") == judge and isinstance(row.get("reply"), str):
                    self.found[str(row.get("key"))] = row["reply"]
        self._written = dict(self.found)
        if anew:
            self.found = {}

    def add(self, question: Question, reply: str) -> None:
        key = prompt_key(question.prompt)
        self.found[key] = reply
        if self._written.get(key) == reply:
            return
        self._written[key] = reply
        row = {"key": key, "judge": self.judge, "measure": question.measure, "study": question.name, "reply": reply}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space, replies are kept") from error


def _cut_torn_line(path: str) -> None:
    """Removes what follows the last newline: a reply that was being written when the process died."""
    content = Path(path).read_bytes()
    if not content.endswith(b"\n"):
        Path(path).write_bytes(content[: content.rfind(b"\n") + 1])


def ask(
    asked: Sequence[Question], judge: Judge, kept: Kept, settings: Settings, skip: bool, tell: Callable[[int, int], None]
) -> tuple[dict[str, str], list[Problem]]:
    """Replies by `prompt_key`, and a Problem for each prompt without one. Not `skip`: BadRecords at the first of them.
    `tell(done, all)`: called as replies come."""
    for question in asked:  # of a start that took for 0 what is no judgment
        reply = kept.found.get(prompt_key(question.prompt))
        if reply is not None and _fault(question, reply, settings):
            del kept.found[prompt_key(question.prompt)]
    missing = list({prompt_key(q.prompt): q for q in asked if prompt_key(q.prompt) not in kept.found}.values())
    groups = [missing[i : i + judge.batch] for i in range(0, len(missing), judge.batch)]
    problems: list[Problem] = []
    answered, silent = False, 0
    for done, (group, replies) in enumerate(_answers(groups, judge), 1):
        silent += 1
        if isinstance(replies, str):
            faults = [replies] * len(group)
        else:
            answered, silent = True, 0
            faults = [_fault(question, reply, settings) for question, reply in zip(group, replies, strict=True)]
            for question, reply, fault in zip(group, replies, faults, strict=True):
                if not fault:
                    kept.add(question, reply)
        pairs = zip(group, faults, strict=True)
        problems += [Problem(q.where, f"{q.measure}: {fault}") for q, fault in pairs if fault]
        tell(done, len(groups))
        if judge.may_be_absent and silent == (GIVE_UP_LATER if answered else GIVE_UP):
            which = f"none of the {'last' if answered else 'first'} {silent} calls"
            hint = f"; what it said is in {kept.path}, the same command asks for the rest" if answered else ""
            raise UserError(f"the judge answered {which}; the last: {problems[-1]}{hint}")
        if problems and not skip:
            raise BadRecords(problems, "answer", "could not be judged; the same command asks for {them} again")
    if groups and not answered and not kept.found:
        raise UserError(f"the judge answered none of {len(groups)} calls; the last: {problems[-1]}")
    place = {question.where: number for number, question in enumerate(asked)}
    return kept.found, sorted(problems, key=lambda problem: place[problem.where])


def _answers(groups: list[list[Question]], judge: Judge) -> Iterator[tuple[list[Question], list[str] | str]]:
    """Groups with the replies, or with why there are none, as they come; `judge.parallel` calls are under way at a time."""

    def call(group: list[Question]) -> list[str] | str:
        try:
            return judge.complete([question.prompt for question in group])
        except JudgeError as error:
            return f"the judge did not answer: {error}"

    if judge.parallel == 1:
        for group in groups:
            yield group, call(group)
        return
    waiting, done = iter(groups), queue.SimpleQueue[tuple[list[Question], list[str] | str | BaseException]]()
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                group = next(waiting, None)
            if group is None:
                return
            try:
                done.put((group, call(group)))
            except BaseException as error:  # the reader's to raise: a thread has nobody to tell
                done.put((group, error))

    # Threads of a pool would be waited for when the process ends, for as long as a judge takes that does not answer.
    for _ in range(min(judge.parallel, len(groups))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in groups:
            group, replies = done.get()
            if isinstance(replies, BaseException):
                raise replies
            yield group, replies
    finally:
        stop.set()


def _fault(question: Question, reply: str, settings: Settings) -> str:
    """What is wrong with a reply; "" for one that can be read."""
    readable = green.is_reply(green.clean(reply)) or settings.zero
    if question.measure == "percentage":
        readable = percentage.parse(reply) is not None
    start = " ".join(reply.split())[:60]
    return "" if readable else f"the judge's reply is no judgment ({start!r})"


def results(studies: Sequence[Study], asked: Sequence[Question], replies: dict[str, str], judge: str, settings: Settings):
    """One Judged a measure."""
    return [_result(studies, [q for q in asked if q.measure == m], replies, judge, m, settings) for m in settings.measures]


def _result(
    studies: Sequence[Study],
    asked: list[Question],
    replies: dict[str, str],
    judge: str,
    measure: Measure,
    settings: Settings,
) -> Judged:
    scores: list[list[float]] = [[] for _ in studies]
    counts: list[list[green.Counts]] = [[] for _ in studies]
    for question in asked:
        reply = replies.get(prompt_key(question.prompt))
        if reply is None:
            continue
        if measure == "green":
            counts[question.study].append(green.parse(reply))
            scores[question.study].append(counts[question.study][-1].score)
        else:
            scores[question.study].append(percentage.parse(reply))
    values = np.array([np.mean(row) if row else np.nan for row in scores])
    facts: dict[str, Any] = {"judge": judge, "asked": len(asked), "answered": sum(map(len, scores))}
    if measure == "green":
        wording = settings.wording
        version = {"version": settings.version, "words": green.WORDS[settings.version]}
        facts |= version | {"wording": wording.source, "wording_hash": wording.hash}
    return Judged(measure, judge, values, counts if measure == "green" else [], len(asked), facts["answered"], facts)
