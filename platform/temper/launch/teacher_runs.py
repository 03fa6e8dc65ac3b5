"""Teachers of a run as its command sees them: those that are yet to be trained, and what is told of them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from temper.files import read_json
from temper.launch.phase_store import claim_phases, discard_damaged, keep_phase
from temper.locks import HeldError, claimed
from temper.plan.build import Plan
from temper.plan.distill import Teacher
from temper.plan.phases import PhasePlan
from temper.products import computing_run, read_phase
from temper.remote_store import fetch_phase
from temper.run_folder import LOCK, PHASE_MANIFEST, PHASES

_POLL_S = 0.2


@dataclass(frozen=True)
class TeacherResult:
    """A teacher of the run: `metrics` are the last ones of its own training, `run_id` its MLflow run; empty where they
    are not known. `reused` says that this command did not train it."""

    name: str
    run_id: str
    fingerprint: str
    reused: bool
    metrics: dict[str, float]


def teachers_of(plan: Plan) -> tuple[Teacher, ...]:
    return () if plan.distill is None else plan.distill.teachers


def is_trained(teacher: Teacher) -> bool:
    """Whether its weights are there; those of any teacher but a job have been found."""
    if teacher.plan is None:
        return True
    fetch_phase(teacher.place)
    return read_phase(teacher.place) is not None


def claim_teacher(teacher: Teacher, stack: ExitStack, say: Callable[[str], None]) -> tuple[PhasePlan, ...]:
    """The phases of a teacher's job that are yet to be run until its weights are there, claimed until `stack` is
    closed; where another command runs one of them, `say` is told, and that is waited for."""
    plan, is_told = teacher.plan, False
    assert plan is not None, "only a job is trained"
    wanted = next(phase for phase in plan.phases if plan.phase_folder(phase) == teacher.place)
    while not is_trained(teacher):
        try:
            with ExitStack() as claim:
                claim.enter_context(claimed(plan.run_folder / LOCK, plan.job.name))
                pending = claim_phases(plan, claim, say)
                stack.push(claim.pop_all())
                return tuple(phase for phase in pending if phase.last_step <= wanted.last_step)
        except HeldError:
            if not is_told:
                say("waiting for another command that trains it")
            is_told = True
            time.sleep(_POLL_S)
    return ()


def keep_teacher(teacher: Teacher, stack: ExitStack) -> None:
    """Until `stack` is closed, no command removes the phase that the teacher lies in. A teacher that can be trained is
    no longer trained where a file of it is damaged."""
    phase_folder = _phase_folder(teacher)
    if phase_folder is not None and phase_folder.parent.name == PHASES:
        keep_phase(phase_folder, stack)
        if teacher.plan is not None:
            discard_damaged(phase_folder)


def teacher_results(plan: Plan, trained: frozenset[str]) -> list[TeacherResult]:
    """`trained` are the fingerprints of those that this command trained."""
    return [
        TeacherResult(
            teacher.name, _run_id(teacher), teacher.fingerprint, teacher.fingerprint not in trained, _metrics(teacher)
        )
        for teacher in teachers_of(plan)
    ]


def teacher_tags(plan: Plan) -> dict[str, str]:
    """`temper.teacher`, in an ensemble `temper.teacher.<index>`: its name and fingerprint; `….run_id` where that is
    known."""
    teachers, tags = teachers_of(plan), {}
    for index, teacher in enumerate(teachers):
        key = "temper.teacher" if len(teachers) == 1 else f"temper.teacher.{index}"
        tags[key] = f"{teacher.name} {teacher.fingerprint}"
        run_id = _run_id(teacher)
        if run_id:
            tags[f"{key}.run_id"] = run_id
    return tags


def _phase_folder(teacher: Teacher) -> Path | None:
    if teacher.kind == "weights":
        return None
    return teacher.place if teacher.kind == "phase" else teacher.place.parent.parent


def _run_id(teacher: Teacher) -> str:
    phase_folder = _phase_folder(teacher)
    return "" if phase_folder is None else str(computing_run(phase_folder).get("run_id", ""))


def _metrics(teacher: Teacher) -> dict[str, float]:
    manifest = read_json(teacher.place / PHASE_MANIFEST) if teacher.kind == "phase" else None
    return manifest["metrics"] if manifest is not None else {}
