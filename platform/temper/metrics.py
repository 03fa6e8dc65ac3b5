"""Evaluation metrics by name, from torchmetrics; exact over a split and the same for any number of ranks.

Adding a metric: its name in `config/schema.py` and one line in `_CLASSIFICATION` or `_REGRESSION`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from temper.config.schema import EvaluationConfig
from temper.errors import JobError, Problem
from temper.parallel.groups import Group
from temper.plan.facts import DataFacts
from temper.torchvision_import import declare_torchvision_operators

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def build_metrics(
    config: EvaluationConfig, facts: DataFacts, device: torch.device | str, group: Group | None = None
) -> MetricCollection:
    """The job's metrics on `device`; `update` takes logits (examples, …, classes) or predictions, and targets.

    `compute` is collective over `group`, by default this process alone; each of its ranks must have been updated, as
    torchmetrics cannot gather from a rank without examples. Counts and rankings are exact, sums of errors are taken in
    fp64. Raises JobError where a metric needs classes and the data have none.
    """
    problems = [
        Problem(f"evaluation.metrics.{index}", name, "needs data with classes", f"use {' or '.join(_REGRESSION)}")
        for index, name in enumerate(config.metrics)
        if name in _CLASSIFICATION and facts.num_classes is None
    ]
    if problems:
        raise JobError(problems)
    # torchmetrics imports torchvision where it is installed; both take seconds and only evaluation needs them.
    declare_torchvision_operators()
    from torchmetrics import MetricCollection

    metrics = {name: _build(name, facts.num_classes or 0) for name in config.metrics}
    for transformer in metrics.values():
        metric = transformer.wrapped_metric
        metric.sync_on_compute = group is not None and group.size > 1
        metric.process_group = group.process_group if group is not None else None
    return MetricCollection(metrics).to(device)


def _build(name: str, num_classes: int) -> Any:
    from torchmetrics import classification, regression
    from torchmetrics.wrappers import LambdaInputTransformer

    if name in _REGRESSION:
        metric = _REGRESSION[name](regression).set_dtype(torch.float64)
        return LambdaInputTransformer(metric, _as_values, _as_values)
    metric = _CLASSIFICATION[name](classification, num_classes)
    return LambdaInputTransformer(metric, _as_probabilities if name in _OF_PROBABILITIES else _as_rows, torch.flatten)


def _as_rows(logits: Tensor) -> Tensor:
    return logits.flatten(0, -2)


def _as_probabilities(logits: Tensor) -> Tensor:
    # torchmetrics would decide for each batch by its values whether they are logits or probabilities.
    return _as_rows(logits).float().softmax(-1)


def _as_values(values: Tensor) -> Tensor:
    return values.double().flatten()


# The first argument is torchmetrics' `classification`, `k` the number of classes. Accuracies count examples; F1,
# precision, recall and AUROC are means over the classes.
_CLASSIFICATION: dict[str, Callable[[Any, int], Any]] = {
    "accuracy": lambda c, k: c.MulticlassAccuracy(k, average="micro"),
    "top5_accuracy": lambda c, k: c.MulticlassAccuracy(k, average="micro", top_k=min(5, k)),
    "f1": lambda c, k: c.MulticlassF1Score(k),
    "precision": lambda c, k: c.MulticlassPrecision(k),
    "recall": lambda c, k: c.MulticlassRecall(k),
    "auroc": lambda c, k: c.MulticlassAUROC(k),
    "calibration_error": lambda c, k: c.MulticlassCalibrationError(k),
}
_OF_PROBABILITIES = frozenset({"auroc", "calibration_error"})
_REGRESSION: dict[str, Callable[[Any], Any]] = {
    "mse": lambda r: r.MeanSquaredError(),
    "mae": lambda r: r.MeanAbsoluteError(),
}
