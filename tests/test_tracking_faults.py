"""Points on their way to a real `mlflow server` that fails in every way: each arrives once, in order, and nobody waits.

A proxy stands between the two. What the store has is read from the server's database.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from faulty_proxy import FAULTS, Fault, FaultyProxy
from temper.files import write_json
from temper.tracking import delivery, ui
from temper.tracking.delivery import Queue, RunTracker, is_lost, opened_run, replay
from temper.tracking.history import Histories, PhaseHistory, Record, read_history
from temper.tracking.mlflow_store import PROGRESS_METRIC, RunGoneError, RunMetrics, build_client

pytestmark = pytest.mark.services

BOUND_S = 60.0
_UNBOUNDED = 1.7976931348623157e308  # what the store has for infinity


def record(step: int) -> Record:
    """With sixty metrics; among them are one that is not a number, one that is not finite, and one that is long."""
    values = {f"eval/metric_{index}": step + index / 7 for index in range(57)}
    metrics = {PROGRESS_METRIC: 1.0 / step, "train/nan": math.nan, "train/inf": math.inf, **values}
    return {"step": step, "time_ms": 1_700_000_000_000 + step, "metrics": metrics}


def records(first: int, last: int) -> list[Record]:
    return [record(step) for step in range(first, last + 1)]


# -------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Server:
    """A server that runs, and its database."""

    port: int
    database: Path

    def rows(self, run_id: str, key: str) -> list[tuple[int, int, float]]:
        """The points of a metric in the order in which they were stored: step, time, value."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(
                "select step, timestamp, value from metrics where run_uuid = ? and key = ? order by rowid",
                (run_id, key),
            ).fetchall()

    def count(self, run_id: str) -> int:
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            (count,) = connection.execute("select count(*) from metrics where run_uuid = ?", (run_id,)).fetchone()
        return int(count)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two: the second is what the first is like when it has come back without its database."""
    with contextlib.ExitStack() as stack:
        started = []
        for name in ("first", "second"):
            database, port = tmp_path_factory.mktemp(name) / "mlflow.db", ui.free_port("127.0.0.1", 0)
            build_client(f"sqlite:///{database}")
            process = stack.enter_context(ui._server(f"sqlite:///{database}", "127.0.0.1", port))
            started.append((process, Server(port, database)))
        for process, server in started:
            ui._wait_until_healthy(f"http://127.0.0.1:{server.port}", process, threading.Event())
        yield started[0][1], started[1][1]


@pytest.fixture
def proxy(servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    settings = {"TIMEOUT": "10", "MAX_RETRIES": "1", "BACKOFF_FACTOR": "0", "BACKOFF_JITTER": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    monkeypatch.setattr(delivery, "_GATHER_S", 0.001)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(delivery, "_CLOSING_PAUSE_S", 0.01)
    proxy = FaultyProxy(servers[0].port)
    yield proxy
    proxy.gate.set()
    proxy.stop()


# ---------------------------------------------------------------------------------------------------------- the run


class Run:
    """A run through the proxy: its history, its tracker, and the driver's record."""

    def __init__(self, proxy: FaultyProxy, folder: Path) -> None:
        self.proxy, self.record = proxy, folder / "run.json"
        self.phases = (PhaseHistory("dense", folder / "history.jsonl", 1_000_000),)
        self.histories = Histories(self.phases)
        queue = Queue(self.phases, RunMetrics, self.histories.unwritten)
        self.open()
        self.tracker = RunTracker(self.record, [queue])
        self.tracker.start()

    def open(self) -> None:
        """What the driver does before the training, and where the store lost the run."""
        run_id = build_client(self.proxy.address).create_run("0").info.run_id
        write_json(self.record, {"uri": self.proxy.address, "run_id": run_id, "open": True})

    @property
    def id(self) -> str:
        run = opened_run(self.record)
        assert run is not None
        return run[1]

    def report(self, first: int, last: int) -> None:
        self.histories.append("dense", records(first, last))
        self.tracker.wake()

    def check(self, server: Server) -> None:
        """Every point of the history is in the store once, in order, and no other."""
        history = read_history(self.phases[0].path)
        assert history[-1]["step"] == len(history)
        for name in (PROGRESS_METRIC, "eval/metric_0", "eval/metric_56"):
            expected = [(item["step"], item["time_ms"], item["metrics"][name]) for item in history]
            assert server.rows(self.id, name) == expected
        assert [value for *_, value in server.rows(self.id, "train/nan")] == [0.0] * len(history)
        assert [value for *_, value in server.rows(self.id, "train/inf")] == [_UNBOUNDED] * len(history)
        assert server.count(self.id) == sum(len(item["metrics"]) for item in history)


