"""Where teachers come from: every kind of source, what is refused, and who is trained before whom."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mlp_facts
import temper
from temper import checkpoint, cli
from temper.checkpoint import BUFFER, MASTER, CheckpointReader, Shard, model_state
from temper.config.load import job_to_yaml, load_job
from temper.config.schema import JobConfig, TeacherConfig
from temper.errors import JobError, Problem, RunError
from temper.files import write_json
from temper.launch import teacher_runs, train
from temper.launch.registering import register_run
from temper.launch.teacher_runs import claim_teacher, keep_teacher, teacher_results, teacher_tags
from temper.launch.teachers import Search, find_teacher, plan_job
from temper.locks import HeldError, claimed
from temper.models.build import build_model
from temper.plan import probe
from temper.plan.build import Plan
from temper.plan.distill import CONNECTORS, Teacher
from temper.plan.mesh import ClusterShape
from temper.run_folder import CHECKPOINT_MANIFEST, HISTORY, JOB, LOCK, PHASE_MANIFEST, PLAN, RUN
from temper.tracking import registry
from temper.tracking.history import read_history

CLUSTER = ClusterShape(nodes=1, cpus=4, gpus=0)
FACTS = replace(
    mlp_facts.FACTS,
    prunable=mlp_facts.PRUNABLE,
    weight_shapes={"1.weight": (32, 64), "1.bias": (32,), "3.weight": (10, 32), "3.bias": (10,)},
)
RUN_ID = "0123456789abcdef0123456789abcdef"
TEACHER: dict[str, Any] = {
    "name": "wise",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "budget": {"steps": 30},
    "tracking": {"experiment": "teachers"},
}
STUDENT = {**TEACHER, "name": "young", "tracking": {"experiment": "students"}}
NET = "from torch import nn\n\n\ndef build(width):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, width))\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the teacher's job in `jobs/`; no model is built for its facts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(probe, "_ask", lambda *_: asdict(FACTS))
    write(tmp_path / "jobs" / "wise.yaml", TEACHER)
    return tmp_path


def write(path: Path, sections: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sections))
    return path


def student(place: Path, teacher: Any, **sections: Any) -> JobConfig:
    values = {**STUDENT, "storage": str(place / "runs"), "distill": {"teacher": teacher}, **sections}
    return JobConfig.model_validate(values)


def planned(place: Path, teacher: Any, **sections: Any) -> Plan:
    return plan_job(student(place, teacher, **sections), CLUSTER, place / "jobs")


def found(place: Path, teacher: Any) -> Teacher:
    plan = planned(place, teacher)
    assert plan.distill is not None
    (only,) = plan.distill.teachers
    return only


def refused(place: Path, teacher: Any) -> list[Problem]:
    with pytest.raises(JobError) as caught:
        planned(place, teacher)
    return list(caught.value.problems)


def only_refusal(place: Path, teacher: Any) -> str:
    (problem,) = refused(place, teacher)
    return str(problem)


def make_run(place: Path, sections: dict[str, Any] = TEACHER, run_id: str = RUN_ID, *, uri: str = "") -> Plan:
    """A run as training leaves it: its folder, and of each phase the checkpoint and the manifest."""
    job = JobConfig.model_validate({**sections, "storage": str(place / "runs")})
    plan = plan_job(job, CLUSTER, place / "jobs")
    model = build_model(job.model, plan.data, 0) if job.model.kind != "python" else torch.nn.Linear(2, 2)
    shards = [Shard(name, 0, {MASTER: value.detach().reshape(-1)}) for name, value in model.named_parameters()]
    shards += [Shard(name, 0, {BUFFER: value.reshape(-1)}) for name, value in model.named_buffers()]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for phase in plan.phases:
        folder = checkpoint.checkpoint_folder(plan.phase_folder(phase) / "checkpoints", phase.last_step)
        checkpoint.write_shards(folder, 0, shards)
        records = [{"step": phase.last_step, "time_ms": 1, "metrics": {"test/accuracy": 0.5}}]
        checkpoint.write_manifest(folder, 1, {"step": phase.last_step, "engine": {}}, shapes, records)
        (plan.phase_folder(phase) / HISTORY).write_text(json.dumps(records[0]) + "\n")
        manifest = {
            "fingerprint": phase.fingerprint,
            "name": phase.name,
            "checkpoint": f"checkpoints/{folder.name}",
            "seconds": 1.0,
            "metrics": {"test/accuracy": 0.5},
        }
        describe(plan, plan.phase_folder(phase))
        write_json(plan.phase_folder(phase) / PHASE_MANIFEST, manifest)
    describe(plan, plan.run_folder)
    write_json(plan.run_folder / RUN, {"run_id": run_id, "uri": uri, "open": False, "delivered": True})
    return plan


def describe(plan: Plan, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(job_to_yaml(plan.job))
    imports = [os.getcwd(), str(Path.cwd() / "jobs")]
    write_json(folder / PLAN, {**plan.to_dict(), "import_folders": imports})


# ------------------------------------------------------------------------------------------------------- a job's file


def test_a_job_is_planned_on_the_students_storage_and_store(place: Path) -> None:
    tracking = {"experiment": "students", "uri": f"sqlite:///{place}/other.db"}
    plan = planned(place, "jobs/wise.yaml", tracking=tracking)
    assert plan.distill is not None
    (teacher,) = plan.distill.teachers
    assert teacher.plan is not None
    assert (teacher.plan.job.storage, teacher.plan.job.tracking.uri) == (str(place / "runs"), tracking["uri"])
    assert teacher.plan.job.tracking.experiment == "teachers"
    assert (teacher.name, teacher.source, teacher.kind) == ("wise", "jobs/wise.yaml", "phase")
    assert teacher.fingerprint == teacher.plan.fingerprint
    assert teacher.place == place / "runs" / "phases" / teacher.fingerprint
    assert (teacher.shape, teacher.num_classes) == ((1, 8, 8), 10)
    assert (teacher.mean, teacher.std) == (teacher.plan.data.mean, teacher.plan.data.std) != ((), ())
    assert teacher.import_folders == (str(place), str(place / "jobs"))
    assert teacher_runs.is_trained(teacher) is False


def test_a_job_is_looked_for_in_the_working_folder_and_then_beside_the_student(place: Path) -> None:
    beside = found(place, "wise.yaml")
    write(place / "wise.yaml", {**TEACHER, "seed": 1})
    here = found(place, "wise.yaml")
    assert beside.fingerprint != here.fingerprint
    assert here.import_folders == (str(place), str(place))
    assert found(place, str(place / "jobs" / "wise.yaml")).fingerprint == beside.fingerprint


def test_a_phase_of_a_job(place: Path) -> None:
    rounds = [{"sparsity": 0.5, "sparse_steps": 4, "redense_steps": 4}]
    write(place / "jobs" / "wise.yaml", {**TEACHER, "dsd": {"rounds": rounds}})
    last = found(place, "wise.yaml")
    sparse = found(place, {"source": "wise.yaml", "phase": "sparse-1", "precision": "bf16"})
    assert last.plan is not None and sparse.plan is not None
    assert [phase.fingerprint for phase in last.plan.phases][1:] == [sparse.fingerprint, last.fingerprint]
    assert (last.name, sparse.name, last.precision, sparse.precision) == ("wise", "wise sparse-1", "fp32", "bf16")
    assert only_refusal(place, {"source": "wise.yaml", "phase": "sparse-2"}) == (
        "distill.teacher.phase: sparse-2 is not a phase of this job; use dense or sparse-1 or redense-1"
    )


def test_problems_of_a_teachers_job_name_its_file(place: Path) -> None:
    write(place / "jobs" / "wise.yaml", {**TEACHER, "optimizer": {"kind": "sgd", "lr": -1}, "sed": 1})
    assert {problem.key for problem in refused(place, "wise.yaml")} == {
        "distill.teacher: wise.yaml: optimizer.lr",
        "distill.teacher: wise.yaml: sed",
    }
    write(place / "jobs" / "wise.yaml", {**TEACHER, "parallel": {"workers": 5}})
    assert [problem.key for problem in refused(place, ["wise.yaml"])] == [
        "distill.teacher.0: wise.yaml: data.global_batch",
        "distill.teacher.0: wise.yaml: parallel.workers",
    ]
    (place / "jobs" / "wise.yaml").write_text("")
    assert only_refusal(place, "wise.yaml").startswith("distill.teacher: wise.yaml: is empty")


def test_problems_of_student_and_teachers_come_together(place: Path) -> None:
    with pytest.raises(JobError) as caught:
        planned(place, ["none.yaml", "models:/"], budget={"steps": 5, "epochs": 1})
    keys = [problem.key for problem in caught.value.problems]
    assert keys[-2:] == ["distill.teacher.0", "distill.teacher.1"]
    assert any(key.startswith("budget") for key in keys[:-2])


def test_a_teacher_may_be_a_student_and_never_its_own(place: Path) -> None:
    write(place / "jobs" / "middle.yaml", {**TEACHER, "name": "middle", "distill": {"teacher": "wise.yaml"}})
    middle = found(place, "middle.yaml")
    assert middle.plan is not None and middle.plan.distill is not None
    assert [teacher.name for teacher in middle.plan.distill.teachers] == ["wise"]
    assert middle.plan.distill.teachers[0].fingerprint == found(place, "wise.yaml").fingerprint

    write(place / "jobs" / "wise.yaml", {**TEACHER, "distill": {"teacher": "middle.yaml"}})
    assert only_refusal(place, "middle.yaml") == (
        "distill.teacher: middle.yaml: distill.teacher: wise.yaml: distill.teacher: middle.yaml would be taught by "
        "itself: middle.yaml → wise.yaml → middle.yaml; name a teacher that is trained without it"
    )


def test_what_is_taught_by_another_teacher_is_another_student(place: Path) -> None:
    first = planned(place, "wise.yaml").fingerprint
    assert planned(place, "wise.yaml").fingerprint == first
    write(place / "jobs" / "wise.yaml", {**TEACHER, "tracking": {"experiment": "renamed"}})
    assert planned(place, "wise.yaml").fingerprint == first
    write(place / "jobs" / "wise.yaml", {**TEACHER, "seed": 1})
    assert planned(place, "wise.yaml").fingerprint != first


# ----------------------------------------------------------------------------------------- runs, phases, checkpoints


def test_a_run_is_found_by_its_id_and_by_its_folder(place: Path) -> None:
    plan = make_run(place)
    (phase,) = plan.phases
    by_job = found(place, "wise.yaml")
    last = plan.phase_folder(phase) / "checkpoints" / "step-00000030"
    for source in (RUN_ID, f"runs:/{RUN_ID}", str(plan.run_folder), f"runs/{plan.run_folder.name}", by_job.place):
        teacher = found(place, str(source))
        assert (teacher.kind, teacher.place) == ("phase", by_job.place)
        assert replace(teacher, source="", plan=None) == replace(by_job, source="", plan=None)
    teacher = found(place, str(last))
    assert (teacher.kind, teacher.place, teacher.name) == ("checkpoint", last, "wise step-00000030")
    assert teacher.fingerprint != phase.fingerprint
    assert (teacher.shape, teacher.num_classes, teacher.mean) == ((1, 8, 8), 10, plan.data.mean)


def test_a_run_of_code_that_has_changed_since_is_another_teacher(place: Path) -> None:
    (place / "jobs" / "net_of_a_run.py").write_text(NET)
    model = {"kind": "python", "target": "net_of_a_run:build", "args": {"width": 10}}
    make_run(place, {**TEACHER, "model": model})
    first = found(place, RUN_ID)
    assert first.import_folders == (str(place), str(place / "jobs"))
    assert found(place, RUN_ID) == first
    (place / "jobs" / "net_of_a_run.py").write_text(NET + "\n# mended\n")
    assert found(place, RUN_ID).fingerprint != first.fingerprint
    (place / "jobs" / "net_of_a_run.py").unlink()
    assert only_refusal(place, RUN_ID).startswith(
        "distill.teacher: net_of_a_run:build names the module net_of_a_run, which is found neither"
    )


def test_the_data_of_a_found_run_need_not_be_there(place: Path) -> None:
    plan = make_run(place)
    for folder in (plan.run_folder, plan.phase_folder(plan.phases[0])):
        (folder / JOB).write_text(job_to_yaml(plan.job).replace("kind: digits", "kind: image_folder\n  path: gone"))
    teacher = found(place, RUN_ID)
    assert (teacher.shape, teacher.num_classes, teacher.std) == ((1, 8, 8), 10, plan.data.std)


def test_what_has_not_come_to_its_end_is_refused_and_a_job_is_not(place: Path) -> None:
    plan = make_run(place)
    (phase,) = plan.phases
    folder = plan.phase_folder(phase)
    newest = folder / "checkpoints" / "step-00000030"
    (newest / CHECKPOINT_MANIFEST).unlink()
    assert only_refusal(place, str(newest)).startswith(f"distill.teacher: {newest} is not complete: "[:80])
    remedy = "has not come to the end of dense; train it on, or name its job's file, which is trained first"
    assert only_refusal(place, RUN_ID) == f"distill.teacher: {RUN_ID} {remedy}"
    (folder / PHASE_MANIFEST).unlink()
    assert only_refusal(place, RUN_ID) == f"distill.teacher: {RUN_ID} {remedy}"
    assert found(place, "wise.yaml").fingerprint == phase.fingerprint
    (folder / PLAN).unlink()
    assert "plan.json is missing" in only_refusal(place, RUN_ID)


@pytest.mark.parametrize(
    ("teacher", "text"),
    [
        ("none.yaml", "none.yaml is not a file (looked for "),
        ("nowhere", "nowhere is no folder, and no run in "),
        ("runs:/nowhere", "runs:/nowhere is no folder, and no run in "),
        (RUN_ID, f"{RUN_ID} is no run in "),
        ("jobs", "is neither a run, nor a phase, nor a checkpoint"),
        ("models:/wise", "models:/wise is no registered model; write models:/name@alias or models:/name/version"),
        ("models:/wise@best", "is not registered: MLflow has no model wise with this alias"),
        ("models:/wise/1", "is not registered: MLflow has no model wise with an export of temper as version 1"),
        ({"phase": "dense"}, "is to be named by its source or by its model and weights, one of the two"),
        ({"source": "wise.yaml", "weights": "w"}, "is to be named by its source or by its model and weights"),
        ({"weights": "w"}, "distill.teacher.weights: w are the weights of a network that is not named"),
        ({"model": TEACHER["model"]}, "has a model and no weights"),
        ({"model": TEACHER["model"], "weights": "none"}, "distill.teacher.weights: none is not a file (looked for "),
        ({"source": "models:/wise/1", "phase": "dense"}, "distill.teacher.phase: dense names a phase of a job"),
        ([], "distill.teacher: [] names no teacher"),
        ({"source": "jobs/wise.yaml", "weight": 2}, "distill.teacher.weight: 2.0 acts in an ensemble only, and there"),
    ],
)  # fmt: skip
def test_a_teacher_that_is_nowhere(place: Path, teacher: Any, text: str) -> None:
    said = only_refusal(place, teacher)
    assert said.startswith("distill.teacher") and text in said
    assert not (place / "runs").exists() or not list((place / "runs").glob("mlflow*"))


def test_the_same_teacher_twice(place: Path) -> None:
    make_run(place)
    (problem,) = refused(place, ["wise.yaml", RUN_ID])
    assert str(problem) == (
        f"distill.teacher.1: {RUN_ID} is the same teacher as distill.teacher.0; name it once, with a larger weight"
    )
    write(place / "jobs" / "other.yaml", {**TEACHER, "seed": 1})
    plan = planned(place, [{"source": "wise.yaml", "weight": 2}, "other.yaml"])
    assert plan.distill is not None
    assert [teacher.weight for teacher in plan.distill.teachers] == [2.0, 1.0]


# ------------------------------------------------------------------------------------------------ exports and weights


def export(place: Path, reference: str, *more: str) -> dict[str, Any]:
    command = ["export", reference, "--to", str(place / "out"), "--storage", str(place / "runs"), *more]
    assert cli.main(command) == 0
    return {}


def test_an_export(place: Path) -> None:
    make_run(place)
    export(place, RUN_ID)
    teacher = found(place, "out")
    assert (teacher.name, teacher.kind, teacher.place) == ("wise", "weights", place / "out" / "model.safetensors")
    assert (teacher.shape, teacher.num_classes) == ((1, 8, 8), 10)
    assert only_refusal(place, {"source": "out", "phase": "dense"}) == (
        "distill.teacher.phase: dense names a phase of a job or a run, and the teacher is an export; leave it out"
    )
    job = (place / "out" / JOB).read_text()
    (place / "out" / JOB).write_text(job.replace("kind: digits", "kind: image_folder\n  path: gone"))
    elsewhere = found(place, "out")
    assert (elsewhere.shape, elsewhere.num_classes, elsewhere.mean) == (None, None, None)
    assert elsewhere.fingerprint == teacher.fingerprint


def test_weights_of_a_network_of_ones_own(place: Path) -> None:
    (place / "jobs" / "net_of_weights.py").write_text(NET)
    config = {
        "model": {"kind": "python", "target": "net_of_weights:build", "args": {"width": 10}},
        "weights": "wise.safetensors",
    }
    file = place / "jobs" / "wise.safetensors"
    save_file(fitting(torch.zeros), file)
    teacher = found(place, config)
    assert (teacher.name, teacher.source, teacher.kind) == ("wise", "wise.safetensors", "weights")
    assert (teacher.place, teacher.shape, teacher.num_classes) == (file, None, None)
    assert teacher.import_folders == (str(place), str(place / "jobs"))

    other = {**config, "model": {**config["model"], "args": {"width": 11}}}  # type: ignore[dict-item]
    fingerprints = {teacher.fingerprint, found(place, other).fingerprint}
    (place / "jobs" / "net_of_weights.py").write_text(NET + "\n# mended\n")
    fingerprints.add(found(place, config).fingerprint)
    save_file(fitting(torch.ones), file)
    fingerprints.add(found(place, config).fingerprint)
    assert len(fingerprints) == 4


def fitting(fill: Callable[[tuple[int, ...]], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the network that FACTS are of."""
    return {name: fill(shape) for name, shape in FACTS.weight_shapes.items()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda whole: b"", "is not a safetensors file"),
        (lambda whole: b"\x80\x02torch", "is not a safetensors file"),
        (lambda whole: (7).to_bytes(8, "little") + b"no json", "is not a safetensors file"),
        (lambda whole: (2).to_bytes(8, "little") + b"[]", "is not a safetensors file"),
        (lambda whole: (8).to_bytes(8, "little") + b'{"a": 1}', "is not a safetensors file"),
        (lambda whole: whole[:-1], "bytes, and by its header "),
        (lambda whole: whole + b"\0", "bytes, and by its header "),
    ],
)
def test_a_file_that_is_not_whole(place: Path, change: Callable[[bytes], bytes], text: str) -> None:
    file = place / "wise.safetensors"
    save_file(fitting(torch.zeros), file)
    file.write_bytes(change(file.read_bytes()))
    said = only_refusal(place, {"model": TEACHER["model"], "weights": "wise.safetensors"})
    assert said.startswith(f"distill.teacher.weights: wise.safetensors cannot be used: {file}: ") and text in said


