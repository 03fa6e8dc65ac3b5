"""The history file, its delivery, and MLflow: nothing lost, nothing doubled, no secret logged."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.config.schema import JobConfig
from temper.errors import RunError
from temper.files import write_json
from temper.tracking import delivery, history, mlflow_store, ui
from temper.tracking.delivery import Delivery, OpenSink, Queue, RunTracker, is_lost, replay, take_batch
from temper.tracking.history import (
    Histories,
    History,
    HistoryExtract,
    HistoryTail,
    PhaseHistory,
    Record,
    last_step,
    read_history,
)
from temper.tracking.mlflow_store import (
    PROGRESS_METRIC,
    RefusedError,
    RunGoneError,
    RunMetrics,
    build_client,
    open_run,
    tracking_uri,
)
from temper.tracking.redact import is_secret, redact_text, redact_values


def record(step: int, **metrics: float) -> Record:
    return {"step": step, "time_ms": 1_700_000_000_000 + step, "metrics": {"train/loss": 1.0 / step, **metrics}}


def records(first: int, last: int) -> list[Record]:
    return [record(step) for step in range(first, last + 1)]


def steps(found: Sequence[Record]) -> list[int]:
    return [one["step"] for one in found]


def dense(path: Path) -> list[PhaseHistory]:
    """The history of a job of one long phase."""
    return [PhaseHistory("dense", path, 1_000_000)]


# ------------------------------------------------------------------------------------------------------- history


def test_history_returns_what_was_appended_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "phases" / "abc" / "history.jsonl"
    odd = record(3, **{"eval/accuracy": 0.1 + 0.2, "precision/loss_scale": 65536.0, "grad": math.inf})
    stored = History(path)

    assert stored.append(records(1, 2)) == records(1, 2)
    assert stored.append([odd]) == [odd]

    assert read_history(path) == [*records(1, 2), odd]
    assert read_history(path, after_step=2) == [odd]


def test_history_keeps_nan(tmp_path: Path) -> None:
    History(tmp_path / "h").append([record(1, **{"train/loss": math.nan})])
    assert math.isnan(read_history(tmp_path / "h")[0]["metrics"]["train/loss"])


def test_history_drops_steps_that_come_again(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).append(records(1, 7))

    reopened = History(path)
    assert reopened.last_step == 7
    assert steps(reopened.append(records(5, 9))) == [8, 9]
    assert steps(reopened.append(records(9, 9))) == []
    assert steps(read_history(path)) == list(range(1, 10))


@pytest.mark.parametrize("kept", range(1, len(json.dumps(record(3), separators=(",", ":")))))
def test_history_removes_a_half_written_last_line(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "history.jsonl"
    History(path).append(records(1, 3))
    content = path.read_bytes()
    begin = content.rindex(b"\n", 0, -1) + 1
    path.write_bytes(content[: begin + kept])

    assert steps(read_history(path)) == [1, 2]
    assert steps(History(path).append(records(3, 4))) == [3, 4]
    assert read_history(path) == records(1, 4)


def test_history_keeps_a_whole_record_that_lacks_only_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).append(records(1, 3))
    path.write_bytes(path.read_bytes()[:-1])

    reopened = History(path)
    assert reopened.last_step == 3
    reopened.append(records(4, 4))
    assert read_history(path) == records(1, 4)


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"{}\n", b"null\n[1]\n", b'{"step":9', b"\n\n"])
def test_history_removes_what_a_power_cut_left_behind(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "history.jsonl"
    History(path).append(records(1, 2))
    path.write_bytes(path.read_bytes() + tail)

    History(path).append(records(3, 3))
    assert read_history(path) == records(1, 3)


def test_history_of_nothing_but_damage_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1, "ti')
    stored = History(path)
    assert stored.last_step == 0
    stored.append(records(1, 1))
    assert read_history(path) == records(1, 1)


def test_full_disk_neither_raises_nor_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.jsonl"
    stored = History(path)
    stored.append(records(1, 2))
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("os.fsync", fail)
        assert steps(stored.append(records(3, 4))) == [3, 4]
        assert steps(stored.append(records(5, 5))) == [5]
        assert path.read_bytes() == before
        assert steps(stored.unwritten()) == [3, 4, 5]
    assert [entry.levelname for entry in caplog.records] == ["ERROR"]
    assert "No space left on device" in caplog.text

    stored.append(records(6, 6))
    assert stored.unwritten() == []
    assert read_history(path) == records(1, 6)


def test_last_step_of_a_file_is_that_of_its_last_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert last_step(path) == 0
    path.write_bytes(b"")
    assert last_step(path) == 0
    History(path).append(records(1, 3))
    assert last_step(path) == 3
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert last_step(path) == 2
    assert path.read_bytes() == content[:-5]


def test_history_in_a_folder_that_cannot_be_made_only_complains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    stored = History(tmp_path / "file" / "history.jsonl")
    assert steps(stored.append(records(1, 2))) == [1, 2]
    assert "cannot be written" in caplog.text


def test_tail_returns_each_complete_record_once(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    tail = HistoryTail(path)
    assert tail.poll() == []
    stored = History(path)
    stored.append(records(1, 5))
    assert steps(tail.poll(limit=2)) == [1, 2]
    assert steps(tail.poll()) == [3, 4, 5]
    assert tail.poll() == []

    line = json.dumps(record(6)).encode() + b"\n"
    with path.open("ab") as file:
        file.write(line[:10])
        file.flush()
        assert tail.poll() == []
        file.write(line[10:])
    assert tail.poll() == [record(6)]


def test_tail_skips_damage_and_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    lines = [json.dumps(one).encode() for one in records(1, 4)]
    path.write_bytes(b"\n".join([*lines[:2], b"garbage", *lines[2:], b""]))
    assert steps(HistoryTail(path, after_step=1).poll()) == [2, 3, 4]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=60), st.integers(0, 200), st.booleans())
def test_tail_begins_near_the_step_that_is_known(lines: list[tuple[int, int]], after: int, is_cut: bool) -> None:
    """Steps that rise by any number, records of any length, every tenth line damaged, the last perhaps cut short."""
    found, content = [], []
    for index, (rise, width) in enumerate(lines):
        item = record((found[-1]["step"] if found else 0) + rise, **{f"eval/{i}": 0.5 for i in range(width)})
        found.append(item)
        content.append(json.dumps(item).encode() + b"\n" + (b"garbage\n" if index % 10 == 9 else b""))
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "_SEARCHED_BYTES", 64)
        path = Path(name) / "h"
        path.write_bytes(b"".join(content) + (b'{"step": 1' if is_cut else b""))
        assert HistoryTail(path, after).poll() == [item for item in found if item["step"] > after]


@pytest.mark.parametrize(
    ("last", "every", "expected"),
    [
        (7, 3, [1, 2, 3, 4, 5, 6, 7]),
        (40, 10, [5, 10, 15, 20, 25, 30, 35, 40]),
        (41, 10, [7, 10, 20, 21, 30, 34, 40, 41]),
        (40, 2, [4, 10, 16, 22, 26, 32, 38, 40]),
    ],
)
def test_extract_has_the_evaluations_and_the_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, every: int, expected: list[int]
) -> None:
    monkeypatch.setattr(history, "_EXTRACT", 8)
    phase = PhaseHistory("dense", tmp_path / "h", last)
    extract = HistoryExtract(phase)
    assert extract.poll() == []
    all_of_it = [record(step, **({"eval/loss": 0.5} if step % every == 0 else {})) for step in range(1, last + 1)]
    written = History(phase.path)
    written.append(all_of_it[:-1])
    assert extract.poll() == []
    written.append(all_of_it[-1:])
    with phase.path.open("ab") as file:
        file.write(b"\0" * 4096)  # what a power cut left behind

    assert steps(extract.poll(limit=3)) == expected[:3]
    assert steps(extract.poll()) == expected[3:]
    assert extract.poll() == []
    assert HistoryExtract(phase, after_step=expected[3]).poll() == [all_of_it[step - 1] for step in expected[4:]]


# ------------------------------------------------------------------------------------------------------ delivery


class FakeServer:
    """A tracking server that keeps every point, and whose connection fails as told.

    `outcomes` are taken one a request: "down" fails before anything is stored, "lost answer" after it.
    """

    def __init__(self, outcomes: Sequence[str] = ()) -> None:
        self.outcomes = list(outcomes)
        self.stored: list[Record] = []
        self.refused_steps: set[int] = set()
        self.requests = 0
        self.reachable = threading.Event()
        self.reachable.set()

    def open(self, uri: str, run_id: str) -> FakeServer:
        return self

    def _request(self) -> str:
        self.requests += 1
        if not self.reachable.is_set():
            raise ConnectionError("server is down")
        outcome = self.outcomes.pop(0) if self.outcomes else "up"
        if outcome == "down":
            raise ConnectionError("server is down")
        return outcome

    def last_step(self) -> int:
        self._request()
        return max(steps(self.stored), default=0)

    def send(self, batch: Sequence[Record]) -> None:
        outcome = self._request()
        if self.refused_steps & set(steps(batch)):
            raise RefusedError("a bad name")
        self.stored += batch
        if outcome == "lost answer":
            raise TimeoutError("no answer")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_GATHER_S", 0.001)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 0.002)
    monkeypatch.setattr(delivery, "_CLOSING_PAUSE_S", 0.002)


class Tracked:
    """Histories, and a tracker that delivers them; `run` is what the driver has written down."""

    def __init__(self, phases: Sequence[PhaseHistory], open_sink: OpenSink, uri: str = "", run_id: str = "run") -> None:
        self.record = phases[0].path.parent / "run.json"
        self.record.parent.mkdir(exist_ok=True)
        write_json(self.record, {"uri": uri, "run_id": run_id, "open": True})
        self.histories = Histories(phases)
        self.tracker = RunTracker(self.record, [Queue(self.histories.phases, open_sink, self.histories.unwritten)])

    def add(self, phase: str, records: list[Record]) -> list[Record]:
        new = self.histories.append(phase, records)
        self.tracker.wake()
        return new

    def start(self) -> None:
        self.tracker.start()

    def close(self, timeout_s: float) -> bool:
        return self.tracker.close(timeout_s)


def track(server: FakeServer, path: Path) -> Tracked:
    return Tracked(dense(path), server.open)


@pytest.mark.parametrize(
    "outcomes",
    [
        [],
        ["down"] * 5,
        ["up", "down", "down"],
        ["up", "lost answer"],
        ["up", "lost answer", "down", "up", "lost answer", "down"],
        ["up", "up", "lost answer"] * 3,
        ["down"] * 1100,
    ],
)
def test_every_step_arrives_once_through_any_failure(tmp_path: Path, outcomes: list[str]) -> None:
    server = FakeServer(outcomes)
    tracker = track(server, tmp_path / "h")
    tracker.start()
    for step in range(1, 51):
        tracker.add("dense", [record(step)])
    assert tracker.close(30.0)
    assert server.stored == records(1, 50)


def test_tracker_sends_first_what_the_history_has_and_the_server_lacks(tmp_path: Path) -> None:
    History(tmp_path / "h").append(records(1, 20))
    server = FakeServer()
    server.stored = records(1, 12)
    tracker = track(server, tmp_path / "h")
    tracker.start()
    assert tracker.add("dense", records(16, 22)) == records(21, 22)
    assert tracker.close(30.0)
    assert server.stored == records(1, 22)


def test_outage_at_the_start_is_said_once_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    server = FakeServer()
    server.reachable.clear()
    tracker = track(server, tmp_path / "h")
    tracker.start()
    tracker.add("dense", records(1, 2500))
    while server.requests < 5:
        threading.Event().wait(0.001)
    assert server.stored == []
    server.reachable.set()
    assert tracker.close(30.0)
    assert server.stored == records(1, 2500)
    assert caplog.text.count("takes no metrics") == 1
    assert caplog.text.count("took everything again") == 1


def test_close_gives_up_in_time_and_replay_completes(tmp_path: Path) -> None:
    server = FakeServer()
    server.reachable.clear()
    tracker = track(server, tmp_path / "h")
    tracker.start()
    tracker.add("dense", records(1, 5))
    assert not tracker.close(0.05)
    assert server.stored == []
    assert not replay("http://server", "run", dense(tmp_path / "h"), timeout_s=0.01, open_sink=server.open)

    server.reachable.set()
    assert replay("http://server", "run", dense(tmp_path / "h"), open_sink=server.open)
    assert replay("http://server", "run", dense(tmp_path / "h"), open_sink=server.open)
    assert server.stored == records(1, 5)


def test_replay_knows_what_is_late_from_what_is_there(tmp_path: Path) -> None:
    """However short its time: it sends something, and what the server has needs none."""
    path, server = tmp_path / "h", FakeServer()
    History(path).append(records(1, 2500))
    calls = [replay("http://server", "run", dense(path), timeout_s=0.0, open_sink=server.open) for _ in range(4)]
    assert calls == [False, False, True, True]
    assert server.stored == records(1, 2500)


def test_replay_of_what_is_there_does_not_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, server, parse = tmp_path / "h", FakeServer(), history.parse_record
    wide = [record(step, **{f"train/{i}": 0.125 for i in range(20)}) for step in range(1, 5001)]
    History(path).append(wide)
    server.stored = wide[:4990]
    parsed: list[bytes] = []
    monkeypatch.setattr(history, "parse_record", lambda line: parsed.append(line) or parse(line))
    assert replay("http://server", "run", dense(path), timeout_s=0.0, open_sink=server.open)
    assert server.stored == wide
    assert sum(map(len, parsed)) < 2 * history._SEARCHED_BYTES < path.stat().st_size / 10


def test_replay_changes_nothing_in_the_history(tmp_path: Path) -> None:
    path = tmp_path / "h"
    History(path).append(records(1, 3))
    path.write_bytes(path.read_bytes() + b'{"step"')
    before = path.read_bytes()
    server = FakeServer()
    assert replay("http://server", "run", dense(path), open_sink=server.open)
    assert server.stored == records(1, 3)
    assert path.read_bytes() == before


def test_records_that_the_disk_does_not_take_are_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    tracker = track(server, tmp_path / "h")
    tracker.add("dense", records(1, 2))

    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(history, "_append_durably", fail)
        tracker.add("dense", records(3, 4))
        tracker.start()
        while len(server.stored) < 4:
            threading.Event().wait(0.001)
    tracker.add("dense", records(5, 5))
    assert tracker.close(30.0)
    assert server.stored == records(1, 5)
    assert read_history(tmp_path / "h") == records(1, 5)


def test_a_refused_record_does_not_hold_up_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    server.refused_steps = {3}
    tracker = track(server, tmp_path / "h")
    tracker.add("dense", records(1, 5))
    tracker.start()
    assert tracker.close(30.0)
    assert steps(server.stored) == [1, 2, 4, 5]
    assert "refused step 3 for good" in caplog.text


def test_records_wait_in_the_history_until_the_run_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, looks, look = FakeServer(), [], delivery.opened_run
    monkeypatch.setattr(delivery, "opened_run", lambda record: looks.append(record) or look(record))
    tracker = track(server, tmp_path / "h")
    write_json(tracker.record, {"uri": "", "run_id": "run", "open": False})
    tracker.start()
    tracker.add("dense", records(1, 3))
    while len(looks) < 3:
        threading.Event().wait(0.001)
    assert server.requests == 0
    write_json(tracker.record, {"uri": "", "run_id": "run", "open": True})
    while len(server.stored) < 3:
        threading.Event().wait(0.001)
    assert tracker.close(30.0)
    assert server.stored == records(1, 3)


def test_a_run_that_was_never_opened_is_not_waited_for(tmp_path: Path) -> None:
    tracker = track(FakeServer(), tmp_path / "h")
    tracker.record.unlink()
    tracker.start()
    tracker.add("dense", records(1, 3))
    assert not tracker.close(30.0)
    assert steps(read_history(tmp_path / "h")) == [1, 2, 3]


class Runs(dict[str, list[Record]]):
    """The records of runs, which may go."""

    def open(self, uri: str, run_id: str) -> SimpleNamespace:
        def stored() -> list[Record]:
            if run_id not in self:
                raise RunGoneError(run_id)
            return self[run_id]

        return SimpleNamespace(
            last_step=lambda: max(steps(stored()), default=0), send=lambda batch: stored().extend(batch)
        )


def test_a_store_that_lost_the_run_is_given_everything_in_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    runs = Runs(first=[])
    tracker = Tracked(dense(tmp_path / "h"), runs.open, run_id="first")
    tracker.start()
    tracker.add("dense", records(1, 20))
    while len(runs["first"]) < 20:
        threading.Event().wait(0.001)
    assert not is_lost(tracker.record)

    del runs["first"]
    tracker.add("dense", records(21, 25))
    while not is_lost(tracker.record):
        threading.Event().wait(0.001)
    tracker.add("dense", records(26, 30))
    with pytest.raises(RunGoneError):
        replay("", "first", dense(tmp_path / "h"), open_sink=runs.open)

    runs["next"] = []
    write_json(tracker.record, {"uri": "", "run_id": "next", "open": True})
    assert not is_lost(tracker.record)
    assert tracker.close(30.0)
    assert runs == {"next": records(1, 30)}
    assert caplog.text.count("MLflow does not have run first any more") == 1


# ------------------------------------------------------------------------------------- delivery of several phases

CHAIN = {"dense": 6, "sparse-1": 9, "redense-1": 14}
ALL = records(1, 14)


def chain(folder: Path) -> list[PhaseHistory]:
    return [PhaseHistory(name, folder / name / "history.jsonl", step) for name, step in CHAIN.items()]


def report_steps(add: Callable[[str, list[Record]], list[Record]], first: int, last: int) -> None:
    """The steps after `first` up to `last`, each reported to its own phase, none of a phase in one report with
    another's."""
    for name, end in CHAIN.items():
        if first < min(end, last):
            add(name, records(first + 1, min(end, last)))
            first = min(end, last)


