"""`temper phases prune`: makes room in the phase store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.errors import JobError, Problem
from temper.launch.phase_store import remove_phase
from temper.launch.phases.inventory import SHORT, Reference, StoredPhase, read_references, read_store
from temper.launch.phases.units import count, show_age
from temper.locks import HeldError
from temper.plan.show import show_size


@dataclass(frozen=True)
class PruneOptions:
    """Which phases are removed: those of any of the criteria that are given. `older_than_s` is since their last use,
    `larger_than` their bytes, `keep` the bytes of all that stay, of which those go first that were used longest ago;
    `unreachable` are those of no run, and the unfinished ones. With `dry_run` nothing is removed."""

    older_than_s: float | None = None
    larger_than: int | None = None
    keep: int | None = None
    unreachable: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class PruneResult:
    """`removed` in the order in which they were, `kept` those that should have been, with the reason. `left` is of the
    phases that stay."""

    removed: tuple[StoredPhase, ...]
    kept: tuple[tuple[StoredPhase, str], ...]
    left: tuple[StoredPhase, ...]
    dry_run: bool

    @property
    def freed_bytes(self) -> int:
        return sum(phase.bytes for phase in self.removed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "removed": [phase.to_dict() for phase in self.removed],
            "kept": [{**phase.to_dict(), "reason": reason} for phase, reason in self.kept],
            "freed_bytes": self.freed_bytes,
            "left_bytes": sum(phase.bytes for phase in self.left),
            "dry_run": self.dry_run,
        }


def prune_phases(storage: Path, options: PruneOptions, now_s: float) -> PruneResult:
    """Removes phases, the last of a chain first; none that a process runs or uses, and none that one builds on which
    stays. `now_s` is in seconds since 1970. Raises JobError where no criterion is given."""
    criteria = (options.older_than_s, options.larger_than, options.keep, options.unreachable or None)
    if all(criterion is None for criterion in criteria):
        remedy = "give --older-than 7d, --larger-than 10G, --keep 20G or --unreachable; --dry-run only shows them"
        raise JobError([Problem("prune", None, "is not told which phases to remove", remedy)])
    phases = read_store(storage)
    # A phase was used no longer ago than those that build on it, so that these come first.
    order = sorted(phases, key=lambda phase: (phase.used_s, -len(phase.chain), phase.fingerprint))
    pruning = _Pruning(phases, options.dry_run)
    needed = _needed(phases, read_references(storage)) if options.unreachable else frozenset()
    for phase in order:
        if _is_meant(phase, options, needed, now_s):
            pruning.remove(phase)
    for phase in order:
        if options.keep is not None and pruning.left_bytes > options.keep:
            pruning.remove(phase)
    return pruning.result()


def _is_meant(phase: StoredPhase, options: PruneOptions, needed: frozenset[str], now_s: float) -> bool:
    is_old = options.older_than_s is not None and now_s - phase.used_s > options.older_than_s
    is_large = options.larger_than is not None and phase.bytes > options.larger_than
    is_unreachable = options.unreachable and (phase.manifest is None or phase.fingerprint not in needed)
    return is_old or is_large or is_unreachable


def _needed(phases: Sequence[StoredPhase], references: Sequence[Reference]) -> frozenset[str]:
    """The phases of all runs, and what these go on from."""
    named = {fingerprint for reference in references for fingerprint in reference.phases}
    chains = [phase.chain for phase in phases if phase.fingerprint in named]
    return frozenset(named | {phase["fingerprint"] for chain in chains for phase in chain})


class _Pruning:
    """A removal under way."""

    def __init__(self, phases: Sequence[StoredPhase], dry_run: bool) -> None:
        self._dry_run = dry_run
        self._left = {phase.fingerprint: phase for phase in phases}
        self._removed: list[StoredPhase] = []
        self._kept: dict[str, tuple[StoredPhase, str]] = {}

    @property
    def left_bytes(self) -> int:
        return sum(phase.bytes for phase in self._left.values())

    def remove(self, phase: StoredPhase) -> None:
        """Removes a phase that is still there, unless there is a reason why it stays."""
        if phase.fingerprint not in self._left:
            return
        reason = self._need(phase) or self._try(phase)
        if reason is None:
            self._removed.append(self._left.pop(phase.fingerprint))
        else:
            self._kept[phase.fingerprint] = phase, reason

    def _need(self, phase: StoredPhase) -> str | None:
        above = next((other for other in self._left.values() if other.before == phase.fingerprint), None)
        if above is not None:
            return f"{above.chain[-1]['name']} {above.fingerprint[:SHORT]} builds on it"
        return "in use" if phase.in_use else None

    def _try(self, phase: StoredPhase) -> str | None:
        """Why the phase could not be removed; None where it was, or would be."""
        try:
            if not self._dry_run:
                remove_phase(phase.folder)
        except HeldError:
            return "in use"
        except OSError as error:
            return str(error)
        return None

    def result(self) -> PruneResult:
        return PruneResult(tuple(self._removed), tuple(self._kept.values()), tuple(self._left.values()), self._dry_run)


def prune_text(result: PruneResult, now_s: float) -> str:
    """What was done, for people: a line for each phase, and the sum."""
    verb = "would remove" if result.dry_run else "removed"
    lines = [f"{verb} {_told(phase, now_s)}" for phase in result.removed]
    lines += [f"kept {_told(phase, now_s)}: {reason}" for phase, reason in result.kept]
    left = show_size(sum(phase.bytes for phase in result.left))
    freed = f"{'would free' if result.dry_run else 'freed'} {show_size(result.freed_bytes)}"
    stay = f"{count(len(result.left), 'phase')} of {left} {'stays' if len(result.left) == 1 else 'stay'}"
    return "\n".join([*lines, f"{freed} in {count(len(result.removed), 'phase')}; {stay}"])


def _told(phase: StoredPhase, now_s: float) -> str:
    told = phase.to_dict()
    of = f" of {told['job']}" if told["job"] else ""
    size, age = show_size(phase.bytes), show_age(now_s - phase.used_s)
    return f"{phase.fingerprint[:SHORT]} {told['name']}{of}, {size}, used {age} ago"
