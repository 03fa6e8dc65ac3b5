"""Records from the histories to the tracking store: in the background, in batches, each once, through any outage.

The histories of all phases, one after the other, are the queue: steps rise from phase to phase. What has arrived is
asked of the store itself, at the start and after every failure, so neither a crash on this side nor a lost answer from
the other loses or doubles a step.

A store that came back without the run is given everything anew: the tracker leaves a note beside the run's record, and
the driver, which reads it, opens another run and names that in the record.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from temper.files import read_json, write_json
from temper.run_folder import LOST
from temper.tracking.history import Histories, HistoryTail, PhaseHistory, Record
from temper.tracking.mlflow_store import BATCH_METRICS, RefusedError, RunGoneError, RunMetrics, is_system_progress
from temper.tracking.redact import redact_text
from temper.tracking.system_metrics import SystemSpool, spool

log = logging.getLogger(__name__)

_GATHER_S = 1.0  # news is gathered for this long, then sent together
_LONGEST_PAUSE_S = 30.0
_CLOSING_PAUSE_S = 0.5


class Sink(Protocol):
    """Where the records go; :class:`RunMetrics` outside tests."""

    def last_step(self) -> int: ...

    def send(self, records: Sequence[Record]) -> None: ...


class Tail(Protocol):
    """Where the records of a phase come from, each once; :class:`HistoryTail`, or what gives a part of them."""

    def poll(self, limit: int | None = None) -> list[Record]: ...


OpenSink = Callable[[str, str], Sink]
OpenTail = Callable[[PhaseHistory, int], Tail | None]
"""The records of a phase after a step; None where it is not known yet which of them are wanted."""
open_system: OpenSink = partial(RunMetrics, progress=is_system_progress)


def nothing(phase: str) -> list[Record]:
    """Of histories that this process does not write."""
    return []


def follow(phase: PhaseHistory, after_step: int) -> HistoryTail:
    """All records of a phase."""
    return HistoryTail(phase.path, after_step)


@dataclass(frozen=True)
class Queue:
    """What goes to one kind of sink: histories, and what their files do not hold yet, by the name of the phase."""

    phases: tuple[PhaseHistory, ...]
    open_sink: OpenSink = RunMetrics
    unwritten: Callable[[str], list[Record]] = nothing

    def delivery(self, uri: str, run_id: str) -> Delivery:
        return Delivery(self.phases, self.unwritten, lambda: self.open_sink(uri, run_id))


def record_queue(histories: Histories) -> Queue:
    """The queue of histories that are being written."""
    return Queue(histories.phases, RunMetrics, histories.unwritten)


def system_queue(samples: SystemSpool | Path) -> Queue:
    """The queue of a spool of system metrics: one that is being written, or a file that nobody writes any more."""
    if isinstance(samples, SystemSpool):
        return Queue(spool(samples.path), open_system, samples.unwritten)
    return Queue(spool(samples), open_system)


class Delivery:
    """What is still to be sent from the histories of a job's phases to one run; `unwritten` gives what a phase's file
    does not hold yet, and `open_tail` those of its records that are wanted.

    A phase's turn comes when the last step of the one before it is delivered: the store knows the last step that it
    has, and what overtook another phase's records would keep them out.
    """

    def __init__(
        self,
        phases: Sequence[PhaseHistory],
        unwritten: Callable[[str], list[Record]],
        open_sink: Callable[[], Sink],
        open_tail: OpenTail = follow,
    ) -> None:
        self._phases = list(phases)
        self._open_tail = open_tail
        self._tail: Tail | None = None
        self._unwritten = unwritten
        self._open_sink = open_sink
        self._waiting: deque[Record] = deque()
        self._delivered: int | None = None  # None: the store must be asked
        self._sink: Sink | None = None

    @property
    def path(self) -> Path:
        """The history that is being delivered."""
        return self._phases[0].path

    def deliver(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Send all that there is, or up to the first batch before which `stop()`; false where that left something.
        Raises what the store raises; the next call then goes on where the store says that this one ended."""
        self._sink = self._sink or self._open_sink()
        if self._delivered is None:
            self._delivered = self._sink.last_step()
        while batch := self._next_batch(self._delivered):
            if stop():
                return False
            try:
                self._send(self._sink, batch)
            except Exception:
                self._delivered = None
                raise
            self._delivered = batch[-1]["step"]
        return True

    def _next_batch(self, delivered: int) -> list[Record]:
        while True:
            while self._waiting and self._waiting[0]["step"] <= delivered:
                self._waiting.popleft()
            if self._waiting:
                return take_batch(self._waiting)
            while delivered >= self._phases[0].last_step and len(self._phases) > 1:
                del self._phases[0]
                self._tail = None
            records = self._news(delivered)
            if not records:
                return []
            self._waiting.extend(records)

    def _news(self, delivered: int) -> list[Record]:
        """What comes next in the current phase's history."""
        # What a full disk keeps out of the file is later than everything in it; asked for first, because it may be
        # written before the file is read, but not the other way round.
        held = self._unwritten(self._phases[0].name)
        self._tail = self._tail or self._open_tail(self._phases[0], delivered)
        written = self._tail.poll(limit=BATCH_METRICS) if self._tail is not None else []
        return written or [record for record in held if record["step"] > delivered]

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


# ------------------------------------------------------------------------------------------- which run it is, and where


