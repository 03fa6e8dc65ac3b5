"""Which results are best, by one objective or by several. One that is missing or not finite never is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from temper.config.space import Objective

Results = Sequence[Mapping[str, Any]]
"""By trial, in any order, its last metrics by name."""


def is_better(value: float, other: float, objective: Objective) -> bool:
    return value > other if objective.mode == "max" else value < other


def is_measured(result: Mapping[str, Any], objective: Objective) -> bool:
    """Whether the result has a finite number for the objective."""
    value = result.get(objective.metric)
    return isinstance(value, int | float) and math.isfinite(value)


def best_trial(results: Results, objective: Objective) -> int | None:
    """The index of the best result, of equal ones the first; None where none is measured."""
    best: int | None = None
    for index, result in enumerate(results):
        if not is_measured(result, objective):
            continue
        if best is None or is_better(result[objective.metric], results[best][objective.metric], objective):
            best = index
    return best


def pareto_front(results: Results, objectives: Sequence[Objective]) -> list[int]:
    """The indices of the results that no other one dominates: is at least as good by all objectives, and better by
    one."""
    measured = [index for index, result in enumerate(results) if all(is_measured(result, each) for each in objectives)]
    return [
        index
        for index in measured
        if not any(_dominates(results[other], results[index], objectives) for other in measured)
    ]


def _dominates(result: Mapping[str, Any], other: Mapping[str, Any], objectives: Sequence[Objective]) -> bool:
    pairs = [(result[each.metric], other[each.metric], each) for each in objectives]
    return any(is_better(*pair) for pair in pairs) and not any(is_better(b, a, each) for a, b, each in pairs)
