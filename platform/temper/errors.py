"""What can go wrong, said so that a user can act on it.

A user's mistake is a :class:`Problem`: key, value, rule and remedy in one line. All problems of a job are collected
and raised together as a :class:`JobError` (exit code 2). What fails later, while the run is under way, is a
:class:`RunError` (exit code 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_JOB = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Problem:
    """One mistake: `key: value` breaks `rule`; `remedy` is what to write instead."""

    key: str
    value: Any
    rule: str
    remedy: str = ""

    def __str__(self) -> str:
        shown = "" if self.value is None else f" {_shorten(self.value)}"
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.key}:{shown} {self.rule}{remedy}"


def _shorten(value: Any, limit: int = 80) -> str:
    text = value if isinstance(value, str) and value else _spelt(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _spelt(value: Any) -> str:
    """The value as a job file spells it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_spelt, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_spelt(key)}: {_spelt(entry)}' for key, entry in value.items())}}}"
    return repr(value)


class TemperError(Exception):
    """An error with a message for people; the command line prints it without a traceback."""

    exit_code = EXIT_FAILED


class JobError(TemperError):
    """The job, space or command line is wrong. Carries every problem found, not only the first."""

    exit_code = EXIT_WRONG_JOB

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RunError(TemperError):
    """The run failed; the message says where the log is and what to do."""


class CheckpointError(TemperError):
    """A checkpoint is incomplete, damaged or belongs to another job. Names the file and what differs."""
