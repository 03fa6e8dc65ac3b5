"""The Python API: the same as the command line, typed, and imported only as far as it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

import temper
import temper.plan.build
from mlp_facts import FACTS
from temper.config.load import build_job
from temper.errors import JobError
from temper.launch import train as launch
from temper.plan import probe
from temper.plan.mesh import local_cluster

SECTIONS = {
    "name": "tiny",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "budget": {"steps": 30},
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file in a folder of its own beside the working folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(probe, "_ask", lambda *_: asdict(FACTS))
    for name in ("jobs", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "jobs" / "tiny.yaml"
    path.write_text(yaml.safe_dump(SECTIONS))
    return path


def in_a_new_process(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_imports_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys, temper\n"
        "print([name for name in ('torch', 'ray', 'pydantic', 'yaml', 'mlflow') if name in sys.modules],"
        " [name for name in sys.modules if name.startswith('temper.')])"
    )
    assert in_a_new_process(code, tmp_path) == "[] []"


def test_the_functions_are_all_there_is() -> None:
    assert temper.__all__ == ["load_job", "plan", "results", "sweep", "train"]
    assert all(callable(getattr(temper, name)) for name in temper.__all__)
    assert (resources.files(temper) / "py.typed").is_file()


def test_load_job(job: Path) -> None:
    for path in (job, str(job)):
        loaded = temper.load_job(path, ["optimizer.lr=0.5", "parallel.zero=1"])
        assert loaded == build_job({**SECTIONS, "parallel": {"zero": 1}}, ["optimizer.lr=0.5"])
        assert (loaded.optimizer.lr, loaded.parallel.zero, loaded.budget.steps) == (0.5, 1, 30)


def test_load_job_with_every_problem(job: Path) -> None:
    with pytest.raises(JobError) as caught:
        temper.load_job(job, ["optimizer.lr=-1", "sed=1"])
    assert {problem.key for problem in caught.value.problems} == {"optimizer.lr", "sed"}


def test_plan_of_a_file_and_of_a_job(job: Path) -> None:
    planned = temper.plan(job)
    assert planned.job == temper.load_job(job)
    assert (planned.steps, planned.model.num_parameters, planned.data.train_examples) == (30, 2410, 1437)
    assert temper.plan(str(job)) == temper.plan(temper.load_job(job)) == planned
    assert planned.phases[0].fingerprint == planned.fingerprint


def test_overrides_reach_a_file_and_a_job_alike(job: Path) -> None:
    overrides = ["optimizer.lr=0.5", "optimizer.schedule.kind=cosine", "budget.steps=null", "budget.epochs=2"]
    planned = temper.plan(job, overrides)
    assert planned.steps == 2 * 1437 // 64 + 1
    assert temper.plan(temper.load_job(job), overrides) == planned
    assert temper.plan(temper.load_job(job, overrides)) == planned
    assert planned.fingerprint != temper.plan(job).fingerprint


def test_wrong_overrides_of_a_job_are_all_named(job: Path) -> None:
    with pytest.raises(JobError) as caught:
        temper.plan(temper.load_job(job), ["optimizer.lr=-1", "sed=1", "nonsense"])
    assert {problem.key for problem in caught.value.problems} == {"optimizer.lr", "sed", "nonsense"}


def test_plan_can_be_called_before_and_after_its_package_is_imported(tmp_path: Path, job: Path) -> None:
    """`temper.plan` names a function and a package."""
    temper.plan(job)  # leaves what is known of the model in the cache of this storage
    assert temper.plan.build.build_plan(temper.load_job(job), local_cluster(), job.parent) == temper.plan(job)
    code = (
        "import json, sys, temper\n"
        f"first = temper.plan({str(job)!r})\n"
        "import temper.plan.build\n"
        f"second = temper.plan({str(job)!r})\n"
        "from temper import plan\n"
        "from temper.plan.mesh import MeshPlan\n"
        f"assert plan({str(job)!r}) == first == second and isinstance(first.mesh, MeshPlan)\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules], first.steps)"
    )
    assert in_a_new_process(code, tmp_path / "work") == "[] 30"


def test_a_jobs_own_modules(job: Path) -> None:
    """A file's own folder is searched for them; for a loaded job there is the working directory only."""
    overrides = ["model={kind: python, target: 'mine:build'}"]
    (job.parent / "mine.py").write_text("def build(): ...\n")
    assert temper.plan(job, overrides).job.model.kind == "python"
    with pytest.raises(JobError, match=r"model\.target"):
        temper.plan(temper.load_job(job, overrides))
    (job.parent / "mine.py").rename("mine.py")
    assert temper.plan(temper.load_job(job, overrides)).job.model.kind == "python"


# ------------------------------------------------------------------------------------------------------------ train


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is launched instead of a training."""
    calls: list[tuple[Any, ...]] = []
    result = launch.TrainResult("id", "temper", "finished", 1.0, "c", {})
    monkeypatch.setattr(launch, "launch_train", lambda *arguments: calls.append(arguments) or result)
    return calls


def test_train_launches_the_job_as_it_was_given(job: Path, asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    assert temper.train(job, ["seed=3"], "ray://head:10001", fresh=True, display="quiet").run_id == "id"
    temper.train(temper.load_job(job), ["seed=3"])
    from_file, from_job = asked
    assert from_file[0] == from_job[0] == temper.load_job(job, ["seed=3"])
    assert (from_file[1], from_job[1]) == (tmp_path / "jobs", tmp_path / "work")
    command = f"temper.train({str(job)!r}, ['seed=3'])"
    assert from_file[2] == launch.TrainOptions("ray://head:10001", True, "quiet", command)
    assert from_job[2] == launch.TrainOptions("local", False, "plain", "temper.train('tiny', ['seed=3'])")


@pytest.mark.parametrize(("overrides", "address", "key"), [(["seed=-1"], "local", "seed"), ([], "here", "--address")])
def test_train_refuses_before_it_starts(
    job: Path, asked: list[tuple[Any, ...]], overrides: Sequence[str], address: str, key: str
) -> None:
    with pytest.raises(JobError) as caught:
        temper.train(job, overrides, address)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert asked == []


@pytest.mark.slow
@pytest.mark.ray
def test_train_a_few_steps(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SECTIONS, "parallel": {"workers": 1, "cpus_per_worker": 0.5}}))
    code = (
        "import json, temper\n"
        "job = temper.load_job('tiny.yaml')\n"
        "first = temper.train(job, ['budget.steps=3'], display='quiet')\n"
        "again = temper.train('tiny.yaml', ['budget.steps=3'], display='quiet')\n"
        "print(json.dumps([first.to_dict(), again.to_dict()]))"
    )
    first, again = json.loads(in_a_new_process(code, tmp_path))
    assert first["status"] == "finished"
    assert first["phases"][0]["steps"] == 3
    assert 0.0 <= first["metrics"]["test/accuracy"] <= 1.0
    assert again["status"] == "reused"
    assert (again["checkpoint"], again["metrics"]) == (first["checkpoint"], first["metrics"])
    assert Path(first["checkpoint"], "manifest.json").is_file()
