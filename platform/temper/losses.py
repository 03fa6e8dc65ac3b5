"""Losses: functions of a network's outputs and the targets that return named terms, whose sum is the loss.

Adding a loss: a section in `config/schema.py`, a builder here and one line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from temper.config.schema import CrossEntropyLoss, LossConfig, MSELoss, PythonLoss
from temper.errors import RunError
from temper.outputs import aux_logits_of, logits_of
from temper.targets import load_target

Loss = Callable[[Any, Any], dict[str, Tensor]]

# Weight of each auxiliary classifier: Szegedy et al. 2015, section 5.
_AUX_WEIGHT = 0.3


def build_loss(config: LossConfig) -> Loss:
    """The function (outputs, targets) → terms: fp32 scalars, each the mean over the micro-batch, weights applied.

    Outputs may be a tensor, torchvision's logits with auxiliary ones, or a transformers output. Raises JobError where a
    `python` loss cannot be imported.
    """
    return KINDS[config.kind](config)


def _build_cross_entropy(config: CrossEntropyLoss) -> Loss:
    def cross_entropy(outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        terms = {"cross_entropy": _cross_entropy(logits_of(outputs), targets, config.label_smoothing)}
        for name, logits in aux_logits_of(outputs).items():
            terms[name] = _AUX_WEIGHT * _cross_entropy(logits, targets, config.label_smoothing)
        return terms

    return cross_entropy


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    # One row a prediction, so that (examples, tokens, classes) works as (examples, classes) does.
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


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
    "mse": _build_mse,
    "python": _build_python,
}
