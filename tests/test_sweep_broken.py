"""Sweeps whose processes are killed in their midst, and that go on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from sweep_runs import (
    all_runs,
    check_same_trials,
    check_tree,
    finish,
    grid,
    ledger,
    processes_of,
    recorded_steps,
    slow_job,
    start,
    sweep,
    wait_until,
    write_space,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEED = int(os.environ.get("TEMPER_CHAOS_SEED", "0"))
FOUR = {"optimizer.lr": grid(0.003, 0.006), "dsd.rounds.0.sparsity": grid(0.3, 0.6)}
STEPS = 2 * 20 + 4 * 20
"""Two dense phases, and four times the other two."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_space(tmp_path_factory.mktemp("unbroken"), slow_job(), FOUR)
    result, _ = sweep(path)
    check_tree(path.parent, result)
    assert (result["phases_run"], result["steps_run"]) == (10, STEPS)
    return result


def check_whole(folder: Path, result: dict[str, Any], unbroken: dict[str, Any]) -> None:
    """The unbroken sweep's trials and results, in one tree; no phase was computed by two trials."""
    check_same_trials(result, unbroken)
    check_tree(folder, result)
    computed = [phase["fingerprint"] for trial in result["trials"] for phase in trial["phases"] if not phase["reused"]]
    assert len(computed) == len(set(computed))
    assert recorded_steps(folder) == STEPS
    assert result["left_behind"].startswith("left behind: nothing (0 actors")


def test_a_killed_driver_is_resumed(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    path = write_space(tmp_path, slow_job(), FOUR)
    process = start("sweep", path)
    # One trial has ended, and others are in their midst.
    wait_until(process, lambda: any(trial.end for trial in ledger(tmp_path)), "the first trial's end")
    after = recorded_steps(tmp_path) + random.Random(SEED).randint(2, 15)
    wait_until(process, lambda: recorded_steps(tmp_path) >= after, "some steps more")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {trial.id: trial for trial in ledger(tmp_path)}
    result, _ = sweep(path)
    check_whole(tmp_path, result, unbroken)
    # What had ended was not begun again, and what had been trained up to a checkpoint was not trained again.
    for trial in ledger(tmp_path):
        known = before.get(trial.id)
        if known is not None and known.end:
            assert (trial.results, trial.end, trial.computed) == (known.results, known.end, known.computed)
    assert result["phases_run"] == unbroken["phases_run"]
    assert result["steps_run"] < STEPS - after + 2 * 5 + 1


def test_a_killed_worker_takes_nothing_with_it(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    path = write_space(tmp_path, slow_job(), FOUR)
    process = start("sweep", path)
    after = random.Random(SEED + 1).randint(8, 60)
    wait_until(process, lambda: recorded_steps(tmp_path) >= after, f"step {after}")
    victim = random.Random(SEED).choice(processes_of(process, "RayTrainWorker"))
    os.kill(victim.pid, signal.SIGKILL)
    code, result, err = finish(process)
    assert code == 0, err
    check_whole(tmp_path, result, unbroken)


def test_a_claim_dies_with_its_holder(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    path = write_space(tmp_path, slow_job(), FOUR)
    holder = start("train", path.with_name("job.yaml"), "optimizer.lr=0.003", "dsd.rounds.0.sparsity=0.3")
    wait_until(holder, lambda: recorded_steps(tmp_path) >= 6, "the holder's step 6")
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        process = start("sweep", path)
        # The trials of the other dense phase go on meanwhile.
        wait_until(process, lambda: sum(trial.end != "" for trial in ledger(tmp_path)) == 2, "the end of two trials")
    finally:
        os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    code, result, err = finish(process)
    assert code == 0, err
    check_same_trials(result, unbroken)


def test_an_interrupted_sweep_goes_on(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    path = write_space(tmp_path, slow_job(), FOUR)
    process = start("sweep", path)
    wait_until(process, lambda: recorded_steps(tmp_path) >= 30, "step 30")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
    done = recorded_steps(tmp_path)
    assert done < STEPS
    statuses = {run.info.status for run in all_runs(tmp_path)}
    assert "RUNNING" not in statuses
    result, _ = sweep(path)
    check_whole(tmp_path, result, unbroken)
    # Every trial had saved its state: no step was lost.
    assert result["steps_run"] == STEPS - done


DRAWN = {
    "optimizer.lr": {"kind": "loguniform", "low": 1.0e-4, "high": 0.05},
    "dsd.rounds.0.sparsity": {"kind": "uniform", "low": 0.2, "high": 0.8},
}
ASHA = {
    "search": {"kind": "random"},
    "scheduler": {"kind": "asha", "reduction_factor": 2, "rungs": [0.5, 1.0]},
    "budget": {"trials": 6},
}
TPE = {"search": {"kind": "tpe", "startup_trials": 2}, "budget": {"trials": 6}}


@pytest.mark.parametrize("searched", [ASHA, TPE], ids=["asha", "tpe"])
def test_a_killed_search_comes_to_the_same_trials(searched: dict[str, Any], tmp_path: Path) -> None:
    """One at a time, the order of results is no matter of chance: the sweep that was broken decides as the unbroken."""
    paths = [
        write_space(tmp_path / name, slow_job(0.02), DRAWN, concurrency=1, **searched) for name in ("whole", "broken")
    ]
    expected, _ = sweep(paths[0])
    folder = paths[1].parent
    process = start("sweep", paths[1])
    wait_until(process, lambda: sum(trial.end != "" for trial in ledger(folder)) == 3, "the end of three trials")
    after = recorded_steps(folder) + 5
    wait_until(process, lambda: recorded_steps(folder) >= after, "some steps more")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {trial.id: trial for trial in ledger(folder) if trial.end}
    result, _ = sweep(paths[1])
    check_same_trials(result, expected)
    for trial in ledger(folder):
        if trial.id in before:
            assert (trial.results, trial.end) == (before[trial.id].results, before[trial.id].end)
    assert recorded_steps(folder) == recorded_steps(paths[0].parent)
    if searched is ASHA:
        assert {trial["status"] for trial in result["trials"]} == {"finished", "stopped"}
