"""The space file's schema: a base job, what of it is varied, how that is searched, and for how long.

A variable's name is a dotted key of the job, or, with `settings`, a word of one's own: each setting then sets several
keys at once. `space_schema()` gives editors completion and checking; a test keeps `tune_spaces/space.schema.json` equal
to it, and `python -m temper.config.space > tune_spaces/space.schema.json` refreshes it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from temper.config.schema import Name, Positive, PositiveFloat, Section

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,49}$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Key = Annotated[str, Field(pattern=r"^[^\s=.]+(\.[^\s=.]+)*$")]
Params = dict[str, Any]
"""A trial's values by variable: of one with `settings` the label; a variable whose `when` is not met is absent."""

# ------------------------------------------------------------------------------------------------------------ variables


class VariableSection(Section):
    when: dict[str, Any] = Field(
        default_factory=dict,
        description="variables and the value, or list of values, that they must have for this one to be there; of a "
        "variable with `settings` the label",
    )


class ListedVariable(VariableSection):
    """Values that are listed: exactly one of `values` and `settings`."""

    values: list[Any] | None = Field(None, min_length=1)
    settings: dict[Label, dict[Key, Any]] | None = Field(
        None, min_length=1, description="label → the keys of the job that it sets, with their values"
    )


class GridVariable(ListedVariable):
    """Every value is tried, in every combination with those of the other grids."""

    kind: Literal["grid"]


class ChoiceVariable(ListedVariable):
    """One of the values, each as likely."""

    kind: Literal["choice"]


class UniformVariable(VariableSection):
    kind: Literal["uniform"]
    low: Number
    high: Number


class LogUniformVariable(VariableSection):
    """Uniform in the logarithm."""

    kind: Literal["loguniform"]
    low: PositiveFloat
    high: PositiveFloat


class QUniformVariable(VariableSection):
    """Uniform, rounded to multiples of `q`; `low` and `high` are multiples of it, and both belong to it."""

    kind: Literal["quniform"]
    low: Number
    high: Number
    q: PositiveFloat


class RandIntVariable(VariableSection):
    """A whole number from `low` to `high`, both belong to it."""

    kind: Literal["randint"]
    low: int
    high: int


RangeVariable = UniformVariable | LogUniformVariable | QUniformVariable | RandIntVariable
Variable = Annotated[GridVariable | ChoiceVariable | RangeVariable, Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------- search and schedule


class Objective(Section):
    metric: str = Field(min_length=1, description="e.g. eval/accuracy, parameters_left, time/step_s")
    mode: Literal["max", "min"]


class GridSearch(Section):
    """Every combination of the grids, once."""

    kind: Literal["grid"]


class RandomSearch(Section):
    """Independent draws (Bergstra and Bengio 2012); with grids among the variables as many of each combination."""

    kind: Literal["random"]


class TPESearch(Section):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), also of several objectives."""

    kind: Literal["tpe"]
    startup_trials: Positive = Field(10, description="trials that are drawn at random first")


SearchConfig = Annotated[GridSearch | RandomSearch | TPESearch, Field(discriminator="kind")]

Rungs = Annotated[
    list[Annotated[float, Field(ge=0.25, le=1.0)]],
    Field(
        min_length=1,
        description="shares of each phase after which trials are compared; none less than a quarter, because every "
        "trial dips where it is pruned",
    ),
]


class FIFOScheduler(Section):
    """Every trial is trained to its end."""

    kind: Literal["fifo"]


class ASHAScheduler(Section):
    """Asynchronous successive halving (Li et al. 2020) by phase: trials are compared at the same place of the same
    phase, from the first phase in which they differ; of `reduction_factor` one goes on."""

    kind: Literal["asha"]
    reduction_factor: Annotated[float, Field(gt=1.0, le=100.0)] = 3.0
    rungs: Rungs = Field(default_factory=lambda: [0.5, 1.0])


class HyperBandScheduler(Section):
    """HyperBand (Li et al. 2018) by phase: whole brackets of trials wait for each other at each rung."""

    kind: Literal["hyperband"]
    reduction_factor: Annotated[float, Field(ge=2.0, le=100.0)] = 3.0
    rungs: Rungs = Field(default_factory=lambda: [0.5, 1.0])


class PBTScheduler(Section):
    """Population-based training (Jaderberg et al. 2017): where a phase ends, trials of the lower quantile go on from a
    trial of the upper one, with other values of the variables that act only later."""

    kind: Literal["pbt"]
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    resample_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25


SchedulerConfig = Annotated[
    FIFOScheduler | ASHAScheduler | HyperBandScheduler | PBTScheduler, Field(discriminator="kind")
]


class SweepBudget(Section):
    trials: Positive | None = Field(None, description="random and tpe: trials; with grids, of each combination")
    hours: PositiveFloat | None = Field(None, description="no trial begins later, and those that run are stopped")


class WinnerConfig(Section):
    """What becomes of the best trial: its model is exported beside the sweep, and registered in MLflow."""

    register_as: Name | None = Field(None, description="model in MLflow's registry; default: the sweep's name")
    alias: Name = Field(
        "champion", description="champion: only if the trial is better, by the first objective, than the one before"
    )


class SpaceConfig(Section):
    """One sweep over a job."""

    name: Name
    job: Annotated[str, Field(min_length=1)] = Field(description="the base job's file, beside this one")
    set: dict[Key, Any] = Field(default_factory=dict, description="dotted keys of the job, with the values for all")
    space: dict[Key, Variable] = Field(min_length=1)
    objectives: list[Objective] = Field(min_length=1, max_length=4)
    search: SearchConfig
    scheduler: SchedulerConfig = Field(default_factory=lambda: FIFOScheduler(kind="fifo"))
    budget: SweepBudget = Field(default_factory=SweepBudget)
    concurrency: Positive | None = Field(
        None, description="trials at once; default: as many as the cluster has room for"
    )
    reuse: bool = Field(True, description="false: each trial computes all of its phases itself, teachers included")
    winner: WinnerConfig = Field(default_factory=WinnerConfig)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


# ---------------------------------------------------------------------------------------------------- what may be drawn


def settings_of(variable: Variable) -> dict[Label, dict[Key, Any]] | None:
    """The settings of a variable that has some."""
    return variable.settings if isinstance(variable, ListedVariable) else None


def listed_values(variable: ListedVariable) -> list[Any]:
    """What a variable may be: values, or the labels of its settings."""
    return list(variable.settings or variable.values or [])


def wanted_values(wanted: Any) -> list[Any]:
    """The values that an entry of `when` allows."""
    return wanted if isinstance(wanted, list) else [wanted]


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are the same to a job: 2 and 2.0 are, 1 and true are not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


# ---------------------------------------------------------------------------------------------------------- the schema


def space_schema() -> dict[str, Any]:
    """The space's JSON Schema (draft 2020-12), for editors."""
    schema = SpaceConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "temper space"
    return schema


if __name__ == "__main__":
    print(json.dumps(space_schema(), indent=2))
