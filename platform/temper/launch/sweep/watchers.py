"""Who watches a run of the sweep: records into its histories and, of a trial, results to Ray Tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from temper.launch.phase_store import is_complete
from temper.launch.sweep.ledger import Result
from temper.launch.sweep.phase_runs import Watcher
from temper.launch.sweep.pool import Records
from temper.launch.sweep.trial import Finiteness, Mailbox, Trial, TrialFailed, TrialStopped
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan
from temper.run_folder import HISTORY
from temper.tracking.history import Histories, last_step, phase_histories, read_history


class Book(Protocol):
    """Where it is noted what the sweep has computed and told."""

    def note_computed(self, phase: PhasePlan, trial: Trial | None) -> None: ...

    def note_steps(self, steps: int) -> None: ...

    def note_result(self, trial: Trial, result: Result) -> None: ...


class RunWatcher(Watcher):
    """Of a run beside the trials. `begin` is called when it begins to compute; `book` is None where what it computes is
    not the trials'."""

    def __init__(
        self, book: Book | None, plan: Plan, begin: Callable[[], None], is_cancelled: Callable[[], bool]
    ) -> None:
        self._book, self._plan, self._begin, self._is_cancelled = book, plan, begin, is_cancelled
        self._histories = Histories(phase_histories(plan))
        self._steps: dict[str, int] = {}
        """Up to which step each phase's history was noted."""
        self.has_begun = False

    def is_cancelled(self) -> bool:
        return self._is_cancelled()

    def tell(self, state: Literal["waiting", "running"]) -> None:
        if state == "running" and not self.has_begun:
            self.has_begun = True
            self._begin()

    def report(self, phase: str, records: Records) -> bool:
        self._store(phase, records)
        return self.is_cancelled()

    def _store(self, phase: str, records: Records) -> Records:
        """The records that are new."""
        if phase not in self._steps:
            own = self._phase(phase)
            # An earlier session, or attempt, may have come somewhere.
            self._steps[phase] = max(own.first_step, last_step(self._plan.phase_folder(own) / HISTORY))
        self._note_end(phase, records)
        new: Records = self._histories.append(phase, records)  # type: ignore[arg-type, assignment]
        if new and self._book is not None:
            self._book.note_steps(new[-1]["step"] - self._steps[phase])
            self._steps[phase] = new[-1]["step"]
        return new

    def _phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self._plan.phases if phase.name == name)

    def _note_end(self, name: str, records: Records) -> None:
        """With its last step a phase is this run's, though it takes a moment until it is complete."""
        phase = self._phase(name)
        if records and records[-1]["step"] == phase.last_step:
            self.computed(phase)

    def computed(self, phase: PhasePlan) -> None:
        if self._book is not None:
            self._book.note_computed(phase, None)


class TrialWatcher(RunWatcher):
    """Of one session of a trial with Ray Tune, which has been told what came until `after_step`."""

    def __init__(self, book: Book, trial: Trial, mailbox: Mailbox, after_step: int) -> None:
        super().__init__(book, trial.plan, lambda: None, lambda: mailbox.is_stopping)
        self._notes, self._trial, self.mailbox = book, trial, mailbox
        # The end is told in any case: a clone may have no phase left to come through.
        self._told_step = min(after_step, trial.plan.steps - 1)
        self._finiteness = Finiteness(trial.plan.job.precision.dtype)
        self.decisive = trial.decisive_steps()
        self.last: Result | None = None
        """The result of the trial's end, which is told when its last phase is complete."""
        self.failure: TrialFailed | None = None

    def know(self) -> None:
        """Tells what the histories have of the phases that are complete, and of the one that comes next."""
        finiteness = Finiteness(self._plan.job.precision.dtype)
        for phase, history in zip(self._plan.phases, phase_histories(self._plan), strict=True):
            self._tell(phase, read_history(history.path), finiteness)
            if not is_complete(self._plan, phase):
                break

    def tell(self, state: Literal["waiting", "running"]) -> None:
        self._trial.status = state
        if state == "running":
            self._trial.note_worker()

    def report(self, phase: str, records: Records) -> bool:
        try:
            new = self._store(phase, records)
            if new:
                self._trial.note_first_step(new[0]["time_ms"] / 1000)
            self._tell(self._phase(phase), new, self._finiteness)
        except TrialFailed as error:
            self.failure = error
        except TrialStopped:
            pass
        return self.failure is not None or self.is_cancelled()

    def computed(self, phase: PhasePlan) -> None:
        self._notes.note_computed(phase, self._trial)

    def _tell(self, phase: PhasePlan, records: Sequence[Any], finiteness: Finiteness) -> None:
        for result in self._trial.results_of(phase, records, self._told_step, finiteness):
            self._told_step = result["step"]
            if result["done"]:
                self.last = result
            else:
                self._notes.note_result(self._trial, result)
                self.mailbox.put(result, decisive=result["step"] in self.decisive)
