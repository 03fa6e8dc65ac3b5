"""Worker groups that outlive trials: each one a Ray Train run whose ranks take task after task.

Lives in the coordinator's process. Ranks ask for tasks and say what came of them; Ray Train starts a group anew when
one of its workers dies. A task whose workers were lost is tried again, as often as its job allows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from temper.errors import RunError
from temper.launch.sweep.tasks import Assignment, Outcome, Task
from temper.plan.room import GroupShape

_ANSWER_S = 5.0  # longest wait in one call of a rank, which then calls again
_MOST_STARTS = 20  # of one group; each but the first because a worker died
_MOST_FAILED_STARTS = 2
_CLOSE_S = 20.0
_CLOSED = "it was closed"

Records = list[dict[str, Any]]
OnReport = Callable[[str, Records], bool]
"""Takes a phase's name and records; whether the training is to stop."""
Fit = Callable[[int, GroupShape], None]
"""Runs a worker group of this number and shape until it has no more tasks."""


class NoWorkersError(RunError):
    """Worker groups fail before they take a task, so that no trial can be trained."""


class Cancelled(Exception):
    """Whoever waited for a worker group does not want it any more."""


@dataclass
class _Attempt:
    assignment: Assignment
    on_report: OnReport
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    lost: str = ""

    def outcome(self, ranks: int) -> Outcome | None:
        """None while it runs."""
        for kind in ("failed", "lost"):
            told = next((each for each in self.outcomes.values() if each.kind == kind), None)
            if told is not None:
                return told
        if len(self.outcomes) == ranks:
            return self.outcomes[0]
        return Outcome("lost", self.lost) if self.lost else None