def opened_run(record: Path) -> tuple[str, str] | None:
    """The store's address and the run's id, once the driver has written down that the run is open."""
    run = read_json(record)
    return (run["uri"], run["run_id"]) if run and run.get("open") else None


def is_lost(record: Path) -> bool:
    """Whether a tracker has found that the store does not have the run of `record` any more: it wants another one."""
    run, lost = read_json(record), read_json(record.with_name(LOST))
    return run is not None and lost is not None and run.get("run_id") == lost["run_id"]


def _note_lost(record: Path, run_id: str) -> None:
    if (read_json(record.with_name(LOST)) or {}).get("run_id") == run_id:
        return
    try:
        write_json(record.with_name(LOST), {"run_id": run_id})
    except OSError as error:
        log.error("%s cannot be written: %s", record.with_name(LOST), error)
    log.warning("MLflow does not have run %s any more; all that it had is delivered to the next one", run_id)


# --------------------------------------------------------------------------------------------- while a run is tracked


class RunTracker:
    """A thread that delivers to the run that `record` names, as soon as that is open, while the histories grow.

    Nothing here raises or waits for the store, except `close` for as long as it is told to.
    """

    def __init__(self, record: Path, queues: Sequence[Queue]) -> None:
        self._record, self._queues = record, queues
        self._run: tuple[str, str] | None = None
        self._deliveries: list[Delivery] = []
        self._news = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._drained = False
        self._outage_since_s: float | None = None
        self._thread = threading.Thread(target=self._work, name="temper-tracking", daemon=True)

    def start(self) -> None:
        """Begin; what the histories hold and the store does not is sent first."""
        self._news.set()
        self._thread.start()

    def wake(self) -> None:
        """There is news in the histories."""
        self._news.set()

    def close(self, timeout_s: float) -> bool:
        """Deliver the rest and end; false where that takes longer, or no run is open. What is left is for `replay`."""
        self._closing.set()
        self._news.set()
        self._thread.join(timeout_s)
        self._abandoned.set()
        return self._drained

    def _work(self) -> None:
        failures = 0
        while not self._abandoned.is_set():
            self._news.wait()
            self._news.clear()
            closing = self._closing.is_set()  # before delivering: what was added before `close` must be sent by then
            try:
                is_open = self._deliver()
            except Exception as error:  # any error of any store: training must not notice
                failures = min(failures + 1, 10)
                self._note_failure(error)
                self._news.set()
                self._pause(min(2.0**failures, _LONGEST_PAUSE_S))
                continue
            failures = 0
            if closing:
                self._drained = is_open and not self._abandoned.is_set()
                break
            if not is_open:
                self._news.set()
            self._pause(_GATHER_S)

    def _deliver(self) -> bool:
        """Send what there is; false while there is no run to send it to."""
        run = opened_run(self._record)
        if run is None:
            return False
        if run != self._run:
            self._run, self._deliveries = run, [queue.delivery(*run) for queue in self._queues]
        for delivery in self._deliveries:
            delivery.deliver(self._abandoned.is_set)
        self._say_recovery()
        return True

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._abandoned.wait(_CLOSING_PAUSE_S)
        else:
            self._closing.wait(seconds)

    def _note_failure(self, error: Exception) -> None:
        uri, run_id = self._run or ("", "")
        if isinstance(error, RunGoneError):
            _note_lost(self._record, run_id)
        if self._outage_since_s is None:
            self._outage_since_s = time.monotonic()
            reason = redact_text(next(iter(str(error).splitlines()), ""))
            log.warning(
                "MLflow at %s takes no metrics (%s: %s); they are kept in %s and delivered later",
                redact_text(uri), type(error).__name__, reason, self._queues[0].phases[0].path.parent,
            )  # fmt: skip

    def _say_recovery(self) -> None:
        if self._outage_since_s is not None:
            log.warning("MLflow took everything again after %.0f s", time.monotonic() - self._outage_since_s)
            self._outage_since_s = None


# ------------------------------------------------------------------------------------------------------ after the end


def replay(
    uri: str,
    run_id: str,
    phases: Sequence[PhaseHistory],
    system: Path | None = None,
    timeout_s: float = 30.0,
    open_sink: OpenSink = RunMetrics,
) -> bool:
    """Send what the run lacks of histories, and of a spool of system metrics, that nobody writes any more; true when it
    has everything.

    For the driver, after the training: the process that tracked it may have died with the last steps undelivered.
    However short the time is, something is sent, so that each call brings the run nearer to its end.
    Raises RunGoneError where the store does not have the run: another one, newly opened, is to be given everything.
    """
    queues = [Queue(tuple(phases), open_sink), *([system_queue(system)] if system is not None else [])]
    deliveries = [queue.delivery(uri, run_id) for queue in queues]
    deadline_s, batches = time.monotonic() + timeout_s, itertools.count()
    while True:
        try:
            return all(
                [each.deliver(lambda: next(batches) > 0 and time.monotonic() >= deadline_s) for each in deliveries]
            )
        except RunGoneError:
            raise
        except Exception as error:
            if time.monotonic() >= deadline_s:
                places = ", ".join(str(delivery.path) for delivery in deliveries)
                log.warning("MLflow did not take the rest of %s: %s", places, redact_text(str(error)))
                return False
        time.sleep(_CLOSING_PAUSE_S)
