"""A parameter-server run: starts shards and workers as Ray actors, deals out mini-batches, replaces what dies.

The supervisor is one loop in the driver. Between *gates* the workers run freely; at a gate, a step at which something
is due, all that was handed out is done, so that a checkpoint is of exactly that step. One worker then evaluates the
parameters as they were, while the others go on. Each phase of the job has its own actors.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from temper.errors import RunError
from temper.launch.ledger import Ledger, Pushed, StepRecords
from temper.launch.server_actors import PhaseSpec, ShardActor, WorkerActor, stage_writer
from temper.plan.distill import ramp_values
from temper.plan.peaks import plan_speed
from temper.products import complete_phase
from temper.run_folder import CHECKPOINTS, FAILURES, RUN, STOP, SYSTEM, WorkerSpec
from temper.tracking.history import Record, phase_histories
from temper.tracking.system_metrics import TakeSamples, collected

POLL_S = 0.1
REPORT_INTERVAL_S = 2.0
CLOSE_TIMEOUT_S = 15.0
DEPTH = 2
"""Mini-batches that a worker is asked for at a time: one at work and one that waits, so that it is never idle."""


def build_trainer(spec: WorkerSpec) -> ParameterServerTrainer:
    """The trainer of the spec's phases; its `fit()` returns when they are complete or were asked to stop."""
    return ParameterServerTrainer(spec)


class ParameterServerTrainer:
    """Starts and ends the processes of each phase."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def fit(self) -> None:
        """Trains one phase after the other, the first from its newest checkpoint, until a stop is asked for.

        Raises:
            RunError: a worker's code failed, or no worker is left; failures.jsonl says more.
        """
        plan = self._spec.plan
        is_wanted, is_only_node = plan.job.tracking.system_metrics, plan.cluster.nodes == 1
        try:
            with collected(is_wanted, is_only_node=is_only_node) as take_samples:
                self._train_phases(take_samples)
        finally:
            self._tracking.close(CLOSE_TIMEOUT_S)

    def _train_phases(self, take_samples: TakeSamples) -> None:
        for phase in self._spec.phases:
            own = PhaseSpec(self._spec, phase)
            if phase != self._spec.phases[0]:
                stage_writer(self._spec.run_folder)(f"starting the processes of {phase.name}")
            with closing(Crew(own)) as crew:
                Supervisor(own, crew, self._tracking, take_samples).run()
            if (self._spec.run_folder / STOP).exists():
                break

    @cached_property
    def _tracking(self) -> Any:
        """Built when the first actors are on their way, because it imports Ray Train."""
        from temper.tracking.callback import TrackingCallback, TrackingTarget

        target = TrackingTarget(
            run_record=str(self._spec.run_folder / RUN),
            histories=phase_histories(self._spec.plan),
            failures_path=str(self._spec.run_folder / FAILURES),
            system_path=str(self._spec.run_folder / SYSTEM),
        )
        return TrackingCallback(target)


# --------------------------------------------------------------------------------------------------------- processes


Call = Literal["prepare", "train", "flush", "refresh", "evaluate"]


@dataclass
class WorkerHandle:
    """A worker's process, what it was asked for and has not answered, and the pushes that it has made."""

    actor: Any
    calls: dict[Any, Call] = field(default_factory=dict)
    num_calls: int = 0
    pushes: int = 0

    def ask(self, call: Call, *arguments: Any) -> None:
        """The answer is one of those that :meth:`Crew.next_answer` waits for."""
        self.calls[self.begin(call, *arguments)] = call

    def begin(self, call: Call, *arguments: Any, num_returns: int = 1) -> Any:
        turn, self.num_calls = self.num_calls, self.num_calls + 1
        return getattr(self.actor, call).options(num_returns=num_returns).remote(turn, *arguments)


