"""Errors that a person can mend. The command line prints them as one line and exits with 2."""

import dataclasses


class UserError(Exception):
    """Something about the input or the machine that the user can mend; the message says what, where and what to do."""


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

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        lines = "\n".join(f"  {p}" for p in problems)
        count, them = (f"{len(problems)} records", "them") if len(problems) != 1 else ("1 record", "it")
        super().__init__(f"{count} cannot be used; mend {them}, or pass --on-bad-record skip to go on without {them}:\n{lines}")
