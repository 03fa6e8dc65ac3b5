"""Losses against torch's own functions, metrics against closed forms, metrics of several ranks against those of one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from distributed import run_distributed
from temper.config.schema import EvaluationConfig, LossConfig
from temper.errors import JobError, RunError
from temper.losses import Loss, build_loss
from temper.metrics import build_metrics
from temper.outputs import logits_of
from temper.plan.facts import DataFacts

CLASSES = DataFacts(1, 0, 1, (4,), 3, (), (), "")
VALUES = DataFacts(1, 0, 1, (4,), None, (), (), "")
LOGITS = torch.tensor([[2.0, 1.0, 0.5], [0.1, 0.2, 0.9], [0.3, 0.8, 0.4], [0.6, 0.5, 0.1]])
TARGETS = torch.tensor([0, 2, 0, 1])  # the first two are right


def loss(**section: Any) -> Loss:
    return build_loss(TypeAdapter(LossConfig).validate_python(section))


def metrics(*names: str, facts: DataFacts = CLASSES) -> Any:
    return build_metrics(EvaluationConfig(metrics=list(names)), facts, "cpu")  # type: ignore[arg-type]


class AuxLogits(tuple[Any, ...]):
    """As torchvision's named tuples: `logits` and two auxiliary ones."""

    _fields = ("logits", "aux_logits2", "aux_logits1")

    @property
    def logits(self) -> Tensor:
        return self[0]

    @property
    def aux_logits2(self) -> Tensor:
        return self[1]

    @property
    def aux_logits1(self) -> Tensor | None:
        return self[2]


class ModelOutput:
    """As transformers' outputs."""

    logits = LOGITS


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy(smoothing: float, dtype: torch.dtype) -> None:
    terms = loss(kind="cross_entropy", label_smoothing=smoothing)(LOGITS.to(dtype), TARGETS)
    expected = F.cross_entropy(LOGITS.to(dtype).float(), TARGETS, label_smoothing=smoothing)
    assert list(terms) == ["cross_entropy"]
    assert terms["cross_entropy"].dtype == torch.float32
    assert torch.equal(terms["cross_entropy"], expected)


def test_cross_entropy_of_auxiliary_logits() -> None:
    outputs = AuxLogits((LOGITS, 2 * LOGITS, -LOGITS))
    terms = loss(kind="cross_entropy")(outputs, TARGETS)
    assert set(terms) == {"cross_entropy", "aux_logits1", "aux_logits2"}
    assert torch.equal(terms["cross_entropy"], F.cross_entropy(LOGITS, TARGETS))
    assert torch.equal(terms["aux_logits2"], 0.3 * F.cross_entropy(2 * LOGITS, TARGETS))
    assert torch.equal(terms["aux_logits1"], 0.3 * F.cross_entropy(-LOGITS, TARGETS))
    assert set(loss(kind="cross_entropy")(AuxLogits((LOGITS, LOGITS, None)), TARGETS)) == {
        "cross_entropy",
        "aux_logits2",
    }


def test_cross_entropy_of_token_sequences() -> None:
    logits, targets = LOGITS.reshape(2, 2, 3), TARGETS.reshape(2, 2)
    assert torch.equal(loss(kind="cross_entropy")(logits, targets)["cross_entropy"], F.cross_entropy(LOGITS, TARGETS))


def test_logits_of() -> None:
    assert logits_of(LOGITS) is LOGITS
    assert logits_of(ModelOutput()) is LOGITS
    assert logits_of(AuxLogits((LOGITS, LOGITS, LOGITS))) is LOGITS
    with pytest.raises(TypeError, match="not list"):
        logits_of([LOGITS])


def test_mse_takes_targets_of_one_column() -> None:
    predictions, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 0.0, 1.0])
    assert float(loss(kind="mse")(predictions, targets)["mse"]) == pytest.approx((0 + 4 + 9) / 3)


SOURCE = """
def scaled(outputs, targets, factor):
    return factor * (outputs.sum() - targets.sum()).half()

def row(outputs, targets):
    return outputs[0]
"""


def test_python_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_losses.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    terms = loss(kind="python", target="user_losses:scaled", args={"factor": 2.0})(LOGITS, TARGETS)
    assert terms["scaled"].dtype == torch.float32
    assert float(terms["scaled"]) == pytest.approx(2 * (7.4 - 3), abs=0.01)
    with pytest.raises(RunError, match=r"user_losses:row returned a tensor of shape \[3\]"):
        loss(kind="python", target="user_losses:row")(LOGITS, TARGETS)
    with pytest.raises(JobError, match=r"loss\.target"):
        loss(kind="python", target="user_losses:column")


