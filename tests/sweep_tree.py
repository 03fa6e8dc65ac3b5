"""A sweep as `temper sweep` leaves it in MLflow, of made-up numbers: for tests and measurements of what reads it.

The rows go straight into the tables of MLflow's SQLite store, because a thousand trials with three phases each would
take minutes through its client.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from temper.tracking.mlflow_store import build_client

METRIC, MODE = "eval/accuracy", "max"
STEPS = {"dense": 200, "sparse-1": 100, "redense-1": 100}
KINDS = {"dense": "dense", "sparse-1": "sparse", "redense-1": "redense"}
BEGAN_MS = 1_760_000_000_000
STEP_MS = 20
EXAMPLES = 64  # a step
LAYERS = tuple(f"layer{block}.{index}.conv{number}" for block in (1, 2) for index in (0, 1) for number in (1, 2))
CLASSES = 10

_ENDS = {7: "failed", 12: "diverged", 15: "stopped", 18: "interrupted"}
"""By the last part of a trial's number (of twenty): how it ends, if it does not finish."""
_REASONS = {
    "failed": "RuntimeError: <b>out of memory</b> & more",
    "diverged": "train/loss is not finite at step 130",
    "stopped": "rung 1 of 2: not among the best third",
    "interrupted": "",
}
_RUN_STATUS = {"failed": "FAILED", "diverged": "FAILED", "interrupted": "KILLED"}
_LAST_PHASE = {"failed": "sparse-1", "diverged": "sparse-1", "stopped": "sparse-1", "interrupted": "dense"}


