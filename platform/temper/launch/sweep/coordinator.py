"""The actor that runs a sweep's trials: it plans them, has their phases computed, and hands out their results.

Ray Tune's trials ask it for results, the ranks of the worker groups for tasks, the driver for a view of it all. It
holds the claims on phases, so that they end with it, and is the only writer of the ledger and of MLflow.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.config.space import Params, SpaceConfig
from temper.config.space_load import shown_params, trial_overrides
from temper.errors import JobError, RunError
from temper.files import read_json, write_json
from temper.launch.forks import fork_params
from temper.launch.phase_store import is_complete, keep_phase
from temper.launch.rungs import RungClock
from temper.launch.sweep.ledger import LEDGER, Ledger, LedgerTrial, find_trial, params_key
from temper.launch.sweep.phase_runs import PhaseRunner, Watcher, truncated
from temper.launch.sweep.pool import Cancelled, Pool, Records, ray_train
from temper.launch.sweep.tasks import Assignment, Outcome
from temper.launch.sweep.tracking import SweepTracking
from temper.launch.sweep.trial import Answer, Mailbox, Trial, TrialFailed, TrialStopped
from temper.launch.teacher_runs import is_trained, teachers_of
from temper.launch.teachers import plan_job
from temper.launch.train import prepare_folders
from temper.plan.build import Plan
from temper.plan.mesh import ClusterShape
from temper.plan.phases import PhasePlan
from temper.plan.room import GroupShape
from temper.run_folder import PHASE_MANIFEST, RUN, WorkerSpec
from temper.storage import storage_folder
from temper.tracking.history import Histories, phase_histories, read_history
from temper.tracking.mlflow_store import RunStatus, open_sweep
from temper.tracking.sweep_progress import SweepView, TrialView

SWEEP_RUN = "sweep.json"
"""In the sweep's folder: its parent run in MLflow, and where that is."""

_MLFLOW_STATUS: dict[str, RunStatus] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "diverged": "FAILED",
}


@dataclass(frozen=True)
class SweepSpec:
    """All that the coordinator is told. `overrides` are those of the command line, for every trial; `place` is the
    sweep's folder in the storage; `ids` are those of the trials that are known beforehand, by their params' key.
    `shared` is the number of phases that all trials have in common. `concurrency` counts worker groups."""

    space: SpaceConfig
    job_file: Path
    overrides: tuple[str, ...]
    storage: str
    place: str
    uri: str
    cluster: ClusterShape
    import_folders: tuple[str, ...]
    command: str
    ids: dict[str, str]
    clock: RungClock
    concurrency: int
    embedded: bool
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return storage_folder(self.storage) / self.place

    @property
    def decide(self) -> Literal["never", "rung", "phase"]:
        """Where Ray Tune's scheduler decides on a trial."""
        kind = self.space.scheduler.kind
        return "rung" if kind in ("asha", "hyperband") else "phase" if kind == "pbt" else "never"

    def trial_job(self, params: Params, trial: str) -> JobConfig:
        """The ordinary job that a trial is. Raises JobError."""
        overrides = [*trial_overrides(self.space, params), *self.overrides]
        job = load_job(self.job_file, overrides)
        storage = self.storage if self.space.reuse else str(self.folder / "alone" / trial)
        tracking = job.tracking.model_copy(update={"uri": self.uri})
        return job.model_copy(update={"storage": storage, "tracking": tracking})

    def plan_trial(self, params: Params, trial: str) -> Plan:
        plan = plan_job(self.trial_job(params, trial), self.cluster, self.job_file.parent)
        return replace(plan, place=f"{self.place}/trials/{trial}" if self.space.reuse else "run")


