"""`temper sweep`: checks a space, starts the coordinator and Ray Tune, shows what they do, and names the winner.

The sweep's folder is an interface: `<storage>/sweeps/<name>-<fingerprint>/` has `space.yaml`, `trials.jsonl` (the
ledger), `sweep.json` (the parent run in MLflow), `trials/<id>/` and `shared/` (run folders), and `best/`, the winner's
export. The same command goes on with a sweep that was broken off, and tells what came of one that is complete.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from temper.config.load import load_job
from temper.config.space import Params, SpaceConfig
from temper.config.space_load import base_job, space_to_yaml, trial_overrides
from temper.data.download import fetch_files
from temper.errors import JobError, Problem, RunError, TemperError
from temper.files import read_json, write_json
from temper.launch.cluster import RaySession, cluster_shape, node_rooms, prepare_environment
from temper.launch.ingest import ingest
from temper.launch.ranking import best_trial, pareto_front
from temper.launch.rungs import RungClock, check_rungs
from temper.launch.sweep.coordinator import SWEEP_RUN, Coordinator, SweepSpec
from temper.launch.sweep.ledger import LEDGER, LedgerTrial, params_key, read_ledger
from temper.launch.sweep.winner import close_tree, name_winner
from temper.launch.teachers import plan_job
from temper.launch.train import RunInterrupted, import_folders
from temper.locks import claimed
from temper.plan.build import Plan
from temper.plan.distill import CachePlan
from temper.plan.room import plan_concurrency, shape_of
from temper.plan.space import all_phases, check_corners, rung_phases, share_cache, share_teachers, shared_phases
from temper.products import read_phase
from temper.run_folder import LOCK
from temper.storage import absolute_storage, storage_folder
from temper.tracking.mlflow_store import tracking_uri
from temper.tracking.progress import DisplayMode
from temper.tracking.sweep_progress import SweepDisplay, SweepView, build_sweep_display, summary_table, winner_lines

_LOOK_S = 0.3
SPACE = "space.yaml"
RESULT = "result.json"
UNSTARTED = "left behind: nothing was started"


@dataclass(frozen=True)
class SweepOptions:
    """How to run a sweep; nothing here changes a trial's result."""

    address: str = "local"
    fresh: bool = False
    display: DisplayMode = "plain"
    command: str = ""


@dataclass(frozen=True)
class SweepResult:
    """What `temper sweep --json` prints. `trials` are in the order of their ids; `best` is the one of them that wins on
    the first objective, with the overrides that repeat it; `front` the ids of the Pareto front, where there are several
    objectives. `left_behind` is what the audit found."""

    parent_run_id: str
    name: str
    status: str
    seconds: float
    folder: str
    trials: list[dict[str, Any]]
    best: dict[str, Any] | None
    front: list[str]
    phases_run: int
    phases_reused: int
    steps_run: int
    left_behind: str
    undelivered: list[str] = field(default_factory=list)
    summary: tuple[str, ...] = ()
    """Lines for people."""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["summary"]
        return values


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
    notes: tuple[str, ...]


def launch_sweep(space: SpaceConfig, file: Path, overrides: Sequence[str], options: SweepOptions) -> SweepResult:
    """Runs the sweep of a space file, or goes on with it. `overrides` are of the base job.

    Raises:
        JobError: the space, or a job in it, is wrong, or a trial finds no room in the cluster.
        RunError: every trial failed, or the sweep itself could not go on.
        RunInterrupted: SIGINT or SIGTERM; every trial's state is saved.
    """
    started = time.perf_counter()
    prepare_environment(options.address)
    with ExitStack() as stack:
        session = RaySession(options.address, stack)
        plan = plan_sweep(space, file, overrides, options, session)
        spec = plan.spec
        spec.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(claimed(spec.folder / LOCK, f"the sweep {space.name}"))
        if options.fresh:
            _forget(spec)
        (spec.folder / SPACE).write_text(space_to_yaml(space))
        display = build_sweep_display(options.display, space.name)
        stack.callback(display.close)
        for note in plan.notes:
            display.note(note)
        known = read_ledger(spec.folder / LEDGER)
        done = read_json(spec.folder / RESULT) if _is_over(plan, known) else None
        if done is not None:
            return _reused(spec, known, done, time.perf_counter() - started)
        outcome, audit = _run(plan, known, session, display)
        return _conclude(spec, outcome, audit, time.perf_counter() - started, display)