class Crew:
    """The actors of a phase, started when it is built. Workers are known by numbers, which their successors keep."""

    def __init__(self, spec: PhaseSpec) -> None:
        self._spec = spec
        parallel = spec.plan.job.parallel
        shard = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ShardActor)
        self.shards = [shard.remote(spec, index) for index in range(parallel.shards)]
        self.ready = [actor.ready.remote() for actor in self.shards]
        self.workers: dict[int, WorkerHandle] = {}
        for number in range(parallel.workers):
            self.add(number)

    def add(self, number: int) -> None:
        parallel, on_gpu = self._spec.plan.job.parallel, self._spec.plan.mesh.device == "cuda"
        share = parallel.gpus_per_worker if on_gpu else 0
        worker = ray.remote(num_cpus=parallel.cpus_per_worker, num_gpus=share)(WorkerActor)
        self.workers[number] = WorkerHandle(worker.remote(self._spec, number, self.shards))
        self.workers[number].ask("prepare")

    def remove(self, number: int) -> None:
        ray.kill(self.workers.pop(number).actor)

    def next_answer(self) -> tuple[int, Call, Any] | None:
        """A worker, what it was asked for and the reference to its answer; None where none comes soon.

        Raises RunError where none can come.
        """
        asked = {call: number for number, worker in self.workers.items() for call in worker.calls}
        if not asked:
            raise RunError("every worker was lost")
        answered, _ = ray.wait(list(asked), timeout=POLL_S)
        for answer in answered:
            number = asked[answer]
            return number, self.workers[number].calls.pop(answer), answer
        return None

    def close(self) -> None:
        for actor in (*self.shards, *(worker.actor for worker in self.workers.values())):
            ray.kill(actor)


# -------------------------------------------------------------------------------------------------------- supervision


def plan_gates(first: int, last: int, *, evaluate_every: int, checkpoint_every: int, warm_start: int) -> list[int]:
    """The steps after `first` at which all workers meet; `every: 0` means at the end only."""
    due = {step for every in (evaluate_every, checkpoint_every) if every for step in range(every, last, every)}
    return sorted(step for step in {*due, warm_start, last} if first < step <= last)


@dataclass(frozen=True)
class Gate:
    """A gate that was reached and is not yet behind: its evaluation is under way. `state`: of the checkpoint that the
    shards have saved there and that is completed with the gate's record; None where none is due. `metrics` are those
    of the shards."""

    step: int
    state: dict[str, Any] | None
    metrics: dict[str, float]