class Coordinator:
    """See the module. Methods are called from many threads, and those that wait come back after some seconds."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        self._pool = Pool(ray_train(spec.folder / "ray", embedded=spec.embedded), self._has_room)
        self._runner = PhaseRunner(self._pool, self._watch_teacher, self._say)
        self._ledger = Ledger(spec.folder / LEDGER)
        self._tracking = SweepTracking(spec.uri, self._open_parent, spec.command)
        self._kept = ExitStack()
        self._lock = threading.RLock()
        self._trials: dict[str, Trial] = {}
        self._sessions: dict[str, tuple[str, Mailbox]] = {}
        self._said: list[str] = []
        self._interrupted = False
        self._broken = ""
        self._sources: dict[str, str] = {}
        self._began_s = time.time()
        self._steps_run = 0
        self._computed: dict[str, int] = {}
        """Steps of the phases that this sweep has computed, by fingerprint."""

    # ------------------------------------------------------------------------------------------- called by the ranks

    def next_task(self, group: int, token: str, rank: int, after: int) -> Assignment | Literal["wait"] | None:
        known = self._pool.group(group)
        return None if known is None else known.next_task(token, rank, after)

    def give_up(self, group: int, reason: str) -> None:
        known = self._pool.group(group)
        if known is not None:
            known.give_up(reason)

    def report(self, group: int, token: str, rank_number: int, phase: str, records: Records) -> bool:
        known = self._pool.group(group)
        return True if known is None else known.report(token, rank_number, phase, records)

    def done(self, group: int, token: str, rank: int, number: int, outcome: Outcome) -> None:
        known = self._pool.group(group)
        if known is not None:
            known.done(token, rank, number, outcome)

    # ------------------------------------------------------------------------------------------ called by the driver

    def prepare(self, first: Params, shape: GroupShape, shared: int, teaching: bool) -> None:
        """Starts the worker groups, and has computed what all trials share: teachers and cache, `shared` phases.

        Raises RunError where that fails.
        """
        plan = replace(self._spec.plan_trial(first, "shared"), place=f"{self._spec.place}/shared")
        shared = shared if self._spec.space.reuse else 0
        teaching = teaching and self._spec.space.reuse
        if not teaching or all(is_trained(teacher) for teacher in teachers_of(plan)):
            self._pool.begin(shape, self._spec.concurrency)
        try:
            if teaching:
                with self._watch_shared(plan) as watcher:
                    self._runner.teach(plan, self._spec.import_folders, watcher)
                self._pool.begin(shape, self._spec.concurrency)
            if shared:
                plan = truncated(plan, plan.phases[shared - 1])
                with self._watch_shared(plan) as watcher:
                    self._runner.complete(plan, self._spec.import_folders, watcher)
                for phase in plan.phases:
                    # Between two trials nobody else would.
                    keep_phase(plan.phase_folder(phase), self._kept)
        except Cancelled:
            return

    def _watch_shared(self, plan: Plan) -> AbstractContextManager[Watcher]:
        return self._watch_run(plan, "shared", {"temper.kind": "shared"}, lambda: self._interrupted, is_counted=True)

    def view(self) -> tuple[SweepView, list[str]]:
        """What there is to be shown, and what was said since the last call."""
        with self._lock:
            said, self._said = self._said, []
            trials = [self._view_of(trial) for trial in self._trials.values()]
            reused = [phase for trial in self._trials.values() for phase in self._reused(trial)]
            view = SweepView(
                name=self._spec.space.name,
                objectives=tuple((each.metric, each.mode) for each in self._spec.space.objectives),
                trials=tuple(sorted(trials, key=lambda trial: trial.id)),
                num_trials=len(self._spec.ids) or self._spec.space.budget.trials,
                phases_run=len(self._computed),
                phases_reused=len(reused),
                steps_run=self._steps_run,
                steps_saved=sum(phase.steps for phase in reused),
                elapsed_s=time.time() - self._began_s,
                groups=self._pool.num_groups,
            )
        return view, said

    def interrupt(self) -> None:
        """Has every trial save its state and end."""
        self._interrupted = True
        with self._lock:
            for _, mailbox in self._sessions.values():
                mailbox.let_go()

    def recall(self, known: LedgerTrial) -> None:
        """Takes note of a trial that ended in an earlier attempt at the sweep."""
        trial, _ = self._find(known.params)
        trial.recall(known)

    def finish(self) -> dict[str, Any]:
        """Once Ray Tune has ended: lets the workers go and completes the tree in MLflow. Returns what became of the
        trials, by id, and which runs MLflow lacks."""
        if not self._interrupted:
            for trial in self._trials.values():
                # What a scheduler paused and never went on with.
                if not trial.is_over and not trial.at_work.locked():
                    self._end(trial, "stopped", "")
        stuck = self._pool.close()
        missing = self._tracking.close()
        return {
            "trials": [self._result_of(trial) for trial in sorted(self._trials.values(), key=lambda trial: trial.id)],
            "parent_run_id": self._tracking.parent_id
            or (read_json(self._spec.folder / SWEEP_RUN) or {}).get("run_id", ""),
            "phases_run": len(self._computed),
            "phases_reused": sum(len(self._reused(trial)) for trial in self._trials.values()),
            "steps_run": self._steps_run,
            "undelivered": missing,
            "broken": self._broken,
            "view": self.view()[0],
            "stuck_groups": stuck,
        }

    # -------------------------------------------------------------------------------------- called by Ray Tune's trials

    def fork(self, source: Params, wanted: Params, phases_done: int) -> Params:
        """The params with which a trial goes on from the first phases of another: see :func:`fork_params`."""

        def phases_of(params: Params) -> list[str]:
            return [phase.fingerprint for phase in self._spec.plan_trial(params, "fork").phases]

        return fork_params(self._spec.space, source, wanted, phases_of, phases_done)

    def begin(self, session: str, params: Params) -> str:
        """Ray Tune's trial `session` is now the one with these params; returns its id. What another session left of it
        is gone on with."""
        with self._lock:
            trial, known = self._find(params)
            self.pause(session)
            mailbox = Mailbox()
            self._sessions[session] = (trial.id, mailbox)
            if known is not None and known.end:
                self._replay(trial, known, mailbox)
                return trial.id
            if self._interrupted:
                mailbox.let_go()
            thread = threading.Thread(target=self._work, args=(trial, mailbox), name=trial.id, daemon=True)
            thread.start()
            return trial.id

    def next_result(self, session: str, number: int) -> Answer:
        """The session's result `number`; see :meth:`Mailbox.pull`."""
        _, mailbox = self._sessions[session]
        return mailbox.pull(number)

    def pause(self, session: str) -> None:
        """Nobody asks for the session's results any more: its trial has ended, or is paused."""
        with self._lock:
            _, mailbox = self._sessions.get(session, ("", None))
            if mailbox is not None:
                mailbox.let_go()

    def conclude(self, session: str) -> None:
        """Ray Tune's trial has ended: by itself, or because the scheduler stopped it for good."""
        with self._lock:
            id, mailbox = self._sessions.pop(session, ("", None))
            if mailbox is None:
                return
            mailbox.let_go()
            trial = self._trials[id]
            trial.is_concluded = True
            if not trial.is_over and not trial.at_work.locked() and not self._interrupted:
                self._end(trial, "stopped", "")

    # --------------------------------------------------------------------------------------------------------- trials

    def _find(self, params: Params) -> tuple[Trial, LedgerTrial | None]:
        known = find_trial(self._ledger.trials.values(), params)
        id = known.id if known is not None else self._spec.ids.get(params_key(params)) or self._new_id()
        if id not in self._trials:
            plan = self._spec.plan_trial(params, id)
            self._check_sources(plan)
            trial = self._trials[id] = Trial(id, params, plan, self._spec.clock, self._spec.decide)
            trial.computed = list(known.computed) if known is not None else []
            self._computed |= {
                phase.fingerprint: phase.steps for phase in plan.phases if phase.fingerprint in trial.computed
            }
            if known is None:
                self._ledger.add(id, params=params)
        return self._trials[id], known

    def _check_sources(self, plan: Plan) -> None:
        """The workers have imported the code behind `kind: python` targets, and would not see that it has changed."""
        for target, digest in plan.phases[0].ingredients["sources"].items():
            if self._sources.setdefault(target, digest) != digest and not self._broken:
                self._broken = (
                    f"the code of {target} changed during the sweep; the same command goes on with the new one"
                )
                self.interrupt()

    def _new_id(self) -> str:
        taken = {*self._ledger.trials, *self._spec.ids.values()}
        return next(f"t{number:03d}" for number in itertools.count() if f"t{number:03d}" not in taken)

    def _replay(self, trial: Trial, known: LedgerTrial, mailbox: Mailbox) -> None:
        """A trial that ended before: its results are told again, and nothing is computed."""
        self.recall(known)
        for result in known.results:
            mailbox.put(result, decisive=False)
        mailbox.end(trial.status, trial.reason)
        self._open_run(trial)
        self._tracking.end(trial.plan, _MLFLOW_STATUS[trial.status], {"temper.trial.status": trial.status})

    def _open_run(self, trial: Trial) -> None:
        # Also of a trial that computes nothing itself.
        prepare_folders(WorkerSpec(trial.plan, (), self._spec.import_folders))
        self._tracking.begin(trial.plan, self._run_name(trial), self._tags(trial))

    def _work(self, trial: Trial, mailbox: Mailbox) -> None:
        # A session of this trial that was paused may not be over yet.
        with trial.at_work:
            self._train(trial, mailbox)

    def _train(self, trial: Trial, mailbox: Mailbox) -> None:
        watcher = _TrialWatcher(self, trial, mailbox)
        trial.begin()
        self._open_run(trial)
        try:
            self._runner.complete(trial.plan, self._spec.import_folders, watcher)
            watcher.know()
            self._end(trial, "finished", "")
            if watcher.last is not None:
                watcher.put(watcher.last)
            mailbox.end("finished")
        except (TrialStopped, Cancelled):
            self._leave(trial, watcher)
        except TrialFailed as error:
            self._fail(trial, mailbox, error.status, str(error))
        except JobError as error:
            self._fail(trial, mailbox, "failed", "; ".join(map(str, error.problems)))
        except Exception as error:
            reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            self._fail(trial, mailbox, "failed", reason)
        finally:
            trial.pause()

    def _leave(self, trial: Trial, watcher: _TrialWatcher) -> None:
        if watcher.failure is not None:
            self._fail(trial, watcher.mailbox, "diverged", str(watcher.failure))
            return
        with self._lock:
            trial.status = "waiting"
            if trial.is_concluded and not self._interrupted:
                self._end(trial, "stopped", "")
        # Of a trial that is paused nobody asks; where the sweep is interrupted somebody does.
        watcher.mailbox.end("stopped")

    def _fail(self, trial: Trial, mailbox: Mailbox, status: Literal["failed", "diverged"], reason: str) -> None:
        self._end(trial, status, reason)
        mailbox.end(status, reason)

    def _end(self, trial: Trial, status: Literal["finished", "stopped", "failed", "diverged"], reason: str) -> None:
        trial.status, trial.reason = status, reason
        trial.pause()
        first = trial.time_to_first_step_s
        self._ledger.add(trial.id, end=status, reason=reason, seconds=trial.seconds, time_to_first_step_s=first)
        tags = {"temper.trial.status": status, **({"temper.trial.reason": reason[:5000]} if reason else {})}
        self._tracking.end(trial.plan, _MLFLOW_STATUS[status], tags)

    def note_computed(self, phase: PhasePlan, trial: Trial | None) -> None:
        with self._lock:
            self._computed[phase.fingerprint] = phase.steps
            if trial is not None and phase.fingerprint not in trial.computed:
                trial.computed.append(phase.fingerprint)
                self._ledger.add(trial.id, computed=phase.fingerprint)

    def note_steps(self, steps: int) -> None:
        with self._lock:
            self._steps_run += steps

    def note_result(self, trial: Trial, result: dict[str, Any]) -> None:
        known = self._ledger.trials[trial.id]
        if not any(each["step"] == result["step"] for each in known.results):
            self._ledger.add(trial.id, result=result)

    # -------------------------------------------------------------------------------------------- what trials need

    @contextmanager
    def _watch_run(
        self, plan: Plan, name: str, tags: dict[str, str], cancelled: Callable[[], bool], *, is_counted: bool = False
    ) -> Iterator[Watcher]:
        """A run beside the trials: tracked from when it begins to compute. `is_counted`: its phases are the trials'."""
        note = self if is_counted else None
        watcher = _RunWatcher(note, plan, lambda: self._tracking.begin(plan, name, tags), cancelled)
        status: RunStatus = "FAILED"
        try:
            yield watcher
            status = "FINISHED"
        except Cancelled:
            status = "KILLED"
            raise
        finally:
            if watcher.has_begun:
                self._tracking.end(plan, status, {})

    def _watch_teacher(self, plan: Plan, student: Watcher) -> AbstractContextManager[Watcher]:
        return self._watch_run(plan, f"teacher {plan.job.name}", {"temper.kind": "teacher"}, student.is_cancelled)

    def _has_room(self, shapes: list[GroupShape]) -> bool:
        cluster = self._spec.cluster
        cpus = sum(shape.ranks * shape.cpus_per_rank for shape in shapes)
        gpus = sum(shape.ranks * shape.gpus_per_rank for shape in shapes)
        most = max(self._spec.concurrency, 1)
        return len(shapes) <= most and cpus <= cluster.cpus + 1e-6 and gpus <= cluster.gpus + 1e-6

    def _open_parent(self) -> str:
        spec, file = self._spec, self._spec.folder / SWEEP_RUN
        known = read_json(file) or {}
        run_id = known.get("run_id") if known.get("uri") == spec.uri else None
        job = next(iter(self._trials.values())).plan.job if self._trials else load_job(spec.job_file, spec.overrides)
        job = job.model_copy(update={"storage": spec.storage})
        tags = {"temper.kind": "sweep", "temper.command": spec.command}
        run_id = open_sweep(spec.uri, job, run_id=run_id, name=spec.space.name, tags=tags, texts=spec.texts)
        write_json(file, {"uri": spec.uri, "run_id": run_id})
        return run_id

    def _run_name(self, trial: Trial) -> str:
        return " ".join([trial.id, *(f"{name}={value}" for name, value in shown_params(trial.params).items())])[:250]

    def _tags(self, trial: Trial) -> dict[str, str]:
        shown = {f"temper.param.{name}": value[:5000] for name, value in shown_params(trial.params).items()}
        return {"temper.kind": "trial", "temper.trial": trial.id, **shown}

    def _say(self, text: str) -> None:
        with self._lock:
            self._said.append(text)

    # ------------------------------------------------------------------------------------------------------ results

    def _reused(self, trial: Trial) -> list[PhasePlan]:
        """Complete phases of the trial that it did not compute itself."""
        phases = [phase for phase in trial.plan.phases if phase.last_step <= trial.step]
        return [phase for phase in phases if phase.fingerprint not in trial.computed]

    def _view_of(self, trial: Trial) -> TrialView:
        return TrialView(
            id=trial.id,
            params=shown_params(trial.params),
            status=trial.status,
            phase=trial.phase,
            step=trial.step,
            steps=trial.plan.steps,
            rung=trial.rung,
            rungs=len(self._spec.clock.rungs),
            metrics=dict(trial.metrics),
            phases_run=len(trial.computed),
            phases_reused=len(self._reused(trial)),
            seconds=trial.elapsed_s,
            reason=trial.reason,
        )

    def _result_of(self, trial: Trial) -> dict[str, Any]:
        phases = []
        for phase in trial.plan.phases:
            manifest = read_json(trial.plan.phase_folder(phase) / PHASE_MANIFEST)
            if manifest is None:
                break
            phases.append(
                {
                    "name": phase.name,
                    "fingerprint": phase.fingerprint,
                    "steps": phase.steps,
                    "reused": phase.fingerprint not in trial.computed,
                    "seconds": manifest["seconds"],
                    "metrics": manifest["metrics"],
                }
            )
        return {
            "id": trial.id,
            "run_id": (read_json(trial.plan.run_folder / RUN) or {}).get("run_id", ""),
            "params": trial.params,
            "status": trial.status,
            "reason": trial.reason,
            "metrics": trial.metrics,
            "phases": phases,
            "steps": trial.step,
            "seconds": trial.seconds,
            "time_to_first_step_s": trial.time_to_first_step_s,
        }


