"""Ray Tune, quiet and quick: it searches and schedules, and its trials ask the coordinator for everything else."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.execution import class_cache

from temper.config.space import Params
from temper.console import quieten
from temper.launch.schedulers import TRIAL_RESOURCES, build_scheduler, limited_trials, tune_environment
from temper.launch.search import build_search
from temper.launch.sweep.ledger import LedgerTrial
from temper.launch.sweep.proxy import TrialProxy
from temper.launch.sweep.spec import SweepSpec
from temper.storage import shared_path

# Ray Tune would put these of the driver into its actors' description, where Ray's own pages show them; the actors need
# none, and the workers have their machine's.
class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}


class _Private:
    """Ray Tune pickles what it is given, for a restoration of its own that is never used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Asked(_Private, tune.Stopper):
    """Ends everything once the user has asked for it."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stop.is_set()


class Ends(_Private, tune.Callback):
    """Tells the coordinator which of Ray Tune's trials have ended: the actors of trials are not told."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._coordinator.conclude.remote(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Its actor was lost: the trial is as it was, and the next command goes on with it.
        self._coordinator.abandon.remote(trial.trial_id)


def run_tune(
    spec: SweepSpec,
    trials: Sequence[Params] | None,
    known: Sequence[LedgerTrial],
    coordinator: Any,
    stop: threading.Event,
) -> None:
    """Runs all trials: `trials`, or what the searcher suggests; those that are `known` come first, with what is known
    of them."""
    space = spec.space
    # A population is run again from its start, over the phases that are there, and comes to the same forks.
    begun = [] if spec.decide == "phase" else [trial.params for trial in known]
    search = build_search(space, trials or (), begun, spec.concurrency)
    os.environ.update(tune_environment(space, search.num_samples))
    quieten("ray.tune", logging.CRITICAL)
    # One more than there are worker groups: the next trial is planned while the ones before it are trained. Not where
    # a searcher or a scheduler should know all results first.
    ahead = int(space.search.kind != "tpe" and space.scheduler.kind == "fifo")
    tuner = Tuner(
        tune.with_resources(tune.with_parameters(TrialProxy, coordinator=coordinator, space=space), TRIAL_RESOURCES),
        param_space=search.param_space,
        tune_config=TuneConfig(
            search_alg=search.algorithm,
            scheduler=build_scheduler(space, spec.clock),
            num_samples=search.num_samples,
            reuse_actors=True,
            time_budget_s=None if space.budget.hours is None else 3600 * space.budget.hours,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=RunConfig(
            name=f"tune-{time.time_ns()}",
            storage_path=str(spec.folder / "ray") if spec.embedded else shared_path(spec.folder / "ray"),
            stop=Asked(stop),
            callbacks=[Ends(coordinator)],
            failure_config=FailureConfig(max_failures=0),
            # All of them, each a few bytes: a clone may still read one when its trial is already further.
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    with limited_trials(spec.concurrency + ahead):
        tuner.fit()
