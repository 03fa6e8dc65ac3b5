"""Soft targets and their kin against closed forms and against a reference in NumPy's float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from temper.config.schema import DistillConfig, LossConfig
from temper.errors import RunError
from temper.losses import Loss, build_loss
from temper.plan.facts import NO_LABEL
from temper.techniques.distill.signals import Signals, Taught
from temper.techniques.distill.soft_targets import DistillLoss, decoupled, soft_targets, softened

Array = npt.NDArray[np.float64]


def logits(*shape: int, seed: int = 0, size: float = 3.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(of: Tensor, function: Any) -> Tensor:
    of = of.clone().requires_grad_()
    function(of).backward()
    assert of.grad is not None
    return of.grad


# ---------------------------------------------------------------------------------- the reference: examples one by one


def reference(
    student: Tensor,
    teacher: Tensor,
    t: float,
    *,
    standardize: bool = False,
    mask: Tensor | None = None,
    targets: Tensor | None = None,
    weight: float = 1.0,
) -> float:
    def log_probabilities(values: Array) -> Array:
        if standardize:
            values = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
        values = values / t
        return values - values.max() - np.log(np.exp(values - values.max()).sum())

    def divergence(p: Array, q: Array) -> float:
        return float((np.exp(p) * (p - q)).sum())

    def position(place: tuple[int, ...]) -> float:
        p, q = (log_probabilities(x[place].double().numpy()) for x in (teacher, student))
        if targets is None:
            return divergence(p, q)
        c, others = int(targets[place]), np.arange(len(p)) != int(targets[place])
        rest = [np.log(np.exp(x[others]).sum()) for x in (p, q)]
        among = [x[others] - r for x, r in zip((p, q), rest, strict=True)]
        return divergence(np.array([p[c], rest[0]]), np.array([q[c], rest[1]])) + weight * divergence(*among)

    examples = []
    for number in range(len(student)):
        places = [(number, *rest) for rest in np.ndindex(*student.shape[1:-1])]
        valid = [place for place in places if mask is None or bool(mask[place])]
        examples.append(sum(map(position, valid)) / max(len(valid), 1))
    return t**2 * sum(examples) / len(examples)


# -------------------------------------------------------------------------------------------------------- soft targets


def test_soft_targets_by_hand() -> None:
    # Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4) at T = 1: KL = 1/2 ln 2 + 1/4 ln 1/2 + 0 = 1/4 ln 2.
    teacher, student = torch.tensor([[0.5, 0.25, 0.25]]).log() + 7, torch.tensor([[0.25, 0.5, 0.25]]).log() - 3
    assert float(soft_targets(student, teacher, 1.0)) == pytest.approx(math.log(2) / 4, rel=1e-6)
    # At T = 2 of logits twice as large the distributions are these again, and T² is 4.
    assert float(soft_targets(2 * student, 2 * teacher, 2.0)) == pytest.approx(math.log(2), rel=1e-6)
    assert float(soft_targets(teacher, teacher, 3.0)) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_gradient_is_t_times_the_difference_of_probabilities(temperature: float) -> None:
    student, teacher = logits(6, 10), logits(6, 10, seed=1)
    found = gradient(student, lambda x: soft_targets(x, teacher, temperature))
    p_student, p_teacher = ((x.double() / temperature).softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(found.double(), temperature * (p_student - p_teacher) / 6, rtol=2e-6, atol=2e-7)


def test_a_high_temperature_matches_logits() -> None:
    """Hinton et al. 2015, equation 4: with T → ∞ the gradient is (z − v) / (N C) for logits of mean 0."""
    student, teacher = logits(5, 10), logits(5, 10, seed=1)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    found = gradient(student, lambda x: soft_targets(x, teacher, 2000.0))
    # What is left is of the order of logits / T.
    torch.testing.assert_close(found, centred / 50, rtol=5e-3, atol=5e-5)
    half_squares = (centred.square().sum(1) / 20).mean()
    assert float(soft_targets(student, teacher, 100.0)) == pytest.approx(float(half_squares), rel=0.03)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", [(7, 10), (3, 5, 4), (2, 3, 2, 6)])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets_equal_the_reference(shape: tuple[int, ...], temperature: float, standardize: bool) -> None:
    student, teacher = logits(*shape), logits(*shape, seed=1)
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(2)) < 0.6
    for given in (None, mask):
        found = soft_targets(student, teacher, temperature, standardize=standardize, mask=given)
        expected = reference(student, teacher, temperature, standardize=standardize, mask=given)
        assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_softened_in_fp32(dtype: torch.dtype) -> None:
    student, teacher = logits(6, 10).to(dtype), logits(6, 10, seed=1).to(dtype)
    found = soft_targets(student, teacher, 4.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, soft_targets(student.float(), teacher.float(), 4.0))


def test_large_logits_stay_finite() -> None:
    student = torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 0.0]])
    teacher, targets = student.flip(0), torch.tensor([0, 2])
    functions = (
        lambda x: soft_targets(x, teacher, 1.0),
        lambda x: decoupled(x, teacher, targets, 1.0, 8.0),
        lambda x: soft_targets(x, teacher, 1.0, standardize=True),
    )
    for function in functions:
        assert torch.isfinite(function(student))
        assert torch.isfinite(gradient(student, function)).all()
    assert float(soft_targets(student, teacher, 1.0)) == pytest.approx(1.2e5)


def test_standardised_logits_have_mean_0_and_deviation_1() -> None:
    scaled = softened(5 * logits(4, 100) + 30, 2.0, standardize=True)
    torch.testing.assert_close(scaled.mean(-1), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.std(-1, correction=0), torch.full((4,), 0.5), rtol=1e-5, atol=0)
    # The range of either network's logits does not matter, nor does an output layer of zeros break it.
    student, teacher = logits(4, 10), logits(4, 10, seed=1)
    pair = [soft_targets(scale * student, teacher - 9, 2.0, standardize=True) for scale in (1.0, 10.0)]
    assert float(pair[0]) == pytest.approx(float(pair[1]), rel=1e-4)
    flat = gradient(torch.zeros(4, 10), lambda x: soft_targets(x, teacher, 2.0, standardize=True))
    assert torch.isfinite(flat).all()


def test_masked_positions_get_no_gradient() -> None:
    student, teacher = logits(2, 3, 4), logits(2, 3, 4, seed=1)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    found = gradient(student, lambda x: soft_targets(x, teacher, 4.0, mask=mask))
    p_student, p_teacher = ((x / 4).softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(found[mask], (4 * (p_student - p_teacher) / (2 * 2))[mask], rtol=1e-5, atol=1e-6)
    assert (found[~mask] == 0).all()


# ----------------------------------------------------------------------------------------------------------- decoupled


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_with_the_teacher_s_doubt_as_weight_is_soft_targets(temperature: float) -> None:
    """Zhao et al. 2022, equation 7: KL = TCKD + (1 − p_t) · NCKD."""
    student, teacher = logits(1, 10), logits(1, 10, seed=1)
    for target in range(10):
        doubt = 1 - float((teacher / temperature).softmax(-1)[0, target])
        found = decoupled(student, teacher, torch.tensor([target]), temperature, doubt)
        assert float(found) == pytest.approx(float(soft_targets(student, teacher, temperature)), rel=1e-4)


@pytest.mark.parametrize("standardize", [False, True])
def test_decoupled_equals_the_reference(standardize: bool) -> None:
    student, teacher = logits(3, 5, 6), logits(3, 5, 6, seed=1)
    targets = torch.randint(0, 6, (3, 5), generator=torch.Generator().manual_seed(2))
    targets[0, 2:], targets[1] = NO_LABEL, NO_LABEL
    found = decoupled(student, teacher, targets, 4.0, 8.0, standardize=standardize)
    known: dict[str, Any] = {"targets": targets, "mask": targets != NO_LABEL, "weight": 8.0}
    assert float(found) == pytest.approx(reference(student, teacher, 4.0, standardize=standardize, **known), rel=1e-4)
    found_gradient = gradient(student, lambda x: decoupled(x, teacher, targets, 4.0, 8.0, standardize=standardize))
    assert (found_gradient[targets == NO_LABEL] == 0).all()


def test_the_gradient_of_decoupled_is_its_slope() -> None:
    student, teacher, targets = logits(2, 5), logits(2, 5, seed=1), torch.tensor([3, 0])
    found = gradient(student, lambda x: decoupled(x, teacher, targets, 2.0, 8.0))
    for place in np.ndindex(2, 5):
        shift = torch.zeros(2, 5, dtype=torch.float64)
        shift[place] = 1e-4
        up, down = (
            reference(student.double() + sign * shift, teacher, 2.0, targets=targets, weight=8.0) for sign in (1, -1)
        )
        assert float(found[place]) == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-5)


# -------------------------------------------------------------------------------------------------- the loss of a step


def distill_loss(
    loss: dict[str, Any] | None = None, steps: int = 11, base: Loss | None = None, **keys: Any
) -> DistillLoss:
    config = DistillConfig.model_validate({"teacher": "a.yaml", **keys})
    kind = TypeAdapter(LossConfig).validate_python(loss or {"kind": "cross_entropy"})
    return DistillLoss(base or build_loss(kind), config, kind, steps)


def taught(targets: Tensor, teacher: Tensor) -> Taught:
    return Taught(targets, Signals(teacher))


STUDENT, TEACHER, TARGETS = logits(6, 4), logits(6, 4, seed=1), torch.tensor([0, 1, 2, 3, 0, 1])


def never(outputs: Any, targets: Any) -> dict[str, Tensor]:
    raise AssertionError("the base loss was called")


def test_the_terms_are_weighted_by_alpha() -> None:
    terms = distill_loss(alpha=0.7, temperature=3.0)(STUDENT, taught(TARGETS, TEACHER))
    assert list(terms) == ["cross_entropy", "soft_targets"]
    hard = build_loss(TypeAdapter(LossConfig).validate_python({"kind": "cross_entropy"}))(STUDENT, TARGETS)
    assert float(terms["cross_entropy"]) == pytest.approx(0.3 * float(hard["cross_entropy"]))
    assert float(terms["soft_targets"]) == pytest.approx(0.7 * float(soft_targets(STUDENT, TEACHER, 3.0)))


def test_a_weight_of_nothing_computes_nothing() -> None:
    unlabelled = torch.full((6,), NO_LABEL)
    terms = distill_loss(alpha=1.0, base=never)(STUDENT, taught(unlabelled, TEACHER))
    assert list(terms) == ["soft_targets"]
    assert list(distill_loss(alpha=0.0, features="auto")(STUDENT, taught(TARGETS, TEACHER))) == ["cross_entropy"]


def test_decoupled_and_standardised_by_the_job() -> None:
    terms = distill_loss(alpha=1.0, loss=None, **{"standardize": True})(STUDENT, taught(TARGETS, TEACHER))
    assert float(terms["soft_targets"]) == float(soft_targets(STUDENT, TEACHER, 4.0, standardize=True))
    config = DistillConfig.model_validate({"teacher": "a", "alpha": 1, "loss": "decoupled", "non_target_weight": 2.0})
    kind = TypeAdapter(LossConfig).validate_python({"kind": "cross_entropy"})
    (term,) = DistillLoss(never, config, kind, 10)(STUDENT, taught(TARGETS, TEACHER)).values()
    assert float(term) == float(decoupled(STUDENT, TEACHER, TARGETS, 4.0, 2.0))


def test_ramps_rise_over_the_dense_phase_and_stay() -> None:
    temperature = {"start": 2.0, "end": 12.0}
    alpha = {"kind": "cosine", "start": 1.0, "end": 0.0}
    loss = distill_loss(temperature=temperature, alpha=alpha)
    assert loss.values() == {"distill/temperature": 2.0, "distill/alpha": 1.0}
    found = []
    for step in (0, 1, 5, 10, 11, 500):
        loss.begin_step(step)
        found.append(loss.values())
    assert [values["distill/temperature"] for values in found] == pytest.approx([2, 3, 7, 12, 12, 12])
    quarter = (1 + math.cos(math.pi / 10)) / 2
    assert [values["distill/alpha"] for values in found] == pytest.approx([1, quarter, 0.5, 0, 0, 0])
    loss.begin_step(5)
    terms = loss(STUDENT, taught(TARGETS, TEACHER))
    assert float(terms["soft_targets"]) == pytest.approx(0.5 * float(soft_targets(STUDENT, TEACHER, 7.0)))
    assert distill_loss().values() == {}
    assert distill_loss(alpha=alpha).values() == {"distill/alpha": 1.0}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_micro_batches_with_unequal_labels_add_up_to_the_batch(smoothing: float) -> None:
    targets = torch.tensor([0, NO_LABEL, NO_LABEL, NO_LABEL, 0, 1])
    section = {"kind": "cross_entropy", "label_smoothing": smoothing}
    loss = distill_loss(section, alpha=0.6)
    whole = loss(STUDENT, taught(targets, TEACHER))
    for size in (1, 2, 3):
        student, parts = STUDENT.split(size), taught(targets, TEACHER).split(size)
        terms = [loss(outputs, part) for outputs, part in zip(student, parts, strict=True)]
        for name, value in whole.items():
            mean = sum(float(part[name]) for part in terms) / len(terms)
            assert mean == pytest.approx(float(value), rel=1e-6)
    labelled = [0, 4, 5]
    hard = torch.nn.functional.cross_entropy(STUDENT[labelled], targets[labelled], label_smoothing=smoothing)
    assert float(whole["cross_entropy"]) == pytest.approx(0.4 * float(hard) * 3 / 6)
    assert float(whole["soft_targets"]) == pytest.approx(0.6 * float(soft_targets(STUDENT, TEACHER, 4.0)))


def test_tokens_without_a_label_are_not_taught_but_whole_sequences_are() -> None:
    student, teacher = logits(3, 4, 5), logits(3, 4, 5, seed=1)
    targets = torch.tensor([[1, 2, NO_LABEL, NO_LABEL], [NO_LABEL] * 4, [0, 1, 2, 3]])
    mask = torch.tensor([[True, True, False, False], [True] * 4, [True] * 4])
    terms = distill_loss(alpha=0.5)(student, taught(targets, teacher))
    assert float(terms["soft_targets"]) == pytest.approx(0.5 * reference(student, teacher, 4.0, mask=mask), rel=1e-5)
    hard = torch.nn.functional.cross_entropy(student.flatten(0, 1), targets.flatten(), reduction="none").view(3, 4)
    expected = (hard[0].sum() / 2 + 0 + hard[2].mean()) / 3
    assert float(terms["cross_entropy"]) == pytest.approx(0.5 * float(expected), rel=1e-6)


def test_frames_that_do_not_count_are_not_taught() -> None:
    student, teacher = logits(3, 4, 5), logits(3, 4, 5, seed=1)
    targets = torch.tensor([[4, 1, 2], [2, 3, -1], [3, NO_LABEL, NO_LABEL]])
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
    terms = distill_loss({"kind": "ctc"}, alpha=0.5)(student, taught(targets, teacher))
    assert list(terms) == ["ctc", "soft_targets"]
    assert float(terms["soft_targets"]) == pytest.approx(0.5 * reference(student, teacher, 4.0, mask=mask), rel=1e-5)


def test_a_teacher_of_another_shape_is_refused() -> None:
    with pytest.raises(RunError, match=r"gives logits of shape \[6, 3\], and the student of \[6, 4\]"):
        distill_loss()(STUDENT, taught(TARGETS, TEACHER[:, :3]))
