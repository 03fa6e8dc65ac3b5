"""Sweeps as users run them, for the tests of several files: the spaces, the command, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from temper.checkpoint import MASTER, CheckpointReader
from temper.launch.sweep.ledger import LedgerTrial, read_ledger
from temper.tracking.history import read_history

TARGETS = Path(__file__).parent / "targets"
PHASES = ("dense", "sparse-1", "redense-1")


def dsd_job(**sections: Any) -> dict[str, Any]:
    """24 steps in three phases, of one worker that shares a core."""
    return {
        "name": "tiny_dsd",
        "model": {"kind": "mlp", "hidden": [16]},
        "data": {"kind": "digits", "global_batch": 64, "holdout": 300},
        "optimizer": {"kind": "adamw", "lr": 1.0e-2},
        "parallel": {"workers": 1, "cpus_per_worker": 0.5},
        "budget": {"steps": 12, "evaluate_every": 4},
        "dsd": {"rounds": [{"sparsity": 0.5, "sparse_steps": 6, "redense_steps": 6}]},
        "storage": "runs",
        **sections,
    }


def slow_job(delay_s: float = 0.05, **sections: Any) -> dict[str, Any]:
    """40 steps that can be broken off in their midst, with dropout, batch norm, momentum and a schedule."""
    return dsd_job(
        name="slow_dsd",
        model={"kind": "python", "target": "slow_net:build", "args": {"delay_s": delay_s}},
        optimizer={"kind": "adamw", "lr": 3.0e-3, "schedule": {"kind": "cosine", "warmup_steps": 5}},
        budget={"steps": 20, "evaluate_every": 5, "checkpoint_every": 5},
        dsd={"rounds": [{"sparsity": 0.5, "sparse_steps": 10, "redense_steps": 10}]},
        **sections,
    )


def grid(*values: Any) -> dict[str, Any]:
    return {"kind": "grid", "values": list(values)}


def write_space(folder: Path, job: dict[str, Any], space: dict[str, Any], **sections: Any) -> Path:
    """A space file beside its job's file and the modules of `kind: python` models."""
    folder.mkdir(parents=True, exist_ok=True)
    for module in TARGETS.glob("*.py"):
        (folder / module.name).write_text(module.read_text())
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    whole = {
        "name": "little",
        "job": "job.yaml",
        "space": space,
        "objectives": [{"metric": "eval/accuracy", "mode": "max"}],
        "search": {"kind": "grid"},
        "concurrency": 2,
        **sections,
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def start(command: str, path: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "temper", command, path.name, "--json", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=path.parent, env=environment
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=400)
    lines = out.splitlines()
    return process.returncode, json.loads(lines[-1]) if lines else {}, err


def sweep(path: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The result of a sweep that has to come to its end, and what it said."""
    code, result, err = finish(start("sweep", path, *more))
    assert code == 0, err
    return result, err


def wait_until(process: subprocess.Popen[str], is_there: Callable[[], bool], what: str) -> None:
    """A bound on waiting, not on speed."""
    deadline = time.monotonic() + 240
    while not is_there():
        assert process.poll() is None, f"ended before {what}: {finish(process)}"
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


def ledger(folder: Path) -> list[LedgerTrial]:
    path = next((folder / "runs" / "sweeps").glob("*/trials.jsonl"), None)
    return [] if path is None else read_ledger(path)


def recorded_steps(folder: Path) -> int:
    """Steps in the histories of all phases."""
    return sum(len(read_history(path)) for path in (folder / "runs" / "phases").glob("*/history.jsonl"))


def processes_of(command: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """The command's actors of class `kind`, by their process titles, oldest first."""
    found = []
    for child in psutil.Process(command.pid).children(recursive=True):
        try:
            if f"ray::{kind}" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda child: child.pid)


# ------------------------------------------------------------------------------------------------------------- results


def by_params(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {json.dumps(trial["params"], sort_keys=True): trial for trial in result["trials"]}


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """Without what depends on the clock."""
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def check_same_trials(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same ids and params, the same end, and the same metrics of every phase bit for bit."""
    found, wanted = by_params(result), by_params(expected)
    assert found.keys() == wanted.keys()
    for key, trial in found.items():
        other = wanted[key]
        assert (trial["id"], trial["status"], trial["steps"]) == (other["id"], other["status"], other["steps"])
        assert measured(trial["metrics"]) == measured(other["metrics"])
        assert [phase_facts(phase) for phase in trial["phases"]] == [phase_facts(phase) for phase in other["phases"]]
    assert (result["best"]["id"], result["best"]["params"]) == (expected["best"]["id"], expected["best"]["params"])


def phase_facts(phase: dict[str, Any]) -> tuple[Any, ...]:
    """What of a phase does not depend on who computed it, and when."""
    return phase["name"], phase["fingerprint"], phase["steps"], measured(phase["metrics"])


def distinct_phases(trials: Iterable[dict[str, Any]]) -> set[str]:
    return {phase["fingerprint"] for trial in trials for phase in trial["phases"]}


def trained_state(storage: Path, fingerprint: str) -> dict[str, torch.Tensor]:
    """The masters, moments and masks at the end of a stored phase."""
    folder = storage / "phases" / fingerprint
    reader = CheckpointReader(folder / json.loads((folder / "phase.json").read_text())["checkpoint"])
    kinds = (MASTER, *reader.moments())
    return {f"{kind}/{name}": reader.full(kind, name) for kind in kinds for name in reader.names(kind)}


# -------------------------------------------------------------------------------------------------------------- MLflow


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")


def all_runs(folder: Path) -> list[Any]:
    client = client_of(folder)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=1000))


def children_of(folder: Path, parent: str) -> list[Any]:
    return [run for run in all_runs(folder) if run.data.tags.get("mlflow.parentRunId") == parent]


def points(folder: Path, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(folder).get_metric_history(run_id, metric)]


def check_tree(folder: Path, result: dict[str, Any], *others: str) -> None:
    """One finished parent; a finished child for each trial and for each of the `others` (`temper.kind`), whose losses
    are there for every step once."""
    parents = [run for run in all_runs(folder) if run.data.tags.get("temper.kind") == "sweep"]
    assert [run.info.run_id for run in parents] == [result["parent_run_id"]]
    assert parents[0].info.status == "FINISHED"
    children = children_of(folder, result["parent_run_id"])
    kinds = sorted(run.data.tags["temper.kind"] for run in children)
    assert kinds == sorted([*others, *(["trial"] * len(result["trials"]))])
    assert {run.info.status for run in children} == {"FINISHED"}
    runs = {run.data.tags["temper.trial"]: run for run in children if run.data.tags["temper.kind"] == "trial"}
    assert {id: run.info.run_id for id, run in runs.items()} == {t["id"]: t["run_id"] for t in result["trials"]}
    for trial in result["trials"]:
        losses = points(folder, trial["run_id"], "train/loss")
        assert [step for step, _ in losses] == list(range(1, trial["steps"] + 1))