def preview_sweep(space: SpaceConfig, file: Path, overrides: Sequence[str], options: SweepOptions) -> dict[str, Any]:
    """What the sweep would do, for `temper sweep --dry-run`: everything is checked and planned, nothing is started.

    `phases` and `steps` are those of all trials together, each phase once; `alone` are what they would be if each trial
    trained its own; `stored` are phases that the phase store has. Of a search that depends on results the corners of
    the space stand for its trials. Raises JobError with every problem found.
    """
    prepare_environment(options.address)
    with ExitStack() as stack:
        plan = plan_sweep(space, file, overrides, options, RaySession(options.address, stack))
    every = [(phase, each.phase_folder(phase)) for each in plan.plans for phase in each.phases]
    distinct = {phase.fingerprint: (phase, folder) for phase, folder in every}
    return {
        "name": space.name,
        "folder": str(plan.spec.folder),
        "trials": len(plan.plans) if plan.trials is not None else space.budget.trials,
        "concurrency": plan.spec.concurrency,
        "phases": len(distinct),
        "steps": sum(phase.steps for phase, _ in distinct.values()),
        "phases_alone": len(every),
        "steps_alone": sum(phase.steps for phase, _ in every),
        "phases_stored": sum(read_phase(folder) is not None for _, folder in distinct.values()),
        "shared": [phase.name for phase in plan.plans[0].phases[: plan.shared]],
        "rungs": [f"{phase} {share:g}" for phase, share in plan.spec.clock.rungs],
        "notes": list(plan.notes),
    }


# ------------------------------------------------------------------------------------------------------------ the plan


def plan_sweep(
    space: SpaceConfig, file: Path, overrides: Sequence[str], options: SweepOptions, session: RaySession
) -> SweepPlan:
    """Checks the space, plans its corners, and lists its trials. Raises JobError with every problem found."""
    job_file = base_job(file, space)
    base = load_job(job_file, [*trial_overrides(space, {}), *overrides])
    storage = absolute_storage(base.storage)
    if not session.is_embedded:
        session.start(storage_folder(storage) / "logs")
    cluster = cluster_shape(options.address)
    folder = job_file.parent

    def plan_trial(params: Params) -> Plan:
        job = load_job(job_file, [*trial_overrides(space, params), *overrides])
        return plan_job(job.model_copy(update={"storage": storage}), cluster, folder)

    corners = check_corners(space, plan_trial)
    trials, duplicates = _list_trials(space)
    plans = [plan_trial(params) for params in trials] if trials is not None else list(corners.plans)
    _check_mode(plans)
    shared = len(shared_phases(plans))
    place = f"sweeps/{space.name}-{_fingerprint(space, base.model_dump(mode='json'))}"
    ids: dict[str, str] = {}
    if trials is not None:
        width = max(3, len(str(len(trials) - 1)))
        ids = {params_key(params): f"t{index:0{width}d}" for index, params in enumerate(trials)}
        first = {
            params_key(params): plan.phases[min(shared, len(plan.phases) - 1)].fingerprint
            for params, plan in zip(trials, plans, strict=True)
        }
        trials = _order(trials, first)
    shapes = {shape_of(plan) for plan in plans}
    rooms = node_rooms(options.address)
    concurrency = min(plan_concurrency(space.concurrency, rooms, shape, len(plans)) for shape in shapes)
    spec = SweepSpec(
        space=space,
        job_file=job_file,
        overrides=tuple(overrides),
        storage=storage,
        place=place,
        uri=tracking_uri(base.model_copy(update={"storage": storage})),
        cluster=cluster,
        import_folders=import_folders(folder),
        command=options.command,
        ids=ids,
        clock=_clock(space, plans),
        concurrency=concurrency,
        embedded=session.is_embedded,
        texts={SPACE: space_to_yaml(space), "job.yaml": job_file.read_text()},
    )
    first_params = trials[0] if trials else corners.params[0]
    teaching = share_teachers(plans) and (share_cache(plans) or not any(_cache_of(each) for each in plans))
    counts = _notes(plans, duplicates, concurrency) if trials is not None else []
    return SweepPlan(spec, trials, plans, first_params, shared, teaching, (*corners.notes, *counts))


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