class Supervisor:
    """One run of a phase, from its newest checkpoint on. `tracking` is a :class:`TrackingCallback`; `take_samples`
    gives the system metrics of the supervisor's node since it was called last."""

    def __init__(self, spec: PhaseSpec, crew: Crew, tracking: Any, take_samples: TakeSamples) -> None:
        self._spec, self._crew, self._tracking, self._take_samples = spec, crew, tracking, take_samples
        self._job, self._phase, self._last_step = spec.plan.job, spec.phase, spec.phase.last_step
        self._stage = stage_writer(spec.plan.run_folder)
        self._found, *_ = [self._of_shard(answer) for answer in crew.ready]
        parallel, step, server = self._job.parallel, self._found["step"], self._found["server"]
        self._ledger = Ledger(parallel.workers, step, n_push=parallel.n_push, max_staleness=parallel.max_staleness)
        self._records = StepRecords(
            parallel.workers,
            step,
            record_every=self._job.tracking.record_every,
            values_at=self._values_at,
            staleness={int(number): count for number, count in server.get("staleness", {}).items()},
            pushes={int(worker): count for worker, count in server.get("pushes", {}).items()},
            constants={"phase": float(spec.plan.phases.index(spec.phase))},
        )
        self._reached = self._target = step
        self._seconds: float = self._found["seconds"]
        self._gate: Gate | None = None
        self._devices: dict[int, str] = {}
        """Of the workers that are ready."""
        self._num_restarts = 0
        self._segment: list[Record] = []  # since the last checkpoint
        self._reported_at, self._step_s = time.perf_counter(), 0.0
        self._looked_at, self._stop = 0.0, False

    def run(self) -> None:
        """Trains until the phase is complete, or until a stop is asked for and the state is saved."""
        if self._found["refused"]:
            self._stage(f"refused {self._found['refused']}")
        self._stage("taking the first step" if self._reached == 0 else f"training from step {self._reached}")
        self._report(self._found["records"])
        if self._reached == self._last_step:
            # Broken between the last checkpoint and the word that the phase is complete.
            self._finish(self._found["folder"], self._found["records"][-1])
        budget = self._job.budget
        warm_start = 0 if self._phase.first_step else self._job.parallel.warm_start_steps
        gates = plan_gates(
            self._reached,
            self._last_step,
            evaluate_every=budget.evaluate_every,
            checkpoint_every=budget.checkpoint_every,
            warm_start=warm_start,
        )
        for gate in gates:
            before = self._reached
            self._run_to(gate, alone=gate <= warm_start)
            stopped = self._stop_requested()
            if self._reached > before:
                self._pass_gate(stopped)
            if stopped:
                break
        while self._gate is not None:
            self._advance()

    def _run_to(self, gate: int, *, alone: bool) -> None:
        """Until all mini-batches before `gate` are done, and the gate before it is behind; or until a stop is asked
        for, and the step then under way is done."""
        self._target = gate
        self._ledger.open(gate, alone=alone)
        began = self._reported_at = time.perf_counter()
        while not self._ledger.drained or self._gate is not None:
            self._advance()
            if self._target == gate and self._stop_requested():
                self._target = self._ledger.close()
        self._report_steps()
        self._reached = self._target
        self._seconds += time.perf_counter() - began

    def _stop_requested(self) -> bool:
        if time.perf_counter() - self._looked_at > POLL_S:
            self._stop, self._looked_at = (self._spec.plan.run_folder / STOP).exists(), time.perf_counter()
        return self._stop

    def _advance(self) -> None:
        """Deals out what may be begun, and takes one answer, if one comes soon."""
        self._deal()
        answered = self._crew.next_answer()
        if answered is not None:
            self._take_answer(*answered)
        if time.perf_counter() - self._reported_at > REPORT_INTERVAL_S:
            self._report_steps()

    def _deal(self) -> None:
        workers = self._crew.workers
        for number, worker in workers.items():
            while len(worker.calls) < DEPTH and (taken := self._ledger.take(number)) is not None:
                ticket, lead = taken
                self._records.begun(ticket, lead)
                worker.ask("train", ticket)
            if not worker.calls and self._ledger.exhausted and self._ledger.holds(number):
                worker.ask("flush", self._target - 1)
        evaluating = any("evaluate" in worker.calls.values() for worker in workers.values())
        if self._gate is not None and not evaluating and self._ledger.workers:
            # The worker that evaluated was lost: another does it, with the parameters as they are by now.
            number = self._most_trained()
            workers[number].begin("refresh")
            workers[number].ask("evaluate", self._gate.step == self._last_step)

    def _take_answer(self, number: int, call: Call, reference: Any) -> None:
        try:
            answer = ray.get(reference)
        except RayError as error:
            self._replace(number, error)
            return
        if call == "prepare":
            self._devices[number] = answer
            self._ledger.join(number)
        elif call == "evaluate":
            self._ledger.join(number)
            self._leave_gate(answer)
        elif answer is not None:
            self._take_push(number, answer)

    def _take_push(self, number: int, push: Pushed) -> None:
        self._crew.workers[number].pushes += 1
        self._ledger.pushed(number, push.mini_batches)
        self._records.pushed(number, push)

    def _replace(self, number: int, error: RayError) -> None:
        """Puts a new worker in the place of one that is lost.

        Its mini-batches are done again. Where it died between a push and the word of it, those of that push are in the
        parameters twice. Raises RunError where the worker did not die but its code failed.
        """
        self._tracking.after_exception(None, {number: error})
        self._crew.remove(number)
        self._ledger.leave(number)
        self._devices.pop(number, None)
        if self._num_restarts < self._job.parallel.max_restarts:
            self._num_restarts += 1
            self._crew.add(number)
            self._stage(f"worker {number} was lost and is replaced")
        else:
            self._stage(f"worker {number} was lost; {len(self._crew.workers)} go on")

    def _of_shard(self, answer: Any) -> Any:
        """What a shard answers; where it dies, this waits until it is back and has answered."""
        try:
            return ray.get(answer)
        except RayError as error:
            self._tracking.after_exception(None, {0: error})
            raise

    # ---------------------------------------------------------------------------------------------------------- gates

    def _pass_gate(self, stopped: bool) -> None:
        """Saves and begins to evaluate, where that is due at the step reached."""
        evaluates = self._is_due(self._job.budget.evaluate_every)
        saves = stopped or self._is_due(self._job.budget.checkpoint_every)
        if not evaluates and not saves:
            return
        number, stored = self._refresh_one()
        state, metrics = self._save(stored) if saves else None, self._sparsity() if evaluates else {}
        self._gate = Gate(self._reached, state, metrics)
        if evaluates:
            self._ledger.leave(number)
            self._crew.workers[number].ask("evaluate", self._reached == self._last_step)
        else:
            self._leave_gate({})

    def _is_due(self, every: int) -> bool:
        return self._reached == self._last_step or (every > 0 and self._reached % every == 0)

    def _refresh_one(self) -> tuple[int, Any]:
        """A worker whose model has the parameters as they are, and a reference to what else a checkpoint stores."""
        while True:
            while not self._ledger.workers:
                self._advance()
            number = self._most_trained()
            done, stored = self._crew.workers[number].begin("refresh", num_returns=2)
            try:
                ray.get(done)
            except RayError as error:
                self._replace(number, error)
            else:
                return number, stored

    def _most_trained(self) -> int:
        """The worker whose batch-norm statistics are stored and evaluated: they are averages over its mini-batches."""
        return max(self._ledger.workers, key=lambda number: self._crew.workers[number].pushes)

    def _save(self, stored: Any) -> dict[str, Any]:
        """Has all shards write their parts, and returns the state that completes the checkpoint."""
        step, actors = self._reached, self._crew.shards
        answers = [actor.save.remote(step, None if index else stored) for index, actor in enumerate(actors)]
        shards = [self._of_shard(answer) for answer in answers]
        counts = {"staleness": dict(self._records.staleness), "pushes": dict(self._records.pushes)}
        return {
            "step": step,
            "applied": step,
            "seconds": self._seconds,
            "engine": {"optimizer_step": shards[0]["version"], "loss_scaler": {}},
            "server": {"shards": shards, **counts},
        }

    def _sparsity(self) -> dict[str, float]:
        """See :func:`temper.techniques.dsd.sparsity.sparsity_metrics`; nothing in the dense phase."""
        if self._phase.kind == "dense":
            return {}
        shards = self._crew.shards
        counts = [self._of_shard(answer) for answer in [actor.count_zeros.remote() for actor in shards]]
        return dict(self._of_shard(shards[0].sparsity.remote(*counts)))

    def _leave_gate(self, metrics: dict[str, float]) -> None:
        """Completes the gate's checkpoint and record, in this order: the history has no record of a gate that a broken
        run would come to again."""
        gate, self._gate = self._gate, None
        assert gate is not None
        is_last = gate.step == self._last_step
        metrics = metrics | gate.metrics | (self._records.summary() if is_last else {})
        records = self._records.take(gate.step, self._times(), metrics)
        self._segment += records
        if gate.state is not None:
            folder = self._of_shard(self._crew.shards[0].complete.remote(gate.state, self._segment))
            self._segment = []
        self._report(records)
        if is_last:
            self._finish(folder, records[-1])

    def _finish(self, folder: str, last: Record) -> None:
        """Declares the phase complete."""
        if self._phase.kind != "dense":
            self._of_shard(self._crew.shards[0].summarize.remote(folder))
        manifest = {
            "name": self._phase.name,
            "fingerprint": self._phase.fingerprint,
            "checkpoint": f"{CHECKPOINTS}/{folder}",
            "steps": self._phase.steps,
            "skipped_steps": 0,
            "seconds": self._seconds,
            "metrics": last["metrics"],
        }
        complete_phase(self._spec.folder, manifest)

    # -------------------------------------------------------------------------------------------------------- records

    def _report_steps(self) -> None:
        """Reports what is complete. The record of a gate, and what comes after it, waits for what is found there."""
        if self._gate is None and (count := self._records.num_complete(self._target)):
            now = time.perf_counter()
            self._step_s, self._reported_at = (now - self._reported_at) / count, now
            records = self._records.take(self._target - 1, self._times())
            self._segment += records
            self._report(records)

    def _values_at(self, step: int) -> dict[str, float]:
        values, distill = {"train/lr": self._spec.lr_at(step)}, self._job.distill
        return values if distill is None else values | ramp_values(distill, self._spec.plan.phases[0].steps, step)

    def _times(self) -> dict[str, float]:
        return plan_speed(self._spec.plan, list(self._devices.values())).metrics(self._step_s)

    def _report(self, records: list[Record]) -> None:
        if records:
            report = {"phase": self._phase.name, "records": records, "system": self._take_samples()}
            self._tracking.after_report(None, [report], None)
