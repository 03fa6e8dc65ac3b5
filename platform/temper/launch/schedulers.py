"""Ray Tune's schedulers on temper's clock, and what else Tune needs to run trials that hold no resources themselves.

BOHB needs hpbandster, which has not been kept since 2018: HyperBand it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray.air.execution import FixedResourceManager
from ray.tune import schedulers
from ray.tune.execution import tune_controller
from ray.tune.experiment import Trial

from temper.config.space import (
    ASHAScheduler,
    HyperBandScheduler,
    ListedVariable,
    PBTScheduler,
    QUniformVariable,
    SpaceConfig,
    Variable,
)
from temper.launch.rungs import RungClock
from temper.launch.search import Point, bounds, domain

TRIAL_RESOURCES = {"memory": 1}
"""What a trial asks of Ray: a byte. All CPUs belong to the worker groups, and a request for nothing is refused."""

RUNG_TIME = "rung_time"
"""In each result: :meth:`RungClock.time` of the rungs that the trial has passed."""
PLACE = "place"
"""In each result: phases done, and the share of the one that is under way."""


def build_scheduler(space: SpaceConfig, clock: RungClock) -> Any:
    """The scheduler of the space, by its first objective; None trains every trial to its end."""
    config, objective = space.scheduler, space.objectives[0]
    by = {"metric": objective.metric, "mode": objective.mode}
    if isinstance(config, ASHAScheduler):
        return _build_asha(clock, by)
    if isinstance(config, HyperBandScheduler):
        return _build_hyperband(clock, by)
    return _build_pbt(space, config, clock, by) if isinstance(config, PBTScheduler) else None


def _build_asha(clock: RungClock, by: dict[str, str]) -> schedulers.AsyncHyperBandScheduler:
    # Half a rung further than the last one, which is far from where the logarithm of `max_t` would be rounded.
    end = clock.reduction_factor ** (len(clock.rungs) - 0.5)
    return schedulers.AsyncHyperBandScheduler(
        RUNG_TIME, **by, max_t=end, grace_period=1, reduction_factor=clock.reduction_factor, stop_last_trials=False
    )


def _build_hyperband(clock: RungClock, by: dict[str, str]) -> schedulers.HyperBandScheduler:
    # The next rung after the last is the job's end; a little more, because Ray rounds milestones down.
    end = clock.reduction_factor ** len(clock.rungs) * (1 + 1e-12)
    return PhaseHyperBand(RUNG_TIME, **by, max_t=end, reduction_factor=clock.reduction_factor, stop_last_trials=False)


def _build_pbt(
    space: SpaceConfig, config: PBTScheduler, clock: RungClock, by: dict[str, str]
) -> schedulers.PopulationBasedTraining:
    return PhasePBT(
        space,
        time_attr=PLACE,
        **by,
        perturbation_interval=1,
        # Before, all trials are alike.
        burn_in_period=clock.first + 1,
        hyperparam_mutations={name: _mutations(variable) for name, variable in space.space.items()},
        quantile_fraction=config.quantile,
        resample_probability=config.resample_probability,
        require_attrs=False,
        log_config=False,
        synch=True,
    )


def _mutations(variable: Variable) -> Any:
    """Of a listed variable or multiples of `q` a neighbour; other numbers times 0.8 or 1.2."""
    if isinstance(variable, ListedVariable | QUniformVariable):
        low, high = bounds(variable)
        return list(range(int(low), int(high) + 1))
    return domain(variable)


class PhaseHyperBand(schedulers.HyperBandScheduler):
    """HyperBand in which a bracket goes on when the trial that the others wait for ends before its rung.

    Ray marks a bracket as being processed at its first halving and never takes the mark back: from then on it would
    wait for a trial that is gone.
    """

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        try:
            return super()._process_bracket(tune_controller, bracket)
        finally:
            bracket.is_being_processed = False


class PhasePBT(schedulers.PopulationBasedTraining):
    """Population-based training in which trials wait for each other where a phase ends; with a random stream of its
    own, within the variables' bounds, and with no waiting for trials that have ended (ray-project/ray #12122)."""

    def __init__(self, space: SpaceConfig, **options: Any) -> None:
        super().__init__(**options, custom_explore_fn=self._within_bounds)
        self._space = space

    def _within_bounds(self, point: Point) -> Point:
        ends = {name: bounds(variable) for name, variable in self._space.space.items()}
        return {name: min(max(number, ends[name][0]), ends[name][1]) for name, number in point.items()}

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        # Tune itself keeps a trial that failed among the live ones, for which the others wait.
        tune_controller.get_live_trials().discard(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        with _seeded(self._space.seed, int(self._next_perturbation_sync)):
            return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        chosen = super().choose_trial_to_run(tune_controller)
        if chosen is not None:
            return chosen
        live = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if not live or any(trial.status != Trial.PAUSED or trial.is_saving for trial in live):
            return None
        # All wait for one that has ended: its place is taken by saying again what one of them has reported.
        self.on_trial_result(tune_controller, live[0], self._trial_state[live[0]].last_result)
        return super().choose_trial_to_run(tune_controller)


@contextmanager
def _seeded(*seed: int) -> Iterator[None]:
    """Ray draws from Python's and NumPy's own generators, which others use, too."""
    states = random.getstate(), np.random.get_state()
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(start)
    np.random.seed(start)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


# ------------------------------------------------------------------------------------------------- what else Tune needs


def tune_environment(space: SpaceConfig, trials: int) -> dict[str, str]:
    """Environment variables for a quiet Tune that keeps the trials' order and writes as little as possible. HyperBand
    and population-based training must know all trials before the first one ends."""
    waits = isinstance(space.scheduler, HyperBandScheduler | PBTScheduler)
    return {
        "TUNE_MAX_PENDING_TRIALS_PG": str(trials if waits else 1),
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_WARN_THRESHOLD_S": "60",
    }


@contextmanager
def limited_trials(limit: int) -> Iterator[None]:
    """So many trials at once, of the `tune.Tuner.fit()` in this block.

    By default Tune reserves a placement group for each trial and starts processes ahead of them: for 200 empty trials,
    two at once, 30 processes and 39 s, where this takes 3 and 7 s. And `max_concurrent_trials` counts trials that
    HyperBand or population-based training has paused. Tune's controller takes another resource manager, and Ray has one
    with a fixed budget; only, `tune.Tuner` passes none on.
    """
    name = "PlacementGroupResourceManager"
    original = getattr(tune_controller, name)
    setattr(tune_controller, name, lambda: FixedResourceManager({"memory": limit * TRIAL_RESOURCES["memory"]}))
    try:
        yield
    finally:
        setattr(tune_controller, name, original)
