"""What a process and all that it has started take, over time: memory, threads, file descriptors, read from outside."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Usage:
    """Of some processes together; memory in MiB. `private_mib` is what is resident and shared with no other process:
    without libraries and Ray's object store."""

    processes: int = 0
    resident_mib: float = 0.0
    private_mib: float = 0.0
    threads: int = 0
    descriptors: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def usage_by_role(root: int) -> dict[str, Usage]:
    """Of the process `root` and its descendants, by what they are; one that ends meanwhile is left out."""
    found: dict[str, Usage] = {}
    parent = psutil.Process(root)
    for process in (parent, *parent.children(recursive=True)):
        try:
            with process.oneshot():
                role = "driver" if process.pid == root else role_of(process.cmdline())
                found[role] = found.get(role, Usage()) + _usage(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _usage(process: psutil.Process) -> Usage:
    memory = process.memory_info()
    private = memory.rss - memory.shared
    return Usage(1, memory.rss / 2**20, private / 2**20, process.num_threads(), process.num_fds())


def role_of(command: Sequence[str]) -> str:
    """What a process is by its command line: of Ray's workers the actor's class, else the module or the program."""
    text = " ".join(command).strip()
    if text.startswith("ray::"):
        return text.removeprefix("ray::").split(".")[0].split("(")[0].split(" ")[0]
    names = [Path(word).name for word in command if not word.startswith("-")]
    scripts = [name for name in names if name.endswith(".py")]
    return (scripts or names or ["?"])[0]


@dataclass(frozen=True)
class Sample:
    """The tree when so many trials had ended."""

    trials: int
    roles: Mapping[str, Usage]

    @property
    def total(self) -> Usage:
        return sum(self.roles.values(), Usage())


@dataclass(frozen=True)
class Growth:
    """A line through a figure over the trials: its slope per 100 trials, and the figure's median."""

    per_100_trials: float
    median: float

    @property
    def share(self) -> float:
        """The slope as a share of the median; 0 of nothing."""
        return self.per_100_trials / self.median if self.median else 0.0


def growth(trials: Sequence[float], values: Sequence[float]) -> Growth:
    """By least squares. Raises statistics.StatisticsError where there are not two different numbers of trials."""
    slope = statistics.linear_regression(trials, values).slope
    return Growth(100 * slope, statistics.median(values))


def growths(samples: Sequence[Sample], first_trial: int) -> dict[str, dict[str, Growth]]:
    """By role, and of all together, the growth of each figure from `first_trial` on. A role is looked at where every
    sample has it."""
    late = [sample for sample in samples if sample.trials >= first_trial]
    numbers = [float(sample.trials) for sample in late]
    lasting = [role for role in late[0].roles if all(role in sample.roles for sample in late)]
    series = {
        "all": [sample.total for sample in late],
        **{role: [each.roles[role] for each in late] for role in lasting},
    }
    return {
        role: {
            field.name: growth(numbers, [float(getattr(usage, field.name)) for usage in usages])
            for field in fields(Usage)
        }
        for role, usages in series.items()
    }
