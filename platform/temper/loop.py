"""The one training loop: step, watch, report, evaluate, save.

Everything that decides a result is a function of the step: the batch, the learning rate, the seed of dropout. The
state to resume is therefore small, and a run that was broken anywhere goes on to the same weights.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from temper.data.batches import Batch, DataState
from temper.engine.base import Engine, StepResult, Technique
from temper.errors import RunError
from temper.plan.peaks import Speed
from temper.precision.watch import Observation, Watch, WatchedStep, unwatched

Record = dict[str, Any]
"""`{"step": int, "time_ms": int, "metrics": {name: float}}`: what is known of one step. Where something happened in it
that numbers do not say, `"events": [str]`."""

REPORT_INTERVAL_S = 2.0
MOST_BACK_OFFS = 3
"""Times that a run goes back to its last checkpoint without one applied step in between."""


@dataclass(frozen=True)
class TrainState:
    """All that is resumable beside tensors.

    `step` counts global batches over all phases, `applied` those whose updates are in the weights, `undone` those whose
    updates were taken back; `applied_before` and `skipped_before` are what `applied` and `skipped` were where the phase
    began, and `seconds` is the time that its steps took. `back_offs` counts returns to a checkpoint, `back_offs_in_row`
    those since the last applied step.
    """

    step: int = 0
    applied: int = 0
    seconds: float = 0.0
    undone: int = 0
    back_offs: int = 0
    back_offs_in_row: int = 0
    applied_before: int = 0
    skipped_before: int = 0

    @property
    def skipped(self) -> int:
        return self.step - self.applied - self.undone

    def after(self, result: StepResult, seconds: float) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            applied=self.applied + int(result.applied),
            seconds=self.seconds + seconds,
            back_offs_in_row=0 if result.applied else self.back_offs_in_row,
        )

    def in_next_phase(self) -> TrainState:
        """The state with which the phase after this one begins."""
        here = {"applied_before": self.applied, "skipped_before": self.skipped}
        return replace(self, seconds=0.0, back_offs_in_row=0, **here)

    def backed_off_to(self, good: TrainState) -> TrainState:
        """The state with the weights of `good`; the batches since then are not trained on again."""
        return replace(
            self,
            applied=good.applied,
            undone=self.undone + self.applied - good.applied,
            back_offs=self.back_offs + 1,
            back_offs_in_row=self.back_offs_in_row + 1,
        )


Recovery = Callable[[TrainState], TrainState | None]
"""What to do when gradients overflow and the loss scale cannot fall: the state to go on from; None: the run ends."""


def build_recovery(policy: Literal["stop", "hold", "back_off"], restore: Callable[[], TrainState | None]) -> Recovery:
    """The recovery that `precision.at_min_scale` names.

    `stop` ends the run. `hold` goes on: the step was skipped. `back_off` calls `restore`, which loads the newest
    checkpoint, loss scale included, and returns its state or None where there is no checkpoint; the run ends where
    there is none, and at the fourth time in a row without an applied step in between.
    """

    def stop(state: TrainState) -> TrainState | None:
        return None

    def hold(state: TrainState) -> TrainState | None:
        return state

    def back_off(state: TrainState) -> TrainState | None:
        good = restore() if state.back_offs_in_row < MOST_BACK_OFFS else None
        return None if good is None else state.backed_off_to(good)

    return {"stop": stop, "hold": hold, "back_off": back_off}[policy]


@dataclass(frozen=True)
class Calendar:
    """At which steps something is due; `every: 0` means at the end only. After `decisive` steps somebody else decides
    whether the training goes on."""

    last_step: int
    evaluate_every: int
    checkpoint_every: int
    decisive: frozenset[int] = frozenset()

    def reports(self, step: int) -> bool:
        return self.saves(step) or step in self.decisive

    def evaluates(self, step: int) -> bool:
        return step == self.last_step or (self.evaluate_every > 0 and step % self.evaluate_every == 0)

    def saves(self, step: int) -> bool:
        return step == self.last_step or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)


class Interrupted(Exception):
    """Somebody asked for the run to stop; its state is saved."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's random numbers in one step, so that none has to be stored."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class _Entry:
    """One step that waits for its report; `losses` are on the device, in the order of `names`."""

    step: int
    values: dict[str, float]
    names: list[str]
    losses: Tensor
    grad_norm: float | Tensor | None


