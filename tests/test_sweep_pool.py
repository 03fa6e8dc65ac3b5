"""Worker groups that outlive trials: who is given a task, when it is done, failed or lost, and how groups share the
room. Ray Train is played by threads."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest

from temper.errors import RunError
from temper.launch.sweep import pool
from temper.launch.sweep.pool import Cancelled, NoWorkersError, Pool, Records, WorkerGroup
from temper.launch.sweep.tasks import Assignment, Outcome, Task
from temper.plan.room import GroupShape

ONE, TWO = GroupShape(1, 1.0), GroupShape(2, 1.0)
BOUND_S = 60.0  # on what must not hang
TASK: Any = "a task"  # a group looks into none
DONE, INTERRUPTED = Outcome("done"), Outcome("interrupted")
BROKEN = Outcome("failed", "rank 1: ValueError: no")


def unheard(phase: str, records: Records) -> bool:
    raise AssertionError("nothing was reported")


def forever() -> bool:
    """Whether who waits for a group does not want it any more."""
    return False


# -------------------------------------------------------------------------------------------------------------- a group


class Hand:
    """Leads a group by hand: its Ray Train run ends when the test says so."""

    def __init__(self, shape: GroupShape) -> None:
        self._end: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor()
        self.group = WorkerGroup(7, shape, self._fit)

    def _fit(self, number: int, shape: GroupShape) -> None:
        error = self._end.get()
        if error is not None:
            raise error

    def end(self, error: BaseException | None = None) -> None:
        self._end.put(error)
        assert self.group.join(BOUND_S)

    def close(self) -> None:
        self._end.put(None)
        self._threads.shutdown()

    def has_none(self, token: str, rank: int = 0, after: int = 0) -> bool:
        """Whether there is no task for the rank now. Of rank 0 it is how an incarnation of the group is known."""
        with mock.patch.object(pool, "_ANSWER_S", 0.0):
            return self.group.next_task(token, rank, after) == "wait"

    def given(self, token: str, rank: int = 0, after: int = 0) -> Assignment:
        answer = self.group.next_task(token, rank, after)
        assert isinstance(answer, Assignment)
        return answer

    def perform(self, number: int, on_report: Callable[[str, Records], bool] = unheard) -> Future[Outcome]:
        return self._threads.submit(self.group.perform, Assignment(number, TASK), on_report)

    def wait_for_task(self, token: str, rank: int) -> Future[Any]:
        return self._threads.submit(self.group.next_task, token, rank, 0)


@pytest.fixture
def one() -> Iterator[Hand]:
    hand = Hand(ONE)
    yield hand
    hand.close()


@pytest.fixture
def two() -> Iterator[Hand]:
    hand = Hand(TWO)
    yield hand
    hand.close()


def test_a_task_goes_to_every_rank_and_is_done_when_all_are(two: Hand) -> None:
    assert not two.group.is_ready
    assert two.has_none("a")
    assert two.group.is_ready
    outcome = two.perform(1)
    assert two.given("a", 0) == two.given("a", 1) == Assignment(1, TASK)
    two.group.done("a", 1, 1, DONE)
    assert not outcome.done()
    two.group.done("a", 0, 1, DONE)
    assert outcome.result(BOUND_S) == DONE
    assert two.has_none("a", 0, after=1) and two.has_none("a", 1, after=1)
    outcome = two.perform(2)
    assert two.given("a", 1, after=1) == two.given("a", 0, after=1) == Assignment(2, TASK)
    for rank in range(2):
        two.group.done("a", rank, 2, INTERRUPTED)
    assert outcome.result(BOUND_S) == INTERRUPTED
    assert two.group.is_ready


def test_a_rank_that_has_taken_a_task_is_not_given_it_again(two: Hand) -> None:
    two.has_none("a")
    outcome = two.perform(1)
    assert two.given("a", 0).number == 1
    two.group.done("a", 0, 1, DONE)
    assert two.has_none("a", 0, after=1)
    two.group.done("a", 1, 1, DONE)
    assert outcome.result(BOUND_S) == DONE


def test_one_rank_that_fails_fails_the_task_and_ends_an_incarnation_of_several(two: Hand) -> None:
    two.has_none("a")
    outcome = two.perform(1)
    two.given("a", 0)
    two.group.done("a", 1, 1, BROKEN)
    assert outcome.result(BOUND_S) == BROKEN
    # Rank 0 may hang in a collective, or ask for more: it is given nothing without the other one.
    assert not two.group.is_ready
    two.group.done("a", 0, 1, DONE)
    assert two.has_none("a", 0, after=1) and not two.group.is_ready
    assert two.has_none("b") and two.group.is_ready
    outcome = two.perform(2)
    assert two.has_none("a", 1, after=1)
    assert two.given("b", 0) == two.given("b", 1) == Assignment(2, TASK)
    for rank in range(2):
        two.group.done("b", rank, 2, DONE)
    assert outcome.result(BOUND_S) == DONE


def test_a_rank_alone_that_fails_goes_on(one: Hand) -> None:
    one.has_none("a")
    outcome = one.perform(1)
    one.given("a")
    one.group.done("a", 0, 1, BROKEN)
    assert outcome.result(BOUND_S) == BROKEN
    assert one.group.is_ready
    outcome = one.perform(2)
    assert one.given("a", after=1).number == 2
    one.group.done("a", 0, 2, DONE)
    assert outcome.result(BOUND_S) == DONE


def test_what_failed_counts_before_what_was_lost_by_it() -> None:
    attempt = pool._Attempt(Assignment(1, TASK), unheard)
    assert attempt.outcome(3) is None
    attempt.outcomes[0] = Outcome("lost", "rank 0: connection closed by peer")
    assert attempt.outcome(3) == attempt.outcomes[0]
    attempt.outcomes[2] = BROKEN
    assert attempt.outcome(3) == BROKEN


@pytest.mark.parametrize("shape", [ONE, TWO], ids=["one rank", "two ranks"])
def test_a_group_that_was_started_anew_has_lost_its_task_and_takes_the_next(shape: GroupShape) -> None:
    hand = Hand(shape)
    hand.has_none("a")
    outcome = hand.perform(1)
    hand.given("a")
    assert hand.has_none("b")
    assert outcome.result(BOUND_S) == Outcome("lost", "a worker was lost")
    assert hand.group.is_ready
    outcome = hand.perform(2)
    # What the ranks of the first incarnation still say.
    assert hand.group.report("a", 2, "dense", []) is True
    for rank in range(shape.ranks):
        hand.group.done("a", rank, 1, DONE)
        hand.group.done("a", rank, 2, DONE)
    assert [hand.given("b", rank).number for rank in range(shape.ranks)] == [2] * shape.ranks
    assert not outcome.done()
    for rank in range(shape.ranks):
        hand.group.done("b", rank, 2, DONE)
    assert outcome.result(BOUND_S) == DONE
    hand.close()


def test_other_ranks_wait_until_rank_0_says_who_they_are(two: Hand) -> None:
    two.has_none("a")
    outcome = two.perform(1)
    assert two.given("a", 0).number == 1
    assert two.has_none("b", 1)
    assert not outcome.done()
    for rank in range(2):
        two.group.done("a", rank, 1, DONE)
    assert outcome.result(BOUND_S) == DONE


def test_a_group_that_ends_has_lost_its_task(one: Hand) -> None:
    one.has_none("a")
    outcome = one.perform(1)
    one.given("a")
    one.end(RuntimeError("the node is gone"))
    reason = "worker group 7 ended: RuntimeError: the node is gone"
    assert outcome.result(BOUND_S) == Outcome("lost", reason)
    assert one.group.ended == "RuntimeError: the node is gone" and not one.group.is_ready
    assert one.perform(2).result(BOUND_S) == Outcome("lost", reason)


def test_a_rank_that_cannot_serve_ends_the_group_with_its_reason(two: Hand) -> None:
    two.group.give_up("OSError: no CUDA")
    assert two.group.next_task("a", 0, 0) is None
    assert two.group.is_closing
    two.end(RuntimeError("Ray Train's own words"))
    assert two.group.ended == "OSError: no CUDA"


def test_ranks_are_let_go_when_the_group_is_closed(two: Hand) -> None:
    waiting = [two.wait_for_task("a", rank) for rank in range(2)]
    two.group.close()
    assert [answer.result(BOUND_S) for answer in waiting] == [None, None]
    assert not two.group.is_ready
    two.end()
    assert two.group.ended == "it was closed"


def test_reports_are_those_of_the_running_task(one: Hand) -> None:
    heard: list[tuple[str, Records]] = []

    def hear(phase: str, records: Records) -> bool:
        heard.append((phase, records))
        return len(heard) == 2

    one.has_none("a")
    assert one.group.report("a", 1, "dense", []) is True  # to nobody: what reports it should stop
    outcome = one.perform(1, hear)
    one.given("a")
    answers = [one.group.report("a", number, "dense", [{"step": 1}]) for number in (1, 0, 1)]
    assert answers == [False, True, True]
    assert heard == [("dense", [{"step": 1}])] * 2
    one.group.done("a", 0, 0, DONE)
    assert not outcome.done()
    one.group.done("a", 0, 1, DONE)
    assert outcome.result(BOUND_S) == DONE


# ------------------------------------------------------------------------------------------------------------- the pool


class Fleet:
    """A pool with room for so many ranks, whose groups are threads: a rank asks for tasks and does as `work` says."""

    def __init__(self, room: int, work: Callable[[int, Task], Outcome] = lambda rank, task: DONE) -> None:
        self._room, self._work = room, work
        self._counted = threading.Lock()
        self._running: list[GroupShape] = []
        self.most_ranks = 0
        self.started: list[tuple[int, GroupShape]] = []
        self.taken: dict[int, list[tuple[int, Any]]] = defaultdict(list)
        self.failures: list[BaseException] = []
        """What the next groups end with before they ask for a task."""
        self.may_end = threading.Event()
        self.may_end.set()
        self.pool = Pool(self._fit, self._has_room)

    def _has_room(self, shapes: Sequence[GroupShape]) -> bool:
        return sum(shape.ranks for shape in shapes) <= self._room

    def _fit(self, number: int, shape: GroupShape) -> None:
        with self._counted:
            self.started.append((number, shape))
            self._running.append(shape)
            self.most_ranks = max(self.most_ranks, sum(each.ranks for each in self._running))
        try:
            if self.failures:
                raise self.failures.pop(0)
            with ThreadPoolExecutor(shape.ranks) as ranks:
                list(ranks.map(lambda rank: self._serve(number, rank), range(shape.ranks)))
            self.may_end.wait(BOUND_S)
        finally:
            with self._counted:
                self._running.remove(shape)

    def _serve(self, number: int, rank: int) -> None:
        assert self.pool.num_groups > 0, "asked under the pool's lock: until the pool knows the group"
        group, after = self.pool.group(number), 0
        assert group is not None
        while (answer := group.next_task(f"token {number}", rank, after)) is not None:
            if answer != "wait":
                after = answer.number
                self.taken[number].append((rank, answer.task))
                group.done(f"token {number}", rank, after, self._work(rank, answer.task))

    def perform(self, task: Any, shape: GroupShape) -> Outcome:
        return self.pool.perform(task, shape, unheard, forever)

    def shapes(self) -> list[GroupShape]:
        return [shape for _, shape in sorted(self.started)]


def asked(times: int) -> Callable[[], bool]:
    """True when it is asked for the last of so many times."""
    answers = iter([False] * (times - 1) + [True])
    return lambda: next(answers)


def test_one_group_does_task_after_task() -> None:
    fleet = Fleet(room=2)
    assert [fleet.perform(name, TWO) for name in "abc"] == [DONE] * 3
    assert fleet.shapes() == [TWO]
    assert sorted(fleet.taken[1]) == [(rank, name) for rank in range(2) for name in "abc"]
    assert fleet.pool.num_groups == 1
    fleet.pool.close()
    assert fleet.pool.num_groups == 0


def test_groups_are_begun_as_long_as_there_is_room() -> None:
    fleet = Fleet(room=5)
    fleet.pool.begin(TWO, 4)
    assert fleet.pool.num_groups == 2
    fleet.pool.begin(TWO, 4)
    assert fleet.pool.num_groups == 2
    fleet.pool.begin(ONE, 1)  # the others are idle, and are let go
    assert fleet.perform("a", ONE) == DONE
    fleet.pool.close()
    assert fleet.shapes() == [TWO, TWO, ONE]
    assert fleet.most_ranks <= 5


def test_those_who_wait_share_the_groups_and_no_more_are_started_than_have_room() -> None:
    all_at_it = threading.Barrier(2)

    def work(rank: int, task: Task) -> Outcome:
        all_at_it.wait(BOUND_S)
        return DONE

    fleet = Fleet(2, work)
    with ThreadPoolExecutor() as threads:
        outcomes = list(threads.map(lambda name: fleet.perform(name, ONE), "abcdef"))
    assert outcomes == [DONE] * 6
    assert sorted(task for tasks in fleet.taken.values() for _, task in tasks) == list("abcdef")
    assert (fleet.most_ranks, len(fleet.started)) == (2, 2)
    fleet.pool.close()


def test_idle_groups_of_another_shape_make_room() -> None:
    fleet = Fleet(room=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(fleet.pool.taken(ONE, forever))
    assert fleet.shapes() == [ONE, ONE]
    assert fleet.perform("a", TWO) == DONE
    assert fleet.perform("b", ONE) == DONE
    assert fleet.shapes() == [ONE, ONE, TWO, ONE]
    assert fleet.most_ranks == 2
    fleet.pool.close()
    assert fleet.pool.num_groups == 0


def test_busy_groups_stay_and_who_waits_for_their_room_can_give_up() -> None:
    fleet = Fleet(room=2)
    with fleet.pool.taken(ONE, forever) as busy:
        with pytest.raises(Cancelled), fleet.pool.taken(TWO, asked(4)):
            raise AssertionError("there is no room for it")
        assert fleet.pool.perform_in(busy, TASK, unheard) == DONE
    assert fleet.shapes() == [ONE]
    with pytest.raises(Cancelled), fleet.pool.taken(ONE, asked(1)):
        raise AssertionError("it is not wanted any more")
    assert fleet.perform("a", TWO) == DONE
    fleet.pool.close()


def test_a_group_that_ended_is_replaced() -> None:
    fleet = Fleet(room=1)
    with fleet.pool.taken(ONE, forever) as group:
        group.close()
        assert group.join(BOUND_S)
        assert fleet.pool.perform_in(group, TASK, unheard).kind == "lost"
    assert fleet.perform("a", ONE) == DONE
    assert fleet.shapes() == [ONE, ONE]
    fleet.pool.close()


def test_two_failing_starts_are_borne_and_no_third() -> None:
    fleet = Fleet(room=1)
    fleet.failures = [RuntimeError("no such device")] * 2
    assert fleet.perform("a", ONE) == DONE
    # They are counted from the last one that came up.
    fleet.failures = [RuntimeError("no such device")] * 3
    with fleet.pool.taken(ONE, forever) as group:
        group.close()
        group.join(BOUND_S)
    with pytest.raises(RunError, match="no worker group comes up: RuntimeError: no such device"):
        fleet.perform("b", ONE)
    assert len(fleet.started) == 3 + 3
    fleet.pool.close()


def test_groups_whose_ranks_cannot_serve_do_not_come_up() -> None:
    def fit(number: int, shape: GroupShape) -> None:
        assert groups.num_groups > 0
        group = groups.group(number)
        assert group is not None
        group.give_up("ImportError: no torch")

    groups = Pool(fit, lambda shapes: len(shapes) <= 1)
    with pytest.raises(NoWorkersError, match="no worker group comes up: ImportError: no torch"):
        groups.perform(TASK, ONE, unheard, forever)
    groups.close()


def test_a_group_that_hangs_is_waited_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_CLOSE_S", 0.0)
    fleet = Fleet(room=1)
    fleet.perform("a", ONE)
    fleet.may_end.clear()
    fleet.pool.close()
    assert fleet.pool.num_groups == 1
    monkeypatch.setattr(pool, "_CLOSE_S", BOUND_S)
    fleet.may_end.set()
    fleet.pool.close()
    assert fleet.pool.num_groups == 0
