"""Runs whose command died before their end: MLflow is given what it lacks of them, and their status.

A command that is killed leaves its run RUNNING for ever. The next command on the same storage, whatever it is for, and
`temper doctor` bring such runs to their end. The command itself, given again, goes on with its run all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.claims import folder_id
from temper.errors import RunError
from temper.files import read_json, write_json
from temper.launch.phase_store import settle_history
from temper.launch.sweep.ledger import LEDGER, LedgerTrial, read_ledger
from temper.locks import HeldError, claimed, is_held
from temper.products import find_storage, run_name
from temper.run_folder import HISTORY, LOCK, PHASES, PLAN, RESULT, RUN, SWEEP_RUN, SYSTEM, TRACKING_LOCK
from temper.tracking.delivery import replay
from temper.tracking.history import PhaseHistory
from temper.tracking.mlflow_store import OpenRun, RunGoneError, RunStatus, close_run, find_open_runs, first_line
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
    settled, away = list[Settled](), set[str]()
    for folder in [*_folders(storage, f"*/{RUN}"), *_folders(storage, f"sweeps/*/{SWEEP_RUN}")]:
        settled += _settle_folder(folder, storage, away)
    return settled


def settle(folder: Path) -> list[Settled]:
    """Brings the run, or the sweep with all of its runs, in this folder to its end, for the command that has it
    claimed. Never raises."""
    return _settle_folder(folder, _storage_of(folder), set(), is_claimed=True)


def settle_lost(storage: Path, uri: str) -> list[Settled]:
    """Ends the runs in a store that are open, and of which this machine's `storage` knows nothing any more. Raises
    RunError where the store cannot be asked."""
    lost = [run for run in find_open_runs(uri, folder_id(storage)) if _is_lost(storage, run)]
    return [Settled(run.name, run.run_id, "KILLED") for run in lost if close_run(uri, run.run_id, "KILLED", _TIMEOUT_S)]


def _is_lost(storage: Path, run: OpenRun) -> bool:
    """Whether no record in the run's folder names it. That of a phase is not named; it goes with its run's folder."""
    folder = storage / run.run_folder
    if run.kind == "phase" or not folder.exists():
        return not folder.exists()
    if is_held(folder / LOCK) or is_held(folder / TRACKING_LOCK):
        return False
    record = read_json(folder / (SWEEP_RUN if run.kind == "sweep" else RUN)) or {}
    return record.get("run_id") != run.run_id


def _folders(storage: Path, pattern: str) -> list[Path]:
    return [file.parent for file in sorted(storage.glob(pattern))]


@dataclass(frozen=True)
class _Left:
    """A run that its command did not bring to its end: `record` says which it is. `trial` is what the ledger has of a
    trial; None where it is none, or the ledger has no end of it. `plan` is None of a sweep's own run."""

    folder: Path
    record: Path
    known: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    trial: LedgerTrial | None = None
    is_trial: bool = False


def _settle_folder(folder: Path, storage: Path, away: set[str], is_claimed: bool = False) -> list[Settled]:
    """`away` are addresses of stores that did not answer, which are not asked again."""
    settled = []
    try:
        for left in _left_open(folder, storage):
            if not is_claimed and any(is_held(folder / lock) for lock in (LOCK, f"{LEDGER}.lock")):
                break
            if left.known["uri"] not in away and (one := _settled(left, away)) is not None:
                settled.append(one)
    except Exception as error:  # a file that is damaged, or a disk that fails
        log.warning("%s: what was left open of it in MLflow is left so: %s", folder, first_line(error))
    return settled


def _settled(left: _Left, away: set[str]) -> Settled | None:
    """None where another process is at it, or the store does not take its end now."""
    try:
        with claimed(left.folder / TRACKING_LOCK, left.folder.name):
            # Another process may have done so meanwhile.
            return _settle(left) if read_json(left.record) == left.known else None
    except HeldError:
        return None
    except RunGoneError:
        write_json(left.record, {**left.known, "open": False, "delivered": True})
        return None
    except Exception as error:  # which one depends on the store
        away.add(left.known["uri"])
        log.warning("%s was left open in MLflow, which does not take its end: %s", left.folder, first_line(error))
        return None


