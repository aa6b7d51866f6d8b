"""Flags of `jaxmed evaluate` that say which scores there are beside BLEU and ROUGE, and what they stand for.

Nothing leaves this machine unless --judge is an address on another one; then a line says so before the first report goes.
"""

import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmed.cli import common
from jaxmed.errors import Problem, UserError
from jaxmed.evaluate import green, judges, judging, text, vqa
from jaxmed.evaluate.endpoint import EndpointJudge
from jaxmed.evaluate.judging import Judged, Settings
from jaxmed.evaluate.studies import Study

KEPT = "judge.jsonl"
UPSTREAM_DEFECTS = (*vqa.RULES, judging.UPSTREAM_ZERO)


@dataclass(frozen=True)
class ScoringArgs:
    """Scores that need more than the texts."""

    wordnet: str = ""
    """Folder of WordNet's files, for METEOR's synonyms ("": where nltk finds one)"""
    bertscore: str = ""
    """Folder of a BERT or RoBERTa, for BERTScore"""
    bertscore_layer: int = 0
    """The layer that it reads (0: as published for its kind)"""
    judge: str = ""
    """Who judges: a model's folder, or the address of a server with OpenAI's chat completions (http://localhost:8000/v1)"""
    judge_model: str = ""
    """The server's name of the model"""
    judge_key_variable: str = "JAXMED_JUDGE_KEY"
    """Environment variable that holds the server's key, where it wants one"""
    judge_timeout: float = 120.0
    """Seconds to wait for an answer"""
    judge_tokens: int = 0
    """Tokens of a server's reply at most (0: as the server has it)"""
    judge_parallel: int = 4
    """Questions to a server at a time"""
    judge_batch: int = 8
    """Questions that a model of a folder answers together"""
    judge_chat: Literal["green", "folder"] = "green"
    """What a model of a folder is asked in: the published GREEN judge's chat, its end token behind the prompt included, or the
    folder's own template"""
    judge_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of a model of a folder"""
    judge_requests: str = ""
    """Write the questions into this file (JSON lines: key, study, measure, prompt) for somebody else's judge"""
    judge_answers: str = ""
    """Read answers to them from this file (JSON lines: key, answer)"""
    judge_for: Literal["green", "percentage", "both"] = "green"
    """GREEN of reports, or M3D's percentage of covered aspects (reports and open answers)"""
    green_version: green.Version = "challenge"
    """How GREEN's public package cuts reports: challenge (until July 2024, 200 words, as AMOS-MM's page), uncut (until
    September 2024), current (300 words)"""
    green_prompt: str = ""
    """GREEN's wording: a text with {reference} and {candidate}, or the public package's utils.py ("": our own words)"""
    upstream_exact: str = ""
    """Upstream's defects to reproduce, comma-separated: vqa_substring, vqa_first_letter, green_zero (see the README)"""


def scorers(args: ScoringArgs, notices: list[str]) -> tuple[tuple[text.Scorer, ...], dict[str, Any]]:
    """Scorers of texts, and facts of BERTScore's encoder."""
    wordnet = text.read_wordnet(args.wordnet) if args.wordnet else None
    found = text.scorers(wordnet)
    if all(scorer.name != text.METEOR for scorer in found):
        notices.append("METEOR with synonyms is left out: nltk's WordNet is not here (--wordnet), and nothing is downloaded.")
    if not args.bertscore:
        return found, {}
    # imported late: nothing else here needs JAX
    from jaxmed.evaluate.bertscore import BertScore

    scorer = BertScore(args.bertscore, args.bertscore_layer)
    facts = scorer.facts
    notices.append(f"BERTScore reads layer {facts['layer']} of {facts['encoder']} ({facts['hash']}).")
    return (*found, scorer), facts


def defects(args: ScoringArgs) -> frozenset[str]:
    names = common.names(args.upstream_exact, UPSTREAM_DEFECTS, "--upstream-exact")
    if names >= set(vqa.RULES):
        raise UserError(f"--upstream-exact: {' and '.join(vqa.RULES)} are two rules for the same; give one of them")
    return names


def choice_rule(args: ScoringArgs) -> str:
    """The rule by which multiple choice is judged, "" for ours."""
    return next(iter(defects(args) & set(vqa.RULES)), "")


