"""A sweep of four trials at once, tracked by MLflow's server as teams run it: PostgreSQL, artifacts, passwords."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweep_runs import PHASES, dsd_job, finish, grid, start, sweep, write_space
from team_server import TeamServer, running_team_server
from temper.tracking.history import read_history

pytestmark = [pytest.mark.ray, pytest.mark.services]

FOUR = {"optimizer.lr": grid(0.01, 0.02), "dsd.rounds.0.sparsity": grid(0.3, 0.6)}


@dataclass(frozen=True)
class Swept:
    """What the sweep left: its folder, its result, what it said, and its runs by id as the server tells them."""

    folder: Path
    result: dict[str, Any]
    said: str
    client: Any
    runs: dict[str, Any]

    def of_kind(self, kind: str) -> list[Any]:
        return [run for run in self.runs.values() if run.data.tags["temper.kind"] == kind]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeamServer]:
    with (
        running_team_server(tmp_path_factory.mktemp("server")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def swept(server: TeamServer, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    from mlflow import MlflowClient

    path = write_space(tmp_path_factory.mktemp("four"), dsd_job(), FOUR, concurrency=4)
    result, said = sweep(path)
    assert "starting 4 worker groups" in said
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("temper")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return Swept(path.parent, result, said, client, {run.info.run_id: run for run in runs})


def test_the_tree_is_whole(swept: Swept) -> None:
    (parent,) = swept.of_kind("sweep")
    trials = swept.of_kind("trial")
    assert parent.info.run_id == swept.result["parent_run_id"]
    assert sorted(run.info.run_id for run in trials) == sorted(trial["run_id"] for trial in swept.result["trials"])
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    phases = sorted(
        (run.data.tags["mlflow.parentRunId"], run.data.tags["temper.phase"]) for run in swept.of_kind("phase")
    )
    assert phases == sorted((run.info.run_id, phase) for run in trials for phase in PHASES)
    assert {run.info.status for run in swept.runs.values()} == {"FINISHED"}


def test_each_point_of_each_trial_is_there_once(swept: Swept) -> None:
    for trial in swept.result["trials"]:
        expected = defaultdict(list)
        for phase in trial["phases"]:
            for record in read_history(swept.folder / "runs" / "phases" / phase["fingerprint"] / "history.jsonl"):
                for name, value in record["metrics"].items():
                    expected[name].append((record["step"], value))
        assert len(expected["train/loss"]) == trial["steps"] == 24
        for name, points in expected.items():
            history = swept.client.get_metric_history(trial["run_id"], name)
            assert [(point.step, point.value) for point in history] == points, name


def test_artifacts_are_read_through_the_server(swept: Swept, server: TeamServer, tmp_path: Path) -> None:
    for run in [*swept.of_kind("trial"), *swept.of_kind("sweep")]:
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        job = Path(swept.client.download_artifacts(run.info.run_id, "job.yaml", str(tmp_path)))
        assert yaml.safe_load(job.read_text())["dsd"]["rounds"][0]["sparse_steps"] == 6


def test_the_winner_is_loaded_from_the_registry(swept: Swept) -> None:
    import mlflow

    version = swept.client.get_model_version_by_alias("little", "champion")
    assert version.run_id == swept.result["best"]["run_id"]
    model = mlflow.pyfunc.load_model("models:/little@champion")
    assert model.predict(model.input_example).shape[-1] == 10


def test_no_secret_is_told(swept: Swept, server: TeamServer, tmp_path: Path) -> None:
    told = [swept.said, json.dumps(swept.result), server.log.read_text()]
    told += [json.dumps(run.to_dictionary()) for run in swept.runs.values()]
    for run in swept.runs:
        swept.client.download_artifacts(run, "", str(tmp_path))
    files = [path for folder in (tmp_path, swept.folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    for secret in server.secrets:
        assert [text for text in told if secret in text] == []
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_wrong_credentials_are_said_in_one_line(
    server: TeamServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(dsd_job()))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-hers-but-long-enough")
    code, result, said = finish(start("train", tmp_path / "job.yaml"))
    assert (code, result["status"]) == (1, "failed")
    (line,) = [line for line in said.splitlines() if "tracking.uri" in line]
    assert server.uri in line and "MLFLOW_TRACKING_PASSWORD" in line
    assert "Traceback" not in said and "not-hers" not in said
    assert not list((tmp_path / "runs").glob("phases/*/history.jsonl"))
