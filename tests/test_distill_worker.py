"""Students as their workers train them: from a teacher that is live, sharded or cached they end with the same bits,
also when they are killed on the way; and the teacher is measured before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from temper.checkpoint import CheckpointReader, list_checkpoints, model_state
from temper.config.schema import JobConfig
from temper.files import read_json
from temper.launch import teacher_cache
from temper.launch.asker import Asker
from temper.launch.teachers import plan_job
from temper.plan.build import Plan
from temper.plan.distill import CONNECTORS
from temper.plan.mesh import ClusterShape
from temper.run_folder import PHASE_MANIFEST
from temper.techniques.distill.cache_files import Cut, complete_cache, missing_pieces
from test_dsd_resume import Kill, ends, run
from test_resume import assert_same

STEPS = 6
SHAPE = ClusterShape(nodes=1, cpus=4.0, gpus=0.0)
TEACHER: dict[str, Any] = {
    "name": "teacher",
    "model": {"kind": "cnn", "channels": [6, 8], "hidden": 16},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "adamw", "lr": 1.0e-2},
    "parallel": {"cpus_per_worker": 0.5},
    "budget": {"steps": 40},
}
LEVELS = [{"student": "2"}, {"student": "5", "loss": "attention_transfer", "weight": 2.0}]


def plan(folder: Path, num_teachers: int = 1, **sections: Any) -> Plan:
    """A student of `num_teachers` teachers that lie in the same storage; the last sections given count."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for seed in range(num_teachers):
        file = folder / f"teacher-{seed}.yaml"
        file.write_text(yaml.safe_dump({**TEACHER, "name": f"teacher-{seed}", "seed": seed}))
        sources.append({"source": str(file), "weight": 1.0 + seed})
    job: dict[str, Any] = {
        "name": "student",
        "model": {"kind": "cnn", "channels": [4, 6], "hidden": 12},
        "data": {"kind": "digits", "global_batch": 32},
        "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9},
        "parallel": {"cpus_per_worker": 0.5},
        "budget": {"steps": STEPS, "checkpoint_every": 2, "keep_checkpoints": 10},
        "storage": str(folder / "runs"),
        **{key: value for key, value in sections.items() if key != "distill"},
    }
    job["distill"] = {"teacher": sources if num_teachers > 1 else sources[0], **sections.get("distill", {})}
    return plan_job(JobConfig.model_validate(job), SHAPE, folder)


def prepare(student: Plan) -> None:
    """Trains the teachers that are not there yet, and fills the cache where the student has one."""
    assert student.distill is not None
    for teacher in student.distill.teachers:
        if not (teacher.place / PHASE_MANIFEST).exists():
            run(teacher.plan)
    if student.distill.cache is not None:
        asker, cuts = Asker(student, ()), cuts_of(student)
        for piece in missing_pieces(student.distill.cache.folder, cuts):
            asker.write(piece)
        complete_cache(student.distill.cache, cuts)


