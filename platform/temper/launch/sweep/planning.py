"""What a sweep will do, decided before anything starts: its trials, their phases, and what they share."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from temper.config.load import load_job
from temper.config.space import Params, SpaceConfig
from temper.config.space_checks import check_space
from temper.config.space_load import base_job, space_to_yaml, trial_overrides
from temper.errors import JobError, Problem
from temper.launch.cluster import RaySession, cluster_shape, node_rooms, prepare_environment
from temper.launch.rungs import RungClock, check_rungs
from temper.launch.sweep.ledger import params_key
from temper.launch.sweep.spec import SweepSpec
from temper.launch.train import import_folders
from temper.plan.build import Plan
from temper.plan.distill import CachePlan
from temper.plan.room import plan_concurrency, shape_of
from temper.plan.space import all_phases, check_corners, rung_phases, share_cache, share_teachers, shared_phases
from temper.products import read_phase
from temper.storage import absolute_storage, storage_folder
from temper.tracking.mlflow_store import tracking_uri

SPACE = "space.yaml"


@dataclass(frozen=True)
class SweepPlan:
    """What is known before anything starts. `trials` are all of them, in the order in which they are begun, where the
    search does not depend on results; `plans` are theirs, else those of the space's corners."""

    spec: SweepSpec
    trials: list[Params] | None
    plans: list[Plan]
    first: Params
    shared: int
    teaching: bool


def plan_sweep(
    space: SpaceConfig, file: Path, overrides: Sequence[str], session: RaySession, command: str
) -> SweepPlan:
    """Checks the space, plans its corners, and lists its trials. Raises JobError with every problem found."""
    problems = check_space(space)
    if problems:
        raise JobError(problems)
    job_file = base_job(file, space)
    base = load_job(job_file, [*trial_overrides(space, {}), *overrides])
    storage = absolute_storage(base.storage)
    if not session.is_embedded:
        session.start(storage_folder(storage) / "logs")
    draft = SweepSpec(
        space=space,
        job_file=job_file,
        overrides=tuple(overrides),
        storage=storage,
        place="",
        uri=tracking_uri(base.model_copy(update={"storage": storage})),
        cluster=cluster_shape(session.address),
        import_folders=import_folders(job_file.parent),
        working_folder=os.getcwd(),
        command=command,
        ids={},
        clock=RungClock.of(["dense"], "dense"),
        concurrency=1,
        embedded=session.is_embedded,
        began_ms=int(time.time() * 1000),
        texts={SPACE: space_to_yaml(space), "job.yaml": job_file.read_text()},
    )
    corners = check_corners(space, draft.plan_alike)
    trials, duplicates = _list_trials(space)
    plans = [draft.plan_alike(params) for params in trials] if trials is not None else list(corners.plans)
    _check_mode(plans)
    shared = len(shared_phases(plans))
    concurrency = _concurrency(space, plans, None if trials is None else len(trials), session.address)
    counts = _notes(plans, duplicates, concurrency) if trials is not None else []
    spec = replace(
        draft,
        place=f"sweeps/{space.name}-{_fingerprint(space, corners.plans)}",
        ids=_ids(trials or []),
        clock=_clock(space, plans),
        concurrency=concurrency,
        notes=(*corners.notes, *counts),
    )
    return SweepPlan(
        spec=spec,
        trials=None if trials is None else _order(trials, plans, shared),
        plans=plans,
        first=trials[0] if trials else corners.params[0],
        shared=shared,
        teaching=share_teachers(plans) and (share_cache(plans) or not any(map(_cache_of, plans))),
    )


def _concurrency(space: SpaceConfig, plans: Sequence[Plan], trials: int | None, address: str) -> int:
    """Worker groups at once, whatever their shapes are. Raises JobError where one of these finds no room."""
    rooms, trials = node_rooms(address), trials or space.budget.trials
    return min(plan_concurrency(space.concurrency, rooms, shape, trials) for shape in set(map(shape_of, plans)))


def _ids(trials: Sequence[Params]) -> dict[str, str]:
    """The trials' ids by their params' keys."""
    width = max(3, len(str(len(trials) - 1)))
    return {params_key(params): f"t{index:0{width}d}" for index, params in enumerate(trials)}