def deliver_to(server: FakeServer, histories: Histories) -> Delivery:
    return Delivery(histories.phases, histories.unwritten, lambda: server)


@pytest.mark.parametrize("reused", range(4))
def test_stored_histories_of_reused_phases_come_first(tmp_path: Path, reused: int) -> None:
    server, computed = FakeServer(), [0, *CHAIN.values()][reused]
    report_steps(Histories(chain(tmp_path)).append, 0, computed)
    tracker = Tracked(chain(tmp_path), server.open)
    tracker.start()
    report_steps(tracker.add, computed, 14)
    assert tracker.close(30.0)
    assert server.stored == ALL
    assert [steps(read_history(phase.path)) for phase in chain(tmp_path)] == [
        list(range(1, 7)), list(range(7, 10)), list(range(10, 15)),
    ]  # fmt: skip


@pytest.mark.parametrize("delivered", range(15))
def test_replay_of_a_finished_chain_sends_what_the_store_lacks(tmp_path: Path, delivered: int) -> None:
    report_steps(Histories(chain(tmp_path)).append, 0, 14)
    server = FakeServer()
    server.stored = records(1, delivered)
    for _ in range(2):
        assert replay("http://server", "run", chain(tmp_path), open_sink=server.open)
        assert server.stored == ALL


