"""The phase store as commands share it: which phases it has, and who computes those that it lacks.

A phase lies in `<storage>/phases/<fingerprint>/` and is complete when its manifest is there. Where a file differs from
what the manifest says, the phase does not exist. A command claims every phase that it runs until it ends. Where the
storage is a bucket, a phase is fetched before it counts, and claimed among machines, too.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from temper import products
from temper.claims import remotely_claimed
from temper.files import read_lines
from temper.locks import HeldError, claimed, is_held, shared
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan
from temper.products import damage, read_phase
from temper.remote_store import (
    discard_phase,
    fetch_history,
    fetch_phase,
    forget_phase,
    mend_phase,
    publish,
    publish_phase,
)
from temper.run_folder import CHECKPOINTS, HISTORY, PHASE_MANIFEST, USED
from temper.tracking.history import History, last_step

log = logging.getLogger(__name__)

Say = Callable[[str], None]


def claim_phases(plan: Plan, stack: ExitStack, say: Say = log.warning) -> tuple[PhasePlan, ...]:
    """The phases that are not complete, in their order, each claimed until `stack` is closed; until then the others
    stay where they are.

    Of a complete phase whose end is needed, because the next one begins with it or it is the last, every file is read;
    one that is damaged is computed anew, and `say` is told which file it was. Raises HeldError where another command
    runs one of the phases.
    """
    claims: dict[str, ExitStack] = {}
    with ExitStack() as reused:
        for phase in plan.phases:
            stack.enter_context(shared(_users(plan.phase_folder(phase)), _what(plan, phase)))
            claim = reused.enter_context(ExitStack())
            try:
                claim.enter_context(_claim(plan, phase))
                claims[phase.name] = claim
            except HeldError:
                # A command keeps what it has completed until it has run all of its phases.
                if not is_complete(plan, phase):
                    raise
        pending: list[PhasePlan] = []
        is_needed = True
        for phase in reversed(plan.phases):
            if phase.name not in claims or _is_sound(plan, phase, is_needed):
                _reuse(plan, phase, is_claimed=phase.name in claims)
                is_needed = False
            else:
                _discard(plan.phase_folder(phase), _what(plan, phase), say)
                stack.push(claims[phase.name].pop_all())
                pending.insert(0, phase)
                is_needed = True
    return tuple(pending)


def _is_sound(plan: Plan, phase: PhasePlan, is_needed: bool) -> bool:
    folder = plan.phase_folder(phase)
    if not is_complete(plan, phase):
        return False
    if not is_needed or damage(folder) is None:
        return True
    mend_phase(folder)
    return damage(folder) is None


def _reuse(plan: Plan, phase: PhasePlan, is_claimed: bool) -> None:
    if is_claimed:
        complete_history(plan, phase)
    _mark_used(plan.phase_folder(phase))


def _mark_used(folder: Path) -> None:
    """Notes that the phase is used now, for who removes what has not been for long."""
    # A storage that cannot be written has no phases removed.
    with contextlib.suppress(OSError):
        (folder / USED).touch()
        publish([folder / USED])


def _discard(folder: Path, what: str, say: Say) -> None:
    """Removes a manifest that is not that of what is in the folder, for who has the phase claimed."""
    discard_phase(folder)
    manifest = folder / PHASE_MANIFEST
    if manifest.exists():
        problem = damage(folder) or f"{manifest}: that of another phase"
        say(f"{what} is computed anew: {problem}")
        manifest.unlink()


def keep_phase(folder: Path, stack: ExitStack) -> None:
    """Until `stack` is closed, the phase in this folder stays there. Raises HeldError where it is being removed."""
    stack.enter_context(shared(_users(folder), f"phase {folder.name[:10]}"))
    if read_phase(folder) is not None:
        _mark_used(folder)


def discard_damaged(folder: Path, say: Say = log.warning) -> None:
    """Where the phase in this folder is damaged, it is one that is not complete from now on, and `say` is told which
    file it was; not where another command runs it."""
    if not (folder / PHASE_MANIFEST).exists() or damage(folder) is None:
        return
    mend_phase(folder)
    if damage(folder):
        what = f"phase {folder.name[:10]}"
        with contextlib.suppress(HeldError), claimed(_lock(folder), what):
            _discard(folder, what, say)


def forget_phases(plan: Plan, stack: ExitStack) -> tuple[PhasePlan, ...]:
    """Removes what was computed for this job. Returns all phases, each claimed until `stack` is closed.

    Raises HeldError where another command runs or uses one of them; nothing is removed then.
    """
    for phase in plan.phases:
        stack.enter_context(claimed(plan.lock(phase), _what(plan, phase)))
        stack.enter_context(remotely_claimed(plan.lock(phase), _what(plan, phase)))
    with ExitStack() as unused:
        for phase in plan.phases:
            unused.enter_context(claimed(_users(plan.phase_folder(phase)), _what(plan, phase)))
        # Without its manifest a phase no longer counts. The last one first: what is left, should this be broken off, is
        # a chain of phases from the start.
        for phase in reversed(plan.phases):
            forget_phase(plan.phase_folder(phase))
            (plan.phase_folder(phase) / PHASE_MANIFEST).unlink(missing_ok=True)
        for phase in plan.phases:
            shutil.rmtree(plan.phase_folder(phase), ignore_errors=True)
    return plan.phases


@contextmanager
def _claim(plan: Plan, phase: PhasePlan) -> Iterator[None]:
    """Holds the phase alone for the block. Where the storage is a bucket, what that has of it is here then; one that is
    complete is there, too, and needs no claim among machines."""
    folder, lock, what = plan.phase_folder(phase), plan.lock(phase), _what(plan, phase)
    with claimed(lock, what):
        fetch_phase(folder)
        if is_complete(plan, phase):
            publish_phase(folder)
            yield
            return
        with remotely_claimed(lock, what):
            # Only now: another machine may have completed it meanwhile.
            fetch_phase(folder)
            fetch_history(folder)
            yield


def remove_phase(folder: Path) -> None:
    """Removes the phase in this folder, complete or not. Raises HeldError, and removes nothing, where a command runs or
    uses it, or a worker of one that died still writes it; OSError where the disk does not let it."""
    with ExitStack() as stack:
        for lock in _locks(folder):
            stack.enter_context(claimed(lock, f"phase {folder.name[:10]}"))
        stack.enter_context(remotely_claimed(_lock(folder), f"phase {folder.name[:10]}"))
        forget_phase(folder)
        (folder / PHASE_MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def is_in_use(folder: Path) -> bool:
    """Whether a process runs the phase in this folder, or needs it."""
    return any(map(is_held, _locks(folder)))


def _locks(folder: Path) -> list[Path]:
    """Everything that is held by who runs or uses a phase: see also :meth:`temper.plan.build.Plan.lock`."""
    return [_lock(folder), _users(folder), *sorted(folder.parent.glob(f"{folder.name}.rank-*.lock"))]


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _users(folder: Path) -> Path:
    """The lock that every command which needs the phase in this folder shares."""
    return folder.with_name(f"{folder.name}.users.lock")


def _what(plan: Plan, phase: PhasePlan) -> str:
    return f"{phase.name} of {plan.job.name}, {phase.fingerprint[:10]},"


def is_complete(plan: Plan, phase: PhasePlan) -> bool:
    """Whether the phase store has the phase, as far as can be seen without reading its files."""
    manifest = read_phase(plan.phase_folder(phase))
    return manifest is not None and manifest.get("fingerprint", phase.fingerprint) == phase.fingerprint


def complete_history(plan: Plan, phase: PhasePlan) -> None:
    """Appends to the history of a complete phase what a process that died between the phase's end and its last report
    had not reported: the checkpoints have those records, too. For who has the phase claimed."""
    if is_complete(plan, phase):
        _complete_history(plan.phase_folder(phase), phase.last_step)


def settle_history(folder: Path, until: int) -> None:
    """:func:`complete_history` of the phase in this folder, whose last step is `until`, where it is complete and nobody
    has it claimed. Raises HeldError where a process writes it."""
    if read_phase(folder) is not None and last_step(folder / HISTORY) < until:
        with claimed(_lock(folder), f"phase {folder.name[:10]}"):
            _complete_history(folder, until)


def _complete_history(folder: Path, until: int) -> None:
    if last_step(folder / HISTORY) >= until:
        return
    from temper.checkpoint import RECORDS, list_checkpoints

    history = History(folder / HISTORY)
    for checkpoint in list_checkpoints(folder / CHECKPOINTS):
        history.append(read_lines(checkpoint / RECORDS))


def computing_run(plan: Plan, phase: PhasePlan) -> str | None:
    """The MLflow run in whose folder the phase's folder says that it was computed."""
    return products.computing_run(plan.phase_folder(phase)).get("run_id")
