"""AMOS-MM's submission from finished results: findings by region and a letter a question, in the challenge's own file."""

import json
from collections.abc import Sequence

from jaxmed.data.amos import is_question, submission
from jaxmed.data.record_files import parse
from jaxmed.data.records import Record
from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.evaluate.studies import strip_end
from jaxmed.evaluate.vqa import parse as letter_of
from jaxmed.generate.journal import write_json


def write_submission(out: str, records: str, results: Sequence[str], known: Sequence[Record], skip: bool) -> list[Problem]:
    """`records`: AMOS-MM's dataset.json as the command names it; `results`: finished `*_vqa.json` files over its entries;
    `known`: its records, for the options of generated answers. BadRecords lists what is missing or not an option; with `skip`
    it stays empty, and is what is returned."""
    source = parse(records)
    if not source.path.lower().endswith(".json"):
        raise UserError(f"--submission: {source.path} is no dataset.json of AMOS-MM, whose entries the submission repeats")
    try:
        with open(source.path, encoding="utf-8-sig") as file:
            skeleton = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.path}: cannot be read ({error}); give AMOS-MM's dataset.json") from error
    if not isinstance(skeleton, dict):
        raise UserError(f"--submission: {source.path} is a list, not a dataset.json of AMOS-MM with lists by name")
    options = {record.id: record.options for record in known}
    predictions: dict[str, str] = {}
    for path in results:
        predictions |= _predictions(path, options, skip)
    skipped: list[Problem] = []
    write_json(out, submission(skeleton, predictions, source.split, skipped if skip else None))
    return skipped


def _predictions(path: str, options: dict[str, dict[str, str]], skip: bool) -> dict[str, str]:
    """By the records' names: a report's text, or the letter of a question. BadRecords lists answers that name none, unless
    `skip`: "" then."""
    try:
        with open(path, encoding="utf-8") as file:
            answers = {str(study["conversations_out"][-1]["id"]): study["conversations_out"][-1] for study in json.load(file)}
        found = {name: _prediction(name, answer, options.get(name, {})) for name, answer in answers.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: is no result of `jaxmed generate` ({error})") from error
    lost = [name for name, text in found.items() if is_question(name) and not text]
    if lost and not skip:
        raise BadRecords([Problem(f"{path}: {name}", _nameless(answers[name], options.get(name, {}))) for name in lost])
    return found


def _prediction(name: str, answer: dict[str, str], options: dict[str, str]) -> str:
    if "prediction" in answer and is_question(name):
        return answer["prediction"]
    text = strip_end(answer["answer"])  # of `--keep-special-tokens`
    if not is_question(name):
        return text
    return letter_of(text, options) if options else text[:1]


def _nameless(answer: dict[str, str], options: dict[str, str]) -> str:
    names = ", ".join(options)
    return f"the answer {answer['answer']!r} names none of its options {names}; --answers likelihood always chooses one"
