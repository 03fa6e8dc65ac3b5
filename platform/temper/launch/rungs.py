"""Where trials are compared: rungs by phase, and the clock by which Ray Tune's schedulers see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from temper.errors import Problem


@dataclass(frozen=True)
class RungClock:
    """Rungs are places (phase, share of its steps), in the order in which a trial passes them.

    Successive halving spaces its milestones by powers of the reduction factor. A trial's time is therefore that power
    at its last rung, and stands still between two: so Tune's k-th milestone is exactly the k-th rung, whatever the
    phases' lengths are, and no result in between is compared.
    """

    phases: tuple[str, ...]
    first: int
    rungs: tuple[tuple[str, float], ...]
    reduction_factor: float

    @classmethod
    def of(
        cls, phases: Sequence[str], first: str, shares: Sequence[float] = (), reduction_factor: float = 3.0
    ) -> RungClock:
        """The clock of jobs with these `phases`, which are alike before `first`. The job's very end is no rung: there
        is nothing left to stop."""
        start = phases.index(first)
        places = [(phase, share) for phase in phases[start:] for share in shares]
        return cls(tuple(phases), start, tuple(p for p in places if p != (phases[-1], 1.0)), reduction_factor)

    def rung(self, phase: str, share: float) -> int:
        """How many rungs a trial has passed when it has done this share of `phase`."""
        place = (self.phases.index(phase), share)
        return sum((self.phases.index(name), least) <= place for name, least in self.rungs)

    def time(self, rung: int) -> float:
        """The time of a trial that has passed so many rungs; 0 before the first."""
        return self.reduction_factor ** (rung - 1) if rung else 0.0

    def stops(self, phase: str, steps: int) -> tuple[int, ...]:
        """After which of the `steps` of `phase` its rungs are."""
        # 0.7 × 10 is a little more than 7 in binary.
        return tuple(math.ceil(share * steps - 1e-9) for name, share in self.rungs if name == phase)


def check_rungs(clock: RungClock, shares: Sequence[float]) -> list[Problem]:
    """That there is a place at all at which trials are compared before they end."""
    if clock.rungs:
        return []
    rule = f"leaves no rung: trials differ from {clock.phases[clock.first]} on, where they end"
    return [Problem("scheduler.rungs", list(shares), rule, "use e.g. [0.5], or scheduler: {kind: fifo}")]