class Reporter:
    """Collects a record for each step and hands them on every two seconds or so.

    Losses stay on the device until then and are averaged over the ranks in one collective. All ranks must report
    together; when the next report is due is decided by rank 0 and travels in that same collective, as does a request
    to stop. It depends on the clock, but no record's content does, nor any weight. `speed` tells the metrics of time,
    `constants` are in every record.
    """

    def __init__(
        self,
        report: Callable[[list[Record]], None],
        stop_requested: Callable[[], bool],
        *,
        first_step: int,
        rank: int,
        world_size: int,
        speed: Speed,
        record_every: int,
        device: torch.device,
        constants: Mapping[str, float] | None = None,
    ) -> None:
        self._report, self._stop_requested = report, stop_requested
        self._rank, self._world_size, self._device = rank, world_size, device
        self._speed, self._record_every = speed, record_every
        self._constants = dict(constants or {})
        self._pending: list[_Entry] = []
        self._extra: dict[int, dict[str, float]] = {}
        self._events: dict[int, list[str]] = {}
        self._segment: list[Record] = []
        self._flushed_step = self._next_report = first_step
        self._flushed_at = time.perf_counter()
        self.stop = False

    def add(self, state: TrainState, result: StepResult, lr: float, values: Mapping[str, float] | None = None) -> None:
        """Notes one step; nothing is computed that the device would have to be waited for."""
        values = {"train/lr": lr, **self._constants, **(values or {})}
        if result.loss_scale is not None:
            values |= {"precision/loss_scale": result.loss_scale, "precision/skipped_steps": float(state.skipped)}
        if state.back_offs:
            values["precision/back_offs"] = float(state.back_offs)
        terms = list(result.terms) if len(result.terms) > 1 else []
        losses = torch.stack([result.loss, *(result.terms[term] for term in terms)])
        names = ["train/loss", *(f"train/loss/{term}" for term in terms)]
        self._pending.append(_Entry(state.step, values, names, losses, result.grad_norm))

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds results of an evaluation to the record of `step`."""
        self._extra.setdefault(step, {}).update(metrics)

    def add_observation(self, step: int, seen: Observation) -> None:
        """Adds what was seen of `step` beside its results; a step with events is always recorded."""
        if seen.metrics:
            self.add_metrics(step, seen.metrics)
        if seen.events:
            self._events[step] = list(seen.events)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in this block is not training: it does not count in the time of a step."""
        began = time.perf_counter()
        yield
        self._flushed_at += time.perf_counter() - began

    def due(self, step: int) -> bool:
        return step >= self._next_report

    def flush(self, step: int) -> None:
        """Averages what is pending, reports it, and agrees on what comes next. Collective."""
        losses, step_s = self._agree(step)
        records = [
            self._record(entry, loss, step_s)
            for entry, loss in zip(self._pending, losses, strict=True)
            if self._is_recorded(entry.step)
        ]
        self._pending.clear()
        self._extra.clear()
        self._events.clear()
        self._segment += records
        self._report(records if self._rank == 0 else [])
        self._flushed_step, self._flushed_at = step, time.perf_counter()

    def await_decision(self) -> None:
        """Agrees on whether what was reported last was answered by a request to stop. Collective."""
        answer = torch.tensor(float(self._rank == 0 and self._stop_requested()), device=self._device)
        if self._world_size > 1:
            dist.all_reduce(answer)
        self.stop = self.stop or bool(answer > 0)

    def _is_recorded(self, step: int) -> bool:
        return step % self._record_every == 0 or step == 1 or step in self._extra or step in self._events

    def take_segment(self) -> list[Record]:
        """The records since this was last called; they are stored with the checkpoint that covers them."""
        segment, self._segment = self._segment, []
        return segment

    def _agree(self, step: int) -> tuple[list[Tensor], float]:
        """Losses averaged over ranks, and rank 0's seconds per step; sets the next report and the request to stop."""
        step_s = (time.perf_counter() - self._flushed_at) / max(1, step - self._flushed_step)
        mine = [step_s, float(self._stop_requested())] if self._rank == 0 else [0.0, 0.0]
        decision = torch.tensor(mine, dtype=torch.float64, device=self._device)
        vector = torch.cat([decision, *(entry.losses.double() for entry in self._pending)])
        if self._world_size > 1:
            dist.all_reduce(vector)
        values = vector.cpu()
        step_s, self.stop = float(values[0]), bool(values[1] > 0)
        self._next_report = step + max(1, round(REPORT_INTERVAL_S / max(step_s, 1e-6)))
        sizes = [len(entry.losses) for entry in self._pending]
        return (list((values[2:] / self._world_size).split(sizes)) if sizes else []), step_s

    def _record(self, entry: _Entry, losses: Tensor, step_s: float) -> Record:
        metrics = dict(zip(entry.names, losses.tolist(), strict=True)) | entry.values
        if entry.grad_norm is not None:
            metrics["train/grad_norm"] = float(entry.grad_norm)
        metrics |= self._speed.metrics(step_s)
        metrics |= self._extra.get(entry.step, {})
        record: Record = {"step": entry.step, "time_ms": int(time.time() * 1000), "metrics": metrics}
        return record | {"events": self._events[entry.step]} if entry.step in self._events else record


