"""The real thing: the command line, an embedded Ray, DeepSpeed workers, an MLflow database, killed processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from temper.checkpoint import MASTER, CheckpointReader
from temper.tracking.history import read_history

pytestmark = pytest.mark.ray

TARGETS = Path(__file__).parent / "targets"
STEPS = 90
SEED = int(os.environ.get("TEMPER_CHAOS_SEED", "0"))


def job(storage: Path, **sections: Any) -> dict[str, Any]:
    """A job of a few seconds, with momentum, dropout, batch norm, augmentation and a schedule: all that has state."""
    return {
        "name": "digits_e2e",
        "model": {"kind": "python", "target": "slow_net:build", "args": {"delay_s": 0.05}},
        "data": {
            "kind": "digits",
            "global_batch": 32,
            "augment": [{"kind": "random_affine", "degrees": 5.0, "translate": 0.1}],
        },
        "optimizer": {"kind": "adamw", "lr": 3.0e-3, "schedule": {"kind": "cosine", "warmup_steps": 5}},
        "parallel": {"workers": 2, "zero": 2, "cpus_per_worker": 0.5},
        "budget": {"steps": STEPS, "evaluate_every": 30, "checkpoint_every": 10},
        "storage": str(storage),
        **sections,
    }


def write_job(folder: Path, **sections: Any) -> Path:
    """A job file beside the module that its model comes from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slow_net.py").write_text((TARGETS / "slow_net.py").read_text())
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job(folder / "runs", **sections)))
    return path


def start(path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "temper", "train", str(path), "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=path.parent)


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=300)
    lines = out.splitlines()
    return process.returncode, json.loads(lines[-1]) if lines else {}, err


def history_of(folder: Path) -> Path | None:
    return next(iter((folder / "runs" / "phases").glob("*/history.jsonl")), None)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until a record of `step` is in the history; a bound on waiting, not on speed."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended early: {finish(process)}"
        path = history_of(folder)
        if path is not None and any(record["step"] >= step for record in read_history(path)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda child: child.pid)


