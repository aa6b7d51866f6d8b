"""Reports for a whole data set: every study's turns, one after the other, through the scheduler and into the journal.

A conversation's next prompt needs the answer before it, so a study waits for its turn while others fill the batches.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmed.api import Model
from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import chain
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_io import base_fingerprint
from jaxmed.data.conversation import check_template
from jaxmed.data.embeddings import encoder_problem, npz_name, read_header
from jaxmed.data.inputs import FOLDERS, TOKEN_KINDS, VisualInput, check_header, input_path, read_input
from jaxmed.data.records import IMAGE_TOKEN, Record, where
from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.generate.control import controlled, exchanged
from jaxmed.generate.journal import Journal, write_json
from jaxmed.generate.prompts import check
from jaxmed.generate.sampling import Sampling
from jaxmed.generate.scheduler import Task


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asked for; everything that shapes an answer."""

    records: str
    folder: str
    """Of the image files: token files, 2-D images or volumes"""
    sampling: Sampling
    max_new_tokens: int
    template: str
    control: str = ""
    """`shuffled`, `zeros` or `noise`: the wrong image on purpose"""
    keep_history_end: bool = False
    """Upstream's defect `history_eot`: an earlier answer keeps its end token, and the template adds another"""
    keep_special_tokens: bool = False
    token_ids: bool = False

    def header(self, model: Model) -> dict[str, Any]:
        """What must agree for a run to be continued. Mesh, batch and number of processes do not count."""
        with open(self.records, "rb") as file:
            records = hashlib.sha256(file.read()).hexdigest()[:16]
        sampling = dataclasses.asdict(self.sampling)
        return {
            "checkpoint": weights_fingerprint(model)[:16],
            "records": records,
            "embeddings": os.path.abspath(self.folder) if self.folder else "",
            "dtype": model.experiment.model.dtype,
            "template": self.template,
            "max_new_tokens": self.max_new_tokens,
            **sampling,
            "control": self.control,
            "history_eot": self.keep_history_end,
            "keep_special_tokens": self.keep_special_tokens,
            "token_ids": self.token_ids,
        }


def weights_fingerprint(model: Model) -> str:
    """Hash of everything that the weights come from."""
    config = model.experiment.model
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.experiment.lora)).encode())
    for folder in [f for f in (config.base, config.tower_folder, *chain(config.adapter)) if f]:
        if detect(folder) != "run":
            digest.update(base_fingerprint(folder).encode())
            continue
        step = manager.newest(folder)
        digest.update(f"{step}".encode())
        root = os.path.join(folder, manager.FOLDER, str(step), "trainable")
        for path in sorted(os.path.join(d, f) for d, _, files in os.walk(root) for f in files):
            with open(path, "rb") as file:
                digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def check_records(
    records: Sequence[Record], problems: list[Problem], request: Request, model: Model, skip: bool
) -> tuple[list[Record], list[Problem]]:
    """All that can be found before the first answer: files, headers, turns. Raises BadRecords unless `skip`."""
    check_template(request.template, model.tokenizer)
    visual, good, found = model.experiment.visual, [], list(problems)
    headers: dict[str, str] = {}
    names: dict[str, int] = {}
    for record in records:
        faults = []
        if not any(turn.role == "human" for turn in record.turns):
            faults.append("has no human turn, so there is nothing to answer")
        if record.id in names:
            faults.append(f"has the id of record {names[record.id]}; ids must differ, results are kept by them")
        names.setdefault(record.id, record.row)
        if record.images and visual.kind == "none":
            faults.append("has an image, and this model reads none; give the folder of a run or of an adapter that does")
        elif record.images and not request.folder:
            faults.append(f"has an image; give the folder of its file with --{FOLDERS[visual.kind]}")
        else:
            for image in record.images:
                path = input_path(request.folder, image, visual)
                if path not in headers:
                    headers[path] = _header_fault(path, model)
                if headers[path]:
                    faults.append(headers[path])
        found += [Problem(where(record), fault) for fault in faults]
        if not faults:
            good.append(record)
    if found and not skip:
        raise BadRecords(found)
    if not good:
        raise UserError(f"{request.records}: no record is left to write a report for")
    if request.control == "shuffled":
        exchanged(good, request.sampling.seed)  # refuses records that cannot be
    return good, found


def _header_fault(path: str, model: Model) -> str:
    visual = model.experiment.visual
    if fault := check_header(path, visual):
        return fault
    other = encoder_problem(read_header(path), visual.encoder) if visual.kind in TOKEN_KINDS and visual.encoder else ""
    return f"{path}: {other}" if other else ""