def train(
    engine: Engine,
    batches: Iterable[tuple[Batch, DataState]],
    state: TrainState,
    *,
    calendar: Calendar,
    lr_at: Callable[[int], float],
    seed: int,
    rank: int,
    reporter: Reporter,
    evaluate: Callable[[int], Mapping[str, float]],
    save: Callable[[TrainState], None],
    watch: Watch = unwatched,
    recover: Recovery = lambda state: None,
    technique: Technique | None = None,
) -> TrainState:
    """Trains from `state` to the calendar's last step.

    `lr_at` takes the number of the phase's *applied* steps: one skipped on fp16 overflow does not advance the schedule.
    `watch` looks at every step when it is over; `recover` decides where the loss scale is at its end.

    Raises:
        Interrupted: a stop was asked for; `save` was called with the state reached.
        RunError: gradients overflow at the smallest loss scale, and `recover` gave up; `save` was called.
    """
    started = time.perf_counter()
    for batch, _ in batches:
        lr, own_seed = lr_at(state.applied - state.applied_before), step_seed(seed, state.step, rank)
        targets = batch.targets if technique is None else technique.prepare(batch, state.applied)
        result = engine.step(batch.inputs, targets, lr=lr, seed=own_seed)
        state = state.after(result, time.perf_counter() - started)
        with reporter.paused():
            seen = watch(WatchedStep(state.step, batch.inputs, targets, own_seed, result.applied, result.loss_scale))
            recovered = recover(state) if result.at_min_scale else state
        state = recovered or state
        reporter.add(state, result, lr, technique.values() if technique is not None else {})
        reporter.add_observation(state.step, seen)
        if calendar.evaluates(state.step):
            with reporter.paused():
                reporter.add_metrics(state.step, evaluate(state.step))
        if calendar.reports(state.step) or reporter.due(state.step) or not recovered:
            reporter.flush(state.step)
        if state.step in calendar.decisive:
            reporter.await_decision()
        if calendar.saves(state.step) or reporter.stop or not recovered:
            with reporter.paused():
                save(state)
        if not recovered:
            raise RunError(_exhausted(state, result, seen))
        if reporter.stop and state.step < calendar.last_step:
            raise Interrupted
        started = time.perf_counter()
    return state


def _exhausted(state: TrainState, result: StepResult, seen: Observation) -> str:
    where = "; ".join(seen.events) or f"loss scale {result.loss_scale:g}"
    tried = f" after {state.back_offs_in_row} returns to the last checkpoint" if state.back_offs_in_row else ""
    return (
        f"step {state.step}: gradients overflow at the smallest loss scale{tried} ({where}). The state is saved, and "
        "the same command goes on with the next batch; try a lower optimizer.lr, optimizer.clip_norm, "
        "precision.dtype: bf16, or precision.at_min_scale: hold or back_off"
    )
