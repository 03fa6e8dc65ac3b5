"""The tree of a run in MLflow: its phases as runs of their own, what it came to, what a killed command left open."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from temper.errors import RunError
from temper.files import read_json, write_json
from temper.launch.reconcile import reconcile, settle_lost
from temper.launch.sweep.ledger import LEDGER, Ledger
from temper.launch.tracked_run import TrackedRun
from temper.locks import claimed
from temper.plan.build import Plan
from temper.run_folder import HISTORY, LOCK, PHASE_MANIFEST, PLAN, RUN
from temper.tracking.description import dataset_input, phases_tags, told_phases
from temper.tracking.history import History
from temper.tracking.mlflow_store import build_client, open_parent
from temper.tracking.tree import read_phases
from test_sweep_trial import evaluated, facts, planned, record  # noqa: F401

COMMAND = "temper train job.yaml seed=1"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store; made once, because MLflow's migrations take seconds."""
    found = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    build_client(found)
    return found


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return stored(planned(), tmp_path)


def stored(plan: Plan, storage: Path) -> Plan:
    return replace(plan, job=plan.job.model_copy(update={"storage": str(storage)}))


def compute(plan: Plan, *names: str) -> None:
    """The phases of these names, as if the plan's run had computed them."""
    for phase in plan.phases:
        if phase.name in names:
            begin(plan, phase.name, phase.last_step)
            manifest = {
                "fingerprint": phase.fingerprint,
                "seconds": 2.5,
                "metrics": {"test/accuracy": 0.5},
                "files": {},
            }
            write_json(plan.phase_folder(phase) / PHASE_MANIFEST, manifest)


def begin(plan: Plan, name: str, until: int) -> None:
    phase = next(phase for phase in plan.phases if phase.name == name)
    folder = plan.phase_folder(phase)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, plan.to_dict())
    History(folder / HISTORY).append([record(phase.first_step + 1), evaluated(until)])


def opened(uri: str, plan: Plan, **more: Any) -> TrackedRun:
    run = TrackedRun(uri, plan, COMMAND, **more)
    run.open()
    return run


def phases_of(uri: str, run_id: str) -> dict[str, Any]:
    client = build_client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.data.tags["temper.phase"]: run for run in found if run.data.tags["temper.kind"] == "phase"}


def points(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in build_client(uri).get_metric_history(run_id, metric)]


def test_every_phase_is_a_run_with_its_evaluations(uri: str, plan: Plan) -> None:
    run = opened(uri, plan)
    assert phases_of(uri, run.run_id) == {}
    compute(plan, "dense")
    begin(plan, "sparse-1", 120)
    run.grow()
    phases = phases_of(uri, run.run_id)
    assert {name: each.info.status for name, each in phases.items()} == {"dense": "FINISHED", "sparse-1": "RUNNING"}
    dense = phases["dense"]
    assert dense.info.run_name == "dense"
    assert dense.data.tags["temper.fingerprint"] == plan.phases[0].fingerprint
    assert (dense.data.tags["temper.reused"], dense.data.tags["temper.command"]) == ("false", COMMAND)
    assert dense.data.params["phase.steps"] == str(plan.phases[0].steps)
    assert phases["sparse-1"].data.params["phase.pruned"] == "0.5"
    assert points(uri, dense.info.run_id, "eval/accuracy") == [(100, 0.5)]
    assert points(uri, dense.info.run_id, "train/loss") == [(100, 1 / 100)]
    assert dense.data.metrics["cost/seconds"] == 2.5
    compute(plan, "sparse-1", "redense-1")
    assert run.end("FINISHED")
    ended = phases_of(uri, run.run_id)
    assert [ended[phase.name].info.status for phase in plan.phases] == ["FINISHED"] * 3
    assert ended["dense"].info.run_id == dense.info.run_id
    known = build_client(uri).get_run(run.run_id)
    assert known.data.metrics["cost/steps"] == plan.steps
    assert known.data.metrics["cost/examples"] == plan.steps * plan.batch.global_batch
    assert known.data.metrics["cost/seconds"] == 7.5
    assert (known.data.metrics["cost/steps_saved"], known.data.metrics["parameters_left"]) == (0, 2410)
    told = json.loads(known.data.tags["temper.phases"])
    assert [(each["name"], each["run_id"]) for each in told] == [
        (phase.name, ended[phase.name].info.run_id) for phase in plan.phases
    ]
    assert f"runs/{dense.info.run_id}" in known.data.tags["mlflow.note.content"]
    assert read_json(run.record) == {
        "uri": uri,
        "run_id": run.run_id,
        "command": COMMAND,
        "storage_id": known.data.tags["temper.storage.id"],
        "open": False,
        "status": "FINISHED",
        "delivered": True,
    }
    (data,) = known.inputs.dataset_inputs
    assert json.loads(data.dataset.profile)["fingerprint"] == plan.data.fingerprint
    less = replace(plan, data=replace(plan.data, train_examples=1000, validation_examples=437))
    assert dataset_input(less).dataset.digest != data.dataset.digest == dataset_input(plan).dataset.digest


