"""A distillation as it is planned: teachers that do not fit are refused, and students share what they have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from temper.config.schema import JobConfig
from temper.errors import JobError
from temper.launch.teachers import plan_job
from temper.plan.build import Plan
from temper.plan.mesh import ClusterShape
from temper.plan.show import plan_table
from temper.run_folder import PHASE_MANIFEST
from test_distill_worker import LEVELS, plan

SHAPE = ClusterShape(nodes=1, cpus=4.0, gpus=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for all, which keeps what is learnt about the models."""
    return tmp_path_factory.mktemp("plans")


def problems(folder: Path, **sections: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(JobError) as raised:
        plan(folder, **sections)
    return [(problem.key, problem.rule, problem.remedy) for problem in raised.value.problems]


# --------------------------------------------------------------------------------------------------- does not fit


def taught_by(folder: Path, teacher: dict[str, Any]) -> JobConfig:
    import yaml

    file = folder / "other.yaml"
    own = {"name": "other", "optimizer": {"kind": "sgd", "lr": 0.1}, "budget": {"steps": 1}, **teacher}
    file.write_text(yaml.safe_dump(own))
    return JobConfig.model_validate(
        {
            "name": "student",
            "model": {"kind": "mlp", "hidden": [4]},
            "data": {"kind": "digits", "global_batch": 32},
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "budget": {"steps": 1},
            "distill": {"teacher": str(file)},
            "storage": str(folder / "runs"),
        }
    )


def synthetic(**changes: Any) -> dict[str, Any]:
    return {"kind": "synthetic", "shape": [1, 8, 8], "global_batch": 4, **changes}


def test_a_teacher_of_other_inputs_is_refused(folder: Path) -> None:
    job = taught_by(folder, {"model": {"kind": "resnet", "depth": 8}, "data": synthetic(shape=[3, 8, 8])})
    with pytest.raises(JobError) as raised:
        plan_job(job, SHAPE, folder)
    (problem,) = raised.value.problems
    assert problem.key == "distill.teacher"
    assert problem.rule == "was trained on inputs of the shape [3, 8, 8], the student's are [1, 8, 8]"


def test_a_teacher_of_other_classes_is_refused(folder: Path) -> None:
    job = taught_by(folder, {"model": {"kind": "mlp"}, "data": synthetic(num_classes=7)})
    with pytest.raises(JobError) as raised:
        plan_job(job, SHAPE, folder)
    (problem,) = raised.value.problems
    assert problem.rule == "knows 7 classes, and the student's data have 10"


def test_a_teacher_of_more_outputs_is_refused(folder: Path) -> None:
    job = taught_by(folder, {"model": {"kind": "mlp", "num_classes": 12}, "data": synthetic()})
    with pytest.raises(JobError) as raised:
        plan_job(job, SHAPE, folder)
    (problem,) = raised.value.problems
    assert problem.rule == "gives outputs of the shape [12], the student [10]"


def test_other_data_of_the_same_form_are_a_transfer_set(folder: Path) -> None:
    job = taught_by(folder, {"model": {"kind": "mlp"}, "data": synthetic()})
    made = plan_job(job, SHAPE, folder)
    assert made.distill is not None and made.distill.teachers[0].num_classes == 10


def test_all_mistakes_are_said_at_once(folder: Path) -> None:
    found = problems(folder, distill={"cache": "logits", "top_k": 10, "features": [{"student": "nowhere"}]})
    assert [key for key, _, _ in found] == ["distill.cache"]
    found = problems(folder, distill={"cache": "logits", "top_k": 10})
    assert found == [("distill.top_k", "is no fewer than the 10 logits that there are", "leave it out: all are kept")]


def test_a_level_around_several_layers_is_no_level_of_a_stage(folder: Path) -> None:
    stages = {"pipeline": 2, "cpus_per_worker": 0.5}
    made = plan(folder, parallel=stages, distill={"features": "auto"})
    assert made.distill is not None and made.distill.pairs


# ------------------------------------------------------------------------------------------------------ what is shared


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"cache": "logits"}, True),
        ({"placement": "sharded"}, True),
        ({"temperature": 8.0}, False),
        ({"temperature": {"start": 8.0, "end": 1.0}}, False),
        ({"alpha": 0.5}, False),
        ({"loss": "decoupled"}, False),
        ({"standardize": True}, False),
        ({"signals": "fp32"}, False),
        ({"features": LEVELS}, False),
        ({"cache": "logits", "top_k": 3}, False),
        ({"teacher_batch": 16}, False),
    ],
    ids=str,
)
def test_what_decides_the_students_weights_is_in_its_fingerprint(
    folder: Path, change: dict[str, Any], same: bool
) -> None:
    assert (plan(folder, distill=change).fingerprint == plan(folder).fingerprint) is same


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        ({"distill": {"temperature": 8.0, "alpha": 0.5, "standardize": True}}, True),
        ({"distill": {"loss": "decoupled"}}, True),
        ({"optimizer": {"kind": "adamw", "lr": 1e-3}, "seed": 5, "budget": {"steps": 9}}, True),
        ({"model": {"kind": "mlp", "hidden": [7]}}, True),
        ({"data": {"kind": "digits", "global_batch": 32, "labels": 0.5}}, True),
        ({"data": {"kind": "digits", "global_batch": 32, "holdout": 37}}, False),
        ({"data": {"kind": "digits", "global_batch": 32, "omit_classes": [1]}}, False),
        ({"distill": {"signals": "fp32"}}, False),
        ({"distill": {"top_k": 2}}, False),
        ({"distill": {"teacher_batch": 8}}, False),
        ({"num_teachers": 2}, False),
    ],
    ids=str,
)
def test_one_cache_serves_all_that_ask_the_same(folder: Path, sections: dict[str, Any], same: bool) -> None:
    def key(**given: Any) -> str:
        made = plan(folder, **{**given, "distill": {"cache": "logits", **given.get("distill", {})}})
        assert made.distill is not None and made.distill.cache is not None
        return made.distill.cache.key

    assert (key(**sections) == key()) is same