def test_a_later_phase_does_not_overtake_one_that_is_still_computed(tmp_path: Path) -> None:
    """The first phase was removed from the store, those after it were not."""
    histories, server = Histories(chain(tmp_path)), FakeServer()
    report_steps(histories.append, 6, 9)
    delivery = deliver_to(server, histories)
    for step in range(6):
        delivery.deliver()
        assert server.stored == records(1, step)
        report_steps(histories.append, step, step + 1)
    delivery.deliver()
    assert server.stored == records(1, 9)


def test_a_run_that_was_stopped_in_a_phase_goes_on_there(tmp_path: Path) -> None:
    server = FakeServer()
    report_steps(Histories(chain(tmp_path)).append, 0, 7)
    assert replay("http://server", "run", chain(tmp_path), open_sink=server.open)
    assert server.stored == records(1, 7)
    report_steps(Histories(chain(tmp_path)).append, 7, 14)
    assert replay("http://server", "run", chain(tmp_path), open_sink=server.open)
    assert server.stored == ALL


@pytest.mark.parametrize("full_from", range(14))
@pytest.mark.parametrize("full_for", [1, 3, 5])
def test_a_disk_that_is_full_at_a_border_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_from: int, full_for: int
) -> None:
    """One report a step; the disk takes nothing while steps `full_from` + 1 … `full_from` + `full_for` are reported."""
    histories, server = Histories(chain(tmp_path)), FakeServer()
    delivery = deliver_to(server, histories)

    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    for step in range(14):
        with monkeypatch.context() as disk:
            if full_from <= step < full_from + full_for:
                disk.setattr(history, "_append_durably", fail)
            report_steps(histories.append, step, step + 1)
        delivery.deliver()
        assert server.stored == records(1, step + 1)
    report_steps(histories.append, 13, 14)
    assert [record for phase in chain(tmp_path) for record in read_history(phase.path)] == ALL