def test_again_changes_nothing(uri: str, plan: Plan) -> None:
    compute(plan, "dense", "sparse-1", "redense-1")
    run = opened(uri, plan)
    assert run.end("FINISHED")
    first = phases_of(uri, run.run_id)
    again = opened(uri, plan)
    assert again.end("FINISHED")
    assert again.run_id == run.run_id
    second = phases_of(uri, run.run_id)
    assert {name: each.info.run_id for name, each in second.items()} == {
        n: each.info.run_id for n, each in first.items()
    }
    for each in second.values():
        assert len(points(uri, each.info.run_id, "train/loss")) == 1
        assert len(points(uri, each.info.run_id, "cost/seconds")) == 1
    assert len(points(uri, run.run_id, "cost/steps")) == 1


def test_a_phase_of_another_run_is_linked_to_it(uri: str, plan: Plan) -> None:
    compute(plan, "dense")
    first = opened(uri, plan)
    other = replace(plan, place="sweeps/a/trials/t000")
    second = opened(uri, other)
    reused = phases_of(uri, second.run_id)["dense"]
    assert (reused.data.tags["temper.reused"], reused.data.tags["temper.computed_by"]) == ("true", first.run_id)
    assert points(uri, reused.info.run_id, "test/accuracy") == [(100, 0.5)]
    assert "cost/seconds" not in reused.data.metrics
    begin(other, "sparse-1", 120)
    assert second.end("KILLED", {"temper.trial.status": "stopped"})
    known = build_client(uri).get_run(second.run_id).data
    assert (known.metrics["cost/steps"], known.metrics["cost/steps_saved"]) == (20, 100)
    assert known.metrics["cost/seconds_saved"] == 2.5
    assert known.tags["temper.trial.status"] == "stopped"
    assert phases_of(uri, second.run_id)["sparse-1"].info.status == "KILLED"


def test_a_phase_that_another_run_is_at_is_nobody_elses(plan: Plan) -> None:
    begin(plan, "dense", 50)
    assert [phase.name for phase in read_phases(plan.to_dict(), plan.job.storage_folder)] == ["dense"]
    other = replace(plan, place="sweeps/a/trials/t000")
    assert read_phases(other.to_dict(), plan.job.storage_folder) == []


def test_a_resumed_run_is_one_run_with_one_of_each_phase(uri: str, plan: Plan) -> None:
    begin(plan, "dense", 50)
    run = opened(uri, plan)
    assert run.end("KILLED")
    killed = phases_of(uri, run.run_id)["dense"]
    assert killed.info.status == "KILLED"
    again = opened(uri, plan)
    assert phases_of(uri, run.run_id)["dense"].info.status == "RUNNING"
    compute(plan, "dense", "sparse-1", "redense-1")
    assert again.end("FINISHED")
    phases = phases_of(uri, run.run_id)
    assert phases["dense"].info.run_id == killed.info.run_id
    assert {each.info.status for each in phases.values()} == {"FINISHED"}
    assert points(uri, killed.info.run_id, "train/loss") == [(50, 1 / 50), (100, 1 / 100)]


# ----------------------------------------------------------------------------------------- what a killed command left


