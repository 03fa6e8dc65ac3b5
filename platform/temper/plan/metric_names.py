"""Names of metrics that are known before a training: those of single classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

CLASS_ACCURACY = "class_accuracy"
"""The accuracy of class c is `class_accuracy/c`, after `eval/`, `test/` or `teacher/`."""
MOST_CLASSES = 100
"""Where there are more classes, none is measured by itself."""

_LONGEST = 100


def class_labels(num_classes: int, names: Sequence[str]) -> list[str]:
    """What classes are called in names of metrics: by their own names, with `_` for what MLflow does not allow there,
    or else by their numbers, all of them with as many digits, so that they sort."""
    labels = [re.sub(r"[^\w\-. :]", "_", name)[:_LONGEST].strip() for name in names]
    if len(set(labels) - {""}) == num_classes:
        return labels
    digits = len(str(num_classes - 1))
    return [f"{number:0{digits}}" for number in range(num_classes)]


def without_classes(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics but for those of single classes, which are too many for a line or a table."""
    return {name: value for name, value in metrics.items() if f"{CLASS_ACCURACY}/" not in name}
