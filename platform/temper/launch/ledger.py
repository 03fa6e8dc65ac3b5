"""Which mini-batches are computed, by whom, and what came of them: the books of a parameter-server run.

A step of the job is one global batch, as in synchronous training; here it is cut into as many mini-batches as there are
workers, and each is a :class:`Ticket` that any worker may take. Plain data without Ray or torch, so that every rule can
be tried with workers that are only played.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from temper.tracking.history import Record

LARGEST_STALENESS = 32
"""The histogram's last bin: pushes that were this stale or staler."""


@dataclass(frozen=True, order=True)
class Ticket:
    """Mini-batch `part` of global batch `step` (both 0-based)."""

    step: int
    part: int


class Ledger:
    """Hands out every ticket once, in the order of the stream, and again where its worker died before its push.

    Bounded staleness is stale synchronous parallel (Ho et al. 2013, section 2): a worker's clock counts its pushes, and
    a mini-batch is begun only by a worker whose clock is at most `max_staleness` ahead of the slowest's. One that died
    is not waited for; one that joins, or comes back, starts at least at the clock of the slowest.
    """

    def __init__(self, parts: int, first_step: int, *, n_push: int = 1, max_staleness: int | None = None) -> None:
        self._parts, self._n_push, self._max_staleness = parts, n_push, max_staleness
        self._next = self._end = first_step * parts
        self._returned: list[Ticket] = []
        self._held: dict[int, list[Ticket]] = {}
        self._clocks: dict[int, int] = {}
        self._alone = False

    # ------------------------------------------------------------------------------------------------------- workers

    @property
    def workers(self) -> list[int]:
        """Those that may take tickets."""
        return sorted(self._held)

    def join(self, worker: int) -> None:
        """A worker that is new, or back from other work."""
        if worker not in self._held:
            self._clocks[worker] = max(self._clocks.get(worker, 0), self._slowest())
            self._held[worker] = []

    def leave(self, worker: int) -> None:
        """The worker is gone, for a while or for ever; what it held is done by others."""
        for ticket in self._held.pop(worker, []):
            insort(self._returned, ticket)

    def _team(self) -> list[int]:
        """Whose clocks count; the one that trains alone keeps its place while it is at work."""
        if not self._alone:
            return list(self._held)
        return [worker for worker, held in self._held.items() if held] or self.workers[:1]

    def _slowest(self) -> int:
        return min((self._clocks[worker] for worker in self._team()), default=0)

    # ------------------------------------------------------------------------------------------------------- tickets

    def open(self, step: int, *, alone: bool = False) -> None:
        """From now on, what comes before `step` may be taken; by one worker only, if `alone`."""
        slowest = self._slowest()
        for worker in self._held:
            # Those that one worker left behind while it trained alone are not to be waited for.
            self._clocks[worker] = max(self._clocks[worker], slowest)
        self._end, self._alone = step * self._parts, alone

    def close(self) -> int:
        """No step is begun any more; the step that will have been reached."""
        step = -(-self._next // self._parts)
        self._end = step * self._parts
        return step

    @property
    def exhausted(self) -> bool:
        """Nothing is left to be taken."""
        return self._next >= self._end and not self._returned

    @property
    def drained(self) -> bool:
        """All that could be taken is done."""
        return self.exhausted and not any(self._held.values())

    def holds(self, worker: int) -> bool:
        return bool(self._held.get(worker))

    def take(self, worker: int) -> tuple[Ticket, int] | None:
        """The worker's next ticket, and the worker's lead: by how many pushes it will be ahead of the slowest one when
        it begins. None where it must wait."""
        if self.exhausted or worker not in self._team():
            return None
        held = self._held[worker]
        lead = self._clocks[worker] + len(held) // self._n_push - self._slowest()
        if self._max_staleness is not None and lead > self._max_staleness:
            return None
        ticket = self._returned.pop(0) if self._returned else self._new()
        held.append(ticket)
        return ticket, lead

    def _new(self) -> Ticket:
        self._next += 1
        return Ticket(*divmod(self._next - 1, self._parts))

    def pushed(self, worker: int, tickets: Iterable[Ticket]) -> None:
        """One push of the worker, with the gradients of these tickets, has reached every shard."""
        for ticket in tickets:
            self._held[worker].remove(ticket)
        self._clocks[worker] += 1


@dataclass(frozen=True)
class Computed:
    """One mini-batch: the loss and its terms by metric name, and the norm of the gradient before clipping."""

    losses: Mapping[str, float]
    grad_norm: float


@dataclass(frozen=True)
class Pushed:
    """A push that reached every shard, with the mini-batches whose gradients were in it."""

    staleness: int
    mini_batches: Mapping[Ticket, Computed]


class StepRecords:
    """Puts what is known of mini-batches together into one record for each step, in the order of the steps.

    A loss is the mean over the step's mini-batches, as in synchronous training; so is the norm of the gradient, which
    is that of a mini-batch here. `staleness` counts all pushes of the phase by their staleness, `pushes` by worker.
    `values_at` gives what a step (0-based) decides by itself, as its learning rate; `constants` are in every record.
    """

    def __init__(
        self,
        parts: int,
        first_step: int,
        *,
        record_every: int,
        values_at: Callable[[int], Mapping[str, float]],
        staleness: Mapping[int, int],
        pushes: Mapping[int, int],
        constants: Mapping[str, float] | None = None,
    ) -> None:
        self._parts, self._record_every, self._values_at = parts, record_every, values_at
        self._constants = dict(constants or {})
        self._leads: dict[Ticket, int] = {}
        self._found: dict[int, list[tuple[Computed, int, int]]] = {}  # by step: mini-batch, staleness, lead
        self._step = first_step
        self.staleness, self.pushes = Counter(staleness), Counter(pushes)

    def begun(self, ticket: Ticket, lead: int) -> None:
        """A worker was given the ticket while it was `lead` pushes ahead of the slowest."""
        self._leads[ticket] = lead

    def pushed(self, worker: int, push: Pushed) -> None:
        for ticket, found in push.mini_batches.items():
            self._found.setdefault(ticket.step, []).append((found, push.staleness, self._leads.pop(ticket)))
        self.staleness[min(push.staleness, LARGEST_STALENESS)] += 1
        self.pushes[worker] += 1

    def num_complete(self, through: int) -> int:
        """Steps up to `through` whose mini-batches are all pushed, and that were not taken yet."""
        step = self._step
        while step < through and len(self._found.get(step, ())) == self._parts:
            step += 1
        return step - self._step

    def take(self, through: int, times: Mapping[str, float], more: Mapping[str, float] | None = None) -> list[Record]:
        """Records of the complete steps up to `through`, all with the same `times`; what is `more` belongs to the last
        of them."""
        records = []
        last = self._step + self.num_complete(through)
        for step in range(self._step, last):
            metrics = self._metrics(step, self._found.pop(step), times)
            number, extra = step + 1, dict(more or {}) if step + 1 == last else {}
            if number % self._record_every == 0 or number == 1 or extra:
                records.append(Record(step=number, time_ms=int(time.time() * 1000), metrics=metrics | extra))
        self._step = last
        return records

    def _metrics(
        self, step: int, found: list[tuple[Computed, int, int]], times: Mapping[str, float]
    ) -> dict[str, float]:
        mini_batches, staleness, leads = zip(*found, strict=True)
        losses = {name: fmean(item.losses[name] for item in mini_batches) for name in mini_batches[0].losses}
        return {
            **losses,
            **self._values_at(step),
            "train/grad_norm": fmean(item.grad_norm for item in mini_batches),
            **times,
            "server/staleness_mean": fmean(staleness),
            "server/staleness_max": float(max(staleness)),
            "server/clock_lead": float(max(leads)),
            **self._constants,
        }

    def summary(self) -> dict[str, float]:
        """The phase as a whole: the share of pushes by staleness, and each worker's clock."""
        total = max(self.staleness.total(), 1)
        shares = {f"server/staleness/{number}": count / total for number, count in sorted(self.staleness.items())}
        return shares | {f"server/clock/{worker}": float(count) for worker, count in sorted(self.pushes.items())}
