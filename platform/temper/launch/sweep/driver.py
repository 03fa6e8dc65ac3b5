"""`temper sweep`: checks a space, starts the coordinator and Ray Tune, shows what they do, and names the winner.

The sweep's folder is an interface: `<storage>/sweeps/<name>-<fingerprint>/` has `space.yaml`, `trials.jsonl` (the
ledger), `sweep.json` (the parent run in MLflow), `trials/<id>/` and `shared/` (run folders), and `best/`, the winner's
export. The same command goes on with a sweep that was broken off, and tells what came of one that is complete.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from temper.config.space import SpaceConfig
from temper.config.space_load import space_to_yaml
from temper.data.download import fetch_files
from temper.errors import RunError, TemperError
from temper.files import read_json, write_json
from temper.launch.cluster import RaySession, prepare_environment
from temper.launch.ingest import ingest
from temper.launch.phase_store import is_complete
from temper.launch.reconcile import settle
from temper.launch.sweep.coordinator import Coordinator
from temper.launch.sweep.ledger import ENDED, LEDGER, LedgerTrial, params_key, read_ledger
from temper.launch.sweep.parent import close_sweep, log_reports, tell_outcome
from temper.launch.sweep.planning import SPACE, SweepPlan, plan_sweep
from temper.launch.sweep.spec import SweepSpec
from temper.launch.sweep.winner import WINNER, name_winner
from temper.launch.train import RunInterrupted, TrainOptions, access_checked, stop_on_signal
from temper.locks import claimed
from temper.plan.build import Plan
from temper.plan.room import shape_of
from temper.ranking import best_trial, pareto_front
from temper.remote_store import fetch
from temper.run_folder import LOCK, RESULT, RUN, SWEEP_RUN, SYSTEM
from temper.tracking.mlflow_store import RunStatus
from temper.tracking.sweep_progress import SweepDisplay, SweepView, build_sweep_display, summary_table, winner_lines

_LOOK_S = 0.3
UNSTARTED = "left behind: nothing was started"


@dataclass(frozen=True)
class SweepResult:
    """What `temper sweep --json` prints.

    `trials` are in the order of their ids. `best` is the one of them that wins on the first objective, with the
    `overrides` that repeat it, the `folder` of its export and what it is `registered` as; `front` are the ids of the
    Pareto front, where there are several objectives. `phases_run`, `phases_reused`, `steps_computed` and `steps_saved`
    are the sweep's, whichever command ran them; `seconds` and `steps_run` are this command's. `left_behind` is what the
    audit found, `undelivered` the folders of runs that MLflow did not take, and `told` whether it took what came of the
    sweep.
    """

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
    steps_computed: int = 0
    steps_saved: int = 0
    undelivered: list[str] = field(default_factory=list)
    told: bool = False
    summary: tuple[str, ...] = ()
    """Lines for people."""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["summary"]
        return values


def launch_sweep(space: SpaceConfig, file: Path, overrides: Sequence[str], options: TrainOptions) -> SweepResult:
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
        plan = plan_sweep(space, file, overrides, session, options.command)
        spec = plan.spec
        spec.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(claimed(spec.folder / LOCK, f"the sweep {space.name}"))
        for name in (LEDGER, SWEEP_RUN):
            fetch(spec.folder / name)
        if options.fresh:
            _forget(spec)
        (spec.folder / SPACE).write_text(space_to_yaml(space))
        display = build_sweep_display(options.display, space.name)
        stack.callback(display.close)
        for note in plan.spec.notes:
            display.note(note)
        known = read_ledger(spec.folder / LEDGER)
        done = read_json(spec.folder / RESULT) if _is_over(plan, known) else None
        if done is not None:
            return _reused(plan, known, done, started, display)
        status: RunStatus = "FAILED"
        try:
            outcome, audit = _run(plan, known, session, display)
            result = _conclude(spec, outcome, audit, time.perf_counter() - started, display)
            status = "FINISHED"
            return result
        except (RunInterrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            close_sweep(spec, status, display)


def _forget(spec: SweepSpec) -> None:
    """`--fresh`: a new sweep in MLflow; what the phase store has is still not computed again."""
    settle(spec.folder)  # else its old runs would stay open for ever
    for name in (LEDGER, SWEEP_RUN, RESULT, SYSTEM, WINNER):
        (spec.folder / name).unlink(missing_ok=True)
    # Of trials, of what they share, and of trials that share nothing, with their teachers.
    for place in ("trials/*", "shared", "alone/*/*"):
        for record in spec.folder.glob(f"{place}/{RUN}"):
            record.unlink()


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
    with access_checked(spec.uri, spec.job({})):
        session.start(spec.folder / "logs")
    from temper.launch.audit import take_inventory

    before = take_inventory()
    # By Ray Data, which would wait for the processors that the worker groups hold.
    for each in {each.data.fingerprint: each for each in plan.plans}.values():
        ingest(each.job.data, each.data, each.job.storage_folder, display.stage)
    ask = partial(display.note, "stopping: every trial saves its state; once more to stop at once")
    with stop_on_signal(ask) as stop:
        outcome = _with_coordinator(plan, known, stop, display)
    audit = before.left_behind()
    if stop.is_set():
        ended = sum(trial["status"] in ENDED for trial in outcome["trials"])
        done = f"stopped after {ended} trials had ended; the state is saved in {spec.folder}"
        raise RunInterrupted(f"{done}, and the same command goes on from it")
    if plan.trials is None and len(outcome["trials"]) < (spec.space.budget.trials or 0) and not spec.space.budget.hours:
        display.note(f"the space has no more than {len(outcome['trials'])} different trials")
    return outcome, audit.text()


def _with_coordinator(
    plan: SweepPlan, known: Sequence[LedgerTrial], stop: threading.Event, display: SweepDisplay
) -> dict[str, Any]:
    import ray
    from ray.exceptions import RayError

    spec = plan.spec
    ranks = max(shape_of(each).ranks for each in plan.plans)
    # Each rank and each of Ray Tune's trials may wait in a call.
    calls = 16 + spec.concurrency * (2 * ranks + 4)
    options = {"num_cpus": 0, "max_concurrency": calls, "max_restarts": 0, **_beside_the_driver()}
    coordinator = ray.remote(Coordinator).options(**options).remote(spec)
    failures: list[BaseException] = []
    work = threading.Thread(target=_search, args=(plan, known, coordinator, stop, failures), daemon=True)
    try:
        display.stage(f"starting {_counted(spec.concurrency, 'worker group')}")
        work.start()
        while work.is_alive():
            work.join(_LOOK_S)
            _show(coordinator, display)
            if stop.is_set():
                ray.get(coordinator.interrupt.remote())
        outcome: dict[str, Any] = ray.get(coordinator.finish.remote(is_over=not failures and not stop.is_set()))
        _show(coordinator, display)
    except RayError as error:
        raise _cause(failures[0] if failures else error) from error
    finally:
        ray.kill(coordinator)
    if outcome["broken"]:
        raise RunError(outcome["broken"])
    if failures and not stop.is_set():
        raise _cause(failures[0])
    return outcome


def _beside_the_driver() -> dict[str, Any]:
    """The coordinator reads and writes the driver's files, and its claims are locks on them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if ray.util.client.ray.is_connected():
        return {}  # the driver is on no node
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


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

        stored = plan.trials is not None and _are_stored(plan.plans)
        shape = shape_of(plan.plans[0])
        ray.get(coordinator.prepare.remote(plan.first, shape, plan.shared, plan.teaching, stored))
        if not stop.is_set():
            run_tune(plan.spec, plan.trials, known, coordinator, stop)
    except BaseException as error:
        failures.append(error)


