"""Records from the histories to the tracking store: in the background, in batches, each once, through any outage.

The histories of all phases, one after the other, are the queue: steps rise from phase to phase. What has arrived is
asked of the store itself, at the start and after every failure, so neither a crash on this side nor a lost answer from
the other loses or doubles a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from temper.tracking.history import Histories, HistoryTail, PhaseHistory, Record
from temper.tracking.mlflow_store import BATCH_METRICS, RefusedError, RunMetrics
from temper.tracking.redact import redact_text

log = logging.getLogger(__name__)

_GATHER_S = 1.0  # news is gathered for this long, then sent together
_LONGEST_PAUSE_S = 30.0
_CLOSING_PAUSE_S = 0.5
_SYSTEM_RESTART_S = 30.0


class SystemWatch(Protocol):
    """What logs the use of the machine beside the metrics of the run."""

    @property
    def alive(self) -> bool: ...

    def stop(self) -> None: ...


class Sink(Protocol):
    """Where the records go; :class:`RunMetrics` outside tests."""

    def last_step(self) -> int: ...

    def send(self, records: Sequence[Record]) -> None: ...

    def watch_system(self) -> SystemWatch: ...


OpenSink = Callable[[str, str], Sink]


class Delivery:
    """What is still to be sent from the histories of a job's phases to one run; `unwritten` gives what a phase's file
    does not hold yet.

    A phase's turn comes when the last step of the one before it is delivered: the store knows the last step that it
    has, and what overtook another phase's records would keep them out.
    """

    def __init__(
        self,
        phases: Sequence[PhaseHistory],
        unwritten: Callable[[str], list[Record]],
        open_sink: Callable[[], Sink],
    ) -> None:
        self._phases = list(phases)
        self._tail = HistoryTail(self._phases[0].path)
        self._unwritten = unwritten
        self._open_sink = open_sink
        self._waiting: deque[Record] = deque()
        self._delivered: int | None = None  # None: the store must be asked
        self.sink: Sink | None = None

    @property
    def path(self) -> Path:
        """The history that is being delivered."""
        return self._tail.path

    def deliver(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Send all that there is, or up to the first batch before which `stop()`. Raises what the store raises; the
        next call then goes on where the store says that this one ended."""
        self.sink = self.sink or self._open_sink()
        if self._delivered is None:
            self._delivered = self.sink.last_step()
        while not stop() and (batch := self._next_batch(self._delivered)):
            try:
                self._send(self.sink, batch)
            except Exception:
                self._delivered = None
                raise
            self._delivered = batch[-1]["step"]

    def _next_batch(self, delivered: int) -> list[Record]:
        while True:
            while self._waiting and self._waiting[0]["step"] <= delivered:
                self._waiting.popleft()
            if self._waiting:
                return take_batch(self._waiting)
            while delivered >= self._phases[0].last_step and len(self._phases) > 1:
                del self._phases[0]
                self._tail = HistoryTail(self._phases[0].path)
            records = self._news(delivered)
            if not records:
                return []
            self._waiting.extend(records)

    def _news(self, delivered: int) -> list[Record]:
        """What comes next in the current phase's history."""
        # What a full disk keeps out of the file is later than everything in it; asked for first, because it may be
        # written before the file is read, but not the other way round.
        held = self._unwritten(self._phases[0].name)
        return self._tail.poll(limit=BATCH_METRICS) or [record for record in held if record["step"] > delivered]

    def _send(self, sink: Sink, batch: Sequence[Record]) -> None:
        try:
            sink.send(batch)
        except RefusedError as error:
            if len(batch) == 1:
                log.error("MLflow refused step %d for good, it stays in the history only: %s", batch[0]["step"], error)
                return
            for record in batch:
                self._send(sink, [record])


def take_batch(records: Iterable[Record], limit: int = BATCH_METRICS) -> list[Record]:
    """The first records that have at most `limit` metrics together; one record that has more is a batch of its own."""
    batch: list[Record] = []
    num_metrics = 0
    for record in records:
        num_metrics += len(record["metrics"])
        if batch and num_metrics > limit:
            break
        batch.append(record)
    return batch


