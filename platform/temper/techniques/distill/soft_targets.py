"""Soft targets: a student learns the probabilities that its teacher gives to all classes, softened by a temperature.

Logits are (examples, …, classes), their positions (examples, …); everything is computed in fp32 and in log space, and
is a mean over the examples, so that micro-batches and ranks add up to the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from temper.config.schema import DistillConfig, LossConfig
from temper.errors import RunError
from temper.losses import Loss, mean_over_examples
from temper.outputs import logits_of
from temper.plan.distill import ramp_values
from temper.plan.facts import NO_LABEL
from temper.schedules import build_ramp
from temper.techniques.distill.signals import Taught

SOFT_TARGETS = "soft_targets"
"""The name of the term."""


def soft_targets(
    student: Tensor, teacher: Tensor, temperature: float, *, standardize: bool = False, mask: Tensor | None = None
) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) (Hinton et al. 2015, section 2), as a scalar.

    For each example the mean over its valid positions, which `mask` has (none: all are), and of these the mean over the
    examples. T² keeps the gradient's size: of one of N examples it is T · (p_student − p_teacher) / N.
    """
    student_log, teacher_log = (
        softened(logits, temperature, standardize).log_softmax(-1) for logits in (student, teacher)
    )
    divergence = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
    return temperature**2 * mean_over_examples(divergence, mask)


def decoupled(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float,
    non_target_weight: float,
    *,
    standardize: bool = False,
) -> Tensor:
    """T² · (TCKD + weight · NCKD): the target class against the others together, and the others among themselves (Zhao
    et al. 2022, equations 5 to 9), as a scalar.

    With 1 − p_teacher(target) as the weight it is `soft_targets`. `targets` has a class for each position; where it is
    NO_LABEL, the position is not valid.
    """
    valid = targets != NO_LABEL
    # Log-probabilities of (target, others) and of the others among themselves; the target's own place is 0 there.
    place = torch.zeros_like(student, dtype=torch.bool).scatter_(-1, (targets * valid).unsqueeze(-1), True)
    student_pair, student_others = _parts(softened(student, temperature, standardize), place)
    teacher_pair, teacher_others = _parts(softened(teacher, temperature, standardize), place)
    target_part = _divergence(teacher_pair, student_pair)
    others_part = _divergence(teacher_others, student_others, among=~place)
    return temperature**2 * mean_over_examples(target_part + non_target_weight * others_part, valid)


def softened(logits: Tensor, temperature: float, standardize: bool) -> Tensor:
    """Logits in fp32, divided by the temperature.

    `standardize`: brought to mean 0 and deviation 1 over the classes before (Sun et al. 2024, algorithm 1), so that the
    student need not have the teacher's range. The deviation is that of the paper, over K classes; 1e-5 is added to its
    square, because logits that are all alike, as an output layer of zeros gives, would have no gradient.
    """
    logits = logits.float()
    return (F.layer_norm(logits, logits.shape[-1:]) if standardize else logits) / temperature


def _parts(logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (…, 2) of the class at `place` and of all others together, and (…, classes) of each of the
    others among them, 0 at `place`."""
    others = torch.where(place, -torch.inf, logits)
    sums = torch.stack([torch.where(place, logits, 0.0).sum(-1), others.logsumexp(-1)], -1)
    return sums.log_softmax(-1), torch.where(place, 0.0, logits - sums[..., 1:])


def _divergence(teacher_log: Tensor, student_log: Tensor, among: Tensor | None = None) -> Tensor:
    """KL over the last dim, only over the classes in `among` where it is given."""
    terms = F.kl_div(student_log, teacher_log, reduction="none", log_target=True)
    return (terms if among is None else torch.where(among, terms, 0.0)).sum(-1)


class DistillLoss:
    """What a student is trained with: the terms of its own loss times 1 − alpha, and `soft_targets` times alpha.

    Temperature and alpha are those of the step that was begun last, at first of step 0; ramps go over the
    `dense_steps` of the dense phase and stay at their ends in later phases. What has no weight at any step is not
    computed: the labels with alpha 1, the soft targets with alpha 0.
    """

    def __init__(self, base: Loss, config: DistillConfig, loss: LossConfig, dense_steps: int) -> None:
        self._base, self._config, self._kind, self._dense_steps = base, config, loss.kind, dense_steps
        self._temperature_at = build_ramp(config.temperature, dense_steps)
        self._alpha_at = build_ramp(config.alpha, dense_steps)
        self.begin_step(0)

    def begin_step(self, applied_step: int) -> None:
        """Sets what the ramps are at this step, counted from 0 over all phases, without skipped ones."""
        self._step = applied_step
        self.temperature, self.alpha = self._temperature_at(applied_step), self._alpha_at(applied_step)

    def values(self) -> dict[str, float]:
        """See :func:`temper.plan.distill.ramp_values`; of the step that was begun last."""
        return ramp_values(self._config, self._dense_steps, self._step)

    def __call__(self, outputs: Any, taught: Taught) -> dict[str, Tensor]:
        """The named terms, whose sum is the loss; `outputs` as the base loss takes them. Raises RunError where the
        teacher's logits have another shape than the student's."""
        terms = {}
        if self._config.alpha != 1:
            terms = {name: (1 - self.alpha) * term for name, term in self._base(outputs, taught.targets).items()}
        if self._config.alpha != 0:
            terms[SOFT_TARGETS] = self.alpha * self._term(logits_of(outputs), taught)
        return terms

    def _term(self, student: Tensor, taught: Taught) -> Tensor:
        teacher, targets, config = taught.signals.logits, taught.targets, self._config
        if teacher.shape != student.shape:
            raise RunError(
                f"distill: the teacher gives logits of shape {list(teacher.shape)}, and the student of "
                f"{list(student.shape)}"
            )
        if config.loss == "decoupled":
            classes = targets.reshape(student.shape[:-1])
            weight = config.non_target_weight
            return decoupled(student, teacher, classes, self.temperature, weight, standardize=config.standardize)
        mask = self._mask(student, targets)
        return soft_targets(student, teacher, self.temperature, standardize=config.standardize, mask=mask)

    def _mask(self, student: Tensor, targets: Tensor) -> Tensor | None:
        """The positions that are taught, None for all: the frames that count, or the tokens that have a label. Of an
        example without any label they are all: a transfer set is made of such."""
        if self._kind == "ctc":
            return torch.arange(student.shape[1], device=student.device) < targets[:, :1]
        if self._kind != "cross_entropy" or student.dim() == 2:
            return None
        labelled = (targets != NO_LABEL).reshape(len(targets), -1)
        return (labelled | ~labelled.any(1, keepdim=True)).reshape(student.shape[:-1])
