"""Metrics of a run: the accuracy of each class, the share of the devices' peak, agreement with the teacher; on two
ranks what they are on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import mlp_facts
from distributed import run_distributed
from temper.config.load import build_job
from temper.config.schema import EvaluationConfig
from temper.data.batches import Batch, eval_batches
from temper.data.sources import SplitName, load_splits
from temper.engine.base import StepResult
from temper.evaluation import Answers, TeacherView, evaluate
from temper.loop import Reporter, TrainState
from temper.losses import build_loss
from temper.metrics import build_metrics
from temper.models.build import build_model
from temper.models.weights import CheckpointWeights, load_weights
from temper.parallel.groups import Group
from temper.plan import probe
from temper.plan.build import Plan, build_plan
from temper.plan.distill import DistillPlan
from temper.plan.facts import NO_LABEL, DataFacts, data_facts
from temper.plan.mesh import ClusterShape
from temper.plan.metric_names import class_labels, without_classes
from temper.plan.peaks import Speed, peak_flops, plan_speed
from temper.techniques.distill.teacher import build_teacher
from temper.tracking.progress import Progress, follow
from test_distill_worker import end, plan, prepare, records, trained

CPU = torch.device("cpu")
JOB: dict[str, Any] = {
    "name": "tiny",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "budget": {"steps": 10},
}
LOGITS = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 4.0, 1.0], [0.0, 5.0, 1.0, 0.0]])
CROSS_ENTROPY = build_loss(build_job(JOB, ()).loss)


def planned(folder: Path, *overrides: str, gpus: float = 0.0) -> Plan:
    """A job on the digits; the model's facts are those of `mlp_facts`, and it is not built."""
    with mock.patch.object(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(mlp_facts.FACTS)))):
        job = build_job({**JOB, "storage": str(folder)}, overrides)
        return build_plan(job, ClusterShape(nodes=1, cpus=8.0, gpus=gpus), folder)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a trained teacher."""
    folder = tmp_path_factory.mktemp("teachers")
    prepare(plan(folder))
    return folder


def facts(num_classes: int | None, names: tuple[str, ...] = ()) -> DataFacts:
    return replace(DataFacts(1, 0, 1, (4,), num_classes, (), (), ""), class_names=names)


# ----------------------------------------------------------------------------------------------------- names of classes


def test_classes_are_called_by_their_own_names_or_by_numbers_that_sort() -> None:
    assert class_labels(3, ["T-shirt/top", "Ankle boot", "a+b "]) == ["T-shirt_top", "Ankle boot", "a_b"]
    assert class_labels(10, []) == [str(number) for number in range(10)]
    assert class_labels(12, [])[8:11] == ["08", "09", "10"]
    assert class_labels(2, ["a/b", "a:b"]) == ["a_b", "a:b"]
    assert class_labels(2, ["a/b", "a+b"]) == ["0", "1"], "two would have one name"


def test_a_data_set_knows_its_class_names(tmp_path: Path) -> None:
    def names(**data: Any) -> tuple[str, ...]:
        job = build_job({**JOB, "data": {"global_batch": 2, **data}}, ())
        return data_facts(job.data, tmp_path).class_names

    assert names(kind="fashion_mnist")[:2] == ("T-shirt/top", "Trouser")
    assert names(kind="cifar10")[3] == "cat" and len(names(kind="cifar10")) == 10
    assert names(kind="digits") == ()
    from PIL import Image

    for split in ("train", "test"):
        for name in ("wolf", "bear"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "pets" / split / name / "0.png")
    assert names(kind="image_folder", path="pets") == ("bear", "wolf")


# -------------------------------------------------------------------------------------------------- accuracy of classes


def measured(logits: Tensor, targets: Tensor, known: DataFacts, **config: Any) -> dict[str, float]:
    metrics = build_metrics(EvaluationConfig(**config), known, "cpu")
    metrics.update(logits, targets)
    return metrics.compute()


def test_accuracy_of_each_class_that_has_examples() -> None:
    known = facts(4, ("cat", "dog", "owl", "emu"))
    # Predictions 0, 1, 2, 1.
    assert measured(LOGITS, torch.tensor([0, 1, 1, 1]), known) == {
        "accuracy": 0.75,
        "class_accuracy/cat": 1.0,
        "class_accuracy/dog": 2 / 3,
    }
    assert measured(LOGITS, torch.tensor([2, 1, 2, 1]), known, metrics=["f1"])["class_accuracy/owl"] == 0.5


def test_positions_without_a_label_do_not_count() -> None:
    logits, targets = LOGITS.reshape(2, 2, 4), torch.tensor([[0, NO_LABEL], [3, NO_LABEL]])
    assert measured(logits, targets, facts(4)) == {"accuracy": 0.5, "class_accuracy/0": 1.0, "class_accuracy/3": 0.0}
    names = ["accuracy", "top5_accuracy", "f1", "precision", "recall", "auroc", "calibration_error"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, 8, generator=generator)
    targets = torch.randint(0, 8, (40, 6), generator=generator)
    labelled = torch.rand(40, 6, generator=generator) > 0.3
    masked = torch.where(labelled, targets, NO_LABEL)
    expected = measured(logits[labelled], targets[labelled], facts(8), metrics=names)
    assert measured(logits, masked, facts(8), metrics=names) == expected and len(expected) == 7 + 8


def test_where_single_classes_are_not_measured() -> None:
    targets = torch.tensor([0, 1, 1, 1])
    assert set(measured(LOGITS, targets, facts(4), per_class=False)) == {"accuracy"}
    assert set(measured(torch.zeros(4, 101), targets, facts(101))) == {"accuracy"}
    assert set(measured(LOGITS[:, 0], LOGITS[:, 1], facts(None), metrics=["mse"])) == {"mse"}


def test_single_classes_decide_no_weights_and_are_not_shown_to_people(tmp_path: Path) -> None:
    assert planned(tmp_path).fingerprint == planned(tmp_path, "evaluation.per_class=false").fingerprint
    found = {"eval/accuracy": 0.5, "eval/class_accuracy/0": 0.25, "test/class_accuracy/0": 1.0, "train/loss": 2.0}
    assert without_classes(found) == {"eval/accuracy": 0.5, "train/loss": 2.0}
    shown = follow(Progress(), {"step": 1, "time_ms": 1, "metrics": found})
    assert shown.evaluation == {"accuracy": 0.5}


# ---------------------------------------------------------------------------------------------- two ranks, and one


def rows(count: int) -> tuple[Tensor, Tensor, Answers]:
    """Logits (examples, 3, 5) of sequences, targets of which a fifth have no label, and a teacher's answers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 3, 5, generator=generator)
    targets = torch.randint(-1, 5, (count, 3), generator=generator)
    teacher = torch.randint(0, 5, (count, 3), generator=generator).to(torch.uint8).numpy()
    return logits, torch.where(targets < 0, NO_LABEL, targets), teacher


