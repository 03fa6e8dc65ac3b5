"""Has the phases of a plan computed that the phase store lacks: its teachers' first, then its teacher's cache, then its
own, each by whoever comes first. Others wait without holding a worker group."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

from temper.errors import RunError
from temper.launch.phase_store import claim_phases, complete_history, is_complete
from temper.launch.sweep.pool import Cancelled, OnReport, Pool, Records
from temper.launch.sweep.tasks import AskTask, Outcome, TrainTask
from temper.launch.teacher_cache import make_cache
from temper.launch.teacher_runs import is_trained, keep_teacher, teachers_of
from temper.launch.train import prepare_folders
from temper.locks import HeldError, claimed
from temper.plan.build import Plan
from temper.plan.distill import Teacher
from temper.plan.phases import PhasePlan
from temper.plan.room import shape_of
from temper.run_folder import LOCK, WorkerSpec
from temper.storage import is_remote
from temper.techniques.distill.cache_files import Piece

_HELD_S = 0.05
_HELD_REMOTE_S = 2.0


class Watcher:
    """Who wants a plan's phases, and hears how they come about. Every method may raise to give up."""

    decisive: frozenset[int] = frozenset()

    def is_cancelled(self) -> bool:
        return False

    def know(self) -> None:
        """Some phases have become complete, by whomever."""

    def tell(self, state: Literal["waiting", "running"]) -> None:
        """Whether a worker group is at it."""

    def report(self, phase: str, records: Records) -> bool:
        """Records of a running phase; whether to stop."""
        return False

    def computed(self, phase: PhasePlan) -> None:
        """The phase was computed for this watcher."""


@dataclass(frozen=True)
class PhaseRunner:
    """`watch_teacher` gives the watcher of a teacher's run, on behalf of who needs the teacher."""

    pool: Pool
    watch_teacher: Callable[[Plan, Watcher], AbstractContextManager[Watcher]]
    say: Callable[[str], None]
    cached: set[str] = field(default_factory=set)
    """Caches that are there, by key: to look whether one is sound takes reading it."""

    def complete(self, plan: Plan, import_folders: tuple[str, ...], watcher: Watcher) -> None:
        """Returns when all phases of the plan are in the phase store.

        Raises what the watcher raises, Cancelled where it does not want them any more, RunError where a task failed.
        """
        with ExitStack() as stack:
            if _incomplete(plan):
                for teacher in teachers_of(plan):
                    self._complete_teacher(teacher, stack, watcher)
                self._make_cache(plan, import_folders, watcher)
            lost = 0
            watcher.know()
            while _incomplete(plan):
                outcome = self._attempt(plan, import_folders, watcher)
                watcher.know()
                if outcome is not None and outcome.kind == "lost":
                    lost += 1
                    if lost > plan.job.parallel.max_restarts:
                        raise RunError(f"its workers were lost {lost} times, the last time: {outcome.reason}")

    def teach(self, plan: Plan, import_folders: tuple[str, ...], watcher: Watcher) -> None:
        """Has the plan's teachers trained and asked, and none of its own phases computed."""
        with ExitStack() as stack:
            for teacher in teachers_of(plan):
                self._complete_teacher(teacher, stack, watcher)
            self._make_cache(plan, import_folders, watcher)

    def _attempt(self, plan: Plan, import_folders: tuple[str, ...], watcher: Watcher) -> Outcome | None:
        """None where nothing was done, because somebody else is at it."""
        watcher.tell("waiting")
        try:
            with self.pool.taken(shape_of(plan), watcher.is_cancelled) as group, ExitStack() as claims:
                # Claimed only now: what waits for workers keeps nobody from a phase.
                pending = claim_phases(plan, claims)
                if not pending:
                    return None
                claims.enter_context(claimed(plan.run_folder / LOCK, plan.job.name))
                # Of what somebody else has completed since the last look.
                watcher.know()
                spec = WorkerSpec(plan, pending, import_folders)
                prepare_folders(spec)
                watcher.tell("running")
                outcome = self.pool.perform_in(group, TrainTask(spec, watcher.decisive), watcher.report)
                for phase in pending:
                    complete_history(plan, phase)
                    if is_complete(plan, phase):
                        watcher.computed(phase)
        except HeldError:
            # A claim in a bucket is a second's work.
            time.sleep(_HELD_REMOTE_S if is_remote(plan.job.storage) else _HELD_S)
            return None
        if outcome.kind == "failed":
            raise RunError(outcome.reason)
        if outcome.kind == "interrupted":
            watcher.know()
            raise Cancelled
        return outcome

    def _complete_teacher(self, teacher: Teacher, stack: ExitStack, watcher: Watcher) -> None:
        if not is_trained(teacher):
            assert teacher.plan is not None, "any other teacher is trained"
            wanted = [phase for phase in teacher.plan.phases if teacher.plan.phase_folder(phase) == teacher.place]
            plan = truncated(teacher.plan, wanted[0])
            self.say(f"teacher {teacher.name}")
            with self.watch_teacher(plan, watcher) as own:
                self.complete(plan, teacher.import_folders, own)
        keep_teacher(teacher, stack)

    def _make_cache(self, plan: Plan, import_folders: tuple[str, ...], watcher: Watcher) -> None:
        """By the worker groups, which hold the processors that Ray Data would wait for."""
        if plan.distill is None or plan.distill.cache is None or plan.distill.cache.key in self.cached:
            return

        def ask(pieces: Sequence[Piece]) -> None:
            shape = shape_of(plan)
            task = AskTask(plan, tuple(pieces), import_folders)
            for _ in range(plan.job.parallel.max_restarts + 1):
                outcome = self.pool.perform(task, shape, _no_report, watcher.is_cancelled)
                if outcome.kind == "done":
                    return
                if outcome.kind == "failed":
                    break
            raise RunError(f"asking the teacher failed: {outcome.reason}")

        watcher.tell("waiting")
        make_cache(plan, import_folders, self.say, ask)
        self.cached.add(plan.distill.cache.key)


def truncated(plan: Plan, last: PhasePlan) -> Plan:
    """The plan up to and with the phase `last`."""
    phases = plan.phases[: plan.phases.index(last) + 1]
    place = str(plan.run_folder.relative_to(plan.job.storage_folder))
    return replace(plan, phases=phases, steps=last.last_step, fingerprint=last.fingerprint, place=place)


def _incomplete(plan: Plan) -> bool:
    return not all(is_complete(plan, phase) for phase in plan.phases)


_no_report: OnReport = lambda phase, records: False  # noqa: E731
