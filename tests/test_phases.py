"""A job of several phases: what is run, what is reused, and how it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from temper import cli
from temper.errors import RunError
from temper.files import write_json
from temper.launch import phase_store, train
from temper.launch.phase_store import claim_phases, complete_history, computing_run, forget_phases
from temper.locks import HeldError, claimed
from temper.plan.build import Plan
from temper.plan.mesh import ClusterShape
from temper.plan.phases import PhasePlan
from temper.run_folder import PHASE_MANIFEST, PLAN, RUN, STAGES, WorkerSpec
from temper.tracking.history import Histories, Record, phase_histories, read_history

CHAIN = ("dense", "sparse-1", "redense-1")
KINDS: dict[str, Any] = {"dense": "dense", "sparse-1": "sparse", "redense-1": "redense"}


def plan_of(storage: Path, name: str = "tiny", fingerprints: str = "abc") -> Plan:
    """Three phases of ten steps each; one letter names the fingerprint of each."""
    phases = tuple(
        PhasePlan(phase, KINDS[phase], 10 * index, 10, 0.1, letter * 64, {})
        for index, (phase, letter) in enumerate(zip(CHAIN, fingerprints, strict=True))
    )
    tracking = SimpleNamespace(experiment="temper")
    job = SimpleNamespace(name=name, storage=str(storage), storage_folder=storage, tracking=tracking)
    decided: dict[str, Any] = {"job": job, "phases": phases, "steps": 30, "fingerprint": phases[-1].fingerprint}
    decided["cluster"] = ClusterShape(nodes=1, cpus=2.0, gpus=0.0)
    return Plan(**{**dict.fromkeys([field.name for field in fields(Plan)]), **decided})


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(tmp_path / "runs")


def complete(plan: Plan, *names: str) -> None:
    for phase in plan.phases:
        if phase.name in names:
            plan.phase_folder(phase).mkdir(parents=True, exist_ok=True)
            metrics = {"test/accuracy": 0.5, "phase": float(plan.phases.index(phase))}
            manifest = {"checkpoint": f"checkpoints/step-{phase.last_step:08}", "seconds": 2.5, "metrics": metrics}
            write_json(plan.phase_folder(phase) / PHASE_MANIFEST, manifest)


def record(step: int, time_ms: int | None = None) -> Record:
    return {"step": step, "time_ms": step if time_ms is None else time_ms, "metrics": {"train/loss": 1.0 / step}}


def records(first: int, last: int) -> list[Record]:
    return [record(step) for step in range(first, last + 1)]


def names(phases: Sequence[PhasePlan]) -> tuple[str, ...]:
    return tuple(phase.name for phase in phases)


def claim(plan: Plan, phase: int) -> Any:
    """As another command has it; a lock belongs to an open file, so that this process is another one too."""
    return claimed(plan.lock(plan.phases[phase]), "it")


# ---------------------------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize(
    ("stored", "pending"),
    [
        ((), CHAIN),
        (("dense",), ("sparse-1", "redense-1")),
        (("dense", "sparse-1"), ("redense-1",)),
        (CHAIN, ()),
        (("redense-1",), ("dense", "sparse-1")),
        (("dense", "redense-1"), ("sparse-1",)),
    ],
)
def test_what_is_not_complete_is_run_and_claimed(plan: Plan, stored: tuple[str, ...], pending: tuple[str, ...]) -> None:
    complete(plan, *stored)
    with ExitStack() as stack:
        assert names(claim_phases(plan, stack)) == pending
        for index, phase in enumerate(plan.phases):
            if phase.name not in pending:
                with claim(plan, index):
                    continue
            with pytest.raises(RunError), claim(plan, index):
                pass
    with ExitStack() as stack:
        assert names(claim_phases(plan, stack)) == pending


def test_a_phase_that_another_command_runs_is_named(plan: Plan) -> None:
    complete(plan, "dense")
    message = "sparse-1 of tiny, bbbbbbbbbb, is being run by another process; wait for it, or stop it first"
    with claim(plan, 1), ExitStack() as stack, pytest.raises(RunError) as caught:
        claim_phases(plan, stack)
    assert str(caught.value) == message


def test_a_phase_that_another_command_has_completed_is_used_while_that_goes_on(plan: Plan) -> None:
    complete(plan, "dense")
    with claim(plan, 0), ExitStack() as stack:
        assert names(claim_phases(plan, stack)) == ("sparse-1", "redense-1")


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_phase_that_is_completed_before_it_can_be_claimed_is_used(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """The other command completes it between the plan and the claim, and then ends or goes on to its next phase."""

    def late(path: Path, what: str) -> Any:
        complete(plan, "dense")
        if goes_on and what.startswith("dense"):
            raise HeldError(f"{what} is being run")
        return claimed(path, what)

    monkeypatch.setattr(phase_store, "claimed", late)
    with ExitStack() as stack:
        assert names(claim_phases(plan, stack)) == ("sparse-1", "redense-1")
        with claim(plan, 0):
            pass


def test_fresh_removes_the_phases_of_the_plan_only(plan: Plan, tmp_path: Path) -> None:
    other = plan_of(tmp_path / "runs", "other", "abd")
    complete(plan, *CHAIN)
    complete(other, *CHAIN)
    with ExitStack() as stack:
        assert names(forget_phases(plan, stack)) == CHAIN
        with pytest.raises(RunError), claim(plan, 2):
            pass
    assert [folder.name[0] for folder in (tmp_path / "runs" / "phases").glob("*/")] == ["d"]


def test_fresh_removes_nothing_while_another_command_runs_a_phase(plan: Plan) -> None:
    complete(plan, *CHAIN)
    with claim(plan, 2), ExitStack() as stack, pytest.raises(RunError, match="redense-1 of tiny"):
        forget_phases(plan, stack)
    with ExitStack() as stack:
        assert claim_phases(plan, stack) == ()


def test_fresh_removes_nothing_while_another_command_uses_a_phase(plan: Plan, tmp_path: Path) -> None:
    """One that began with the phases that both have, and runs what follows."""
    other = plan_of(tmp_path / "runs", "other", "abd")
    complete(plan, *CHAIN)
    with ExitStack() as using:
        assert names(claim_phases(other, using)) == ("redense-1",)
        with ExitStack() as stack, pytest.raises(RunError, match="dense of tiny"):
            forget_phases(plan, stack)
        with ExitStack() as stack:
            assert claim_phases(plan, stack) == ()
    with ExitStack() as stack:
        assert names(forget_phases(plan, stack)) == CHAIN


def test_a_removal_that_is_broken_off_leaves_no_phase_without_the_one_before(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(plan, *CHAIN)

    def die(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(phase_store.shutil, "rmtree", die)
    with ExitStack() as stack, pytest.raises(KeyboardInterrupt):
        forget_phases(plan, stack)
    with ExitStack() as stack:
        assert names(claim_phases(plan, stack)) == CHAIN


# --------------------------------------------------------------------------------------------------------- its history


def checkpoint(plan: Plan, phase: int, first: int, last: int) -> None:
    folder = plan.phase_folder(plan.phases[phase]) / "checkpoints" / f"step-{last:08}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(first, last)))


@pytest.mark.parametrize("reported", [0, 4, 5, 8, 9, 10])
def test_what_was_not_reported_at_the_end_of_a_phase_is_taken_from_its_checkpoints(plan: Plan, reported: int) -> None:
    """A process died between the manifest and the last report."""
    path = phase_histories(plan)[1].path
    Histories(phase_histories(plan)).append("sparse-1", records(11, 10 + reported))
    checkpoint(plan, 1, 11, 15)
    checkpoint(plan, 1, 16, 20)
    complete_history(plan, plan.phases[1])
    assert read_history(path) == records(11, 10 + reported)  # not complete: the workers will report it
    complete(plan, "dense", "sparse-1")
    with ExitStack() as stack:
        claim_phases(plan, stack)
    assert read_history(path) == records(11, 20)
    before = path.stat()
    with ExitStack() as stack:
        claim_phases(plan, stack)
    assert path.stat() == before


# ----------------------------------------------------------------------------------------------------- folders and tags


def test_only_folders_of_phases_that_are_run_are_marked(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "job_to_yaml", lambda job: f"name: {job.name}\n")
    monkeypatch.setattr(Plan, "to_dict", lambda plan: {"run_folder": str(plan.run_folder)})
    complete(plan, "dense")
    train.prepare_folders(WorkerSpec(plan, plan.phases[1:], ("here",)))
    marked = [(plan.phase_folder(phase) / PLAN).is_file() for phase in plan.phases]
    assert marked == [False, True, True]
    assert json.loads((plan.phase_folder(plan.phases[1]) / PLAN).read_text()) == {
        "run_folder": str(plan.run_folder),
        "import_folders": ["here"],
    }
    assert (plan.run_folder / "job.yaml").read_text() == "name: tiny\n"


def test_the_run_that_computed_a_phase_is_known(plan: Plan, tmp_path: Path) -> None:
    other = plan_of(tmp_path / "runs", "other", "abd")
    other.run_folder.mkdir(parents=True)
    write_json(other.run_folder / RUN, {"run_id": "other run"})
    plan.run_folder.mkdir()
    write_json(plan.run_folder / RUN, {"run_id": "own run"})
    complete(plan, *CHAIN)
    moved = {"run_folder": f"/before/it/was/moved/{other.run_folder.name}"}
    write_json(plan.phase_folder(plan.phases[0]) / PLAN, moved)
    write_json(plan.phase_folder(plan.phases[1]) / PLAN, {"run_folder": "/gone/with-its-run"})
    write_json(plan.phase_folder(plan.phases[2]) / PLAN, {"run_folder": str(plan.run_folder)})
    assert [computing_run(plan, phase) for phase in plan.phases] == ["other run", None, "own run"]


# ----------------------------------------------------------------------------------------------------------- its result


@pytest.mark.parametrize(("computed", "status"), [((), "reused"), (("redense-1",), "finished"), (CHAIN, "finished")])
def test_result_of_a_chain(plan: Plan, computed: tuple[str, ...], status: str) -> None:
    complete(plan, *CHAIN)
    result = train._result(plan, [phase for phase in plan.phases if phase.name in computed], 7.0)
    assert (result.status, result.seconds, result.metrics["phase"]) == (status, 7.0, 2.0)
    assert result.checkpoint == str(plan.phase_folder(plan.phases[2]) / "checkpoints" / "step-00000030")
    assert [(phase.name, phase.steps, phase.reused, phase.seconds) for phase in result.phases] == [
        (name, 10, name not in computed, 2.5) for name in CHAIN
    ]
    assert [phase.metrics["phase"] for phase in result.phases] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("stored", "missing"), [(("dense", "sparse-1"), "redense-1"), (("dense",), "sparse-1")])
def test_a_run_without_its_last_phase_is_not_done(plan: Plan, stored: tuple[str, ...], missing: str) -> None:
    complete(plan, *stored)
    with pytest.raises(RunError, match=f"^the run ended without completing {missing}; see"):
        train._result(plan, plan.phases, 7.0)


def test_the_command_line_prints_a_line_for_each_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path)
    phases = [
        train.PhaseResult("dense", "a" * 64, 10_000, True, 9.0, {"test/accuracy": 0.5, "train/loss": 1.0}),
        train.PhaseResult("sparse-1", "b" * 64, 500, False, 12.25, {"test/accuracy": 0.75, "test/loss": 0.25}),
    ]
    result = train.TrainResult("run", "temper", "finished", 20.0, "/c", {"test/accuracy": 0.75}, phases)
    monkeypatch.setattr(train, "launch_train", lambda *_: result)
    assert cli.main(["train", str(job)]) == 0
    assert capsys.readouterr().err.splitlines()[:4] == [
        "tiny: done in 20.0 s",
        "  dense          10000 steps     reused  test/accuracy 0.5000",
        "  sparse-1         500 steps     12.2 s  test/accuracy 0.7500  test/loss 0.2500",
        "  test/accuracy            0.7500",
    ]


# -------------------------------------------------------------------------------------------------------- what is shown


class Shown:
    """A display that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def stage(self, text: str) -> None:
        self.lines.append(text)

    def records(self, records: Sequence[Record]) -> None:
        self.lines += [record["step"] for record in records]