class _RunWatcher(Watcher):
    """Writes the histories of a run beside the trials."""

    def __init__(
        self,
        coordinator: Coordinator | None,
        plan: Plan,
        begin: Callable[[], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._coordinator, self._begin, self._cancelled = coordinator, begin, cancelled
        self._histories = Histories(phase_histories(plan))
        self._plan = plan
        self._step = 0
        self.has_begun = False

    def is_cancelled(self) -> bool:
        return bool(self._cancelled())

    def tell(self, state: Literal["waiting", "running"]) -> None:
        if state == "running" and not self.has_begun:
            self.has_begun = True
            self._begin()

    def report(self, phase: str, records: Records) -> bool:
        self.store(phase, records)
        return self.is_cancelled()

    def store(self, phase: str, records: Records) -> Records:
        """The records that are new."""
        new = self._histories.append(phase, records)  # type: ignore[arg-type]
        if new and self._coordinator is not None:
            first = next(each.first_step for each in self._plan.phases if each.name == phase)
            self._coordinator.note_steps(new[-1]["step"] - max(first, self._step))
            self._step = new[-1]["step"]
        return new  # type: ignore[return-value]

    def computed(self, phase: PhasePlan) -> None:
        if self._coordinator is not None:
            self._coordinator.note_computed(phase, None)


class _TrialWatcher(_RunWatcher):
    """Tells a trial's results to Ray Tune as they come about."""

    def __init__(self, coordinator: Coordinator, trial: Trial, mailbox: Mailbox) -> None:
        super().__init__(coordinator, trial.plan, lambda: None, lambda: mailbox.is_stopping)
        self._sweep, self._trial, self.mailbox = coordinator, trial, mailbox
        self.decisive = trial.decisive_steps()
        self.last: dict[str, Any] | None = None
        self.failure: TrialFailed | None = None

    def know(self) -> None:
        """Tells what the histories have of the phases that are complete, and of the one that comes next."""
        for phase, history in zip(self._trial.plan.phases, phase_histories(self._trial.plan), strict=True):
            self._tell_results(phase, read_history(history.path))  # type: ignore[arg-type]
            if not is_complete(self._trial.plan, phase):
                break

    def tell(self, state: Literal["waiting", "running"]) -> None:
        self._trial.status = state

    def report(self, phase: str, records: Records) -> bool:
        try:
            new = self.store(phase, records)
            if new and self._trial.time_to_first_step_s is None:
                self._trial.time_to_first_step_s = new[0]["time_ms"] / 1000 - self._trial.began_s
            self._tell_results(next(each for each in self._trial.plan.phases if each.name == phase), new)
        except TrialFailed as error:
            self.failure = error
        except TrialStopped:
            pass
        return self.failure is not None or self.is_cancelled()

    def computed(self, phase: PhasePlan) -> None:
        self._sweep.note_computed(phase, self._trial)

    def _tell_results(self, phase: PhasePlan, records: Records) -> None:
        for result in self._trial.results_of(phase, records):  # type: ignore[arg-type]
            if result["done"]:
                self.last = result  # told when the phase is complete
            else:
                self.put(result)

    def put(self, result: dict[str, Any]) -> None:
        self._sweep.note_result(self._trial, result)
        self.mailbox.put(result, decisive=result["step"] in self.decisive)