def await_true(condition: Callable[[], bool]) -> None:
    """Waits for another thread; there is nothing to be told by."""
    for _ in range(int(BOUND_S / 0.005)):
        if condition():
            return
        threading.Event().wait(0.005)
    pytest.fail("what was waited for did not happen")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_point_arrives_once_and_in_order(
    proxy: FaultyProxy, servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """The fault hits each of the first requests of a run, then each second one."""
    run = Run(proxy, tmp_path)
    if fault in ("hang", "late"):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.fail([fault] * 3)
    run.report(1, 20)
    await_true(lambda: not proxy.faults)
    proxy.fail([fault, "none"] * 2)
    run.report(21, 50)
    run.report(51, 60)
    assert run.tracker.close(BOUND_S)
    run.check(servers[0])


def test_all_faults_in_turn(
    proxy: FaultyProxy, servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(proxy, tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    for index, fault in enumerate(FAULTS):
        proxy.fail([fault])
        run.report(5 * index + 1, 5 * index + 5)
    assert run.tracker.close(BOUND_S)
    run.check(servers[0])


def test_a_server_that_is_away_is_said_once_and_given_everything_later(
    proxy: FaultyProxy, servers: tuple[Server, Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run = Run(proxy, tmp_path)
    run.report(1, 5)
    await_true(lambda: servers[0].count(run.id) == 300)
    proxy.stop()
    run.report(6, 45)
    await_true(lambda: "takes no metrics" in caplog.text)
    run.report(46, 60)
    proxy.start()
    assert run.tracker.close(BOUND_S)
    run.check(servers[0])
    assert caplog.text.count("takes no metrics") == caplog.text.count("took everything again") == 1


def test_a_report_does_not_wait_for_a_server_that_hangs(
    proxy: FaultyProxy, servers: tuple[Server, Server], tmp_path: Path
) -> None:
    run = Run(proxy, tmp_path)
    answers = proxy.answers
    proxy.gate.clear()
    run.report(1, 1)
    await_true(lambda: proxy.requests > answers)
    for step in range(2, 61):
        run.report(step, step)
    assert proxy.answers == answers
    assert len(read_history(run.phases[0].path)) == 60
    assert not run.tracker.close(0.01)
    proxy.gate.set()
    assert replay(proxy.address, run.id, run.phases)
    run.check(servers[0])


def test_a_server_that_came_back_empty_is_given_everything_in_a_new_run(
    proxy: FaultyProxy, servers: tuple[Server, Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run = Run(proxy, tmp_path)
    first = run.id
    run.report(1, 30)
    await_true(lambda: servers[0].count(first) == 1800)
    proxy.upstream = servers[1].port
    run.report(31, 40)
    await_true(lambda: is_lost(run.record))
    run.report(41, 50)
    with pytest.raises(RunGoneError, match="is not in this store"):
        replay(proxy.address, first, run.phases)
    run.open()
    assert run.id != first
    run.report(51, 60)
    assert run.tracker.close(BOUND_S)
    run.check(servers[1])
    assert servers[0].count(first) == 1800
    assert caplog.text.count("does not have run") == 1


def test_a_run_that_was_deleted_is_gone_too(proxy: FaultyProxy, tmp_path: Path) -> None:
    run = Run(proxy, tmp_path)
    run.report(1, 5)
    assert run.tracker.close(BOUND_S)
    build_client(proxy.address).delete_run(run.id)
    run.histories.append("dense", records(6, 7))
    with pytest.raises(RunGoneError, match="was deleted"):
        replay(proxy.address, run.id, run.phases)


# --------------------------------------------------------------------------------------------------------- the disk

LIMITED = """
import resource, signal, sys
from pathlib import Path
from temper.tracking.history import Histories, PhaseHistory, read_history
from test_tracking_faults import records

path, limit = Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
histories = Histories([PhaseHistory("dense", path, 1_000_000)])
for step in range(1, 41):
    histories.append("dense", records(step, step))
on_disk = read_history(path)
assert 0 < len(on_disk) < 40
assert path.read_bytes().endswith(b"}\\n")
assert str(on_disk + histories.unwritten("dense")) == str(records(1, 40))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
histories.append("dense", records(41, 41))
assert histories.unwritten("dense") == []
"""


def test_a_file_that_the_system_lets_grow_no_further_is_caught_up(tmp_path: Path) -> None:
    """The system's own limit on the size of a file, which cuts a write short as a full disk does."""
    path = tmp_path / "history.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), "20001"],
        capture_output=True,
        cwd=Path(__file__).parent,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written") == 1
    assert "File too large" in done.stderr
    assert str(read_history(path)) == str(records(1, 41))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("to mount a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_once_and_loses_nothing(
    proxy: FaultyProxy, servers: tuple[Server, Server], small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(proxy, small_disk)
    (small_disk / "other").write_bytes(b"0" * 220_000)
    for step in range(1, 31):
        run.report(step, step)
    assert 0 < len(read_history(run.phases[0].path)) < 30
    await_true(lambda: servers[0].count(run.id) == 1800)
    assert caplog.text.count("No space left on device") == 1
    (small_disk / "other").unlink()
    run.report(31, 31)
    assert run.tracker.close(BOUND_S)
    run.check(servers[0])
