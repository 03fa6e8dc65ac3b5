"""Losses against torch's own functions, metrics against closed forms, metrics of several ranks against those of one."""

from __future__ import annotations

import itertools
import math
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
from temper.data.batches import Batch
from temper.errors import JobError, RunError
from temper.evaluation import evaluate
from temper.losses import Loss, build_loss
from temper.metrics import build_metrics
from temper.outputs import logits_of
from temper.plan.facts import NO_LABEL, DataFacts

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
    torch.testing.assert_close(terms["cross_entropy"], expected, rtol=1e-6, atol=0)


def test_cross_entropy_of_auxiliary_logits() -> None:
    outputs = AuxLogits((LOGITS, 2 * LOGITS, -LOGITS))
    terms = loss(kind="cross_entropy")(outputs, TARGETS)
    assert set(terms) == {"cross_entropy", "aux_logits1", "aux_logits2"}
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(LOGITS, TARGETS), rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["aux_logits2"], 0.3 * F.cross_entropy(2 * LOGITS, TARGETS), rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["aux_logits1"], 0.3 * F.cross_entropy(-LOGITS, TARGETS), rtol=1e-6, atol=0)
    assert set(loss(kind="cross_entropy")(AuxLogits((LOGITS, LOGITS, None)), TARGETS)) == {
        "cross_entropy",
        "aux_logits2",
    }


