"""The actor that runs a sweep's trials: it plans them, has their phases computed, and hands out their results.

Ray Tune's trials ask it for results, the ranks of the worker groups for tasks, the driver for a view of it all. It
holds the claims on phases, so that they end with it, and is the only writer of the ledger and of MLflow.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from temper.config.space import Params
from temper.config.space_load import shown_params
from temper.errors import JobError, RunError
from temper.files import read_json
from temper.launch.forks import fork_params
from temper.launch.phase_store import is_complete, keep_phase
from temper.launch.reconcile import MLFLOW_STATUS, reconcile
from temper.launch.sweep.ledger import LEDGER, Ledger, LedgerTrial, Result, find_trial, params_key
from temper.launch.sweep.outcomes import phases_reused, refused_result, refused_view, trial_result, trial_view
from temper.launch.sweep.parent import open_sweep
from temper.launch.sweep.phase_runs import PhaseRunner, Watcher, truncated
from temper.launch.sweep.pool import Cancelled, NoWorkersError, Pool, Records, ray_train
from temper.launch.sweep.spec import SweepSpec
from temper.launch.sweep.tasks import Assignment, Outcome
from temper.launch.sweep.tracking import SweepTracking
from temper.launch.sweep.trial import Answer, Mailbox, Trial, TrialFailed, TrialStopped
from temper.launch.sweep.watchers import RunWatcher, TrialWatcher
from temper.launch.teacher_runs import is_trained, teachers_of
from temper.launch.tracked_run import TrackedRun
from temper.launch.train import prepare_folders
from temper.locks import awaited
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan
from temper.plan.room import GroupShape
from temper.products import run_name
from temper.remote_store import publish
from temper.run_folder import PLAN, SWEEP_RUN, SYSTEM, WorkerSpec
from temper.storage import storage_folder
from temper.tracking.delivery import system_queue
from temper.tracking.description import value_text
from temper.tracking.mlflow_store import RunStatus
from temper.tracking.sweep_progress import SweepView
from temper.tracking.system_metrics import Sample, SystemSpool

_STOP_S = 300.0  # for all trials to save their state


@dataclass(frozen=True)
class Session:
    """One of Ray Tune's trials being at one of ours. A trial that was paused, or became another one, has a new one."""

    token: str
    trial: str
    mailbox: Mailbox


