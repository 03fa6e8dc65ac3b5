"""What runs in the Ray Train controller: reported records into the history and to MLflow, failures into a file.

Built on the driver and pickled to the controller, so it holds plain data until the first report.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.callback import RayTrainCallback

from temper.errors import RunError
from temper.files import read_json
from temper.tracking.delivery import RunTracker
from temper.tracking.failures import describe_failure, failed_ranks, unwrap
from temper.tracking.history import Histories, PhaseHistory

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 15.0
_ABORT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class TrackingTarget:
    """Where a job's records and failures go.

    `run_record` is the file in which the driver writes down the MLflow run as soon as it is open: workers start
    meanwhile, and what they report before is in the histories. `histories` are those of all phases, in their order,
    also of the phases that are reused: the run is given their records too. `system_metrics`: log the machine's too.
    """

    run_record: str
    histories: tuple[PhaseHistory, ...]
    failures_path: str
    system_metrics: bool


def build_callbacks(target: TrackingTarget) -> list[RayTrainCallback]:
    """For `RunConfig(callbacks=…)`: the tracking, and its orderly end before the controller exits."""
    tracking = TrackingCallback(target)
    return [tracking, TrackingEnd(tracking)]


class TrackingCallback(UserCallback):
    """Takes `{"records": [...], "phase": name}` of rank 0 from every report; the other ranks' are not looked at."""

    def __init__(self, target: TrackingTarget) -> None:
        self.target = target
        self._histories: Histories | None = None
        self._tracker: RunTracker | None = None
        self._failures: list[dict[str, Any]] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Never raises: a fault in tracking must not end the training."""
        try:
            if self._histories is None:
                self._histories = Histories(self.target.histories)
            tracker = self._open_tracker(self._histories)
            store = self._histories.append if tracker is None else tracker.add
            store(metrics[0]["phase"], metrics[0]["records"])
        except Exception:
            log.exception("a report could not be tracked")

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Write the failures down; raise RunError if every attempt would fail like this one.

        Ray Train restarts the workers after any exception of theirs, but stops at once when a callback raises.
        """
        self._write_failures(worker_exceptions)
        failed = failed_ranks(worker_exceptions)
        if failed:
            rank, error = min(failed.items())
            origin = unwrap(error)
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            path = self.target.failures_path
            raise RunError(f"rank {rank}{others}: {type(origin).__name__}: {origin}; details in {path}")

    def close(self, timeout_s: float) -> bool:
        """Deliver what is left; true when the store has everything. Never raises."""
        try:
            if self._histories is None:
                return True
            tracker = self._open_tracker(self._histories)
            return tracker is not None and tracker.close(timeout_s)
        except Exception:
            log.exception("tracking did not end in order")
            return False

    def _open_tracker(self, histories: Histories) -> RunTracker | None:
        """Once the run is open, its tracker, which first delivers what the histories hold."""
        if self._tracker is None and (run := read_json(Path(self.target.run_record))) and run.get("open"):
            watched = self.target.system_metrics
            try:
                tracker = RunTracker(run["uri"], run["run_id"], histories, system_metrics=watched)
                tracker.start()
            except Exception:
                log.exception("the run cannot be tracked; its histories go on")
                return None
            self._tracker = tracker
        return self._tracker

    def _write_failures(self, errors: Mapping[int, BaseException]) -> None:
        time_ms = time.time_ns() // 1_000_000
        failures = [describe_failure(rank, error, time_ms) for rank, error in sorted(errors.items())]
        # While a group is being given up, Ray Train polls its dead workers and tells of the same exceptions again.
        if _same(failures, self._failures):
            return
        self._failures = failures
        try:
            path = Path(self.target.failures_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(failure) + "\n" for failure in failures)
        except OSError as error:
            log.error("%s cannot be written: %s", self.target.failures_path, error)


def _same(failures: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> bool:
    def identities(of: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
        return [(failure["rank"], failure["type"], failure["message"]) for failure in of]

    return identities(failures) == identities(others)


class TrackingEnd(ControllerCallback):
    """Drains the tracking before the controller's process goes.

    Not part of :class:`TrackingCallback`, because Ray Train gives a UserCallback no hook of the controller's end. The
    two are pickled together and stay connected.
    """

    def __init__(self, tracking: TrackingCallback) -> None:
        self._tracking = tracking

    async def before_controller_shutdown(self) -> None:
        """After the last report and the workers' end, before the result is handed to the driver."""
        await asyncio.to_thread(self._tracking.close, _CLOSE_TIMEOUT_S)

    def before_controller_abort(self) -> None:
        """After an interrupt; the driver waits for it."""
        self._tracking.close(_ABORT_TIMEOUT_S)