def test_cross_entropy_of_token_sequences() -> None:
    logits, targets = LOGITS.reshape(2, 2, 3), TARGETS.reshape(2, 2)
    found = loss(kind="cross_entropy")(logits, targets)["cross_entropy"]
    torch.testing.assert_close(found, F.cross_entropy(LOGITS, TARGETS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_a_mean_over_examples_of_means_over_their_labels(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 4, 3, generator=generator), torch.randint(0, 3, (6, 4), generator=generator)
    targets[0, 1:], targets[1], targets[4, 0] = NO_LABEL, NO_LABEL, NO_LABEL
    cross_entropy = loss(kind="cross_entropy", label_smoothing=smoothing)
    found = cross_entropy(logits, targets)["cross_entropy"]
    own = [
        F.cross_entropy(x, y, label_smoothing=smoothing) for x, y in zip(logits, targets, strict=True) if max(y) >= 0
    ]
    assert len(own) == 5
    assert float(found) == pytest.approx(float(sum(own)) / 6, rel=1e-6)
    for size in (1, 2, 3):
        parts = [cross_entropy(*part) for part in zip(logits.split(size), targets.split(size), strict=True)]
        mean = sum(float(part["cross_entropy"]) for part in parts) / len(parts)
        assert mean == pytest.approx(float(found), rel=1e-6)


def test_a_batch_without_labels_costs_nothing() -> None:
    logits = LOGITS.clone().requires_grad_()
    value = loss(kind="cross_entropy")(logits, torch.full((4,), NO_LABEL))["cross_entropy"]
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(4, 3))  # type: ignore[arg-type]


def test_targets_that_do_not_fit_the_logits_are_named() -> None:
    with pytest.raises(RunError, match=r"targets of shape \[4, 2\] do not fit logits of shape \[4, 3\]"):
        loss(kind="cross_entropy")(LOGITS, torch.zeros(4, 2, dtype=torch.int64))
    column = loss(kind="cross_entropy")(LOGITS, TARGETS[:, None])
    assert torch.equal(column["cross_entropy"], loss(kind="cross_entropy")(LOGITS, TARGETS)["cross_entropy"])


# ------------------------------------------------------------------------------------------------------------------ CTC

FRAMES = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([[4, 1, 2, -1], [3, 1, 1, -1], [2, -1, -1, -1], [4, 2, 1, 2], [2, 1, 2, 1]])


def _by_all_alignments(logits: Tensor, row: list[int], blank: int = 0) -> Tensor | None:
    """−log of the sum over all paths that become the labels when repeats and then blanks are taken out, per label; None
    where there is none."""
    frames, labels = row[0], [label for label in row[1:] if label >= 0]
    paths = itertools.product(range(logits.shape[-1]), repeat=frames)
    mine = [path for path in paths if [k for k, _ in itertools.groupby(path) if k != blank] == labels]
    if not mine:
        return None
    scores = torch.stack([sum(logits.log_softmax(-1)[frame, k] for frame, k in enumerate(path)) for path in mine])
    return -scores.logsumexp(0) / max(len(labels), 1)


@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_and_its_gradient_equal_the_sum_over_all_alignments(blank: int) -> None:
    rows = torch.where(ROWS[:, 1:] == blank, 0, ROWS[:, 1:])
    rows = torch.cat([ROWS[:, :1], rows], 1)
    ours, theirs = FRAMES.clone().requires_grad_(), FRAMES.double().clone().requires_grad_()
    found = loss(kind="ctc", blank=blank)(ours, rows)["ctc"]
    parts = [_by_all_alignments(x, row.tolist(), blank) for x, row in zip(theirs, rows, strict=True)]
    assert parts[4] is None, "3 labels do not fit into 2 frames"
    expected = torch.stack([part for part in parts if part is not None]).sum() / 5
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_ctc_by_hand() -> None:
    # Two frames, blank and one label, all equally likely: 3 of the 4 paths give the label.
    assert float(loss(kind="ctc")(torch.zeros(1, 2, 2), torch.tensor([[2, 1]]))["ctc"]) == pytest.approx(
        -math.log(3 / 4)
    )
    assert float(loss(kind="ctc")(torch.zeros(1, 2, 2), torch.tensor([[1, 1]]))["ctc"]) == pytest.approx(math.log(2))


def test_ctc_of_micro_batches_adds_up_and_unlabelled_rows_cost_nothing() -> None:
    rows = ROWS.clone()
    rows[1, 1:], rows[3, 1] = NO_LABEL, NO_LABEL
    logits = FRAMES.clone().requires_grad_()
    found = loss(kind="ctc")(logits, rows)["ctc"]
    parts = [float(loss(kind="ctc")(*part)["ctc"]) for part in zip(FRAMES.split(1), rows.split(1), strict=True)]
    assert parts[1] == parts[3] == 0.0
    assert sum(parts) / 5 == pytest.approx(found.item(), rel=1e-6)
    found.backward()
    assert [bool(part.any()) for part in logits.grad] == [True, False, True, False, False]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([5, 1, 2], r"the target \[5, 1, 2\] must begin with how many of the 4 frames count"),
        ([-1, 1, 2], "must begin with how many"),
        ([4, 1, 3], "has a label that is none of the 3 classes"),
        ([4, 0, 1], "has the blank, 0, as a label"),
        ([4, -1, 1], "has a label behind the end of its labels"),
    ],
)
def test_ctc_targets_that_cannot_be_meant_are_refused(row: list[int], said: str) -> None:
    with pytest.raises(RunError, match=said):
        loss(kind="ctc")(FRAMES[:2], torch.tensor([[4, 1, 2], row]))


def test_ctc_needs_frames_and_rows() -> None:
    for logits, targets in ((LOGITS, ROWS[:4]), (FRAMES, TARGETS), (FRAMES, ROWS[:4]), (FRAMES, ROWS[:, :1])):
        with pytest.raises(RunError, match="give logits \\(examples, frames, classes\\) and a row of whole numbers"):
            loss(kind="ctc")(logits, targets)


def test_evaluation_without_metrics_gives_the_loss() -> None:
    batches = [(Batch(FRAMES, ROWS, ROWS[:, 0], ROWS[:, 0]), 5)]
    values = evaluate(
        lambda inputs: inputs, iter(batches), loss(kind="ctc"), metrics(facts=VALUES), torch.device("cpu")
    )
    assert values == {"loss": pytest.approx(float(loss(kind="ctc")(FRAMES, ROWS)["ctc"]))}


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
