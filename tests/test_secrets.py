"""No secret in anything logged: planted ones are looked for in every byte of MLflow's store, its files and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from temper.tracking.redact import redact_text

ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+planted1",
    "MLFLOW_TRACKING_PASSWORD": "planted-pass-2",
    "FEATURE_STORE": "postgresql://ann:planted-pass-3@db.example/features",
    "HF_TOKEN": "hf_planted4planted4",
}
SECRETS = (
    "K7MDENG+planted1",
    "planted-pass-2",
    "planted-pass-3",
    "hf_planted4planted4",
    "planted-pass-5",
    "planted6key",
)
NET = '''"""Uses hf_planted4planted4 for no good reason."""
from torch import nn


def build(source: str, api_key: str) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
'''


@pytest.mark.parametrize("secret", ["planted1", "a-b/c+d=e&f"])
def test_a_secret_of_the_environment_is_hidden_wherever_it_stands(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", secret)
    assert redact_text(f"--option={secret},{secret}/x") == "--option=***,***/x"
    monkeypatch.delenv("SOME_API_KEY")
    assert redact_text(f"{secret}/x") == f"{secret}/x"


def test_a_secret_in_an_address_of_the_environment_is_hidden_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "postgresql://ann:hunter22@db/x")
    assert redact_text("password is hunter22") == "password is ***"


def test_words_that_only_look_like_secrets_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "1")
    monkeypatch.setenv("SSH_PRIVATE_KEY", str(tmp_path))  # where it lies is no secret
    assert redact_text(f"1 {tmp_path}") == f"1 {tmp_path}"
    assert redact_text("https://token@host/x postgresql://ann@host/x") == "https://***@host/x postgresql://ann@host/x"


@pytest.mark.ray
def test_planted_secrets_reach_neither_mlflow_nor_the_report(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    args = {"source": "https://ann:planted-pass-5@models.example/net?token=planted-pass-2", "api_key": "planted6key"}
    job = {
        "name": "secretive",
        "model": {"kind": "python", "target": "net:build", "args": args},
        "data": {"kind": "digits", "global_batch": 64},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "parallel": {"workers": 1, "cpus_per_worker": 0.5},
        "budget": {"steps": 2},
        "tracking": {"register_as": "secretive"},
        "dsd": {"rounds": [{"sparsity": 0.5, "sparse_steps": 1, "redense_steps": 0}]},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "add", "job.yaml"], check=True)
    subprocess.run([*git, "commit", "-qm", "a job"], check=True)
    with (tmp_path / "job.yaml").open("a") as file:
        file.write("# my key is wJalrXUtnFEMI/K7MDENG+planted1\n")

    def temper(*words: str) -> str:
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "temper", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    result = json.loads(temper("train", "job.yaml", "model.args.api_key=planted6key", "--json").splitlines()[-1])
    assert result["registered"]["uri"] == "models:/secretive/1"
    temper("report", result["run_id"], "--to", "page/report.html")
    logged = [
        tmp_path / "runs" / "mlflow.db",
        *(tmp_path / "runs" / "artifacts").rglob("*"),
        *(tmp_path / "page").rglob("*"),
    ]
    files = [path for path in logged if path.is_file()]
    assert {"report.html", "git.diff", "job.yaml", "plan.json"} <= {path.name for path in files}
    found = [(path.name, secret) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]
    assert found == []