class Coordinator:
    """See the module. Methods are called from many threads, and those that wait come back after some seconds."""

    def __init__(self, spec: SweepSpec) -> None:
        # An actor has a folder of its own, and relative paths in a job are of where the command was typed.
        os.chdir(spec.working_folder)
        self._spec = spec
        fit = ray_train(
            spec.folder / "ray",
            embedded=spec.embedded,
            system_metrics=spec.job({}).tracking.system_metrics,
            is_only_node=spec.cluster.nodes == 1,
        )
        self._pool = Pool(fit, self._has_room)
        self._runner = PhaseRunner(self._pool, self._watch_teacher, self._say)
        self._kept = ExitStack()
        # A coordinator outlives a driver that was killed by a moment.
        self._kept.enter_context(awaited(spec.folder / f"{LEDGER}.lock", lambda: None))
        self._ledger = Ledger(spec.folder / LEDGER)
        self._samples = SystemSpool(spec.folder / SYSTEM)
        self._tracking = SweepTracking(
            partial(open_sweep, spec),
            partial(_reconcile, storage_folder(spec.storage)),
            partial(system_queue(self._samples).delivery, spec.uri),
        )
        self._lock = threading.RLock()
        self._trials: dict[str, Trial] = {}
        self._refused: dict[str, LedgerTrial] = {}
        self._sessions: dict[str, Session] = {}
        self._threads: list[threading.Thread] = []
        self._said: list[str] = []
        self._interrupted = False
        self._broken = ""
        self._began_s = time.time()
        self._steps_run = 0
        self._shared: set[str] = set()
        """Fingerprints of the phases that were computed for all trials."""

    # ------------------------------------------------------------------------------------------- called by the ranks

    def is_wanted(self, group: int) -> bool:
        known = self._pool.group(group)
        return known is not None and not known.is_closing

    def next_task(self, group: int, token: str, rank: int, after: int) -> Assignment | Literal["wait"] | None:
        known = self._pool.group(group)
        return None if known is None else known.next_task(token, rank, after)

    def report(self, group: int, token: str, number: int, phase: str, records: Records) -> bool:
        known = self._pool.group(group)
        return True if known is None else known.report(token, number, phase, records)

    def done(self, group: int, token: str, rank: int, number: int, outcome: Outcome) -> None:
        known = self._pool.group(group)
        if known is not None:
            known.done(token, rank, number, outcome)

    def note_sample(self, sample: Sample) -> None:
        self._samples.add([sample])

    def give_up(self, group: int, reason: str) -> None:
        known = self._pool.group(group)
        if known is not None:
            known.give_up(reason)

    # ------------------------------------------------------------------------------------------ called by the driver

    def prepare(self, first: Params, shape: GroupShape, shared: int, teaching: bool, is_stored: bool) -> None:
        """Starts the worker groups, and has computed what all trials share: teachers and cache, `shared` phases.
        `is_stored`: the phase store has all phases that are known, and nobody waits for workers.

        Raises RunError where that fails.
        """
        plan = self._shared_plan(first)
        reuse = self._spec.space.reuse
        if is_stored and reuse:
            return
        if not (teaching and reuse) or all(is_trained(teacher) for teacher in teachers_of(plan)):
            self._pool.begin(shape, self._spec.concurrency)
        try:
            if teaching and reuse:
                with self._watch_shared(plan) as watcher:
                    self._runner.teach(plan, self._spec.import_folders, watcher)
                self._pool.begin(shape, self._spec.concurrency)
            if shared and reuse:
                plan = truncated(plan, plan.phases[shared - 1])
                with self._watch_shared(plan) as watcher:
                    self._runner.complete(plan, self._spec.import_folders, watcher)
                for phase in _computed_in(plan) if self._ledger.trials else ():
                    self.note_computed(phase, None)
                for phase in plan.phases:
                    # Between two trials nobody else would.
                    keep_phase(plan.phase_folder(phase), self._kept)
        except Cancelled:
            return

    def view(self) -> tuple[SweepView, list[str]]:
        """What there is to be shown, and what was said since the last call."""
        with self._lock:
            said, self._said = self._said, []
            reused = self._phases_reused()
            trials = [trial_view(trial, self._spec.clock) for trial in self._trials.values()]
            trials += [refused_view(trial) for trial in self._refused.values()]
            view = SweepView(
                name=self._spec.space.name,
                objectives=tuple((each.metric, each.mode) for each in self._spec.space.objectives),
                trials=tuple(sorted(trials, key=lambda trial: trial.id)),
                num_trials=len(self._spec.ids) or self._spec.space.budget.trials,
                phases_run=self._phases_run,
                phases_reused=len(reused),
                steps_run=self._steps_run,
                steps_saved=sum(phase.steps for phase in reused),
                elapsed_s=time.time() - self._began_s,
                groups=self._pool.num_groups,
            )
        return view, said

    def interrupt(self) -> None:
        """Has every trial save its state and end; those that have not ended stay as they are."""
        self._interrupted = True
        with self._lock:
            for session in self._sessions.values():
                session.mailbox.let_go()

    def recall(self, known: LedgerTrial) -> None:
        """Takes note of a trial that ended in an earlier attempt at the sweep."""
        try:
            trial, _ = self._find(known.params)
            trial.recall(known)
        except JobError:
            self._refused[known.id] = known

    def deliver_late(self, first: Params, shared: int) -> None:
        """Gives MLflow the runs of ended trials that it could not take."""
        if shared and self._spec.space.reuse:
            plan = self._shared_plan(first)
            self._deliver_late(
                self._child(truncated(plan, plan.phases[shared - 1]), "shared", "shared"), "FINISHED", {}
            )
        for trial in self._trials.values():
            self._deliver_late(self._run_of(trial), MLFLOW_STATUS[trial.status], _end_tags(trial))

    def _deliver_late(self, run: TrackedRun, status: RunStatus, tags: dict[str, str]) -> None:
        if not (read_json(run.record) or {}).get("delivered"):
            self._tracking.begin(run)
            self._tracking.end(run.plan, status, tags)

    def finish(self, *, is_over: bool) -> dict[str, Any]:
        """Lets the workers go and completes the tree in MLflow. `is_over`: Ray Tune has come to the end of its search.

        Returns what became of the trials, in the order of their ids, and which run folders' runs MLflow lacks.
        """
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.mailbox.let_go()
        deadline = time.monotonic() + _STOP_S
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        for trial in self._trials.values():
            if trial.is_over:
                continue
            if is_over and not self._interrupted:
                # What a scheduler paused and never went on with, or what the time was up for.
                self._end(trial, "stopped", "")
            else:
                self._tracking.end(trial.plan, "KILLED", {"temper.trial.status": "interrupted"})
        self._pool.close()
        missing = self._tracking.close()
        self._kept.close()
        trials = [*map(trial_result, self._trials.values()), *map(refused_result, self._refused.values())]
        return {
            "trials": sorted(trials, key=lambda trial: trial["id"]),
            "parent_run_id": (read_json(self._spec.folder / SWEEP_RUN) or {}).get("run_id", ""),
            "phases_run": self._phases_run,
            "phases_reused": len(self._phases_reused()),
            "steps_run": self._steps_run,
            "steps_computed": self._steps_computed(),
            "undelivered": missing,
            "broken": self._broken,
            "view": self.view()[0],
        }

    # -------------------------------------------------------------------------------------- called by Ray Tune's trials

    def fork(self, source: Params, wanted: Params, phases_done: int) -> Params:
        """The params with which a trial goes on from the first phases of another: see :func:`fork_params`."""

        def phases_of(params: Params) -> list[str]:
            return [phase.fingerprint for phase in self._spec.plan(params, "fork").phases]

        return fork_params(self._spec.space, source, wanted, phases_of, phases_done)

    def begin(self, tuner: str, token: str, params: Params, after_step: int, is_fork: bool) -> None:
        """Ray Tune's trial `tuner` is now at the trial with these params, in a session named `token`; it knows the
        results until `after_step`. `is_fork`: it leaves the trial that it was."""
        with self._lock:
            earlier, mailbox = self._sessions.get(tuner), Mailbox()
            trial, known = self._find_or_refuse(params, mailbox)
            if earlier is not None:
                earlier.mailbox.let_go()
                if is_fork and (trial is None or trial.id != earlier.trial):
                    self._conclude(earlier.trial)
            self._sessions[tuner] = Session(token, trial.id if trial is not None else "", mailbox)
            if trial is None:
                return
            # A population is run again over the phases that are there, and comes to the same forks.
            if known is not None and known.end and self._spec.decide != "phase":
                self._replay(trial, known, mailbox, after_step)
                return
            if self._interrupted:
                mailbox.let_go()
            trial.sessions += 1
            trial.is_concluded = False
            thread = threading.Thread(target=self._work, args=(trial, mailbox, after_step), name=trial.id, daemon=True)
            self._threads.append(thread)
            thread.start()

    def next_result(self, tuner: str, token: str, number: int) -> Answer:
        """The session's result `number`; see :meth:`Mailbox.pull`."""
        session = self._sessions.get(tuner)
        if session is None or session.token != token:
            return Answer("over", None, "stopped")
        return session.mailbox.pull(number)

    def pause(self, tuner: str, token: str) -> None:
        """Nobody asks for the session's results any more: its trial has ended, or is paused."""
        with self._lock:
            session = self._sessions.get(tuner)
            if session is not None and session.token == token:
                session.mailbox.let_go()

    def conclude(self, tuner: str) -> None:
        """Ray Tune's trial has ended: by itself, or because the scheduler stopped it for good."""
        with self._lock:
            session = self._sessions.pop(tuner, None)
            if session is not None:
                session.mailbox.let_go()
                self._conclude(session.trial)

    def abandon(self, tuner: str) -> None:
        """Ray Tune's trial was lost; ours may be gone on with."""
        with self._lock:
            session = self._sessions.pop(tuner, None)
            if session is not None:
                session.mailbox.let_go()

    def _conclude(self, id: str) -> None:
        trial = self._trials.get(id)
        if trial is not None:
            trial.is_concluded = True
            self._stop_if_concluded(trial)

    # --------------------------------------------------------------------------------------------------------- trials

    def _find(self, params: Params) -> tuple[Trial, LedgerTrial | None]:
        """Raises JobError where the trial's job is wrong."""
        known = find_trial(self._ledger.trials.values(), params)
        id = known.id if known is not None else self._id_of(params)
        if id not in self._trials:
            plan = self._spec.plan(params, id)
            if known is None:
                self._ledger.add(id, params=params)
            trial = self._trials[id] = Trial(id, params, plan, self._spec.clock, self._spec.decide)
            trial.computed = list(known.computed) if known is not None else []
            if known is not None and not known.end:
                # A coordinator that was killed may have had no time to note it.
                for phase in _computed_in(plan):
                    self.note_computed(phase, trial)
        return self._trials[id], known

    def _find_or_refuse(self, params: Params, mailbox: Mailbox) -> tuple[Trial | None, LedgerTrial | None]:
        try:
            return self._find(params)
        except JobError as error:
            reason = "; ".join(map(str, error.problems))
        known = find_trial(self._ledger.trials.values(), params)
        id = known.id if known is not None else self._id_of(params)
        if known is None:
            self._ledger.add(id, params=params)
        if not self._ledger.trials[id].end:
            self._ledger.add(id, end="failed", reason=reason, seconds=0.0, time_to_first_step_s=None)
        self._refused[id] = self._ledger.trials[id]
        mailbox.end("failed", reason)
        return None, None

    def _id_of(self, params: Params) -> str:
        taken = {*self._ledger.trials, *self._spec.ids.values()}
        new = (f"t{number:03d}" for number in itertools.count())
        return self._spec.ids.get(params_key(params)) or next(id for id in new if id not in taken)

    def _replay(self, trial: Trial, known: LedgerTrial, mailbox: Mailbox, after_step: int) -> None:
        """A trial that ended before: its results after a step are told again, the last in any case, and nothing is
        computed."""
        trial.recall(known)
        for result in known.results:
            if result["step"] > after_step or result is known.results[-1]:
                mailbox.put(result, decisive=False)
        mailbox.end(trial.status, trial.reason)
        self._deliver_late(self._run_of(trial), MLFLOW_STATUS[trial.status], _end_tags(trial))

    def _open_run(self, trial: Trial) -> None:
        if not self._spec.space.reuse:
            _link_data(trial.plan, self._spec)
        # Also of a trial that computes nothing itself.
        prepare_folders(WorkerSpec(trial.plan, (), self._spec.import_folders))
        if not trial.is_over:
            self._tracking.begin(self._run_of(trial))

    def _work(self, trial: Trial, mailbox: Mailbox, after_step: int) -> None:
        try:
            self._open_run(trial)
            watcher = TrialWatcher(self, trial, mailbox, after_step)
            self._train(trial, watcher)
        except Exception as error:
            self._fail(trial, mailbox, "failed", f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                trial.sessions -= 1
                trial.pause()
                self._stop_if_concluded(trial)

    def _train(self, trial: Trial, watcher: TrialWatcher) -> None:
        trial.begin()
        try:
            self._runner.complete(trial.plan, self._spec.import_folders, watcher)
            self._finish_trial(trial, watcher)
        except (TrialStopped, Cancelled):
            if watcher.failure is not None:
                self._fail(trial, watcher.mailbox, "diverged", str(watcher.failure))
            elif not trial.is_over:
                trial.status = "waiting"
            # Of a trial that is paused nobody asks; where the sweep is interrupted somebody does.
            watcher.mailbox.end("stopped")
        except TrialFailed as error:
            self._fail(trial, watcher.mailbox, error.status, str(error))
        except NoWorkersError as error:
            self._broken = str(error)
            self.interrupt()
            watcher.mailbox.end("stopped")
        except RunError as error:
            self._fail(trial, watcher.mailbox, "failed", str(error))
        except JobError as error:
            self._fail(trial, watcher.mailbox, "failed", "; ".join(map(str, error.problems)))

    def _finish_trial(self, trial: Trial, watcher: TrialWatcher) -> None:
        """First the ledger has the last result and the end, then Ray Tune is told."""
        last = watcher.last
        with self._lock:
            if last is not None:
                self.note_result(trial, last)
            if not trial.is_over:
                self._end(trial, "finished", "")
        if last is not None and not watcher.mailbox.is_stopping:
            watcher.mailbox.put(last, decisive=False)
        watcher.mailbox.end("finished")

    def _stop_if_concluded(self, trial: Trial) -> None:
        if trial.is_concluded and trial.sessions == 0 and not trial.is_over and not self._interrupted:
            self._end(trial, "stopped", "")

    def _fail(self, trial: Trial, mailbox: Mailbox, status: Literal["failed", "diverged"], reason: str) -> None:
        with self._lock:
            if not trial.is_over:
                self._end(trial, status, reason)
        mailbox.end(status, reason)

    def _end(self, trial: Trial, status: Literal["finished", "stopped", "failed", "diverged"], reason: str) -> None:
        trial.end(status, reason)
        first = trial.time_to_first_step_s
        self._ledger.add(trial.id, end=status, reason=reason, seconds=trial.seconds, time_to_first_step_s=first)
        self._tracking.end(trial.plan, MLFLOW_STATUS[status], _end_tags(trial))
        publish([self._spec.folder / LEDGER])  # so that another machine knows, too

    def note_computed(self, phase: PhasePlan, trial: Trial | None) -> None:
        with self._lock:
            if trial is None:
                self._shared.add(phase.fingerprint)
            elif phase.fingerprint not in trial.computed:
                trial.computed.append(phase.fingerprint)
                self._ledger.add(trial.id, computed=phase.fingerprint)

    def _phases_reused(self) -> list[PhasePlan]:
        """What the trials did not compute again. A phase that was computed for all of them was so for the first."""
        reused = [phase for trial in self._trials.values() for phase in phases_reused(trial)]
        for fingerprint in self._shared:
            first = next((phase for phase in reused if phase.fingerprint == fingerprint), None)
            if first is not None:
                reused.remove(first)
        return reused

    @property
    def _phases_run(self) -> int:
        """Phases that this sweep has computed."""
        return len(self._shared) + sum(len(trial.computed) for trial in self._trials.values())

    def _steps_computed(self) -> int:
        """Of this sweep's phases, by whichever command, and of those that a scheduler broke off."""
        trials = self._trials.values()
        steps = {phase.fingerprint: phase.steps for trial in trials for phase in trial.plan.phases}
        whole = self._shared | {fingerprint for trial in trials for fingerprint in trial.computed}
        broken = [
            trial.step - phase.first_step
            for trial in trials
            for phase in trial.plan.phases
            if phase.first_step < trial.step < phase.last_step and phase.fingerprint not in whole
        ]
        return sum(steps.get(fingerprint, 0) for fingerprint in whole) + sum(broken)

    def note_steps(self, steps: int) -> None:
        with self._lock:
            self._steps_run += steps

    def note_result(self, trial: Trial, result: Result) -> None:
        known = self._ledger.trials[trial.id]
        if not any(each["step"] == result["step"] for each in known.results):
            self._ledger.add(trial.id, result=result)

    # -------------------------------------------------------------------------------------------- what trials need

    def _shared_plan(self, first: Params) -> Plan:
        return replace(self._spec.plan(first, "shared"), place=f"{self._spec.place}/shared")

    def _watch_shared(self, plan: Plan) -> AbstractContextManager[Watcher]:
        return self._watch_run(self._child(plan, "shared", "shared"), lambda: self._interrupted, is_counted=True)

    def _watch_teacher(self, plan: Plan, student: Watcher) -> AbstractContextManager[Watcher]:
        return self._watch_run(self._child(plan, f"teacher {plan.job.name}", "teacher"), student.is_cancelled)

    @contextmanager
    def _watch_run(
        self, run: TrackedRun, cancelled: Callable[[], bool], *, is_counted: bool = False
    ) -> Iterator[Watcher]:
        """A run beside the trials: tracked from when it begins to compute. `is_counted`: its phases are the trials'."""
        book = self if is_counted else None
        watcher = RunWatcher(book, run.plan, lambda: self._tracking.begin(run), cancelled)
        status: RunStatus = "FAILED"
        try:
            yield watcher
            status = "FINISHED"
        except Cancelled:
            status = "KILLED"
            raise
        finally:
            if watcher.has_begun:
                self._tracking.end(run.plan, status, {})

    def _has_room(self, shapes: list[GroupShape]) -> bool:
        cluster = self._spec.cluster
        cpus = sum(shape.ranks * shape.cpus_per_rank for shape in shapes)
        gpus = sum(shape.ranks * shape.gpus_per_rank for shape in shapes)
        most = max(self._spec.concurrency, 1)
        return len(shapes) <= most and cpus <= cluster.cpus + 1e-6 and gpus <= cluster.gpus + 1e-6

    def _child(self, plan: Plan, name: str, kind: str) -> TrackedRun:
        """The run of something beside the trials."""
        return TrackedRun(self._spec.uri, plan, self._spec.command, name, {"temper.kind": kind})

    def _run_of(self, trial: Trial) -> TrackedRun:
        shown = shown_params(trial.params)
        return TrackedRun(
            self._spec.uri,
            trial.plan,
            self._spec.train_line(trial.params),
            " ".join([trial.id, *(f"{name}={value}" for name, value in shown.items())])[:250],
            {"temper.kind": "trial", "temper.trial": trial.id},
            {f"sweep.{name}": value_text(value) for name, value in trial.params.items()},
        )

    def _say(self, text: str) -> None:
        with self._lock:
            self._said.append(text)


def _reconcile(storage: Path) -> None:
    """Beside the sweep, whose own runs wait for nobody."""
    threading.Thread(target=reconcile, args=(storage,), daemon=True).start()


def _end_tags(trial: Trial) -> dict[str, str]:
    reason = {"temper.trial.reason": trial.reason} if trial.reason else {}
    return {"temper.trial.status": trial.status, **reason}


def _computed_in(plan: Plan) -> list[PhasePlan]:
    """The complete phases whose folders say that they were computed in the plan's run folder."""
    place = str(plan.run_folder.relative_to(plan.job.storage_folder))
    return [
        phase
        for phase in plan.phases
        if is_complete(plan, phase) and run_name(read_json(plan.phase_folder(phase) / PLAN) or {}) == place
    ]


def _link_data(plan: Plan, spec: SweepSpec) -> None:
    """Data that were brought into the storage are no phase: a trial that shares no phase reads them all the same."""
    own, common = plan.job.storage_folder / "data", storage_folder(spec.storage) / "data"
    own.parent.mkdir(parents=True, exist_ok=True)
    if common.is_dir() and not own.exists():
        own.symlink_to(common.absolute())