def test_class_metrics_in_closed_form() -> None:
    built = metrics("accuracy", "f1", "precision", "recall", "auroc", "calibration_error")
    built.update(LOGITS[:2], TARGETS[:2])
    built.update(LOGITS[2:], TARGETS[2:])
    values = {name: float(value) for name, value in built.compute().items()}
    # Predictions 0, 2, 1, 0 for the classes 0, 2, 0, 1.
    assert values["accuracy"] == 0.5
    assert values["precision"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert values["recall"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert values["f1"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert values["auroc"] == pytest.approx(_auroc(LOGITS.softmax(1), TARGETS))
    assert values["calibration_error"] == pytest.approx(_calibration_error(LOGITS.softmax(1), TARGETS))


def _auroc(probabilities: Tensor, targets: Tensor) -> float:
    """Share of pairs (of the class, not of it) in the right order, ties half, averaged over the classes."""
    areas = []
    for label in range(probabilities.shape[1]):
        inside, outside = probabilities[targets == label, label], probabilities[targets != label, label]
        above = inside[:, None] - outside[None]
        areas.append(float(((above > 0).double() + 0.5 * (above == 0).double()).mean()))
    return sum(areas) / len(areas)


def _calibration_error(probabilities: Tensor, targets: Tensor, bins: int = 15) -> float:
    confidence, predicted = probabilities.max(1)
    error = 0.0
    for number in torch.unique((confidence * bins).ceil()):
        here = (confidence * bins).ceil() == number
        gap = (predicted[here] == targets[here]).double().mean() - confidence[here].double().mean()
        error += float(gap.abs() * here.double().mean())
    return error


def test_logits_between_0_and_1_are_still_logits() -> None:
    whole, halves = metrics("calibration_error"), metrics("calibration_error")
    whole.update(LOGITS, TARGETS)
    halves.update(LOGITS[:1], TARGETS[:1])
    halves.update(LOGITS[1:], TARGETS[1:])  # all of these lie in 0…1, as probabilities do
    assert whole.compute() == halves.compute()


def test_top5_accuracy() -> None:
    facts = DataFacts(1, 0, 1, (4,), 8, (), (), "")
    built = metrics("top5_accuracy", facts=facts)
    built.update(torch.arange(8.0).repeat(8, 1), torch.arange(8))
    assert float(built.compute()["top5_accuracy"]) == 5 / 8


def test_value_metrics_in_closed_form() -> None:
    built = metrics("mse", "mae", facts=VALUES)
    built.update(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 0.0]))
    built.update(torch.tensor([[4.0]]), torch.tensor([1.0]))
    values = built.compute()
    assert (float(values["mse"]), float(values["mae"])) == (pytest.approx(13 / 3), pytest.approx(5 / 3))
    built.reset()
    built.update(torch.tensor([3.0]), torch.tensor([1.0]))
    assert float(built.compute()["mse"]) == 4.0


def test_class_metrics_need_classes() -> None:
    with pytest.raises(JobError) as raised:
        metrics("accuracy", "mse", "auroc", facts=VALUES)
    assert [problem.key for problem in raised.value.problems] == ["evaluation.metrics.0", "evaluation.metrics.2"]


NAMES = ("accuracy", "f1", "precision", "recall", "auroc", "calibration_error", "mse", "mae")


def _on_rank(rank: int, logits: Tensor, targets: Tensor, *splits: list[int]) -> list[dict[str, float]]:
    return [_share_on_rank(rank, logits, targets, sizes) for sizes in splits]


def _share_on_rank(rank: int, logits: Tensor, targets: Tensor, sizes: list[int]) -> dict[str, float]:
    start = sum(sizes[:rank])
    classes, values = metrics(*NAMES[:6]), metrics(*NAMES[6:], facts=VALUES)
    for row in range(start, start + sizes[rank], 5):
        rows = slice(row, min(row + 5, start + sizes[rank]))
        classes.update(logits[rows], targets[rows])
        values.update(logits[rows, 0], logits[rows, 1])
    return {name: float(value) for name, value in {**classes.compute(), **values.compute()}.items()}


def test_metrics_of_two_uneven_ranks_equal_those_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(101, 3, generator=generator)
    targets = torch.randint(0, 3, (101,), generator=generator)
    (alone,) = _on_rank(0, logits, targets, [101])
    first, second = run_distributed(_on_rank, 2, logits, targets, [61, 40], [100, 1])
    assert first == second
    for values in first:
        assert {name: values[name] for name in NAMES[:6]} == {name: alone[name] for name in NAMES[:6]}
        # Sums of errors are taken in fp64, in another order.
        assert values == pytest.approx(alone, rel=1e-12)
