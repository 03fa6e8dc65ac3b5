"""Runs whose command died before their end: MLflow is given what it lacks of them, and their status.

A command that is killed leaves its run RUNNING for ever. The next command on the same storage, whatever it is for, and
`temper doctor` bring such runs to their end. The command itself, given again, goes on with its run all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.errors import RunError
from temper.files import read_json, write_json
from temper.launch.sweep.ledger import LEDGER, read_ledger
from temper.locks import HeldError, claimed
from temper.products import find_storage
from temper.run_folder import HISTORY, LOCK, PHASES, PLAN, RESULT, RUN, SWEEP_RUN, SYSTEM
from temper.tracking.delivery import replay
from temper.tracking.history import PhaseHistory
from temper.tracking.mlflow_store import RunGoneError, RunStatus, close_run, find_open_runs, first_line
from temper.tracking.tree import RunTree

log = logging.getLogger(__name__)

MLFLOW_STATUS: dict[str, RunStatus] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "diverged": "FAILED",
}
"""By how a trial ended."""

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Settled:
    """A run that was brought to its end."""

    name: str
    run_id: str
    status: RunStatus


def reconcile(storage: Path) -> list[Settled]:
    """Brings the runs in `storage` that nobody is at to their end. What a store does not take now is left for the next
    time. Never raises."""
    settled: list[Settled] = []
    for folder in [*_folders(storage, f"*/{RUN}"), *_folders(storage, f"sweeps/*/{SWEEP_RUN}")]:
        try:
            if left := _left_open(folder):
                with _nobody_at(folder):
                    settled += [_settle(each) for each in left]
        except (HeldError, RunGoneError):
            continue
        except Exception as error:  # which one depends on the store
            log.warning("runs in %s were left open, and MLflow does not take their end: %s", folder, first_line(error))
            break
    return settled


def settle_lost(storage: Path, name: str, uri: str) -> list[Settled]:
    """Ends the runs in a store that are open, and say that they belong to the storage of this name, where they have no
    folder any more. Raises RunError where the store cannot be asked."""
    lost = [run for run in find_open_runs(uri, name) if not (storage / run.run_folder).exists()]
    return [Settled(run.name, run.run_id, "KILLED") for run in lost if close_run(uri, run.run_id, "KILLED", _TIMEOUT_S)]


def _folders(storage: Path, pattern: str) -> list[Path]:
    return [file.parent for file in sorted(storage.glob(pattern))]


@dataclass(frozen=True)
class _Left:
    """A run that its command did not bring to its end: `record` says which it is. `plan` is None of a sweep's own."""

    folder: Path
    record: Path
    known: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    end: str = ""


def _left_open(folder: Path) -> list[_Left]:
    """In the folder of a run, or of a sweep: there the trials and what they share, and last the sweep itself."""
    sweep = read_json(folder / SWEEP_RUN)
    if sweep is None:
        return _left(folder)
    ends = {trial.id: trial.end for trial in read_ledger(folder / LEDGER)}
    runs = [folder / "shared", *sorted(folder.glob("trials/*")), *sorted(folder.glob("alone/*/run"))]
    ids = [run.parent.name if run.name == "run" else run.name for run in runs]
    left = [each for run, id in zip(runs, ids, strict=True) for each in _left(run, ends.get(id, ""))]
    return [*left, _Left(folder, folder / SWEEP_RUN, sweep, None)] if left or sweep.get("open") else []


def _left(folder: Path, end: str = "") -> list[_Left]:
    known, plan = read_json(folder / RUN), read_json(folder / PLAN)
    if known is None or plan is None or known.get("delivered"):
        return []
    return [_Left(folder, folder / RUN, known, plan, end)]


@contextmanager
def _nobody_at(folder: Path) -> Iterator[None]:
    """Raises HeldError where a command, or a coordinator that outlives it by a moment, is at the run or the sweep."""
    with ExitStack() as stack:
        for lock in (folder / LOCK, folder / f"{LEDGER}.lock"):
            if lock.exists():
                stack.enter_context(claimed(lock, folder.name))
        yield


def _settle(left: _Left) -> Settled:
    """Raises whatever the store raises, or RunError where it does not take the end in time."""
    uri, run_id = left.known["uri"], left.known["run_id"]
    if left.plan is None:
        status: RunStatus = "FINISHED" if (left.folder / RESULT).exists() else "KILLED"
    else:
        status = _end_run(left, left.plan)
    if not close_run(uri, run_id, status, _TIMEOUT_S):
        raise RunError("the store did not take the end of the run in time")
    write_json(left.record, {**left.known, "open": False, "delivered": True})
    return Settled(left.folder.name, run_id, status)


def _end_run(left: _Left, plan: Mapping[str, Any]) -> RunStatus:
    uri, run_id, storage = left.known["uri"], left.known["run_id"], find_storage(left.folder)
    histories = [
        PhaseHistory(
            phase["name"], storage / PHASES / phase["fingerprint"] / HISTORY, phase["first_step"] + phase["steps"]
        )
        for phase in plan["phases"]
    ]
    if not replay(uri, run_id, histories, left.folder / SYSTEM, _TIMEOUT_S):
        raise RunError("the store did not take the rest of the histories in time")
    tree = RunTree(uri, run_id, plan, storage)
    is_complete = all(phase.is_complete for phase in tree.grow()) and len(tree.grow()) == len(plan["phases"])
    status: RunStatus = MLFLOW_STATUS.get(left.end) or ("FINISHED" if is_complete else "KILLED")
    interrupted = {"temper.trial.status": "interrupted"} if left.folder.parent.name == "trials" and not left.end else {}
    tree.end(status, interrupted)
    return status
