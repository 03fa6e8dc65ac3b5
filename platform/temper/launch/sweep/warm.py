"""The ranks of a worker group: a service that takes task after task from the coordinator until there are no more.

What costs seconds is done once: the process, its imports, the process groups and, on a GPU, its context. A task leaves
nothing behind (:class:`temper.worker.WarmWorker`). A rank that fails alone says so and goes on; where there are others,
which may wait for it for ever, the group is started anew.
"""

from __future__ import annotations

import os
import traceback
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray

from temper.launch.sweep.tasks import AskTask, Assignment, Outcome, Task, TrainTask
from temper.loop import Interrupted
from temper.tracking.failures import is_lost_peer
from temper.tracking.system_metrics import sampled
from temper.worker import Port, Record, WarmWorker, process_group


def serve(config: dict[str, Any]) -> None:
    """What Ray Train runs in each rank. `config`: `group` (its number), `coordinator` (the actor), `device`; whether
    it wants `system_metrics` of the nodes, and whether there `is_only_node`."""
    coordinator, group, device = config["coordinator"], config["group"], config["device"]
    with ExitStack() as stack:
        if not ray.get(coordinator.is_wanted.remote(group)):
            return
        try:
            worker = WarmWorker(device)
            stack.enter_context(process_group(device))
            token = _agreed_token(worker.rank)
            if config["system_metrics"] and os.environ["LOCAL_RANK"] == "0":
                # At its own pace: there is a node's use to be seen between the tasks, too.
                stack.enter_context(sampled(coordinator.note_sample.remote, is_only_node=config["is_only_node"]))
        except Exception as error:
            # It would end like this every time that Ray Train starts it anew.
            ray.get(coordinator.give_up.remote(group, f"{type(error).__name__}: {error}"))
            raise
        Service(coordinator, group, token, worker).run(int(os.environ["WORLD_SIZE"]))


class Service:
    def __init__(self, coordinator: Any, group: int, token: str, worker: WarmWorker) -> None:
        self._coordinator, self._group, self._token, self._worker = coordinator, group, token, worker

    def run(self, world_size: int) -> None:
        number = 0
        while (assignment := self._next(number)) is not None:
            number = assignment.number
            outcome = self._do(assignment)
            self._call("done", self._worker.rank, number, outcome)
            if outcome.kind in ("failed", "lost") and world_size > 1:
                raise RuntimeError(f"task {number}: {outcome.reason}")

    def _next(self, after: int) -> Assignment | None:
        """Asked again and again, so that nobody waits for a rank that is gone."""
        while (answer := self._call("next_task", self._worker.rank, after)) == "wait":
            pass
        return answer

    def _call(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._coordinator, method).remote(self._group, self._token, *arguments))

    def _do(self, assignment: Assignment) -> Outcome:
        try:
            self._perform(assignment.number, assignment.task)
            return Outcome("done")
        except Interrupted:
            return Outcome("interrupted")
        except Exception as error:
            traceback.print_exc()
            reason = f"rank {self._worker.rank}: {type(error).__name__}: {error}"
            return Outcome("lost" if is_lost_peer(error) else "failed", reason)

    def _perform(self, number: int, task: Task) -> None:
        if isinstance(task, TrainTask):
            report = lambda phase, records: self._call("report", number, phase, records)  # noqa: E731
            self._worker.work(task.spec, ReportPort(task.decisive, self._worker.rank, report))
        else:
            self._ask(task)

    def _ask(self, task: AskTask) -> None:
        from temper.launch.asker import Asker

        with self._worker.nothing_left(task.import_folders):
            asker = Asker(task.plan, task.import_folders)
            for piece in task.pieces[self._worker.rank :: int(os.environ["WORLD_SIZE"])]:
                asker.write(piece)


class ReportPort(Port):
    """Rank 0's reports go to the coordinator, whose answer says whether to stop."""

    def __init__(self, decisive: frozenset[int], rank: int, report: Callable[[str, list[Record]], bool]) -> None:
        self.decisive = decisive
        self._rank, self._report, self._stop = rank, report, False

    def report(self, phase: str, records: list[Record]) -> None:
        if self._rank == 0:
            self._stop = self._report(phase, records) or self._stop

    def stop_requested(self) -> bool:
        return self._stop


def _agreed_token(rank: int) -> str:
    """A name of this incarnation of the group, the same on all ranks."""
    import torch.distributed as dist

    token = [uuid.uuid4().hex if rank == 0 else ""]
    dist.broadcast_object_list(token, src=0)
    return token[0]