class WorkerGroup:
    """One group, as the coordinator sees it. `fit` runs it in a thread of its own."""

    def __init__(self, number: int, shape: GroupShape, fit: Fit) -> None:
        self.number, self.shape = number, shape
        self.ended: str | None = None
        """Why there is no group any more; None while there is one."""
        self.token = ""
        self._attempt: _Attempt | None = None
        self._closing = False
        self._given_up = self._dead = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._fit, args=(fit,), name=f"group-{number}", daemon=True)
        self._thread.start()

    @property
    def is_closing(self) -> bool:
        return self._closing

    @property
    def is_ready(self) -> bool:
        """Whether its ranks are up and take tasks."""
        return self.token != "" and self.ended is None and not self._closing

    def _fit(self, fit: Fit) -> None:
        reason = _CLOSED
        try:
            fit(self.number, self.shape)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        with self._changed:
            self.ended = reason = self._given_up or reason
            self._lose(f"worker group {self.number} ended: {reason}")
            self._changed.notify_all()

    def _lose(self, reason: str) -> None:
        if self._attempt is not None:
            self._attempt.lost = reason

    # --------------------------------------------------------------------------------------------- called by its ranks

    def next_task(self, token: str, rank: int, after: int) -> Assignment | Literal["wait"] | None:
        with self._changed:
            if token not in (self.token, self._dead) and rank == 0:
                self._lose("a worker was lost")
                self.token = token
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing or self._waits_for(token, after), _ANSWER_S)
            if self._closing:
                return None
            return self._attempt.assignment if self._attempt and self._waits_for(token, after) else "wait"

    def _waits_for(self, token: str, after: int) -> bool:
        attempt = self._attempt
        return token == self.token and attempt is not None and not attempt.lost and attempt.assignment.number > after

    def give_up(self, reason: str) -> None:
        """A rank cannot serve."""
        self._given_up = reason
        self.close()

    def report(self, token: str, number: int, phase: str, records: Records) -> bool:
        attempt = self._attempt
        if attempt is None or token != self.token or attempt.assignment.number != number:
            return True
        return attempt.on_report(phase, records)

    def done(self, token: str, rank: int, number: int, outcome: Outcome) -> None:
        with self._changed:
            if self._attempt is not None and token == self.token and self._attempt.assignment.number == number:
                self._attempt.outcomes[rank] = outcome
                self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- called by who uses it

    def perform(self, assignment: Assignment, on_report: OnReport) -> Outcome:
        """Has the task done, and waits for it."""
        with self._changed:
            attempt, token = _Attempt(assignment, on_report), self.token
            self._attempt = attempt
            if self.ended is not None:
                self._lose(f"worker group {self.number} ended: {self.ended}")
            self._changed.notify_all()
            self._changed.wait_for(lambda: attempt.outcome(self.shape.ranks) is not None)
            self._attempt = None
            outcome = attempt.outcome(self.shape.ranks)
            assert outcome is not None, "it was waited for"
            if outcome.kind in ("failed", "lost") and self.shape.ranks > 1 and self.token == token:
                # Its ranks cannot go on together; Ray Train starts them anew, unless it has done so already.
                self._dead, self.token = token, ""
            return outcome

    def close(self) -> None:
        """Lets its ranks go; :meth:`join` waits for them."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class Pool:
    """At most `room(shape)` groups of a shape at once. An idle group of another shape makes room."""

    def __init__(self, fit: Fit, room: Callable[[list[GroupShape]], bool]) -> None:
        self._fit, self._fits = fit, room
        self._groups: dict[int, WorkerGroup] = {}
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._numbers = 0
        self._attempts = 0
        self._failed_starts = 0

    def group(self, number: int) -> WorkerGroup | None:
        return self._groups.get(number)

    @property
    def num_groups(self) -> int:
        with self._changed:
            return len(self._alive())

    def begin(self, shape: GroupShape, count: int) -> None:
        """Starts groups before they are needed, until there are `count` of this shape or there is no room for more.
        Idle ones of other shapes are let go."""
        with self._changed:
            for group in self._alive():
                if group.shape != shape and group.number not in self._busy:
                    group.close()
            missing = count - sum(group.shape == shape for group in self._alive())
            for _ in range(missing):
                if self._fits([*(group.shape for group in self._alive() if not group.is_closing), shape]):
                    self._start(shape)

    @contextmanager
    def taken(self, shape: GroupShape, cancelled: Callable[[], bool]) -> Iterator[WorkerGroup]:
        """A group of this shape for the block, waited for. Raises Cancelled, or RunError where none comes up."""
        group = self._take(shape, cancelled)
        try:
            yield group
        finally:
            with self._changed:
                self._busy.discard(group.number)
                self._changed.notify_all()

    def perform(self, task: Task, shape: GroupShape, on_report: OnReport, cancelled: Callable[[], bool]) -> Outcome:
        """One attempt at a task, in a group that is waited for."""
        with self.taken(shape, cancelled) as group:
            return self.perform_in(group, task, on_report)

    def perform_in(self, group: WorkerGroup, task: Task, on_report: OnReport) -> Outcome:
        with self._changed:
            self._attempts += 1
            assignment = Assignment(self._attempts, task)
        return group.perform(assignment, on_report)

    def close(self) -> None:
        """Lets all groups go, and waits for them a while."""
        with self._changed:
            groups = list(self._groups.values())
        for group in groups:
            group.close()
        deadline = time.monotonic() + _CLOSE_S
        for group in groups:
            group.join(max(0.1, deadline - time.monotonic()))

    def _take(self, shape: GroupShape, cancelled: Callable[[], bool]) -> WorkerGroup:
        with self._changed:
            while True:
                if cancelled():
                    raise Cancelled
                self._bury()
                group = self._idle(shape)
                if group is not None:
                    self._busy.add(group.number)
                    self._failed_starts = 0
                    return group
                self._make_room(shape)
                # Cancelling and the end of a group notify nobody here.
                self._changed.wait(0.05)

    def _idle(self, shape: GroupShape) -> WorkerGroup | None:
        free = [group for group in self._alive() if group.shape == shape and group.number not in self._busy]
        return next((group for group in free if group.is_ready), None)

    def _alive(self) -> list[WorkerGroup]:
        return [group for group in self._groups.values() if group.ended is None]

    def _bury(self) -> None:
        for number, group in list(self._groups.items()):
            if group.ended is None or number in self._busy:
                continue
            del self._groups[number]
            if not group.token and group.ended != _CLOSED:
                self._failed_starts += 1
                if self._failed_starts > _MOST_FAILED_STARTS:
                    raise NoWorkersError(f"no worker group comes up: {group.ended}")

    def _make_room(self, shape: GroupShape) -> None:
        alive = self._alive()
        waiting = [
            group for group in alive if group.shape == shape and group.number not in self._busy and not group.is_closing
        ]
        if waiting:
            return
        shapes = [group.shape for group in alive]
        if self._fits([*shapes, shape]):
            self._start(shape)
            return
        idle = next((group for group in alive if group.number not in self._busy and group.shape != shape), None)
        if idle is not None:
            idle.close()

    def _start(self, shape: GroupShape) -> None:
        self._numbers += 1
        self._groups[self._numbers] = WorkerGroup(self._numbers, shape, self._fit)


def ray_train(folder: Path, *, embedded: bool, system_metrics: bool, is_only_node: bool) -> Fit:
    """Groups as Ray Train runs whose ranks serve the actor that this is called in; Ray Train's own records go to
    `folder`. `system_metrics`: they tell it of their nodes, too, of which there is one if `is_only_node`."""

    def fit(number: int, shape: GroupShape) -> None:
        import ray

        from temper.launch.sweep.warm import serve
        from temper.launch.trainer import build_group

        actor = ray.get_runtime_context().current_actor
        config = {
            "coordinator": actor,
            "group": number,
            "device": "cuda" if shape.gpus_per_rank > 0 else "cpu",
            "system_metrics": system_metrics,
            "is_only_node": is_only_node,
        }
        build_group(serve, config, shape, folder, [], restarts=_MOST_STARTS, embedded=embedded).fit()

    return fit
