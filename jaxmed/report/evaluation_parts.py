"""What the pages of scores say beside texts: regions, types of question, multiple choice, judges. Values for the templates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxmed.evaluate.judging import Judged
from jaxmed.evaluate.parts import ACCURACY, CALIBRATION, Control, Figure, Figures, Grouped, Parts, errors, reliability
from jaxmed.evaluate.studies import Study
from jaxmed.report import page

LABELS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "meteor_exact": "METEOR exact",
    "bertscore": "BERTScore",
    "green": "GREEN",
    "percentage": "Percentage",
    "accuracy": "Accuracy",
    "unparsable_share": "Unparsable",
    "always_commonest": "Always the commonest",
    "chance": "Chance",
    "likelihood_accuracy": "Likelihood accuracy",
    "brier": "Brier score",
    "calibration_error": "Calibration error",
}
_OF_REGIONS = ("green", "percentage", "bleu_1", "bleu_4", "rouge_l", "meteor", "meteor_exact", "bertscore")
_OF_CHOICE = ("accuracy", "likelihood_accuracy", "unparsable_share", "brier", "calibration_error")
_CHOICE_ALL = (*_OF_CHOICE[:3], "always_commonest", "chance", *_OF_CHOICE[3:])
_CLASSES = {
    "a": "finding that is not there",
    "b": "finding missed",
    "c": "wrong location",
    "d": "wrong severity",
    "e": "comparison that the reference lacks",
    "f": "comparison left out",
}
_RULES = {
    "": "the letter at the beginning of an answer or where it says so, else the one option whose text it holds",
    "vqa_substring": "M3D's: right if the right letter with a full stop is anywhere in the answer",
    "vqa_first_letter": "the AMOS-MM authors': right if the first character is the right letter",
}


@dataclass(frozen=True)
class Verdict:
    """A plain sentence on what the figures show."""

    kind: str
    """`good` or `warn`"""
    head: str
    text: str


def chips_of(found: Parts | None, names: Sequence[str]) -> list[str]:
    """Scores that stand beside every study, of those that there are."""
    chips = ["bleu_4", "rouge_l", *(["meteor"] if "meteor" in names else [])]
    return chips + [one.measure for one in found.judged] if found else chips


def _cell(figure: Figure | None) -> dict[str, Any]:
    if figure is None:
        return {}
    low, high = figure.interval
    return {"value": figure.value, "low": low, "high": high}


def _table(title: str, found: Grouped, names: Sequence[str], first: str, mean: str) -> dict[str, Any]:
    """Groups as rows, scores as columns, their mean below."""
    shown = [name for name in names if any(name in group for group in found.groups.values())]
    rows = [(name, found.sizes[name], [_cell(group.get(n)) for n in shown]) for name, group in found.groups.items()]
    if len(rows) > 1:
        rows.append((mean, sum(found.sizes.values()), [_cell(found.mean.get(n)) for n in shown]))
    columns = [LABELS[name] for name in shown]
    return {"title": title, "first": first, "columns": columns, "rows": rows, "has_mean": len(found.groups) > 1}


def group_tables(found: Parts) -> list[dict[str, Any]]:
    tables = []
    if found.regions:
        tables.append(_table("By region", found.regions, _OF_REGIONS, "Region", "mean of regions"))
    if found.types:
        closed = any(ACCURACY in group for group in found.types.groups.values())
        names = _OF_CHOICE if closed else _OF_REGIONS
        tables.append(_table("By type of question", found.types, names, "Type", "mean of types"))
    return tables


def choice(found: Parts, control: Control | None) -> dict[str, Any]:
    """The card on multiple choice; {} where there is none."""
    if found.closed is None:
        return {}
    figures: Figures = found.figures
    rows = [{"name": LABELS[n], **_cell(figures[n])} for n in _CHOICE_ALL if n in figures]
    drop = {}
    if control is not None:
        drop = {"value": control.accuracy, "drop": control.drop, "low": control.interval[0], "high": control.interval[1]}
    curve = []
    if CALIBRATION in figures:
        bins = reliability(found.closed)
        most = max(b.count for b in bins)
        curve = [vars(b) | {"share": b.count / most} for b in bins]
    rule = _RULES[found.closed.rule]
    return {"rows": rows, "rule": rule, "questions": figures[ACCURACY].studies, "control": drop, "curve": curve}


def choice_verdicts(found: Parts, control: Control | None) -> list[Verdict]:
    """On guessing, and on what the wrong images cost."""
    if found.closed is None:
        return []
    figures = found.figures
    accuracy, always, lost = figures[ACCURACY], figures["always_commonest"], figures["unparsable_share"].value
    low, high = accuracy.interval
    beaten = low > max(always.value, figures["chance"].value)
    text = (
        f"{accuracy.value:.3f} of {accuracy.studies:,} questions are answered rightly, 95% interval {low:.3f} to {high:.3f}; "
        f"guessing gives {figures['chance'].value:.3f}, always the commonest letter {always.value:.3f}, which these answers "
        f"{'beat' if beaten else 'do not clearly beat'}. {page.share(lost)} of the answers name no option."
    )
    lines = [Verdict("good" if beaten and lost < 0.05 else "warn", "Multiple choice.", text)]
    if control is None:
        return lines
    low, high = control.interval
    cost = (
        f"With the wrong images accuracy goes from {accuracy.value:.3f} to {control.accuracy:.3f}: a drop of "
        f"{control.drop:.3f}, 95% interval {low:.3f} to {high:.3f}. "
    )
    doubt = "The drop is not clear of zero: nothing here shows that the model looks at the image."
    said = "The answers depend on the image." if low > 0 else doubt
    return [*lines, Verdict("good" if low > 0 else "warn", "Does it look?", cost + said)]


def judge_cards(found: Parts) -> list[dict[str, Any]]:
    """One card a judge's measure."""
    return [_judge_card(one, found.figures.get(one.measure)) for one in found.judged]


def _judge_card(one: Judged, figure: Figure | None) -> dict[str, Any]:
    facts = [("Judge", one.judge), ("Judged", f"{one.answered:,} of {one.asked:,} answers")]
    if one.measure == "green":
        words = one.facts["words"]
        facts += [("Version", f"{one.facts['version']} ({f'reports cut to {words} words' if words else 'reports not cut'})")]
        facts += [("Wording of the prompt", f"{one.facts['wording']}, {one.facts['wording_hash']}")]
    found = errors(one)
    rows = []
    if found:
        rows = [(f"({c}) {text}", found["significant"][c], found["insignificant"][c]) for c, text in _CLASSES.items()]
    matched = found["matched"]["all"] if found else None
    return {"title": LABELS[one.measure], "figure": _cell(figure), "facts": facts, "rows": rows, "matched": matched}


def tags(study: Study) -> list[str]:
    return [text for text in (study.region, study.question_type) if text]


def choices(study: Study, named: str) -> list[dict[str, Any]]:
    """The options of a question with what the model made of them."""
    shares = study.likelihoods[-1].probabilities if study.likelihoods else {}
    return [
        {"letter": letter, "text": text, "right": letter == study.letter, "named": letter == named, "share": shares.get(letter)}
        for letter, text in study.options.items()
    ]