class Judging:
    """One judge for all files of a command."""

    def __init__(self, args: ScoringArgs, out: Path, skip: bool, notices: list[str]):
        self.args, self.out, self.skip, self.notices = args, out, skip, notices
        measures = judging.MEASURES if args.judge_for == "both" else (args.judge_for,)
        wording = green.read_wording(args.green_prompt) if args.green_prompt else green.OUR_WORDING
        self.settings = Settings(measures, args.green_version, wording, judging.UPSTREAM_ZERO in defects(args))
        ways = [flag for flag in ("judge", "judge_requests", "judge_answers") if getattr(args, flag)]
        if len(ways) > 1:
            given = " and ".join(f"--{way.replace('_', '-')}" for way in ways)
            raise UserError(f"{given}: a judge is asked in one way; give one of them")
        if args.judge_timeout <= 0 or min(args.judge_parallel, args.judge_batch) < 1 or args.judge_tokens < 0:
            raise UserError(
                "--judge-timeout must be above 0, --judge-parallel and --judge-batch at least 1, --judge-tokens not negative"
            )
        self.judge = _judge(args) if args.judge or args.judge_answers else None
        if "green" in measures and ways and not args.green_prompt:
            notices.append(
                "GREEN's prompt is in our own words, the published judge was tuned on its package's: give that package's "
                "utils.py with --green-prompt for figures that stand beside published ones."
            )
        self._asked: list[judging.Question] = []

    def of(self, studies: Sequence[Study], file: str) -> tuple[list[Judged], list[Problem]]:
        """What the judge said of the studies of one file of answers; nothing where there is no judge."""
        if self.judge is None and not self.args.judge_requests:
            return [], []
        asked = judging.questions(studies, self.settings, file)
        if self.args.judge_requests:
            self._asked += asked
            return [], []
        if not asked:
            self.notices.append("The judge was asked nothing: no study is a report with a reference.")
            return [], []
        self._tell_remote(len(asked))
        self._asked += asked
        self.out.mkdir(parents=True, exist_ok=True)
        kept = judging.Kept(str(self.out / KEPT), self.judge.name, anew=isinstance(self.judge, judges.FileJudge))
        with _progress() as progress:
            task = progress.add_task("judge", total=None)

            def tell(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            replies, problems = judging.ask(asked, self.judge, kept, self.settings, self.skip, tell)
        return judging.results(studies, asked, replies, self.judge.name, self.settings), problems

    def finish(self) -> None:
        """Writes the questions of all files, where they are asked for; says what is odd about a file of answers."""
        if isinstance(self.judge, judges.FileJudge):
            self.notices += self.judge.notices(question.prompt for question in self._asked)
        if self.args.judge_requests:
            count = judging.write_requests(self.args.judge_requests, self._asked)
            self.notices.append(
                f"{count:,} questions for a judge are in {self.args.judge_requests}; give the answers with --judge-answers"
            )

    def _tell_remote(self, count: int) -> None:
        if isinstance(self.judge, EndpointJudge) and self.judge.is_remote:
            host = self.judge.host
            common.notice(f"Notice: up to {count:,} pairs of reports leave this machine: they are sent to {host} (--judge)")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, transient=True, console=Console(stderr=True))


def _judge(args: ScoringArgs) -> judges.Judge:
    if args.judge_answers:
        return judges.FileJudge(args.judge_answers)
    if urllib.parse.urlsplit(args.judge).scheme in ("http", "https"):
        if not args.judge_model:
            raise UserError("--judge is an address: give the server's name of the model with --judge-model")
        key = os.environ.get(args.judge_key_variable, "")
        return EndpointJudge(args.judge, args.judge_model, key, args.judge_timeout, args.judge_parallel, args.judge_tokens)
    # imported late, as above
    from jaxmed.api import Model, load
    from jaxmed.generate.request import weights_fingerprint

    model = load(args.judge, dtype=args.judge_dtype)
    if not isinstance(model, Model):
        raise UserError(f"--judge {args.judge}: holds encoders alone; give the folder of a language model")
    name = f"{Path(args.judge).name} ({weights_fingerprint(model)[:12]})"
    return judges.LocalJudge(model, name, args.judge_batch, own_chat=args.judge_chat == "folder")
