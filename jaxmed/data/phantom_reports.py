"""Reports of phantom studies: wording, a reader that gets the findings back out of a text, scores, and a vocabulary.

Findings are a dict finding -> side; what is not in it is absent. The heart has one side, "midline".
A report goes through the organs in a fixed order, each under a short heading, in one of several wordings.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

FINDINGS = ("cardiomegaly", "effusion", "emphysema", "consolidation", "nodule")
MIDLINE = "midline"
Findings = Mapping[str, str]
REQUESTS = ("Write the report.", "Report the CT.", "What is seen?", "What does it show?")

_HEADINGS = {
    "cardiomegaly": "Heart:",
    "effusion": "Pleura:",
    "emphysema": "Parenchyma:",
    "consolidation": "Airspace:",
    "nodule": "Nodules:",
}
_PRESENT = {
    "cardiomegaly": (
        "the heart is enlarged.",
        "enlarged cardiac silhouette.",
        "there is cardiomegaly.",
        "the size of the heart is increased.",
        "cardiomegaly is present.",
    ),
    "effusion": (
        "there is a {side} pleural effusion.",
        "pleural effusion on the {side} side.",
        "a {side} effusion is present.",
        "fluid is seen in the {side} pleural space.",
        "effusion in the {side} pleural space.",
    ),
    "emphysema": (
        "there is emphysema of the {side} lung.",
        "emphysema and bullae on the {side} side.",
        "the {side} lung is emphysematous.",
        "{side} emphysema is present.",
        "emphysema is seen in the {side} lung.",
    ),
    "consolidation": (
        "there is consolidation in the {side} lung.",
        "the {side} lung is consolidated.",
        "consolidation is seen on the {side} side.",
        "an opacity is seen in the {side} lung.",
        "{side} consolidation is present.",
    ),
    "nodule": (
        "there is a nodule in the {side} lung.",
        "a {side} lung nodule is present.",
        "a nodule is seen on the {side} side.",
        "nodule of the {side} lung.",
        "a solid {side} nodule is seen.",
    ),
}
_ABSENT = {
    "cardiomegaly": (
        "the heart is normal in size.",
        "normal size of the heart.",
        "there is no cardiomegaly.",
        "the heart is not enlarged.",
    ),
    "effusion": (
        "there is no pleural effusion.",
        "no effusion is seen.",
        "the pleural space is clear.",
        "no fluid in the pleural space.",
    ),
    "emphysema": (
        "there is no emphysema.",
        "no emphysema is seen.",
        "normal lung parenchyma.",
        "no emphysema and no bullae.",
    ),
    "consolidation": (
        "there is no consolidation.",
        "no opacity is seen.",
        "the lung is clear.",
        "no consolidation in the lung.",
    ),
    "nodule": (
        "there is no nodule.",
        "no nodule is seen.",
        "no lung nodule is present.",
        "no solid nodule in the lung.",
    ),
}

# What a sentence must say for a finding, before negation is looked at.
_MENTIONS = {
    "cardiomegaly": re.compile(
        r"cardiomegaly|(heart|cardiac)\b.*\b(enlarged|increased|large)|(enlarged|increased|large)\b.*\b(heart|cardiac)"
    ),
    "effusion": re.compile(r"effusions?\b|\bfluid\b"),
    "emphysema": re.compile(r"emphysema|\bbulla"),
    "consolidation": re.compile(r"consolidat|\bopacit"),
    "nodule": re.compile(r"\bnodules?\b(?!\s*:)"),
}
_NEGATION = re.compile(r"\b(no|not|without|absent|normal|clear)\b")


def write_report(findings: Findings, rng: np.random.Generator) -> str:
    sentences = []
    for name in FINDINGS:
        wordings = _PRESENT[name] if name in findings else _ABSENT[name]
        wording = wordings[rng.integers(len(wordings))]
        sentences.append(f"{_HEADINGS[name]} {wording.format(side=findings.get(name, ''))}")
    return " ".join(sentences)


def findings_in(text: str) -> set[tuple[str, str]]:
    """Every (finding, side) that a report states. A finding without a side gets the side "unstated", which is never right."""
    found = set()
    for sentence in re.split(r"[.;\n]", text.lower()):
        words = re.sub(r"\s+", " ", sentence)
        # A clause of its own after a comma or "but" may take back a negation: "no nodule, but a left effusion".
        for clause in re.split(r",|\bbut\b", words):
            if _NEGATION.search(clause):
                continue
            for name, mention in _MENTIONS.items():
                if mention.search(clause):
                    found.update((name, side) for side in _sides(name, clause))
    return found


def _sides(name: str, clause: str) -> list[str]:
    if name == "cardiomegaly":
        return [MIDLINE]
    both = re.search(r"\b(both|bilateral)\b", clause)
    sides = [side for side in ("left", "right") if both or re.search(rf"\b{side}\b", clause)]
    return sides or ["unstated"]


@dataclass(frozen=True)
class FindingScores:
    f1: float
    """Micro-F1 over (finding, side) of all studies"""
    by_finding: dict[str, float]
    """The same for each finding alone; a finding that occurs nowhere and is claimed nowhere is left out"""
    studies: int


def score_findings(predictions: Mapping[str, str], labels: Mapping[str, Findings]) -> FindingScores:
    """`predictions`: study id -> generated text; `labels`: study id -> finding -> side. Every predicted id needs its labels."""
    hits, claimed, real = Counter(), Counter(), Counter()
    for study, text in predictions.items():
        told, truth = findings_in(text), set(labels[study].items())
        for counter, pairs in ((hits, told & truth), (claimed, told), (real, truth)):
            counter.update(name for name, _ in pairs)
    by_finding = {name: 2 * hits[name] / (claimed[name] + real[name]) for name in FINDINGS if claimed[name] + real[name]}
    total = claimed.total() + real.total()
    return FindingScores(2 * hits.total() / total if total else 0.0, by_finding, len(predictions))


SPECIALS = ("<unk>", "<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>")


def build_tokenizer(texts: Iterable[str], folder: str) -> None:
    """Writes a Hugging Face tokenizer folder whose vocabulary is the words of `texts`, for the `minimal` template.

    A word carries the space before it ("▁lung"), punctuation stands alone, runs of white space are one space:
    decoding gives readable text back.
    """
    normalizer = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            pre_tokenizers.Split(tokenizers.Regex(r"[^\w▁]"), "isolated"),
        ]
    )
    words = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))})
    vocabulary = {word: i for i, word in enumerate((*SPECIALS, *words))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    generation = {
        "bos_token_id": vocabulary["<s>"],
        "eos_token_id": [vocabulary["<|end|>"]],
        "pad_token_id": vocabulary["<pad>"],
    }
    for name, values in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