Event = Literal["report", "deliver", "down", "lost answer", "full disk", "crash"]
EVENTS: tuple[Event, ...] = get_args(Event)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(1, 5)), max_size=40))
def test_each_record_arrives_once_and_in_order_whatever_happens(events: list[tuple[Event, int]]) -> None:
    """Reports of up to five steps; outages; a full disk for one report; the death of all processes, after which the
    workers report again from up to five steps before what the histories hold."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        phases, server, written = chain(Path(name)), FakeServer(), history._append_durably
        histories, reported = Histories(phases), 0
        delivery = deliver_to(server, histories)
        full = False

        def append(path: Path, data: bytes) -> None:
            if full:
                raise OSError(28, "No space left on device")
            written(path, data)

        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr(history, "_append_durably", append)
        for event, number in events:
            full = event == "full disk"
            if event in ("report", "full disk"):
                report_steps(histories.append, reported, min(14, reported + number))
                reported = min(14, reported + number)
            elif event == "crash":
                # A gap in the steps is what the disk did not take.
                known = [record["step"] for phase in phases for record in read_history(phase.path)]
                sound = next((step for step in range(14) if step + 1 not in known), 14)
                reported = max(0, sound - number)
                histories = Histories(phases)
                delivery = deliver_to(server, histories)
            else:
                server.outcomes = [event] if event != "deliver" else []
                with contextlib.suppress(ConnectionError, TimeoutError):
                    delivery.deliver()
            assert server.stored == records(1, len(server.stored))
        full, server.outcomes = False, []
        report_steps(histories.append, reported, 14)
        histories.append("dense", [])
        assert replay("http://server", "run", phases, open_sink=server.open)
        assert server.stored == ALL
        assert [record for phase in phases for record in read_history(phase.path)] == ALL


def test_batches_hold_whole_records() -> None:
    wide = [record(step, **{f"sparsity/{i}": 0.0 for i in range(399)}) for step in range(1, 6)]
    assert steps(take_batch(wide)) == [1, 2]
    huge = record(1, **{f"sparsity/{i}": 0.0 for i in range(1500)})
    assert steps(take_batch([huge, record(2)])) == [1]
    assert take_batch([]) == []


# ------------------------------------------------------------------------------------------------------- redaction


def test_passwords_in_addresses_are_hidden() -> None:
    assert redact_text("postgresql://ann:s3cr3t@db:5432/x") == "postgresql://ann:***@db:5432/x"
    assert (
        redact_text("see https://u:p%40ss@host and sqlite:////a/b.db") == "see https://u:***@host and sqlite:////a/b.db"
    )
    assert redact_text("http://localhost:5000/a@b") == "http://localhost:5000/a@b"


@pytest.mark.parametrize("key", ["password", "db.password", "hf_token", "API_KEY", "api-key", "aws_secret_access_key",
                                 "aws_access_key_id", "client_secret", "authToken", "credentials"])  # fmt: skip
def test_keys_that_name_secrets(key: str) -> None:
    assert is_secret(key)
    assert redact_values({key: "hunter2"}) == {key: "***"}
    assert redact_text(f"{key}: hunter2\n") == f"{key}: ***\n"
    assert redact_text(f"temper train j.yaml data.args.{key}=hunter2 seed=1") == (
        f"temper train j.yaml data.args.{key}=*** seed=1"
    )
    assert redact_text(f'{{"{key}": "hunter 2"}}') == f'{{"{key}": ***}}'


@pytest.mark.parametrize("key", ["pad_token_id", "image_key", "label_key", "tokenizer", "num_tokens", "keys", "seed"])
def test_keys_that_only_look_like_secrets(key: str) -> None:
    assert redact_values({key: "value"}) == {key: "value"}
    assert redact_text(f"{key}: value") == f"{key}: value"


def test_redaction_reaches_into_lists_and_leaves_switches() -> None:
    values = {"a": [{"token": "x"}, "http://u:p@h"], "use_token": True, "password": None, "n": 3}
    assert redact_values(values) == {
        "a": [{"token": "***"}, "http://u:***@h"],
        "use_token": True,
        "password": None,
        "n": 3,
    }


# ---------------------------------------------------------------------------------------------------------- MLflow


def job(storage: Path, **overrides: Any) -> JobConfig:
    values: dict[str, Any] = {
        "name": "digits",
        "model": {"kind": "python", "target": "nets:build", "args": {"hf_token": "hunter2", "width": 2}},
        "data": {"kind": "digits", "global_batch": 64, "augment": [{"kind": "random_crop", "padding": 1}]},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "budget": {"steps": 100},
        "storage": str(storage),
        **overrides,
    }
    return JobConfig.model_validate(values)


def plan_of(config: JobConfig) -> Any:
    batch = SimpleNamespace(global_batch=64, rank_batch=32, micro_batch=16, accumulation=2)
    counts = {"train_examples": 1_500, "validation_examples": 0, "test_examples": 297}
    data = SimpleNamespace(folder="", shape=(1, 8, 8), num_classes=10, fingerprint="d" * 64, **counts)
    values = {"job": config.model_dump(mode="json"), "fingerprint": "f" * 64, "steps": 100}
    return SimpleNamespace(job=config, data=data, steps=100, batch=batch, fingerprint="f" * 64, to_dict=lambda: values)


JOB_YAML = "name: digits  # a comment\nmodel: {args: {hf_token: hunter2}}\n"
COMMAND = "temper train jobs/digits.yaml model.args.hf_token=hunter2"


def test_address_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(job(Path("runs"))) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(job(Path("runs"))) == "http://tracking:5000"
    assert tracking_uri(job(Path("runs"), tracking={"uri": "sqlite:///other.db"})) == f"sqlite:///{tmp_path}/other.db"
    assert tracking_uri(job(Path("runs"), tracking={"uri": "sqlite:////a/b.db"})) == "sqlite:////a/b.db"
    assert tracking_uri(job(Path("runs"), tracking={"uri": "mlruns"})) == f"file://{tmp_path}/mlruns"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A SQLite store in a folder with a space, one run in it; made once, because MLflow's migrations take seconds."""
    folder = tmp_path_factory.mktemp("the runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        work = tmp_path_factory.mktemp("work")
        patch.chdir(work)
        plan = plan_of(job(folder))
        uri = tracking_uri(plan.job)
        run_id = open_run(uri, plan, job_yaml=JOB_YAML, command=COMMAND)
        yield SimpleNamespace(folder=folder, work=work, plan=plan, uri=uri, run_id=run_id, client=build_client(uri))


def points(store: SimpleNamespace, run_id: str, key: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in store.client.get_metric_history(run_id, key)]


def test_run_carries_parameters_tags_and_artifacts(store: SimpleNamespace) -> None:
    run = store.client.get_run(store.run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "digits"
    assert run.data.params["optimizer.lr"] == "0.1"
    assert run.data.params["parallel.offload"] == "none"
    assert run.data.params["optimizer.clip_norm"] == "null"
    assert run.data.params["data.augment"] == '[{"kind": "random_crop", "padding": 1, "size": null}]'
    assert run.data.params["plan.accumulation"] == "2"
    assert run.data.tags["temper.fingerprint"] == "f" * 64
    assert run.data.tags["temper.command"] == "temper train jobs/digits.yaml model.args.hf_token=***"
    assert run.data.tags["mlflow.user"]
    names = {artifact.path for artifact in store.client.list_artifacts(store.run_id)}
    assert {"job.yaml", "plan.json", "environment.txt"} <= names
    assert (store.folder / "artifacts" / store.run_id / "artifacts" / "environment.txt").read_text().count("\nmlflow==")
    assert list(store.work.iterdir()) == []


def test_no_secret_reaches_the_store(store: SimpleNamespace) -> None:
    assert store.client.get_run(store.run_id).data.params["model.args.hf_token"] == "***"
    for path in store.folder.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_tracker_and_resume_end_in_one_run_with_each_step_once(store: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    run_id = open_run(store.uri, store.plan, job_yaml=JOB_YAML, command=COMMAND)
    first = Tracked(dense(path), RunMetrics, store.uri, run_id)
    first.start()
    first.add("dense", records(1, 30))
    assert first.close(60.0)
    assert mlflow_store.close_run(store.uri, run_id, "FAILED")
    assert store.client.get_run(run_id).info.status == "FAILED"

    resumed = open_run(store.uri, plan_of(job(store.folder, seed=7)), run_id=run_id, job_yaml=JOB_YAML, command="again")
    assert resumed == run_id
    run = store.client.get_run(run_id)
    assert (run.info.status, run.data.params["seed"]) == ("RUNNING", "0")
    second = Tracked(dense(path), RunMetrics, store.uri, run_id)
    second.start()
    second.add("dense", records(21, 40))
    second.add("dense", [record(41, **{"eval/accuracy": 0.5, "a?b": 1.0, "../up": 2.0, "x" * 300: 3.0})])
    assert second.close(60.0)
    assert replay(store.uri, run_id, dense(path))
    assert mlflow_store.close_run(store.uri, run_id, "FINISHED")

    assert points(store, run_id, "train/loss") == [(r["step"], r["time_ms"], 1 / r["step"]) for r in records(1, 41)]
    assert points(store, run_id, "eval/accuracy") == [(41, 1_700_000_000_041, 0.5)]
    latest = store.client.get_run(run_id).data.metrics
    assert (latest["a_b"], latest["up"], latest["x" * 250]) == (1.0, 2.0, 3.0)
    assert store.client.get_run(run_id).info.status == "FINISHED"


def test_a_record_larger_than_a_request_counts_only_when_whole(store: SimpleNamespace) -> None:
    sink = RunMetrics(store.uri, store.run_id)
    huge = record(1, **{f"sparsity/{i}": float(i) for i in range(1500)})
    assert sink._entities(huge)[-1].key == PROGRESS_METRIC
    store.client.log_batch(store.run_id, metrics=sink._entities(huge)[:1000])  # what a lost connection leaves
    assert sink.last_step() == 0
    sink.send([huge])
    assert sink.last_step() == 1
    assert points(store, store.run_id, "sparsity/7") == [(1, 1_700_000_000_001, 7.0)]
    assert points(store, store.run_id, "sparsity/1499") == [(1, 1_700_000_000_001, 1499.0)]


def test_bad_metrics_are_refused_and_a_deleted_run_is_gone(store: SimpleNamespace) -> None:
    run_id = open_run(store.uri, store.plan, job_yaml=JOB_YAML, command=COMMAND)
    sink = RunMetrics(store.uri, run_id)
    bad: Record = {"step": 1, "time_ms": -1, "metrics": {"train/loss": 1.0}}
    with pytest.raises(RefusedError):
        sink.send([bad])
    store.client.delete_run(run_id)
    with pytest.raises(RunGoneError, match="was deleted"):
        sink.send(records(1, 1))
    with pytest.raises(RunGoneError, match="is not in this store"):
        RunMetrics(store.uri, "0" * 32).last_step()

    replaced = open_run(store.uri, store.plan, run_id=run_id, job_yaml=JOB_YAML, command=COMMAND)
    assert replaced != run_id
    unknown = open_run(store.uri, store.plan, run_id="0" * 32, job_yaml=JOB_YAML, command=COMMAND)
    assert unknown not in (run_id, replaced)


def test_deleted_experiment_is_restored(store: SimpleNamespace) -> None:
    plan = plan_of(job(store.folder, tracking={"experiment": "thrown_away"}))
    experiment_id = store.client.create_experiment("thrown_away")
    store.client.delete_experiment(experiment_id)
    run_id = open_run(store.uri, plan, job_yaml=JOB_YAML, command=COMMAND)
    assert store.client.get_run(run_id).info.experiment_id == experiment_id


def test_unreachable_server_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RunError, match=r"tracking.uri: http://ann:\*\*\*@127.0.0.1:9 cannot be used") as caught:
        open_run("http://ann:hunter2@127.0.0.1:9", plan_of(job(tmp_path)), job_yaml=JOB_YAML, command=COMMAND)
    assert "hunter2" not in str(caught.value)
    assert not mlflow_store.close_run("http://127.0.0.1:9", "0" * 32, "FINISHED", timeout_s=0.0)


@pytest.mark.parametrize("statements", [5, 60])
def test_a_database_whose_making_was_killed_is_made_again(tmp_path: Path, statements: int) -> None:
    database = tmp_path / "mlflow.db"
    killed = (
        "import os, sys, sqlalchemy\n"
        "from temper.tracking.mlflow_store import build_client\n"
        "left = [int(sys.argv[2])]\n"
        "def count(*_):\n"
        "    left[0] -= 1\n"
        "    left[0] or os._exit(9)\n"
        "sqlalchemy.event.listen(sqlalchemy.Engine, 'before_cursor_execute', count)\n"
        "build_client(sys.argv[1])"
    )
    arguments = [sys.executable, "-c", killed, f"sqlite:///{database}", str(statements)]
    assert subprocess.run(arguments, capture_output=True, cwd=tmp_path, check=False).returncode == 9
    assert not database.exists()
    client = build_client(f"sqlite:///{database}")
    assert client.create_run("0").info.status == "RUNNING"
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}


def test_git_state_of_a_dirty_repository(tmp_path: Path) -> None:
    from temper.tracking.provenance import _git, git_state

    assert git_state(tmp_path) is None
    (tmp_path / "file").write_text("one\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-b", "main"], ["add", "file"], [*identity, "commit", "-m", "x"]):
        assert _git(tmp_path, *arguments) is not None
    clean = git_state(tmp_path)
    assert clean is not None
    assert (clean.branch, clean.dirty, clean.diff) == ("main", False, None)
    (tmp_path / "file").write_text("two\n")
    dirty = git_state(tmp_path)
    assert dirty is not None
    assert dirty.commit == clean.commit
    assert dirty.diff is not None and "-one\n+two" in dirty.diff
    (tmp_path / "file").write_text("x" * 2**20)
    large = git_state(tmp_path)
    assert large is not None
    assert (large.dirty, large.diff) == (True, None)


# -------------------------------------------------------------------------------------------------------------- ui


def test_ui_of_a_server_is_its_own_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert ui.serve_ui("https://u:p@tracking.example") == 0
    assert capsys.readouterr().err == (
        "MLflow: https://u:***@tracking.example/#/experiments?workflowType=machine_learning\n"
    )


def test_ui_takes_another_port_where_one_is_taken() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.free_port("127.0.0.1", port) not in (0, port)


def test_ui_keeps_the_store_out_of_the_command_line() -> None:
    assert ui.server_environment("postgresql://u:p@db/x")["MLFLOW_BACKEND_STORE_URI"] == "postgresql://u:p@db/x"
    assert ui.server_environment("sqlite:////a/mlflow.db")["MLFLOW_DEFAULT_ARTIFACT_ROOT"] == "/a/artifacts"
    assert "127.0.0.1" in ui.server_command("127.0.0.1", 5000)
