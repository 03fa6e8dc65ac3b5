"""The phase store as commands share it: which phases it has, and who computes those that it lacks.

A phase lies in `<storage>/phases/<fingerprint>/` and is complete when its manifest is there. A command claims every
phase that it runs until it ends.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from temper import products
from temper.files import read_json, read_lines
from temper.locks import HeldError, claimed, shared
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan
from temper.run_folder import CHECKPOINTS, HISTORY, PHASE_MANIFEST
from temper.tracking.history import History, last_step


def claim_phases(plan: Plan, stack: ExitStack) -> tuple[PhasePlan, ...]:
    """The phases that are not complete, in their order, each claimed until `stack` is closed; until then the others
    stay where they are.

    Raises HeldError where another command runs one of them.
    """
    pending = []
    for phase in plan.phases:
        stack.enter_context(shared(_users(plan.phase_folder(phase)), _what(plan, phase)))
        with ExitStack() as claim:
            try:
                claim.enter_context(_claim(plan, phase))
            except HeldError:
                # A command keeps what it has completed until it has run all of its phases.
                if is_complete(plan, phase):
                    continue
                raise
            if is_complete(plan, phase):
                complete_history(plan, phase)
            else:
                stack.push(claim.pop_all())
                pending.append(phase)
    return tuple(pending)


def keep_phase(folder: Path, stack: ExitStack) -> None:
    """Until `stack` is closed, the phase in this folder stays there. Raises HeldError where it is being removed."""
    stack.enter_context(shared(_users(folder), f"phase {folder.name[:10]}"))


def forget_phases(plan: Plan, stack: ExitStack) -> tuple[PhasePlan, ...]:
    """Removes what was computed for this job. Returns all phases, each claimed until `stack` is closed.

    Raises HeldError where another command runs or uses one of them; nothing is removed then.
    """
    for phase in plan.phases:
        stack.enter_context(_claim(plan, phase))
    with ExitStack() as unused:
        for phase in plan.phases:
            unused.enter_context(claimed(_users(plan.phase_folder(phase)), _what(plan, phase)))
        # Without its manifest a phase no longer counts. The last one first: what is left, should this be broken off, is
        # a chain of phases from the start.
        for phase in reversed(plan.phases):
            (plan.phase_folder(phase) / PHASE_MANIFEST).unlink(missing_ok=True)
        for phase in plan.phases:
            shutil.rmtree(plan.phase_folder(phase), ignore_errors=True)
    return plan.phases


def _claim(plan: Plan, phase: PhasePlan) -> AbstractContextManager[None]:
    return claimed(plan.lock(phase), _what(plan, phase))


def _users(folder: Path) -> Path:
    """The lock that every command which needs the phase in this folder shares."""
    return folder.with_name(f"{folder.name}.users.lock")


def _what(plan: Plan, phase: PhasePlan) -> str:
    return f"{phase.name} of {plan.job.name}, {phase.fingerprint[:10]},"


def is_complete(plan: Plan, phase: PhasePlan) -> bool:
    """Whether the phase store has the phase."""
    return read_json(plan.phase_folder(phase) / PHASE_MANIFEST) is not None


def complete_history(plan: Plan, phase: PhasePlan) -> None:
    """Appends to the history of a complete phase what a process that died between the phase's end and its last report
    had not reported: the checkpoints have those records, too. For who has the phase claimed."""
    folder = plan.phase_folder(phase)
    if not is_complete(plan, phase) or last_step(folder / HISTORY) >= phase.last_step:
        return
    from temper.checkpoint import RECORDS, list_checkpoints

    history = History(folder / HISTORY)
    for checkpoint in list_checkpoints(folder / CHECKPOINTS):
        history.append(read_lines(checkpoint / RECORDS))


def computing_run(plan: Plan, phase: PhasePlan) -> str | None:
    """The MLflow run in whose folder the phase's folder says that it was computed."""
    return products.computing_run(plan.phase_folder(phase)).get("run_id")
