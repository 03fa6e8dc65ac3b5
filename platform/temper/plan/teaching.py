"""From the teachers that were found to the plan of a distillation: whether they fit the student, which levels are
matched, what is cached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from temper.config.checks import has_random_augment
from temper.config.schema import DistillConfig, JobConfig, ParallelConfig, RampConfig
from temper.errors import JobError, Problem
from temper.plan.distill import CachePlan, DistillPlan, Teacher
from temper.plan.facts import DataFacts
from temper.plan.mesh import BatchPlan, MeshPlan
from temper.plan.pairs import check_cut, resolve_pairs
from temper.plan.phases import NUMERICS_VERSION, fingerprint, library_versions
from temper.plan.probe import ModelFacts, model_facts

_MOST_ROWS = 128


def plan_teaching(
    job: JobConfig,
    data: DataFacts,
    student: ModelFacts,
    teachers: Sequence[Teacher],
    mesh: MeshPlan,
    batch: BatchPlan,
    sources: Mapping[str, str],
    job_folder: Path,
) -> DistillPlan | None:
    """The plan of `job.distill`; None where the job has none. `sources` are the hashes of the job's targets.

    Each teacher is built once in a process of its own, on inputs of the student's shape. Raises JobError with every
    problem found.
    """
    if job.distill is None:
        return None
    facts, problems = [], []
    for index, teacher in enumerate(teachers):
        try:
            facts.append(_teacher_facts(job, data, student, teacher, job_folder))
        except JobError as error:
            key = _key(job.distill, index)
            problems += [replace(problem, key=key, value=teacher.source) for problem in error.problems]
            continue
        problems += _check_weights(_weights_key(job.distill, index), teacher, facts[-1])
    problems += [*_check_top_k(job.distill, student), *_check_cache(job.distill, student)]
    if problems:
        raise JobError(problems)
    pairs = resolve_pairs(job.distill, student, facts, [teacher.name for teacher in teachers])
    cut = check_cut(job.distill, student, pairs) if mesh.pipeline > 1 else []
    if cut:
        raise JobError(cut)
    rows = job.distill.teacher_batch or min(batch.micro_batch, _MOST_ROWS)
    folder = job.storage_folder / "teachers"
    asked = _asked(job, data, teachers, sources)
    evaluation = folder / f"{fingerprint(_evaluation_recipe(job, asked, sources))}.json"
    answers = {split: folder / f"{fingerprint(recipe)}.npy" for split, recipe in _answers_recipes(job, asked).items()}
    plan = DistillPlan(tuple(teachers), tuple(facts), pairs, rows, None, evaluation, answers)
    return plan if job.distill.cache == "none" else replace(plan, cache=_plan_cache(job, data, mesh, sources, plan))


def _key(distill: DistillConfig, index: int) -> str:
    return f"distill.teacher.{index}" if isinstance(distill.teacher, list) else "distill.teacher"


def _weights_key(distill: DistillConfig, index: int) -> str:
    """What names the file of weights: `weights`, or else the source."""
    asked = distill.teacher[index] if isinstance(distill.teacher, list) else distill.teacher
    is_source = isinstance(asked, str) or asked.source is not None
    return _key(distill, index) if is_source else f"{_key(distill, index)}.weights"


def _teacher_facts(
    job: JobConfig, data: DataFacts, student: ModelFacts, teacher: Teacher, job_folder: Path
) -> ModelFacts:
    problems = _check_data(data, teacher)
    if problems:
        raise JobError(problems)
    alone = job.model_copy(update={"model": teacher.model, "parallel": ParallelConfig()})
    folder = Path(teacher.import_folders[-1]) if teacher.import_folders else job_folder
    classes = data.num_classes if teacher.num_classes is None else teacher.num_classes
    facts = model_facts(alone, replace(data, num_classes=classes), folder)
    if facts.output_shape != student.output_shape:
        rule = f"gives outputs of the shape {_shown(facts.output_shape)}, the student {_shown(student.output_shape)}"
        raise JobError([Problem("", None, rule, "use a teacher of the student's classes")])
    return facts


def _check_data(data: DataFacts, teacher: Teacher) -> list[Problem]:
    problems = []
    if teacher.shape is not None and teacher.shape != data.shape:
        rule = f"was trained on inputs of the shape {_shown(teacher.shape)}, the student's are {_shown(data.shape)}"
        problems.append(Problem("", None, rule, "bring both to one shape, e.g. with data.eval_transforms"))
    if None not in (teacher.num_classes, data.num_classes) and teacher.num_classes != data.num_classes:
        rule = f"knows {teacher.num_classes} classes, and the student's data have {data.num_classes}"
        problems.append(Problem("", None, rule, "use a teacher of the student's classes"))
    return problems


def _check_weights(key: str, teacher: Teacher, facts: ModelFacts) -> list[Problem]:
    rule = None if teacher.weight_shapes is None else _misfit(teacher.weight_shapes, facts)
    return [] if rule is None else [Problem(key, teacher.source, rule, "give the model as it was trained")]


def _misfit(shapes: Mapping[str, tuple[int, ...]], facts: ModelFacts) -> str | None:
    """How weights differ from the model's. A tensor that the model has under several names need be there under one, so
    that what is missing is told by the number of elements."""
    unknown = [name for name in shapes if name not in facts.weight_shapes]
    if unknown:
        return f"has {unknown[0]}, which is not in the model ({len(unknown)} of {len(shapes)} tensors are not)"
    for name, shape in shapes.items():
        if shape != facts.weight_shapes[name]:
            return f"has {name} in the shape {_shown(shape)}, the model in {_shown(facts.weight_shapes[name])}"
    elements = sum(math.prod(shape) for shape in shapes.values())
    if elements < facts.num_parameters:
        return f"has {elements:,} elements, fewer than the {facts.num_parameters:,} parameters of the model"
    return None


def _shown(shape: tuple[int, ...] | None) -> str:
    return "unknown" if shape is None else str(list(shape))


def _check_top_k(distill: DistillConfig, student: ModelFacts) -> list[Problem]:
    if distill.top_k is None or student.output_shape is None or distill.top_k < student.output_shape[-1]:
        return []
    rule = f"is no fewer than the {student.output_shape[-1]} logits that there are"
    return [Problem("distill.top_k", distill.top_k, rule, "leave it out: all are kept")]


def _check_cache(distill: DistillConfig, student: ModelFacts) -> list[Problem]:
    if distill.cache == "none" or student.output_shape is not None:
        return []
    rule = "keeps one tensor of logits for each example, and the student's output is of another form"
    return [Problem("distill.cache", distill.cache, rule, "use cache: none")]


# --------------------------------------------------------------------------------------------- what decides the result


def teaching_ingredients(job: JobConfig, plan: DistillPlan) -> dict[str, Any]:
    """What of the distillation decides the student's weights; see :func:`temper.plan.phases.ingredients`.

    Not where the teacher runs and whether it is cached: what it says is the same, bit for bit. But for `top_k`, which
    acts on a cache alone.
    """
    distill = job.distill
    assert distill is not None, "the plan is that of its section"
    decoupled = {"non_target_weight": distill.non_target_weight} if distill.loss == "decoupled" else {}
    return {
        "teachers": _identities(plan.teachers),
        "temperature": _value(distill.temperature),
        "alpha": _value(distill.alpha),
        "loss": distill.loss,
        "standardize": distill.standardize,
        "pairs": [asdict(pair) for pair in plan.pairs],
        "signals": distill.signals,
        "rows": plan.rows,
        "views": distill.views,
        "top_k": distill.top_k,
        **decoupled,
    }


def _identities(teachers: Sequence[Teacher]) -> list[dict[str, Any]]:
    """What tells teachers apart, beside their names; weights only where there are several."""
    known: list[dict[str, Any]] = [
        {
            "fingerprint": teacher.fingerprint,
            "precision": teacher.precision,
            "mean": None if teacher.mean is None else list(teacher.mean),
            "std": None if teacher.std is None else list(teacher.std),
        }
        for teacher in teachers
    ]
    if len(teachers) > 1:
        known = [{**item, "weight": teacher.weight} for item, teacher in zip(known, teachers, strict=True)]
    return known


def _value(value: float | RampConfig) -> Any:
    return value.model_dump(mode="json") if isinstance(value, RampConfig) else float(value)


# ------------------------------------------------------------------------------------------------------------ the cache


def _plan_cache(
    job: JobConfig, data: DataFacts, mesh: MeshPlan, sources: Mapping[str, str], plan: DistillPlan
) -> CachePlan:
    distill = job.distill
    assert distill is not None, "the plan is that of its section"
    recipe = _cache_recipe(job, data, mesh, sources, plan)
    key = fingerprint(recipe)
    return CachePlan(
        key=key,
        folder=job.storage_folder / "teachers" / key,
        recipe=recipe,
        views=_num_views(job),
        top_k=distill.top_k,
        features=bool(plan.pairs),
    )


def _cache_recipe(
    job: JobConfig,
    data: DataFacts,
    mesh: MeshPlan,
    sources: Mapping[str, str],
    plan: DistillPlan,
) -> dict[str, Any]:
    """Everything that decides what the teacher says of the examples, by what a person calls it."""
    assert job.distill is not None, "the plan is that of its section"
    return {
        "teacher": _identities(plan.teachers),
        "data": {
            "fingerprint": data.fingerprint,
            "held_out": job.data.holdout,
            "omitted": sorted(job.data.omit_classes),
            "source": sources.get("data.target"),
        },
        "augmentation": _augmentation(job),
        "normalisation": {"mean": list(data.mean), "std": list(data.std)},
        "features": [[pair.of, pair.teacher] for pair in plan.pairs],
        "signals": job.distill.signals,
        "top_k": job.distill.top_k,
        "rows": plan.rows,
        "device": {"kind": mesh.device, "threads": job.parallel.cpus_per_worker if mesh.device == "cpu" else None},
        "libraries": {**_teachers_libraries(job, plan.teachers), "temper": str(NUMERICS_VERSION)},
    }


def _teachers_libraries(job: JobConfig, teachers: Sequence[Teacher]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for teacher in teachers:
        versions |= library_versions(job.model_copy(update={"model": teacher.model}))
    return versions


def _asked(job: JobConfig, data: DataFacts, teachers: Sequence[Teacher], sources: Mapping[str, str]) -> dict[str, Any]:
    """Everything that decides what the teacher says of the splits that the student is evaluated on, but for the last
    bits."""
    assert job.distill is not None, "only a student asks"
    return {
        "teacher": _identities(teachers),
        "data": data.fingerprint,
        "transforms": [transform.model_dump(mode="json") for transform in job.data.eval_transforms],
        "normalisation": {"mean": list(data.mean), "std": list(data.std)},
        "signals": job.distill.signals,
        "source": sources.get("data.target"),
    }


def _evaluation_recipe(job: JobConfig, asked: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Everything that decides the teacher's metrics on the test split."""
    return {
        **asked,
        "loss": job.loss.model_dump(mode="json"),
        "metrics": list(job.evaluation.metrics),
        "per_class": job.evaluation.per_class,
        "source of the loss": sources.get("loss.target"),
    }


