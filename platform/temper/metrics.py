"""Evaluation metrics by name, from torchmetrics; exact over a split and the same for any number of ranks.

Adding a metric: its name in `config/schema.py` and one line in `_CLASSIFICATION` or `_REGRESSION`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from temper.config.schema import EvaluationConfig
from temper.errors import JobError, Problem
from temper.parallel.groups import Group
from temper.plan.facts import NO_LABEL, DataFacts
from temper.plan.metric_names import CLASS_ACCURACY, MOST_CLASSES, class_labels
from temper.torchvision_import import declare_torchvision_operators

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def build_metrics(
    config: EvaluationConfig, facts: DataFacts, device: torch.device | str, group: Group | None = None
) -> Metrics:
    """The job's metrics on `device`, over the ranks of `group`, by default this process alone.

    Counts and rankings are exact, sums of errors are taken in fp64. Raises JobError where a metric needs classes and
    the data have none.
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

    labels = _measured_classes(config, facts)
    names = [*config.metrics, *([CLASS_ACCURACY] if labels else [])]
    metrics = {name: _build(name, facts.num_classes or 0) for name in names}
    for transformer in metrics.values():
        metric = transformer.wrapped_metric
        metric.sync_on_compute = group is not None and group.size > 1
        metric.process_group = group.process_group if group is not None else None
    return Metrics(MetricCollection(metrics).to(device), labels)


class Metrics:
    """Metrics of a split, batch by batch. `labels` are those of the classes that are measured one by one."""

    def __init__(self, collection: MetricCollection, labels: Sequence[str]) -> None:
        self._collection, self._labels = collection, labels

    def reset(self) -> None:
        self._collection.reset()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds logits (examples, …, classes), or predictions, and targets (examples, …), where a class of NO_LABEL does
        not count."""
        self._collection.update(outputs, targets)

    def compute(self) -> dict[str, float]:
        """By name, with `class_accuracy/…` of each class that has examples. Collective over the ranks, each of which
        must have been updated: torchmetrics cannot gather from one without examples."""
        found = self._collection.compute()
        counts = found.pop(CLASS_ACCURACY).tolist() if self._labels else []
        values = {name: float(value) for name, value in found.items()}
        for label, (right, *_, examples) in zip(self._labels, counts, strict=True):
            if examples:
                values[f"{CLASS_ACCURACY}/{label}"] = right / examples
        return values


def _measured_classes(config: EvaluationConfig, facts: DataFacts) -> list[str]:
    """The labels of the classes that are measured one by one; none where targets are no classes, or these too many."""
    of_classes = any(name in _CLASSIFICATION for name in config.metrics)
    if not config.per_class or not of_classes or facts.num_classes is None or facts.num_classes > MOST_CLASSES:
        return []
    return class_labels(facts.num_classes, facts.class_names)


def _build(name: str, num_classes: int) -> Any:
    from torchmetrics import classification, regression
    from torchmetrics.wrappers import LambdaInputTransformer

    if name in _REGRESSION:
        metric = _REGRESSION[name](regression).set_dtype(torch.float64)
        return LambdaInputTransformer(metric, _as_values, _as_values)
    build = _count_classes if name == CLASS_ACCURACY else _CLASSIFICATION[name]
    metric = build(classification, num_classes)
    return LambdaInputTransformer(metric, _as_probabilities if name in _OF_PROBABILITIES else _as_rows, torch.flatten)


def _as_rows(logits: Tensor) -> Tensor:
    return logits.flatten(0, -2)


def _as_probabilities(logits: Tensor) -> Tensor:
    # torchmetrics would decide for each batch by its values whether they are logits or probabilities.
    return _as_rows(logits).float().softmax(-1)


def _as_values(values: Tensor) -> Tensor:
    return values.double().flatten()


def _count_classes(classification: Any, num_classes: int) -> Any:
    """Of each class (classes, 5): how many examples are rightly, wrongly, rightly not and wrongly not taken for it, and
    how many are of it."""
    return classification.MulticlassStatScores(num_classes, average=None, ignore_index=NO_LABEL)


# The first argument is torchmetrics' `classification`, `k` the number of classes. Accuracies count examples; F1,
# precision, recall and AUROC are means over the classes.
_CLASSIFICATION: dict[str, Callable[[Any, int], Any]] = {
    "accuracy": lambda c, k: c.MulticlassAccuracy(k, average="micro", ignore_index=NO_LABEL),
    "top5_accuracy": lambda c, k: c.MulticlassAccuracy(k, average="micro", top_k=min(5, k), ignore_index=NO_LABEL),
    "f1": lambda c, k: c.MulticlassF1Score(k, ignore_index=NO_LABEL),
    "precision": lambda c, k: c.MulticlassPrecision(k, ignore_index=NO_LABEL),
    "recall": lambda c, k: c.MulticlassRecall(k, ignore_index=NO_LABEL),
    "auroc": lambda c, k: c.MulticlassAUROC(k, ignore_index=NO_LABEL),
    "calibration_error": lambda c, k: c.MulticlassCalibrationError(k, ignore_index=NO_LABEL),
}
_OF_PROBABILITIES = frozenset({"auroc", "calibration_error"})
_REGRESSION: dict[str, Callable[[Any], Any]] = {
    "mse": lambda r: r.MeanSquaredError(),
    "mae": lambda r: r.MeanAbsoluteError(),
}
