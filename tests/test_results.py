"""`temper.results`: what MLflow has of runs and sweeps, as plain rows and as a table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import temper
from sweep_tree import BEGAN_MS, MadeSweep, write_sweep
from temper.errors import JobError, RunError
from temper.tracking import results
from temper.tracking.mlflow_store import build_client
from temper.tracking.results import parse_value, read_curves, read_experiment, read_sweep

PLAIN = "a run of temper train"
FIRST = MadeSweep(name="first")
SECOND = MadeSweep((4.0,), (0.5, 0.9), (0,), "second", began_ms=BEGAN_MS + 10**9)
ELSEWHERE = MadeSweep((1.0,), (0.5,), (0,), "elsewhere")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with two sweeps, the later one written first, and a run of `temper train` that goes on."""
    folder = tmp_path_factory.mktemp("runs")
    database = folder / "mlflow.db"
    write_sweep(database, SECOND)
    write_sweep(database, FIRST)
    write_sweep(database, ELSEWHERE, "other")
    client = build_client(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("temper").experiment_id
    tags = {"temper.kind": "run", "temper.phases": "[]"}
    run = client.create_run(experiment, start_time=BEGAN_MS + 2 * 10**9, tags=tags, run_name=PLAIN).info.run_id
    client.log_metric(run, "eval/accuracy", math.nan, step=7)
    client.log_metric(run, "system/node-0/cpu", 50.0, step=90)
    client.log_param(run, "optimizer.lr", "1e-05")
    client.create_run(experiment, tags={"temper.kind": "verify"})
    client.create_run(experiment)  # of something else than temper
    return folder


@pytest.fixture(autouse=True)
def no_configured_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def uri_of(storage: Path) -> str:
    return f"sqlite:///{storage}/mlflow.db"


# ------------------------------------------------------------------------------------------------------------ the table


def test_a_row_is_a_trial_or_a_run(storage: Path) -> None:
    frame = temper.results(storage=storage)
    assert list(zip(frame["kind"], frame["trial"], strict=True)) == [
        *(("trial", f"t{index:03d}") for index in range(18)),
        ("trial", "t000"),
        ("trial", "t001"),
        ("run", ""),
    ]
    assert list(frame["sweep"].unique()) == [FIRST.id, SECOND.id, ""]
    assert frame["run_id"].is_unique
    expected = {7: "failed", 12: "diverged", 15: "stopped", 20: "running"}
    assert dict(frame["status"][frame["status"] != "finished"]) == expected


def test_columns_are_typed(storage: Path) -> None:
    frame = temper.results(storage=storage)
    assert [*frame.columns[:13]] == [*results._IDENTITY]
    assert frame["started"].dtype == pd.to_datetime([0], unit="ms", utc=True).as_unit("us").dtype
    assert frame["started"][0] == pd.Timestamp("2025-10-09 08:53:30", tz="UTC")
    for name in ("seconds", "steps", "steps_saved", "distill.temperature", "seed", "test/accuracy", "job.optimizer.lr"):
        assert pd.api.types.is_numeric_dtype(frame[name]), name
    assert frame["job.model.hidden"][0] == (16,)
    assert frame["job.name"][0] == "digits_student_dsd"
    assert not [name for name in frame.columns if "system/" in name]
    assert "test/class_accuracy/3" in frame.columns


def test_values_are_those_of_the_run(storage: Path) -> None:
    frame = temper.results(storage=storage)
    trial = frame.iloc[1]
    run = build_client(uri_of(storage)).get_run(trial["run_id"])
    assert trial["test/accuracy"] == run.data.metrics["test/accuracy"]
    assert (trial["distill.temperature"], trial["dsd.rounds.0.sparsity"], trial["seed"]) == (1.0, 0.7, 0)
    assert trial["job.dsd.rounds.0.sparsity"] == 0.7
    # Its dense phase is that of the trial before.
    assert (trial["steps"], trial["steps_saved"], trial["phases_reused"]) == (400, 200, 1)
    assert trial["seconds"] == (run.info.end_time - run.info.start_time) / 1000
    assert trial["command"] == run.data.tags["temper.command"]
    assert trial["fingerprint"] == run.data.tags["temper.fingerprint"]


def test_what_a_run_does_not_have_is_missing(storage: Path) -> None:
    run = temper.results(storage=storage).iloc[-1]
    assert run["name"] == PLAIN
    assert pd.isna(run["seconds"]) and pd.isna(run["distill.temperature"]) and pd.isna(run["eval/accuracy"])
    assert run["steps"] == 7  # not the 90 of the machine's metrics
    assert run["job.optimizer.lr"] == 1e-05


def test_the_trials_of_one_sweep(storage: Path) -> None:
    frame = temper.results(storage=storage, sweep=ELSEWHERE.id)
    assert list(frame["trial"]) == ["t000"]
    assert list(frame["sweep"]) == [ELSEWHERE.id]
    assert list(temper.results("other", storage=storage)["run_id"]) == list(frame["run_id"])


def test_an_experiment_without_runs_gives_a_table_without_rows(storage: Path) -> None:
    build_client(uri_of(storage)).create_experiment("empty")
    frame = temper.results("empty", storage=storage)
    assert (len(frame), [*frame.columns]) == (0, [*results._IDENTITY])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("1e-05", 1e-05),
        ("true", True),
        ("null", None),
        ("[[1, 2], 3]", ((1, 2), 3)),
        ("{}", "{}"),
        ("relu", "relu"),
        ('"quoted"', '"quoted"'),
        ("1_000", "1_000"),
        ("", ""),
    ],
)
def test_parameters_are_values_again(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_variable_that_is_called_as_a_column_keeps_its_own(storage: Path) -> None:
    row = read_sweep(uri_of(storage), ELSEWHERE.id).trials[0]
    renamed = results.RunRow(**{**vars(row), "swept": {"name": "wide", "steps": 3}})
    frame = results.results_table([renamed])
    assert (frame["name"][0], frame["sweep.name"][0], frame["sweep.steps"][0]) == ("t000", "wide", 3)


# ------------------------------------------------------------------------------------------------------------- the rows


def test_runs_come_page_by_page_and_never_one_by_one(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    whole = read_experiment(uri_of(storage), "temper")
    calls = []

    def search(self: MlflowClient, *args: Any, **options: Any) -> Any:
        calls.append(options["max_results"])
        return searched(self, *args, **options)

    searched = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", search)
    monkeypatch.setattr(MlflowClient, "get_run", None)
    monkeypatch.setattr(results, "_PAGE", 10)
    assert repr(read_experiment(uri_of(storage), "temper")) == repr(whole)  # NaN is not equal to itself
    # Two sweeps with their trials and teachers, the run, and the certificate of `temper verify`.
    assert calls == [10] * math.ceil((2 + 20 + 2 + 1 + 1) / 10)


def test_a_sweep_has_its_trials_its_objectives_and_what_they_share(storage: Path) -> None:
    sweep = read_sweep(uri_of(storage), FIRST.id)
    assert [trial.trial for trial in sweep.trials] == [f"t{index:03d}" for index in range(18)]
    assert [run.kind for run in sweep.others] == ["teacher"]
    assert [(each.metric, each.mode) for each in sweep.objectives] == [("eval/accuracy", "max")]
    assert sweep.variables == ("distill.temperature", "dsd.rounds.0.sparsity", "seed")
    first, second = sweep.trials[:2]
    assert [(phase.name, phase.reused, phase.complete) for phase in second.phases] == [
        ("dense", True, True),
        ("sparse-1", False, True),
        ("redense-1", False, True),
    ]
    assert second.phases[0].computed_by == first.run_id
    assert second.phases[0].fingerprint == first.phases[0].fingerprint


def test_the_order_of_trials_is_that_of_their_numbers(storage: Path) -> None:
    row = read_sweep(uri_of(storage), FIRST.id).trials[0]
    numbers = [1000, 999, 2]
    rows = [
        results.RunRow(**{**vars(row), "run_id": str(each), "tags": {"temper.trial": f"t{each:03d}"}})
        for each in numbers
    ]
    assert list(results.results_table(rows)["trial"]) == ["t002", "t999", "t1000"]


def test_phases_without_their_long_fields_are_read(storage: Path) -> None:
    client = build_client(uri_of(storage))
    run_id = read_sweep(uri_of(storage), ELSEWHERE.id).trials[0].run_id
    whole = client.get_run(run_id).data.tags["temper.phases"]
    long = ("kind", "computed_by", "run_id", "started_ms", "ended_ms")
    short = [{key: value for key, value in phase.items() if key not in long} for phase in json.loads(whole)]
    client.set_tag(run_id, "temper.phases", json.dumps(short))
    phases = read_sweep(uri_of(storage), ELSEWHERE.id).trials[0].phases
    assert [(phase.name, phase.kind, phase.started_ms) for phase in phases] == [
        (name, "", 0) for name in ("dense", "sparse-1", "redense-1")
    ]


def test_curves_are_in_the_order_of_steps(storage: Path) -> None:
    trial = read_sweep(uri_of(storage), FIRST.id).trials[0]
    (curve,) = read_curves(uri_of(storage), [trial.run_id], "eval/accuracy").values()
    assert [step for step, _ in curve] == [*range(20, 200, 20), 200, *range(210, 300, 10), *range(300, 401, 10)]
    assert curve[-1][1] == trial.metrics["eval/accuracy"]


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_an_unknown_experiment_names_those_there_are(storage: Path) -> None:
    with pytest.raises(JobError, match=r"experiment: temprer is no experiment .*; use one of .*other, temper"):
        temper.results("temprer", storage=storage)


@pytest.mark.parametrize("run_id", ["nonsense", "0" * 32])
def test_an_unknown_sweep_names_those_there_are(storage: Path, run_id: str) -> None:
    with pytest.raises(JobError, match=rf"sweep: {run_id} is not the run of a sweep .*{FIRST.id} \(first\)"):
        temper.results(storage=storage, sweep=run_id)


def test_a_trial_is_no_sweep(storage: Path) -> None:
    trial = read_sweep(uri_of(storage), FIRST.id).trials[0].run_id
    with pytest.raises(JobError, match="is not the run of a sweep"):
        temper.results(storage=storage, sweep=trial)


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"uri: sqlite:///.* is not there"):
        temper.results(storage=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_read_is_told_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(RunError, match="MLflow at sqlite:///"):
        temper.results(storage=tmp_path)
    with pytest.raises(RunError, match="MLflow at ") as raised:
        temper.results(uri="nonsense://user:hunter2@host/db")
    assert "hunter2" not in str(raised.value)