class Writer:
    """Writes the answers of this process's share of the studies."""

    def __init__(self, model: Model, request: Request, batch: int):
        self.model, self.request = model, request
        self.scheduler = model.scheduler(batch, request.sampling, request.max_new_tokens)
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.history: dict[str, list[tuple[str, str]]] = {}
        self.images: dict[str, tuple[VisualInput, ...]] = {}
        self.records: dict[str, Record] = {}
        self.exchange: dict[str, Record] = {}

    def run(
        self,
        share: Sequence[Record],
        everyone: Sequence[Record],
        journal: Journal,
        skip: bool,
        finished: Callable[[Record], None],
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[Problem]:
        """`share` is what is missing and this process's to do; `everyone` all records, for images that are exchanged.

        `before_batch` is called where all that was finished is on disk.
        """
        problems: list[Problem] = []
        self.exchange = exchanged(everyone, self.request.sampling.seed) if self.request.control == "shuffled" else {}
        waiting = iter(share)
        room = 4 * self.scheduler.rows  # studies whose images are in memory at once
        exhausted = False
        while not exhausted or self.records:
            while not exhausted and len(self.records) < room:
                record = next(waiting, None)
                if record is None:
                    exhausted = True
                    break
                problem = self._begin(record)
                if problem and not skip:
                    raise BadRecords([problem])
                problems += [problem] if problem else []
            bucket = self.scheduler.full()
            if bucket is None:
                bucket = self.scheduler.largest()
            if bucket is None:
                continue
            before_batch()
            for task, ids in self.scheduler.run(bucket):
                self._answered(str(task.name), task.turn, ids, journal, finished)
        return problems

    def _begin(self, record: Record) -> Problem | None:
        """Reads a study's images and queues its first turn."""
        source = self.exchange.get(record.id, record)
        visual = self.model.experiment.visual
        try:
            images = tuple(read_input(input_path(self.request.folder, image, visual), visual) for image in source.images)
            if self.request.control in ("zeros", "noise"):
                images = tuple(controlled(i, self.request.control, record.id, self.request.sampling.seed) for i in images)
            self.images[record.id], self.history[record.id] = images, []
            self.answers[record.id], self.records[record.id] = [], record
            self._queue(record, 0)
        except UserError as error:
            self._forget(record.id)
            return Problem(where(record), str(error))
        return None

    def _queue(self, record: Record, turn: int) -> None:
        questions = _questions(record)
        turns = [*self.history[record.id], ("human", questions[turn])]
        # an image whose place comes in a later turn is not shown before it
        prompt = self.model.conversation(self._with_places(turns, record), self.images[record.id], self.request.template)
        check(prompt, self.model.experiment, f"turn {turn + 1}")
        self.scheduler.add(Task(record.id, prompt, record.id, turn))

    def _with_places(self, turns: list[tuple[str, str]], record: Record) -> list[tuple[str, str]]:
        """An image that no turn of the record names stands before its first one, where upstream's scripts put it."""
        if not record.images or any(IMAGE_TOKEN in turn.value for turn in record.turns):
            return turns
        (role, text), *others = turns
        return [(role, "\n".join([IMAGE_TOKEN] * len(record.images) + [text])), *others]

    def _answered(self, name: str, turn: int, ids: np.ndarray, journal: Journal, finished: Callable[[Record], None]) -> None:
        record = self.records[name]
        question = _questions(record)[turn]
        generation = self.model.generation(ids, self.request.template)
        raw = self.model.answer(ids, self.request.template, keep_special=True)
        printed = raw if self.request.keep_special_tokens else generation.text
        answer = {"id": record.id, "question": question, "answer": printed}
        if self.request.token_ids:
            answer["token_ids"] = generation.token_ids
        self.answers[name].append(answer)
        self.history[name] += [("human", question), ("gpt", raw if self.request.keep_history_end else generation.text)]
        if turn + 1 < len(_questions(record)):
            self._queue(record, turn + 1)
            return
        journal.append(name, entry(record, self.answers[name], self.model.experiment.visual.kind))
        self._forget(name)
        finished(record)

    def _forget(self, name: str) -> None:
        for table in (self.images, self.history, self.answers, self.records):
            table.pop(name, None)


def _questions(record: Record) -> list[str]:
    return [turn.value for turn in record.turns if turn.role == "human"]


def entry(record: Record, answers: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """One study as upstream's file has it; a study without an image has none there."""
    names = [npz_name(image) if kind in TOKEN_KINDS else image for image in record.images]
    image = names[0] if len(names) == 1 else names
    return {"image": image, "conversations_out": answers} if names else {"conversations_out": answers}


def finish(journal: Journal, records: Sequence[Record]) -> bool:
    """Writes the result if every study is done, by whichever process; in the order of the records."""
    journal.refresh()
    if any(record.id not in journal.done for record in records):
        return False
    write_json(journal.out, [journal.done[record.id] for record in records])
    return True