@pytest.mark.parametrize(
    ("weights", "rule"),
    [
        ({"1.weight": (64, 64)}, "has 1.weight in the shape [64, 64], the model in [32, 64]"),
        ({"5.weight": (10, 32)}, "has 5.weight, which is not in the model (1 of 5 tensors are not)"),
        ({"3.weight": None}, "has 2,090 elements, fewer than the 2,410 parameters of the model"),
    ],
)
def test_weights_of_another_network(place: Path, weights: dict[str, Any], rule: str) -> None:
    shapes = {name: shape for name, shape in {**FACTS.weight_shapes, **weights}.items() if shape is not None}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, place / "wise.safetensors")
    config = {"model": TEACHER["model"], "weights": "wise.safetensors"}
    said = f"{rule}; give the model as it was trained"
    assert only_refusal(place, config) == f"distill.teacher.weights: wise.safetensors {said}"
    assert only_refusal(place, [config]) == f"distill.teacher.0.weights: wise.safetensors {said}"
    make_run(place)
    export(place, RUN_ID)
    (place / "wise.safetensors").rename(place / "out" / "model.safetensors")
    assert only_refusal(place, "out") == f"distill.teacher: out {said}"


def test_weights_are_known_by_what_they_say_and_not_by_the_files_metadata(place: Path) -> None:
    config, fingerprints = {"model": TEACHER["model"], "weights": "wise.safetensors"}, set()
    for metadata in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"c": "3"}, None):
        save_file(fitting(torch.ones), place / "wise.safetensors", metadata=metadata)
        fingerprints.add(found(place, config).fingerprint)
    assert len(fingerprints) == 1
    save_file({**fitting(torch.ones), "3.bias": torch.full((10,), 2.0)}, place / "wise.safetensors")
    fingerprints.add(found(place, config).fingerprint)
    assert len(fingerprints) == 2


