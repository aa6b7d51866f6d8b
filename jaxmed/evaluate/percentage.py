"""M3D's judge by percentage: which share of what the reference says is in the answer, from 0 to 100, replied as `Score: 85.`

Whole numbers are read as well as decimals (M3D's own pattern wants a decimal point). The wording is ours.
"""

import re

_ASK = """You compare an answer with a reference answer about a medical image.

Name each aspect that the reference states, and see which of them the answer states too, fully or in part, in whatever words.
What share of the reference's aspects does the answer cover, as a percentage from 0 (none) to 100 (all)?
Aspects that the answer adds do not count. Reply with the percentage alone, in this form:
Score: xx.

Question: {question}
Reference: {reference}
Answer: {candidate}
"""
_SCORE = re.compile(r"score\W{0,4}(\d+(?:\.\d+)?)", re.IGNORECASE)


def prompt(question: str, reference: str, candidate: str) -> str:
    head, rest = _ASK.split("{question}")
    middle, rest = rest.split("{reference}")
    last, tail = rest.split("{candidate}")
    return f"{head}{question}{middle}{reference}{last}{candidate}{tail}"


def parse(reply: str) -> float | None:
    """The share from 0 to 1; None for a reply without one. Of several the last counts."""
    found = _SCORE.findall(reply)
    value = float(found[-1]) if found else -1.0
    return value / 100 if 0 <= value <= 100 else None
