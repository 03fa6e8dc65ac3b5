"""`temper train`: plan → Ray Train workers → tracked result; resumes a broken run, reuses a finished one.

The run's folder is an interface: `job.yaml`, `plan.json`, `run.json` (the MLflow run), `stages.jsonl`,
`failures.jsonl`, `logs/`. What was computed lies in the phase store, `<storage>/phases/<fingerprint>/`.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from temper.config.load import job_to_yaml
from temper.config.schema import JobConfig
from temper.data.download import fetch_files
from temper.errors import EXIT_INTERRUPTED, RunError, TemperError
from temper.files import read_json, read_lines, write_json
from temper.launch.cluster import cluster_shape, prepare_environment, ray_session
from temper.launch.ingest import ingest
from temper.locks import claimed
from temper.plan.build import Plan, build_plan
from temper.plan.phases import PhasePlan
from temper.run_folder import (
    FAILURES,
    HISTORY,
    JOB,
    PHASE_MANIFEST,
    PLAN,
    RUN,
    STAGES,
    STOP,
    WorkerSpec,
)
from temper.tracking.delivery import replay
from temper.tracking.history import HistoryTail
from temper.tracking.mlflow_store import RunStatus, close_run, open_run, tracking_uri
from temper.tracking.progress import Display, DisplayMode, build_display

POLL_S = 0.1


@dataclass(frozen=True)
class TrainOptions:
    """How to run a job; nothing here changes its result."""

    address: str = "local"
    fresh: bool = False
    display: DisplayMode = "plain"
    command: str = ""


@dataclass(frozen=True)
class PhaseResult:
    name: str
    fingerprint: str
    steps: int
    reused: bool
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """What `temper train --json` prints. `seconds` is the whole command's time; a phase's is its training alone."""

    run_id: str
    experiment: str
    status: str
    seconds: float
    checkpoint: str
    metrics: dict[str, float]
    phases: list[PhaseResult] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run: its id, and the store that has it."""

    uri: str
    run_id: str


class RunInterrupted(TemperError):
    """The user stopped the run; its state is saved and the same command goes on from it."""

    exit_code = EXIT_INTERRUPTED


def launch_train(job: JobConfig, job_folder: Path, options: TrainOptions) -> TrainResult:
    """Trains `job` and returns its result.

    Raises:
        JobError: the job cannot be planned on this cluster.
        RunError: the run failed; what it reached is saved.
        RunInterrupted: SIGINT or SIGTERM; what it reached is saved.
    """
    started = time.perf_counter()
    prepare_environment(options.address)
    job = job.model_copy(update={"storage": str(Path(job.storage).absolute())})
    if not Path(job.storage).exists():
        # Nothing is there to be reused, and the plan waits for a process that builds the model.
        _begin_imports()
    with ExitStack() as stack:
        if options.address != "local":
            stack.enter_context(ray_session(options.address, Path(job.storage) / "logs"))
        plan = build_plan(job, cluster_shape(options.address), job_folder)
        phase = plan.phases[0]
        stack.enter_context(claimed(plan.lock(phase), f"{phase.name} of {job.name}, {phase.fingerprint[:10]},"))
        if options.fresh:
            _forget(plan)
        reused = read_json(plan.phase_folder(phase) / PHASE_MANIFEST) is not None
        if reused:
            _deliver_late(plan, phase, job_folder, options.command)
        else:
            _run(plan, phase, job_folder, options, stack)
        return _result(plan, reused, time.perf_counter() - started)


def _forget(plan: Plan) -> None:
    """`--fresh`: removes what was computed for this job, so that all of it is computed again in a new MLflow run."""
    for phase in plan.phases:
        shutil.rmtree(plan.phase_folder(phase), ignore_errors=True)
    (plan.run_folder / RUN).unlink(missing_ok=True)


