"""A sweep's trials, and the searchers of Ray Tune that hand them out.

Ray Tune and Optuna see a trial as a *point*: for a variable that is listed the index of its value, for multiples of
`q` which multiple, and otherwise the number itself. So a value may be anything that a job file may hold: Tune would
evaluate `{eval: …}`, and Optuna takes no lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import optuna
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.variant_generator import generate_variants

from temper.config.space import (
    GridVariable,
    ListedVariable,
    LogUniformVariable,
    Params,
    QUniformVariable,
    RandIntVariable,
    SpaceConfig,
    TPESearch,
    Variable,
    is_same,
    listed_values,
)
from temper.config.space_load import active_params, dependency_order, is_met
from temper.ranking import is_measured

Point = dict[str, int | float]
"""A trial's numbers by variable."""

TPE_ATTEMPTS, ATTEMPTS = 10, 200
"""How often Optuna is asked for a trial that is new: by TPE, and in all before the space counts as exhausted."""

# --------------------------------------------------------------------------------------------------------------- points


def encode(space: SpaceConfig, params: Params) -> Point:
    return {name: _number(space.space[name], value) for name, value in params.items()}


def decode(space: SpaceConfig, point: Point) -> Params:
    """The trial's params: of the variables whose `when` is met."""
    return active_params(space, decode_all(space, point))


def decode_all(space: SpaceConfig, point: Point) -> Params:
    """The values of all variables of the point, also of those whose `when` is not met."""
    return {name: _value(space.space[name], number) for name, number in point.items()}


def _number(variable: Variable, value: Any) -> int | float:
    if isinstance(variable, ListedVariable):
        return next(index for index, other in enumerate(listed_values(variable)) if is_same(value, other))
    return round(value / variable.q) if isinstance(variable, QUniformVariable) else value


def _value(variable: Variable, number: int | float) -> Any:
    if isinstance(variable, ListedVariable):
        return listed_values(variable)[int(number)]
    # 3 × 0.1 is 0.30000000000000004.
    return float(f"{number * variable.q:.12g}") if isinstance(variable, QUniformVariable) else number


def bounds(variable: Variable) -> tuple[int | float, int | float]:
    """The least and the greatest number of a point."""
    if isinstance(variable, ListedVariable):
        return 0, len(listed_values(variable)) - 1
    if isinstance(variable, QUniformVariable):
        return round(variable.low / variable.q), round(variable.high / variable.q)
    return variable.low, variable.high


def domain(variable: Variable) -> Any:
    """What Ray Tune draws the variable's number from."""
    low, high = bounds(variable)
    if isinstance(variable, ListedVariable):
        return tune.choice(list(range(len(listed_values(variable)))))
    if isinstance(variable, QUniformVariable | RandIntVariable):
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if isinstance(variable, LogUniformVariable) else tune.uniform(low, high)


# --------------------------------------------------------------------------------------------------------------- trials


def expand_trials(space: SpaceConfig) -> tuple[list[Params], int]:
    """All trials of a grid or random search, as Ray Tune draws them with the space's seed: every combination of the
    grids, `budget.trials` times. And how many more were drawn that one of these is the same as."""
    generator = np.random.RandomState(space.seed)
    config = {name: _grid_or_domain(variable) for name, variable in space.space.items()}
    drawn = [
        decode(space, spec["config"])
        for _ in range(space.budget.trials or 1)
        for _, spec in generate_variants({"config": config}, random_state=generator)
    ]
    distinct = {_key(space, params): params for params in reversed(drawn)}
    return list(reversed(distinct.values())), len(drawn) - len(distinct)


def _grid_or_domain(variable: Variable) -> Any:
    if isinstance(variable, GridVariable):
        return tune.grid_search(list(range(len(listed_values(variable)))))
    return domain(variable)


def _key(space: SpaceConfig, params: Params) -> frozenset[tuple[str, int | float]]:
    return frozenset(encode(space, params).items())


def order_trials(trials: Iterable[Params], group_of: Callable[[Params], str]) -> list[Params]:
    """One of each group after the other, again and again: trials that share a phase do not all wait for it at once."""
    groups: dict[str, list[Params]] = {}
    for params in trials:
        groups.setdefault(group_of(params), []).append(params)
    return [params for params in chain(*zip_longest(*groups.values())) if params is not None]


