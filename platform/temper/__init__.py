"""temper: trains networks well and cheaply on a Ray cluster.

The Python API is the command line without the command line:

    import temper

    job = temper.load_job("jobs/digits.yaml", ["optimizer.lr=1e-3"])
    plan = temper.plan(job)                     # what will happen, and what it costs; starts nothing
    result = temper.train(job)                  # trains it, resumes it, or finds it done
    print(plan.steps, result.metrics["test/accuracy"])
    best = temper.sweep("tune_spaces/dsd.yaml").best    # many trials of a job, nothing computed twice
    frame = temper.results()                    # what became of all of them: a row each, for pandas

Importing temper imports nothing else; each function imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

    from temper.config.schema import JobConfig
    from temper.launch.sweep.driver import SweepResult
    from temper.launch.train import TrainResult
    from temper.plan.build import Plan
    from temper.tracking.progress import DisplayMode

__all__ = ["load_job", "plan", "results", "sweep", "train"]
__version__ = "0.1.0"


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job of a YAML file, with `key=value` overrides applied, e.g. `["optimizer.lr=1e-3", "seed=1"]`.

    Raises:
        JobError: with every problem of the file and of the overrides.
    """
    from temper.config.load import load_job

    return load_job(path, overrides)


def plan(job: str | Path | JobConfig, overrides: Sequence[str] = ()) -> Plan:
    """What training `job`, a file or a loaded job, will do on this machine and what it costs. Starts nothing.

    A teacher is found, or planned in its turn. Data paths and `kind: python` targets are looked for in the working
    directory and beside the job file.

    Raises:
        JobError: with every problem that can be seen before the start.
    """
    from temper.config.load import resolve_job
    from temper.launch.teachers import plan_job
    from temper.plan.mesh import local_cluster

    resolved, folder = resolve_job(job, overrides)
    return plan_job(resolved, local_cluster(), folder)


def train(
    job: str | Path | JobConfig,
    overrides: Sequence[str] = (),
    address: str = "local",
    *,
    fresh: bool = False,
    display: DisplayMode = "plain",
) -> TrainResult:
    """Trains `job`, a file or a loaded job; reuses what is finished, resumes what was broken.

    `address` is where Ray is: `local` for one that lives as long as the call, `auto`, `HOST:PORT` or `ray://…`.
    `fresh` forgets what was computed for this job. `display` says how progress is shown on standard error.

    Raises:
        JobError: with every problem that can be seen before the start.
        RunError: the run failed; the message says where the log is.
        RunInterrupted: it was stopped by a signal; the state is saved, and the same call goes on from it.
    """
    from temper.config.load import resolve_job
    from temper.launch.cluster import check_address
    from temper.launch.train import TrainOptions, launch_train

    check_address(address)
    resolved, folder = resolve_job(job, overrides)
    name = resolved.name if not isinstance(job, str | Path) else str(job)
    call = f"temper.train({name!r}, {list(overrides)!r})"
    return launch_train(resolved, folder, TrainOptions(address, fresh, display, call))


def sweep(
    space: str | Path,
    overrides: Sequence[str] = (),
    address: str = "local",
    *,
    fresh: bool = False,
    display: DisplayMode = "plain",
) -> SweepResult:
    """Runs the trials of a space file, goes on with a sweep that was broken off, or finds it done.

    `overrides` are of the base job, or of the space where they begin with `sweep.`, e.g. `sweep.budget.trials=8`.
    `address` and `display` are those of `train`; `fresh` begins the sweep anew, and phases are reused all the same.

    Raises:
        JobError: with every problem of the space and of the jobs in it.
        RunError: no trial came to its end, or the sweep itself could not go on.
        RunInterrupted: it was stopped by a signal; every trial's state is saved, and the same call goes on from it.
    """
    from temper.config.space_load import load_space
    from temper.launch.cluster import check_address
    from temper.launch.sweep.driver import launch_sweep
    from temper.launch.train import TrainOptions

    check_address(address)
    config, others = load_space(space, overrides)
    call = f"temper.sweep({str(space)!r}, {list(overrides)!r})"
    return launch_sweep(config, Path(space), others, TrainOptions(address, fresh, display, call))


def results(
    experiment: str = "temper", *, storage: str | Path = "./runs", uri: str | None = None, sweep: str | None = None
) -> DataFrame:
    """What MLflow has of an experiment as a table for a notebook: a row for each trial of a sweep and for each run of
    `temper train`, in the order of the sweeps' starts and of the trials' ids.

    The columns are, in this order:

    - what a run is: `run_id`, `kind` (`trial` or `run`), `sweep` (the sweep's run id), `trial` (its id in the sweep),
      `name`, `status`, `started` (UTC), `seconds` from its start to its end, `steps` that it came to, of them
      `steps_saved` by reuse, `phases_reused`, `fingerprint`, and the `command` that repeats it;
    - a trial's value of each swept variable, under the variable's name;
    - the last value of each metric, e.g. `test/accuracy`, but those of the machines;
    - the job's parameters, e.g. `job.optimizer.lr`.

    What a run does not have is missing (NaN or None). `uri` is MLflow's store, by default that of runs in `storage`:
    MLFLOW_TRACKING_URI, or else the database in that folder. `sweep` is the run id of a sweep, of whichever experiment:
    then only its trials are in the table.

    Raises:
        JobError: there is no such experiment, sweep or database; the message names those that are there.
        RunError: the store cannot be reached.
    """
    from temper.storage import storage_folder
    from temper.tracking.mlflow_store import storage_uri
    from temper.tracking.results import read_results

    return read_results(storage_uri(storage_folder(str(storage)), uri), experiment, sweep)
