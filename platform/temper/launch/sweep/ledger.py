"""The sweep's ledger: which trials there are, what they reported and how they ended, durably and in order.

`trials.jsonl` in the sweep's folder has one JSON object a line, each with `trial`, the trial's id, and one of

    params     its values by variable: the trial has begun for the first time
    computed   fingerprint of a phase that it has computed itself
    result     what Ray Tune was told
    end        `finished`, `stopped` (by the scheduler), `failed` or `diverged`; with `reason` and `seconds`

It is what a broken sweep goes on from: a trial that has ended is never trained again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from temper.files import read_lines, sync

LEDGER = "trials.jsonl"
ENDED = ("finished", "stopped", "failed", "diverged")

Result = dict[str, Any]


@dataclass
class LedgerTrial:
    """What is known of a trial; `end` is empty while it has none."""

    id: str
    params: dict[str, Any]
    computed: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    end: str = ""
    reason: str = ""
    seconds: float = 0.0
    time_to_first_step_s: float | None = None


class Ledger:
    """The writing end, for one process. Opening reads what is there and drops a line that was cut short."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.trials = {trial.id: trial for trial in read_ledger(path)}
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                os.truncate(path, len(whole))

    def add(self, trial: str, **entry: Any) -> None:
        """Appends one line about the trial; it is on the disk when this returns."""
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps({"trial": trial, **entry}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self._path.parent)
        _apply(self.trials, {"trial": trial, **entry})


def read_ledger(path: Path) -> list[LedgerTrial]:
    """The trials in the order in which they began."""
    trials: dict[str, LedgerTrial] = {}
    for line in read_lines(path):
        _apply(trials, line)
    return list(trials.values())


def _apply(trials: dict[str, LedgerTrial], line: dict[str, Any]) -> None:
    if "params" in line:
        trials.setdefault(line["trial"], LedgerTrial(line["trial"], line["params"]))
        return
    trial = trials[line["trial"]]
    if "computed" in line:
        trial.computed.append(line["computed"])
    elif "result" in line:
        trial.results.append(line["result"])
    elif "end" in line:
        trial.end, trial.reason = line["end"], line["reason"]
        trial.seconds, trial.time_to_first_step_s = line["seconds"], line["time_to_first_step_s"]


def params_key(params: dict[str, Any]) -> str:
    """Two trials with the same key are one."""
    return json.dumps(params, sort_keys=True, default=str)


def find_trial(trials: Iterable[LedgerTrial], params: dict[str, Any]) -> LedgerTrial | None:
    key = params_key(params)
    return next((trial for trial in trials if params_key(trial.params) == key), None)