def _left_open(folder: Path, storage: Path) -> list[_Left]:
    """In the folder of a run, or of a sweep: there the trials and what they share, and last the sweep itself."""
    sweep = read_json(folder / SWEEP_RUN)
    if sweep is None:
        return _left(folder, storage)
    ended = {trial.id: trial for trial in read_ledger(folder / LEDGER) if trial.end}
    found = _left(folder / "shared", storage)
    for run in sorted(folder.glob("trials/*")):
        found += _left(run, storage, ended.get(run.name), is_trial=True)
    # Of trials that share nothing: each has a storage of its own, with its run and its teachers'.
    for record in sorted(folder.glob(f"alone/*/*/{RUN}")):
        run, own = record.parent, record.parents[1]
        is_trial = run.name == "run"
        found += _left(run, own, ended.get(own.name) if is_trial else None, is_trial=is_trial)
    return [*found, *([_Left(folder, folder / SWEEP_RUN, sweep)] if sweep.get("open") else [])]


def _left(folder: Path, storage: Path, trial: LedgerTrial | None = None, *, is_trial: bool = False) -> list[_Left]:
    known, plan = read_json(folder / RUN), read_json(folder / PLAN)
    if known is None or plan is None or known.get("delivered") or "run_id" not in known:
        return []
    if known.get("storage_id", folder_id(storage)) != folder_id(storage):
        return []  # brought here from a bucket: another machine's
    return [_Left(folder, folder / RUN, known, plan, trial, is_trial)]


def _settle(left: _Left) -> Settled:
    """Raises whatever the store raises, or RunError where it does not take the end in time."""
    uri, run_id = left.known["uri"], left.known["run_id"]
    if left.plan is None:
        status: RunStatus = left.known.get("status") or ("FINISHED" if (left.folder / RESULT).exists() else "KILLED")
        ended_ms = None
    else:
        status, ended_ms = _end_run(left, left.plan)
    if not close_run(uri, run_id, status, _TIMEOUT_S, ended_ms):
        raise RunError("the store did not take the end of the run in time")
    write_json(left.record, {**left.known, "open": False, "status": status, "delivered": True})
    name = f"{left.folder.parent.name}/{left.folder.name}" if left.plan is None else run_name(left.plan)
    return Settled(name, run_id, status)


def _end_run(left: _Left, plan: Mapping[str, Any]) -> tuple[RunStatus, int | None]:
    """Its status, and when its last record was written."""
    uri, run_id, storage = left.known["uri"], left.known["run_id"], _storage_of(left.folder, plan)
    histories = []
    for phase in plan["phases"]:
        folder, until = storage / PHASES / phase["fingerprint"], phase["first_step"] + phase["steps"]
        settle_history(folder, until)
        histories.append(PhaseHistory(phase["name"], folder / HISTORY, until))
    if not replay(uri, run_id, histories, left.folder / SYSTEM, _TIMEOUT_S):
        raise RunError("the store did not take the rest of the histories in time")
    tree = RunTree(uri, run_id, plan, storage)
    phases = tree.grow()
    is_complete = len(phases) == len(plan["phases"]) and all(phase.is_complete for phase in phases)
    status: RunStatus = "FINISHED" if is_complete else "FAILED" if left.known.get("status") == "FAILED" else "KILLED"
    tags = {}
    if left.is_trial:
        end = left.trial.end if left.trial is not None else "interrupted"
        status = MLFLOW_STATUS.get(end, status)
        reason = {"temper.trial.reason": left.trial.reason} if left.trial is not None and left.trial.reason else {}
        tags = {"temper.trial.status": "finished" if status == "FINISHED" else end, **reason}
    tree.end(status, tags)
    return status, max((phase.ended_ms for phase in phases), default=0) or None


def _storage_of(folder: Path, plan: Mapping[str, Any] | None = None) -> Path:
    """The storage of a run's folder, which lies in it as deep as its plan says."""
    plan = plan if plan is not None else read_json(folder / PLAN)
    return find_storage(folder) if plan is None else folder.parents[len(Path(run_name(plan)).parts) - 1]