def _are_stored(plans: Sequence[Plan]) -> bool:
    return all(is_complete(plan, phase) for plan in plans for phase in plan.phases)


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


def _reused(
    plan: SweepPlan, known: Sequence[LedgerTrial], done: dict[str, Any], started: float, display: SweepDisplay
) -> SweepResult:
    """A sweep that has come to its end: nothing is started; what MLflow could not take then, it is given now."""
    spec, late = plan.spec, _lacks(done)
    coordinator = Coordinator(spec)
    for trial in known:
        coordinator.recall(trial)
    if late:
        coordinator.deliver_late(plan.first, plan.shared)
    outcome = coordinator.finish(is_over=True)
    result = SweepResult(**done)
    if late:
        result = _told(spec, _with_runs(result, outcome), display)
        close_sweep(spec, "FINISHED", display)
    seconds = time.perf_counter() - started
    result = replace(result, status="reused", seconds=seconds, steps_run=0, left_behind=UNSTARTED)
    return replace(result, summary=tuple(_summary(spec, outcome["view"], result)))


def _lacks(done: dict[str, Any]) -> bool:
    """Whether MLflow lacks something of a sweep that came to this."""
    is_registered = done["best"] is None or done["best"]["registered"]
    return bool(done["undelivered"]) or not done.get("told") or not is_registered


def _with_runs(result: SweepResult, outcome: dict[str, Any]) -> SweepResult:
    """The result with the runs that MLflow has by now."""
    runs = {trial["id"]: trial["run_id"] for trial in outcome["trials"]}
    trials = [{**trial, "run_id": runs.get(trial["id"], trial["run_id"])} for trial in result.trials]
    best = result.best and {**result.best, "run_id": runs.get(result.best["id"], result.best["run_id"])}
    parent, missing = outcome["parent_run_id"], outcome["undelivered"]
    return replace(result, trials=trials, best=best, parent_run_id=parent, undelivered=missing)


# ------------------------------------------------------------------------------------------------------------- the end


def _conclude(
    spec: SweepSpec, outcome: dict[str, Any], audit: str, seconds: float, display: SweepDisplay
) -> SweepResult:
    space = spec.space
    trials = outcome["trials"]
    finished = [trial for trial in trials if trial["status"] == "finished"]
    metrics = [trial["metrics"] for trial in finished]
    index = best_trial(metrics, space.objectives[0])
    best = None if index is None else {**finished[index], "overrides": spec.job_overrides(finished[index]["params"])}
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
        steps_computed=outcome["steps_computed"],
        steps_saved=outcome["view"].steps_saved,
        left_behind=audit,
        undelivered=outcome["undelivered"],
    )
    result = _told(spec, result, display)
    return replace(result, summary=tuple(_summary(spec, outcome["view"], result)))


def _told(spec: SweepSpec, result: SweepResult, display: SweepDisplay) -> SweepResult:
    """Names the winner, tells MLflow what came of the sweep, and keeps the result for the next command."""
    if result.best is not None and not result.best.get("registered"):
        result = replace(result, best=name_winner(spec, result.best, display))
    result = replace(result, told=tell_outcome(spec, result, display))
    log_reports(spec, result, display)
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
        lines += _registered(result.best)
        lines += [f"  {train}", f"  {submit}"]
    lines += (
        [f"MLflow lacks {len(result.undelivered)} runs; the same command delivers them"] if result.undelivered else []
    )
    return [*lines, result.left_behind]


def _registered(best: dict[str, Any]) -> list[str]:
    uri, alias, note = (best.get(key, "") for key in ("registered", "alias", "note"))
    also = f" and {uri.rpartition('/')[0]}@{alias}" if alias else ""
    return [f"  as {uri}{also}{f': {note}' if note else ''}"] if uri else []


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
