"""Errors that a person can mend. The command line prints them as one line and exits with 2, or with `REQUEUE`."""

import dataclasses

REQUEUE = 75
"""Exit code of a process that was preempted or lost its peers: started again, the job goes on"""


class UserError(Exception):
    """Something about the input or the machine that the user can mend; the message says what, where and what to do."""

    code = 2
    """Exit code of the command"""


class PeerError(UserError):
    """Other processes of the job are missing or do not answer. A scheduler may try again: they may be late."""

    code = REQUEUE


class Preempted(BaseException):
    """The process was asked to end (SIGTERM) and has nothing left to save; the message says where the job goes on.

    No Exception, as KeyboardInterrupt is none: what handles errors does not handle this.
    """


class Notice(UserWarning):
    """Something runs otherwise than a person would expect; the command line prints it as a plain line."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One record or file that cannot be used."""

    where: str
    """File and record, e.g. `train.json: record 17 (id "valid_17")`"""
    what: str
    """What is wrong with it and what to do"""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class BadRecords(UserError):
    """Every problem found, one line each."""

    def __init__(self, problems: list[Problem], noun: str = "record", hint: str = "cannot be used; mend {them}"):
        self.problems = problems
        lines = "\n".join(f"  {p}" for p in problems)
        count, them = (f"{len(problems)} {noun}s", "them") if len(problems) != 1 else (f"1 {noun}", "it")
        told = hint.format(them=them)
        super().__init__(f"{count} {told}, or pass --on-bad-record skip to go on without {them}:\n{lines}")
