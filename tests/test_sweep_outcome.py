"""A sweep's own run in MLflow: one, whatever fails in its midst, and the outcome that the same command gives to a store
that was away."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from temper.config.space import SpaceConfig
from temper.errors import RunError
from temper.files import read_json, write_json
from temper.launch.registering import Registered
from temper.launch.rungs import RungClock
from temper.launch.sweep import driver, parent, winner
from temper.launch.sweep.spec import SweepSpec
from temper.launch.sweep.tracking import SweepTracking
from temper.plan.mesh import ClusterShape
from temper.run_folder import RESULT, RUN, SWEEP_RUN


def test_closing_takes_as_long_as_runs_are_delivered() -> None:
    nothing: Any = SimpleNamespace(deliver=lambda: None)
    sweep = SweepTracking(lambda: "sweep", lambda: None, lambda parent: nothing)
    assert sweep.close() == []
    sweep._ordered = ["a", "b", "c"]
    slices = []

    def join(timeout_s: float) -> None:
        """MLflow takes a run in each of the first two slices of time, and then is away."""
        slices.append(timeout_s)
        if len(sweep._ordered) > 1:
            sweep._ordered.pop()

    sweep._thread = SimpleNamespace(join=join, is_alive=lambda: True)  # type: ignore[assignment]
    assert sweep.close(60.0) == ["a"]
    assert slices == [60.0, 60.0, 60.0]


def test_threads_of_one_process_write_the_same_file(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(30):
            write_json(tmp_path / RUN, {"number": number})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    assert read_json(tmp_path / RUN)["number"] in range(8)
    with pytest.raises(TypeError):
        write_json(tmp_path / RUN, {"number": object()})
    assert [path.name for path in tmp_path.iterdir()] == [RUN]


# ------------------------------------------------------------------------------------------------- the sweep's own run


@pytest.fixture
def spec(tmp_path: Path) -> SweepSpec:
    """Of a sweep over a job's learning rate, whose folder is there."""
    space = SpaceConfig.model_validate(
        {
            "name": "a",
            "job": "job.yaml",
            "space": {"optimizer.lr": {"kind": "grid", "values": [0.1, 0.2]}},
            "objectives": [{"metric": "eval/accuracy", "mode": "max"}],
            "search": {"kind": "grid"},
        }
    )
    job = {
        "name": "tiny",
        "model": {"kind": "mlp", "hidden": [8]},
        "data": {"kind": "digits", "global_batch": 64},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "budget": {"steps": 4},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    made = SweepSpec(
        space=space,
        job_file=tmp_path / "job.yaml",
        overrides=(),
        storage=str(tmp_path / "runs"),
        place="sweeps/a",
        uri=f"sqlite:///{tmp_path}/runs/mlflow.db",
        cluster=ClusterShape(nodes=1, cpus=8.0, gpus=0.0),
        import_folders=(),
        working_folder=str(tmp_path),
        command="temper sweep space.yaml",
        ids={},
        clock=RungClock.of(("dense",), "dense", (1.0,), 3.0),
        concurrency=1,
        embedded=True,
        began_ms=1_000,
        texts={"space.yaml": "name: a\n"},
    )
    made.folder.mkdir(parents=True)
    return made


def test_a_sweep_has_one_parent_although_the_store_fails_in_its_midst(
    spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from temper.tracking.mlflow_store import build_client

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    for call in ("log_batch", "log_text"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, call, fail)
            with pytest.raises(RunError, match="no room"):
                parent.open_sweep(spec)
        assert read_json(spec.folder / SWEEP_RUN)["open"] is True
    run_id = parent.open_sweep(spec)
    client = build_client(spec.uri)
    (run,) = client.search_runs(["1"])
    assert run.info.run_id == run_id == read_json(spec.folder / SWEEP_RUN)["run_id"]
    assert run.data.params["objectives"] == "eval/accuracy max"
    assert "space.yaml" in {artifact.path for artifact in client.list_artifacts(run_id)}


def test_a_fresh_sweep_leaves_no_run_behind(spec: SweepSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["trials/t000", "shared", "alone/t000/run", "alone/t000/teacher-abc"]
    records = [spec.folder / SWEEP_RUN, *(spec.folder / place / RUN for place in places)]
    for path in records:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"run_id": "old", "open": True})
    settled = []

    def settle(folder: Path) -> None:
        assert all(path.exists() for path in records)
        settled.append(folder)

    monkeypatch.setattr(driver, "settle", settle)
    driver._forget(spec)
    assert settled == [spec.folder]
    assert not any(path.exists() for path in records)


# --------------------------------------------------------------------------------------------- what came of the sweep

BEST = {
    "id": "t000",
    "run_id": "",
    "params": {"optimizer.lr": 0.1},
    "status": "finished",
    "metrics": {"eval/accuracy": 0.9},
    "phases": [{"fingerprint": "f"}],
}
NOWHERE = {"folder": "", "registered": "", "alias": "", "note": ""}


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def stage(self, text: str) -> None: ...


@dataclass
class Late:
    """The same command after an outage over the whole sweep: MLflow gives the trial the run `run-1`."""

    spec: SweepSpec
    done: dict[str, Any]
    told: list[Any]
    takes: bool = True

    def again(self) -> driver.SweepResult:
        self.told.clear()
        plan: Any = SimpleNamespace(spec=self.spec, first={}, shared=0)
        display: Any = Notes()
        return driver._reused(plan, [], read_json(self.spec.folder / RESULT) or self.done, 0.0, display)


@pytest.fixture
def late(spec: SweepSpec, monkeypatch: pytest.MonkeyPatch) -> Late:
    done = {"parent_run_id": "", "name": "a", "status": "finished", "seconds": 7.0, "folder": "", "front": []}
    done |= {"trials": [BEST], "best": {**BEST, **NOWHERE, "folder": "best"}, "phases_run": 1, "phases_reused": 0}
    done |= {"steps_run": 4, "steps_saved": 0, "left_behind": "left behind: nothing", "undelivered": ["t000"]}
    found = Late(spec, done, [])

    class Finished:
        def __init__(self, spec: SweepSpec) -> None: ...

        def deliver_late(self, first: Any, shared: int) -> None:
            found.told.append("runs")

        def finish(self, *, is_over: bool) -> dict[str, Any]:
            runs = [{"id": "t000", "run_id": "run-1"}]
            return {"undelivered": [], "parent_run_id": "sweep", "trials": runs, "view": None}

    def name_winner(spec: SweepSpec, best: dict[str, Any], display: Any) -> dict[str, Any]:
        found.told.append(("winner", best["run_id"]))
        return {**best, "registered": "models:/a/1" if found.takes else ""}

    def tell_outcome(spec: SweepSpec, result: driver.SweepResult, display: Any) -> bool:
        assert result.best is not None
        runs = (result.parent_run_id, result.best["run_id"], result.trials[0]["run_id"])
        found.told.append((*runs, result.best["registered"], result.seconds, result.steps_run))
        return found.takes

    monkeypatch.setattr(driver, "Coordinator", Finished)
    monkeypatch.setattr(driver, "name_winner", name_winner)
    monkeypatch.setattr(driver, "tell_outcome", tell_outcome)
    monkeypatch.setattr(driver, "log_reports", lambda *_: found.told.append("report"))
    monkeypatch.setattr(driver, "close_sweep", lambda *_: None)
    monkeypatch.setattr(driver, "_summary", lambda *_: ())
    return found


def test_after_an_outage_the_same_command_tells_everything(late: Late) -> None:
    result = late.again()
    outcome = ("sweep", "run-1", "run-1", "models:/a/1", 7.0, 4)
    assert late.told == ["runs", ("winner", "run-1"), outcome, "report"]
    assert (result.status, result.steps_run, result.left_behind) == ("reused", 0, driver.UNSTARTED)
    kept = read_json(late.spec.folder / RESULT)
    assert (kept["status"], kept["steps_run"], kept["told"], kept["undelivered"]) == ("finished", 4, True, [])
    assert kept["trials"][0]["run_id"] == kept["best"]["run_id"] == "run-1"
    assert kept["best"]["folder"] == "best"
    late.again()
    assert late.told == []


def test_what_alone_was_refused_is_told_again(late: Late) -> None:
    late.takes = False
    assert late.again().told is False
    late.again()  # the trials' runs are there by now
    assert "report" in late.told
    late.takes = True
    assert late.again().told is True
    refused = {**read_json(late.spec.folder / RESULT)}
    write_json(late.spec.folder / RESULT, {**refused, "best": {**refused["best"], "registered": ""}})
    assert (late.again().best or {})["registered"] == "models:/a/1"
    late.again()
    assert late.told == []


def test_a_winner_that_cannot_be_kept_fails_no_sweep(spec: SweepSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    import temper.export as export

    notes: Any = Notes()
    best, product = {**BEST, "run_id": "run-1"}, SimpleNamespace(metrics={})
    failures: list[Exception] = [OSError("No space left on device"), RunError("MLflow is away")]

    def export_product(product: Any, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").touch()
        if len(failures) == 2:
            raise failures.pop(0)

    def register_product(product: Any, *_: Any) -> Registered:
        if failures:
            raise failures.pop()
        return Registered("models:/a/1", "champion", "it is the first")

    monkeypatch.setattr(winner, "keep_phase", lambda *_: None)
    monkeypatch.setattr(winner, "replace", lambda product, **_: product)
    monkeypatch.setattr(winner, "register_product", register_product)
    monkeypatch.setattr(export, "find_product", lambda *_: product)
    monkeypatch.setattr(export, "export_product", export_product)
    folder = str(spec.folder / "best")
    assert winner.name_winner(spec, best, notes) == {**best, **NOWHERE}
    assert winner.name_winner(spec, best, notes) == {**best, **NOWHERE, "folder": folder}
    assert [note.split(":")[0] for note in notes.said] == [
        "the winner is trained, and could not be exported",
        "the winner is exported, and could not be registered",
    ]
    places = {"folder": folder, "registered": "models:/a/1", "alias": "champion", "note": "it is the first"}
    assert winner.name_winner(spec, best, notes) == {**best, **places}
    monkeypatch.setattr(export, "find_product", None)
    assert winner.name_winner(spec, best, notes) == {**best, **places}
    assert len(notes.said) == 2
