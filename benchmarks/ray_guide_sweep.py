"""The sweep as Ray's guide on tuning a Ray Train run has it, with temper's training loop: what `temper sweep` is
measured against.

    python benchmarks/ray_guide_sweep.py SPACE [--trials N] --storage FOLDER [key=value …]

https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html: each Tune trial is a function that
builds a trainer and calls `fit()`, hands its reports on by TuneReportCallback and asks for next to no CPU, and as many
trials run at a time as the machine has room for their workers. Every trial trains its whole job: the worker calls
`temper.worker.work`, the same code on the same plan as `temper train`, in a storage of the trial's own, so that nothing
that a trial computes is there for another. SPACE is a space of grids; `key=value` are overrides of its job for all
trials, or of the space, as for `temper sweep`. Teachers are not trained here: name one that is,
`distill.teacher=FOLDER`. What the plan knows of the model is looked up before the first trial, once for all.

Ray has its own settings. The last line is JSON: the seconds from `ray.init` to the last result, the optimizer steps of
all trials, and of each trial its params, last metrics, steps, seconds, and the seconds from the start of its function
to the end of the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.config.space import GridVariable, SpaceConfig, Variable, listed_values
from temper.config.space_load import base_job, load_space, trial_overrides
from temper.launch.teachers import plan_job
from temper.plan.build import Plan
from temper.plan.mesh import local_cluster
from temper.run_folder import WorkerSpec

DRIVER_CPUS = 0.01  # of a trial's function, which waits for its worker


@dataclass(frozen=True)
class Trial:
    """One point of the grid: its params by variable, and the overrides of the job that they stand for."""

    number: int
    params: dict[str, Any]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What all trials share; `cpus` are those of the machine."""

    job: Path
    storage: Path
    cpus: int
    import_folders: tuple[str, ...]

    def load(self, trial: Trial) -> JobConfig:
        return load_job(self.job, [*trial.overrides, f"storage={self.storage / f'trial-{trial.number}'}"])

    def plan(self, trial: Trial) -> Plan:
        return plan_job(self.load(trial), local_cluster(), self.job.parent)


# --------------------------------------------------------------------------------------------------------------- grids


def grid_trials(space: SpaceConfig, overrides: Sequence[str] = ()) -> list[Trial]:
    """Every combination of the grids, the last variable changing fastest; `overrides` of the job are for all. Raises
    ValueError where a variable is no grid, or only there under a condition."""
    points = itertools.product(*(_values(name, variable) for name, variable in space.space.items()))
    every = [dict(zip(space.space, point, strict=True)) for point in points]
    return [Trial(index, params, (*trial_overrides(space, params), *overrides)) for index, params in enumerate(every)]


def _values(name: str, variable: Variable) -> list[Any]:
    if not isinstance(variable, GridVariable) or variable.when:
        raise ValueError(f"{name}: only grids without a condition are swept here")
    return listed_values(variable) or []


# ---------------------------------------------------------------------------------------------------------- the trials


def train_driver(config: dict[str, Any]) -> None:
    """A Tune trial, as in the guide."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from temper.launch.trainer import ProcessGroupConfig

    began = time.time()
    setting, trial = config["setting"], config["trial"]
    plan = setting.plan(trial)
    spec = WorkerSpec(plan, plan.phases, setting.import_folders)
    for folder in (spec.run_folder, *map(spec.phase_folder, spec.phases)):
        folder.mkdir(parents=True)
    # `TorchTrainer` is this trainer with a backend that forms the process group, which temper's worker does itself.
    trainer = DataParallelTrainer(
        train_worker,
        train_loop_config={"spec": spec, "began": began},
        backend_config=ProcessGroupConfig(),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": worker_cpus(setting.cpus)}),
        run_config=RunConfig(
            name="ray", storage_path=str(setting.storage / f"trial-{trial.number}"), callbacks=[TuneReportCallback()]
        ),
    )
    trainer.fit()


def worker_cpus(cpus: int) -> float:
    """Of a trial's worker, so that there is room for one worker per CPU beside the trials' functions."""
    return 1 - cpus * DRIVER_CPUS


def train_worker(config: dict[str, Any]) -> None:
    """Trains the job and reports each evaluation."""
    import ray.train

    from temper.worker import work

    first_step_s: list[float] = []

    def report(phase: str, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            if not first_step_s:
                first_step_s.append(record["time_ms"] / 1000 - config["began"])
            if any(name.startswith("eval/") for name in record["metrics"]):
                said = {"phase": phase, "step": record["step"], "first_step_s": first_step_s[0]}
                ray.train.report({**said, "metrics": record["metrics"]})

    work(config["spec"], report)


# ----------------------------------------------------------------------------------------------------------- the sweep


@dataclass(frozen=True)
class TrialResult:
    """A trial as it ended. `seconds` are those of its function, `metrics` those of the last step."""

    params: dict[str, Any]
    metrics: dict[str, float]
    steps: int
    seconds: float
    time_to_first_step_s: float


def run_sweep(setting: Setting, trials: Sequence[Trial]) -> dict[str, Any]:
    """Raises RuntimeError where a trial failed."""
    import ray
    from ray import tune

    began = time.perf_counter()
    # A plain init would join any Ray that happens to run on this machine.
    ray.init(address="local", num_cpus=setting.cpus, log_to_driver=False, logging_level=logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(train_driver, {"CPU": DRIVER_CPUS}),
        param_space={"setting": setting, "trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(max_concurrent_trials=setting.cpus),
        run_config=tune.RunConfig(name="tune", storage_path=str(setting.storage), verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} of {len(trials)} trials failed; the first: {results.errors[0]}")
    found = [trial_result(result.config["trial"], result.metrics) for result in results]
    seconds = time.perf_counter() - began
    ray.shutdown()
    return {
        "seconds": seconds,
        "steps": sum(each.steps for each in found),
        "at_a_time": setting.cpus,
        "trials": [asdict(each) for each in found],
    }


def trial_result(trial: Trial, last: Mapping[str, Any]) -> TrialResult:
    """From the last report that Tune has of a trial."""
    return TrialResult(trial.params, last["metrics"], last["step"], last["time_total_s"], last["first_step_s"])


def share_model_facts(setting: Setting, trials: Sequence[Trial]) -> None:
    """Plans one trial, for what is learnt of the model, and lets the others find it."""
    setting.plan(trials[0])
    for trial in trials[1:]:
        own = setting.storage / f"trial-{trial.number}"
        own.mkdir(parents=True)
        (own / "cache").symlink_to(setting.storage / f"trial-{trials[0].number}" / "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("space", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--trials", type=int, help="the first N of the grid only")
    parser.add_argument("--storage", type=Path, required=True, help="a folder that is not there")
    options = parser.parse_intermixed_args()
    # Ray would make a trial's folder the working directory, and paths in a job are relative to this one.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    space, of_job = load_space(options.space, options.overrides)
    job = base_job(options.space, space)
    trials = grid_trials(space, of_job)[: options.trials]
    storage = options.storage.absolute()
    storage.mkdir(parents=True)
    setting = Setting(job, storage, os.cpu_count() or 1, (os.getcwd(), str(job.parent)))
    with contextlib.redirect_stdout(sys.stderr):
        share_model_facts(setting, trials)
        report = run_sweep(setting, trials)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