def test_views_of_a_fixed_transform_are_one(folder: Path) -> None:
    data = {"kind": "digits", "global_batch": 32, "augment": [{"kind": "random_crop", "padding": 1}]}
    random = plan(folder, data=data, distill={"cache": "logits", "views": 3})
    assert random.distill is not None and random.distill.cache is not None
    assert random.distill.cache.views == 3
    assert random.distill.cache.recipe["augmentation"]["views"] == 3
    again = plan(folder, data=data, distill={"cache": "logits", "views": 3}, seed=1)
    assert again.distill is not None and again.distill.cache is not None
    assert again.distill.cache.key != random.distill.cache.key  # its views are drawn by another seed


# --------------------------------------------------------------------------------------------------- what a plan says


def shown(made: Plan) -> str:
    return " ".join(plan_table(made).split())


def test_the_plan_shows_the_teacher_the_levels_and_the_cache(folder: Path) -> None:
    text = shown(plan(folder, distill={"features": LEVELS, "cache": "features"}))
    assert "teacher teacher-0: cnn, 1,198 parameters in fp32" in text
    assert "…, is trained first soft targets T 4, alpha 0.9 level 2" in text
    assert "level 2 4×4×4 → conv1x1 → 2 6×4×4, mse, weight 1" in text
    assert "level 5 6×2×2 → 5 8×2×2, attention transfer, weight 2" in text
    assert "computed once for 1,437 examples (all logits and features in fp16), kept in" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": "decoupled"}, "soft targets T 4, alpha 0.9, decoupled (non_target_weight 8) teaching"),
        ({"standardize": True}, "soft targets T 4, alpha 0.9, logits standardized teaching"),
        ({"alpha": {"start": 1.0, "end": 0.0}}, "soft targets T 4, alpha 1 → 0 (linear) teaching"),
        ({"alpha": 0, "features": LEVELS}, "is trained first level 2"),
        ({"views": 3}, "teaching live, whole on every rank, 32 examples in a pass, 3 views of each example phase"),
    ],
    ids=str,
)
def test_the_plan_shows_what_the_student_learns_from(folder: Path, change: dict[str, Any], said: str) -> None:
    data = {"kind": "digits", "global_batch": 32, "augment": [{"kind": "random_crop", "padding": 1}]}
    assert said in shown(plan(folder, data=data, distill=change))


def test_the_plan_shows_the_weights_of_an_ensemble_and_who_is_trained(folder: Path) -> None:
    made = plan(folder, num_teachers=2)
    assert made.distill is not None
    first = made.distill.teachers[0]
    first.place.mkdir(parents=True)
    (first.place / PHASE_MANIFEST).write_text("{}")
    text = shown(plan(folder, num_teachers=2))
    (first.place / PHASE_MANIFEST).unlink()
    first.place.rmdir()
    assert f"teacher-0: cnn, 1,198 parameters in fp32, weight 1, {first.fingerprint[:10]}…, trained" in text
    second = made.distill.teachers[1]
    assert f"teacher-1: cnn, 1,198 parameters in fp32, weight 2, {second.fingerprint[:10]}…, is trained first" in text


@pytest.mark.parametrize(("labels", "said"), [(0.5, "718 of 1,437 labelled"), (0, "0 of 1,437 labelled")])
def test_the_plan_shows_how_many_examples_have_a_label(folder: Path, labels: float, said: str) -> None:
    data = {"kind": "digits", "global_batch": 32, "labels": labels}
    text = shown(plan(folder, data=data, distill={"alpha": 1.0}))
    assert f"data digits: 1,437 examples, {said}, 360 for the test" in text


def test_the_connectors_and_the_teacher_are_in_the_memory(folder: Path) -> None:
    plain, taught = plan(folder), plan(folder, distill={"features": LEVELS})
    assert taught.memory.parameters - plain.memory.parameters == 4 * 6 * 4
    # Weights, and in fp16 the logits and levels of a micro-batch.
    assert plain.memory.teacher == 4 * 1198 + 2 * 10 * 32
    assert taught.memory.teacher == 4 * 1198 + 2 * (10 + 6 * 16 + 8 * 4) * 32
    sharded = plan(folder, parallel={"workers": 2, "cpus_per_worker": 0.5}, distill={"placement": "sharded"})
    assert sharded.memory.teacher == 4 * 1198 // 2 + 2 * 10 * 16
    cached = plan(folder, distill={"cache": "logits"})
    assert cached.memory.teacher == 2 * 10 * 32
