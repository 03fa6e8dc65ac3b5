"""A space file and overrides → SpaceConfig, with every problem of both at once; and back to text. And the params of a
trial → overrides of the base job.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from temper.config.explain import explain
from temper.config.load import job_folder, parse_override, printable, read_text, replaced
from temper.config.space import Params, SpaceConfig, Variable, is_same, settings_of, wanted_values
from temper.config.text import format_value, format_yaml, parse_yaml
from temper.errors import JobError, Problem

PREFIX = "sweep."
"""What an override of the space begins with, as in `sweep.budget.trials=8`; the others are the job's."""


def load_space(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SpaceConfig, tuple[str, ...]]:
    """Read a space from a YAML file and apply the `sweep.key=value` overrides to it before it is checked; and the
    overrides that are left, which are the job's.

    Rules across keys are checked by :func:`temper.config.space_checks.check_space`. Raises JobError with every problem
    found, and no other exception, whatever the file holds.
    """
    source = printable(str(path))
    raw = parse_yaml(read_text(path, "space"), source)
    own = [override.removeprefix(PREFIX) for override in overrides if override.startswith(PREFIX)]
    others = tuple(override for override in overrides if not override.startswith(PREFIX))
    return build_space(raw, own, others, source), others


def build_space(
    raw: Any, overrides: Sequence[str] = (), job_overrides: Sequence[str] = (), source: str = "space"
) -> SpaceConfig:
    """Plain values, as YAML gives them, plus overrides → SpaceConfig. `job_overrides` are applied to the base job: they
    must not be of keys that the space sets itself. Raises JobError with every problem found."""
    raw = _mapping(raw, source)
    problems: list[Problem] = []
    for override in overrides:
        try:
            raw = _apply_override(raw, override)
        except JobError as error:
            problems += error.problems
    try:
        space = SpaceConfig.model_validate(raw)
    except ValidationError as error:
        raise JobError([*problems, *explain(error, raw, SpaceConfig)]) from None
    problems += _check_overrides(space, job_overrides)
    if problems:
        raise JobError(problems)
    return space


def _mapping(raw: Any, source: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds {type(raw).__name__} at its top level"
        rule = f"{found}, and a space is a mapping of keys to values"
        raise JobError([Problem(source, None, rule, "see tune_spaces/temperature_alpha.yaml")])
    if "space" not in raw and ("model" in raw or "data" in raw):
        remedy = f"train it with temper train {source}, or give a space, e.g. tune_spaces/temperature_alpha.yaml"
        raise JobError([Problem(source, None, "is a job, not a space", remedy)])
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """As :func:`temper.config.load.apply_override`, where names below `set` and `space` have dots of their own."""
    key, value = parse_override(override)
    result = replaced(raw, _path(raw, key), value, key)
    assert isinstance(result, dict), "a space's top level stays a mapping"
    return result


def _path(raw: dict[str, Any], key: str) -> list[str]:
    """`space.optimizer.lr.low` → `space`, `optimizer.lr`, `low` where there is such a variable; a name that is new
    below `set` or `space` is all that is left of the key."""
    parts, path = key.split("."), list[str]()
    holder: Any = raw
    while parts:
        known: dict[str, Any] = holder if isinstance(holder, dict) else {}
        new = len(parts) if isinstance(holder, dict) and path[:1] in (["set"], ["space"]) else 1
        length = next((end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in known), new)
        path.append(".".join(parts[:length]))
        parts, holder = parts[length:], known.get(path[-1], {})
    return path


def base_job(path: str | Path, space: SpaceConfig) -> Path:
    """The file of the space's base job, which is looked for beside the space's own, `path`."""
    return Path(os.path.abspath(job_folder(path) / Path(space.job).expanduser()))


def space_to_yaml(space: SpaceConfig) -> str:
    """The space as YAML, defaults written out. `load_space` of this text gives an equal space."""
    return format_yaml(space.model_dump(mode="json"))


# ---------------------------------------------------------------------------------------------- the keys that are set


@dataclass(frozen=True)
class Setter:
    """A key of the job that is set, at `place` of the space; those of one `owner` with other labels never meet."""

    key: str
    place: str
    owner: str = ""
    label: str = ""

    def meets(self, other: Setter) -> bool:
        return self.owner != other.owner or self.label == other.label

    def overwrites(self, earlier: Setter) -> bool:
        return f"{earlier.key}.".startswith(f"{self.key}.")


def setters(space: SpaceConfig) -> Iterator[Setter]:
    """In the order in which they are applied to the job."""
    yield from (Setter(key, f"set.{key}") for key in space.set)
    for name, variable in space.space.items():
        for label, values in (settings_of(variable) or {}).items():
            yield from (Setter(key, f"space.{name}.settings.{label}.{key}", name, label) for key in values)
    plain = (name for name, variable in space.space.items() if settings_of(variable) is None)
    yield from (Setter(name, f"space.{name}", name) for name in plain)


def _check_overrides(space: SpaceConfig, overrides: Sequence[str]) -> list[Problem]:
    """Overrides of the job that the space would overwrite in every trial, or in some."""
    problems: list[Problem] = []
    for override in overrides:
        try:
            key, value = parse_override(override)
        except JobError as error:
            problems += error.problems
            continue
        given = Setter(key, key)
        lost = next((setter for setter in setters(space) if setter.overwrites(given)), None)
        if lost is not None:
            remedy = f"write sweep.{lost.place}=… for the space, or leave it out"
            problems.append(Problem(key, value, f"is set by the space ({lost.place})", remedy))
    return problems


# ------------------------------------------------------------------------------------------------- a trial's params


def active_params(space: SpaceConfig, params: Params) -> Params:
    """The params of those variables whose `when` is met, in the order of the space."""
    active: Params = {}
    for name in dependency_order(space):
        if name in params and is_met(space.space[name], active):
            active[name] = params[name]
    return {name: active[name] for name in space.space if name in active}


def job_values(space: SpaceConfig, params: Params) -> dict[str, Any]:
    """The dotted keys of the job that the trial sets, in the order in which they are applied: `set`, the settings, the
    plain variables; so a variable may reach into a section that a setting gives."""
    active = active_params(space, params)
    settings = {name: found for name in active if (found := settings_of(space.space[name])) is not None}
    values = dict(space.set)
    for name, by_label in settings.items():
        values |= by_label[active[name]]
    return values | {name: value for name, value in active.items() if name not in settings}


def trial_overrides(space: SpaceConfig, params: Params) -> list[str]:
    """The overrides that make the base job the trial's: what `temper train` is given to repeat it."""
    return [f"{key}={format_value(value)}" for key, value in job_values(space, params).items()]


def shown_params(params: Params) -> dict[str, str]:
    """The params as a table shows them, fractions to four digits."""
    return {name: _shown(value) for name, value in params.items()}


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return format_value(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def is_met(variable: Variable, active: Params) -> bool:
    """Whether the variable's `when` is met where the variables that it names have the values `active`."""
    return all(name in active and allows(wanted, active[name]) for name, wanted in variable.when.items())


def allows(wanted: Any, value: Any) -> bool:
    """Whether an entry of `when` allows the value."""
    return any(is_same(value, allowed) for allowed in wanted_values(wanted))


def dependency_order(space: SpaceConfig) -> list[str]:
    """The variables, each after those that its `when` names."""
    return list(TopologicalSorter({name: variable.when for name, variable in space.space.items()}).static_order())
