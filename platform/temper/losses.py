"""Losses: functions of a network's outputs and the targets that return named terms, whose sum is the loss.

Adding a loss: a section in `config/schema.py`, a builder here and one line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from temper.config.schema import CrossEntropyLoss, CTCLoss, LossConfig, MSELoss, PythonLoss
from temper.errors import RunError
from temper.outputs import aux_logits_of, logits_of
from temper.plan.facts import NO_LABEL
from temper.targets import load_target

Loss = Callable[[Any, Any], dict[str, Tensor]]

# Weight of each auxiliary classifier: Szegedy et al. 2015, section 5.
_AUX_WEIGHT = 0.3


def build_loss(config: LossConfig) -> Loss:
    """The function (outputs, targets) → terms: fp32 scalars, each the mean over the micro-batch, weights applied.

    Outputs may be a tensor, torchvision's logits with auxiliary ones, or a transformers output. `cross_entropy` and
    `ctc` are means over the examples of what each costs by itself, so that micro-batches and ranks add up to the same
    whatever labels they happen to have: an example without a label (NO_LABEL) costs nothing and is counted.

    Raises JobError where a `python` loss cannot be imported; the function raises RunError where targets do not fit the
    outputs.
    """
    return KINDS[config.kind](config)


def mean_over_examples(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over the examples of each one's mean over its valid positions, as a scalar.

    `values` is (examples, …), `valid` a mask of its shape; an example without a valid position is 0.
    """
    if valid is None:
        return values.mean()
    rows, counted = values.reshape(len(values), -1), valid.reshape(len(valid), -1)
    return (torch.where(counted, rows, 0.0).sum(1) / counted.sum(1).clamp(min=1)).mean()


def _build_cross_entropy(config: CrossEntropyLoss) -> Loss:
    def cross_entropy(outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        terms = {"cross_entropy": _cross_entropy(logits_of(outputs), targets, config.label_smoothing)}
        for name, logits in aux_logits_of(outputs).items():
            terms[name] = _AUX_WEIGHT * _cross_entropy(logits, targets, config.label_smoothing)
        return terms

    return cross_entropy


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    positions = logits.shape[:-1]
    if len(targets) != len(logits) or targets.numel() != positions.numel():
        raise RunError(
            f"loss: cross_entropy: targets of shape {list(targets.shape)} do not fit logits of shape "
            f"{list(logits.shape)}; give one class for each of {list(positions)}"
        )
    # One row a prediction, so that (examples, tokens, classes) works as (examples, classes) does.
    values = F.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten(),
        ignore_index=NO_LABEL,
        reduction="none",
        label_smoothing=label_smoothing,
    ).reshape(positions)
    return mean_over_examples(values, None if values.dim() == 1 else targets.reshape(positions) != NO_LABEL)


def _build_ctc(config: CTCLoss) -> Loss:
    def ctc(outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        return {"ctc": _ctc(logits_of(outputs), targets, config.blank)}

    return ctc


def _ctc(logits: Tensor, targets: Tensor, blank: int) -> Tensor:
    """−log p(labels) (Graves et al. 2006, equation 8) per label, as the mean over the examples.

    An example whose labels do not fit into its frames has no alignment and a loss that is infinite. It counts as one
    without labels: in sets of speech a few are too short, and none of them should end a run.
    """
    if logits.dim() != 3 or targets.dim() != 2 or len(targets) != len(logits) or targets.shape[1] < 2:
        raise RunError(
            f"loss: ctc: logits of shape {list(logits.shape)} and targets of shape {list(targets.shape)}; give logits "
            "(examples, frames, classes) and a row of whole numbers for each example: frames, then labels"
        )
    # On the host, where torch wants the lengths.
    frames, labels = targets.cpu().long().split([1, targets.shape[1] - 1], 1)
    labelled = labels[:, 0] != NO_LABEL
    labels = labels.masked_fill(~labelled[:, None], NO_LABEL)
    _check_rows(frames, labels, logits.shape[1], logits.shape[2], blank)
    lengths = (labels >= 0).sum(1)
    values = F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        labels.clamp(min=0).to(logits.device),
        frames[:, 0],
        lengths,
        blank,
        reduction="none",
        zero_infinity=True,
    )
    return (values * (labelled / lengths.clamp(min=1)).to(values.device)).mean()


def _check_rows(frames: Tensor, labels: Tensor, num_frames: int, num_classes: int, blank: int) -> None:
    """Raises RunError where a target cannot be meant so; torch would read beyond its tensors."""
    is_label = labels >= 0
    rules = (
        ((frames < 0) | (frames > num_frames), f"must begin with how many of the {num_frames} frames count"),
        (labels >= num_classes, f"has a label that is none of the {num_classes} classes"),
        (labels == blank, f"has the blank, {blank}, as a label"),
        (is_label[:, 1:] & ~is_label[:, :-1], "has a label behind the end of its labels"),
    )
    for broken, rule in rules:
        for row in broken.any(1).nonzero()[:1, 0].tolist():
            raise RunError(f"loss: ctc: the target {[*frames[row].tolist(), *labels[row].tolist()]} {rule}")


def _build_mse(config: MSELoss) -> Loss:
    def mse(outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        predictions = logits_of(outputs).float()
        return {"mse": F.mse_loss(predictions, targets.float().reshape(predictions.shape))}

    return mse


def _build_python(config: PythonLoss) -> Loss:
    function = load_target(config.target, "loss.target")
    name = config.target.partition(":")[2]

    def python(outputs: Any, targets: Any) -> dict[str, Tensor]:
        value = function(outputs, targets, **config.args)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RunError(
                f"loss.target: {config.target} returned {found}; return a scalar tensor, the mean over the micro-batch"
            )
        return {name: value.reshape(()).to(torch.float32)}

    return python


KINDS: dict[str, Callable[[Any], Loss]] = {
    "cross_entropy": _build_cross_entropy,
    "ctc": _build_ctc,
    "mse": _build_mse,
    "python": _build_python,
}
