"""A space, planned: every corner of it is a job that plans, and what they have alike is known before a trial starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from temper.config.space import Params, SpaceConfig, is_same
from temper.config.space_checks import check_objectives, check_space, objective_notes
from temper.config.space_corners import corners
from temper.config.space_load import shown_params
from temper.errors import JobError, Problem
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan

PlanTrial = Callable[[Params], Plan]
"""Plans the job of a trial. Raises JobError with every problem found."""


@dataclass(frozen=True)
class CornerPlans:
    """The corners of a space: `plans[i]` is that of `params[i]`. `notes` are what a user may not expect, in full
    sentences."""

    params: tuple[Params, ...]
    plans: tuple[Plan, ...]
    notes: tuple[str, ...]


def check_corners(space: SpaceConfig, plan_trial: PlanTrial, limit: int = 64) -> CornerPlans:
    """Plan every corner of the space, or where there are more than `limit` such of them that have every value.

    Raises JobError with the problems of the space, or else with those of all corners, each once, and with the params
    that led to it where they did.
    """
    problems = check_space(space)
    if problems:
        raise JobError(problems)
    every = _with_neighbours(space, corners(space, limit))
    plans: list[Plan] = []
    failed: list[tuple[Params, Problem]] = []
    for params in every:
        try:
            plans.append(plan_trial(params))
        except JobError as error:
            failed += [(params, problem) for problem in error.problems]
    problems = _distinct(failed, every)
    for plan in plans:
        problems += [problem for problem in check_objectives(space, plan.job) if problem not in problems]
    problems += [] if failed else _check_population(space, plans)
    if problems:
        raise JobError(problems)
    notes = dict.fromkeys(note for plan in plans for note in objective_notes(space, plan.job))
    return CornerPlans(tuple(every), tuple(plans), (*notes, *_idle_notes(space, every, plans)))


# ------------------------------------------------------------------------------------------------------- what is alike


def shared_phases(plans: Sequence[Plan]) -> tuple[PhasePlan, ...]:
    """The phases with which all of `plans` begin: those that are computed once for all."""
    first, *others = plans
    alike = takewhile(
        lambda column: len({phase.fingerprint for phase in column}) == 1,
        zip(first.phases, *(plan.phases for plan in others), strict=False),
    )
    return tuple(column[0] for column in alike)


def all_phases(plans: Sequence[Plan]) -> tuple[str, ...]:
    """The names of all phases of `plans`, in order."""
    found = {phase.name: _order(phase) for plan in plans for phase in plan.phases}
    return tuple(sorted(found, key=lambda name: found[name]))


def rung_phases(plans: Sequence[Plan]) -> tuple[str, ...]:
    """The names of the phases, in order, from the first in which `plans` differ: where trials can be compared."""
    shared = len(shared_phases(plans))
    found = {phase.name: _order(phase) for plan in plans for phase in plan.phases[shared:]}
    return tuple(sorted(found, key=lambda name: found[name]))


def _order(phase: PhasePlan) -> tuple[int, int]:
    """Round and place in it, which is the same in a plan where a phase before this one is left out."""
    number = phase.name.rpartition("-")[2]
    return (int(number) if number.isdigit() else 0, ("dense", "sparse", "redense").index(phase.kind))


def share_teachers(plans: Sequence[Plan]) -> bool:
    """Whether all of `plans` have the same teachers, some at least."""
    taught = [plan.distill.teachers if plan.distill is not None else () for plan in plans]
    return bool(taught[0]) and len({tuple(teacher.fingerprint for teacher in teachers) for teachers in taught}) == 1


def share_cache(plans: Sequence[Plan]) -> bool:
    """Whether all of `plans` read one cache of what their teachers say."""
    caches = [plan.distill.cache if plan.distill is not None else None for plan in plans]
    return caches[0] is not None and len({cache and cache.key for cache in caches}) == 1


# ------------------------------------------------------------------------------------------------------------ problems


def _distinct(failed: Sequence[tuple[Params, Problem]], every: Sequence[Params]) -> list[Problem]:
    """Each problem once, with the first value that broke the rule and with the params that led to it."""
    by_rule: dict[tuple[str, str, str], list[tuple[Params, Problem]]] = {}
    for params, problem in failed:
        by_rule.setdefault((problem.key, problem.rule, problem.remedy), []).append((params, problem))
    right = [params for params in every if all(params is not other for other, _ in failed)]
    problems = []
    for found in by_rule.values():
        failing, problem = [params for params, _ in found], found[0][1]
        # Where no corner is right, those are taken that break other rules.
        without = right or [params for params in every if params not in failing]
        problems.append(_with_params(problem, _causes(failing, without)))
    return problems


def _causes(failing: Sequence[Params], without: Sequence[Params]) -> Params:
    """As few params as tell the corners that fail from those `without` the problem: some that all of them have, or else
    some of the first one."""
    causes = _common(failing)
    if any(_has(params, causes) for params in without):
        causes = failing[0]
    for name in list(causes):
        others = {other: value for other, value in causes.items() if other != name}
        if not any(_has(params, others) for params in without):
            causes = others
    return causes


def _has(params: Params, some: Params) -> bool:
    return all(name in params and is_same(params[name], value) for name, value in some.items())


def _common(every: Sequence[Params]) -> Params:
    return {name: value for name, value in every[0].items() if all(_has(params, {name: value}) for params in every)}


def _with_params(problem: Problem, params: Params) -> Problem:
    """The problem with the params that led to it, but for the one that it is about."""
    named = {name: value for name, value in params.items() if name != problem.key}
    if not named:
        return problem
    shown = ", ".join(f"{name}={value}" for name, value in shown_params(named).items())
    return replace(problem, rule=f"{problem.rule} (with {shown})")


def _check_population(space: SpaceConfig, plans: Sequence[Plan]) -> list[Problem]:
    if space.scheduler.kind != "pbt" or any(len(plan.phases) > 1 for plan in plans):
        return []
    rule = "forks a trial where a phase ends, and the job has one phase"
    return [Problem("scheduler.kind", "pbt", rule, "add dsd, or use scheduler: {kind: asha}")]


# --------------------------------------------------------------------------------------------------------------- notes


def _with_neighbours(space: SpaceConfig, every: Sequence[Params]) -> list[Params]:
    """The corners, and beside the first one with each variable those that differ in it alone; where all combinations
    are there, these are, too."""
    found = list(every)
    for name in _free(space):
        having = [params for params in every if name in params]
        for value in [params[name] for params in having]:
            neighbour = {**having[0], name: value}
            if neighbour not in found:
                found.append(neighbour)
    return found


def _free(space: SpaceConfig) -> list[str]:
    """The variables that do not decide which others are there."""
    return [name for name in space.space if not any(name in variable.when for variable in space.space.values())]


def _idle_notes(space: SpaceConfig, params: Sequence[Params], plans: Sequence[Plan]) -> list[str]:
    idle = [name for name in _free(space) if _changes_nothing(name, params, plans)]
    return [f"{name} changes no weight: all its values give the same phases" for name in idle]


def _changes_nothing(name: str, every: Sequence[Params], plans: Sequence[Plan]) -> bool:
    """Whether corners that differ in this variable alone compute the same."""
    groups: dict[str, list[str]] = {}
    for params, plan in zip(every, plans, strict=True):
        if name in params:
            others = json.dumps([[other, value] for other, value in params.items() if other != name])
            groups.setdefault(others, []).append(plan.fingerprint)
    return any(len(group) > 1 for group in groups.values()) and all(len(set(group)) == 1 for group in groups.values())
