"""One trial as the coordinator sees it: its results, handed to Ray Tune one by one, and its decisions, waited for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from temper.launch.rungs import RungClock
from temper.launch.sweep.ledger import LedgerTrial, Result
from temper.plan.build import Plan
from temper.plan.dsd import parameters_left
from temper.plan.metric_names import without_classes
from temper.plan.phases import PhasePlan
from temper.tracking.history import Record

Status = Literal["pending", "waiting", "running", "stopped", "finished", "failed", "diverged"]

_FP16_BAD_LOSSES = 20
_PULL_S = 5.0  # longest wait in one call of Ray Tune's trial, which then calls again


_PLACE = frozenset(("step", "phase_name", "phase_share", "phases_done", "place", "rung", "rung_time", "done"))


class TrialStopped(Exception):
    """Ray Tune, or the user, does not want the trial to go on now."""


class TrialFailed(Exception):
    """The trial cannot go on; `status` is `failed` or `diverged`."""

    def __init__(self, status: Literal["failed", "diverged"], reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What a trial is told when it asks for its next result: `wait` and ask again, a `result`, or that it is `over`."""

    kind: Literal["wait", "result", "over"]
    result: Result | None = None
    status: Status = "running"
    reason: str = ""


class Mailbox:
    """Results in order, one for each call of `pull`. Whoever puts a decisive one waits until Ray Tune asks for the next
    one, which means that the trial goes on, or lets go of the trial."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._results: list[Result] = []
        self._pulls = 0
        self._stopping = False
        self._over: Answer | None = None

    @property
    def results(self) -> list[Result]:
        return list(self._results)

    def put(self, result: Result, *, decisive: bool) -> None:
        """Raises TrialStopped where Ray Tune has let go of the trial."""
        with self._changed:
            self._results.append(result)
            place = len(self._results)
            self._changed.notify_all()
            if decisive:
                self._changed.wait_for(lambda: self._stopping or self._pulls > place)
            if self._stopping:
                raise TrialStopped

    def pull(self, number: int) -> Answer:
        """Result `number`, from 0. To ask for it says that the trial goes on after the one before."""
        with self._changed:
            self._pulls = max(self._pulls, number + 1)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._results) > number or self._over is not None, _PULL_S)
            if len(self._results) > number:
                return Answer("result", self._results[number])
            return self._over or Answer("wait")

    def let_go(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    def end(self, status: Status, reason: str = "") -> None:
        with self._changed:
            self._over = Answer("over", None, status, reason)
            self._changed.notify_all()


class Finiteness:
    """Looks at records in their order. With fp16 single losses that are not finite belong to skipped steps."""

    def __init__(self, dtype: str) -> None:
        self._most = _FP16_BAD_LOSSES if dtype == "fp16" else 1
        self._in_row = 0

    def check(self, record: Record) -> None:
        """Raises TrialFailed for an evaluation that is not finite, and for losses that stay so."""
        metrics = record["metrics"]
        bad = [name for name, value in metrics.items() if name.startswith("eval/") and not math.isfinite(value)]
        self._in_row = 0 if math.isfinite(metrics.get("train/loss", 0.0)) else self._in_row + 1
        if self._in_row >= self._most:
            bad.append("train/loss")
        if bad:
            raise TrialFailed("diverged", f"step {record['step']}: {', '.join(bad)} is not finite")


class Trial:
    """A configuration, its plan, and how far it is."""

    def __init__(
        self, id: str, params: dict[str, Any], plan: Plan, clock: RungClock, decide: Literal["never", "rung", "phase"]
    ) -> None:
        self.id, self.params, self.plan, self._clock, self._decide = id, params, plan, clock, decide
        self.status: Status = "pending"
        self.reason = ""
        self.sessions = 0
        """Of Ray Tune's, that are at it: a clone in a population may be what another one is."""
        self.is_concluded = False
        """Whether Ray Tune has ended the trial."""
        self.computed: list[str] = []
        self.step = 0
        self.phase = plan.phases[0].name
        self.metrics: dict[str, float] = {}
        self.rung = 0
        self.began_s = time.time()
        self.seconds = 0.0
        self._is_running = False
        self._given_s = 0.0
        self.time_to_first_step_s: float | None = None
        """Since a worker group began with it."""

    @property
    def is_over(self) -> bool:
        return self.status in ("stopped", "finished", "failed", "diverged")

    def begin(self) -> None:
        self.began_s, self._is_running = time.time(), True

    def pause(self) -> None:
        self.seconds, self._is_running = self.elapsed_s, False

    def end(self, status: Literal["finished", "stopped", "failed", "diverged"], reason: str) -> None:
        self.pause()
        self.status, self.reason = status, reason

    def note_worker(self) -> None:
        """A worker group begins with it."""
        self._given_s = time.time()

    def note_first_step(self, at_s: float) -> None:
        """A step was taken, at this Unix time; the first one counts."""
        if self.time_to_first_step_s is None:
            self.time_to_first_step_s = at_s - self._given_s

    @property
    def elapsed_s(self) -> float:
        """In which it was waiting or running."""
        return self.seconds + (time.time() - self.began_s if self._is_running else 0.0)

    def recall(self, known: LedgerTrial) -> None:
        """A trial that ended in an earlier attempt at the sweep."""
        self.status, self.reason = known.end, known.reason  # type: ignore[assignment]
        self.seconds, self.time_to_first_step_s = known.seconds, known.time_to_first_step_s
        if known.results:
            last = known.results[-1]
            self.step, self.phase, self.rung = last["step"], last["phase_name"], last["rung"]
            self.metrics = {name: value for name, value in last.items() if name not in _PLACE}

    def decisive_steps(self) -> frozenset[int]:
        """Steps of the job at which Ray Tune decides whether the trial goes on: at each rung the first evaluation, or
        the end of each phase."""
        if self._decide == "phase":
            return frozenset(phase.last_step for phase in self.plan.phases[:-1])
        steps: set[int] = set()
        for phase in self.plan.phases if self._decide == "rung" else ():
            passed = self._clock.rung(phase.name, 0.0)
            for step in _evaluations(phase, self.plan.job.budget.evaluate_every):
                rung = self._clock.rung(phase.name, _share(phase, step))
                if rung > passed and step < self.plan.steps:
                    steps.add(step)
                passed = rung
        return frozenset(steps)

    def results_of(
        self, phase: PhasePlan, records: Iterable[Record], after_step: int, finiteness: Finiteness
    ) -> Iterator[Result]:
        """The results in these records after a step, each when it is asked for: the trial is as far as its last one.
        Raises TrialFailed where the trial has diverged."""
        for record in records:
            finiteness.check(record)
            if record["step"] > after_step:
                self.step, self.phase = max(self.step, record["step"]), phase.name
                if any(name.startswith("eval/") for name in record["metrics"]):
                    yield self._result(phase, record)

    def _result(self, phase: PhasePlan, record: Record) -> Result:
        share = _share(phase, record["step"])
        rung = self._clock.rung(phase.name, share)
        self.rung = max(self.rung, rung)
        self.metrics = without_classes(record["metrics"])
        model = self.plan.model
        shapes = {weight.name: weight.shape for weight in model.prunable}
        self.metrics["parameters_left"] = parameters_left(model.num_parameters, shapes, self.metrics)
        return {
            **self.metrics,
            "step": record["step"],
            "phase_name": phase.name,
            "phase_share": share,
            "phases_done": self.plan.phases.index(phase) + (share == 1.0),
            "place": self.plan.phases.index(phase) + share,
            "rung": rung,
            "rung_time": self._clock.time(rung),
            "done": record["step"] == self.plan.steps,
        }


def _evaluations(phase: PhasePlan, every: int) -> list[int]:
    """Steps of the phase, counted over the job, at which it is evaluated."""
    inner = [step for step in range(phase.first_step + 1, phase.last_step) if every > 0 and step % every == 0]
    return [*inner, phase.last_step]


def _share(phase: PhasePlan, step: int) -> float:
    return (step - phase.first_step) / phase.steps