class RunTracker:
    """A thread that delivers histories to a run while they grow, and logs the use of the machine if asked to.

    Nothing here raises or waits for the store, except `close` for as long as it is told to.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        histories: Histories,
        *,
        system_metrics: bool = False,
        open_sink: OpenSink = RunMetrics,
    ) -> None:
        self._uri = uri
        self._histories = histories
        self._delivery = Delivery(histories.phases, histories.unwritten, lambda: open_sink(uri, run_id))
        self._system_metrics = system_metrics
        self._system: SystemWatch | None = None
        self._system_started_s = -_SYSTEM_RESTART_S
        self._news = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._drained = False
        self._outage_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="temper-tracking", daemon=True)

    def start(self) -> None:
        """Begin; what the histories hold and the store does not is sent first."""
        self._news.set()
        self._thread.start()

    def add(self, phase: str, records: Sequence[Record]) -> list[Record]:
        """Store a phase's records in its history and have them delivered; returns those that it did not have."""
        new = self._histories.append(phase, records)
        if new:
            self._news.set()
        return new

    def close(self, timeout_s: float) -> bool:
        """Deliver the rest and end; false where that takes longer. What is left is for `replay`."""
        self._closing.set()
        self._news.set()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(timeout_s)
        self._abandoned.set()
        return self._drained

    def _run(self) -> None:
        failures = 0
        while not self._abandoned.is_set():
            self._news.wait()
            self._news.clear()
            closing = self._closing.is_set()  # before delivering: what was added before `close` must be sent by then
            try:
                self._delivery.deliver(self._abandoned.is_set)
            except Exception as error:  # any error of any store: training must not notice
                failures = min(failures + 1, 10)
                self._say_outage(error)
                self._news.set()
                self._pause(min(2.0**failures, _LONGEST_PAUSE_S))
                continue
            failures = 0
            self._say_recovery()
            if closing:
                self._drained = not self._abandoned.is_set()
                break
            self._watch_system()
            self._pause(_GATHER_S)
        if self._system is not None:
            self._system.stop()

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._abandoned.wait(_CLOSING_PAUSE_S)
        else:
            self._closing.wait(seconds)

    def _watch_system(self) -> None:
        """Start the monitor of the machine, and again where an outage ended it."""
        alive = self._system is not None and self._system.alive
        recently = time.monotonic() - self._system_started_s < _SYSTEM_RESTART_S
        if not self._system_metrics or alive or recently or self._delivery.sink is None:
            return
        self._system_started_s = time.monotonic()
        try:
            self._system = self._delivery.sink.watch_system()
        except Exception as error:
            log.warning("system metrics are not logged: %s", error)

    def _say_outage(self, error: Exception) -> None:
        if self._outage_since_s is None:
            self._outage_since_s = time.monotonic()
            reason = redact_text(next(iter(str(error).splitlines()), ""))
            log.warning(
                "MLflow at %s takes no metrics (%s: %s); they are kept in %s and delivered later",
                redact_text(self._uri), type(error).__name__, reason, self._delivery.path,
            )  # fmt: skip

    def _say_recovery(self) -> None:
        if self._outage_since_s is not None:
            log.warning("MLflow took everything again after %.0f s", time.monotonic() - self._outage_since_s)
            self._outage_since_s = None


def replay(
    uri: str,
    run_id: str,
    phases: Sequence[PhaseHistory],
    timeout_s: float = 30.0,
    open_sink: OpenSink = RunMetrics,
) -> bool:
    """Send what the run lacks of histories that nobody writes any more; true when it has everything.

    For the driver, after the training: the process that tracked it may have died with the last steps undelivered.
    """
    delivery = Delivery(phases, lambda phase: [], lambda: open_sink(uri, run_id))
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            delivery.deliver(lambda: time.monotonic() >= deadline_s)
            return time.monotonic() < deadline_s
        except Exception as error:
            if time.monotonic() >= deadline_s:
                log.warning("MLflow did not take the rest of %s: %s", delivery.path, redact_text(str(error)))
                return False
        time.sleep(_CLOSING_PAUSE_S)