def cuts_of(student: Plan) -> list[Cut]:
    """How the cache is cut; what is counted on Ray where classes are omitted is counted here."""
    assert student.distill is not None and student.distill.cache is not None
    with mock.patch.object(teacher_cache, "_train_rows", lambda plan, folders: Asker(plan, ()).train_rows()):
        return teacher_cache._plan_cuts(student, student.distill, student.distill.cache, ())


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with two trained teachers."""
    folder = tmp_path_factory.mktemp("teachers")
    prepare(plan(folder, num_teachers=2))
    return folder


def trained(folder: Path, teachers: Path, **sections: Any) -> Plan:
    """A student, trained in a storage of its own to which the teachers were copied."""
    shutil.copytree(teachers / "runs", folder / "runs")
    student = plan(folder, **sections)
    prepare(student)
    run(student)
    return student


def end(student: Plan) -> Path:
    return ends(student)[student.phases[-1].name]


def records(student: Plan) -> list[dict[str, Any]]:
    folders = list_checkpoints(end(student).parent)
    return [record for folder in folders for record in CheckpointReader(folder).records()]


# ------------------------------------------------------------------------------------------------- live and cached

AUGMENTED = {"kind": "digits", "global_batch": 32, "augment": [{"kind": "random_crop", "padding": 1}]}
CACHED: dict[str, dict[str, Any]] = {
    "logits": {},
    "levels": {"distill": {"features": LEVELS}},
    "an ensemble": {"num_teachers": 2},
    "views, over three epochs": {
        "data": {**AUGMENTED, "global_batch": 600},
        "budget": {"steps": 8},
        "distill": {"views": 2},
    },
    "two workers, ZeRO-2, fp16": {
        "parallel": {"workers": 2, "zero": 2, "cpus_per_worker": 0.5},
        "precision": {"dtype": "fp16", "initial_scale": 1024.0},
        "distill": {"features": LEVELS},
    },
    "two stages": {
        "parallel": {"pipeline": 2, "cpus_per_worker": 0.5, "micro_batch": 8},
        "distill": {"features": LEVELS},
    },
    "a class and most labels missing": {
        "data": {"kind": "digits", "global_batch": 32, "omit_classes": [3], "labels": 0.1},
    },
    "a ramp": {"distill": {"temperature": {"start": 8.0, "end": 1.0}, "alpha": {"start": 1.0, "end": 0.5}}},
}


# Two trainings each; the rest are slow proofs of the same kind.
QUICK = ("levels", "views, over three epochs")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CACHED]
)
def test_from_a_cache_the_student_ends_with_the_bits_of_a_live_teacher(
    name: str, teachers: Path, tmp_path: Path
) -> None:
    sections = CACHED[name]
    distill = sections.get("distill", {})
    live = trained(tmp_path / "live", teachers, **sections)
    kept = "features" if "features" in distill else "logits"
    cached = trained(tmp_path / "cached", teachers, **{**sections, "distill": {**distill, "cache": kept}})
    assert cached.fingerprint == live.fingerprint
    assert_same(end(live), end(cached))
    assert records(live)[0]["metrics"]["teacher/accuracy"] == records(cached)[0]["metrics"]["teacher/accuracy"]


def test_all_temperatures_ask_the_teacher_once(teachers: Path, tmp_path: Path) -> None:
    """One pass over the training set and the test set, whatever the temperature, alpha and kind of loss."""
    shutil.copytree(teachers / "runs", tmp_path / "runs")
    asked, folders = [], set()
    for distill in (
        {"temperature": 1.0},
        {"temperature": 4.0, "alpha": 0.5},
        {"loss": "decoupled"},
        {"standardize": True},
    ):
        student = plan(tmp_path, distill={"cache": "logits", **distill})
        assert student.distill is not None and student.distill.cache is not None
        asked.append(sum(piece.rows for piece in missing_pieces(student.distill.cache.folder, cuts_of(student))))
        prepare(student)
        folders.add(student.distill.cache.folder)
    assert asked == [1437 + 360, 0, 0, 0] and len(folders) == 1
    manifest = read_json(folders.pop() / "manifest.json")
    assert manifest is not None and manifest["teacher_examples"] == 1437 + 360


# ---------------------------------------------------------------------------------------------- where the teacher is


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_sharded_teacher_says_what_a_whole_one_says(zero: int, teachers: Path, tmp_path: Path) -> None:
    parallel = {"workers": 2, "zero": zero, "cpus_per_worker": 0.5}
    whole = trained(tmp_path / "whole", teachers, parallel=parallel, distill={"features": LEVELS})
    distill = {"features": LEVELS, "placement": "sharded"}
    sharded = trained(tmp_path / "sharded", teachers, parallel=parallel, distill=distill)
    assert sharded.fingerprint == whole.fingerprint
    assert_same(end(whole), end(sharded))


@pytest.mark.slow
def test_with_stages_and_split_layers_it_is_as_on_one_rank(teachers: Path, tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", teachers, distill={"features": LEVELS})
    expected = model_state(CheckpointReader(end(alone)))
    for name, degrees in {"stages": {"pipeline": 2}, "split": {"tensor": 2}}.items():
        parallel = {**degrees, "cpus_per_worker": 0.5}
        student = trained(tmp_path / name, teachers, parallel=parallel, distill={"features": LEVELS})
        for key, value in model_state(CheckpointReader(end(student))).items():
            assert (value - expected[key]).norm() / expected[key].norm() < 1e-5, (name, key)
        terms = records(student)[-1]["metrics"]
        for key in ("soft_targets", "cross_entropy", "features/2", "features/5"):
            name_ = f"train/loss/{key}"
            assert terms[name_] == pytest.approx(records(alone)[-1]["metrics"][name_], rel=1e-4)


def test_the_teacher_is_measured_on_the_students_test_split_before_the_first_step(
    teachers: Path, tmp_path: Path
) -> None:
    student = trained(tmp_path, teachers)
    assert student.distill is not None
    measured = records(student)[0]["metrics"]
    own = read_json(student.distill.teachers[0].place / PHASE_MANIFEST)
    assert own is not None
    # Its own run measured it on the same examples; its logits were rounded to fp16 here.
    assert measured["teacher/accuracy"] == pytest.approx(own["metrics"]["test/accuracy"], abs=1e-6)
    assert measured["teacher/loss"] == pytest.approx(own["metrics"]["test/loss"], rel=1e-3)
    teacher = {name: value for name, value in measured.items() if name.startswith("teacher/")}
    assert {f"teacher/{name}": value for name, value in read_json(student.distill.evaluation).items()} == teacher


def test_connectors_are_saved_and_resumed_and_no_part_of_the_model(teachers: Path, tmp_path: Path) -> None:
    student = trained(tmp_path, teachers, distill={"features": LEVELS})
    reader = CheckpointReader(end(student))
    assert [name for name in reader.shapes if name.startswith(CONNECTORS)] == [f"{CONNECTORS}.0.weight"]
    assert tuple(reader.shapes[f"{CONNECTORS}.0.weight"]) == (6, 4, 1, 1)
    assert not any(name.startswith("distill") for name in model_state(reader))


@pytest.mark.slow
def test_what_a_cache_of_the_largest_logits_leaves_out_changes_the_student(teachers: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", teachers, distill={"cache": "logits"})
    few = trained(tmp_path / "few", teachers, distill={"cache": "logits", "top_k": 3})
    assert few.fingerprint != whole.fingerprint
    first, second = (model_state(CheckpointReader(end(student))) for student in (whole, few))
    assert not torch.equal(first["0.weight"], second["0.weight"])


# ------------------------------------------------------------------------------------------------- killed on the way

DSD = {"rounds": [{"sparsity": 0.5, "sparse_steps": STEPS, "redense_steps": STEPS}]}
KILLS = [
    Kill("_save", "dense", before=False, turn=1),
    Kill("_enter", "sparse-1", before=False),
    Kill("_save", "sparse-1", before=True, turn=2),
    Kill("_save", "redense-1", before=False, turn=1),
]
CHAIN: dict[str, Any] = {
    "parallel": {"workers": 2, "zero": 1, "cpus_per_worker": 0.5},
    "distill": {"features": LEVELS, "cache": "features", "temperature": {"start": 6.0, "end": 2.0}},
    "dsd": DSD,
}


@pytest.fixture(scope="module")
def chain(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Teacher → student → sparse → re-dense, unbroken."""
    return trained(tmp_path_factory.mktemp("chain"), teachers, **CHAIN)


@pytest.mark.parametrize(
    "kill",
    [pytest.param(kill, marks=() if kill.phase == "sparse-1" else pytest.mark.slow) for kill in KILLS],
    ids=str,
)
def test_killed_anywhere_the_chain_ends_with_the_same_bits(
    chain: Plan, teachers: Path, tmp_path: Path, kill: Kill
) -> None:
    shutil.copytree(teachers / "runs", tmp_path / "runs")
    broken = plan(tmp_path, **CHAIN)
    assert broken.fingerprint == chain.fingerprint
    prepare(broken)
    run(broken, kill)
    run(broken)
    for name, folder in ends(broken).items():
        assert_same(ends(chain)[name], folder)


def test_the_teacher_is_there_in_every_phase(chain: Plan) -> None:
    for name, folder in ends(chain).items():
        metrics = CheckpointReader(folder).records()[-1]["metrics"]
        assert metrics["train/loss/soft_targets"] > 0 and metrics["train/loss/features/2"] > 0, name
        assert f"{CONNECTORS}.0.weight" in CheckpointReader(folder).shapes
        # The ramp is over the dense phase, and held from there on.
        assert metrics["distill/temperature"] == 2.0
