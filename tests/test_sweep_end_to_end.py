"""`temper sweep`, the real thing: an embedded Ray, Ray Tune, worker groups, an MLflow database."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch
import yaml

from sweep_runs import (
    PHASES,
    all_runs,
    by_params,
    check_same_trials,
    check_tree,
    children_of,
    client_of,
    distinct_phases,
    dsd_job,
    finish,
    grid,
    ledger,
    measured,
    points,
    processes_of,
    slow_job,
    start,
    sweep,
    trained_state,
    wait_until,
    write_space,
)
from temper.checkpoint import MASTER
from temper.plan.metric_names import without_classes

pytestmark = pytest.mark.ray

RATES, SPARSITIES = (0.01, 0.02), (0.3, 0.5, 0.7)
SIX = {"optimizer.lr": grid(*RATES), "dsd.rounds.0.sparsity": grid(*SPARSITIES)}

Swept = tuple[Path, dict[str, Any], str]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Six trials with two dense phases among them."""
    path = write_space(tmp_path_factory.mktemp("six"), dsd_job(), SIX)
    return path.parent, *sweep(path)


def test_result_of_a_sweep(six: Swept) -> None:
    _, result, err = six
    assert result["status"] == "finished"
    assert [trial["id"] for trial in result["trials"]] == [f"t00{number}" for number in range(6)]
    assert [tuple(trial["params"].values()) for trial in result["trials"]] == [
        (rate, sparsity) for rate in RATES for sparsity in SPARSITIES
    ]
    for trial in result["trials"]:
        assert (trial["status"], trial["steps"]) == ("finished", 24)
        assert tuple(phase["name"] for phase in trial["phases"]) == PHASES
        assert trial["metrics"]["test/accuracy"] > 0.3
        assert trial["phases"][1]["metrics"]["sparsity"] == pytest.approx(
            trial["params"]["dsd.rounds.0.sparsity"], abs=0.01
        )
    assert (result["phases_run"], result["phases_reused"], result["steps_run"]) == (14, 4, 2 * 12 + 6 * 12)
    assert len(distinct_phases(result["trials"])) == 14
    computed = [phase for trial in result["trials"] for phase in trial["phases"] if not phase["reused"]]
    assert len(computed) == len({phase["fingerprint"] for phase in computed}) == 14
    best = max(result["trials"], key=lambda trial: trial["metrics"]["eval/accuracy"])
    assert result["best"]["id"] == best["id"]
    assert result["undelivered"] == []
    assert result["left_behind"].startswith("left behind: nothing (0 actors, 0 placement groups, ")
    assert result["left_behind"] in err


def test_a_trial_is_what_temper_train_computes(six: Swept, tmp_path: Path) -> None:
    folder, result, _ = six
    trial = result["trials"][4]
    overrides = [f"{name}={value}" for name, value in trial["params"].items()]
    job = tmp_path / "job.yaml"
    job.write_text((folder / "job.yaml").read_text())
    code, alone, err = finish(start("train", job, *overrides))
    assert code == 0, err
    assert [phase["fingerprint"] for phase in alone["phases"]] == [phase["fingerprint"] for phase in trial["phases"]]
    for phase, own in zip(trial["phases"], alone["phases"], strict=True):
        assert measured(phase["metrics"]) == measured(own["metrics"])
        found, expected = (trained_state(at / "runs", own["fingerprint"]) for at in (folder, tmp_path))
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    metrics = measured(trial["metrics"])
    assert metrics.pop("parameters_left") == 1210 - round(metrics["sparsity"] * (64 * 16 + 16 * 10))
    assert metrics == without_classes(measured(alone["metrics"]))


