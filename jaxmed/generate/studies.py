"""Answers for a whole data set: the records of every study, turn by turn, through the scheduler and into the journal.

A study is all records about the same images. These are read once, and what the records' prompts have in common goes through the
decoder once. A conversation's next prompt needs the answer before it, so a study waits for its turn while others fill the
batches.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxmed.api import Model
from jaxmed.data.embeddings import npz_name
from jaxmed.data.inputs import TOKEN_KINDS, VisualInput, input_path, read_input
from jaxmed.data.records import IMAGE_TOKEN, Record, where
from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.generate.choices import answer_entry, choice_of, wordings
from jaxmed.generate.control import controlled, exchanged
from jaxmed.generate.group import Follower, shared_fault
from jaxmed.generate.journal import Journal, write_json
from jaxmed.generate.prompts import check
from jaxmed.generate.request import Request
from jaxmed.generate.scheduler import Answered, Task


def studies_of(records: Sequence[Record], request: Request) -> list[list[Record]]:
    """Records about the same images together, by their first; one without an image is a study of its own. (Noise is drawn for
    each record.)"""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        alone = not record.images or request.control == "noise"
        found.setdefault(("", record.id) if alone else record.images, []).append(record)
    return list(found.values())


@dataclasses.dataclass
class _Open:
    """A record that is being answered."""

    record: Record
    images: tuple[VisualInput, ...]
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    history: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def turn(self) -> int:
        return len(self.answers)


class Writer:
    """Writes the answers of this process's share of the studies."""

    def __init__(self, model: Model, request: Request, batch: int):
        self.model, self.request = model, request
        self.scheduler = model.scheduler(batch, request.sampling, request.max_new_tokens)
        self.open: dict[str, _Open] = {}
        self.exchange: dict[str, Record] = {}

    def run(
        self,
        share: Sequence[Sequence[Record]],
        everyone: Sequence[Record],
        journal: Journal | Follower,
        skip: bool,
        finished: Callable[[Record], None],
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[Problem]:
        """`share`: this process's studies, of which the journal may have some records already; `everyone`: all records, for
        images that are exchanged.

        `before_batch` is called where all that was finished is on disk.
        """
        problems: list[Problem] = []
        self.exchange = exchanged(everyone, self.request.sampling.seed) if self.request.control == "shuffled" else {}
        waiting = iter(share)
        room = 4 * self.scheduler.rows  # records that are open at once
        exhausted = False
        while not exhausted or self.open:
            while not exhausted and len(self.open) < room:
                study = next(waiting, None)
                if study is None:
                    exhausted = True
                    break
                found = self._begin(study, [record for record in study if record.id not in journal.done])
                if found and not skip:
                    raise BadRecords(found)
                problems += found
            shape = self.scheduler.full() or self.scheduler.largest()
            if shape is None:
                continue
            before_batch()
            for family in self.scheduler.run(shape):
                self._answered(family, journal, finished)
        return problems

    def _begin(self, study: Sequence[Record], missing: Sequence[Record]) -> list[Problem]:
        """Reads a study's images and queues the first turns of what is missing."""
        source = self.exchange.get(study[0].id, study[0])
        visual, problems, tasks = self.model.experiment.visual, [], []
        if not missing:
            return []
        images, fault = (), ""
        try:
            images = tuple(read_input(input_path(self.request.folder, image, visual), visual) for image in source.images)
        except UserError as error:
            fault = str(error)
        if fault := shared_fault(fault):
            return [Problem(where(record), fault) for record in missing]
        asked = {record.id for record in missing}
        for record in study:  # those that are done too: how prompts are laid out must not depend on an interruption
            shown = images
            if self.request.control in ("zeros", "noise"):
                shown = tuple(controlled(i, self.request.control, record.id, self.request.sampling.seed) for i in images)
            begun = _Open(record, shown)
            try:
                tasks.append(self._task(begun))
            except UserError as error:
                problems += [Problem(where(record), str(error))] if record.id in asked else []
                continue
            if record.id in asked:
                self.open[record.id] = begun
        wanted = [task for task in tasks if task.name in asked]
        if wanted:
            self.scheduler.add_study(wanted, tasks)
        return problems

    def _task(self, begun: _Open) -> Task:
        """The next turn of a record."""
        record, template = begun.record, self.request.template
        question = _questions(record)[begun.turn]
        # an image whose place comes in a later turn is not shown before it
        turns = self._with_places([*begun.history, ("human", question)], record)
        prompt = self.model.conversation(turns, begun.images, template)
        check(prompt, self.model.experiment, f"turn {begun.turn + 1}")
        continuations = ()
        if self.request.likelihood and record.options and len(_questions(record)) == 1:
            texts = wordings(record.options, self.request.likelihood)
            continuations = self.model.continuations(turns, prompt, texts, template)
        return Task(record.id, prompt, record.id, begun.turn, continuations)

    def _with_places(self, turns: list[tuple[str, str]], record: Record) -> list[tuple[str, str]]:
        """An image that no turn of the record names stands before its first one, where upstream's scripts put it."""
        if not record.images or any(IMAGE_TOKEN in turn.value for turn in record.turns):
            return turns
        (role, text), *others = turns
        return [(role, "\n".join([IMAGE_TOKEN] * len(record.images) + [text])), *others]

    def _answered(self, family: Sequence[Answered], journal: Journal | Follower, finished: Callable[[Record], None]) -> None:
        """Writes down the answers of a row, and queues what its records ask next."""
        more = []
        for answered in family:
            begun = self.open[str(answered.task.name)]
            record = begun.record
            begun.answers.append(self._answer(begun, answered))
            if begun.turn < len(_questions(record)):
                more.append(self._task(begun))
                continue
            journal.append(record.id, entry(record, begun.answers, self.model.experiment.visual.kind))
            del self.open[record.id]
            finished(record)
        if more:
            self.scheduler.add_study(more)

    def _answer(self, begun: _Open, answered: Answered) -> dict[str, Any]:
        """As the file has it; the history grows by the turn."""
        request, record = self.request, begun.record
        question = _questions(record)[answered.task.turn]
        if answered.likelihoods:
            choice = choice_of(record.options, answered.likelihoods, request.per_token)
            return answer_entry(record.id, question, record.options, choice)
        generation = self.model.generation(answered.ids, request.template)
        raw = self.model.text_of(answered.ids, request.template, keep_special=True)
        begun.history += [("human", question), ("gpt", raw if request.keep_history_end else generation.text)]
        made = {"id": record.id, "question": question, "answer": raw if request.keep_special_tokens else generation.text}
        return made | ({"token_ids": generation.token_ids} if request.token_ids else {})


def _questions(record: Record) -> list[str]:
    return [turn.value for turn in record.turns if turn.role == "human"]


def entry(record: Record, answers: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """One record as upstream's file has it; one without an image has none there."""
    names = [npz_name(image) if kind in TOKEN_KINDS else image for image in record.images]
    image = names[0] if len(names) == 1 else names
    return {"image": image, "conversations_out": answers} if names else {"conversations_out": answers}


def finish(
    journal: Journal, records: Sequence[Record], finished: Callable[[list[Any]], list[Any]] = lambda entries: entries
) -> list[Any] | None:
    """Writes the result if every record is done, by whichever process; in the order of the records, and as `finished` makes
    it -> what was written."""
    journal.refresh()
    if any(record.id not in journal.done for record in records):
        return None
    entries = finished([journal.done[record.id] for record in records])
    write_json(journal.out, entries)
    return entries