def say(plan: Plan, time_ms: int, text: str) -> None:
    plan.run_folder.mkdir(parents=True, exist_ok=True)
    with (plan.run_folder / STAGES).open("a") as file:
        file.write(json.dumps({"time_ms": time_ms, "text": text}) + "\n")


def test_what_happened_is_shown_in_order(plan: Plan) -> None:
    complete(plan, "dense")
    histories, display = Histories(phase_histories(plan)), Shown()
    histories.append("dense", records(1, 10))
    watch = train.Watch(WorkerSpec(plan, plan.phases[1:], ()), display)  # type: ignore[arg-type]

    assert not watch.look(0.0)
    say(plan, 1000, "building mlp")
    say(plan, 1500, "taking the first step")
    assert not watch.look(1.2)
    assert display.lines == ["building mlp"]  # no record of the phase that is reused
    histories.append("sparse-1", [record(11, 1600)])
    assert watch.look(1.3)
    assert display.lines == ["building mlp", "taking the first step", 11]

    say(plan, 2100, "redense-1: all weights are trained again")
    assert not watch.look(1.7)
    histories.append("sparse-1", [record(19, 2000), record(20, 2000)])
    histories.append("redense-1", [record(21, 2200)])
    say(plan, 2300, "loading")
    assert watch.look(1.8)
    assert display.lines[3:] == [19, 20, "redense-1: all weights are trained again", 21]
    assert not watch.look(2.4)
    assert not watch.look(9.0)
    assert display.lines[7:] == ["loading"]