def _result(plan: Plan, reused: bool, seconds: float) -> TrainResult:
    phase = plan.phases[0]
    folder = plan.phase_folder(phase)
    manifest = read_json(folder / PHASE_MANIFEST)
    if manifest is None:
        raise RunError(f"the run ended without completing {phase.name}; see {plan.run_folder / 'logs'}")
    run = read_json(plan.run_folder / RUN) or {}
    result = PhaseResult(
        phase.name, phase.fingerprint, manifest["steps"], reused, manifest["seconds"], manifest["metrics"]
    )
    return TrainResult(
        run_id=run.get("run_id", ""),
        experiment=plan.job.tracking.experiment,
        status="reused" if reused else "finished",
        seconds=seconds,
        checkpoint=str(folder / manifest["checkpoint"]),
        metrics=manifest["metrics"],
        phases=[result],
    )


def _run(plan: Plan, phase: PhasePlan, job_folder: Path, options: TrainOptions, stack: ExitStack) -> None:
    """Everything between the plan and the phase's manifest."""
    spec = WorkerSpec(plan, phase, import_folders(job_folder))
    _prepare_folder(plan, spec.import_folders)
    display = stack.enter_context(_display(options.display, plan))
    for note in plan.notes:
        display.note(note)
    if options.address == "local":
        # The workers would, too; but what is missing is better said before they start.
        fetch_files(plan.job.data.kind)
    display.stage("starting Ray")
    _begin_imports()
    if options.address == "local":
        stack.enter_context(ray_session("local", plan.run_folder / "logs"))
    ingest(plan.job.data, plan.data, Path(plan.job.storage), display.stage)
    tracking = _Tracking(plan, options.command)
    display.stage(f"starting {plan.mesh.world_size} worker{'s' if plan.mesh.world_size > 1 else ''}")
    status: RunStatus = "FAILED"
    try:
        with _stop_on_signal(plan.run_folder / STOP, display) as stop:
            _fit(spec, display, tracking, embedded=options.address == "local")
        if stop.is_set() and not (spec.phase_folder / PHASE_MANIFEST).exists():
            status = "KILLED"
            raise RunInterrupted("stopped; the state is saved, the same command goes on from it")
        status = "FINISHED"
    finally:
        tracking.settle(phase, status, display)


def _begin_imports() -> None:
    """Imports Ray Train beside what this thread does; it takes seconds, and a second call none."""

    def import_trainer() -> None:
        import temper.launch.trainer  # noqa: F401

    threading.Thread(target=import_trainer, daemon=True).start()


def _prepare_folder(plan: Plan, import_folders: tuple[str, ...]) -> None:
    folder = plan.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in (STOP, STAGES, FAILURES):
        (folder / name).unlink(missing_ok=True)
    known = read_json(folder / RUN)
    if known is not None:
        write_json(folder / RUN, {**known, "open": False, "delivered": False})
    for place in (folder, *(plan.phase_folder(phase) for phase in plan.phases)):
        place.mkdir(parents=True, exist_ok=True)
        (place / JOB).write_text(job_to_yaml(plan.job))
        write_json(place / PLAN, {**plan.to_dict(), "import_folders": import_folders})


class _Tracking:
    """The MLflow run, opened beside the training.

    A new database takes seconds of a core, and no worker waits for it: the first step comes first, and what is
    reported before the run is open is in the history.
    """

    def __init__(self, plan: Plan, command: str) -> None:
        self._plan, self._command = plan, command
        self._opening: Future[TrackedRun] | None = None

    def open(self) -> Future[TrackedRun]:
        """Begins to open the run; does nothing the second time."""
        if self._opening is None:
            executor = ThreadPoolExecutor(1)
            self._opening = executor.submit(_open_run, self._plan, self._command)
            executor.shutdown(wait=False)
        return self._opening

    def settle(self, phase: PhasePlan, status: RunStatus, display: Display) -> None:
        """Completes what MLflow knows, with the terminal status. A dead server must not hide the result."""
        try:
            if not _deliver(self.open().result(), self._plan, phase, status):
                raise RunError("the store did not take the end of the run in time")
        except RunError as error:
            display.note(f"MLflow lacks what the history of this run has ({error}); the same command delivers it later")