def test_the_tree_in_mlflow(six: Swept) -> None:
    folder, result, _ = six
    check_tree(folder, result)
    runs = {run.info.run_id: run for run in children_of(folder, result["parent_run_id"])}
    computed_by = {
        phase["fingerprint"]: trial["run_id"]
        for trial in result["trials"]
        for phase in trial["phases"]
        if not phase["reused"]
    }
    for trial in result["trials"]:
        run = runs[trial["run_id"]]
        assert run.data.params["optimizer.lr"] == str(trial["params"]["optimizer.lr"])
        assert run.data.params["sweep.optimizer.lr"] == str(trial["params"]["optimizer.lr"])
        known = {each.data.tags["temper.phase"]: each for each in children_of(folder, trial["run_id"])}
        assert set(known) == {phase["name"] for phase in trial["phases"]}
        for phase in trial["phases"]:
            tags = known[phase["name"]].data.tags
            assert tags["temper.fingerprint"] == phase["fingerprint"]
            assert tags["temper.reused"] == str(phase["reused"]).lower()
            assert tags.get("temper.computed_by", trial["run_id"]) == computed_by[phase["fingerprint"]]
        found = points(folder, trial["run_id"], "eval/accuracy")
        assert [step for step, _ in found] == [4, 8, 12, 16, 18, 20, 24]
        assert found[-1][1] == trial["metrics"]["eval/accuracy"]
    # What two trials share is the same in both, from whomever it comes.
    first, second = (points(folder, trial["run_id"], "train/loss") for trial in result["trials"][:2])
    assert first[:12] == second[:12]
    assert first[12:] != second[12:]
    parent = next(run for run in all_runs(folder) if run.info.run_id == result["parent_run_id"])
    assert parent.data.metrics["best/eval/accuracy"] == result["best"]["metrics"]["eval/accuracy"]
    assert parent.data.tags["temper.best.run_id"] == result["best"]["run_id"]


def test_the_winner_is_exported_and_registered(six: Swept) -> None:
    from safetensors.torch import load_file

    folder, result, _ = six
    best = result["best"]
    assert {path.name for path in Path(best["folder"]).iterdir()} == {"model.safetensors", "job.yaml", "README.md"}
    weights = load_file(Path(best["folder"]) / "model.safetensors")
    state = trained_state(folder / "runs", best["phases"][-1]["fingerprint"])
    assert weights.keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert [name for name, value in weights.items() if not torch.equal(value, state[f"{MASTER}/{name}"])] == []
    version = client_of(folder).get_model_version_by_alias("little", "champion")
    assert version.run_id == best["run_id"]
    assert (best["registered"], best["alias"]) == (f"models:/little/{version.version}", "champion")
    assert version.tags["temper.metric.eval/accuracy"] == repr(best["metrics"]["eval/accuracy"])
    assert version.tags["temper.loadable"] == "true"