def batches_of(logits: Tensor, targets: Tensor, rank: int, size: int) -> Iterator[tuple[Batch, int]]:
    """As `eval_batches` cuts them: consecutive blocks, equally many batches, filled up with the first example."""
    share = -(-len(logits) // size)
    first, count = rank * share, min(share, len(logits) - rank * share)
    for start in range(0, share, 4):
        valid = min(max(count - start, 0), 4)
        indices = torch.zeros(4, dtype=torch.int64)
        indices[:valid] = torch.arange(first + start, first + start + valid)
        yield Batch(logits[indices], targets[indices], indices, torch.zeros_like(indices)), valid


def evaluated(rank: int, size: int) -> dict[str, float]:
    logits, targets, teacher = rows(21)
    group = Group(rank, size, torch.distributed.group.WORLD) if size > 1 else Group()
    metrics = build_metrics(EvaluationConfig(), facts(5), "cpu", group)
    batches = batches_of(logits, targets, rank, size)
    return evaluate(lambda inputs: inputs, batches, CROSS_ENTROPY, metrics, CPU, group, teacher)


def test_two_ranks_measure_what_one_does() -> None:
    alone = evaluated(0, 1)
    for values in run_distributed(evaluated, 2, 2):
        assert values == pytest.approx(alone, rel=1e-12)
    logits, targets, teacher = rows(21)
    labelled, predicted = targets != NO_LABEL, logits.argmax(-1)
    agreeing = (predicted == torch.from_numpy(teacher).long())[labelled]
    assert alone["teacher_agreement"] == pytest.approx(float(agreeing.double().mean()), abs=1e-15)
    of_three = predicted[targets == 3] == 3
    assert alone["class_accuracy/3"] == pytest.approx(float(of_three.double().mean()), abs=1e-15)


def test_without_any_label_there_is_no_agreement() -> None:
    logits, _, teacher = rows(4)
    targets = torch.full((4, 3), NO_LABEL)
    metrics = build_metrics(EvaluationConfig(metrics=[]), facts(5), "cpu")
    batches = batches_of(logits, targets, 0, 1)
    assert evaluate(lambda inputs: inputs, batches, CROSS_ENTROPY, metrics, CPU, None, teacher) == {"loss": 0.0}


# --------------------------------------------------------------------------------------------------------- the teacher


class Exam:
    """A teacher of 21 examples, and a count of how often it is asked about them."""

    def __init__(self, folder: Path, rank: int = 0, size: int = 1) -> None:
        self.asked = 0
        self._rank, self._size = rank, size
        answers = {split: folder / f"{split}.npy" for split in ("validation", "test")}
        self.plan = DistillPlan((), (), (), 1, None, folder / "metrics.json", answers)
        group = Group(rank, size, torch.distributed.group.WORLD) if size > 1 else Group()
        metrics = build_metrics(EvaluationConfig(), facts(5), "cpu", group)
        self.view = TeacherView(
            self.plan,
            self._asked,
            lambda batches: evaluate(lambda inputs: inputs, batches, CROSS_ENTROPY, metrics, CPU, group),
            group,
            group,
        )

    def _asked(self, split: SplitName) -> Iterator[tuple[Batch, int]]:
        self.asked += 1
        logits, targets, _ = rows(21)
        return batches_of(-logits if split == "validation" else logits, targets, self._rank, self._size)


def test_the_teacher_is_asked_once_about_each_split(tmp_path: Path) -> None:
    first, second = Exam(tmp_path / "teachers"), Exam(tmp_path / "teachers")
    logits = rows(21)[0]
    measured = first.view.metrics()
    assert set(measured) == {"teacher/loss", "teacher/accuracy", *(f"teacher/class_accuracy/{n}" for n in range(5))}
    for view in (first.view, second.view):
        for split, sign in (("test", 1), ("validation", -1)):
            assert np.array_equal(view.answers(split), (sign * logits).argmax(-1))  # type: ignore[arg-type]
        assert view.metrics() == measured
    assert (first.asked, second.asked) == (2, 0)
    file = first.plan.answers["test"]
    assert np.load(file).dtype == np.uint8
    file.write_bytes(file.read_bytes()[:-5])
    third = Exam(tmp_path / "teachers")
    assert np.array_equal(third.view.answers("test"), logits.argmax(-1)) and third.asked == 1


def asked_on(rank: int, folder: Path) -> tuple[list[Any], int]:
    exam = Exam(folder, rank, 2)
    splits: tuple[SplitName, ...] = ("validation", "test")
    return [*(exam.view.answers(split).tolist() for split in splits), exam.view.metrics()], exam.asked  # type: ignore[union-attr]


def test_two_ranks_ask_for_both(tmp_path: Path) -> None:
    alone = Exam(tmp_path / "alone")
    expected = [alone.view.answers("validation").tolist(), alone.view.answers("test").tolist()]  # type: ignore[union-attr]
    for found, asked in run_distributed(asked_on, 2, tmp_path / "both"):
        assert found[:2] == expected and asked == 2
        assert found[2] == pytest.approx(alone.view.metrics(), rel=1e-12)
    for file in ("validation.npy", "test.npy"):
        assert (tmp_path / "both" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_answers_are_told_apart_by_what_decides_them(teachers: Path) -> None:
    def answers(**sections: Any) -> dict[str, Path]:
        planned = plan(teachers, **sections)
        assert planned.distill is not None
        return dict(planned.distill.answers)

    known = answers()
    assert set(known) == {"test"}
    assert answers(distill={"temperature": 9.0, "features": "auto"}, seed=3) == known
    assert answers(loss={"kind": "cross_entropy", "label_smoothing": 0.1}) == known
    assert answers(distill={"signals": "fp32"}) != known
    held_out = answers(data={"kind": "digits", "global_batch": 32, "holdout": 50})
    assert held_out["test"] == known["test"] and set(held_out) == {"validation", "test"}
    other = answers(data={"kind": "digits", "global_batch": 32, "holdout": 60})
    assert other["validation"] != held_out["validation"]


@pytest.mark.parametrize("cache", [pytest.param("none", marks=pytest.mark.slow), "logits"])
def test_a_run_records_how_often_the_student_agrees_with_its_teacher(
    cache: str, teachers: Path, tmp_path: Path
) -> None:
    student = trained(
        tmp_path,
        teachers,
        model={"kind": "mlp", "hidden": [16]},
        data={"kind": "digits", "global_batch": 128, "holdout": 300},
        optimizer={"kind": "adamw", "lr": 0.03},
        parallel={"workers": 2, "cpus_per_worker": 0.5},
        budget={"steps": 20, "evaluate_every": 10, "checkpoint_every": 10},
        distill={"cache": cache, "temperature": {"start": 4.0, "end": 2.0}},
    )
    found = [record["metrics"] for record in records(student) if "eval/accuracy" in record["metrics"]]
    assert len(found) == 2 and "test/teacher_agreement" not in found[0]
    for split, key in (("validation", "eval"), ("test", "test")):
        assert found[-1][f"{key}/teacher_agreement"] == pytest.approx(agreement(student, split), abs=1e-15)  # type: ignore[arg-type]
    assert 0.5 < found[-1]["eval/teacher_agreement"] < 1
    right = sum(found[-1][f"test/class_accuracy/{label}"] * count for label, count in enumerate(counts(student)))
    assert right / 360 == pytest.approx(found[-1]["test/accuracy"], abs=1e-6)
    step = records(student)[0]["metrics"]
    wanted = {"train/lr", "train/grad_norm", "train/loss/soft_targets", "train/loss/cross_entropy", "time/step_s"}
    assert wanted | {"time/examples_per_s", "time/tflops_per_s", "distill/temperature"} <= set(step)
    flops = 3 * student.model.forward_flops_per_example * 128
    assert step["time/tflops_per_s"] * step["time/step_s"] == pytest.approx(flops / 1e12)


def agreement(student: Plan, split: SplitName) -> float:
    """From the student's last checkpoint and the teacher's weights."""
    assert student.distill is not None
    inputs, _ = examples(student, split)
    model = build_model(student.job.model, student.data, 0)
    load_weights(model, CheckpointWeights(end(student)))
    teacher = build_teacher(student.distill, student.data, signals="fp16", device=CPU)
    with torch.no_grad():
        return float((model.eval()(inputs).argmax(-1) == teacher.ask(inputs).logits.argmax(-1)).double().mean())


def counts(student: Plan) -> list[int]:
    return examples(student, "test")[1].bincount(minlength=10).tolist()


def examples(student: Plan, split: SplitName) -> tuple[Tensor, Tensor]:
    data = student.job.data
    splits = load_splits(data, student.job.storage_folder, student.data)
    batch, _ = next(eval_batches(data, splits[split], student.data, rank=0, world_size=1, batch=1000))
    return batch.inputs, batch.targets


# --------------------------------------------------------------------------------------------- the share of the peak


def test_peaks_by_the_names_that_drivers_give() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == 989.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp16") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", "tf32") == 378e12
    assert peak_flops("NVIDIA H100 NVL", "fp32") == 60e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("NVIDIA A100 80GB PCIe", "bf16") == peak_flops("A100-PCIE-40GB", "bf16") == 312e12
    assert peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None, "it has no units for it"
    assert peak_flops("NVIDIA GeForce RTX 4090", "fp32") == 82.6e12
    for unknown in ("", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_flops(unknown, "fp32") is None, unknown


def test_model_flops_utilisation_is_of_all_devices_together(tmp_path: Path) -> None:
    overrides = ("precision.dtype=fp16", "parallel.workers=2", "parallel.device=cuda")
    plan = planned(tmp_path, *overrides, gpus=2.0)
    speed = plan_speed(plan, ["NVIDIA H200", "NVIDIA A100-SXM4-40GB"])
    assert speed == Speed(64, 3 * 4800 * 64, 989.5e12 + 312e12)
    assert speed.metrics(0.5) == {
        "time/step_s": 0.5,
        "time/examples_per_s": 128.0,
        "time/tflops_per_s": 3 * 4800 * 64 / 0.5 / 1e12,
        "time/mfu": 3 * 4800 * 64 / 0.5 / (989.5e12 + 312e12),
    }
    assert plan_speed(plan, ["NVIDIA H200", "a new one"]).peak is None
    assert plan_speed(planned(tmp_path), []) == Speed(64, 3 * 4800 * 64, None)
    shared = planned(tmp_path, "parallel.gpus_per_worker=0.5", "parallel.device=cuda", gpus=1.0)
    assert plan_speed(shared, ["NVIDIA H200"]).peak == 0.5 * 67e12
    assert set(Speed(64).metrics(0.5)) == {"time/step_s", "time/examples_per_s"}, "no FLOPs are known"


def test_every_record_has_the_speed() -> None:
    told: list[dict[str, Any]] = []
    reporter = Reporter(
        told.extend,
        lambda: False,
        first_step=0,
        rank=0,
        world_size=1,
        speed=Speed(32, flops=1e9, peak=4e9),
        record_every=1,
        device=CPU,
    )
    reporter.add(TrainState(step=1), StepResult(torch.tensor(1.0), {}, None, True, None), 0.1)
    reporter.flush(1)
    metrics = told[0]["metrics"]
    assert metrics["time/mfu"] == pytest.approx(1e9 / metrics["time/step_s"] / 4e9)
    assert metrics["time/tflops_per_s"] == pytest.approx(1e-3 / metrics["time/step_s"])
