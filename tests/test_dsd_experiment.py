"""The comparison of dense-sparse-dense with its controls: the arms are comparable, and its statistics are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from temper.config.load import load_job
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import ClusterShape
from temper.plan.phases import learning_rate

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import dsd_experiment as experiment  # noqa: E402
import dsd_step  # noqa: E402

SHARING = [arm for arm in experiment.ARMS if arm != "dsd_long"]
THREE_PHASES = [arm for arm in SHARING if arm != "dsd_d"]
RESTARTING = [arm for arm in THREE_PHASES if arm != "dsd_llr"]
SPARSITY = {"dsd_ddd": 0.0, "dsd_random": 0.3, "dsd_25": 0.25, "dsd_30": 0.3, "dsd_50": 0.5, "dsd_70": 0.7}


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("ours", "others", "mean", "half", "verdict"),
    [
        # Differences 1, 2, 3: deviation 1, standard error 1/√3; the quantile of t with 2 degrees is 4.302653.
        ([3.0, 5.0, 9.0], [2.0, 3.0, 6.0], 2.0, 4.302653 / 3**0.5, "no effect seen"),
        # Differences −0.3, −0.1, −0.2, −0.2: deviation √(0.02/3), error half of it; with 3 degrees 3.182446.
        ([8.7, 8.9, 8.8, 9.8], [9.0, 9.0, 9.0, 10.0], -0.2, 3.182446 * (0.02 / 3) ** 0.5 / 2, "better"),
        ([9.0, 9.0, 9.0, 10.0], [8.7, 8.9, 8.8, 9.8], 0.2, 3.182446 * (0.02 / 3) ** 0.5 / 2, "worse"),
        # Two pairs: one degree of freedom, 12.706205; differences 0 and 1, error 1/2.
        ([1.0, 2.0], [1.0, 1.0], 0.5, 12.706205 / 2, "no effect seen"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.0, 0.0, "no effect seen"),
    ],
)
def test_paired_difference(ours: list[float], others: list[float], mean: float, half: float, verdict: str) -> None:
    found = experiment.paired_difference(ours, others)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=1e-5)
    assert found.verdict == verdict


def test_pairs_have_partners() -> None:
    with pytest.raises(ValueError, match="shorter"):
        experiment.paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_ratio_of_steps_is_that_of_neighbouring_blocks() -> None:
    found = dsd_step.summarize(dense=[10.0, 20.0, 40.0], sparse=[12.0, 20.0, 44.0])
    assert (found["dense_ms"], found["sparse_ms"]) == (20.0, 20.0)
    assert found["ratio"] == pytest.approx(1.1)
    assert found["quartiles"] == pytest.approx([1.0, 1.2])


# ------------------------------------------------------------------------------------------------------------ outcomes


def result(*accuracies: float, dense: str = "d", sparsity: float = 0.3) -> dict[str, Any]:
    """What `temper train --json` prints of as many phases."""
    names = ["dense", "sparse-1", "redense-1"][: len(accuracies)]
    phases = [
        {
            "name": name,
            "fingerprint": dense if name == "dense" else f"{dense}-{name}",
            "steps": 10,
            "reused": False,
            "seconds": 1.0,
            "metrics": {
                "test/accuracy": accuracy,
                "eval/accuracy": accuracy - 0.01,
                **({} if name == "dense" else {"sparsity": sparsity if name == "sparse-1" else 0.001}),
            },
        }
        for name, accuracy in zip(names, accuracies, strict=True)
    ]
    return {"run_id": "run", "status": "finished", "seconds": 3.0, "phases": phases}


def test_an_outcome_is_read_from_the_result() -> None:
    found = experiment.outcome(result(0.9, 0.8999, 0.91, sparsity=0.25))
    assert found.errors == {"dense": 10.0, "sparse-1": 10.01, "redense-1": 9.0}
    assert found.held_out == {"dense": 11.0, "sparse-1": 11.01, "redense-1": 10.0}
    assert (found.error, found.dense, found.steps, found.sparsity) == (9.0, "d", 30, 0.25)
    alone = experiment.outcome(result(0.9))
    assert (alone.error, alone.steps, alone.sparsity) == (10.0, 10, 0.0)


def outcomes() -> dict[str, list[Any]]:
    """Two seeds of three arms."""
    return {
        "dsd_d": [experiment.outcome(result(0.90, dense="a")), experiment.outcome(result(0.91, dense="b"))],
        "dsd_ddd": [
            experiment.outcome(result(0.90, 0.90, 0.92, dense="a", sparsity=0.0)),
            experiment.outcome(result(0.91, 0.91, 0.93, dense="b", sparsity=0.0)),
        ],
        "dsd_30": [
            experiment.outcome(result(0.90, 0.89, 0.91, dense="a")),
            experiment.outcome(result(0.91, 0.90, 0.94, dense="b")),
        ],
    }


def test_arms_are_pairs() -> None:
    experiment.check_pairs(outcomes())
    other = {**outcomes(), "dsd_30": [experiment.outcome(result(0.9, 0.9, 0.9, dense=seed)) for seed in "ac"]}
    with pytest.raises(RuntimeError, match="one dense phase"):
        experiment.check_pairs(other)
    longer = {**outcomes(), "dsd_long": [experiment.outcome(result(0.9, dense=seed)) for seed in "xy"]}
    with pytest.raises(RuntimeError, match="equally many steps"):
        experiment.check_pairs(longer)


def test_the_summary_has_every_seed_and_the_differences(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = experiment.summarize(outcomes())
    assert summary["dsd_d"]["errors"] == [10.0, 9.0]
    assert summary["dsd_30"]["mean_error"] == pytest.approx(7.5)
    assert summary["dsd_30"]["sparse_errors"] == [11.0, 10.0]
    assert summary["dsd_30"]["sparsity"] == pytest.approx(0.3)
    assert set(summary["dsd_30"]["differences"]) == {"D", "D-D-D"}  # LLR did not run
    assert set(summary["dsd_ddd"]["differences"]) == {"D"}
    to_d, to_ddd = summary["dsd_30"]["differences"]["D"], summary["dsd_30"]["differences"]["D-D-D"]
    assert (to_d["mean"], to_ddd["mean"]) == pytest.approx((-2.0, 0.0))
    assert to_ddd["verdict"] == "no effect seen"
    assert summary["dsd_ddd"]["differences"]["D"]["verdict"] == "better"  # −2 with both seeds
    assert json.loads(json.dumps(summary)) == summary
    experiment.print_tables(summary)
    printed = capsys.readouterr().out
    assert "dsd_30        7.50   10.50       30%  9.00  6.00" in printed
    assert "Difference to D-D-D" in printed and "no effect seen" in printed
    experiment.plot(summary, tmp_path / "plot.svg")
    assert "to D-D-D" in (tmp_path / "plot.svg").read_text()


def test_every_phase_can_be_shortened() -> None:
    assert experiment.overrides("dsd_30", 3, Path("/s"), 1) == ["seed=3", "storage=/s"]
    job = load_job(ROOT / "jobs" / "dsd" / "dsd_30.yaml", experiment.overrides("dsd_30", 3, Path("/s"), 2))
    assert job.dsd is not None
    assert (job.seed, job.budget.steps) == (3, 860)
    assert (job.dsd.rounds[0].sparse_steps, job.dsd.rounds[0].redense_steps) == (860, 860)


# --------------------------------------------------------------------------------------------------------------- arms


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Plans of all arms; the model is built for the first and known to the others."""
    storage = tmp_path_factory.mktemp("runs")
    cluster = ClusterShape(nodes=1, cpus=1.0, gpus=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = ROOT / "jobs" / "dsd"
        return {
            arm: build_plan(load_job(folder / f"{arm}.yaml", [f"storage={storage}"]), cluster, folder)
            for arm in experiment.ARMS
        }


def rates(plan: Plan, number: int) -> list[float]:
    phase = plan.phases[number]
    rate = learning_rate(plan.job, phase)
    return [rate(step) for step in range(phase.steps)]


def test_every_job_of_the_folder_is_an_arm() -> None:
    assert sorted(path.stem for path in (ROOT / "jobs" / "dsd").glob("*.yaml")) == sorted(experiment.ARMS)


def test_all_begin_with_one_dense_phase(plans: dict[str, Plan]) -> None:
    assert len({plans[arm].phases[0].fingerprint for arm in SHARING}) == 1
    assert plans["dsd_long"].phases[0].fingerprint != plans["dsd_d"].phases[0].fingerprint
    assert len({plan.fingerprint for plan in plans.values()}) == len(plans)


def test_all_but_the_dense_phase_alone_take_equally_many_steps(plans: dict[str, Plan]) -> None:
    dense = plans["dsd_d"].steps
    assert {plans[arm].steps for arm in experiment.ARMS if arm != "dsd_d"} == {3 * dense}
    for arm in THREE_PHASES:
        assert [phase.steps for phase in plans[arm].phases] == [dense] * 3


def test_longer_training_is_at_the_lowest_rate_of_the_dense_phase(plans: dict[str, Plan]) -> None:
    lowest = rates(plans["dsd_llr"], 0)[-1]
    assert lowest == min(rates(plans["dsd_llr"], 0))
    for number in (1, 2):
        assert rates(plans["dsd_llr"], number) == pytest.approx([lowest] * plans["dsd_d"].steps, rel=1e-3)
    assert [phase.fresh for phase in plans["dsd_llr"].phases] == [False, False, False]


def test_the_others_restart_as_the_paper_does(plans: dict[str, Plan]) -> None:
    dense = rates(plans["dsd_d"], 0)
    for arm in RESTARTING:
        assert rates(plans[arm], 1) == dense
        assert rates(plans[arm], 2) == pytest.approx([rate / 10 for rate in dense])


def test_they_differ_in_what_is_pruned(plans: dict[str, Plan]) -> None:
    weights = {"0.weight", "3.weight", "7.weight", "9.weight"}
    for arm, share in SPARSITY.items():
        pruning = plans[arm].phases[1].pruning
        assert pruning is not None
        assert pruning.layers == (dict.fromkeys(weights, share) if share else {})
        assert pruning.structure == "weights"
        assert pruning.criterion == ("random" if arm == "dsd_random" else "magnitude")


def test_nothing_else_differs(plans: dict[str, Plan]) -> None:
    common = [plan.job.model_dump(exclude={"name", "dsd", "budget"}) for plan in plans.values()]
    assert all(job == common[0] for job in common)
    held_out, test = plans["dsd_d"].data.validation_examples, plans["dsd_d"].data.test_examples
    assert (held_out, test) == (5000, 10_000)