def _answers_recipes(job: JobConfig, asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything that decides the teacher's most probable classes, by the splits that the student is evaluated on;
    empty where its outputs are no classes."""
    if job.loss.kind != "cross_entropy":
        return {}
    held_out = {"validation": {**asked, "held_out": job.data.holdout}} if job.data.holdout else {}
    return {**held_out, "test": dict(asked)}


def _augmentation(job: JobConfig) -> dict[str, Any]:
    """Only what is random differs from one view to the next."""
    transforms = [transform.model_dump(mode="json") for transform in job.data.augment]
    test = [transform.model_dump(mode="json") for transform in job.data.eval_transforms]
    views = {"views": _num_views(job), "seed": job.seed} if has_random_augment(job.data) else {}
    return {"train": transforms, "test": test, **views}


def _num_views(job: JobConfig) -> int:
    assert job.distill is not None, "only a student asks"
    return job.distill.views or 1 if has_random_augment(job.data) else 1


def teaching_notes(job: JobConfig, mesh: MeshPlan, batch: BatchPlan, plan: DistillPlan | None) -> list[str]:
    """What a user may not expect of the distillation, in full sentences."""
    distill = job.distill
    if distill is None or plan is None:
        return []
    notes = []
    if distill.placement == "sharded" and mesh.world_size == 1:
        notes.append("placement: sharded saves nothing on one rank: there is no other to share with")
    if plan.cache is None and batch.micro_batch % plan.rows:
        passes = -(-batch.micro_batch // plan.rows)
        filled = passes * plan.rows - batch.micro_batch
        notes.append(
            f"the teacher sees a micro-batch of {batch.micro_batch} in {passes} passes of {plan.rows}, the last filled "
            f"up with {filled} copies; a distill.teacher_batch that divides it saves them"
        )
    if job.data.omit_classes:
        notes.append(
            f"classes {sorted(job.data.omit_classes)} are left out of the training split only; the plan reads no "
            "labels, so epochs are counted with their examples"
        )
    return notes
