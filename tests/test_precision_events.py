"""Events of a record, such as where a step went non-finite: kept in the history, shown once, a tag in MLflow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from temper.tracking import mlflow_store
from temper.tracking.history import History, Record, read_history
from temper.tracking.mlflow_store import LAST_NON_FINITE, RunMetrics
from temper.tracking.progress import LiveDisplay, PlainDisplay


def record(step: int, *events: str, metrics: int = 1) -> Record:
    made: Record = {
        "step": step,
        "time_ms": 1000 + step,
        "metrics": {"train/loss": 0.5} | {f"precision/underflow/layer{index}": 0.1 for index in range(metrics - 1)},
    }
    if events:
        made["events"] = list(events)
    return made


PLAN: Any = SimpleNamespace(
    job=SimpleNamespace(name="digits", precision=SimpleNamespace(dtype="fp16")),
    steps=20,
    phases=(SimpleNamespace(name="dense", first_step=0),),
)


def test_the_history_keeps_events(tmp_path: Path) -> None:
    records = [record(1), record(2, "loss scale 8: first non-finite gradient in fc (weight)"), record(3)]
    history = History(tmp_path / "history.jsonl")
    history.append(records)
    assert read_history(history.path) == records
    # Opened again, as after a crash.
    assert History(tmp_path / "history.jsonl").last_step == 3
    assert "events" not in json.loads(history.path.read_text().splitlines()[0])


def test_a_line_display_notes_each_event_once() -> None:
    stream = io.StringIO()
    display = PlainDisplay(PLAN, stream, notes_only=True, clock=lambda: 0.0)
    display.records([record(4, "loss scale 8: a"), record(5, "loss scale 4: a", "loss scale 8: b")])
    display.records([record(6, "loss scale 2: b")])
    assert stream.getvalue().splitlines() == ["    0 s  step 4: loss scale 8: a", "    0 s  step 5: loss scale 8: b"]


def test_a_live_display_notes_each_event_once() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    display = LiveDisplay(PLAN, console, clock=lambda: 0.0)
    display.records([record(4, "loss scale 8: a"), record(5, "loss scale 8: a")])
    display.close()
    assert console.file.getvalue().count("step 4: loss scale 8: a") == 1  # type: ignore[attr-defined]
    assert "step 5: loss scale 8: a" not in console.file.getvalue()  # type: ignore[attr-defined]


class Client:
    """Remembers what is logged."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, dict[str, str]]] = []

    def log_batch(
        self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), synchronous: Any = None
    ) -> None:
        self.requests.append((len(metrics), {tag.key: tag.value for tag in tags}))
        self.latest = getattr(self, "latest", {}) | {metric.key: metric for metric in metrics}

    def get_run(self, run_id: str) -> Any:
        data = SimpleNamespace(_metric_objs=list(self.latest.values()))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id, lifecycle_stage="active"), data=data)


def test_the_newest_event_is_a_tag_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    monkeypatch.setattr(mlflow_store, "build_client", lambda uri: client)
    run = RunMetrics("sqlite:///nowhere.db", "run")
    run.send([record(1), record(2)])
    run.send([record(3, "loss scale 8: a"), record(4, "loss scale 4: b"), record(5, metrics=1200)])
    # With the first request of several: when the last metric is there, so is the tag.
    assert client.requests == [(2, {}), (1000, {LAST_NON_FINITE: "step 4: loss scale 4: b"}), (202, {})]
