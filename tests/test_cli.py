"""The command line: exit codes, what goes to which stream, and how much it imports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import temper
from mlp_facts import FACTS
from temper import checkpoint
from temper.checkpoint import BUFFER, MASTER, Shard
from temper.cli import main
from temper.config.load import load_job
from temper.errors import RunError
from temper.launch import train as launch
from temper.models.build import build_model
from temper.plan import probe
from temper.plan.build import build_plan
from temper.plan.facts import data_facts
from temper.plan.mesh import local_cluster

RUN_ID = "0123456789abcdef0123456789abcdef"
COMMANDS = ("plan", "train", "eval", "export", "report", "ui", "doctor")

Temper = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file, alone in the working folder, whose model is known without a process that builds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(probe, "_ask", lambda *_: asdict(FACTS))
    path = tmp_path / "job.yaml"
    sections = {
        "name": "tiny",
        "model": {"kind": "mlp", "hidden": [32]},
        "data": {"kind": "digits", "global_batch": 64},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "budget": {"steps": 30},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Temper:
    """`temper ARGUMENTS…` in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def only_line(out: str) -> dict[str, Any]:
    """The JSON object that is all of standard output."""
    (line,) = out.splitlines()
    return json.loads(line)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required: COMMAND"),
        (("pla", "job.yaml"), "invalid choice: 'pla'"),
        (("plan",), "required: JOB"),
        (("plan", "job.yaml", "--jsonn"), "unrecognized arguments: --jsonn"),
        (("plan", "job.yaml", "--fresh"), "unrecognized arguments: --fresh"),
        (("plan", "job.yaml", "--jsonn", "seed=1"), "unrecognized arguments: --jsonn seed=1"),
        (("doctor", "job.yaml"), "unrecognized arguments: job.yaml"),
        (("export", "run"), "required: --to"),
        (("ui", "--port", "many"), "many is no port: 0 to 65535"),
    ],
)
def test_a_wrong_command_line_exits_2(run: Temper, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Temper, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: temper {command}" in out
    assert command in run("--help")[1]


def test_version(run: Temper) -> None:
    assert run("--version") == (0, f"temper {temper.__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "temper", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"temper {temper.__version__}\n", "")


# ------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_for_people_is_on_standard_error(run: Temper, job: Path) -> None:
    code, out, err = run("plan", job)
    assert (code, out) == (0, "")
    assert re.search(r"^job +tiny$", err, re.MULTILINE)
    assert "2,410 parameters" in err
    assert "64 = 1 rank × 1 micro-batch × 64 examples" in err


def test_a_plan_as_json(run: Temper, job: Path) -> None:
    code, out, err = run("plan", job, "--json")
    plan = only_line(out)
    assert code == 0
    assert plan["job"]["optimizer"]["lr"] == 0.1
    assert plan["steps"] == 30
    assert plan["mesh"]["world_size"] == 1
    (phase,) = plan["phases"]
    assert (phase["name"], phase["steps"], phase["fingerprint"]) == ("dense", 30, plan["fingerprint"])
    assert re.fullmatch(r"[0-9a-f]{64}", plan["fingerprint"])
    # fp32 at one rank: parameters and gradients of 4 bytes, SGD without momentum has no state.
    assert plan["memory"]["parameters"] == plan["memory"]["gradients"] == 4 * 2410
    assert re.search(r"^job +tiny$", err, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "job.yaml", "--json", "optimizer.lr=0.5", "seed=7"),
        ("plan", "job.yaml", "optimizer.lr=0.2", "--json", "optimizer.lr=0.5", "seed=7"),
        ("plan", "--json", "job.yaml", "optimizer.lr=0.5", "seed=7"),
        ("plan", "job.yaml", "optimizer.lr=0.5", "seed=7", "--json"),
    ],
)
def test_overrides_and_flags_in_any_order(run: Temper, job: Path, arguments: tuple[str, ...]) -> None:
    plan = only_line(run(*arguments)[1])
    assert (plan["job"]["optimizer"]["lr"], plan["job"]["seed"]) == (0.5, 7)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (
            ("model.hiden=[3]", "budget.steps=-1", "sed=0", "nonsense"),
            ("model.hiden", "budget.steps", "sed", "nonsense"),
        ),
        (
            ("data.global_batch=2048", "optimizer.nesterov=true", "storage=s3://", "tracking.uri=mlruns"),
            ("data.global_batch", "optimizer.nesterov", "storage", "tracking.uri"),
        ),
    ],
)
def test_every_problem_of_a_job_is_listed(
    run: Temper, job: Path, overrides: tuple[str, ...], keys: tuple[str, ...]
) -> None:
    code, out, err = run("plan", job, *overrides, "--json")
    assert code == 2
    refused = only_line(out)
    assert refused["status"] == "refused"
    assert {problem.split(":")[0] for problem in refused["problems"]} == set(keys)
    headline, *lines = err.splitlines()
    assert headline == f"temper plan: {len(keys)} problems"
    assert lines == [f"  {problem}" for problem in refused["problems"]]
    assert run("plan", job, *overrides)[:2] == (2, "")


