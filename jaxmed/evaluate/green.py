"""GREEN: a judge counts matched findings and errors of a generated report; the score is matched / (matched + significant).

The judge sees a prompt of four parts (criteria, reference, candidate, layout of the reply) and answers in four bracketed
sections, of which the counts are read. The published judge is a 7B language model tuned on the public package's own wording.
The wording here is ours, in the same order and with the same layout; for figures that stand beside published ones, give the
package's (`read_wording`: its utils.py is read as text, nothing of it is run). What was used is recorded with the score, and so
is the version: packages of different dates cut both reports to different lengths before the judge sees them.
"""

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmed.errors import UserError

Version = Literal["challenge", "uncut", "current"]
WORDS: dict[Version, int] = {"challenge": 200, "uncut": 0, "current": 300}
"""Words that are left of a report: the package until mid-July 2024 (three results; what AMOS-MM's page shows), from then until
26 September 2024, and since (five results). 0: all"""
CLASSES = "abcdef"
"""False finding, missing finding, location, severity, comparison not in the reference, comparison left out"""
LENGTH = 2048
"""Tokens of prompt and reply together"""

_EXPLANATION, _SIGNIFICANT, _INSIGNIFICANT, _MATCHED = (
    "Explanation",
    "Clinically Significant Errors",
    "Clinically Insignificant Errors",
    "Matched Findings",
)
_LINES = """(a) <kind of error>: <count>. <error 1>; <error 2>; ...; <error n>
....
(f) <kind of error>: <count>. <error 1>; <error 2>; ...; <error n>"""
OURS = f"""Objective: judge how accurate a candidate radiology report is, measured by a reference report that expert \
radiologists wrote.

Overview: what follows has four parts:

1. The criteria of the judgment.
2. The reference report.
3. The candidate report.
4. The layout of your reply.

1. Criteria:

Count in the candidate report

the clinically significant errors, and
the clinically insignificant errors.

Every error belongs to one of these classes:

a) The candidate reports a finding that is not there.
b) The candidate misses a finding of the reference.
c) The candidate gives a finding a wrong anatomic location or side.
d) The candidate gives a finding a wrong severity.
e) The candidate makes a comparison that the reference does not make.
f) The candidate leaves out a comparison with an earlier study.
Note: judge the clinical findings, not the style of writing, and nothing but the findings of the two reports.

2. Reference report:
{{reference}}

3. Candidate report:
{{candidate}}

4. Layout of your reply:

Keep to this layout, even where there is no error:
```
[{_EXPLANATION}]:
<explanation>

[{_SIGNIFICANT}]:
{_LINES}

[{_INSIGNIFICANT}]:
{_LINES}

[{_MATCHED}]:
<count of matched findings>. <finding 1>; <finding 2>; ...; <finding n>
```
"""
_PLACES = ("{reference}", "{candidate}")


@dataclass(frozen=True)
class Wording:
    """A prompt with places for the two reports."""

    text: str
    source: str
    """`jaxmed`, or the file"""

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def prompt(self, reference: str, candidate: str, words: int) -> str:
        """What the judge is asked; both reports cut to `words` words (0: not cut)."""
        head, rest = self.text.split(_PLACES[0])
        middle, tail = rest.split(_PLACES[1])
        return f"{head}{cut(reference, words)}{middle}{cut(candidate, words)}{tail}"


OUR_WORDING = Wording(OURS, "jaxmed")


def read_wording(path: str) -> Wording:
    """A text with the places `{reference}` and `{candidate}`; or the Python file of the public package that has `make_prompt`,
    whose text is taken from its syntax tree."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file with --green-prompt") from error
    if path.endswith(".py"):
        text = _of_package(text, path)
    if [text.count(place) for place in _PLACES] != [1, 1] or text.index(_PLACES[0]) > text.index(_PLACES[1]):
        raise UserError(f"{path}: must hold {_PLACES[0]} and then {_PLACES[1]}, each once; mend the file of --green-prompt")
    return Wording(text, path)


def _of_package(source: str, path: str) -> str:
    """The formatted string of `make_prompt(reference, candidate)`, its two arguments as places."""
    hint = "give the package's utils.py, or the wording as a text file"
    try:
        found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        raise UserError(f"{path}: is no Python file ({error.msg}); {hint}") from error
    makers = [node for node in found if node.name == "make_prompt" and len(node.args.args) == 2]
    strings = [node for maker in makers for node in ast.walk(maker) if isinstance(node, ast.JoinedStr)]
    if len(strings) != 1:
        raise UserError(f"{path}: has no function make_prompt of two reports and one text; {hint}")
    names = dict(zip((argument.arg for argument in makers[0].args.args), _PLACES, strict=True))
    text = ""
    for piece in strings[0].values:
        if isinstance(piece, ast.Constant):
            text += str(piece.value)
        elif isinstance(piece, ast.FormattedValue) and isinstance(piece.value, ast.Name):
            text += names.get(piece.value.id, "")
    return text


def cut(text: str, words: int) -> str:
    """The first words, joined by single spaces; 0: the text as it is."""
    return " ".join(text.split()[:words]) if words else text


@dataclass(frozen=True)
class Counts:
    """What a judge's reply says."""

    matched: int
    significant: tuple[int, ...]
    """By class, a to f"""
    insignificant: tuple[int, ...]

    @property
    def score(self) -> float:
        return self.matched / (self.matched + sum(self.significant)) if self.matched else 0.0


def clean(reply: str) -> str:
    """A reply without the prompt that some judges repeat, without end tokens, and without the bold type that chat models like
    (the published judge has none): a bold count would count 0."""
    return reply.split("<|assistant|>")[-1].replace("</s>", "").replace("<unk>", "").replace("**", "")


def is_reply(reply: str) -> bool:
    """Whether any section that is counted is there at all: a reply without them is no judgment."""
    return any(f"[{name}]:" in reply for name in (_SIGNIFICANT, _MATCHED))


def parse(reply: str) -> Counts:
    """Counts of a reply. A section that is missing or begins with "No" counts 0."""
    reply = clean(reply)
    matched = re.match(r"\d+(?=\.)", _section(reply, _MATCHED))
    return Counts(int(matched[0]) if matched else 0, _errors(reply, _SIGNIFICANT), _errors(reply, _INSIGNIFICANT))


def _section(reply: str, name: str) -> str:
    """From the heading to the next blank line."""
    found = re.search(rf"\[{name}\]:\s*(.*?)(?:\n\s*\n|\Z)", reply, re.DOTALL)
    return "" if found is None or found[1].startswith("No") else found[1]


def _errors(reply: str, name: str) -> tuple[int, ...]:
    """Counts by class, from lines `(a) kind: 2. ...`; where there are none, from lines `(1) kind: 2. ...`."""
    section = _section(reply, name)
    for letters in (CLASSES, "123456"):
        lines = re.findall(rf"\(([{letters}])\) (.*)", section)
        if lines:
            counts = dict.fromkeys(letters, 0)
            for letter, rest in lines:
                if count := re.search(r"(?<=: )\d+(?=\.)", rest):
                    counts[letter] = int(count[0])
            return tuple(counts.values())
    return (0,) * len(CLASSES)


def chat(prompt: str, end: str) -> str:
    """The prompt as the published judge's tokenizer is given it: a user's turn, an empty reply, and the head of the next.
    The tokenizer then puts its end token behind all of it, which is kept, since the published figures have it."""
    return f"<|user|>\n{prompt}{end}\n<|assistant|>\n{end}\n<|assistant|>\n"