@contextmanager
def _display(mode: DisplayMode, plan: Plan) -> Iterator[Display]:
    display = build_display(mode, plan)
    try:
        yield display
    finally:
        display.close()


def _open_run(plan: Plan, command: str) -> TrackedRun:
    """The MLflow run of this run folder: a new one, or the one that a broken attempt left."""
    uri = tracking_uri(plan.job)
    known = read_json(plan.run_folder / RUN) or {}
    run_id = known.get("run_id") if known.get("uri") == uri else None
    run = TrackedRun(uri, open_run(uri, plan, run_id=run_id, job_yaml=job_to_yaml(plan.job), command=command))
    write_json(plan.run_folder / RUN, {**asdict(run), "open": True})
    return run


def import_folders(job_folder: Path) -> tuple[str, ...]:
    """Where workers look for `kind: python` targets."""
    return (os.getcwd(), str(job_folder.absolute()))


@contextmanager
def _stop_on_signal(stop_file: Path, display: Display) -> Iterator[threading.Event]:
    """Turns the first SIGINT or SIGTERM into a request that the workers meet at their next report; a second ends."""
    requested = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        stop_file.touch()
        display.note("stopping at the next report, with the state saved; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fit(spec: WorkerSpec, display: Display, tracking: _Tracking, *, embedded: bool) -> None:
    """Runs the trainer beside this thread, which shows what comes in."""
    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            _build_trainer(spec, embedded).fit()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    history, num_stages = HistoryTail(spec.phase_folder / HISTORY), 0
    thread.start()
    while True:
        running = thread.is_alive()
        stages = read_lines(spec.run_folder / STAGES)
        for stage in stages[num_stages:]:
            display.stage(stage["text"])
        num_stages = len(stages)
        records = history.poll()
        if records:
            tracking.open()
        display.records(records)
        if not running:
            break
        time.sleep(POLL_S)
    if outcome:
        raise RunError(_failure_text(spec.run_folder, outcome[0])) from outcome[0]


def _build_trainer(spec: WorkerSpec, embedded: bool) -> Any:
    """What has a `fit()` that runs the phase; imported only now, and in its own thread, because that takes seconds."""
    if spec.plan.job.parallel.mode == "parameter_server":
        from temper.launch import parameter_server

        return parameter_server.build_trainer(spec)
    from temper.launch import trainer

    return trainer.build_trainer(spec, embedded=embedded)


def _failure_text(run_folder: Path, error: BaseException) -> str:
    logs = run_folder / "logs"
    failures = read_lines(run_folder / FAILURES)
    if not failures:
        return f"{type(error).__name__}: {error}; the workers' logs are in {logs}"
    last = failures[-1]
    kind = last["type"].rpartition(".")[2]
    return f"rank {last['rank']}: {kind}: {last['message']}; the whole log is {logs}/rank-{last['rank']}.log"


def _deliver(run: TrackedRun, plan: Plan, phase: PhasePlan, status: RunStatus) -> bool:
    delivered = replay(run.uri, run.run_id, plan.phase_folder(phase) / HISTORY) and close_run(
        run.uri, run.run_id, status
    )
    write_json(plan.run_folder / RUN, {**asdict(run), "open": False, "delivered": delivered})
    return delivered


def _deliver_late(plan: Plan, phase: PhasePlan, job_folder: Path, command: str) -> None:
    """Delivers a finished run that MLflow could not take when it ended, or that died between its end and that."""
    known = read_json(plan.run_folder / RUN) or {}
    if not known.get("delivered"):
        _prepare_folder(plan, import_folders(job_folder))
        _deliver(_open_run(plan, command), plan, phase, "FINISHED")