def final_state(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(Path(result["checkpoint"]))
    kinds = (MASTER, *reader.moments())
    return {f"{kind}/{name}": reader.full(kind, name) for kind in kinds for name in reader.names(kind)}


def mlflow_points(folder: Path, run_id: str, metric: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def mlflow_run(folder: Path, run_id: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").get_run(run_id)


def mlflow_runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiments = [item.experiment_id for item in client.search_experiments()]
    return list(client.search_runs(experiments, "tags.`temper.kind` != 'phase'"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    folder = tmp_path_factory.mktemp("unbroken")
    code, result, err = finish(start(write_job(folder)))
    assert code == 0, err
    yield folder, result, err


def check_same(folder: Path, result: dict[str, Any], unbroken: tuple[Path, dict[str, Any], str]) -> None:
    """The same weights and moments bit for bit; in MLflow one run with each step once, and the same losses."""
    expected, found = final_state(unbroken[1]), final_state(result)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert len(mlflow_runs(folder)) == 1
    assert mlflow_run(folder, result["run_id"]).info.status == "FINISHED"
    points = mlflow_points(folder, result["run_id"], "train/loss")
    assert [step for step, _ in points] == list(range(1, STEPS + 1))
    assert points == mlflow_points(unbroken[0], unbroken[1]["run_id"], "train/loss")
    assert result["metrics"]["test/accuracy"] == unbroken[1]["metrics"]["test/accuracy"]


def test_result_and_tracking_of_a_run(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, err = unbroken
    assert result["status"] == "finished"
    assert result["phases"][0]["steps"] == STEPS
    assert not result["phases"][0]["reused"]
    assert result["metrics"]["test/accuracy"] > 0.5
    run = mlflow_run(folder, result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.003"
    assert run.data.tags["temper.fingerprint"] == result["phases"][0]["fingerprint"]
    points = mlflow_points(folder, result["run_id"], "train/loss")
    assert [step for step, _ in points] == list(range(1, STEPS + 1))
    assert [step for step, _ in mlflow_points(folder, result["run_id"], "eval/accuracy")] == [30, 60, 90]
    artifacts = {path.name for path in (folder / "runs" / "artifacts").rglob("*") if path.is_file()}
    assert {"job.yaml", "plan.json", "environment.txt"} <= artifacts
    run_folder = next(iter((folder / "runs").glob("digits_e2e-*")))
    assert {"job.yaml", "plan.json", "run.json", "stages.jsonl", "logs"} <= {path.name for path in run_folder.iterdir()}
    kept = sorted(path.name for path in Path(result["checkpoint"]).parent.iterdir())
    assert kept == ["step-00000080", "step-00000090"]
    # The noise of Ray, Train and DeepSpeed is in the logs, not here.
    noise = ("ray.train", "deepspeed", "INFO", "WARNING", "Traceback", "UserWarning", "(pid=")
    assert not [line for line in err.splitlines() if any(word in line for word in noise)]


def test_the_same_job_again_is_reused(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = unbroken
    code, again, err = finish(start(folder / "job.yaml"))
    assert code == 0, err
    assert again["status"] == "reused"
    assert again["phases"][0]["reused"]
    assert again["checkpoint"] == result["checkpoint"]
    assert again["metrics"] == result["metrics"]
    assert len(mlflow_runs(folder)) == 1


def test_eval_and_export_of_the_run(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = unbroken
    base = [sys.executable, "-m", "temper"]
    found = subprocess.run(
        [*base, "eval", result["run_id"], "--storage", "runs", "--json"], cwd=folder, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    metrics = json.loads(found.stdout.splitlines()[-1])["metrics"]
    assert metrics["test/accuracy"] == pytest.approx(result["metrics"]["test/accuracy"], abs=1e-6)
    done = subprocess.run(
        [*base, "export", result["checkpoint"], "--to", "out"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "out").iterdir()} == {"model.safetensors", "job.yaml", "README.md"}
    # In plain PyTorch, by the user's own module: strictly the model's own names.
    script = (
        "import sys, torch; from safetensors.torch import load_file; from slow_net import build\n"
        "model = build(0.0); model.load_state_dict(load_file('out/model.safetensors')); model.eval()\n"
        "print(tuple(model(torch.zeros(3, 1, 8, 8)).shape)); assert 'temper' not in sys.modules"
    )
    plain = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert plain.stdout.strip() == "(3, 10)", plain.stderr
    exported = load_file(folder / "out" / "model.safetensors")
    state = final_state(result)
    assert torch.equal(exported["head.weight"], state[f"{MASTER}/head.weight"])


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path: Path, unbroken: tuple[Path, dict[str, Any], str]) -> None:
    process = start(write_job(tmp_path))
    wait_for_step(process, tmp_path, random.Random(SEED).randint(15, 60))
    victim = random.Random(SEED).choice(workers_of(process))
    os.kill(victim.pid, signal.SIGKILL)
    code, result, err = finish(process)
    assert code == 0, err
    stages = (next((tmp_path / "runs").glob("digits_e2e-*")) / "stages.jsonl").read_text()
    assert "training from step" in stages
    check_same(tmp_path, result, unbroken)


@pytest.mark.slow
def test_a_killed_driver_is_resumed(tmp_path: Path, unbroken: tuple[Path, dict[str, Any], str]) -> None:
    path = write_job(tmp_path)
    process = start(path)
    wait_for_step(process, tmp_path, random.Random(SEED + 1).randint(15, 60))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    code, result, err = finish(start(path))
    assert code == 0, err
    assert "training from step" in err
    check_same(tmp_path, result, unbroken)


@pytest.mark.slow
def test_an_interrupted_run_saves_and_goes_on_past_a_damaged_checkpoint(
    tmp_path: Path, unbroken: tuple[Path, dict[str, Any], str]
) -> None:
    path = write_job(tmp_path)
    process = start(path)
    wait_for_step(process, tmp_path, 12)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    checkpoints = next((tmp_path / "runs" / "phases").glob("*/checkpoints"))
    newest = max(folder for folder in checkpoints.iterdir() if (folder / "manifest.json").is_file())
    run_id = json.loads((next((tmp_path / "runs").glob("digits_e2e-*")) / "run.json").read_text())["run_id"]
    assert mlflow_run(tmp_path, run_id).info.status == "KILLED"
    damaged = newest / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    code, result, err = finish(start(path))
    assert code == 0, err
    assert f"refused {newest.name}" in err
    assert str(damaged) in err
    check_same(tmp_path, result, unbroken)


@pytest.mark.slow
def test_a_broken_model_fails_at_once_with_its_own_error(tmp_path: Path) -> None:
    path = write_job(tmp_path, model={"kind": "python", "target": "slow_net:build_broken"})
    code, result, err = finish(start(path))
    assert code == 1
    assert result["status"] == "failed"
    assert "this network is broken on purpose" in err
    assert "Traceback" not in err
    run_folder = next((tmp_path / "runs").glob("digits_e2e-*"))
    failures = [json.loads(line) for line in (run_folder / "failures.jsonl").read_text().splitlines()]
    assert "slow_net.py" in failures[0]["traceback"]
    run_id = json.loads((run_folder / "run.json").read_text())["run_id"]
    assert mlflow_run(tmp_path, run_id).info.status == "FAILED"


def test_nothing_of_these_runs_is_left_alive(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    """Ray's workers have the driver's working folder, also those whose driver was killed."""
    own = unbroken[0].parent

    def is_ours(process: psutil.Process) -> bool:
        try:
            return Path(process.cwd()).is_relative_to(own)
        except psutil.Error:
            return False

    deadline = time.monotonic() + 60
    while (left := [process for process in psutil.process_iter() if is_ours(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
