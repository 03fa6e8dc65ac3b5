"""Every legal mesh × ZeRO stage × precision of up to four ranks, and what a training gives on each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from distributed import run_distributed
from engine_cases import OPTIMIZERS, Case
from temper.config.checks import check_job
from temper.parallel.groups import MeshGroups, build_groups

SCALE = {"initial_scale": 1024.0, "scale_window": 2}


@dataclass(frozen=True)
class Run:
    """A case on `workers` replicas."""

    workers: int
    case: Case

    @property
    def ranks(self) -> int:
        return self.workers * self.case.pipeline * self.case.tensor

    @property
    def is_slow(self) -> bool:
        """Four ranks on two cores take long; of two, fp32 shows what parallelism does, and one rank what precision
        does."""
        return self.ranks > 2 or (self.ranks == 2 and self.case.dtype != "fp32")

    def __str__(self) -> str:
        return f"data{self.workers}-{self.case}"


Train = Callable[[Any, Path, MeshGroups], dict[str, Any]]
"""What a rank does for a run: takes the run, a folder and the groups of its mesh."""


def legal_cases(base: Case, splits: Mapping[str, dict[str, str]]) -> list[tuple[int, Case]]:
    """(workers, case) of every legal combination, the optimizers dealt out in turn; what else is on is in `base`, and
    `splits` are those that tensor ranks try."""
    degrees = itertools.product((1, 2), (1, 2), (1, 2), (0, 1, 2, 3), ("fp32", "bf16", "fp16"))
    items = []
    for workers, pipeline, tensor, zero, dtype in degrees:
        for split in splits.values() if tensor > 1 else ({},):
            case = replace(base, zero=zero, dtype=dtype, pipeline=pipeline, tensor=tensor, splits=split)
            case = replace(case, scale=SCALE if dtype == "fp16" else {})
            items += [(workers, case), *([(workers, replace(case, offload="cpu"))] if zero and workers == 2 else [])]
    legal = [
        item
        for item in items
        if not check_job(item[1].job(item[0])) and item[0] * item[1].pipeline * item[1].tensor < 8
    ]
    optimizers = itertools.cycle(OPTIMIZERS)
    return [(workers, replace(case, optimizer=next(optimizers))) for workers, case in legal]


def every(runs: Sequence[Run]) -> pytest.MarkDecorator:
    """The parameter `run` of a test."""
    marked = [pytest.param(run, marks=pytest.mark.slow if run.is_slow else ()) for run in runs]
    return pytest.mark.parametrize("run", marked, ids=str)


class Trained:
    """What each run gave, of all ranks; the first one of so many ranks trains all of them, slow ones apart."""

    def __init__(self, runs: Sequence[Run], train: Train, folder: Path) -> None:
        self._runs, self._train, self._folder = runs, train, folder
        self._results: dict[tuple[int, bool], list[dict[str, dict[str, Any]]]] = {}

    def __getitem__(self, run: Run) -> list[dict[str, Any]]:
        group = run.ranks, run.is_slow
        if group not in self._results:
            runs = [other for other in self._runs if (other.ranks, other.is_slow) == group]
            self._results[group] = run_distributed(_train_all, run.ranks, self._train, runs, self._folder)
        return [results[str(run)] for results in self._results[group]]


def _train_all(rank: int, train: Train, runs: Sequence[Run], folder: Path) -> dict[str, dict[str, Any]]:
    groups: dict[tuple[int, int, int], MeshGroups] = {}
    results = {}
    for run in runs:
        mesh = run.workers, run.case.pipeline, run.case.tensor
        if mesh not in groups:
            groups[mesh] = build_groups(*mesh)
        results[str(run)] = train(run, folder / str(run), groups[mesh])
    return results