# ------------------------------------------------------------------------------------------------------------ searchers


@dataclass(frozen=True)
class Search:
    """What `tune.Tuner` is given: `search_alg` and `num_samples` of its config, and `param_space`."""

    algorithm: Any
    num_samples: int
    param_space: dict[str, Any]


def build_search(space: SpaceConfig, trials: Sequence[Params], known: Sequence[Params], concurrency: int) -> Search:
    """`known` trials, which a broken sweep has begun, are handed out first, in their order; then the others of
    `trials`, or, of TPE, what Optuna suggests. Tune's config of a trial is its point, see :func:`decode`."""
    if isinstance(space.search, TPESearch):
        assert space.budget.trials is not None, "check_space asks for it"
        algorithm = ConcurrencyLimiter(DistinctOptunaSearch(space, space.search, known), concurrency)
        return Search(algorithm, space.budget.trials, {})
    ordered = {_key(space, params): params for params in (*known, *trials)}
    points = [encode(space, params) for params in ordered.values()]
    # Population-based training changes variables whose `when` is not met, too: Tune draws them.
    algorithm = BasicVariantGenerator(points, random_state=np.random.RandomState(space.seed))
    return Search(algorithm, len(points), {name: domain(variable) for name, variable in space.space.items()})


class DistinctOptunaSearch(OptunaSearch):
    """TPE (Bergstra et al. 2011; of several objectives Ozaki et al. 2022) that suggests no trial twice.

    What Optuna suggests again is taken back, and it is asked again, in the end for a random draw: no trial begins, and
    Optuna learns nothing from it. Each suggestion has a seed of its own, so that a sweep that was broken goes on as the
    unbroken one would.
    """

    def __init__(self, config: SpaceConfig, search: TPESearch, known: Sequence[Params]) -> None:
        self._config, self._search = config, search
        self._asked: dict[str, str] = {}
        self._keys: set[frozenset[tuple[str, int | float]]] = set()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        super().__init__(
            space=partial(suggest_point, config),
            metric=[objective.metric for objective in config.objectives],
            mode=[objective.mode for objective in config.objectives],
            points_to_evaluate=[encode(config, params) for params in known],
        )

    def suggest(self, trial_id: str) -> Point | str:
        """A new trial's point; `Searcher.FINISHED` where there is none left."""
        for attempt in range(ATTEMPTS):
            self._ot_study.sampler = self._sampler_of(len(self._keys), attempt)
            asked = f"{trial_id}.{attempt}"
            point = super().suggest(asked)
            key = frozenset(point.items())
            if key not in self._keys:
                self._keys.add(key)
                self._asked[trial_id] = asked
                return point
            super().on_trial_complete(asked, error=True)
        return Searcher.FINISHED

    def _sampler_of(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence((self._config.seed, number, attempt)).generate_state(1)[0])
        if attempt >= TPE_ATTEMPTS:
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(
            n_startup_trials=self._search.startup_trials,
            multivariate=len(self._config.objectives) == 1,
            constant_liar=True,
            seed=seed,
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial without a finite number for each objective, as one that diverged, is worse than all others to TPE."""
        ended_well = result is not None and result.get("trial_status") not in ("failed", "diverged")
        measured = ended_well and all(is_measured(result or {}, each) for each in self._config.objectives)
        super().on_trial_complete(self._asked[trial_id], result if measured else None, error)


def suggest_point(space: SpaceConfig, trial: optuna.Trial) -> None:
    """Asks Optuna for the numbers of those variables whose `when` is met by those before them."""
    point: Point = {}
    for name in dependency_order(space):
        variable = space.space[name]
        if is_met(variable, decode(space, point)):
            point[name] = _suggest(trial, name, variable)


def _suggest(trial: optuna.Trial, name: str, variable: Variable) -> int | float:
    low, high = bounds(variable)
    if isinstance(variable, ListedVariable):
        return trial.suggest_categorical(name, list(range(len(listed_values(variable)))))
    if isinstance(variable, QUniformVariable | RandIntVariable):
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, log=isinstance(variable, LogUniformVariable))
