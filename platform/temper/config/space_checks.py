"""Rules across a space's keys, and between its objectives and its job; each names what to write instead.

Whether the job has the keys that are varied, and takes their values, shows when the corners are planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from typing import Any, get_args

from temper.config.explain import suggest
from temper.config.schema import JobConfig, MetricName
from temper.config.space import (
    ASHAScheduler,
    GridVariable,
    HyperBandScheduler,
    ListedVariable,
    LogUniformVariable,
    QUniformVariable,
    RangeVariable,
    SpaceConfig,
    UniformVariable,
    Variable,
    is_same,
    listed_values,
    wanted_values,
)
from temper.config.space_corners import can_be_active
from temper.config.space_load import setters
from temper.config.text import format_value
from temper.errors import Problem

LEAST_POPULATION = 4
"""Trials of population-based training: with fewer there is no quantile to take from."""


def check_space(space: SpaceConfig) -> list[Problem]:
    """Every rule across its keys that the space breaks."""
    return [problem for rule in _RULES for problem in rule(space)]


# ------------------------------------------------------------------------------------------------------------ variables


def _check_variables(space: SpaceConfig) -> list[Problem]:
    problems = []
    for name, variable in space.space.items():
        key = f"space.{name}"
        problems += (
            _check_listed(key, variable) if isinstance(variable, ListedVariable) else _check_range(key, variable)
        )
    return problems


def _check_listed(key: str, variable: ListedVariable) -> list[Problem]:
    if (variable.values is None) == (variable.settings is None):
        rule = "names neither values nor settings" if variable.values is None else "names values and settings"
        return [Problem(key, None, rule, "give one of the two")]
    if variable.settings is not None:
        return _check_settings(key, variable.settings)
    values = variable.values or []
    return [
        Problem(f"{key}.values.{index}", value, "is listed twice", "keep one of them")
        for index, value in enumerate(values)
        if any(is_same(value, other) for other in values[:index])
    ]


def _check_settings(key: str, settings: dict[str, dict[str, Any]]) -> list[Problem]:
    labels = list(settings)
    return [
        Problem(f"{key}.settings.{label}", None, f"sets the same as {other}", "keep one of them")
        for other, label in combinations(labels, 2)
        if list(settings[label].items()) == list(settings[other].items())
    ]


def _check_range(key: str, variable: RangeVariable) -> list[Problem]:
    if variable.low >= variable.high:
        rule = f"must be more than low: {variable.low:g}"
        return [Problem(f"{key}.high", variable.high, rule, "exchange them, or leave the variable out")]
    if not isinstance(variable, QUniformVariable):
        return []
    return [
        Problem(f"{key}.{end}", value, f"is no multiple of q: {variable.q:g}", f"use {_nearest(value, variable.q):g}")
        for end, value in (("low", variable.low), ("high", variable.high))
        if not _is_multiple(value, variable.q)
    ]


def _nearest(value: float, q: float) -> float:
    return round(value / q) * q


def _is_multiple(value: float, q: float) -> bool:
    return math.isclose(value, _nearest(value, q), rel_tol=1e-9, abs_tol=1e-9 * q)


def _check_when(space: SpaceConfig) -> list[Problem]:
    problems = [
        problem
        for name, variable in space.space.items()
        for other, wanted in variable.when.items()
        for problem in _check_condition(space, name, other, wanted)
    ]
    if problems:
        return problems
    try:
        TopologicalSorter({name: variable.when for name, variable in space.space.items()}).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]
        rule = f"depends on itself: {' → '.join(cycle)}"
        return [Problem(f"space.{cycle[0]}.when", None, rule, "leave one of these out")]
    rule = "is never met: what it names is there only with other values of the same variables"
    return [
        Problem(f"space.{name}.when", variable.when, rule, "leave part of it out")
        for name, variable in space.space.items()
        if not can_be_active(space, name)
    ]


def _check_condition(space: SpaceConfig, name: str, other: str, wanted: Any) -> list[Problem]:
    key = f"space.{name}.when.{other}"
    others = [variable for variable in space.space if variable != name]
    if other == name:
        return [Problem(key, wanted, "is the variable itself", "name another, or leave it out")]
    if other not in space.space:
        remedy = suggest(other, others) if others else "leave it out"
        return [Problem(key, wanted, "is not a variable of this space", remedy)]
    values = wanted_values(wanted)
    if not values:
        return [Problem(key, wanted, "names no value", "name one, or leave it out")]
    variable = space.space[other]
    return [
        Problem(key, value, f"is never a value of {other}", _possible(variable))
        for value in values
        if not _can_be(variable, value)
    ]


def _can_be(variable: Variable, value: Any) -> bool:
    if isinstance(variable, ListedVariable):
        return any(is_same(value, other) for other in listed_values(variable))
    if isinstance(variable, UniformVariable | LogUniformVariable):
        return False  # one number of a continuous range is never drawn
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    q = variable.q if isinstance(variable, QUniformVariable) else 1
    return variable.low <= value <= variable.high and _is_multiple(value, q)


def _possible(variable: Variable) -> str:
    if isinstance(variable, ListedVariable):
        return f"use {' or '.join(map(format_value, listed_values(variable)))}"
    if isinstance(variable, UniformVariable | LogUniformVariable):
        return "make it a choice, whose values can be named"
    step = f"multiples of {variable.q:g}" if isinstance(variable, QUniformVariable) else "whole numbers"
    return f"use {step} from {variable.low:g} to {variable.high:g}"


# ---------------------------------------------------------------------------------------------- the keys that are set


def _check_keys(space: SpaceConfig) -> list[Problem]:
    """A key that is set twice, and one that is lost when the section around it is set after it."""
    problems: dict[str, Problem] = {}
    for earlier, later in combinations(setters(space), 2):
        if not later.meets(earlier) or not later.overwrites(earlier):
            continue
        rule = f"is set by {earlier.place}, too" if later.key == earlier.key else f"overwrites {earlier.place}"
        problems.setdefault(later.place, Problem(later.place, None, rule, "keep one of them"))
    return list(problems.values())


def _check_fixed(space: SpaceConfig) -> list[Problem]:
    """Where results go is one decision for all trials."""
    return [
        Problem(setter.place, None, "is the same for all trials of a sweep", f"put {setter.key} into set")
        for setter in setters(space)
        if setter.owner and setter.key.split(".")[0] in ("storage", "tracking")
    ]


# ------------------------------------------------------------------------------------ search, schedule and objectives


def _check_search(space: SpaceConfig) -> list[Problem]:
    return {"grid": _check_grid, "random": _check_random, "tpe": _check_tpe}[space.search.kind](space)


def _grids(space: SpaceConfig) -> list[GridVariable]:
    return [variable for variable in space.space.values() if isinstance(variable, GridVariable)]


def _check_grid(space: SpaceConfig) -> list[Problem]:
    problems = [
        Problem(f"space.{name}.kind", variable.kind, "is no grid", "use kind: grid, or search: {kind: random}")
        for name, variable in space.space.items()
        if not isinstance(variable, GridVariable)
    ]
    if space.budget.trials is not None:
        rule = "has no effect with search.kind: grid, which tries every combination once"
        problems.append(Problem("budget.trials", space.budget.trials, rule, "leave it out"))
    return problems


def _check_random(space: SpaceConfig) -> list[Problem]:
    all_grids, trials = len(_grids(space)) == len(space.space), space.budget.trials
    if all_grids and trials is not None and trials > 1:
        rule = f"trains every combination of the grids {trials} times to the same result"
        return [Problem("budget.trials", trials, rule, "leave it out")]
    return [] if all_grids else _check_trials(space)


def _check_tpe(space: SpaceConfig) -> list[Problem]:
    return [
        *(
            Problem(f"space.{name}.kind", "grid", "is not for search.kind: tpe, which draws", "use kind: choice")
            for name, variable in space.space.items()
            if isinstance(variable, GridVariable)
        ),
        *_check_trials(space),
    ]


def _check_trials(space: SpaceConfig) -> list[Problem]:
    if space.budget.trials is not None:
        return []
    rule = f"is missing, and search.kind: {space.search.kind} has no end of its own"
    return [Problem("budget.trials", None, rule, "give it, e.g. trials: 20")]


def _check_scheduler(space: SpaceConfig) -> list[Problem]:
    scheduler = space.scheduler
    problems = []
    if scheduler.kind != "fifo" and len(space.objectives) > 1:
        rule = f"ranks trials by one objective, and there are {len(space.objectives)}"
        remedy = "keep one of them, or use scheduler: {kind: fifo}, which gives the Pareto front"
        problems.append(Problem("scheduler.kind", scheduler.kind, rule, remedy))
    if isinstance(scheduler, ASHAScheduler | HyperBandScheduler):
        rungs, ordered = scheduler.rungs, sorted(set(scheduler.rungs))
        problems += [] if rungs == ordered else [Problem("scheduler.rungs", rungs, "must rise", f"use {ordered}")]
    if scheduler.kind == "hyperband" and space.search.kind == "tpe":
        rule = "needs all trials at its start, and search.kind: tpe would suggest them before it knows a result"
        problems.append(Problem("scheduler.kind", "hyperband", rule, "use asha, or search: {kind: random}"))
    if scheduler.kind == "pbt":
        problems += _check_population(space)
    return problems


def _check_population(space: SpaceConfig) -> list[Problem]:
    problems = []
    if space.search.kind != "random":
        rule = "is not for scheduler.kind: pbt, which draws the first population and then changes it itself"
        problems.append(Problem("search.kind", space.search.kind, rule, "use search: {kind: random}"))
    each = space.budget.trials or 1
    number = each * math.prod(len(listed_values(variable)) for variable in _grids(space))
    if number < LEAST_POPULATION:
        rule = f"is too few for scheduler.kind: pbt, where trials go on from better ones: {number}"
        problems.append(Problem("budget.trials", space.budget.trials, rule, f"use at least {LEAST_POPULATION}"))
    return problems


def _check_objectives(space: SpaceConfig) -> list[Problem]:
    metrics = [objective.metric for objective in space.objectives]
    problems = []
    for index, metric in enumerate(metrics):
        key = f"objectives.{index}.metric"
        if metric.startswith("test/"):
            remedy = f"use eval/{metric.removeprefix('test/')}, with data.holdout"
            rule = "cannot be an objective: choose on held-out data; the test set is reported once"
            problems.append(Problem(key, metric, rule, remedy))
        if metric in metrics[:index]:
            problems.append(Problem(key, metric, "is listed twice", "keep one of them"))
    return problems


_RULES: tuple[Callable[[SpaceConfig], list[Problem]], ...] = (
    _check_variables,
    _check_when,
    _check_keys,
    _check_fixed,
    _check_search,
    _check_scheduler,
    _check_objectives,
)

# ------------------------------------------------------------------------------------------------ what the job measures


def check_objectives(space: SpaceConfig, job: JobConfig) -> list[Problem]:
    """The objectives that a trial of this job never reports."""
    known, prefixes = _metric_names(job), _metric_prefixes(job)
    rule = f"is not measured by {job.name}"
    return [
        Problem(
            f"objectives.{index}.metric",
            objective.metric,
            rule,
            _NEEDS.get(objective.metric) or suggest(objective.metric, known),
        )
        for index, objective in enumerate(space.objectives)
        if objective.metric not in known and not objective.metric.startswith(prefixes)
    ]


# What a job needs that measures it.
_NEEDS = {
    **{f"eval/{name}": f"add {name} to evaluation.metrics" for name in get_args(MetricName)},
    "eval/teacher_agreement": "add distill",
    "sparsity": "add dsd",
    "precision/skipped_steps": "use precision.dtype: fp16",
}


def _metric_names(job: JobConfig) -> list[str]:
    """The names in the results of a trial by which trials can be compared."""
    return [
        *(f"eval/{metric}" for metric in (*job.evaluation.metrics, "loss")),
        *(["eval/teacher_agreement"] if job.distill is not None and job.loss.kind == "cross_entropy" else []),
        "parameters_left",
        *(["sparsity"] if job.dsd is not None else []),
        "train/loss",
        "train/grad_norm",
        "time/step_s",
        "time/examples_per_s",
        "time/tflops_per_s",
        *(["precision/skipped_steps"] if job.precision.dtype == "fp16" else []),
    ]


def _metric_prefixes(job: JobConfig) -> tuple[str, ...]:
    """What names begin with that hold a term of the loss or a layer of the model, which are not known here."""
    return (*(["sparsity/"] if job.dsd is not None else []), *(["train/loss/"] if job.distill is not None else []))


def objective_notes(space: SpaceConfig, job: JobConfig) -> list[str]:
    """What of the objectives a user may not expect, in full sentences."""
    metrics = [objective.metric for objective in space.objectives if objective.metric.startswith("eval/")]
    if job.data.holdout > 0 or not metrics:
        return []
    verb = "is" if len(metrics) == 1 else "are"
    return [
        f"no examples are held out (data.holdout: 0): {' and '.join(metrics)} {verb} of the test split, so the best "
        "trial is chosen on what it is tested on"
    ]
