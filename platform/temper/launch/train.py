"""`temper train`: plan → Ray Train workers → tracked result; resumes a broken run, reuses complete phases.

The run's folder is an interface: `job.yaml`, `plan.json`, `run.json` (the MLflow run), `stages.jsonl`,
`failures.jsonl`, `logs/`. What was computed lies in the phase store, `<storage>/phases/<fingerprint>/`, with the
`job.yaml` and `plan.json` of the run that computed it. Teachers that are jobs are trained first, each as its own run.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

from temper.config.load import job_to_yaml
from temper.config.schema import JobConfig
from temper.data.download import fetch_files
from temper.errors import EXIT_INTERRUPTED, RunError, TemperError
from temper.files import read_json, read_lines, write_json
from temper.launch.cluster import RaySession, cluster_shape, prepare_environment
from temper.launch.ingest import ingest
from temper.launch.phase_store import claim_phases, complete_history, forget_phases, is_complete
from temper.launch.reconcile import reconcile, settle
from temper.launch.teacher_runs import (
    TeacherResult,
    claim_teacher,
    is_trained,
    keep_teacher,
    teacher_results,
    teachers_of,
)
from temper.launch.teachers import plan_job
from temper.launch.tracked_run import TrackedRun
from temper.locks import claimed, is_held
from temper.plan.build import Plan
from temper.plan.distill import Teacher
from temper.plan.phases import PhasePlan
from temper.remote_store import Flag, fetch_phase, fetch_run_record, publish
from temper.run_folder import (
    FAILURES,
    HISTORY,
    JOB,
    LOCK,
    PHASE_MANIFEST,
    PLAN,
    REGISTERED,
    RUN,
    STAGES,
    STOP,
    SYSTEM,
    TRACKING_LOCK,
    WorkerSpec,
)
from temper.storage import absolute_storage
from temper.tracking.delivery import is_lost, replay
from temper.tracking.history import HistoryTail, Record, phase_histories
from temper.tracking.mlflow_store import RunGoneError, RunStatus, build_client, check_access, first_line, tracking_uri
from temper.tracking.progress import Display, DisplayMode, build_display

log = logging.getLogger(__name__)

_LACKS = "MLflow lacks what the history of this run has"
POLL_S = 0.1
_FOLLOW_S = 1.0  # between two looks at what MLflow is to be told
_ANSWER_S = 5.0  # that a server has, beside Ray's start, to refuse a user
_RETRY_S = 10.0  # before a store is asked again to open a run
STAGE_DELAY_S = 0.5  # longer than a record takes from its worker to the history


@dataclass(frozen=True)
class TrainOptions:
    """How to run a job or a sweep; nothing here changes a result."""

    address: str = "local"
    fresh: bool = False
    display: DisplayMode = "plain"
    command: str = ""


@dataclass(frozen=True)
class PhaseResult:
    """A phase of the job: its steps, the seconds that they took, and its last metrics; whether it was there before."""

    name: str
    fingerprint: str
    steps: int
    reused: bool
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """What `temper train --json` prints. `seconds` is the whole command's time; a phase's is its training alone.

    `status` is `finished`, or `reused` where all phases were. `checkpoint` and `metrics` are those of the last phase.
    `teacher_metrics` are the teacher's, all of an ensemble together, on this job's test split. `registered` is what the
    run is in MLflow's registry, where the job wants that: `uri`, `alias`, and for people `note`.
    """

    run_id: str
    experiment: str
    status: str
    seconds: float
    checkpoint: str
    metrics: dict[str, float]
    phases: list[PhaseResult] = field(default_factory=list)
    teachers: list[TeacherResult] = field(default_factory=list)
    teacher_metrics: dict[str, float] = field(default_factory=dict)
    registered: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    job = job.model_copy(update={"storage": absolute_storage(job.storage)})
    if not job.storage_folder.exists():
        # Nothing is there to be reused, and the plan waits for a process that builds the model.
        _begin_imports()
    with ExitStack() as stack:
        session = RaySession(options.address, stack)
        if not session.is_embedded:
            session.start(job.storage_folder / "logs")
        plan = plan_job(job, cluster_shape(options.address), job_folder)
        stack.enter_context(claimed(plan.run_folder / LOCK, f"{job.name}, {plan.fingerprint[:10]},"))
        fetch_run_record(plan.run_folder)
        pending = _forget(plan, stack) if options.fresh else claim_phases(plan, stack)
        trained: frozenset[str] = frozenset()
        if pending:
            trained = train_teachers(plan, options, session, stack)
            with _display(options.display, plan) as display:
                _run(WorkerSpec(plan, pending, import_folders(job_folder)), options.command, "run", session, display)
        else:
            _deliver_late(WorkerSpec(plan, (), import_folders(job_folder)), options.command)
        _deliver_teachers(plan, options.command)
        registered = _register(plan)
        result = _result(plan, pending, time.perf_counter() - started, trained)
        return replace(result, registered=registered)


def train_teachers(plan: Plan, options: TrainOptions, session: RaySession, stack: ExitStack) -> frozenset[str]:
    """Trains those teachers of `plan` that are jobs and have not been trained, each as a run of its own, with its own
    teachers before it. Until `stack` is closed none of them is removed. Returns the fingerprints of those trained."""
    trained = set()
    for teacher in teachers_of(plan):
        is_new = _train_teacher(teacher, options, session)
        keep_teacher(teacher, stack)
        # Before it was kept, another command's --fresh may have removed it.
        if _train_teacher(teacher, options, session) or is_new:
            trained.add(teacher.fingerprint)
    return frozenset(trained)


def _train_teacher(teacher: Teacher, options: TrainOptions, session: RaySession) -> bool:
    """Whether there was something left to train, once no other command trains it."""
    if is_trained(teacher):
        return False
    assert teacher.plan is not None, "any other teacher is trained"
    title = f"teacher {teacher.name}: "
    with ExitStack() as stack:
        with _display(options.display, teacher.plan, title) as display:
            pending = claim_teacher(teacher, stack, display.stage)
        if pending:
            train_teachers(teacher.plan, options, session, stack)
            with _display(options.display, teacher.plan, title) as display:
                spec = WorkerSpec(teacher.plan, pending, teacher.import_folders)
                _run(spec, options.command, "teacher", session, display)
    return bool(pending)


def _forget(plan: Plan, stack: ExitStack) -> tuple[PhasePlan, ...]:
    """`--fresh`: all phases are computed again, in a new MLflow run."""
    settle(plan.run_folder)  # else its old run would stay open for ever
    phases = forget_phases(plan, stack)
    for name in (RUN, SYSTEM):
        (plan.run_folder / name).unlink(missing_ok=True)
    return phases


def _result(
    plan: Plan, computed: Sequence[PhasePlan], seconds: float, trained: frozenset[str] = frozenset()
) -> TrainResult:
    """`computed` are the phases that this command ran, `trained` the fingerprints of the teachers that it trained."""
    missing = next((phase.name for phase in plan.phases if not is_complete(plan, phase)), None)
    if missing is not None:
        raise RunError(f"the run ended without completing {missing}; see {plan.run_folder / 'logs'}")
    manifests = [read_json(plan.phase_folder(phase) / PHASE_MANIFEST) for phase in plan.phases]
    phases = [
        PhaseResult(
            phase.name,
            phase.fingerprint,
            phase.steps,
            phase not in computed,
            manifest["seconds"],
            manifest["metrics"],
        )
        for phase, manifest in zip(plan.phases, manifests, strict=True)
    ]
    run = read_json(plan.run_folder / RUN) or {}
    return TrainResult(
        run_id=run.get("run_id", ""),
        experiment=plan.job.tracking.experiment,
        status="finished" if computed else "reused",
        seconds=seconds,
        checkpoint=str(plan.phase_folder(plan.phases[-1]) / manifests[-1]["checkpoint"]),
        metrics=manifests[-1]["metrics"],
        phases=phases,
        teachers=teacher_results(plan, trained),
        teacher_metrics=(read_json(plan.distill.evaluation) or {}) if plan.distill is not None else {},
    )


def _run(spec: WorkerSpec, command: str, kind: str, session: RaySession, display: Display) -> None:
    """Everything between the plan and the manifest of the last phase that is to be run. `kind` is that of the run in
    MLflow."""
    plan, pending = spec.plan, spec.phases
    prepare_folders(spec)
    for note in plan.notes:
        display.note(note)
    for phase in plan.phases:
        if is_complete(plan, phase):
            display.stage(f"reusing {phase.name}, steps {phase.first_step + 1} to {phase.last_step}")
    if session.is_embedded:
        # The workers would, too; but what is missing is better said before they start.
        fetch_files(plan.job.data.kind)
    if not session.is_started:
        display.stage("starting Ray")
    _begin_imports()
    with access_checked(tracking_uri(plan.job), plan.job):
        session.start(plan.run_folder / "logs")
    ingest(plan.job.data, plan.data, plan.job.storage_folder, display.stage)
    _cache_teacher(spec, display)
    tracking = _Tracking(plan, command, kind)
    display.stage(f"starting {plan.mesh.world_size} worker{'s' if plan.mesh.world_size > 1 else ''}")
    flag = Flag(plan.run_folder / STOP, plan.cluster.nodes)

    def ask() -> None:
        flag.set()
        display.note("stopping at the next report, with the state saved; once more to stop at once")

    status: RunStatus = "FAILED"
    try:
        with stop_on_signal(ask) as stop:
            _fit(spec, display, tracking, embedded=session.is_embedded)
        if stop.is_set() and not all(is_complete(plan, phase) for phase in pending):
            status = "KILLED"
            raise RunInterrupted("stopped; the state is saved, the same command goes on from it")
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        for phase in pending:
            fetch_phase(plan.phase_folder(phase))  # which workers on other nodes may have completed
            complete_history(plan, phase)
        tracking.settle(status, display)


def _cache_teacher(spec: WorkerSpec, display: Display) -> None:
    """Asks the teacher about the data set, once for all, where the plan says so."""
    if spec.plan.distill is not None and spec.plan.distill.cache is not None:
        # Only now: it imports Ray Data.
        from temper.launch.teacher_cache import make_cache

        make_cache(spec.plan, spec.import_folders, display.stage)


@contextmanager
def access_checked(uri: str, job: JobConfig) -> Iterator[None]:
    """Beside what is done in the block: raises RunError at its end where MLflow refuses this user, whom all steps would
    be computed for in vain. A server that hangs is not waited for long."""
    refusals: list[RunError] = []
    asked = threading.Event()

    def check() -> None:
        try:
            build_client(uri)  # imports MLflow, which ends
            asked.set()
            check_access(uri, job.tracking.experiment)
        except RunError as error:
            refusals.append(error)
        finally:
            asked.set()

    if not uri.startswith(("http://", "https://")):
        yield
        return
    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    yield
    asked.wait()
    thread.join(_ANSWER_S)
    if refusals:
        raise refusals[0]


def _begin_imports() -> None:
    """Imports Ray Train beside what this thread does; it takes seconds, and a second call none."""

    def import_trainer() -> None:
        import temper.launch.trainer  # noqa: F401

    threading.Thread(target=import_trainer, daemon=True).start()


def prepare_folders(spec: WorkerSpec) -> None:
    """The run's folder, and the folders of the phases that are to be run, which are marked as this run's."""
    plan, folder = spec.plan, spec.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    Flag(folder / STOP, plan.cluster.nodes).clear()
    for name in (STAGES, FAILURES):
        (folder / name).unlink(missing_ok=True)
    for place in (folder, *map(spec.phase_folder, spec.phases)):
        place.mkdir(parents=True, exist_ok=True)
        (place / JOB).write_text(job_to_yaml(plan.job))
        write_json(place / PLAN, {**plan.to_dict(), "import_folders": spec.import_folders})
        publish([place / JOB, place / PLAN])


class _Tracking:
    """The MLflow run, opened and followed beside the training.

    A new database takes seconds of a core, and no worker waits for it: the first step comes first, and what is
    reported before the run is open is in the histories.
    """

    def __init__(self, plan: Plan, command: str, kind: str) -> None:
        self._plan = plan
        self._run = tracked_run(plan, command, kind)
        self._executor = ThreadPoolExecutor(1, "tracking")
        self._opening: Future[None] | None = None
        self._growing: Future[None] | None = None
        self._tried_s = 0.0

    def follow(self) -> None:
        """Begins to open the run, again where the store failed or has lost it; gives phases that have begun or ended
        their own runs."""
        if self._opening is None:
            self._open()
            # Nobody waits for it, and what it has begun it may go on with the next time.
            threading.Thread(target=reconcile, args=(self._plan.job.storage_folder,), daemon=True).start()
        elif time.monotonic() - self._tried_s > _RETRY_S and self._is_wanting(self._opening):
            self._open()
        if self._run.has_grown() and (self._growing is None or self._growing.done()):
            self._growing = self._executor.submit(self._run.grow)

    def _is_wanting(self, opening: Future[None]) -> bool:
        return opening.done() and (opening.exception() is not None or is_lost(self._run.record))

    def _open(self) -> None:
        self._opening, self._tried_s = self._executor.submit(self._run.open), time.monotonic()

    def settle(self, status: RunStatus, display: Display) -> None:
        """Completes what MLflow knows, with the terminal status. A dead server must not hide the result."""
        self._executor.shutdown()
        try:
            if not self._run.run_id:
                self._run.open()
            self._run.note_status(status)
            if not _deliver(self._run, status):
                raise RunError("the store did not take the end of the run in time")
        except Exception as error:  # of the store, or of a full disk
            display.note(f"{_LACKS} ({first_line(error)}); the same command delivers it later")


def tracked_run(plan: Plan, command: str, kind: str = "run") -> TrackedRun:
    """The MLflow run of a command's own plan, or of a teacher's."""
    return TrackedRun(tracking_uri(plan.job), plan, command, tags={"temper.kind": kind})


@contextmanager
def _display(mode: DisplayMode, plan: Plan, title: str = "") -> Iterator[Display]:
    display = build_display(mode, plan, title)
    try:
        yield display
    finally:
        display.close()


def import_folders(job_folder: Path) -> tuple[str, ...]:
    """Where workers look for `kind: python` targets."""
    return (os.getcwd(), str(job_folder.absolute()))


@contextmanager
def stop_on_signal(ask: Callable[[], None]) -> Iterator[threading.Event]:
    """Turns the first SIGINT or SIGTERM into a request, for which `ask` is called; a second ends."""
    requested = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        ask()

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
    watch = Watch(spec, display)
    thread.start()
    has_begun, looked_s = False, 0.0
    while True:
        running = thread.is_alive()
        has_begun = watch.look(time.time() - STAGE_DELAY_S if running else math.inf) or has_begun
        if has_begun and time.monotonic() - looked_s > _FOLLOW_S:
            tracking.follow()
            looked_s = time.monotonic()
        if not running:
            break
        time.sleep(POLL_S)
    if outcome:
        raise RunError(_failure_text(spec.run_folder, outcome[0])) from outcome[0]


class Watch:
    """Shows what the workers do: the records of the phases that are run, and what rank 0 says between steps.

    A record comes by way of the controller, later than a text that was written after it. So texts wait a while, and
    what is there then is shown in the order in which it happened.
    """

    def __init__(self, spec: WorkerSpec, display: Display) -> None:
        self._display = display
        self._stages = spec.run_folder / STAGES
        self._num_stages = 0
        self._histories = [HistoryTail(spec.phase_folder(phase) / HISTORY) for phase in spec.phases]

    def look(self, until_s: float) -> bool:
        """Shows all new records, and the new texts from before `until_s` (Unix time) or before a record; whether there
        were records."""
        records = [record for history in self._histories for record in history.poll()]
        until_ms = max([1000 * until_s, *(record["time_ms"] for record in records)])
        stages = read_lines(self._stages)[self._num_stages :]
        due = list(takewhile(lambda stage: stage["time_ms"] <= until_ms, stages))
        self._num_stages += len(due)
        left = deque(records)
        for stage in due:
            self._show_records(left, stage["time_ms"])
            self._display.stage(stage["text"])
        self._show_records(left, math.inf)
        return bool(records)

    def _show_records(self, records: deque[Record], until_ms: float) -> None:
        shown = []
        while records and records[0]["time_ms"] <= until_ms:
            shown.append(records.popleft())
        self._display.records(shown)


def _build_trainer(spec: WorkerSpec, embedded: bool) -> Any:
    """What has a `fit()` that runs the phases; imported only now, and in its own thread, because that takes seconds."""
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


def _deliver(run: TrackedRun, status: RunStatus) -> bool:
    """Gives MLflow what it lacks of the run; false where it does not take all of it."""
    try:
        delivered = _replay(run)
    except RunGoneError:
        run.open()
        delivered = _replay(run)
    delivered = delivered and run.end(status)
    if delivered and status == "FINISHED":
        # Only now: it imports matplotlib and torch.
        from temper.tracking.report import log_report

        log_report(run.uri, run.run_id, run.plan.run_folder)
    return delivered


def _replay(run: TrackedRun) -> bool:
    return replay(run.uri, run.run_id, phase_histories(run.plan), run.plan.run_folder / SYSTEM)


def _deliver_late(spec: WorkerSpec, command: str, kind: str = "run") -> None:
    """Delivers a finished run that MLflow could not take when it ended, or that died between its end and that."""
    known = read_json(spec.run_folder / RUN) or {}
    if known.get("delivered") and known.get("status", "FINISHED") == "FINISHED":
        return
    prepare_folders(spec)
    run = tracked_run(spec.plan, command, kind)
    try:
        run.open()
        _deliver(run, "FINISHED")
    except Exception as error:  # of the store, or of a full disk
        log.warning("%s (%s); the same command delivers it later", _LACKS, first_line(error))


def _register(plan: Plan) -> dict[str, str]:
    """Makes the finished run a version of the model that the job names, unless it is one."""
    name, run_id = plan.job.tracking.register_as, (read_json(plan.run_folder / RUN) or {}).get("run_id")
    if name is None or run_id is None:
        return {}
    known = read_json(plan.run_folder / REGISTERED) or {}
    if (known.get("name"), known.get("run_id")) == (name, run_id):
        return dict(known["registered"])
    # Only now: it imports torch.
    from temper.launch.registering import register_run

    try:
        registered = asdict(register_run(plan.run_folder, name))
    except Exception as error:  # which one depends on the store, the disk and torch
        return {"uri": "", "alias": "", "note": f"the run could not be registered: {first_line(error)}"}
    write_json(plan.run_folder / REGISTERED, {"name": name, "run_id": run_id, "registered": registered})
    return registered


def _deliver_teachers(plan: Plan, command: str) -> None:
    """:func:`_deliver_late` for the runs of teachers that this storage has begun and that are complete."""
    for teacher in teachers_of(plan):
        own = teacher.plan
        if own is None or not (own.run_folder / RUN).exists() or not all(is_complete(own, each) for each in own.phases):
            continue
        if is_held(own.run_folder / TRACKING_LOCK):
            continue  # a sweep's process is at it
        try:
            with claimed(own.run_folder / LOCK, f"{own.job.name}, {own.fingerprint[:10]},"):
                _deliver_late(WorkerSpec(own, (), teacher.import_folders), command, "teacher")
        except RunError:
            # Another command is at it, or MLflow is away; the student's result is there all the same.
            continue
        _deliver_teachers(own, command)
