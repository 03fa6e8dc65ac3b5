"""Meshes as a user meets them: `temper train`, `eval` and `export` on stages × tensor ranks, and `temper verify`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from temper import plan as plan_job
from temper.data.sources import load_splits
from temper.models.build import build_model

pytestmark = pytest.mark.ray

TARGETS = Path(__file__).parent / "targets"


def write_job(folder: Path, **sections: Any) -> Path:
    job = {
        "name": "mesh",
        "model": {"kind": "cnn"},
        "data": {"kind": "digits", "global_batch": 64},
        "optimizer": {"kind": "adamw", "lr": 3.0e-3},
        "parallel": {"cpus_per_worker": 0.5},
        "budget": {"steps": 40, "checkpoint_every": 20},
        "storage": str(folder / "runs"),
        **sections,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def temper(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "temper", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=400, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.mark.slow
def test_stages_and_tensor_ranks_train_a_model_that_is_whole_again_when_it_is_exported(tmp_path: Path) -> None:
    parallel = {"pipeline": 2, "tensor": 2, "zero": 1, "cpus_per_worker": 0.5}
    path = write_job(tmp_path, parallel=parallel, precision={"dtype": "bf16"})
    code, trained, said = temper(tmp_path, "train", str(path))
    assert code == 0, said
    assert trained["metrics"]["test/accuracy"] > 0.8
    code, evaluated, said = temper(tmp_path, "eval", trained["run_id"], "--storage", str(tmp_path / "runs"))
    assert code == 0, said
    # In one process and in fp32, with the same weights.
    assert evaluated["metrics"]["test/accuracy"] == pytest.approx(trained["metrics"]["test/accuracy"], abs=0.02)
    to = tmp_path / "exported"
    code, _, said = temper(tmp_path, "export", trained["run_id"], "--to", str(to), "--storage", str(tmp_path / "runs"))
    assert code == 0, said
    plan = plan_job(path)
    model = build_model(plan.job.model, plan.data, 0)
    model.load_state_dict(load_file(to / "model.safetensors"))
    split = load_splits(plan.job.data, tmp_path / "runs", plan.data)["test"]
    assert len(split) == 360
    code, again, said = temper(tmp_path, "train", str(path))
    assert code == 0, said
    assert again["status"] == "reused"


@pytest.mark.slow
def test_verify_certifies_a_mesh(tmp_path: Path) -> None:
    split = {"[03]": "image_blocks", "7": "output_activations"}
    parallel = {"tensor": 2, "split": split, "cpus_per_worker": 0.5}
    path = write_job(tmp_path, parallel=parallel, precision={"dtype": "fp16"})
    code, certificate, said = temper(tmp_path, "verify", str(path), "--steps", "2")
    assert code == 0, said
    assert certificate["status"] == "equal"
    assert [item["dtype"] for item in certificate["comparisons"]] == ["fp32", "fp16"]
    assert [step["step"] for step in certificate["comparisons"][0]["steps"]] == [0, 1, 2]
    assert certificate["topology"]["splits"] == {"0": "image_blocks", "3": "image_blocks", "7": "output_activations"}
    assert certificate["one_process"]["world_size"] == 1
    kept = next((tmp_path / "runs").glob("mesh-*/verify.json"))
    assert json.loads(kept.read_text())["run_id"] == certificate["run_id"]
    assert not (kept.parent / "verify").exists()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run = client.get_run(certificate["run_id"])
    assert (run.data.tags["temper.verify"], run.info.status) == ("equal", "FINISHED")
    assert "verify.json" in [artifact.path for artifact in client.list_artifacts(certificate["run_id"])]


def test_verify_names_the_layer_at_fault(tmp_path: Path) -> None:
    (tmp_path / "odd_net.py").write_text((TARGETS / "odd_net.py").read_text())
    parallel = {"workers": 2, "zero": 1, "cpus_per_worker": 0.5}
    path = write_job(tmp_path, parallel=parallel, model={"kind": "python", "target": "odd_net:build"})
    code, certificate, said = temper(tmp_path, "verify", str(path), "--steps", "1")
    assert code == 1, said
    assert certificate["status"] == "differs"
    assert certificate["difference"].startswith("fp32, dense, step 1: output of 3 differs")
    assert "DIFFERS: fp32, dense, step 1: output of 3" in said


def test_verify_refuses_what_has_no_equal_in_one_process(tmp_path: Path) -> None:
    path = write_job(tmp_path, parallel={"mode": "parameter_server", "workers": 2, "cpus_per_worker": 0.5})
    code, answer, _ = temper(tmp_path, "verify", str(path))
    assert code == 2
    assert answer["problems"] == [
        "parallel.mode: parameter_server has no equal in one process: what its workers compute depends on when they "
        "meet; verify it with mode: synchronous"
    ]