def test_a_missing_job_is_one_problem(run: Temper, job: Path) -> None:
    code, out, err = run("plan", "jbo.yaml")
    assert (code, out) == (2, "")
    assert err == "temper plan: 1 problem\n  jbo.yaml: does not exist; did you mean job.yaml?\n"


def test_a_plan_imports_neither_torch_nor_ray(job: Path, tmp_path: Path) -> None:
    build_plan(load_job(job), local_cluster(), tmp_path)  # leaves what is known of the model in the cache
    script = (
        "import sys; from temper.cli import main; code = main(['plan', 'job.yaml', '--json'])\n"
        "heavy = ('torch', 'torchvision', 'ray', 'deepspeed', 'mlflow', 'pandas', 'sklearn', 'pyarrow')\n"
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    plan, said = done.stdout.splitlines()
    assert said == "0 []", done.stderr
    assert json.loads(plan)["model"]["num_parameters"] == 2410


# ------------------------------------------------------------------------------------------------------------ train


@pytest.mark.parametrize("address", ["", "here", "localhost", "127.0.0.1:", ":6379", "http://head:8265"])
def test_train_refuses_a_wrong_address(run: Temper, job: Path, address: str) -> None:
    code, out, err = run("train", job, "--address", address, "--json")
    assert code == 2
    (problem,) = only_line(out)["problems"]
    assert problem.startswith("--address: ")
    assert problem.endswith("use local, auto, HOST:PORT or ray://…")
    assert f"temper train: 1 problem\n  {problem}\n" == err


def test_train_refuses_a_wrong_job_before_anything_starts(run: Temper, job: Path, tmp_path: Path) -> None:
    code, _, err = run("train", job, "optimizer.lr=-1", "data.global_batch=0")
    assert code == 2
    assert err.splitlines()[0] == "temper train: 2 problems"
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


RESULT = launch.TrainResult(
    run_id=RUN_ID,
    experiment="temper",
    status="finished",
    seconds=12.5,
    checkpoint="/runs/phases/f/checkpoints/step-00000030",
    metrics={"train/loss": 0.25, "test/accuracy": 0.875},
    phases=[launch.PhaseResult("dense", "f" * 64, 30, False, 9.0, {"test/accuracy": 0.875})],
)


def test_train_prints_its_result(run: Temper, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(launch, "launch_train", lambda *arguments: asked.append(arguments) or RESULT)
    code, out, err = run("train", job, "--fresh", "--json", "optimizer.lr=0.5", "--address", "ray://head:10001")
    assert code == 0
    assert only_line(out) == {
        "run_id": RUN_ID,
        "experiment": "temper",
        "status": "finished",
        "seconds": 12.5,
        "checkpoint": "/runs/phases/f/checkpoints/step-00000030",
        "metrics": {"train/loss": 0.25, "test/accuracy": 0.875},
        "phases": [
            {
                "name": "dense",
                "fingerprint": "f" * 64,
                "steps": 30,
                "reused": False,
                "seconds": 9.0,
                "metrics": {"test/accuracy": 0.875},
            }
        ],
        "teachers": [],
        "teacher_metrics": {},
        "registered": {},
    }
    assert "tiny: done in 12.5 s" in err
    assert re.search(r"test/accuracy +0.8750", err)
    assert "train/loss" not in err
    ((asked_job, folder, options),) = asked
    assert asked_job.optimizer.lr == 0.5
    assert folder == job.parent
    assert options == launch.TrainOptions("ray://head:10001", True, "plain", f"temper train {job} optimizer.lr=0.5")
    assert run("train", job)[1] == ""


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (RunError("rank 1: ValueError: broken; the whole log is in logs"), 1, "failed"),
        (launch.RunInterrupted("stopped; the state is saved"), 130, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_run_that_ends_early(
    run: Temper, job: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, status: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(launch, "launch_train", fail)
    found, out, err = run("train", job, "--json")
    assert found == code
    assert only_line(out)["status"] == status
    assert err == f"temper train: {str(error) or 'interrupted'}\n"


# --------------------------------------------------------------------------------------------------- eval and export


@pytest.fixture
def trained(job: Path, tmp_path: Path) -> Path:
    """The run folder of the job as if it had been trained: the store holds the initial weights at step 30."""
    plan = build_plan(load_job(job), local_cluster(), tmp_path)
    (phase,) = plan.phases
    phase_folder = tmp_path / plan.phase_folder(phase)
    for folder in (phase_folder, tmp_path / plan.run_folder):
        folder.mkdir(parents=True)
        shutil.copy(job, folder / "job.yaml")
        (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    (tmp_path / plan.run_folder / "run.json").write_text(json.dumps({"run_id": RUN_ID, "uri": "", "open": False}))
    model = build_model(plan.job.model, data_facts(plan.job.data, tmp_path), 0)
    shards = [Shard(name, 0, {MASTER: p.detach().reshape(-1)}) for name, p in model.named_parameters()]
    shards += [Shard(name, 0, {BUFFER: b.reshape(-1)}) for name, b in model.named_buffers()]
    folder = checkpoint.checkpoint_folder(phase_folder / "checkpoints", 30)
    checkpoint.write_shards(folder, 0, shards)
    records = [{"step": 30, "time_ms": 1, "metrics": {"test/accuracy": 0.125}}]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    checkpoint.write_manifest(folder, 1, {"step": 30, "engine": {}}, shapes, records)
    manifest = {"fingerprint": phase.fingerprint, "name": "dense", "checkpoint": "checkpoints/step-00000030"}
    (phase_folder / "phase.json").write_text(json.dumps(manifest))
    return tmp_path / plan.run_folder


def phase_of(trained: Path) -> Path:
    (folder,) = (path for path in (trained.parent / "phases").iterdir() if path.is_dir())
    return folder


def references(trained: Path) -> dict[str, str]:
    """Every way to name the same checkpoint."""
    phase = phase_of(trained)
    copy = trained.parent.parent / "best"
    if not copy.exists():
        shutil.copytree(phase, copy)
    return {
        "run id": RUN_ID,
        "run folder": str(trained),
        "phase folder": str(phase),
        "checkpoint": str(phase / "checkpoints" / "step-00000030"),
        "copied phase": str(copy),
        "copied checkpoint": str(copy / "checkpoints" / "step-00000030"),
    }


def test_eval_takes_every_kind_of_reference(run: Temper, trained: Path) -> None:
    found = {}
    for kind, reference in references(trained).items():
        code, out, err = run("eval", reference, "--json")
        assert code == 0, err
        result = only_line(out)
        assert Path(result["checkpoint"]).name == "step-00000030"
        found[kind] = result["metrics"]
        assert re.search(rf"test/accuracy +{result['metrics']['test/accuracy']:.4f}", err)
    (metrics,) = {json.dumps(metrics) for metrics in found.values()}
    # Ten classes and untrained weights: about ln 10, and about a tenth.
    assert json.loads(metrics)["test/loss"] == pytest.approx(2.3026, abs=0.2)
    assert 0.0 <= json.loads(metrics)["test/accuracy"] < 0.3


def test_export_writes_the_masters(run: Temper, trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    code, out, err = run("export", RUN_ID, "--to", "out", "--json")
    assert code == 0
    result = only_line(out)
    assert result["metrics"] == {"test/accuracy": 0.125}
    assert f"{result['parameters']:,} parameters in out/model.safetensors" in err
    reader = checkpoint.CheckpointReader(phase_of(trained) / "checkpoints" / "step-00000030")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(exported) == set(reader.shapes)
    for name, value in exported.items():
        kind = MASTER if name in reader.names(MASTER) else BUFFER
        assert torch.equal(value, reader.full(kind, name))


@pytest.mark.parametrize("command", ["eval", "export"])
@pytest.mark.parametrize("reference", ["nothing", ".", "f" * 32])
def test_an_unknown_reference_exits_2(run: Temper, job: Path, command: str, reference: str) -> None:
    more = ["--to", "out"] if command == "export" else []
    code, out, err = run(command, reference, "--json", *more)
    assert code == 2
    (problem,) = only_line(out)["problems"]
    assert problem.startswith(f"RUN|CHECKPOINT: {reference} is ")
    assert err == f"temper {command}: 1 problem\n  {problem}\n"
    assert not Path("out").exists()


def test_an_unknown_phase_exits_2(run: Temper, trained: Path) -> None:
    code, _, err = run("export", RUN_ID, "--phase", "sparse-1", "--to", "out")
    assert (code, err.splitlines()[1]) == (2, "  --phase: sparse-1 is not a phase of this run; use dense")


@pytest.mark.parametrize("command", ["eval", "export"])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_exits_1_and_is_named(run: Temper, trained: Path, command: str, name: str) -> None:
    damaged = phase_of(trained) / "checkpoints" / "step-00000030" / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    more = ["--to", "out"] if command == "export" else []
    for reference in references(trained)["run id"], str(damaged.parent):
        code, out, err = run(command, reference, "--json", *more)
        assert code == 1
        assert only_line(out)["status"] == "failed"
        assert str(damaged) in err
        assert "Traceback" not in err
    assert not Path("out").exists()


def test_a_phase_under_a_strange_name_is_refused(run: Temper, trained: Path, tmp_path: Path) -> None:
    """Without its manifest, a phase is known by its folder's name alone."""
    phase = phase_of(trained)
    (phase / "phase.json").unlink()
    shutil.copytree(phase, tmp_path / "best")
    code, _, err = run("eval", tmp_path / "best")
    assert code == 1
    assert err.startswith(f"temper eval: {tmp_path / 'best'}: is not named by the fingerprint of a phase")


# --------------------------------------------------------------------------------------------------------------- ui


def test_ui_serves_the_store_of_its_storage(run: Temper, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from temper.tracking import ui

    asked: list[Any] = []
    monkeypatch.setattr(ui, "serve_ui", lambda uri, **how: asked.append((uri, how)) or 3)
    code, out, _ = run("ui", "--storage", "elsewhere", "--port", "5001", "--no-browser")
    assert (code, out) == (3, "")
    assert asked == [
        (f"sqlite:///{os.getcwd()}/elsewhere/mlflow.db", {"port": 5001, "open_browser": False}),
    ]
