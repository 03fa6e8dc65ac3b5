"""The one training loop: step, report, evaluate, save.

Everything that decides a result is a function of the step: the batch, the learning rate, the seed of dropout. The
state to resume is therefore small, and a run that was broken anywhere goes on to the same weights.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from temper.data.batches import Batch, DataState
from temper.engine.base import Engine, StepResult

Record = dict[str, Any]
"""`{"step": int, "time_ms": int, "metrics": {name: float}}`: what is known of one step."""

REPORT_INTERVAL_S = 2.0


@dataclass(frozen=True)
class TrainState:
    """All that is resumable beside tensors.

    `step` counts global batches, `applied` those that changed the weights; `seconds` is the time that steps took.
    """

    step: int = 0
    applied: int = 0
    seconds: float = 0.0

    @property
    def skipped(self) -> int:
        return self.step - self.applied

    def after(self, result: StepResult, seconds: float) -> TrainState:
        return TrainState(self.step + 1, self.applied + int(result.applied), self.seconds + seconds)


@dataclass(frozen=True)
class Calendar:
    """At which steps something is due; `every: 0` means at the end only."""

    last_step: int
    evaluate_every: int
    checkpoint_every: int

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
    to stop. It depends on the clock, but no record's content does, nor any weight.
    """

    def __init__(
        self,
        report: Callable[[list[Record]], None],
        stop_requested: Callable[[], bool],
        *,
        first_step: int,
        rank: int,
        world_size: int,
        global_batch: int,
        record_every: int,
        device: torch.device,
    ) -> None:
        self._report, self._stop_requested = report, stop_requested
        self._rank, self._world_size, self._device = rank, world_size, device
        self._global_batch, self._record_every = global_batch, record_every
        self._pending: list[_Entry] = []
        self._extra: dict[int, dict[str, float]] = {}
        self._segment: list[Record] = []
        self._flushed_step = self._next_report = first_step
        self._flushed_at = time.perf_counter()
        self.stop = False

    def add(self, state: TrainState, result: StepResult, lr: float) -> None:
        """Notes one step; nothing is computed that the device would have to be waited for."""
        values = {"train/lr": lr}
        if result.loss_scale is not None:
            values |= {"precision/loss_scale": result.loss_scale, "precision/skipped_steps": float(state.skipped)}
        terms = list(result.terms) if len(result.terms) > 1 else []
        losses = torch.stack([result.loss, *(result.terms[term] for term in terms)])
        names = ["train/loss", *(f"train/loss/{term}" for term in terms)]
        self._pending.append(_Entry(state.step, values, names, losses, result.grad_norm))

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds results of an evaluation to the record of `step`."""
        self._extra.setdefault(step, {}).update(metrics)

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
            if entry.step % self._record_every == 0 or entry.step == 1 or entry.step in self._extra
        ]
        self._pending.clear()
        self._extra.clear()
        self._segment += records
        self._report(records if self._rank == 0 else [])
        self._flushed_step, self._flushed_at = step, time.perf_counter()

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
        metrics["time/step_s"] = step_s
        metrics["time/examples_per_s"] = self._global_batch / max(step_s, 1e-9)
        metrics |= self._extra.get(entry.step, {})
        return {"step": entry.step, "time_ms": int(time.time() * 1000), "metrics": metrics}


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
) -> TrainState:
    """Trains from `state` to the calendar's last step.

    `lr_at` takes the number of *applied* steps: a step skipped on fp16 overflow does not advance the schedule.

    Raises:
        Interrupted: a stop was asked for; `save` was called with the state reached.
    """
    started = time.perf_counter()
    for batch, _ in batches:
        lr = lr_at(state.applied)
        result = engine.step(batch.inputs, batch.targets, lr=lr, seed=step_seed(seed, state.step, rank))
        state = state.after(result, time.perf_counter() - started)
        reporter.add(state, result, lr)
        if calendar.evaluates(state.step):
            with reporter.paused():
                reporter.add_metrics(state.step, evaluate(state.step))
        if calendar.saves(state.step) or reporter.due(state.step):
            reporter.flush(state.step)
        if calendar.saves(state.step) or reporter.stop:
            with reporter.paused():
                save(state)
        if reporter.stop and state.step < calendar.last_step:
            raise Interrupted
        started = time.perf_counter()
    return state
