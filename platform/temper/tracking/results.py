"""What is in MLflow of runs and sweeps: read back as plain rows, and as a table for a notebook.

All runs come by MLflow's search, page by page, and none is asked for alone, so that a thousand trials take seconds. As
in :mod:`mlflow_store`, mlflow is imported only inside functions; so is pandas.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.config.space import Objective
from temper.errors import JobError, Problem, RunError, TemperError
from temper.tracking.description import metric_name, told_phases
from temper.tracking.mlflow_store import build_client, first_line
from temper.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from pandas import DataFrame

Curve = list[tuple[int, float]]
"""A metric's points: step and value, in the order of the steps."""

JOB_RUNS = ("run", "trial", "shared", "teacher")
"""The kinds of runs that are of a job each (`temper.kind`)."""

_SWEPT = "sweep."  # what the names of the parameters begin with that hold a trial's swept values
_PAGE = 250  # runs; a server answers for so many within the time limit of a request
_SUGGESTED = 10
_IDENTITY = (
    "run_id",
    "kind",
    "sweep",
    "trial",
    "name",
    "status",
    "started",
    "seconds",
    "steps",
    "steps_saved",
    "phases_reused",
    "fingerprint",
    "command",
)


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """A phase of a run that has begun, or is reused. `computed_by` is the MLflow run of the job that computed it, empty
    where that is unknown or its own; `run_id` is the phase's run. Of a run with very many phases these two, the kinds
    and the times are not told. Times are milliseconds since 1970, 0 for none."""

    name: str
    kind: str = ""
    fingerprint: str
    first_step: int
    steps: int
    reused: bool
    computed_by: str = ""
    seconds: float
    started_ms: int = 0
    ended_ms: int = 0
    run_id: str = ""
    complete: bool


@dataclass(frozen=True)
class RunRow:
    """A run in MLflow. `swept` are a trial's values by variable; `metrics` the latest ones; `step` the last that any of
    them has, those of the machine aside; `status` is MLflow's; `parent` and `ended_ms` may be empty and 0."""

    run_id: str
    name: str
    kind: str
    parent: str
    status: str
    started_ms: int
    ended_ms: int
    step: int
    swept: Mapping[str, Any]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    phases: tuple[PhaseRow, ...]

    @property
    def trial(self) -> str:
        """The trial's id, e.g. `t007`; empty for what is no trial."""
        return self.tags.get("temper.trial", "")

    @property
    def outcome(self) -> str:
        """What became of it: `finished`, `stopped`, `failed`, `diverged`, `interrupted`, or `running`, `killed`."""
        return self.tags.get("temper.trial.status") or self.status.lower()

    @property
    def seconds(self) -> float:
        """From its start to its end; NaN while it runs."""
        return (self.ended_ms - self.started_ms) / 1000 if self.ended_ms else math.nan


