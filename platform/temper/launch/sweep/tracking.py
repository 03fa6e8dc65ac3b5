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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from temper.errors import RunError
from temper.files import read_json
from temper.launch.tracked_run import TrackedRun
from temper.plan.build import Plan
from temper.products import run_name
from temper.run_folder import PHASE_MANIFEST, PLAN
from temper.tracking.delivery import Delivery, Tail, follow, nothing
from temper.tracking.history import HistoryExtract, PhaseHistory, phase_histories
from temper.tracking.mlflow_store import RunGoneError, RunMetrics, RunStatus

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_LONGEST_PAUSE_S = 30.0
_CLOSE_S = 60.0


@dataclass
class _Child:
    """A run that MLflow is given; `delivery` is None until it is open, `status` until it has ended; then `tags` say
    what came of it."""

    run: TrackedRun
    delivery: Delivery | None = None
    status: RunStatus | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class SweepTracking:
    """Each method returns at once, but :meth:`close`."""

    def __init__(self, parent: Callable[[], str], first: Callable[[], Any], system: Callable[[str], Delivery]) -> None:
        """`parent` opens the sweep's own run; `first` is done before all else that is done in the background; `system`
        gives the delivery of the nodes' system metrics to the sweep's own run."""
        self._parent, self._system = parent, system
        self._system_delivery: Delivery | None = None
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ordered: list[str] = []
        """Run folders of children that are to be opened."""
        self._children: dict[str, _Child] = {}
        self._ended: dict[str, _Child] = {}
        """Those that MLflow has whole."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep-tracking", daemon=True)
        self._orders.put(first)
        self.parent_id = ""
        self._thread.start()

    def begin(self, run: TrackedRun) -> None:
        """Opens a child run, or goes on with the one that an earlier attempt opened."""
        self._ordered.append(str(run.plan.run_folder))
        self._orders.put(lambda: self._begin(run))

    def end(self, plan: Plan, status: RunStatus, tags: Mapping[str, str]) -> None:
        """Everything of the run is in its histories; it is delivered, and the run closed."""
        self._orders.put(lambda: self._end(plan, status, dict(tags)))

    def close(self, timeout_s: float = _CLOSE_S) -> list[str]:
        """Delivers what is left, for as long as it becomes less every `timeout_s`. The run folders of runs that MLflow
        did not take whole."""
        self._closing.set()
        while True:
            before = len(self._left())
            self._thread.join(timeout_s)
            left = self._left()
            if not self._thread.is_alive() or len(left) >= before:
                return left

    def _left(self) -> list[str]:
        return sorted({*self._ordered, *self._children})

    def _run(self) -> None:
        look_s, pause_s = 0.0, _LOOK_S
        while True:
            is_closing = self._closing.is_set()  # before delivering: what there was when `close` was called is sent
            try:
                order = self._orders.get(timeout=0.2)
            except queue.Empty:
                order = None
            if order is not None:
                _kept_quiet(order)
            if time.monotonic() > look_s or is_closing:
                tasks = [partial(self._deliver, key) for key in self._children]
                went_well = all([_kept_quiet(task) for task in tasks])
                has_system = _kept_quiet(self._deliver_system)
                if is_closing and order is None and has_system and not any(c.status for c in self._children.values()):
                    return
                pause_s = _LOOK_S if went_well and has_system else min(2 * pause_s, _LONGEST_PAUSE_S)
                look_s = time.monotonic() + pause_s

    def _begin(self, run: TrackedRun) -> None:
        key = str(run.plan.run_folder)
        if key in self._children:
            self._children[key].run.let_go()
        self._children[key] = _Child(run)
        self._ordered.remove(key)
        self._deliver(key)

    def _end(self, plan: Plan, status: RunStatus, tags: dict[str, str]) -> None:
        child = self._children.get(str(plan.run_folder))
        if child is not None:
            child.status, child.tags = status, tags
            self._deliver(str(plan.run_folder))

    def _deliver(self, key: str) -> None:
        """Whatever fails here is tried again at the next look."""
        child = self._children[key]
        child.delivery = child.delivery or self._open(child.run)
        try:
            child.delivery.deliver()
        except RunGoneError:
            self._begin_anew()
            raise
        if child.status is None:
            if child.run.has_grown():
                child.run.grow()
        elif child.run.end(child.status, child.tags, timeout_s=0.0):
            self._ended[key] = self._children.pop(key)
        else:
            child.delivery = None  # the run may be gone, and is opened again

    def _begin_anew(self) -> None:
        """The store came back without the sweep: every run is opened again, and given all that its histories have."""
        self._children = {**self._ended, **self._children}
        self._ended, self.parent_id, self._system_delivery = {}, "", None
        for child in self._children.values():
            child.delivery = None

    def _deliver_system(self) -> None:
        if not self.parent_id:
            return
        self._system_delivery = self._system_delivery or self._system(self.parent_id)
        try:
            self._system_delivery.deliver()
        except RunGoneError:
            self._begin_anew()
            raise

    def _open(self, run: TrackedRun) -> Delivery:
        self.parent_id = self.parent_id or self._parent()
        run.tags = {**run.tags, "mlflow.parentRunId": self.parent_id}
        run.open()
        open_tail = partial(_open_tail, run_name(run.plan.to_dict()))
        return Delivery(phase_histories(run.plan), nothing, lambda: RunMetrics(run.uri, run.run_id), open_tail)


def _open_tail(own: str, phase: PhaseHistory, after_step: int) -> Tail | None:
    """All records of a phase that the run in the folder `own` computes itself; of one that another run computed, an
    extract. Whose it is shows when it has begun.

    A phase may be a thousand trials' and take half a minute to send: so its curve is on each trial's page, and all of
    its points are on that of the run which computed it, to which each trial's page links.
    """
    if not phase.path.exists():
        return None
    owner = read_json(phase.path.with_name(PLAN))
    if owner is None or run_name(owner) == own:
        return follow(phase, after_step)
    return HistoryExtract(phase, after_step) if phase.path.with_name(PHASE_MANIFEST).exists() else None


def _kept_quiet(order: Callable[[], Any]) -> bool:
    """Tracking never hurts the sweep. Whether the order was carried out."""
    try:
        order()
    except Exception as error:
        log.warning("MLflow: %s", error if isinstance(error, RunError) else f"{type(error).__name__}: {error}")
        return False
    return True