# -------------------------------------------------------------------------------------------------- through the command


JOB: dict[str, Any] = {
    "name": "tiny",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "parallel": {"workers": 1, "cpus_per_worker": 0.5},
    "budget": {"steps": 8},
    "dsd": {
        "rounds": [
            {"sparsity": 0.5, "sparse_steps": 4, "redense_steps": 4},
            {"sparsity": 0.25, "sparse_steps": 4, "redense_steps": 4},
        ]
    },
}
ROUNDS = ["dense", "sparse-1", "redense-1", "sparse-2", "redense-2"]


def write_job(folder: Path, **sections: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**JOB, "storage": str(folder / "runs"), **sections}))
    return path


def temper_train(job: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "temper", "train", str(job), "--json", *more]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(command, cwd=job.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}


def reused(result: dict[str, Any]) -> dict[str, bool]:
    return {phase["name"]: phase["reused"] for phase in result["phases"]}


@pytest.mark.ray
def test_a_job_of_two_rounds_its_reuse_and_one_that_shares_its_first_phases(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    job = write_job(tmp_path)
    first = temper_train(job)
    again = temper_train(job)
    rounds = [{"sparsity": 0.5, "sparse_steps": 4, "redense_steps": 6}]
    other = temper_train(job, f"dsd.rounds={json.dumps(rounds)}")

    assert (first["status"], again["status"], other["status"]) == ("finished", "reused", "finished")
    assert reused(first) == dict.fromkeys(ROUNDS, False)
    assert reused(again) == dict.fromkeys(ROUNDS, True)
    assert reused(other) == {"dense": True, "sparse-1": True, "redense-1": False}
    assert [phase["steps"] for phase in other["phases"]] == [8, 4, 6]
    assert [(phase["fingerprint"], phase["metrics"]) for phase in other["phases"][:2]] == [
        (phase["fingerprint"], phase["metrics"]) for phase in first["phases"][:2]
    ]
    assert (again["run_id"], again["checkpoint"], again["metrics"]) == (
        first["run_id"], first["checkpoint"], first["metrics"],
    )  # fmt: skip
    assert first["metrics"] == first["phases"][-1]["metrics"]
    assert first["checkpoint"].endswith("step-00000024")
    assert "sparse-2: " in first["said"]
    assert "reusing sparse-1, steps 9 to 12" in other["said"]
    assert "redense-1  step 18/18" in other["said"] and "dense  step  8/18" not in other["said"]
    computing = json.loads(
        (Path(first["checkpoint"]).parents[2] / other["phases"][0]["fingerprint"] / PLAN).read_text()
    )
    assert computing["steps"] == 24  # as the first run wrote it

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = {run.info.run_id: run for run in client.search_runs(["1"])}
    assert {run_id for run_id, run in runs.items() if run.data.tags["temper.kind"] == "run"} == {
        first["run_id"],
        other["run_id"],
    }
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for result, lengths in ((first, [8, 4, 4, 4, 4]), (other, [8, 4, 6])):
        series = client.get_metric_history(result["run_id"], "phase")
        expected = [float(index) for index, length in enumerate(lengths) for _ in range(length)]
        assert [(point.step, point.value) for point in series] == list(enumerate(expected, start=1))
        losses = client.get_metric_history(result["run_id"], "train/loss")
        assert [point.step for point in losses] == list(range(1, sum(lengths) + 1))
    both = [client.get_metric_history(result["run_id"], "train/loss")[:12] for result in (first, other)]
    assert [(point.value, point.timestamp) for point in both[0]] == [
        (point.value, point.timestamp) for point in both[1]
    ]
    sparsity = client.get_metric_history(first["run_id"], "sparsity")
    assert [(point.step, point.value) for point in sparsity if point.step in (12, 20)] == [(12, 0.5), (20, 0.25)]
    for result, taken in ((first, []), (other, ["dense", "sparse-1"])):
        told = json.loads(runs[result["run_id"]].data.tags["temper.phases"])
        assert [(each["name"], each["fingerprint"]) for each in told] == [
            (phase["name"], phase["fingerprint"]) for phase in result["phases"]
        ]
        assert [each["name"] for each in told if each["reused"]] == taken
        assert {each["computed_by"] for each in told if each["reused"]} == {first["run_id"]} - {result["run_id"]}
        phases = [runs[each["run_id"]] for each in told]
        assert {run.data.tags["mlflow.parentRunId"] for run in phases} == {result["run_id"]}