def _order(trials: list[Params], first: dict[str, str]) -> list[Params]:
    """So that trials with the same first phase of their own, as `first` has it, do not come together."""
    from temper.launch.search import order_trials

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


def _fingerprint(space: SpaceConfig, job: dict[str, Any]) -> str:
    """What makes it another sweep: not how many trials run at once, nor where anything is kept."""
    parts = [space.model_dump(mode="json", exclude={"concurrency", "winner"}), job]
    for key in ("storage", "tracking"):
        job.pop(key, None)
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


def _forget(spec: SweepSpec) -> None:
    """`--fresh`: a new sweep in MLflow; what the phase store has is still not computed again."""
    for name in (LEDGER, SWEEP_RUN, RESULT):
        (spec.folder / name).unlink(missing_ok=True)
    for run in (spec.folder / "trials").glob("*/run.json"):
        run.unlink()


# ------------------------------------------------------------------------------------------------------------- running


def _is_over(plan: SweepPlan, known: Sequence[LedgerTrial]) -> bool:
    """Whether every trial of the sweep has ended before."""
    ended = {params_key(trial.params) for trial in known if trial.end}
    if plan.trials is None or plan.spec.decide == "phase":
        return len(ended) == len(known) > 0
    return all(params_key(params) in ended for params in plan.trials)


def _run(
    plan: SweepPlan, known: Sequence[LedgerTrial], session: RaySession, display: SweepDisplay
) -> tuple[dict[str, Any], str]:
    """What became of the trials, and what the audit says."""
    spec = plan.spec
    if session.is_embedded:
        for kind in {each.job.data.kind for each in plan.plans}:
            fetch_files(kind)
    if not session.is_started:
        display.stage("starting Ray")
    session.start(spec.folder / "logs")
    from temper.launch.audit import take_inventory

    before = take_inventory()
    # By Ray Data, which would wait for the processors that the worker groups hold.
    for each in {each.data.fingerprint: each for each in plan.plans}.values():
        ingest(each.job.data, each.data, each.job.storage_folder, display.stage)
    with _stop_on_signal(display) as stop:
        outcome = _with_coordinator(plan, known, stop, display)
    audit = before.left_behind()
    if stop.is_set():
        raise RunInterrupted("stopped; the state is saved, the same command goes on from it")
    return outcome, audit.text()


def _with_coordinator(
    plan: SweepPlan, known: Sequence[LedgerTrial], stop: threading.Event, display: SweepDisplay
) -> dict[str, Any]:
    import ray

    spec = plan.spec
    ranks = max(shape_of(each).ranks for each in plan.plans)
    # Each rank and each of Ray Tune's trials may wait in a call.
    calls = 16 + spec.concurrency * (2 * ranks + 4)
    options = {"num_cpus": 0, "max_concurrency": calls, "max_restarts": 0}
    coordinator = ray.remote(Coordinator).options(**options).remote(spec)
    try:
        failures: list[BaseException] = []
        work = threading.Thread(target=_search, args=(plan, known, coordinator, stop, failures), daemon=True)
        display.stage(f"starting {_counted(spec.concurrency, 'worker group')}")
        work.start()
        while work.is_alive():
            work.join(_LOOK_S)
            _show(coordinator, display)
            if stop.is_set():
                ray.get(coordinator.interrupt.remote())
        outcome: dict[str, Any] = ray.get(coordinator.finish.remote())
        _show(coordinator, display)
        if outcome["broken"]:
            raise RunError(outcome["broken"])
        if failures and not stop.is_set():
            raise _cause(failures[0])
        return outcome
    finally:
        ray.kill(coordinator)