def _cache_of(plan: Plan) -> CachePlan | None:
    return None if plan.distill is None else plan.distill.cache


def _check_mode(plans: Sequence[Plan]) -> None:
    if any(plan.job.parallel.mode != "synchronous" for plan in plans):
        rule = "is not swept: its result depends on timing, so that no two trials can be compared"
        raise JobError([Problem("parallel.mode", "parameter_server", rule, "use synchronous")])


def _list_trials(space: SpaceConfig) -> tuple[list[Params] | None, int]:
    """All trials, and how many of them were drawn twice; None where each is suggested after others' results."""
    if space.search.kind == "tpe":
        return None, 0
    from temper.launch.search import expand_trials

    return expand_trials(space)


def _order(trials: list[Params], plans: Sequence[Plan], shared: int) -> list[Params]:
    """So that trials with the same first phase of their own, after those that all share, do not come together."""
    from temper.launch.search import order_trials

    first = {
        params_key(params): plan.phases[min(shared, len(plan.phases) - 1)].fingerprint
        for params, plan in zip(trials, plans, strict=True)
    }
    return order_trials(trials, lambda params: first[params_key(params)])


def _clock(space: SpaceConfig, plans: Sequence[Plan]) -> RungClock:
    phases, scheduler = all_phases(plans), space.scheduler
    first = next(iter(rung_phases(plans)), phases[-1])
    if scheduler.kind != "asha" and scheduler.kind != "hyperband":
        return RungClock.of(phases, first)
    clock = RungClock.of(phases, first, scheduler.rungs, scheduler.reduction_factor)
    problems = check_rungs(clock, scheduler.rungs)
    if problems:
        raise JobError(problems)
    return clock


def _fingerprint(space: SpaceConfig, corners: Sequence[Plan]) -> str:
    """What makes it another sweep: the space, and what its corners compute; not how many trials run at once, nor where
    anything is kept."""
    parts = [space.model_dump(mode="json", exclude={"concurrency", "winner"}), [plan.fingerprint for plan in corners]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def _notes(plans: Sequence[Plan], duplicates: int, concurrency: int) -> list[str]:
    every = [phase for plan in plans for phase in plan.phases]
    distinct = {phase.fingerprint: phase.steps for phase in every}
    steps, alone = sum(distinct.values()), sum(phase.steps for phase in every)
    saved = f"{len(distinct)} phases for {len(every)}, {steps:,} steps for {alone:,}"
    notes = [f"{len(plans)} trials, {concurrency} at once: {saved}"]
    if duplicates:
        notes.append(f"{duplicates} more are the same as one of these")
    return notes


def preview_sweep(space: SpaceConfig, file: Path, overrides: Sequence[str], address: str) -> dict[str, Any]:
    """What the sweep would do, for `temper sweep --dry-run`: everything is checked and planned, nothing is started.

    `phases` and `steps` are those of all trials together, each phase once; `alone` are what they would be if each trial
    trained its own; `stored` are phases that the phase store has. These are not known of a search that depends on
    results. Raises JobError with every problem found.
    """
    prepare_environment(address)
    with ExitStack() as stack:
        plan = plan_sweep(space, file, overrides, RaySession(address, stack), "")
    return {
        "name": space.name,
        "folder": str(plan.spec.folder),
        "trials": len(plan.plans) if plan.trials is not None else space.budget.trials,
        "concurrency": plan.spec.concurrency,
        "shared": [phase.name for phase in plan.plans[0].phases[: plan.shared]],
        "rungs": [f"{phase} {share:g}" for phase, share in plan.spec.clock.rungs],
        **(_totals(plan.plans) if plan.trials is not None else {}),
        "notes": list(plan.spec.notes),
    }


def _totals(plans: Sequence[Plan]) -> dict[str, int]:
    every = [(phase, plan.phase_folder(phase)) for plan in plans for phase in plan.phases]
    distinct = {phase.fingerprint: (phase, folder) for phase, folder in every}
    return {
        "phases": len(distinct),
        "steps": sum(phase.steps for phase, _ in distinct.values()),
        "phases_alone": len(every),
        "steps_alone": sum(phase.steps for phase, _ in every),
        "phases_stored": sum(read_phase(folder) is not None for _, folder in distinct.values()),
    }
