"""The corners of a space: few trials that together show whether every trial of it is a job that plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

from temper.config.space import ListedVariable, Params, SpaceConfig, listed_values, wanted_values
from temper.config.space_load import active_params, allows, dependency_order, is_met

Ends = dict[str, list[Any]]
"""By variable, in the order of dependency: its extremes, with the values in between that a `when` names."""
Pick = tuple[str, int]
"""A variable and the index of one of its ends."""


def corners(space: SpaceConfig, limit: int = 64) -> list[Params]:
    """Params of all combinations of extremes: every listed value, and both ends of each range.

    Where there are more than `limit`, some of them, always the same, in which every value of every variable occurs,
    and every pair of values as far as `limit` goes.
    """
    ends = _ends(space)
    found = list(islice(_combinations(space, ends, list(ends), {}), limit + 1))
    if len(found) > limit:
        found = _cover(space, ends, limit)
    return [active_params(space, params) for params in found]


def can_be_active(space: SpaceConfig, name: str) -> bool:
    """Whether there is a trial in which the `when` of the variable is met, and of those that it names."""
    return _required(space, _ends(space), [(name, 0)]) is not None


def _ends(space: SpaceConfig) -> Ends:
    ends: Ends = {}
    for name in dependency_order(space):
        variable = space.space[name]
        if isinstance(variable, ListedVariable):
            ends[name] = listed_values(variable)
        else:
            named = [value for other in space.space.values() for value in wanted_values(other.when.get(name, []))]
            ends[name] = list(dict.fromkeys([variable.low, variable.high, *named]))
    return ends


def _combinations(space: SpaceConfig, ends: Ends, names: Sequence[str], params: Params) -> Iterator[Params]:
    """Each way to go on from `params` with values of the variables `names`, those left out whose `when` is not met."""
    if not names:
        yield params
    elif not is_met(space.space[names[0]], params):
        yield from _combinations(space, ends, names[1:], params)
    else:
        for value in ends[names[0]]:
            yield from _combinations(space, ends, names[1:], {**params, names[0]: value})


def _cover(space: SpaceConfig, ends: Ends, limit: int) -> list[Params]:
    """Greedily: each row is built around the first value, or pair of values, that no row has yet."""
    picks = [(name, index) for name, values in ends.items() for index in range(len(values))]
    pairs = [frozenset(pair) for pair in combinations(picks, 2) if pair[0][0] != pair[1][0]]
    missing = dict.fromkeys([*(frozenset({pick}) for pick in picks), *pairs])
    rows: list[dict[str, int]] = []
    while missing:
        target = next(iter(missing))
        if len(target) == 2 and len(rows) >= limit:
            break
        required = _required(space, ends, sorted(target))
        del missing[target]
        if required is None:  # no trial has both
            continue
        row = _row(space, ends, required, missing)
        for covered in _covered(row):
            missing.pop(covered, None)
        rows.append(row)
    return [{name: ends[name][index] for name, index in row.items()} for row in rows]


def _required(space: SpaceConfig, ends: Ends, picks: Sequence[Pick]) -> dict[str, list[int]] | None:
    """What the variables must be for all of `picks` to be there, as indices of ends; None where they never are."""
    allowed = {name: [index] for name, index in picks}
    names = list(allowed)
    while names:
        for other, wanted in space.space[names.pop()].when.items():
            every = allowed.get(other, range(len(ends[other])))
            allowed[other] = [index for index in every if allows(wanted, ends[other][index])]
            if not allowed[other]:
                return None
            names.append(other)
    return allowed


def _row(
    space: SpaceConfig, ends: Ends, required: Mapping[str, Sequence[int]], missing: Mapping[frozenset[Pick], None]
) -> dict[str, int]:
    """A row that is as `required`, and otherwise has most of what is missing."""
    row: dict[str, int] = {}
    for name, values in ends.items():
        if not is_met(space.space[name], {other: ends[other][index] for other, index in row.items()}):
            continue

        def gain(index: int, name: str = name) -> int:
            new: Pick = (name, index)
            return sum(frozenset({new, other}) in missing for other in [new, *row.items()])

        row[name] = max(required.get(name, range(len(values))), key=gain)
    return row


def _covered(row: Mapping[str, int]) -> Iterator[frozenset[Pick]]:
    yield from (frozenset({pick}) for pick in row.items())
    yield from (frozenset(pair) for pair in combinations(row.items(), 2))