def left(uri: str, plan: Plan) -> str:
    """A run whose command has died."""
    run = opened(uri, plan)
    write_json(plan.run_folder / PLAN, plan.to_dict())
    return run.run_id


def status(uri: str, run_id: str) -> str:
    return str(build_client(uri).get_run(run_id).info.status)


@pytest.mark.parametrize(
    ("computed", "expected"), [(["dense"], "KILLED"), (["dense", "sparse-1", "redense-1"], "FINISHED")]
)
def test_a_run_that_was_left_open_is_settled_once(uri: str, plan: Plan, computed: list[str], expected: str) -> None:
    compute(plan, *computed)
    run_id = left(uri, plan)
    with claimed(plan.run_folder / LOCK, "the run"):
        assert reconcile(plan.job.storage_folder) == []
    assert status(uri, run_id) == "RUNNING"
    (settled,) = reconcile(plan.job.storage_folder)
    assert (settled.run_id, settled.status) == (run_id, expected)
    assert status(uri, run_id) == expected
    steps = [
        step for phase in plan.phases if phase.name in computed for step in (phase.first_step + 1, phase.last_step)
    ]
    assert [step for step, _ in points(uri, run_id, "train/loss")] == steps
    assert set(phases_of(uri, run_id)) == set(computed)
    assert reconcile(plan.job.storage_folder) == []
    again = opened(uri, plan)
    assert (again.run_id, status(uri, run_id)) == (run_id, "RUNNING")


def test_a_sweep_that_was_left_open_is_settled_with_its_trials(uri: str, plan: Plan) -> None:
    folder = plan.job.storage_folder / "sweeps" / "a"
    trials = [replace(plan, place=f"sweeps/a/trials/t00{number}") for number in range(3)]
    compute(trials[0], "dense", "sparse-1", "redense-1")
    ids = [left(uri, trial) for trial in trials]
    ledger = Ledger(folder / LEDGER)
    for number in range(3):
        ledger.add(f"t00{number}", params={"seed": number})
    ledger.add("t001", end="diverged", reason="nan", seconds=1.0, time_to_first_step_s=None)
    parent = open_parent(uri, plan.job, run_id=None, name="a", tags={"temper.kind": "sweep"}, params={}, texts={})
    write_json(folder / "sweep.json", {"uri": uri, "run_id": parent, "open": True})
    with claimed(folder / f"{LEDGER}.lock", "the coordinator"):
        assert reconcile(plan.job.storage_folder) == []
    settled = {each.run_id: each.status for each in reconcile(plan.job.storage_folder)}
    # The third one reuses all phases, but nobody has noted its end.
    assert settled == {ids[0]: "FINISHED", ids[1]: "FAILED", ids[2]: "FINISHED", parent: "KILLED"}
    assert [status(uri, each) for each in (*ids, parent)] == ["FINISHED", "FAILED", "FINISHED", "KILLED"]
    assert reconcile(plan.job.storage_folder) == []


def test_a_run_without_its_folder_is_ended_by_what_it_says_of_itself(uri: str, plan: Plan) -> None:
    run_id = opened(uri, plan).run_id
    storage = plan.job.storage_folder
    assert settle_lost(storage, uri) == []
    shutil.rmtree(plan.run_folder)
    (settled,) = settle_lost(storage, uri)
    assert (settled.run_id, status(uri, run_id)) == (run_id, "KILLED")
    with pytest.raises(RunError, match="cannot be asked"):
        settle_lost(storage, "http://127.0.0.1:9")