@dataclass
class _Run:
    """A row of each table that a run has rows in; `points` are (name, step, value)."""

    id: str
    name: str
    status: str
    start_ms: int
    end_ms: int
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: list[tuple[str, int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class MadeSweep:
    """What is swept: each combination of `seeds`, `temperatures` and `sparsities` is a trial, in this order. Each phase
    has `points` points of each metric. Equal ones have the same ids and values."""

    temperatures: Sequence[float] = (1.0, 2.0, 4.0)
    sparsities: Sequence[float] = (0.5, 0.7, 0.9)
    seeds: Sequence[int] = (0, 1)
    name: str = "temperature_sparsity"
    objectives: Sequence[tuple[str, str]] = ((METRIC, MODE),)
    points: int = 10
    began_ms: int = BEGAN_MS

    @property
    def id(self) -> str:
        """Of its own run in MLflow."""
        return run_id(self.name)

    def trials(self) -> list[dict[str, Any]]:
        return [
            {"distill.temperature": temperature, "dsd.rounds.0.sparsity": sparsity, "seed": seed}
            for seed, temperature, sparsity in itertools.product(self.seeds, self.temperatures, self.sparsities)
        ]


def write_sweep(database: Path, sweep: MadeSweep, experiment: str = "temper") -> None:
    """Writes the sweep into the store at `database`, which is made where it is not there.

    A phase `dense` depends on temperature and seed only: one trial of those that share it computes it, and the others
    reuse it. Of twenty trials one each fails, diverges, is stopped and is interrupted.
    """
    client = build_client(f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    artifacts = str(database.parent / "artifacts")
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, artifacts)
    runs = list(_tree(sweep))
    _insert(client._tracking_client.store.engine, int(experiment_id), f"{artifacts}/{experiment_id}", runs)


def run_id(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------ the tree


def _tree(sweep: MadeSweep) -> Iterable[_Run]:
    began_ms = sweep.began_ms
    teacher = _Run(run_id(sweep.name, "teacher"), "teacher digits", "FINISHED", began_ms, began_ms + 9_000, {})
    teacher.tags = _tags("teacher", teacher.name, sweep.id) | {"temper.phases": "[]", "temper.job": "digits"}
    teacher.points = [("test/accuracy", 300, 0.98), *_costs(9.0, 300, 0.0, 0)]
    computed: dict[tuple[float, int], tuple[str, int]] = {}
    trials = [_trial(sweep, index, params, computed) for index, params in enumerate(sweep.trials())]
    yield _parent(sweep, [trial for trial, _ in trials])
    yield teacher
    for trial, phases in trials:
        yield trial
        yield from phases


def _parent(sweep: MadeSweep, trials: Sequence[_Run]) -> _Run:
    (metric, mode), name = sweep.objectives[0], sweep.name
    ended = [trial for trial in trials if trial.tags["temper.trial.status"] == "finished"]
    values = {trial.id: _last(trial, metric) for trial in ended}
    best = (max if mode == "max" else min)(ended, key=lambda trial: values[trial.id])
    phases = [phase for trial in trials for phase in json.loads(trial.tags["temper.phases"])]
    reused = sum(phase["reused"] for phase in phases)
    tags = _tags("sweep", name) | {
        "temper.command": f"temper sweep tune_spaces/{name}.yaml",
        "temper.objectives": json.dumps([{"metric": each, "mode": how} for each, how in sweep.objectives]),
        "temper.best.trial": best.tags["temper.trial"],
        "temper.best.run_id": best.id,
        "temper.best.overrides": best.tags["temper.command"].partition(".yaml ")[2],
        "temper.best.command": best.tags["temper.command"],
        "temper.best.registered": f"models:/{name}/1",
    }
    params = {
        "space.distill.temperature": f"grid {json.dumps(list(sweep.temperatures))}",
        "space.dsd.rounds.0.sparsity": f"grid {json.dumps(list(sweep.sparsities))}",
        "space.seed": f"grid {json.dumps(list(sweep.seeds))}",
        "search": "grid",
        "scheduler": "asha, reduction_factor 3",
    }
    end_ms = max(trial.end_ms for trial in trials) + 1_000
    run = _Run(sweep.id, name, "FINISHED", sweep.began_ms, end_ms, tags, params)
    run.points = [
        ("sweep/trials", 0, float(len(trials))),
        ("sweep/phases_run", 0, float(len(phases) - reused)),
        ("sweep/phases_reused", 0, float(reused)),
        ("sweep/steps_run", 0, sum(_last(trial, "cost/steps") for trial in trials)),
        ("sweep/steps_saved", 0, sum(_last(trial, "cost/steps_saved") for trial in trials)),
        ("sweep/seconds", 0, (run.end_ms - run.start_ms) / 1000),
        (f"best/{metric}", 0, values[best.id]),
    ]
    return run


def _trial(
    sweep: MadeSweep, index: int, params: Mapping[str, Any], computed: dict[tuple[float, int], tuple[str, int]]
) -> tuple[_Run, list[_Run]]:
    """The run of a trial, with those of its phases. `computed` are the dense phases so far: by whom, and when."""
    name, trial, id = sweep.name, f"t{index:03d}", run_id(sweep.name, index)
    status = _ENDS.get(index % 20, "finished")
    begin_ms = sweep.began_ms + 10_000 + (index // 4) * 9_000 + (index % 4) * 50
    rng = random.Random(f"{name}/{index}")
    phases, runs, now_ms, first = [], [], begin_ms, 0
    shared = (params["distill.temperature"], params["seed"])
    for phase, steps in STEPS.items():
        reused = phase == "dense" and shared in computed
        by, start_ms = computed[shared] if reused else (id, now_ms)
        if phase == "dense" and not reused:
            computed[shared] = (id, now_ms)
        is_last = phase == _LAST_PHASE.get(status)
        done = steps // 2 if is_last else steps
        end_ms = start_ms + done * STEP_MS
        phases.append(
            {
                "name": phase,
                "kind": KINDS[phase],
                "fingerprint": run_id(phase, params["seed"], *([] if phase == "dense" else params.values())) * 2,
                "first_step": first,
                "steps": steps,
                "reused": reused,
                "computed_by": by if reused else "",
                "seconds": done * STEP_MS / 1000,
                "started_ms": start_ms,
                "ended_ms": end_ms,
                "run_id": run_id(name, index, phase),
                "complete": not is_last,
            }
        )
        runs.append(_phase(phases[-1], id, done, sweep.points, params, rng))
        now_ms = max(now_ms, end_ms)
        first += steps
        if is_last:
            break
    run = _Run(id, trial, _RUN_STATUS.get(status, "FINISHED"), begin_ms, now_ms + 500, {})
    overrides = " ".join(f"{key}={value}" for key, value in params.items())
    run.tags = _tags("trial", trial, sweep.id) | {
        "temper.job": "digits_student_dsd",
        "temper.fingerprint": phases[-1]["fingerprint"],
        "temper.command": f"temper train jobs/digits_student_dsd.yaml {overrides}",
        "temper.storage": "runs",
        "temper.run_folder": f"sweeps/{name}/trials/{trial}",
        "temper.trial": trial,
        "temper.trial.status": status,
        "temper.trial.reason": _REASONS.get(status, ""),
        "temper.phases": json.dumps(phases),
    }
    run.params = {f"sweep.{key}": json.dumps(value) for key, value in params.items()} | _job_params(params)
    own = [phase for phase in phases if not phase["reused"]]
    saved = [phase for phase in phases if phase["reused"]]
    steps_run = round(sum(phase["seconds"] for phase in own) * 1000 / STEP_MS)
    run.points = [point for each in runs for point in each.points if not point[0].startswith("cost/")]
    run.points += _system(rng)
    run.points += _costs(
        sum(phase["seconds"] for phase in own), steps_run, sum(p["seconds"] for p in saved), len(saved) * STEPS["dense"]
    )
    run.points.append(("parameters_left", 0, 11_000_000 * (1 - params["dsd.rounds.0.sparsity"])))
    return run, runs


def _phase(
    phase: Mapping[str, Any], parent_id: str, done: int, points: int, params: Mapping[str, Any], rng: random.Random
) -> _Run:
    is_reused = phase["reused"]
    run = _Run(phase["run_id"], phase["name"], "FINISHED", phase["started_ms"], phase["ended_ms"], {})
    run.tags = _tags("phase", phase["name"], parent_id) | {
        "temper.phase": phase["name"],
        "temper.phase.kind": phase["kind"],
        "temper.fingerprint": phase["fingerprint"],
        "temper.reused": str(is_reused).lower(),
        "temper.computed_by": phase["computed_by"] or parent_id,
    }
    sparsity = params["dsd.rounds.0.sparsity"] if phase["kind"] == "sparse" else 0.0
    for index in range(1, points + 1):
        step = phase["first_step"] + done * index // points
        accuracy = _accuracy(step, params) + rng.gauss(0, 0.002)
        run.points += [
            ("train/loss", step, 2.3 * math.exp(-step / 120) + rng.random() * 0.05),
            ("train/loss/soft", step, 1.3 * math.exp(-step / 120)),
            ("train/lr", step, 0.1 * (1 - step / 500)),
            ("train/grad_norm", step, 1 + rng.random()),
            ("precision/loss_scale", step, 65536.0),
            ("time/step_s", step, STEP_MS / 1000),
            ("time/examples_per_s", step, EXAMPLES * 1000 / STEP_MS),
            ("sparsity", step, sparsity),
            ("eval/accuracy", step, accuracy),
            ("eval/loss", step, 1 - accuracy),
        ]
    last = phase["first_step"] + done
    accuracy = _accuracy(last, params) + rng.gauss(0, 0.004)
    run.points += [("test/accuracy", last, accuracy), ("test/loss", last, 1 - accuracy)]
    run.points += [(f"test/class_accuracy/{each}", last, accuracy - each / 1000) for each in range(CLASSES)]
    run.points += [(f"sparsity/{layer}", last, sparsity) for layer in LAYERS]
    run.points += [("cost/seconds", last, phase["seconds"]), ("cost/steps", last, float(done))]
    return run


def _accuracy(step: int, params: Mapping[str, Any]) -> float:
    """A landscape with its top at temperature 4 and sparsity 0.7."""
    off = abs(math.log2(params["distill.temperature"] / 4)) * 0.008 + abs(params["dsd.rounds.0.sparsity"] - 0.7) * 0.05
    return 0.98 - off - 0.5 * math.exp(-step / 80)


def _tags(kind: str, name: str, parent_id: str = "") -> dict[str, str]:
    known = {"temper.kind": kind, "mlflow.runName": name, "temper.version": "0.1.0", "mlflow.source.name": "temper"}
    return known | ({"mlflow.parentRunId": parent_id} if parent_id else {})


def _job_params(params: Mapping[str, Any]) -> dict[str, str]:
    """As many as a real job has."""
    job = {"name": "digits_student_dsd", "model.kind": "torchvision", "model.hidden": "[16]", "optimizer.lr": 0.01}
    job |= {f"section{index % 7}.key{index}": index / 8 for index in range(70)} | {"budget.steps": 200, **params}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in job.items()}


def _system(rng: random.Random) -> list[tuple[str, int, float]]:
    names = ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_megabytes", "network_receive")
    return [(f"system/node-0/{name}", step, rng.random() * 100) for name in names for step in range(3)]


def _costs(seconds: float, steps: int, seconds_saved: float, steps_saved: int) -> list[tuple[str, int, float]]:
    values = {"seconds": seconds, "steps": steps, "examples": steps * EXAMPLES}
    saved = {"seconds_saved": seconds_saved, "steps_saved": steps_saved, "examples_saved": steps_saved * EXAMPLES}
    return [(f"cost/{name}", 0, float(value)) for name, value in {**values, **saved}.items()]


def _last(run: _Run, metric: str) -> float:
    return [value for name, _, value in run.points if name == metric][-1]


# ----------------------------------------------------------------------------------------------------------- the store


def _insert(engine: Any, experiment_id: int, artifacts: str, runs: Sequence[_Run]) -> None:
    from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
    from sqlalchemy import insert

    with engine.begin() as connection:
        for table, rows in (
            (SqlRun, [_run_row(run, experiment_id, artifacts) for run in runs]),
            (
                SqlTag,
                [{"run_uuid": run.id, "key": key, "value": value} for run in runs for key, value in run.tags.items()],
            ),
            (SqlParam, [{"run_uuid": run.id, "key": k, "value": v} for run in runs for k, v in run.params.items()]),
            (SqlMetric, [row for run in runs for row in _metric_rows(run)]),
            (SqlLatestMetric, [row for run in runs for row in {row["key"]: row for row in _metric_rows(run)}.values()]),
        ):
            connection.execute(insert(table), rows)


def _run_row(run: _Run, experiment_id: int, artifacts: str) -> dict[str, Any]:
    from mlflow.entities import RunStatus

    return {
        "run_uuid": run.id,
        "name": run.name,
        "source_type": "LOCAL",
        "user_id": "",
        "status": RunStatus.to_string(RunStatus.from_string(run.status)),
        "start_time": run.start_ms,
        "end_time": run.end_ms,
        "lifecycle_stage": "active",
        "experiment_id": experiment_id,
        "artifact_uri": f"{artifacts}/{run.id}/artifacts",
    }


def _metric_rows(run: _Run) -> list[dict[str, Any]]:
    return [
        {
            "run_uuid": run.id,
            "key": name,
            "value": value,
            "timestamp": run.start_ms + step * STEP_MS,
            "step": step,
            "is_nan": False,
        }
        for name, step, value in run.points
    ]
