"""The sweep's tree in MLflow: one parent run, a child for each trial and for what all trials share.

One thread of the coordinator opens, feeds and closes all of these runs, so that a trial waits for none of it and the
store has one writer. What it cannot deliver stays in the histories of the phases; the same sweep delivers it later.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from temper.config.load import job_to_yaml
from temper.errors import RunError
from temper.files import write_json
from temper.launch.teacher_runs import teacher_tags
from temper.launch.train import phase_tags
from temper.plan.build import Plan
from temper.remote_store import publish_run
from temper.run_folder import RUN
from temper.tracking.delivery import Delivery
from temper.tracking.history import phase_histories
from temper.tracking.mlflow_store import RunMetrics, RunStatus, close_run, known_run, log_tags, open_run

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_CLOSE_S = 60.0


@dataclass
class _Child:
    """A run that MLflow is given; `delivery` is None until it is open, `status` until it has ended."""

    plan: Plan
    name: str
    tags: dict[str, str]
    run_id: str = ""
    delivery: Delivery | None = None
    status: RunStatus | None = None


class SweepTracking:
    """Each method returns at once, but :meth:`close`."""

    def __init__(self, uri: str, parent: Callable[[], str], command: str) -> None:
        self._uri, self._parent, self._command = uri, parent, command
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ordered: list[str] = []
        """Run folders of children that are to be opened."""
        self._children: dict[str, _Child] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep-tracking", daemon=True)
        self.parent_id = ""
        self._thread.start()

    def begin(self, plan: Plan, name: str, tags: Mapping[str, str]) -> None:
        """Opens the child run of this plan's run folder, or goes on with the one that an earlier attempt opened."""
        self._ordered.append(str(plan.run_folder))
        self._orders.put(lambda: self._begin(plan, name, dict(tags)))

    def end(self, plan: Plan, status: RunStatus, tags: Mapping[str, str]) -> None:
        """Everything of the run is in its histories; it is delivered, and the run closed."""
        self._orders.put(lambda: self._end(plan, status, dict(tags)))

    def close(self, timeout_s: float = _CLOSE_S) -> list[str]:
        """Delivers what is left. The run folders of runs that MLflow did not take whole."""
        self._closing.set()
        self._thread.join(timeout_s)
        return sorted({*self._ordered, *self._children})

    def _run(self) -> None:
        looked_s = 0.0
        while True:
            try:
                order = self._orders.get(timeout=0.2)
            except queue.Empty:
                if self._closing.is_set() and not any(child.status for child in self._children.values()):
                    return
                order = None
            if order is not None:
                _kept_quiet(order)
            if time.monotonic() - looked_s > _LOOK_S or self._closing.is_set():
                looked_s = time.monotonic()
                for key in list(self._children):
                    _kept_quiet(lambda key=key: self._deliver(key))  # type: ignore[misc]

    def _begin(self, plan: Plan, name: str, tags: dict[str, str]) -> None:
        key = str(plan.run_folder)
        self._children[key] = _Child(plan, name, tags)
        self._ordered.remove(key)
        self._deliver(key)

    def _end(self, plan: Plan, status: RunStatus, tags: dict[str, str]) -> None:
        child = self._children.get(str(plan.run_folder))
        if child is not None:
            child.status, child.tags = status, {**child.tags, **tags}
            self._deliver(str(plan.run_folder))

    def _deliver(self, key: str) -> None:
        """Whatever fails here is tried again at the next look."""
        child = self._children[key]
        child.delivery = child.delivery or self._open(child)
        child.delivery.deliver()
        if child.status is None:
            return
        plan, run_id = child.plan, child.run_id
        log_tags(self._uri, run_id, {**phase_tags(plan, run_id), **teacher_tags(plan), **child.tags})
        if close_run(self._uri, run_id, child.status):
            write_json(plan.run_folder / RUN, {"uri": self._uri, "run_id": run_id, "open": False, "delivered": True})
            publish_run(plan.run_folder, plan.job.storage_folder)
            del self._children[key]

    def _open(self, child: _Child) -> Delivery:
        self.parent_id = self.parent_id or self._parent()
        plan = child.plan
        plan.run_folder.mkdir(parents=True, exist_ok=True)
        run_id = open_run(
            self._uri,
            plan,
            run_id=known_run(plan.run_folder / RUN, self._uri),
            job_yaml=job_to_yaml(plan.job),
            command=self._command,
            # At once: a coordinator that is killed now would leave a run that nobody knows.
            created=lambda created: write_json(
                plan.run_folder / RUN, {"uri": self._uri, "run_id": created, "open": False}
            ),
            name=child.name,
            tags={"mlflow.parentRunId": self.parent_id, **child.tags},
        )
        child.run_id = run_id
        write_json(plan.run_folder / RUN, {"uri": self._uri, "run_id": run_id, "open": True})
        return Delivery(phase_histories(plan), lambda phase: [], lambda: RunMetrics(self._uri, run_id))


def _kept_quiet(order: Callable[[], Any]) -> None:
    """Tracking never hurts the sweep."""
    try:
        order()
    except Exception as error:
        log.warning("MLflow: %s", error if isinstance(error, RunError) else f"{type(error).__name__}: {error}")
