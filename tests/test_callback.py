"""The controller's side: reports into history and tracking, failures told apart, an orderly end."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray import cloudpickle
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train import RunConfig
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.exceptions import (
    BroadcastCollectiveTimeoutError,
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from temper.errors import CheckpointError, RunError
from temper.files import write_json
from temper.tracking import callback as callback_module
from temper.tracking.callback import TrackingCallback, TrackingEnd, TrackingTarget, build_callbacks
from temper.tracking.delivery import Queue, RunTracker
from temper.tracking.failures import describe_failure, failed_ranks, is_lost_peer
from temper.tracking.history import Histories, PhaseHistory, Record, read_history

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:32541. "
    "This may indicate a remote rank has failed."
)

LOST_PEERS: list[BaseException] = [
    RayActorError(),
    ActorDiedError(),
    WorkerCrashedError(),
    OutOfMemoryError("the node ran out of memory"),
    NodeDiedError("node is gone"),
    WorkerHealthCheckFailedError("poll failed", RayActorError()),
    WorkerHealthCheckTimeoutError("a worker hangs"),
    BroadcastCollectiveTimeoutError(1800.0, [1], 1800.0),
    RuntimeError(GLOO),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
    RuntimeError("[pair.cc:534] Read error [127.0.0.1]:5: Connection reset by peer"),
    RuntimeError("Rank 1 successfully reached monitoredBarrier, but received errors from rank 0"),
    DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2000, ncclRemoteError: a remote process exited"),
    DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)"),
    DistNetworkError("The client socket has failed to connect to any network address"),
    DistStoreError("wait timeout after 300000ms, keys: /0"),
    ConnectionResetError(104, "Connection reset by peer"),
    BrokenPipeError(32, "Broken pipe"),
    UserExceptionWithTraceback(RuntimeError(GLOO), "Traceback …"),
    RayTaskError("poll", "Traceback …", RuntimeError(GLOO)),
]

OWN_ERRORS: list[BaseException] = [
    ValueError("could not broadcast input array from shape (3,) into shape (2,)"),
    ZeroDivisionError("division by zero"),
    KeyError("timeout"),
    FileNotFoundError(2, "No such file or directory", "data/timed_out.csv"),
    MemoryError(),
    CheckpointError("checkpoints/step-5/rank-0.pt: SHA-256 differs"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (32x64 and 128x10)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    DistBackendError("NCCL error in: NCCLUtils.cpp:94, ncclInvalidUsage, Duplicate GPU detected"),
    UserExceptionWithTraceback(ValueError("connection closed by peer"), "Traceback …"),
    RayTaskError("f", "Traceback …", ValueError("x")),
]


def name_of(error: BaseException) -> str:
    return f"{type(error).__name__}-{str(error)[:20]}"


# ------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("error", LOST_PEERS, ids=name_of)
def test_a_lost_peer_is_no_failure_of_the_code(error: BaseException) -> None:
    assert is_lost_peer(error)
    assert failed_ranks({0: error}) == {}


@pytest.mark.parametrize("error", OWN_ERRORS, ids=name_of)
def test_an_error_of_the_code_would_come_again(error: BaseException) -> None:
    assert not is_lost_peer(error)
    assert failed_ranks({0: RuntimeError(GLOO), 1: error}) == {1: error}


@pytest.mark.parametrize("error", OWN_ERRORS, ids=name_of)
def test_next_to_a_dead_worker_no_error_counts(error: BaseException) -> None:
    assert failed_ranks({0: error, 1: WorkerHealthCheckFailedError("poll failed", ActorDiedError())}) == {}


def test_notes_from_the_worker_reach_the_description() -> None:
    error = ValueError("bad shape")
    error.add_note('  File "nets.py", line 3, in forward')
    travelled = pickle.loads(pickle.dumps(error))
    described = describe_failure(1, travelled, time_ms=5)
    assert described["traceback"] == 'ValueError: bad shape\n  File "nets.py", line 3, in forward\n'
    assert (described["rank"], described["kind"], described["time_ms"]) == (1, "error", 5)
    assert (described["type"], described["message"]) == ("builtins.ValueError", "bad shape")
    assert (
        describe_failure(0, UserExceptionWithTraceback(error, "Traceback: here"), 5)["traceback"] == "Traceback: here"
    )


# ------------------------------------------------------------------------------------------------------- callback


class FakeTracker:
    """Delivers nothing."""

    made: ClassVar[list[FakeTracker]] = []

    def __init__(self, record: Path, queues: Sequence[Queue]) -> None:
        self.record, self.queues = record, queues
        self.started = False
        self.wakes = 0
        self.closed: list[float] = []
        FakeTracker.made.append(self)

    def start(self) -> None:
        self.started = True

    def wake(self) -> None:
        self.wakes += 1

    def close(self, timeout_s: float) -> bool:
        self.closed.append(timeout_s)
        return True


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackingTarget:
    monkeypatch.setattr(callback_module, "RunTracker", FakeTracker)
    FakeTracker.made = []
    return TrackingTarget(
        run_record=str(tmp_path / "run.json"),
        histories=tuple(
            PhaseHistory(name, tmp_path / "phases" / name / "history.jsonl", last_step)
            for name, last_step in (("dense", 4), ("sparse-1", 6))
        ),
        failures_path=str(tmp_path / "run" / "failures.jsonl"),
        system_path=str(tmp_path / "system.jsonl"),
    )


def record(step: int) -> Record:
    return {"step": step, "time_ms": step, "metrics": {"train/loss": 1.0}}


def report(*records: Record, phase: str = "dense") -> dict[str, Any]:
    return {"phase": phase, "records": list(records)}


def stored(target: TrackingTarget, phase: int = 0) -> list[Record]:
    return read_history(target.histories[phase].path)


def failures(target: TrackingTarget) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(target.failures_path).read_text().splitlines()]


def test_records_of_rank_0_reach_the_history(target: TrackingTarget) -> None:
    tracking = TrackingCallback(target)
    tracking.after_report(None, [report(record(1), record(2)), report(record(9))], None)
    tracking.after_report(None, [report(), report()], None)
    tracking.after_report(None, [report(record(2), record(3)), report()], None)
    assert stored(target) == [record(1), record(2), record(3)]
    (tracker,) = FakeTracker.made
    assert (str(tracker.record), tracker.started, tracker.wakes) == (target.run_record, True, 3)
    assert tracker.queues[0].phases == target.histories


def test_records_go_to_the_history_of_the_phase_that_the_report_names(target: TrackingTarget) -> None:
    tracking = TrackingCallback(target)
    tracking.after_report(None, [report(record(1), record(2)), report()], None)
    tracking.after_report(None, [report(record(3), record(4)), report()], None)
    assert not target.histories[1].path.exists()
    tracking.after_report(None, [report(phase="sparse-1"), report(phase="sparse-1")], None)
    tracking.after_report(None, [report(record(5), phase="sparse-1"), report(phase="sparse-1")], None)
    # The workers were started anew and are told again what the first phase ended with.
    again = TrackingCallback(target)
    again.after_report(None, [report(record(3), record(4)), report()], None)
    again.after_report(None, [report(record(5), record(6), phase="sparse-1"), report(phase="sparse-1")], None)
    assert stored(target) == [record(1), record(2), record(3), record(4)]
    assert stored(target, 1) == [record(5), record(6)]


def test_a_phase_that_is_reused_is_not_written(target: TrackingTarget) -> None:
    Histories(target.histories).append("dense", [record(1), record(4)])
    before = target.histories[0].path.stat()
    TrackingCallback(target).after_report(None, [report(record(5), phase="sparse-1")], None)
    assert target.histories[0].path.stat() == before
    assert stored(target, 1) == [record(5)]


def test_a_fault_in_tracking_does_not_reach_the_training(
    target: TrackingTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no tracker today")

    monkeypatch.setattr(callback_module, "RunTracker", fail)
    tracking = TrackingCallback(target)
    tracking.after_report(None, [report(record(1))], None)
    assert "no tracker today" in caplog.text
    assert stored(target) == [record(1)]
    assert not tracking.close(1.0)


def test_an_error_of_the_code_ends_the_run(target: TrackingTarget) -> None:
    errors: Mapping[int, BaseException] = {
        0: RuntimeError(GLOO),
        1: ValueError("bad shape"),
        3: ValueError("bad shape"),
    }
    with pytest.raises(RunError, match=r"rank 1 \(and 1 more\): ValueError: bad shape; details in .*failures.jsonl"):
        TrackingCallback(target).after_exception(None, errors)
    assert [(failure["rank"], failure["kind"]) for failure in failures(target)] == [
        (0, "lost peer"), (1, "error"), (3, "error"),
    ]  # fmt: skip


def test_a_lost_worker_is_written_down_once_and_the_run_goes_on(target: TrackingTarget) -> None:
    tracking = TrackingCallback(target)
    lost = {0: RuntimeError(GLOO), 1: WorkerHealthCheckFailedError("poll failed", ActorDiedError())}
    tracking.after_exception(None, lost)
    tracking.after_exception(None, lost)
    assert [(failure["rank"], failure["type"].rpartition(".")[2]) for failure in failures(target)] == [
        (0, "RuntimeError"), (1, "WorkerHealthCheckFailedError"),
    ]  # fmt: skip


def test_callbacks_travel_to_the_controller_together(target: TrackingTarget) -> None:
    callbacks = RunConfig(callbacks=build_callbacks(target)).callbacks
    assert callbacks is not None
    # As Ray Train hands them to the controller: user callbacks in a handler, the others beside it, in one argument.
    handler, end = cloudpickle.loads(cloudpickle.dumps([UserCallbackHandler(callbacks[:1], None), callbacks[1]]))
    assert isinstance(end, TrackingEnd)
    assert end._tracking is handler._user_callbacks[0]

    handler._user_callbacks[0].after_report(None, [report(record(1))], None)
    tracker = end._tracking._tracking._tracker
    asyncio.run(end.before_controller_shutdown())
    end.before_controller_abort()
    assert tracker.closed == [15.0, 5.0]


def test_samples_of_every_node_reach_their_spool(target: TrackingTarget) -> None:
    def sample(node: str, time_ms: int) -> dict[str, Any]:
        return {"node": node, "source": node, "time_ms": time_ms, "metrics": {"cpu_utilization_percentage": 50.0}}

    tracking = TrackingCallback(target)
    tracking.after_report(None, [{**report(record(1)), "system": [sample("a", 7)]}, report()], None)
    ranks = [{**report(record(2)), "system": [sample("a", 12)]}, report(), {**report(), "system": [sample("b", 13)]}]
    tracking.after_report(None, ranks, None)
    tracking.after_report(None, [{**report(record(3)), "system": []}, report()], None)
    name = "cpu_utilization_percentage"
    assert read_history(target.system_path) == [
        {"step": 1, "time_ms": 7, "metrics": {f"system/a/{name}": 50.0}},
        {"step": 2, "time_ms": 13, "metrics": {f"system/a/{name}": 50.0, f"system/b/{name}": 50.0}},
    ]
    assert [phase.path for phase in FakeTracker.made[0].queues[1].phases] == [Path(target.system_path)]
    assert stored(target) == [record(1), record(2), record(3)]


def test_who_reports_never_speaks_with_the_store(target: TrackingTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread does, and a store that hangs keeps only that one."""
    answering, asked, sent = threading.Event(), threading.Event(), []
    speakers: set[threading.Thread] = set()

    def speak() -> None:
        speakers.add(threading.current_thread())
        asked.set()
        assert answering.wait(60.0)

    class Sink:
        def last_step(self) -> int:
            speak()
            return 0

        def send(self, records: Sequence[Record]) -> None:
            speak()
            sent.extend(records)

    def open_sink(uri: str, run_id: str) -> Sink:
        speak()
        return Sink()

    def queue(histories: Histories) -> Queue:
        return Queue(histories.phases, open_sink, histories.unwritten)

    monkeypatch.setattr(callback_module, "RunTracker", RunTracker)
    monkeypatch.setattr(callback_module, "record_queue", queue)
    monkeypatch.setattr(callback_module, "system_queue", lambda spool: Queue(target.histories, open_sink))
    write_json(Path(target.run_record), {"uri": "", "run_id": "run", "open": True})
    tracking = TrackingCallback(target)
    tracking.after_report(None, [report(record(1))], None)
    assert asked.wait(60.0)
    tracking.after_report(None, [report(record(2), record(3), record(4))], None)
    assert [item["step"] for item in stored(target)] == [1, 2, 3, 4]
    assert not tracking.close(0.01)
    assert sent == []
    answering.set()
    assert speakers and threading.current_thread() not in speakers


def test_the_end_of_a_run_without_a_report_is_quiet(target: TrackingTarget) -> None:
    asyncio.run(TrackingEnd(TrackingCallback(target)).before_controller_shutdown())
    assert FakeTracker.made == []