def test_a_store_that_is_away_is_asked_again_the_next_time(
    uri: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = left(uri, plan)
    monkeypatch.setattr("temper.launch.reconcile._TIMEOUT_S", 0.0)
    write_json(plan.run_folder / RUN, {"uri": "http://127.0.0.1:9", "run_id": run_id, "open": True})
    assert reconcile(plan.job.storage_folder) == []
    write_json(plan.run_folder / RUN, {"uri": uri, "run_id": run_id, "open": True})
    monkeypatch.undo()
    assert [each.run_id for each in reconcile(plan.job.storage_folder)] == [run_id]


def test_the_last_records_that_a_killed_command_had_not_reported_are_delivered(uri: str, plan: Plan) -> None:
    """The manifest is written before the last report is heard; the checkpoint has its records."""
    compute(plan, "dense")
    dense = plan.phases[0]
    folder = plan.phase_folder(dense)
    (folder / HISTORY).write_text("")
    History(folder / HISTORY).append([record(1)])
    run = opened(uri, plan)
    assert phases_of(uri, run.run_id)["dense"].info.status == "RUNNING"
    run_id = run.run_id
    del run
    checkpoint = folder / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "manifest.json", {})
    (checkpoint / "records.jsonl").write_text(json.dumps(evaluated(100)) + "\n")
    write_json(plan.run_folder / PLAN, plan.to_dict())
    reconcile(plan.job.storage_folder)
    assert [step for step, _ in points(uri, run_id, "train/loss")] == [1, 100]
    assert points(uri, phases_of(uri, run_id)["dense"].info.run_id, "eval/accuracy") == [(100, 0.5)]


def test_one_run_that_is_gone_or_away_keeps_no_other_from_its_end(uri: str, plan: Plan) -> None:
    others = [replace(plan, place=f"{name}-run") for name in ("a", "b", "c")]
    ids = [left(uri, other) for other in others]
    build_client(uri).delete_run(ids[0])
    write_json(others[1].run_folder / RUN, {"uri": "http://127.0.0.1:9", "run_id": ids[1], "open": True})
    assert [each.run_id for each in reconcile(plan.job.storage_folder)] == [ids[2]]


def test_a_run_of_another_machine_is_left_alone(uri: str, plan: Plan) -> None:
    """It was brought here from a bucket."""
    run_id = left(uri, plan)
    known = read_json(plan.run_folder / RUN) or {}
    write_json(plan.run_folder / RUN, {**known, "storage_id": "another"})
    assert reconcile(plan.job.storage_folder) == []
    assert status(uri, run_id) == "RUNNING"


# ------------------------------------------------------------------------------------------------- a store that fails


FAILING = ["create_run", "log_batch", "search_runs", "set_terminated", "set_tag", "get_run"]


@pytest.mark.parametrize("applied", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("call", FAILING)
def test_a_request_that_fails_doubles_and_loses_nothing(
    uri: str, plan: Plan, monkeypatch: pytest.MonkeyPatch, call: str, applied: bool
) -> None:
    from mlflow import MlflowClient

    whole = getattr(MlflowClient, call)
    failures = []

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if applied:
            whole(self, *args, **kwargs)
        failures.append(call)
        monkeypatch.setattr(MlflowClient, call, whole)
        raise ConnectionError("reset by peer")

    compute(plan, "dense", "sparse-1", "redense-1")
    monkeypatch.setattr(MlflowClient, call, fail)
    own = TrackedRun(uri, plan, COMMAND)
    while not own.run_id or own._tree is None:
        try:
            own.open()
        except RunError:
            continue
    assert own.end("FINISHED")
    assert failures == [call]
    client = build_client(uri)
    (found,) = client.search_runs(["1"], f"tags.`temper.kind` = 'run' and tags.`temper.storage` = '{plan.job.storage}'")
    assert found.info.run_id == own.run_id
    phases = phases_of(uri, own.run_id)
    assert {name: each.info.status for name, each in phases.items()} == dict.fromkeys(phases, "FINISHED")
    assert sorted(phases) == ["dense", "redense-1", "sparse-1"]
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{own.run_id}'")
    assert len(children) == 3
    told = json.loads(client.get_run(own.run_id).data.tags["temper.phases"])
    assert [each["run_id"] for each in told] == [phases[phase.name].info.run_id for phase in plan.phases]
    for each in phases.values():
        assert len(points(uri, each.info.run_id, "eval/accuracy")) == 1
        assert each.data.params["phase.steps"]


def test_a_job_of_very_many_phases_is_told_whole() -> None:
    phases = [{"name": f"sparse-{number}", "fingerprint": "f" * 64, "steps": number} for number in range(300)]
    tags = phases_tags(phases)
    assert len(tags) > 1 and max(map(len, tags.values())) <= 8000
    assert told_phases(tags) == phases
    assert told_phases({}) == []