def test_the_printed_line_repeats_the_winner(six: Swept) -> None:
    folder, result, err = six
    line = next(line.strip() for line in err.splitlines() if line.strip().startswith("temper train"))
    words = shlex.split(line)
    done = subprocess.run(
        [sys.executable, "-m", *words, "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["status"] == "reused"
    assert [phase["fingerprint"] for phase in again["phases"]] == [
        phase["fingerprint"] for phase in result["best"]["phases"]
    ]


def test_the_same_sweep_again_starts_nothing(six: Swept) -> None:
    folder, result, _ = six
    runs = {run.info.run_id for run in all_runs(folder)}
    again, err = sweep(folder / "space.yaml")
    assert again["status"] == "reused"
    assert again["trials"] == result["trials"]
    assert (again["best"], again["parent_run_id"]) == (result["best"], result["parent_run_id"])
    assert again["steps_run"] == 0
    assert again["left_behind"] == "left behind: nothing was started"
    assert "starting" not in err
    assert {run.info.run_id for run in all_runs(folder)} == runs


def test_every_problem_of_a_space_is_named(tmp_path: Path) -> None:
    wrong = {"dsd.rounds.0.sparsty": grid(0.5), "optimizer.lr": grid(0.1, -1.0)}
    code, result, err = finish(start("sweep", write_space(tmp_path, dsd_job(), wrong)))
    assert code == 2
    assert result["status"] == "refused"
    assert len(result["problems"]) == 2
    for problem, texts in zip(
        sorted(result["problems"]), (("sparsty", "sparsity"), ("optimizer.lr", "-1.0")), strict=True
    ):
        assert all(text in problem for text in texts)
        assert problem in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------ longer proofs


@pytest.mark.slow
def test_trials_that_fail_and_diverge_leave_the_others_alone(tmp_path: Path) -> None:
    job = dsd_job(
        model={"kind": "python", "target": "fragile_net:build", "args": {"breaks": False}},
        optimizer={"kind": "sgd", "lr": 0.1},
        dsd=None,
    )
    space = {"model.args.breaks": grid(False, True), "optimizer.lr": grid(0.1, 1.0e38, 0.2)}
    result, err = sweep(write_space(tmp_path, job, space))
    trials = {tuple(trial["params"].values()): trial for trial in result["trials"]}
    assert {key: trial["status"] for key, trial in trials.items()} == {
        (False, 0.1): "finished",
        (False, 0.2): "finished",
        (False, 1.0e38): "diverged",
        **{(True, rate): "failed" for rate in (0.1, 0.2, 1.0e38)},
    }
    assert "is not finite" in trials[False, 1.0e38]["reason"]
    for rate in (0.1, 0.2):
        assert "this network breaks on purpose" in trials[True, rate]["reason"]
        assert trials[False, rate]["steps"] == 12
    assert result["best"]["params"]["model.args.breaks"] is False
    assert "Traceback" not in err
    runs = children_of(tmp_path, result["parent_run_id"])
    status = {run.info.run_id: run.info.status for run in runs}
    reasons = {run.info.run_id: run.data.tags.get("temper.trial.reason", "") for run in runs}
    for trial in result["trials"]:
        assert status[trial["run_id"]] == ("FINISHED" if trial["status"] == "finished" else "FAILED")
        assert reasons[trial["run_id"]] == trial["reason"]
    assert result["left_behind"].startswith("left behind: nothing")


@pytest.mark.slow
def test_without_reuse_every_bit_is_the_same(six: Swept, tmp_path: Path) -> None:
    result, _ = sweep(write_space(tmp_path, dsd_job(), SIX, reuse=False))
    check_same_trials(result, six[1])
    assert (result["phases_run"], result["phases_reused"], result["steps_run"]) == (18, 0, 6 * 24)
    assert not any(phase["reused"] for trial in result["trials"] for phase in trial["phases"])
    assert not (tmp_path / "runs" / "phases").exists()


@pytest.mark.slow
def test_what_all_trials_share_is_computed_first(tmp_path: Path) -> None:
    """A teacher, its cache and the dense phase; the children of the sweep's run are those of all of them."""
    teacher = dsd_job(name="tiny_teacher", dsd=None, model={"kind": "mlp", "hidden": [32]})
    distill = {"teacher": "teacher.yaml", "temperature": 2.0, "alpha": 0.9, "cache": "logits"}
    space = {"dsd.rounds.0.sparsity": grid(0.3, 0.6), "dsd.redense_lr_factor": grid(0.1, 1.0)}
    path = write_space(tmp_path, dsd_job(distill=distill), space)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    result, _ = sweep(path)
    check_tree(tmp_path, result, "shared", "teacher")
    assert (result["phases_run"], result["steps_run"]) == (1 + 2 + 4, 12 + 2 * 6 + 4 * 6)
    assert result["phases_reused"] == 4 + 2
    (shared,) = [
        run.info.run_id
        for run in children_of(tmp_path, result["parent_run_id"])
        if run.data.tags["temper.kind"] == "shared"
    ]
    dense = [
        phase.data.tags["temper.computed_by"]
        for trial in result["trials"]
        for phase in children_of(tmp_path, trial["run_id"])
        if phase.data.tags["temper.phase"] == "dense"
    ]
    assert dense == [shared] * 4
    assert [step for step, _ in points(tmp_path, shared, "train/loss")] == list(range(1, 13))


@pytest.mark.slow
def test_two_sweeps_on_one_cluster_compute_a_common_phase_once(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        paths = [
            write_space(
                tmp_path / name,
                slow_job(storage=str(tmp_path / "runs")),
                {"dsd.rounds.0.sparsity": grid(*sparsities), "dsd.redense_lr_factor": grid(0.1, 1.0)},
                name=name,
                concurrency=1,
            )
            for name, sparsities in (("one", (0.3, 0.5)), ("two", (0.5, 0.7)))
        ]
        both = [start("sweep", path, "--address", cluster.address) for path in paths]
        results = []
        for code, result, err in map(finish, both):
            assert code == 0, err
            results.append(result)
    finally:
        cluster.shutdown()
    # The dense phase, three sparse ones and two re-dense ones for each of them.
    assert sum(result["phases_run"] for result in results) == 1 + 3 + 6
    assert sum(result["steps_run"] for result in results) == 20 + 3 * 10 + 6 * 10
    common = [{key: measured(t["metrics"]) for key, t in by_params(result).items()} for result in results]
    shared = common[0].keys() & common[1].keys()
    assert len(shared) == 2
    assert all(common[0][key] == common[1][key] for key in shared)
    assert all(result["left_behind"].startswith("left behind: nothing (0 actors") for result in results)


DRAWN = {
    "optimizer.lr": {"kind": "loguniform", "low": 1.0e-4, "high": 0.05},
    "dsd.rounds.0.sparsity": {"kind": "uniform", "low": 0.2, "high": 0.8},
}


@pytest.mark.slow
def test_asha_stops_none_before_its_first_rung(tmp_path: Path) -> None:
    scheduler = {"kind": "asha", "reduction_factor": 2, "rungs": [0.5, 1.0]}
    search = {"kind": "random"}
    result, _ = sweep(write_space(tmp_path, dsd_job(), DRAWN, search=search, scheduler=scheduler, budget={"trials": 8}))
    statuses = [trial["status"] for trial in result["trials"]]
    assert set(statuses) == {"finished", "stopped"}
    for trial in result["trials"]:
        if trial["status"] == "finished":
            assert trial["steps"] == 24
        else:
            # Half of the dense phase is step 6, and the first evaluation after that comes at step 8.
            assert 8 <= trial["steps"] < 24
    assert result["best"]["status"] == "finished"
    assert result["steps_run"] == sum(trial["steps"] for trial in result["trials"])
    runs = {run.info.run_id: run for run in children_of(tmp_path, result["parent_run_id"])}
    for trial in result["trials"]:
        assert runs[trial["run_id"]].info.status == ("FINISHED" if trial["status"] == "finished" else "KILLED")
        losses = points(tmp_path, trial["run_id"], "train/loss")
        assert [step for step, _ in losses] == list(range(1, trial["steps"] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hyperband", "pbt"])
def test_other_schedulers_come_to_their_end(kind: str, tmp_path: Path) -> None:
    scheduler = {"kind": kind, **({"reduction_factor": 2} if kind == "hyperband" else {"quantile": 0.5})}
    space = {**DRAWN, "dsd.redense_lr_factor": {"kind": "loguniform", "low": 0.03, "high": 1.0}}
    search, budget = {"kind": "random"}, {"trials": 4}
    path = write_space(tmp_path, dsd_job(), space, search=search, scheduler=scheduler, budget=budget)
    result, _ = sweep(path)
    assert {trial["status"] for trial in result["trials"]} <= {"finished", "stopped"}
    finished = [trial for trial in result["trials"] if trial["status"] == "finished"]
    assert all(trial["steps"] == 24 for trial in finished)
    assert len(result["trials"]) >= 4
    if kind == "pbt":
        assert len(finished) == 4
    best = max(finished, key=lambda trial: trial["metrics"]["eval/accuracy"])
    assert result["best"]["metrics"]["eval/accuracy"] == best["metrics"]["eval/accuracy"]
    assert result["left_behind"].startswith("left behind: nothing (0 actors")
    again, _ = sweep(path)
    assert (again["status"], again["trials"]) == ("reused", result["trials"])


@dataclass(frozen=True)
class Use:
    """What a process has of the machine."""

    memory: int
    threads: int
    files: int

    @classmethod
    def of(cls, process: psutil.Process) -> Use:
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_threads(), process.num_fds())

    @classmethod
    def least(cls, uses: list[Use]) -> Use:
        return cls(*(min(getattr(use, name) for use in uses) for name in ("memory", "threads", "files")))


@pytest.mark.slow
def test_forty_trials_leave_nothing_in_the_processes(tmp_path: Path) -> None:
    rates = [round(0.001 * number, 3) for number in range(1, 41)]
    job = dsd_job(dsd=None, budget={"steps": 3})
    process = start("sweep", write_space(tmp_path, job, {"optimizer.lr": grid(*rates)}, concurrency=1))
    uses: dict[str, dict[int, Use]] = {"RayTrainWorker": {}, "Coordinator": {}}
    for ended in range(18, 39):
        wait_until(process, lambda ended=ended: sum(trial.end != "" for trial in ledger(tmp_path)) >= ended, str(ended))
        for kind, known in uses.items():
            (actor,) = processes_of(process, kind)
            known[ended] = Use.of(actor)
    code, result, err = finish(process)
    assert code == 0, err
    assert len(result["trials"]) == 40
    for kind, known in uses.items():
        early, late = (Use.least([known[ended] for ended in part]) for part in (range(18, 24), range(33, 39)))
        assert late.threads <= early.threads, kind
        assert late.files <= early.files, kind
        # The allocator takes some MB at once now and then, which is no leak: a trial as such takes next to nothing.
        grown = [known[ended + 1].memory - known[ended].memory for ended in range(18, 38)]
        assert median(grown) < 2**18, (kind, grown)
        assert sum(grown) < 2**24, (kind, grown)
