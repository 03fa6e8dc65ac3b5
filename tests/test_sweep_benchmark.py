"""The comparisons of sweeps: what is computed of seconds, steps, metrics and processes is right. No Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from temper.config.load import load_job
from temper.config.space import SpaceConfig, Variable
from temper.config.space_load import load_space
from temper.files import read_lines

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import process_tree  # noqa: E402
import ray_guide_sweep as guide  # noqa: E402
import search_experiment as search  # noqa: E402
import sweep  # noqa: E402
from process_tree import Growth, Sample, Usage  # noqa: E402
from search_experiment import Meter, Point, Search, Steps  # noqa: E402


def space_of(**variables: dict[str, Any]) -> SpaceConfig:
    values = {"name": "s", "job": "j.yaml", "search": {"kind": "grid"}, "space": variables}
    return SpaceConfig.model_validate({**values, "objectives": [{"metric": "eval/loss", "mode": "min"}]})


# --------------------------------------------------------------------------------------------------------- Ray's guide


def test_the_guide_has_a_trial_for_every_point() -> None:
    settings = {"low": {"optimizer.lr": 0.1}, "high": {"optimizer.lr": 0.5, "optimizer.momentum": 0.9}}
    space = space_of(seed={"kind": "grid", "values": [0, 1]}, speed={"kind": "grid", "settings": settings})
    trials = guide.grid_trials(space, ["distill.cache=none"])
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert [trial.params for trial in trials] == [
        {"seed": seed, "speed": speed} for seed in (0, 1) for speed in ("low", "high")
    ]
    assert set(trials[3].overrides) == {"optimizer.lr=0.5", "optimizer.momentum=0.9", "seed=1", "distill.cache=none"}


def test_the_guide_has_grids_only() -> None:
    space = space_of(seed={"kind": "randint", "low": 0, "high": 3})
    with pytest.raises(ValueError, match="seed: only grids"):
        guide.grid_trials(space)


def test_the_shipped_sweep_has_24_trials_that_load() -> None:
    space, _ = load_space(sweep.SPACE)
    trials = guide.grid_trials(space)
    assert len({sweep.params_key(trial.params) for trial in trials}) == 24
    setting = guide.Setting(ROOT / "jobs" / "digits_student_dsd.yaml", Path("/tmp/s"), 2, ())
    job = setting.load(trials[-1])
    assert (job.seed, job.distill and job.distill.temperature) == (1, 4.0)
    assert job.dsd is not None and job.dsd.rounds[0].sparsity == 0.9
    assert job.storage == "/tmp/s/trial-23"


def test_all_workers_and_functions_of_the_guide_have_room() -> None:
    for cpus in (1, 2, 16):
        assert cpus * (guide.worker_cpus(cpus) + guide.DRIVER_CPUS) <= cpus + 1e-9


def test_the_last_report_is_the_trials_result() -> None:
    last = {"metrics": {"eval/loss": 0.5}, "step": 400, "time_total_s": 20.0, "first_step_s": 11.0, "trial_id": "x"}
    found = guide.trial_result(guide.Trial(3, {"seed": 1}, ()), last)
    assert found == guide.TrialResult({"seed": 1}, {"eval/loss": 0.5}, 400, 20.0, 11.0)


# ------------------------------------------------------------------------------------------------------ the comparison


def trial_of(number: int, phases: dict[str, int], start_s: float | None = 0.5) -> dict[str, Any]:
    return {
        "id": f"t{number:03d}",
        "params": {"seed": number},
        "metrics": {},
        "phases": [{"fingerprint": name, "steps": steps} for name, steps in phases.items()],
        "time_to_first_step_s": start_s,
    }


SWEPT = [trial_of(0, {"dense": 300, "a": 100}, 0.25), trial_of(1, {"dense": 300, "b": 100}, 0.75)]


def test_steps_are_those_of_distinct_phases() -> None:
    found = sweep.temper_side({"trials": SWEPT, "phases_run": 3, "steps_run": 500}, 10.0)
    assert found == sweep.Side(trials=2, seconds=10.0, steps=500, start_s=0.5)


@pytest.mark.parametrize(("phases", "steps"), [(4, 500), (3, 600)])
def test_what_was_computed_twice_is_no_result(phases: int, steps: int) -> None:
    with pytest.raises(RuntimeError, match=r"distinct ones of the trials: \(3, 500\)"):
        sweep.temper_side({"trials": SWEPT, "phases_run": phases, "steps_run": steps}, 10.0)


def test_the_ratios_are_per_trial() -> None:
    trials = [{"time_to_first_step_s": 12.0}, {"time_to_first_step_s": 14.0}]
    others = sweep.guide_side({"trials": trials, "steps": 800}, 40.0)
    assert others == sweep.Side(2, 40.0, 800, 13.0)
    ours = sweep.Side(trials=4, seconds=10.0, steps=800, start_s=0.5)
    ratio = sweep.ratios(ours, others)
    assert ratio == {"time": 0.125, "steps": 0.5}
    assert sweep.met(ratio, ours.start_s) == {"time": True, "steps": True, "start": True}
    assert sweep.met({"time": 0.21, "steps": 0.51}, 1.1) == {"time": False, "steps": False, "start": False}
    assert sweep.met(ratio, None)["start"] is False


def test_metrics_are_compared_bit_for_bit() -> None:
    alone = {"eval/loss": 0.1 + 0.2, "train/loss": float("nan"), "time/step_s": 0.01}
    same = {"eval/loss": 0.1 + 0.2, "train/loss": float("nan"), "time/step_s": 0.02, "parameters_left": 10.0}
    assert sweep.differing(same, alone) == {}
    assert sweep.differing({**same, "eval/loss": 0.3}, alone) == {"eval/loss": [0.3, 0.1 + 0.2]}
    assert sweep.differing({"train/loss": float("nan")}, alone) == {"eval/loss": [None, 0.1 + 0.2]}


def test_trials_are_matched_by_their_params() -> None:
    ours = [
        {"params": {"a": 1, "b": 2.0}, "metrics": {"x": 1.0}},
        {"params": {"a": 2, "b": 2.0}, "metrics": {"x": 2.0}},
    ]
    others = [
        {"params": {"b": 2.0, "a": 2}, "metrics": {"x": 2.5}},
        {"params": {"b": 2.0, "a": 1}, "metrics": {"x": 1.0}},
    ]
    found = sweep.compare(sweep.by_params(ours), sweep.by_params(others))
    assert found == {'{"a": 2, "b": 2.0}': {"x": [2.0, 2.5]}}
    assert sweep.compare(sweep.by_params(ours), sweep.by_params(others[1:])) == {}


def test_the_trials_to_be_checked_lie_evenly() -> None:
    assert sweep.evenly(range(24), 4) == [0, 8, 15, 23]
    assert sweep.evenly(range(3), 4) == [0, 1, 2]
    assert sweep.evenly(range(24), 1) == [0]
    assert sweep.evenly(range(24), 0) == []


def test_the_table_says_what_was_run() -> None:
    guide_side, ours = sweep.Side(3, 60.0, 1200, 12.0), sweep.Side(24, 50.0, 4200, None)
    ratio = sweep.ratios(ours, guide_side)
    report = {
        "space": "s.yaml",
        "cores": 2,
        "guide": vars(guide_side),
        "temper": vars(ours),
        "ratios": ratio,
        "targets": {"time": 0.2, "steps": 0.5, "start_s": 1.0},
        "met": sweep.met(ratio, None),
        "checked_alone": 4,
        "differing_from_alone": {"{}": {"eval/loss": [0.1, 0.2]}},
        "checked_guide": 3,
        "differing_from_guide": {},
    }
    text = sweep.comparison_table(report)
    assert "3 in the guide's way, 24 of temper sweep" in text
    assert "the same bits as alone by temper train: 3 of 4 trials" in text
    assert "eval/loss 0.1, alone by temper train 0.2" in text
    assert "the same bits as in the guide's way: 3 of 3 trials" in text
    assert "The ratios are per trial" in text
    assert text.count("MISSED") == 1 and text.count(", met") == 2


# --------------------------------------------------------------------------------------------------------- many trials


def test_the_many_trials_are_a_space_of_a_job(tmp_path: Path) -> None:
    space, _ = load_space(sweep.write_many(tmp_path / "many", 200))
    trials = guide.grid_trials(space)
    assert len(trials) == 200
    assert load_job(tmp_path / "many" / "job.yaml", trials[-1].overrides).seed == 199


def test_trials_that_have_ended_are_counted(tmp_path: Path) -> None:
    assert sweep.ended_trials(tmp_path) == 0
    ledger = tmp_path / "sweeps" / "many-0123456789" / "trials.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.write_text('{"trial": "t0", "params": {}}\n{"trial": "t0", "end": "finished", "reason": ""}\n')
    assert len(read_lines(ledger)) == 2
    assert sweep.ended_trials(tmp_path) == 1


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::TrainController"], "TrainController"),
        (["ray::Coordinator.next_task()"], "Coordinator"),
        (["ray::IDLE", ""], "IDLE"),
        (["/a/python", "-u", "/b/ray/dashboard/dashboard.py", "--host=127.0.0.1"], "dashboard.py"),
        (["/a/ray/core/src/ray/raylet/raylet", "--x=/y.py"], "raylet"),
        ([], "?"),
    ],
)
def test_processes_are_told_apart(command: list[str], role: str) -> None:
    assert process_tree.role_of(command) == role


def test_the_usage_of_a_process_and_its_children() -> None:
    others = sum(usage.processes for usage in process_tree.usage_by_role(os.getpid()).values())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        roles = process_tree.usage_by_role(os.getpid())
    finally:
        child.communicate(b"\n")
    assert roles["driver"].processes == 1
    assert sum(usage.processes for usage in roles.values()) == others + 1
    assert roles["driver"].resident_mib > roles["driver"].private_mib > 1
    assert roles["driver"].threads >= 1 and roles["driver"].descriptors >= 3


def sample(trials: int, **roles: Usage) -> Sample:
    return Sample(trials, roles)


def test_growth_is_a_line_through_the_later_samples() -> None:
    start = sample(0, driver=Usage(1, 900.0, 900.0, 50, 100))
    later = [
        sample(number, driver=Usage(1, 100.0 + number / 50, 40.0, 10, 30), worker=Usage(2, 300.0, 200.0, 20, 60))
        for number in (50, 100, 150, 200)
    ]
    found = process_tree.growths([start, *later], 50)
    assert set(found) == {"all", "driver", "worker"}
    assert found["driver"]["resident_mib"].per_100_trials == pytest.approx(2.0)
    assert found["driver"]["resident_mib"].median == pytest.approx(102.5)
    assert found["all"]["resident_mib"].share == pytest.approx(2.0 / 402.5)
    assert found["worker"]["descriptors"] == Growth(0.0, 60)
    assert sweep.is_flat(found["all"])


def test_a_leak_is_not_flat() -> None:
    # One descriptor a trial, on top of a hundred.
    leaking = [sample(number, worker=Usage(1, 100.0, 50.0, 10, 100 + number)) for number in range(0, 201, 20)]
    found = process_tree.growths(leaking, 0)
    assert found["all"]["descriptors"].per_100_trials == pytest.approx(100.0)
    assert not sweep.is_flat(found["all"])


def test_a_process_that_comes_and_goes_has_no_growth_of_its_own() -> None:
    samples = [sample(1, driver=Usage(1)), sample(2, driver=Usage(1), IDLE=Usage(1)), sample(3, driver=Usage(1))]
    assert set(process_tree.growths(samples, 0)) == {"all", "driver"}
    assert Growth(0.0, 0.0).share == 0.0


# ------------------------------------------------------------------------------------------------------------ searches

PHASES = {"t0": [("dense", 100), ("a", 50)], "t1": [("dense", 100)], "t2": [("dense", 100), ("a", 50), ("c", 50)]}


def result(trial: str, step: int, value: float = 0.0, *, done: bool = False) -> dict[str, Any]:
    return {"trial": trial, "result": {"step": step, "done": done, "eval/accuracy": value}}


def test_a_phase_counts_once_in_a_search() -> None:
    meter = Meter(PHASES)
    found = []
    for trial, step in [("t0", 50), ("t1", 100), ("t0", 100), ("t1", 125), ("t0", 150), ("t2", 150), ("t2", 200)]:
        meter.reach(trial, step)
        found.append(meter.steps)
    # `t1` trains the dense phase on and 25 steps of its own; `t2` has the first 150 steps from the others.
    assert found == [50, 100, 100, 125, 175, 175, 225]


def test_a_search_has_a_point_for_each_trial_that_finished() -> None:
    ledger = [
        {"trial": "t0", "params": {}},
        result("t0", 100, 0.5),
        result("t0", 150, 0.7, done=True),
        {"trial": "t0", "end": "finished", "reason": ""},
        result("t1", 120, 0.9),
        {"trial": "t1", "end": "stopped", "reason": ""},
        result("t2", 200, 0.8, done=True),
    ]
    points, steps = search.finishes(ledger, PHASES, "eval/accuracy")
    assert points == [Point(150, 0.7), Point(220, 0.8)]
    assert steps == 220


def test_regret_is_what_the_best_so_far_lacks() -> None:
    points = [Point(100, 0.7), Point(200, 0.6), Point(300, 0.9)]
    found = [search.regret(points, 1.0, steps) for steps in (99, 100, 299, 300)]
    assert found[0] is None
    assert found[1:] == pytest.approx([0.3, 0.3, 0.1])
    assert search.mean_known([0.1, 0.3]) == pytest.approx(0.2)
    assert search.mean_known([0.1, None]) is None


def test_a_search_is_read_from_the_command_and_the_ledger() -> None:
    trials = [
        {**trial_of(0, {"dense": 100, "a": 50}), "steps": 150, "status": "finished"},
        {**trial_of(1, {"dense": 100, "b": 50}), "steps": 125, "status": "stopped"},
    ]
    best = {"metrics": {"test/accuracy": 0.8}}
    ledger = [result("t000", 150, 0.7, done=True), result("t001", 125, 0.6)]
    found = search.read_search({"trials": trials, "best": best, "steps_run": 75}, ledger)
    assert found == Search(Steps(275, 175, 75), [Point(150, 0.7)], {"finished": 1, "stopped": 1}, 0.8)


def test_searches_are_compared_at_equal_steps() -> None:
    def searched(total: int, *points: tuple[int, float]) -> Search:
        return Search(Steps(2 * total, total, 0), [Point(*point) for point in points], {"finished": len(points)}, 0.5)

    report = search.summarize(
        {
            "random": [searched(300, (100, 0.5), (300, 0.9)), searched(300, (100, 0.6), (300, 0.7))],
            "asha": [searched(150, (150, 0.8)), searched(100, (100, 0.8))],
        }
    )
    assert (report["best"], report["equal_steps"]) == (0.9, [150, 100])
    random, asha = report["searches"]["random"], report["searches"]["asha"]
    assert random["regret"] == pytest.approx([0.0, 0.2])
    assert random["regret_at_equal_steps"] == pytest.approx([0.4, 0.3])
    assert asha["regret_at_equal_steps"] == pytest.approx([0.1, 0.1])
    assert asha["mean_steps"] == {"alone": 250, "search": 125, "here": 0}
    assert random["to_random"] is None
    assert asha["to_random"]["mean"] == pytest.approx(-0.25)
    assert asha["to_random"]["low"] < -0.25 < asha["to_random"]["high"]
    assert "no effect seen" in search.table("dsd", report)


@pytest.mark.parametrize("name", search.SEARCHES)
@pytest.mark.parametrize("shorten", [1, 4])
def test_the_spaces_of_the_searches_are_of_equal_length(name: str, shorten: int, tmp_path: Path) -> None:
    for kind in search.SEARCHES[name]:
        path = search.write_space(tmp_path, name, kind, trials=27, seed=3, shorten=shorten)
        space, _ = load_space(path)
        assert (space.seed, space.budget.trials) == (3, 27)
    settings = search.space_of(name, shorten)
    steps = settings["set"]["budget.steps"]
    split = settings["space"].get("split", {"settings": {"none": {}}})
    assert {steps + sum(keys.values()) for keys in split["settings"].values()} == {480 // shorten}
    for variable in settings["space"].values():
        TypeAdapter(Variable).validate_python(variable)


def test_the_picture_of_a_search(tmp_path: Path) -> None:
    found = [Search(Steps(200, 200, 200), [Point(100, 0.5), Point(200, 0.75)], {"finished": 2}, 0.5)] * 2
    report = {"spaces": {"kd": search.summarize({"random": found})}}
    search.plot(report, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert "kd: regret, mean and each seed" in text and "random" in text
