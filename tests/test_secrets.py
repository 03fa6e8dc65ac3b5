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


def test_the_folders_of_the_shell_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLDPWD", "/gone/folder")
    monkeypatch.setenv("PWD", "/gone/too")
    assert redact_text("/gone/folder/runs /gone/too/runs") == "/gone/folder/runs /gone/too/runs"


KEY = "-----BEGIN {0} KEY-----\n+MIIEv+/x\n+gIB=\n-----END {0} KEY-----\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("curl -H 'Authorization: Bearer eyJ.a-b' x", "curl -H 'Authorization: Bearer ***' x"),
        ("authorization: basic dXNl seed=1", "authorization: basic *** seed=1"),
        ("--password hunter22 --token --seed 1", "--password *** --token --seed 1"),
        ('["--api-key", "hunter 22", "x"]', '["--api-key", ***, "x"]'),
        ("https://x/c?sv=1&sig=AbC%2Fdef&x=1", "https://x/c?sv=1&sig=***&x=1"),
        ("s3://b/k?X-Amz-Signature=dead00&a=b", "s3://b/k?X-Amz-Signature=***&a=b"),
        ("postgresql://u:p/s@s@h/db?mail=a@b", "postgresql://u:***@h/db?mail=a@b"),
        ("https://u:p@h,http://x:y@z/q", "https://u:***@h,http://x:***@z/q"),
        ('{"password": "a\\"b c", "x": 1}', '{"password": ***, "x": 1}'),
        (r'"{\"password\": \"a b\", \"x\": 1}"', r'"{\"password\": ***, \"x\": 1}"'),
        ("password: 'it''s'\nx: 1", "password: ***\nx: 1"),
        ("a: 1\n  token: |\n    two\n\n    lines\n  x: 1", "a: 1\n  token: ***\n  x: 1"),
        ("+token: >-\n+  two\n+  lines\n+x: 1", "+token: ***\n+x: 1"),
        ("+export DB_PASSWORD=ab cd\nseed=1 x", "+export DB_PASSWORD=***\nseed=1 x"),
        (f"a\n{KEY.format('PRIVATE')}b", "a\n***\nb"),
        (f"a\n{KEY.format('OPENSSH PRIVATE')}b", "a\n***\nb"),
    ],
)
def test_a_secret_is_hidden_in_whatever_form(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "pad_token_id: 5, image_key: a, tokens: 5, max_tokens=3, config=5, design=4",
        "signature = infer_signature(x, signature=None)",
        "http://localhost:5000/a@b http://[::1]:5000/a@b",
        KEY.format("PUBLIC"),
        "--tokens 5 --keys 3",
        "SEED=1 two words",
    ],
)
def test_harmless_words_stay(text: str) -> None:
    assert redact_text(text) == text


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