def test_an_export_of_a_student_that_saw_no_label_knows_its_data(place: Path) -> None:
    data = {"kind": "digits", "global_batch": 64, "labels": 0}
    make_run(place, {**TEACHER, "name": "young", "data": data, "distill": {"teacher": "wise.yaml", "alpha": 1.0}})
    export(place, RUN_ID)
    teacher = found(place, "out")
    assert (teacher.shape, teacher.num_classes, len(teacher.mean or ())) == ((1, 8, 8), 10, 1)


# ---------------------------------------------------------------------------------------- a job to be planned again


def test_the_job_of_a_run_finds_its_teachers_from_everywhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make_run(place)
    export(place, RUN_ID)
    write(place / "jobs" / "other.yaml", {**TEACHER, "seed": 1})
    save_file(fitting(torch.ones), place / "jobs" / "w.safetensors")
    weights = {"model": TEACHER["model"], "weights": "w.safetensors"}
    plan = planned(place, [{"source": "other.yaml", "weight": 2}, "out", RUN_ID, weights])
    assert plan.distill is not None and plan.job.distill is not None
    asked = plan.job.distill.teacher
    assert isinstance(asked, list) and asked[1:3] == [str(place / "out"), RUN_ID]
    named = [(item.source, item.weights) for item in (asked[0], asked[3]) if not isinstance(item, str)]
    assert named == [(str(place / "jobs" / "other.yaml"), None), (None, str(place / "jobs" / "w.safetensors"))]

    describe(plan, plan.run_folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    again = plan_job(load_job(plan.run_folder / JOB), CLUSTER, plan.run_folder)
    assert (again.fingerprint, again.run_folder) == (plan.fingerprint, plan.run_folder)
    assert again.job == plan.job


def test_two_modules_of_one_name(place: Path) -> None:
    """A worker imports one of them only."""
    for folder, text in (("jobs", NET), ("elsewhere", NET + "\n# another\n")):
        write(
            place / folder / "wise.yaml",
            {**TEACHER, "model": {"kind": "python", "target": "net_twice:build", "args": {"width": 10}}},
        )
        (place / folder / "net_twice.py").write_text(text)
    assert only_refusal(place, "elsewhere/wise.yaml") == (
        f"distill.teacher: elsewhere/wise.yaml is built with {place}/elsewhere/net_twice.py, in whose place a worker "
        f"would import {place}/jobs/net_twice.py; rename one of the two"
    )
    (place / "elsewhere" / "net_twice.py").write_text(NET)
    assert found(place, "elsewhere/wise.yaml").import_folders == (str(place), str(place / "elsewhere"))


def write_code(place: Path, folder: str, target: str, files: dict[str, str]) -> None:
    """A teacher's job in `folder`, whose network `target` is one of `files` there."""
    for name, text in files.items():
        (place / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (place / folder / name).write_text(text)
    write(place / folder / "wise.yaml", {**TEACHER, "model": {"kind": "python", "target": target}})


def test_a_helper_of_another_helpers_name(place: Path) -> None:
    for name in ("one", "two"):
        files = {f"net_{name}.py": f"import layers_of_test\n{NET}", "layers_of_test.py": f"width = '{name}'\n"}
        write_code(place, name, f"net_{name}:build", files)
    assert only_refusal(place, ["one/wise.yaml", "two/wise.yaml"]) == (
        f"distill.teacher.1: two/wise.yaml is built with {place}/two/layers_of_test.py, in whose place a worker would "
        f"import {place}/one/layers_of_test.py; rename one of the two"
    )
    assert found(place, "one/wise.yaml").import_folders == (str(place), str(place / "one"))
    helper = place / "jobs" / "layers_of_test.py"
    helper.write_text("width = 'one'\n")
    assert found(place, "one/wise.yaml").name == "wise"
    helper.write_text("def load(split):\n    ...\n")
    said = only_refusal(place, "one/wise.yaml")
    assert said.startswith(
        f"distill.teacher: one/wise.yaml is built with {place}/one/layers_of_test.py, in whose place"
    )
    assert f"would import {helper}; " in said
    helper.unlink()
    (place / "jobs" / "layers_of_test").mkdir()
    assert found(place, "one/wise.yaml").name == "wise", "a module goes before a folder that is no package"
    (place / "jobs" / "layers_of_test" / "__init__.py").write_text("width = 'one'\n")
    assert f"would import {place}/jobs/layers_of_test; " in only_refusal(place, "one/wise.yaml")


def test_folders_without_an_init_are_one_package_and_give_way_to_another(place: Path) -> None:
    write_code(place, "one", "spaced_of_test.theirs:build", {"spaced_of_test/theirs.py": NET})
    mine = place / "jobs" / "spaced_of_test" / "mine.py"
    mine.parent.mkdir()
    mine.write_text(NET + "\n# the student's\n")
    model = {"kind": "python", "target": "spaced_of_test.mine:build", "args": {"width": 10}}
    plan = planned(place, "one/wise.yaml", model=model)
    assert plan.distill is not None and plan.distill.teachers[0].import_folders[-1] == str(place / "one")
    (place / "one" / "spaced_of_test" / "__init__.py").touch()
    with pytest.raises(JobError) as caught:
        planned(place, "one/wise.yaml", model=model)
    assert [str(problem) for problem in caught.value.problems] == [
        f"model.target: spaced_of_test.mine:build is built with {mine}, in whose place a worker would import "
        f"{place}/one/spaced_of_test; rename one of the two"
    ]


def write_export(folder: Path, **sections: Any) -> Path:
    """An export as somebody else may have made it."""
    write(folder / JOB, {**TEACHER, **sections})
    save_file({"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, folder / "model.safetensors")
    return folder


def searched(place: Path, source: str) -> Teacher:
    """The teacher without a plan of its student."""
    job = student(place, source)
    return find_teacher(Search("distill.teacher", TeacherConfig(source=source), job, CLUSTER, place / "jobs"))


def test_where_the_data_of_an_export_are_elsewhere_its_normalisation_is_known_by_its_job(place: Path) -> None:
    data = {"kind": "image_folder", "path": "gone", "global_batch": 64}
    write_export(place / "plain", data=data)
    write_export(place / "set", data={**data, "normalize": {"mean": [0.5, 0.25], "std": [2.0, 4.0]}})
    plain, set_ = searched(place, "plain"), searched(place, "set")
    assert (plain.mean, plain.std, plain.shape, plain.num_classes) == (None, None, None, None)
    assert (set_.mean, set_.std, set_.shape, set_.num_classes) == ((0.5, 0.25), (2.0, 4.0), None, None)
    synthetic = {"kind": "synthetic", "shape": [4], "num_classes": 3, "global_batch": 64, "train_examples": 64}
    write_export(place / "raw", data=synthetic)
    assert (searched(place, "raw").mean, searched(place, "raw").shape) == ((), (4,))


def test_an_export_of_a_student_that_learned_without_labels(place: Path) -> None:
    data = {**TEACHER["data"], "labels": 0}
    write_export(place / "out", data=data, distill={"teacher": "wise.yaml", "alpha": 1.0})
    assert searched(place, "out").shape == (1, 8, 8)


CODE_OF_AN_EXPORT = [
    "os:system",
    "json:loads",
    "net_beside_weights:build",
    "out.net_beside_weights:build",
    "runs.teachers.net_in_storage:build",
    "helpers_of_test:system",
    "nowhere_of_test:build",
]


@pytest.mark.parametrize("target", CODE_OF_AN_EXPORT)
def test_an_export_brings_no_code(place: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Neither Python's, nor a file among what was exported or fetched, nor what the user's code has only imported."""
    model = {"kind": "python", "target": target, "args": {"command": "touch PWNED"}}
    write_export(place / "out", model=model)
    (place / "out" / "net_beside_weights.py").write_text(NET)
    (place / "runs" / "teachers").mkdir(parents=True)
    (place / "runs" / "teachers" / "net_in_storage.py").write_text(NET)
    (place / "jobs" / "helpers_of_test.py").write_text("from os import system\n")
    rule = f"is built by code that it names itself: `{target}`; write model: and weights: in this job"
    assert only_refusal(place, "out") == f"distill.teacher: out {rule}"

    monkeypatch.setattr(registry, "download_version", lambda uri, name, version, to: shutil.copytree(
        place / "out", to, dirs_exist_ok=True
    ))  # fmt: skip
    assert only_refusal(place, "models:/wise/3") == f"distill.teacher: models:/wise/3 {rule}"


def test_an_export_of_the_users_own_code(place: Path) -> None:
    write_export(place / "out", model={"kind": "python", "target": "net_of_user:build", "args": {"width": 10}})
    (place / "out" / "net_of_user.py").write_text(NET + "\n# not this one\n")
    for folder in (place / "jobs", place):
        (folder / "net_of_user.py").write_text(NET)
        teacher = searched(place, "out")
        assert teacher.import_folders == (str(place), str(place / "jobs"))
    (place / "jobs" / "net_of_user.py").unlink()
    assert searched(place, "out").fingerprint == teacher.fingerprint
    assert str(place / "out") not in searched(place, "out").import_folders


def test_connectors_stay_out_of_the_model(tmp_path: Path) -> None:
    names = ("layer.weight", f"{CONNECTORS}.0.weight")
    checkpoint.write_shards(tmp_path, 0, [Shard(name, 0, {MASTER: torch.ones(4)}) for name in names])
    checkpoint.write_manifest(tmp_path, 1, {"step": 1}, {name: (2, 2) for name in names})
    assert list(model_state(CheckpointReader(tmp_path))) == ["layer.weight"]


# --------------------------------------------------------------------------------------------------- MLflow's registry


def tracked_run(place: Path, sections: dict[str, Any] = TEACHER) -> tuple[Plan, str]:
    """A run that a SQLite store in the storage knows."""
    from temper.launch.tracked_run import TrackedRun

    (place / "runs").mkdir(exist_ok=True)
    uri = f"sqlite:///{place}/runs/mlflow.db"
    plan = make_run(place, sections)
    run = TrackedRun(uri, plan, "")
    run.open()
    write_json(run.record, {"run_id": run.run_id, "uri": uri, "open": False, "delivered": True})
    return plan, run.run_id


def test_a_registered_model_goes_there_and_comes_back(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    _, run_id = tracked_run(place)
    assert cli.main(["export", run_id, "--to", "out", "--alias", "best", "--json"]) == 2
    assert "--alias: best is a name for a registered version; add --register NAME" in capsys.readouterr().err
    assert not (place / "out").exists()

    export(place, run_id, "--register", "wise net", "--alias", "best", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["registered"] == "models:/wise net/1"
    assert "registered as models:/wise net/1, and as models:/wise net@best" in err
    client = MlflowClient(f"sqlite:///{place}/runs/mlflow.db")
    version = client.get_model_version_by_alias("wise net", "best")
    assert (version.version, version.run_id) in (("1", run_id), (1, run_id))
    assert {"model.safetensors", "job.yaml", "README.md"} <= {file.name for file in Path(version.source).iterdir()}

    teacher = found(place, "models:/wise net@best")
    (folder,) = (place / "runs" / "teachers" / "models").iterdir()
    assert folder.name.startswith("wise_net-1-")
    assert (teacher.name, teacher.kind, teacher.place) == ("wise net/1", "weights", folder / "model.safetensors")
    assert (teacher.shape, teacher.num_classes) == ((1, 8, 8), 10)
    first, second = load_file(place / "out" / "model.safetensors"), load_file(teacher.place)
    assert {name: value.tolist() for name, value in first.items()} == {
        name: value.tolist() for name, value in second.items()
    }

    monkeypatch.setattr(registry, "build_client", lambda uri: (_ for _ in ()).throw(OSError("no route to host")))
    assert found(place, "models:/wise net/1") == replace(teacher, source="models:/wise net/1")
    said = only_refusal(place, "models:/wise net@best")
    assert "cannot be looked up: MLflow at sqlite:///" in said and "no route to host" in said
    assert said.endswith("; start the server, or name a version that is here: models:/wise net/1")
    assert only_refusal(place, "models:/another@best").endswith("no route to host; start the server")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--register", "a/b"], "--register: a/b is not a name that MLflow takes"),
        (["--register", "a:b"], "--register: a:b is not a name that MLflow takes"),
        (["--register", ".."], "--register: .. is not a name that MLflow takes"),
        (["--register", ""], "--register: '' is not a name that MLflow takes"),
        (["--register", "fine", "--alias", "latest"], "--alias: latest is not an alias that MLflow takes"),
        (["--register", "fine", "--alias", "v2"], "--alias: v2 is not an alias that MLflow takes"),
        (["--register", "fine", "--alias", "so good"], "--alias: so good is not an alias that MLflow takes"),
    ],
)
def test_a_name_that_is_none_is_refused_before_anything_is_written(
    place: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(place)
    assert cli.main(["export", RUN_ID, "--to", "out", "--storage", str(place / "runs"), *more]) == 2
    assert text in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_run_is_registered_once_and_its_version_keeps_its_files(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run_id = tracked_run(place)
    registered = register_run(plan.run_folder, "wise")
    assert (registered.uri, registered.is_champion) == ("models:/wise/1", True)
    first = found(place, "models:/wise@champion")

    (plan.run_folder / JOB).write_text(job_to_yaml(plan.job.model_copy(update={"name": "wiser"})))
    assert register_run(plan.run_folder, "wise") == replace(registered, note="it is the champion already")
    export(place, run_id, "--register", "wise", "--json")
    out, err = capsys.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert {key: said[key] for key in ("registered", "alias", "note")} == {
        "registered": "models:/wise/1",
        "alias": "champion",
        "note": "it is the champion already",
    }
    assert "registered as models:/wise/1, and as models:/wise@champion" in err

    newest = registry.download_run_export(f"sqlite:///{place}/runs/mlflow.db", run_id, "dense", place)
    assert newest is not None and (newest / "README.md").read_text().startswith("# wise\n")
    assert found(place, "models:/wise/1") == replace(first, source="models:/wise/1")


def test_a_download_that_breaks_off_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str, name: str, version: str, to: Path) -> Path:
        (to / "model.safetensors").write_bytes(b"half")
        raise RunError("connection reset")

    monkeypatch.setattr(registry, "download_version", broken)
    assert "connection reset" in only_refusal(place, "models:/wise/3")
    assert list((place / "runs" / "teachers" / "models").iterdir()) == []


def test_a_run_that_only_mlflow_knows(place: Path) -> None:
    rounds = [{"sparsity": 0.5, "sparse_steps": 4, "redense_steps": 4}]
    plan, run_id = tracked_run(place, {**TEACHER, "dsd": {"rounds": rounds}})
    fingerprints = [phase.fingerprint for phase in plan.phases]
    export(place, run_id, "--phase", "sparse-1", "--register", "wise")
    (plan.run_folder / RUN).unlink()  # as in another copy of the storage
    assert found(place, run_id).fingerprint == fingerprints[2]
    dense = found(place, {"source": f"runs:/{run_id}", "phase": "dense"})
    assert (dense.kind, dense.fingerprint) == ("phase", fingerprints[0])

    for fingerprint in fingerprints:
        (place / "runs" / "phases" / fingerprint).rename(place / fingerprint)
    teacher = found(place, {"source": run_id, "phase": "sparse-1"})
    assert (teacher.kind, teacher.name) == ("weights", f"run {run_id[:8]} sparse-1")
    assert (
        teacher.place
        == place / "runs" / "teachers" / "models" / f"{run_id}-{fingerprints[1][:10]}" / "model.safetensors"
    )
    assert only_refusal(place, run_id) == (
        f"distill.teacher: {run_id} is a run whose phase redense-1 is not in {place}/runs, and which has no export of "
        "it in MLflow; export it where it is, with --register"
    )


# ----------------------------------------------------------------------------------------------------- what it imports


def test_the_plan_of_a_student_imports_nothing_heavy(place: Path) -> None:
    (place / "jobs" / "young.yaml").write_text(job_to_yaml(student(place, "wise.yaml")))
    planned(place, "wise.yaml")  # leaves what is known of the models in the cache
    script = (
        "import sys; from temper.cli import main; code = main(['plan', 'jobs/young.yaml', '--json'])\n"
        "heavy = ('torch', 'torchvision', 'ray', 'deepspeed', 'mlflow', 'pandas', 'sklearn', 'pyarrow')\n"
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=place, check=False)
    plan, said = done.stdout.splitlines()
    assert said == "0 []", done.stderr
    assert [teacher["name"] for teacher in json.loads(plan)["distill"]["teachers"]] == ["wise"]


def test_the_python_api_finds_teachers_too(place: Path) -> None:
    (place / "jobs" / "young.yaml").write_text(job_to_yaml(student(place, "wise.yaml")))
    plan = temper.plan(place / "jobs" / "young.yaml")
    assert plan.distill is not None
    assert [teacher.name for teacher in plan.distill.teachers] == ["wise"]


# ---------------------------------------------------------------------------------------- what is told, what is held


def test_results_and_tags(place: Path) -> None:
    plan = make_run(place)
    write(place / "jobs" / "other.yaml", {**TEACHER, "seed": 1})
    alone, both = planned(place, RUN_ID), planned(place, ["wise.yaml", "other.yaml"])
    fingerprint = plan.fingerprint
    assert both.distill is not None
    other = both.distill.teachers[1].fingerprint
    assert teacher_tags(alone) == {"temper.teacher": f"wise {fingerprint}", "temper.teacher.run_id": RUN_ID}
    assert teacher_tags(both) == {
        "temper.teacher.0": f"wise {fingerprint}",
        "temper.teacher.0.run_id": RUN_ID,
        "temper.teacher.1": f"wise {other}",
    }
    results = teacher_results(both, frozenset([other]))
    assert [list(asdict(result).values()) for result in results] == [
        ["wise", RUN_ID, fingerprint, True, {"test/accuracy": 0.5}],
        ["wise", "", other, False, {}],
    ]
    assert teacher_tags(plan) == {} and teacher_results(plan, frozenset()) == []


def test_only_the_phases_up_to_the_wanted_one_are_run(place: Path) -> None:
    rounds = [{"sparsity": 0.5, "sparse_steps": 4, "redense_steps": 4}]
    write(place / "jobs" / "wise.yaml", {**TEACHER, "dsd": {"rounds": rounds}})
    for phase, names in (("sparse-1", ["dense", "sparse-1"]), ("redense-1", ["dense", "sparse-1", "redense-1"])):
        teacher = found(place, {"source": "wise.yaml", "phase": phase})
        with ExitStack() as stack:
            pending = claim_teacher(teacher, stack, lambda text: None)
            assert [item.name for item in pending] == names
            assert teacher.plan is not None
            with pytest.raises(HeldError), claimed(teacher.plan.run_folder / LOCK, "it"):
                pass


def test_a_teacher_that_another_command_trains_is_waited_for(place: Path) -> None:
    teacher = found(place, "wise.yaml")
    assert teacher.plan is not None
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    pending: list[Any] = []
    with ExitStack() as stack, ExitStack() as other:
        assert claim_teacher(teacher, other, lambda text: None) == teacher.plan.phases
        waiting = threading.Thread(target=lambda: pending.append(claim_teacher(teacher, stack, say)))
        waiting.start()
        assert told.wait(60)
        make_run(place)  # the other command comes to the end
        other.close()
        waiting.join(60)
    assert (pending, said) == ([()], ["waiting for another command that trains it"])


def test_a_teacher_in_use_is_not_removed(place: Path) -> None:
    plan = make_run(place)
    with ExitStack() as stack, ExitStack() as forgetting:
        keep_teacher(found(place, RUN_ID), stack)
        with pytest.raises(HeldError):
            train.forget_phases(plan, forgetting)
    assert teacher_runs.is_trained(found(place, "wise.yaml"))
    with ExitStack() as forgetting:
        train.forget_phases(plan, forgetting)
    assert not teacher_runs.is_trained(found(place, "wise.yaml"))


def test_a_teachers_run_that_broke_off_at_its_end_is_delivered_by_its_student(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its phases are complete, so that no command would run it again."""
    delivered: list[str] = []
    monkeypatch.setattr(train, "_run", lambda spec, *_: complete(spec.plan, spec.phases))
    monkeypatch.setattr(train, "_deliver_late", lambda spec, *_: delivered.append(spec.plan.job.name))
    job = student(place, "wise.yaml")
    train.launch_train(job, place / "jobs", train.TrainOptions())
    assert delivered == []  # of a teacher that this storage has never begun nothing is known
    own = found(place, "wise.yaml").plan
    assert own is not None
    own.run_folder.mkdir(parents=True, exist_ok=True)
    (own.run_folder / "run.json").write_text('{"run_id": "r", "uri": "sqlite:///x", "open": true}')
    train.launch_train(job, place / "jobs", train.TrainOptions())
    assert delivered == ["young", "wise"]


def test_teachers_are_trained_first_and_their_own_before_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order, and what each is told, with a training that only writes the result down."""
    write(place / "jobs" / "middle.yaml", {**TEACHER, "name": "middle", "distill": {"teacher": "wise.yaml"}})
    ran: list[str] = []

    def run(spec: Any, command: str, kind: str, session: Any, display: Any) -> None:
        ran.append(spec.plan.job.name)
        display.note("at work")
        complete(spec.plan, spec.phases)

    monkeypatch.setattr(train, "_run", run)
    monkeypatch.setattr(train, "_deliver_late", lambda *_: None)
    job = student(place, "middle.yaml")
    result = train.launch_train(job, place / "jobs", train.TrainOptions())
    assert ran == ["wise", "middle", "young"]
    assert [(teacher.name, teacher.reused) for teacher in result.teachers] == [("middle", False)]
    lines = [line.split("s  ", 1)[1] for line in capsys.readouterr().err.splitlines() if "at work" in line]
    assert lines == ["teacher wise: at work", "teacher middle: at work", "at work"]

    again = train.launch_train(job, place / "jobs", train.TrainOptions())
    assert (again.status, ran[3:]) == ("reused", [])
    fresh = train.launch_train(job, place / "jobs", train.TrainOptions(fresh=True))
    assert (fresh.status, ran[3:], fresh.teachers[0].reused) == ("finished", ["young"], True)

    other = student(place, "wise.yaml", seed=1)
    monkeypatch.setattr(train, "_run", lambda *_: (_ for _ in ()).throw(train.RunInterrupted("stopped")))
    with pytest.raises(train.RunInterrupted):
        train.launch_train(other, place / "jobs", train.TrainOptions())


def test_a_teacher_that_is_removed_before_it_is_kept_is_trained_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(spec: Any, command: str, kind: str, session: Any, display: Any) -> None:
        ran.append(spec.plan.job.name)
        complete(spec.plan, spec.phases)

    def keep(teacher: Teacher, stack: ExitStack) -> None:
        shutil.rmtree(teacher.place)  # as another command's --fresh
        keep_teacher(teacher, stack)

    monkeypatch.setattr(train, "_run", run)
    monkeypatch.setattr(train, "keep_teacher", keep)
    for seed, expected in ((0, ["wise", "wise", "young"]), (1, ["wise", "young"])):
        ran.clear()
        result = train.launch_train(student(place, "wise.yaml", seed=seed), place / "jobs", train.TrainOptions())
        assert (ran, [teacher.reused for teacher in result.teachers]) == (expected, [False])
        assert teacher_runs.is_trained(found(place, "wise.yaml"))


def complete(plan: Plan, phases: Sequence[Any]) -> None:
    for phase in phases:
        folder = plan.phase_folder(phase)
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {"checkpoint": "checkpoints/step", "seconds": 1.0, "metrics": {}, "fingerprint": phase.fingerprint}
        write_json(folder / PHASE_MANIFEST, manifest)


def test_a_student_whose_phases_are_all_there_needs_no_teacher(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(place, "wise.yaml")
    complete(plan, plan.phases)
    monkeypatch.setattr(train, "_deliver_late", lambda *_: None)
    result = train.launch_train(plan.job, place / "jobs", train.TrainOptions())
    assert result.status == "reused"
    assert [(teacher.reused, teacher.metrics) for teacher in result.teachers] == [(True, {})]


# ------------------------------------------------------------------------------------------------- through the command


def write_jobs(folder: Path, **sections: Any) -> Path:
    """A teacher and its student, of a few steps each."""
    small = {
        **TEACHER,
        "parallel": {"workers": 1, "cpus_per_worker": 0.5},
        "budget": {"steps": 20, "checkpoint_every": 5},
    }
    write(folder / "wise.yaml", {**small, **sections})
    taught = {**small, "name": "young", "storage": str(folder / "runs"), "distill": {"teacher": "wise.yaml"}}
    return write(folder / "young.yaml", taught)


def start(job: Path, *more: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-m", "temper", "train", str(job), "--json", *more]
    return subprocess.Popen(
        command, cwd=job.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return {**json.loads(out.splitlines()[-1]), "said": err}


@pytest.mark.slow
@pytest.mark.ray
def test_a_teacher_is_trained_by_its_first_student_and_reused_by_the_second(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    job = write_jobs(tmp_path)
    first = finish(start(job))
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (teacher,) = first["teachers"]
    run = client.get_run(teacher["run_id"])
    assert (teacher["name"], teacher["reused"], run.info.status) == ("wise", False, "FINISHED")
    assert set(teacher["metrics"]) >= {"test/accuracy", "test/loss", "train/loss"}
    points = client.get_metric_history(teacher["run_id"], "train/loss")
    assert [point.step for point in points] == list(range(1, 21))
    tags = client.get_run(first["run_id"]).data.tags
    assert tags["temper.teacher"] == f"wise {teacher['fingerprint']}"
    assert tags["temper.teacher.run_id"] == teacher["run_id"] != first["run_id"]
    lines = [line.split("s  ", 1)[1] for line in first["said"].splitlines() if "s  " in line]
    assert [line for line in lines if line.endswith("starting Ray")] == ["teacher wise: starting Ray"]
    assert any(line.startswith("teacher wise: step 20/20") for line in lines)
    assert any(line.startswith("step 20/20") for line in lines)
    assert "  teacher wise, trained first  test/accuracy" in first["said"]

    second = finish(start(job, "distill.temperature=2"))
    assert second["status"] == "finished" and second["phases"][0]["fingerprint"] != first["phases"][0]["fingerprint"]
    assert second["teachers"] == [{**teacher, "reused": True}]
    after = client.get_run(teacher["run_id"])
    assert (after.info.end_time, after.data.metrics) == (run.info.end_time, run.data.metrics)
    assert len(client.search_runs(["1", "2"], "tags.`temper.kind` != 'phase'")) == 3


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_ends_while_the_teacher_trains_goes_on_there(tmp_path: Path, number: signal.Signals) -> None:
    from mlflow import MlflowClient

    slow = {"kind": "python", "target": "slow_net:build", "args": {"delay_s": 0.05}}
    job = write_jobs(tmp_path, model=slow, budget={"steps": 60, "checkpoint_every": 5})
    (tmp_path / "slow_net.py").write_text((Path(__file__).parent / "targets" / "slow_net.py").read_text())
    process = start(job)
    wait_for(process, lambda: any(record["step"] >= 12 for record in teacher_records(tmp_path)))
    process.send_signal(number)
    process.communicate(timeout=400)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    before = len(teacher_records(tmp_path))
    assert 12 <= before < 60

    result = finish(start(job))
    (teacher,) = result["teachers"]
    assert (teacher["reused"], result["phases"][0]["reused"]) == (False, False)
    assert "teacher wise: training from step" in result["said"]
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    points = client.get_metric_history(teacher["run_id"], "train/loss")
    assert [point.step for point in points] == list(range(1, 61))
    assert client.get_run(teacher["run_id"]).info.status == "FINISHED"
    assert len(client.search_runs(["1", "2"], "tags.`temper.kind` != 'phase'")) == 2


def teacher_records(folder: Path) -> list[Any]:
    histories = list((folder / "runs" / "phases").glob("*/history.jsonl"))
    return read_history(histories[0]) if histories else []


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """A bound on waiting, not on speed."""
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