def _search(
    plan: SweepPlan,
    known: Sequence[LedgerTrial],
    coordinator: Any,
    stop: threading.Event,
    failures: list[BaseException],
) -> None:
    """What all trials share, then the trials. Beside the driver's own thread, which shows them."""
    import ray

    try:
        # Its import takes seconds, and the workers come up meanwhile.
        from temper.launch.sweep.tuning import run_tune

        ray.get(coordinator.prepare.remote(plan.first, shape_of(plan.plans[0]), plan.shared, plan.teaching))
        if not stop.is_set():
            run_tune(plan.spec, plan.trials, known, coordinator, stop)
    except BaseException as error:
        failures.append(error)


def _show(coordinator: Any, display: SweepDisplay) -> None:
    import ray

    view, said = ray.get(coordinator.view.remote())
    for text in said:
        display.note(text)
    display.show(view)


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the coordinator, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TemperError):
        return cause
    return (
        error if isinstance(error, TemperError) else RunError(f"the sweep broke off: {type(error).__name__}: {error}")
    )


@contextmanager
def _stop_on_signal(display: SweepDisplay) -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks all trials to save their state; a second ends at once."""
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        display.note("stopping: every trial saves its state; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reused(spec: SweepSpec, known: Sequence[LedgerTrial], done: dict[str, Any], seconds: float) -> SweepResult:
    """A sweep that has come to its end: nothing is started."""
    coordinator = Coordinator(spec)
    for trial in known:
        coordinator.recall(trial)
    view = coordinator.finish()["view"]
    result = SweepResult(**{**done, "status": "reused", "seconds": seconds, "steps_run": 0, "left_behind": UNSTARTED})
    return replace(result, summary=tuple(_summary(spec, view, result)))


# ------------------------------------------------------------------------------------------------------------- the end


def _conclude(
    spec: SweepSpec, outcome: dict[str, Any], audit: str, seconds: float, display: SweepDisplay
) -> SweepResult:
    space = spec.space
    trials = outcome["trials"]
    finished = [trial for trial in trials if trial["status"] == "finished"]
    metrics = [trial["metrics"] for trial in finished]
    index = best_trial(metrics, space.objectives[0])
    best = None if index is None else {**finished[index], "overrides": _overrides(spec, finished[index]["params"])}
    front = (
        [finished[each]["id"] for each in pareto_front(metrics, space.objectives)] if len(space.objectives) > 1 else []
    )
    if trials and best is None and not any(trial["status"] == "stopped" for trial in trials):
        reason = next((trial["reason"] for trial in trials if trial["reason"]), "no trial reported the objective")
        raise RunError(f"no trial of {len(trials)} came to its end; the first reason: {reason}; see {spec.folder}")
    result = SweepResult(
        parent_run_id=outcome["parent_run_id"],
        name=space.name,
        status="finished",
        seconds=seconds,
        folder=str(spec.folder),
        trials=trials,
        best=best,
        front=front,
        phases_run=outcome["phases_run"],
        phases_reused=outcome["phases_reused"],
        steps_run=outcome["steps_run"],
        left_behind=audit,
        undelivered=outcome["undelivered"],
    )
    if best is not None:
        result = replace(result, best=name_winner(spec, best, display))
    close_tree(spec, result, display)
    result = replace(result, summary=tuple(_summary(spec, outcome["view"], result)))
    write_json(spec.folder / RESULT, result.to_dict())
    return result


def _summary(spec: SweepSpec, view: SweepView, result: SweepResult) -> list[str]:
    lines = [
        f"{result.name}: {result.status} in {result.seconds:.1f} s",
        *summary_table(view, result.front).split("\n"),
    ]
    if result.best is not None:
        train, submit = winner_lines(spec.job_file, result.best["overrides"], spec.storage)
        lines += [
            f"winner {result.best['id']}, MLflow run {result.best['run_id']}, exported to {result.best['folder']}"
        ]
        lines += [f"  as {result.best['registered']}@{spec.space.winner.alias}"] if result.best["registered"] else []
        lines += [f"  {train}", f"  {submit}"]
    lines += (
        [f"MLflow lacks {len(result.undelivered)} runs; the same command delivers them"] if result.undelivered else []
    )
    return [*lines, result.left_behind]


def _overrides(spec: SweepSpec, params: Params) -> list[str]:
    """What makes the base job this trial."""
    return [*trial_overrides(spec.space, params), *spec.overrides]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
