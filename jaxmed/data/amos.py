"""AMOS-MM 2024: `dataset.json` as records, and the submission that the challenge takes.

A file is {"training": [entry, ...], "validation": [...], "testing": [...]}, an entry {"image", "meta", "labels": {"report":
{"findings": {region: text}}, "qa": [{"question", "type", "options": {letter: text}, "answer", "reasoning"}]}}. A report is a
record for each region with text, named CASE/REGION; a question is a record, named CASE/qaN. Entries without labels (a test
set) are asked for all regions, without an answer.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.data.drafts import Draft, case_name, listed_choices, region_drafts
from jaxmed.data.record_files import Reading
from jaxmed.data.record_lists import check_keys
from jaxmed.data.regions import REGIONS
from jaxmed.errors import BadRecords, Problem, UserError

LABELS = "labels"
TASKS = ("report", "vqa")


def is_amos(entry: Any) -> bool:
    """Whether an element of a list is one of AMOS-MM's with labels."""
    return isinstance(entry, Mapping) and isinstance(entry.get(LABELS), Mapping)


def drafts(entry: Mapping[str, Any], reading: Reading) -> list[Draft | UserError]:
    """The records of one entry; in place of one that cannot be used, what is wrong with it."""
    image = entry.get("image")
    if not isinstance(image, str) or not image.strip():
        return [UserError(f"its image is {image!r}; an entry needs the path of its volume")]
    image = image.strip().removeprefix("./")
    labels, meta = entry.get(LABELS), entry.get("meta")
    labels = labels if isinstance(labels, Mapping) else {}
    patient = meta.get("patient", "") if isinstance(meta, Mapping) else ""
    extra = {"meta": meta} if meta else {}
    is_vqa = reading.task == "vqa"
    found = _questions(labels.get("qa"), image, reading) if is_vqa else _reports(labels, image, reading)
    for draft in found:
        if isinstance(draft, Draft):
            draft.values.update(extra)
            draft.fields["patient"] = str(patient)
    return found


# -- reports ---------------------------------------------------------------------------------------------------------------


def _reports(labels: Mapping[str, Any], image: str, reading: Reading) -> list[Draft | UserError]:
    report = labels.get("report")
    if report is None:  # a test set, or an entry of questions alone
        return [] if labels else list(region_drafts(image, dict.fromkeys(REGIONS), reading))
    findings = report.get("findings") if isinstance(report, Mapping) else report
    try:
        texts = findings_of(findings)
    except UserError as error:
        return [error]
    if texts:
        return list(region_drafts(image, texts, reading))
    if reading.unanswered:
        return list(region_drafts(image, dict.fromkeys(REGIONS), reading))
    return [UserError("its report has no text in any region; write its findings, or take the entry out")]


def findings_of(findings: Any) -> dict[str, str]:
    """{region: text} of those that have any, in the order of REGIONS."""
    if not isinstance(findings, Mapping):
        raise UserError(
            f"its report's findings are {type(findings).__name__}; they must be texts by region: {', '.join(REGIONS)}"
        )
    check_keys(findings, "its findings have")
    texts: dict[str, Any] = {}
    for name, text in findings.items():
        region = str(name).strip().lower()
        if texts.get(region):
            raise UserError(f"its findings have the {region} twice; leave one of them out")
        texts[region] = "" if text is None else text
    for region, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"its findings of the {region} are {text!r}; they must be a text")
        if text.strip() and region not in REGIONS:
            raise UserError(f"its findings name the region {region!r}; known are {', '.join(REGIONS)}")
    return {region: texts[region].strip() for region in REGIONS if texts.get(region, "").strip()}


# -- questions -------------------------------------------------------------------------------------------------------------


def _questions(items: Any, image: str, reading: Reading) -> list[Draft | UserError]:
    if items is None:
        return []
    if not isinstance(items, list):
        return [UserError(f"its qa is {type(items).__name__}; it must be a list of questions")]
    found: list[Draft | UserError] = []
    for number, item in enumerate(items):
        try:
            found.append(_question(item, number, image, reading))
        except UserError as error:
            found.append(UserError(f"question {number + 1} of {len(items)}: {error}"))
    return found


def _question(item: Any, number: int, image: str, reading: Reading) -> Draft:
    if not isinstance(item, Mapping):
        raise UserError(f"it is {type(item).__name__}; it must be an object with question, options and answer")
    check_keys(item)
    question, kind = item.get("question"), item.get("type")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"its question is {question!r}; write one, or take it out")
    options = options_of(item.get("options"))
    letter = letter_of(item.get("answer"), options)
    answer = _target(item.get("answer"), letter, options, reading)
    named = reading.questions == "closed" and options
    text = f" {question.strip()}{listed_choices(options) if named else ''}"
    extra = {name: item[name] for name in ("reasoning", "prediction") if item.get(name) is not None}
    fields = {"options": options, "answer": letter, "question_type": str(kind) if _is_text(kind) else ""}
    return Draft(f"{case_name(image)}/qa{number}", image, text, answer, values=extra, fields=fields)


def _target(answer: Any, letter: str, options: Mapping[str, str], reading: Reading) -> str | None:
    """The bare letter as published, unless the reading says otherwise; the text for a question without its options named."""
    if not letter:
        return str(answer).strip() if answer not in (None, "") and not options else None
    if reading.questions == "open":
        return options[letter]
    return f"{letter}. {options[letter]}" if reading.choices == "letter_text" else letter


