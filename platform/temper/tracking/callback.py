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
from temper.tracking.delivery import RunTracker, record_queue, system_queue
from temper.tracking.failures import describe_failure, failed_ranks, unwrap
from temper.tracking.history import Histories, PhaseHistory
from temper.tracking.system_metrics import SystemSpool

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 15.0
_ABORT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class TrackingTarget:
    """Where a job's records and failures go.

    `run_record` is the file in which the driver writes down the MLflow run as soon as it is open: workers start
    meanwhile, and what they report before is in the histories. `histories` are those of all phases, in their order,
    also of the phases that are reused: the run is given their records too. `system_path` is the spool of system
    metrics.
    """

    run_record: str
    histories: tuple[PhaseHistory, ...]
    failures_path: str
    system_path: str


def build_callbacks(target: TrackingTarget) -> list[RayTrainCallback]:
    """For `RunConfig(callbacks=…)`: the tracking, and its orderly end before the controller exits."""
    tracking = TrackingCallback(target)
    return [tracking, TrackingEnd(tracking)]


class Tracking:
    """The spools of a run, and the thread that delivers from them."""

    def __init__(self, target: TrackingTarget) -> None:
        self._record = Path(target.run_record)
        self._histories = Histories(target.histories)
        self._system = SystemSpool(Path(target.system_path))
        self._tracker: RunTracker | None = None

    def add(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Stores what the ranks report; the network is another thread's."""
        self._histories.append(reports[0]["phase"], reports[0]["records"])
        self._system.add([sample for report in reports for sample in report.get("system", [])])
        if self._tracker is None:
            tracker = RunTracker(self._record, [record_queue(self._histories), system_queue(self._system)])
            tracker.start()
            self._tracker = tracker
        self._tracker.wake()

    def close(self, timeout_s: float) -> bool:
        """Delivers what is left; true when the store has everything."""
        return self._tracker is not None and self._tracker.close(timeout_s)


class TrackingCallback(UserCallback):
    """Takes `{"phase": name, "records": [...], "system": [...]}` from every report: the records of rank 0, and the
    samples of the nodes' system metrics, which one rank of each node has."""

    def __init__(self, target: TrackingTarget) -> None:
        self.target = target
        self._tracking: Tracking | None = None
        self._failures: list[dict[str, Any]] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Never raises: a fault in tracking must not end the training."""
        try:
            self._tracking = self._tracking or Tracking(self.target)
            self._tracking.add(metrics)
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
            return self._tracking is None or self._tracking.close(timeout_s)
        except Exception:
            log.exception("tracking did not end in order")
            return False

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