@dataclass(frozen=True)
class Sweep:
    """A sweep: its own run, its trials in the order of their ids, and the `others`: what its trials share, and
    teachers."""

    parent: RunRow
    objectives: tuple[Objective, ...]
    trials: tuple[RunRow, ...]
    others: tuple[RunRow, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        """What is swept."""
        return tuple(sorted({name for trial in self.trials for name in trial.swept}))

    @property
    def finished(self) -> list[RunRow]:
        """The trials that were trained to their end."""
        return [trial for trial in self.trials if trial.outcome == "finished"]


# ------------------------------------------------------------------------------------------------------------- reading


def read_experiment(uri: str, experiment: str) -> list[RunRow]:
    """The job runs and sweeps of an experiment of the store at `uri`, the oldest first.

    Raises JobError where there is no such experiment, and RunError where the store cannot be reached.
    """
    with _reading(uri) as client:
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage == "deleted":
            known = [each.name for each in client.search_experiments(max_results=1000)]
            rule = f"is no experiment in MLflow at {redact_text(uri)}"
            raise JobError([Problem("experiment", experiment, rule, f"use one of {', '.join(sorted(known))}")])
        runs = _search(client, [found.experiment_id], "tags.`temper.kind` != 'phase'")
    return [row for row in map(_row, runs) if row.kind in (*JOB_RUNS, "sweep")]


def read_sweep(uri: str, run_id: str) -> Sweep:
    """The sweep whose own run is `run_id`, from the store at `uri`.

    Raises JobError where that is no sweep, and RunError where the store cannot be reached.
    """
    with _reading(uri) as client:
        run = _find_run(client, run_id)
        if run is None or run.data.tags.get("temper.kind") != "sweep":
            rule = f"is not the run of a sweep in MLflow at {redact_text(uri)}"
            raise JobError([Problem("sweep", run_id, rule, _known_sweeps(client))])
        condition = f"tags.`mlflow.parentRunId` = '{run_id}'"
        children = [_row(child) for child in _search(client, [run.info.experiment_id], condition)]
    objectives = json.loads(run.data.tags.get("temper.objectives", "[]"))
    return Sweep(
        parent=_row(run),
        objectives=tuple(Objective(metric=metric_name(each["metric"]), mode=each["mode"]) for each in objectives),
        trials=tuple(sorted((row for row in children if row.kind == "trial"), key=_trial_order)),
        others=tuple(row for row in children if row.kind in JOB_RUNS and row.kind != "trial"),
    )


def read_curves(uri: str, run_ids: Sequence[str], metric: str) -> dict[str, Curve]:
    """All points of a metric of each of the runs, which should be few: each is a request of its own.

    Raises RunError where the store cannot be reached.
    """
    with _reading(uri) as client:
        histories = {run_id: client.get_metric_history(run_id, metric) for run_id in run_ids}
    return {run_id: sorted((each.step, each.value) for each in points) for run_id, points in histories.items()}


def _find_run(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the latter: not an id at all
            return None
        raise


def _known_sweeps(client: MlflowClient) -> str:
    """The newest ones, as a remedy."""
    experiments = [each.experiment_id for each in client.search_experiments(max_results=1000)]
    runs = client.search_runs(experiments, "tags.`temper.kind` = 'sweep'", max_results=_SUGGESTED)
    named = [f"{run.info.run_id} ({run.info.run_name})" for run in runs]
    return f"use one of {', '.join(named)}" if named else "there is none yet: run `temper sweep`"


def _search(client: MlflowClient, experiments: list[str], condition: str) -> list[Run]:
    """The oldest first, so that runs that begin meanwhile move none from one page to another."""
    runs: list[Run] = []
    token = None
    while True:
        order = ["attributes.start_time ASC"]
        page = client.search_runs(experiments, condition, max_results=_PAGE, order_by=order, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


@contextmanager
def _reading(uri: str) -> Iterator[MlflowClient]:
    """A client of a store that is there; whatever it raises becomes a RunError. A database that is not there is not
    made."""
    if uri.startswith("sqlite:///") and "?" not in uri and not Path(uri.removeprefix("sqlite:///")).exists():
        rule = "is not there: nothing has been tracked in it yet"
        remedy = "give the storage that the runs are in, or the store's own URI"
        raise JobError([Problem("uri", redact_text(uri), rule, remedy)])
    try:
        with _no_collection():
            yield build_client(uri)
    except TemperError:
        raise
    except Exception as error:  # which one depends on the store: MlflowException, sqlalchemy's, requests', OSError
        raise RunError(f"MLflow at {redact_text(uri)}: {first_line(error)}") from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """MLflow makes an object of each metric, parameter and tag; searching them all for cycles again and again, of which
    they have none, would take as long as reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _row(run: Run) -> RunRow:
    params, tags = run.data.params, run.data.tags
    points = [metric for metric in run.data._metric_objs if not metric.key.startswith("system/")]
    return RunRow(
        run_id=run.info.run_id,
        name=run.info.run_name,
        kind=tags.get("temper.kind", ""),
        parent=tags.get("mlflow.parentRunId", ""),
        status=run.info.status,
        started_ms=run.info.start_time,
        ended_ms=run.info.end_time or 0,
        step=max((metric.step for metric in points), default=0),
        swept={name.removeprefix(_SWEPT): parse_value(params[name]) for name in params if name.startswith(_SWEPT)},
        params=params,
        metrics=run.data.metrics,
        tags=tags,
        phases=tuple(map(_phase, told_phases(tags))),
    )


def _phase(values: Mapping[str, Any]) -> PhaseRow:
    return PhaseRow(**{field.name: values[field.name] for field in fields(PhaseRow) if field.name in values})


@lru_cache(maxsize=100_000)
def parse_value(text: str) -> Any:
    """A parameter's value as it was before it became text: a number, truth value, None, a list as a tuple, or else the
    text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return _hashable(value, text)


def _hashable(value: Any, text: str) -> Any:
    if isinstance(value, list):
        return tuple(_hashable(each, json.dumps(each)) for each in value)
    return text if isinstance(value, dict | str) else value


def _trial_order(row: RunRow) -> tuple[int, str]:
    """t999 before t1000."""
    return len(row.trial), row.trial


# ------------------------------------------------------------------------------------------------------------ the table


def read_results(uri: str, experiment: str, sweep: str | None = None) -> DataFrame:
    """The table that :func:`temper.results` gives, from the store at `uri`."""
    if sweep is None:
        return results_table(read_experiment(uri, experiment))
    found = read_sweep(uri, sweep)
    return results_table([found.parent, *found.trials])


def results_table(rows: Iterable[RunRow]) -> DataFrame:
    """A row for each trial and each run of `temper train` among `rows`, in the order of the sweeps' starts."""
    import pandas as pd

    known = {row.run_id: row for row in rows}
    shown = [row for row in known.values() if row.kind in ("trial", "run")]

    def order(row: RunRow) -> tuple[Any, ...]:
        return known.get(row.parent, row).started_ms, row.parent or row.run_id, *_trial_order(row), row.run_id

    table = _table([_values(row) for row in sorted(shown, key=order)])
    frame = pd.DataFrame(table)
    frame["started"] = pd.to_datetime(frame["started"], unit="ms", utc=True)
    return frame


def _table(rows: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, list[Any]]:
    """Columns: what a run is, what was swept, its metrics, its job; the names in each sorted, but for the first."""
    columns: dict[str, list[Any]] = {name: [row["identity"][name] for row in rows] for name in _IDENTITY}
    for group in ("swept", "metrics", "job"):
        for name in sorted({name for row in rows for name in row[group]}):
            column = name if name not in columns else f"{_SWEPT}{name}"
            columns[column] = [row[group].get(name) for row in rows]
    return columns


def _values(row: RunRow) -> dict[str, Mapping[str, Any]]:
    reused = [phase for phase in row.phases if phase.reused]
    identity = {
        "run_id": row.run_id,
        "kind": row.kind,
        "sweep": row.parent,
        "trial": row.trial,
        "name": row.name,
        "status": row.outcome,
        "started": row.started_ms,
        "seconds": row.seconds,
        "steps": row.step,
        "steps_saved": sum(phase.steps for phase in reused),
        "phases_reused": len(reused),
        "fingerprint": row.tags.get("temper.fingerprint", ""),
        "command": row.tags.get("temper.command", ""),
    }
    return {
        "identity": identity,
        "swept": row.swept,
        "metrics": {name: value for name, value in row.metrics.items() if not name.startswith("system/")},
        "job": {f"job.{name}": parse_value(text) for name, text in row.params.items() if not name.startswith(_SWEPT)},
    }