def options_of(value: Any) -> dict[str, str]:
    """{letter: text}; of a list, the letters go by the alphabet. {} where there are none."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        check_keys(value, "its options have")
    pairs = list(value.items()) if isinstance(value, Mapping) else None
    if isinstance(value, list):
        pairs = [(chr(ord("A") + number), text) for number, text in enumerate(value)]
    if not pairs or not all(_is_text(text) for _, text in pairs):
        raise UserError(f"its options are {value!r}; they must be texts by letter")
    options: dict[str, str] = {}
    seen: dict[str, str] = {}
    for letter, text in ((str(letter).strip().upper().rstrip("."), str(text).strip()) for letter, text in pairs):
        if not re.fullmatch("[A-Z]", letter):
            raise UserError(f"its options have the name {letter!r}; each must be a letter")
        same = " ".join(text.casefold().split())
        if letter in options or same in seen:
            other = letter if letter in options else seen[same]
            raise UserError(f"its options repeat: {other} and {letter} are both {text!r}; mend the options, or take it out")
        options[letter], seen[same] = text, letter
    if len(options) < 2:
        raise UserError(f"it has the one option {options}; it needs at least two")
    return options


def _is_text(value: Any) -> bool:
    """Whether something is written there: NaN is what pandas puts where nothing is."""
    return isinstance(value, str | int | float) and value == value and bool(str(value).strip())


def letter_of(answer: Any, options: Mapping[str, str]) -> str:
    """The letter of the right option, "" where none is given (or there are no options)."""
    if answer in (None, "") or not options:
        return ""
    letter = str(answer).strip().upper().rstrip(".")
    same = [name for name, text in options.items() if text.casefold() == str(answer).strip().casefold()]
    if letter not in options and len(same) != 1:
        raise UserError(f"its answer is {answer!r}, which is none of its options {', '.join(options)}; mend the answer")
    return letter if letter in options else same[0]


# -- submission ------------------------------------------------------------------------------------------------------------


def submission(
    skeleton: Mapping[str, Any], predictions: Mapping[str, str], split: str = "", skipped: list[Problem] | None = None
) -> dict[str, Any]:
    """The challenge's file: entries of one list of `dataset.json`, with findings written by the model and `prediction`, a
    letter, at each question. `predictions`: by the records' names, CASE/REGION -> text and CASE/qaN -> letter; `split`: the
    list, where the skeleton has several.

    Either task may be left out as a whole (its part then stays as it is); within a task nothing may be missing. BadRecords
    lists names that no entry has, letters that no option has, and what has no prediction; with a list `skipped` they go there,
    and what is missing stays empty.
    """
    name = split or _only_list(skeleton)
    entries = skeleton.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UserError(f"the skeleton has no list {name!r} of entries; it has {', '.join(map(str, skeleton))}")
    written = {task: any(is_question(key) == (task == "vqa") for key in predictions) for task in TASKS}
    problems, used, filled = [], set(), []
    for row, entry in enumerate(entries):
        case = case_name(str(entry.get("image", "")))
        result = copy.deepcopy(dict(entry))
        labels = result[LABELS] = dict(result.get(LABELS) or {})
        faults: list[str] = []
        if written["report"]:
            labels["report"], names = _filled_report(labels.get("report"), case, predictions, faults)
            used |= names
        if written["vqa"]:
            used |= _fill_questions(labels.get("qa") or [], case, predictions, faults)
        problems += [Problem(f"{name}: entry {row} ({case})", fault) for fault in faults]
        filled.append(result)
    strangers = [key for key in predictions if key not in used]
    problems += [Problem(f"predictions: {key!r}", f"no entry of {name} has this name") for key in strangers]
    if problems and skipped is None:
        raise BadRecords(problems)
    if skipped is not None:
        skipped += problems
    return {name: filled}


def is_question(name: str) -> bool:
    """Whether a record's name is that of a question."""
    return bool(re.search(r"/qa\d+$", name))


def _only_list(skeleton: Mapping[str, Any]) -> str:
    names = [name for name, value in skeleton.items() if isinstance(value, list) and value]
    if len(names) != 1:
        raise UserError(f"the skeleton has the lists {', '.join(names) or 'none'}; say which one is submitted")
    return names[0]


def _filled_report(
    report: Any, case: str, predictions: Mapping[str, str], faults: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """The report with the model's findings; regions that were absent stay empty unless the model wrote them."""
    report = dict(report) if isinstance(report, Mapping) else {}
    wanted = findings_of(report.get("findings") or {}) or dict.fromkeys(REGIONS, "")
    found = {region: predictions[f"{case}/{region}"] for region in REGIONS if f"{case}/{region}" in predictions}
    lacking = [region for region in wanted if region not in found]
    if lacking:
        faults.append(f"has no prediction for {', '.join(lacking)}")
    bad = [region for region, text in found.items() if not isinstance(text, str)]
    if bad:
        faults.append(f"its prediction for {', '.join(bad)} is no text")
    report["findings"] = {region: "" if region in bad else found.get(region, "") for region in REGIONS}
    return report, {f"{case}/{region}" for region in found}


def _fill_questions(items: Sequence[dict[str, Any]], case: str, predictions: Mapping[str, str], faults: list[str]) -> set[str]:
    used = set()
    for number, item in enumerate(items):
        key = f"{case}/qa{number}"
        options = options_of(item.get("options"))
        letter = str(predictions.get(key, "")).strip().upper()
        used.add(key)
        if key not in predictions:
            faults.append(f"question {number + 1} has no prediction")
        elif letter not in options:
            faults.append(f"question {number + 1} is answered {predictions[key]!r}, its options are {', '.join(options)}")
        item["prediction"] = letter if letter in options else ""
    return used
