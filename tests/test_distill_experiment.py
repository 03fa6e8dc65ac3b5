"""The comparison of distillation with its controls: the arms are comparable, and what is computed of them is right."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from temper.checkpoint import MASTER, Shard, write_manifest, write_shards
from temper.config.load import job_to_yaml, load_job
from temper.config.schema import JobConfig
from temper.data.sources import load_split
from temper.export import Product, find_product
from temper.files import write_json
from temper.launch.teachers import plan_job
from temper.models.build import build_model
from temper.plan.build import Plan
from temper.plan.facts import data_facts
from temper.plan.mesh import ClusterShape

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import distill_experiment as experiment  # noqa: E402
import distill_step  # noqa: E402

UNTAUGHT = ("plain", "label_smoothing", "omitted_plain", "few_plain")


# ------------------------------------------------------------------------------------------------------- equal entropy


def test_the_entropy_of_soft_targets() -> None:
    # Two classes with odds of 3 to 1 are at half the temperature 9 to 1.
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    at_one = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    at_half = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert experiment.mean_entropy(logits, 1.0) == pytest.approx((at_one + math.log(2)) / 2)
    assert experiment.mean_entropy(logits, 0.5) == pytest.approx((at_half + math.log(2)) / 2)


@pytest.mark.parametrize(
    ("smoothing", "entropy"),
    [
        (0.0, 0.0),
        (0.5, -(0.55 * math.log(0.55) + 0.45 * math.log(0.05))),
        # 0.91 for the class and 0.01 for each of nine others.
        (0.1, -(0.91 * math.log(0.91) + 0.09 * math.log(0.01))),
    ],
)
def test_the_entropy_of_smoothed_labels(smoothing: float, entropy: float) -> None:
    assert experiment.smoothed_entropy(smoothing, 10) == pytest.approx(entropy)
    assert experiment.smoothing_of(entropy, 10) == pytest.approx(smoothing, abs=1e-4)
    assert experiment.smoothed_entropy(1.0, 10) == pytest.approx(math.log(10))


def test_smoothed_labels_have_the_entropy_of_the_teachers_targets() -> None:
    logits = 8 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 4.0, 20.0):
        entropy = experiment.mean_entropy(logits, temperature)
        found = experiment.smoothing_of(entropy, 10)
        # What torch makes of labels smoothed so: the cross entropy of a prediction with itself.
        smoothed = torch.full((10,), found / 10, dtype=torch.float64)
        smoothed[0] += 1 - found
        label = torch.tensor(0)
        itself = nn.functional.cross_entropy(smoothed.log(), label, label_smoothing=found)
        assert float(itself) == pytest.approx(entropy, abs=1e-3)
    with pytest.raises(ValueError, match="different signs"):
        experiment.smoothing_of(2.4, 10)


# --------------------------------------------------------------------------------------------------- the omitted class

HELD_OUT = torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 1.5], [0.0, 4.0, 0.0], [0.0, 1.0, -1.0]])
"""The third logit lacks 3, 0.5, 4 and 2 for its class to be predicted."""


@pytest.mark.parametrize(("count", "bias"), [(1, (0.5 + 2) / 2), (2, (2 + 3) / 2), (3, (3 + 4) / 2)])
def test_the_bias_sets_the_share_of_a_class(count: int, bias: float) -> None:
    assert experiment.bias_of_share(HELD_OUT, 2, count) == bias
    fixed = HELD_OUT + torch.tensor([0.0, 0.0, bias])
    assert int((fixed.argmax(1) == 2).sum()) == count


def test_a_share_is_some_but_not_all() -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"{count} of 4 examples"):
            experiment.bias_of_share(HELD_OUT, 2, count)


def test_the_bias_is_set_on_held_out_examples_and_judged_on_the_test_set() -> None:
    held_out_targets = torch.tensor([0, 2, 1, 2])
    test = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [9.0, 0.0, 0.0]])
    found = experiment.read_out((HELD_OUT, held_out_targets), (test, torch.tensor([2, 2, 1, 0])), 2)
    # Two of the held-out examples are of the class: the bias is 2.5, and both of the test set's are found.
    assert found == experiment.Readout(bias=2.5, error=50.0, recall=0.0, fixed_error=0.0, fixed_recall=100.0)


def test_a_trained_network_is_read_out(tmp_path: Path) -> None:
    """Of a phase on the disk, as a command leaves it."""
    job = JobConfig.model_validate(
        {
            "name": "omitted",
            "model": {"kind": "mlp", "hidden": []},
            "data": {
                "kind": "synthetic",
                "shape": [4],
                "num_classes": 4,
                "noise": 0.01,
                "train_examples": 400,
                "test_examples": 100,
                "holdout": 40,
                "omit_classes": [1],
                "global_batch": 4,
            },
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "budget": {"steps": 1},
            "storage": str(tmp_path),
        }
    )
    facts = data_facts(job.data, tmp_path)
    model = build_model(job.model, facts, 0)
    inputs, _ = load_split(job.data, "test", tmp_path, facts).examples(torch.arange(4))
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        linear.weight.copy_(10 * torch.linalg.pinv(inputs).T)  # tells the four classes apart
        linear.bias.copy_(torch.tensor([0.0, -50.0, 0.0, 0.0]))  # and never says the second
    product = _product(job, model, tmp_path)
    found = experiment.read_out_product(product)
    assert (found.recall, found.fixed_recall) == (0.0, 100.0)
    assert (found.error, found.fixed_error) == (25.0, 0.0)
    assert 40 < found.bias < 60


def _product(job: JobConfig, model: nn.Module, storage: Path) -> Product:
    folder = storage / "phases" / "abc"
    checkpoint = folder / "checkpoints" / "step-00000001"
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    shards = [Shard(name, 0, {MASTER: param.detach().reshape(-1)}, None) for name, param in model.named_parameters()]
    checkpoint.parent.mkdir(parents=True)
    write_shards(checkpoint, 0, shards)
    write_manifest(checkpoint, 1, {"step": 1}, shapes)
    (folder / "job.yaml").write_text(job_to_yaml(job))
    write_json(folder / "plan.json", {"phases": [{"name": "dense", "fingerprint": "abc"}]})
    write_json(folder / "phase.json", {"fingerprint": "abc", "checkpoint": f"checkpoints/{checkpoint.name}"})
    return find_product(str(folder), storage)


# ------------------------------------------------------------------------------------------------------------ outcomes


def result(accuracy: float, held_out: float = 0.9, teacher: str = "t", steps: int = 10) -> dict[str, Any]:
    """What `temper train --json` prints."""
    metrics = {"test/accuracy": accuracy, "eval/accuracy": held_out}
    phase = {"name": "dense", "fingerprint": "f", "steps": steps, "reused": False, "seconds": 3.0, "metrics": metrics}
    teachers = [{"name": "x", "fingerprint": teacher}] if teacher else []
    return {"run_id": "run", "status": "finished", "seconds": 9.0, "phases": [phase], "teachers": teachers}


def found(*accuracies: float, held_out: float = 0.9, **changes: Any) -> list[Any]:
    """Outcomes of an arm, one a seed."""
    return [experiment.outcome(result(accuracy, held_out, **changes)) for accuracy in accuracies]


def test_an_outcome_is_read_from_the_result() -> None:
    (outcome,) = found(0.9001, held_out=0.85)
    assert (outcome.error, outcome.held_out, outcome.seconds) == (9.99, 15.0, 3.0)
    assert (outcome.teacher, outcome.steps, outcome.run_id) == ("t", 10, "run")
    assert found(0.9, teacher="")[0].teacher == ""


def outcomes() -> dict[str, list[Any]]:
    """Two seeds of some arms."""
    return {
        "plain": found(0.87, 0.88, teacher=""),
        "label_smoothing": found(0.875, 0.885, teacher=""),
        "soft_t1": found(0.88, 0.89, held_out=0.90),
        "soft_t4": found(0.89, 0.90, held_out=0.92),
        "soft_t20": found(0.895, 0.905, held_out=0.91),
        "few_plain": found(0.75, 0.77, teacher=""),
        "few": found(0.85, 0.86),
    }


def test_arms_have_one_teacher_and_equally_many_steps() -> None:
    experiment.check_arms(outcomes(), "t")
    with pytest.raises(RuntimeError, match="the teacher other: t"):
        experiment.check_arms(outcomes(), "other")
    with pytest.raises(RuntimeError, match="equally many steps"):
        experiment.check_arms({**outcomes(), "both": found(0.9, 0.9, steps=11)}, "t")


def test_the_summary_has_every_seed_and_the_differences() -> None:
    summary = experiment.summarize(outcomes())
    assert summary["plain"]["errors"] == [13.0, 12.0]
    assert summary["plain"]["mean_error"] == pytest.approx(12.5)
    assert summary["plain"]["sd"] == pytest.approx(math.sqrt(0.5))
    assert summary["plain"]["differences"] == {}
    assert set(summary["label_smoothing"]["differences"]) == {"plain"}
    assert set(summary["soft_t4"]["differences"]) == {"plain", "label_smoothing"}
    assert summary["soft_t4"]["differences"]["plain"]["mean"] == pytest.approx(-2.0)
    assert summary["soft_t4"]["differences"]["plain"]["verdict"] == "better"  # −2 with both seeds
    assert set(summary["few"]["differences"]) == {"few_plain"}
    # −10 and −9: the mean 9.5, the standard error 0.5, the quantile of t with one degree 12.706205.
    few = summary["few"]["differences"]["few_plain"]
    assert (few["mean"], few["high"]) == pytest.approx((-9.5, -9.5 + 12.706205 / 2))
    assert few["verdict"] == "better"
    assert json.loads(json.dumps(summary)) == summary


def test_the_temperature_is_picked_on_held_out_examples() -> None:
    summary = experiment.summarize(outcomes())
    assert experiment.pick_temperature(summary) == "soft_t4"  # soft_t20 has the smallest test error
    assert experiment.pick_temperature({"plain": summary["plain"]}) is None


def report() -> dict[str, Any]:
    summary = experiment.summarize(outcomes())
    readout = {"bias": 3.5, "error": 20.0, "recall": 10.0, "fixed_error": 12.0, "fixed_recall": 80.0}
    return {
        "teacher": {"error": 7.0, "held_out": 7.25, "seconds": 200.0},
        "caches": {
            "abc": {"arms": ["soft_t1", "soft_t4"], "teacher_examples": 65000, "seconds": 21.0},
            "def": {"arms": ["both"], "teacher_examples": 65000, "seconds": None},
        },
        "temperature": experiment.pick_temperature(summary),
        "omitted": {"omitted": [readout, {**readout, "recall": 20.0}]},
        "arms": summary,
    }


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    experiment.print_tables(report())
    printed = capsys.readouterr().out
    assert "Teacher: test error 7.00 %, held out 7.25 %, 200 s" in printed
    assert "Asked of 65,000 examples, 21 s, for soft_t1, soft_t4" in printed
    assert "made before, for both" in printed
    assert "soft_t4           10.50   0.71    8.00     3  11.00  10.00" in printed
    assert "soft_t4          to plain             -2.000  -2.000 … -2.000  better" in printed
    assert "omitted           15.0 →  80.0  20.00 → 12.00  bias +3.50" in printed
    assert "smallest held-out error: soft_t4" in printed


def test_the_picture(tmp_path: Path) -> None:
    experiment.plot(report(), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(text in drawn for text in ("Error by temperature", "soft_t20", "to label_smoothing", "the teacher"))
    assert "few" not in drawn


def test_students_of_one_teacher_are_compared_bit_by_bit() -> None:
    ours = {"weight": torch.tensor([1.0, 2.0])}
    assert experiment.same_bits(ours, {"weight": torch.tensor([1.0, 2.0])})
    assert not experiment.same_bits(ours, {"weight": torch.tensor([1.0, 2.0 + 2**-22])})
    assert not experiment.same_bits(ours, {"bias": torch.tensor([1.0, 2.0])})


def test_a_live_student_that_differs_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {Path("/s"): 1.0, Path("/s/live"): 1.0}
    monkeypatch.setattr(experiment, "weights_of", lambda run, storage: {"w": torch.tensor(weights[storage])})
    arms = {"live_t4": found(0.9, 0.9), "soft_t4": found(0.9, 0.9)}
    assert experiment.check_live(arms, SETTING) == 2
    assert experiment.check_live(outcomes(), SETTING) == 0
    weights[Path("/s/live")] = 2.0
    with pytest.raises(RuntimeError, match="seed 0: live_t4 and soft_t4"):
        experiment.check_live(arms, SETTING)


# ------------------------------------------------------------------------------------------------------------ commands

SETTING = experiment.Setting(Path("/s"), 1, Path("/s/phases/t"))


def test_what_the_commands_set() -> None:
    assert SETTING.keys("soft_t4", 3) == ["seed=3", "storage=/s"]
    assert SETTING.keys("live_t4", 3) == ["seed=3", "storage=/s/live", "distill.teacher=/s/phases/t"]
    smoothed = experiment.Setting(Path("/s"), 1, Path("/s/phases/t"), smoothing=0.3)
    assert smoothed.keys("label_smoothing", 0) == ["seed=0", "storage=/s", "loss.label_smoothing=0.3"]
    short = experiment.Setting(Path("/s"), 40, Path("/s/phases/t")).keys("soft_t4", 0)
    job = load_job(ROOT / "jobs" / "distill" / "soft_t4.yaml", short)
    assert job.distill is not None
    assert (job.budget.steps, job.distill.teacher) == (43, "/s/phases/t")
    assert job.optimizer.schedule.warmup_steps == 2
    teacher = load_job(ROOT / "jobs" / "fashion_teacher.yaml")
    assert experiment.shortened(teacher, 1) == []
    assert experiment.shortened(teacher, 5) == ["optimizer.schedule.warmup_steps=20", "budget.epochs=2.0"]


def test_every_seed_of_every_arm_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def train(job: Path, keys: Sequence[str]) -> dict[str, Any]:
        asked.append((job.stem, keys[0]))
        return result(0.9 if job.stem == "plain" else 0.95, held_out=float(keys[0][-1]) / 10)

    monkeypatch.setattr(experiment, "train", train)
    arms = experiment.run_arms(["plain", "few"], [0, 1, 2], SETTING, jobs=2)
    assert sorted(asked) == sorted((arm, f"seed={seed}") for arm in ("plain", "few") for seed in (0, 1, 2))
    assert [outcome.error for outcome in arms["few"]] == [5.0] * 3
    assert [outcome.held_out for outcome in arms["plain"]] == [100.0, 90.0, 80.0]


def test_a_cache_is_made_and_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = {"soft_t1": tmp_path / "a", "soft_t4": tmp_path / "a", "both": tmp_path / "b"}
    commands = []

    def train(job: Path, keys: Sequence[str]) -> dict[str, Any]:
        assert keys[-2:] == ["budget.steps=1", "optimizer.schedule.warmup_steps=0"]
        commands.append((job.stem, keys[0]))
        folder = folders[job.stem]
        made = (folder / "manifest.json").exists()
        folder.mkdir(exist_ok=True)
        write_json(folder / "manifest.json", {})
        return {"seconds": 10.0 if made else 31.0}

    def plan(setting: Any, arm: str, seed: int) -> Any:
        folder = folders.get(arm)
        cache = None if folder is None else SimpleNamespace(key=folder.name, folder=folder)
        return SimpleNamespace(distill=SimpleNamespace(cache=cache))

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment.Setting, "plan", plan)
    monkeypatch.setattr(experiment, "open_manifest", lambda cache: {"teacher_examples": 65000})
    arms, costs = ["soft_t1", "soft_t4", "live_t4", "both"], tmp_path / "costs.json"
    caches = experiment.make_caches(arms, SETTING, costs)
    assert caches == {
        "a": {"arms": ["soft_t1", "soft_t4"], "teacher_examples": 65000, "seconds": 21.0},
        "b": {"arms": ["both"], "teacher_examples": 65000, "seconds": 21.0},
    }
    assert commands == [("soft_t1", "seed=0"), ("soft_t1", "seed=1"), ("both", "seed=0"), ("both", "seed=1")]
    assert experiment.make_caches(arms, SETTING, costs) == caches
    assert len(commands) == 4  # the second time nothing is run
    costs.unlink()
    assert experiment.make_caches(arms, SETTING, costs)["a"]["seconds"] is None
    experiment.check_caches(caches, 65000)
    with pytest.raises(RuntimeError, match="took 65,000 examples of the teacher, and there are 60,000"):
        experiment.check_caches(caches, 60000)
    with pytest.raises(RuntimeError, match="130,000"):
        experiment.check_caches({**caches, "c": {"arms": ["soft_t8"], "teacher_examples": 65000}}, 65000)


def test_one_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiment.parse(["--seeds", "1"])
    assert "one seed gives no interval" in capsys.readouterr().err
    assert experiment.parse(["--storage", "runs"]).storage == Path.cwd() / "runs"


# ------------------------------------------------------------------------------------------------------ times of steps


def test_the_ratio_of_steps_is_that_of_neighbouring_blocks() -> None:
    found = distill_step.summarize([10.0, 20.0, 40.0], [12.0, 20.0, 44.0])
    assert (found["others_ms"], found["ours_ms"]) == (20.0, 20.0)
    assert found["ratio"] == pytest.approx(1.1)
    assert found["quartiles"] == pytest.approx([1.0, 1.2])


def test_a_step_lies_between_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first two steps do not count; the other three take 10, 30 and 20 ms.
    clock = iter([0.0, 5.0, 9.0, 9.010, 9.040, 9.060])
    monkeypatch.setattr(distill_step.time, "perf_counter", lambda: next(clock))
    stamps = distill_step.Stamps(iter(range(5)))
    assert list(stamps) == [0, 1, 2, 3, 4]
    assert stamps.milliseconds() == pytest.approx(20.0)


# --------------------------------------------------------------------------------------------------------------- arms


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Plans of all arms; each model is built for the first and known to the others."""
    storage = tmp_path_factory.mktemp("runs")
    cluster = ClusterShape(nodes=1, cpus=2.0, gpus=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = ROOT / "jobs" / "distill"
        return {
            arm: plan_job(load_job(folder / f"{arm}.yaml", [f"storage={storage}"]), cluster, folder)
            for arm in experiment.ARMS
        }


def test_every_job_of_the_folder_is_an_arm() -> None:
    assert sorted(path.stem for path in (ROOT / "jobs" / "distill").glob("*.yaml")) == sorted(experiment.ARMS)


def test_all_but_two_are_different_students(plans: dict[str, Plan]) -> None:
    assert plans["live_t4"].fingerprint == plans["soft_t4"].fingerprint
    assert len({plan.fingerprint for plan in plans.values()}) == len(plans) - 1


def test_all_take_equally_many_steps(plans: dict[str, Plan]) -> None:
    assert {plan.steps for plan in plans.values()} == {1720}
    assert {plan.batch.global_batch for plan in plans.values()} == {128}


def test_one_teacher_teaches_all(plans: dict[str, Plan]) -> None:
    taught = {arm: plan.distill for arm, plan in plans.items() if plan.distill is not None}
    assert set(taught) == set(experiment.ARMS) - set(UNTAUGHT)
    assert len({teacher.fingerprint for distill in taught.values() for teacher in distill.teachers}) == 1
    assert plans["plain"].model.num_parameters == 13_242
    assert taught["soft_t4"].facts[0].num_parameters == 824_458


def test_one_cache_serves_every_temperature(plans: dict[str, Plan]) -> None:
    caches: dict[str, set[str]] = {}
    for arm, plan in plans.items():
        if plan.distill is not None and plan.distill.cache is not None:
            caches.setdefault(plan.distill.cache.key, set()).add(arm)
    logits, features, omitted = {*experiment.TEMPERATURES, "few"}, {"hints", "attention", "both"}, {"omitted"}
    assert sorted(caches.values(), key=len) == [omitted, features, logits]


def test_they_differ_in_what_is_taught(plans: dict[str, Plan]) -> None:
    jobs = {arm: plan.job for arm, plan in plans.items()}
    for arm, temperature in experiment.TEMPERATURES.items():
        distill = jobs[arm].distill
        assert distill is not None
        assert (distill.temperature, distill.alpha, distill.features) == (temperature, 0.9, [])
    for arm, loss, alpha in (
        ("hints", "mse", 0.0),
        ("attention", "attention_transfer", 0.0),
        ("both", "attention_transfer", 0.9),
    ):
        distill, planned = jobs[arm].distill, plans[arm].distill
        assert distill is not None and planned is not None
        assert distill.alpha == alpha
        pairs = [(pair.student, pair.teacher, pair.loss) for pair in planned.pairs]
        assert pairs == [("2", "2", loss), ("5", "5", loss)]
    assert jobs["omitted"].distill is not None
    assert jobs["omitted"].distill.alpha == 1.0
    assert (jobs["omitted"].data.omit_classes, jobs["omitted"].data.labels) == ([3], 0.0)
    assert (jobs["omitted_plain"].data.omit_classes, jobs["omitted_plain"].data.labels) == ([3], 1.0)
    assert jobs["few"].data.labels == jobs["few_plain"].data.labels == 0.03


def test_nothing_else_differs(plans: dict[str, Plan]) -> None:
    common = [
        plan.job.model_copy(update={"data": plan.job.data.model_copy(update={"labels": 1.0, "omit_classes": []})})
        for plan in plans.values()
    ]
    dumped = [job.model_dump(exclude={"name", "distill", "loss"}) for job in common]
    assert all(job == dumped[0] for job in dumped)
    held_out, test = plans["plain"].data.validation_examples, plans["plain"].data.test_examples
    assert (held_out, test) == (5000, 10_000)
    smoothed = plans["label_smoothing"].job.loss
    assert smoothed.kind == "cross_entropy" and 0 < smoothed.label_smoothing < 1
    assert plans["few_plain"].data.train_examples == round(0.03 * 55_000)
