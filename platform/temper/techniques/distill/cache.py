"""The cache of what a teacher says: asking it, and reading the answers while the student trains.

It keeps raw logits and not probabilities, so that one cache serves every temperature. The files are those of
:mod:`temper.techniques.distill.cache_files`.

With `top_k` only the k largest logits of a prediction are kept, with their classes, and one number r for the n others:
the logarithm of the mean of their exponentials. Restored, each of the n is r. So at T = 1 the k probabilities are
exactly the teacher's, and the others share the rest of it evenly. At other temperatures: the mean of a concave function
is at most the function of the mean (Jensen), so for T ≥ 1 the n·exp(r/T) that the others get is at least what they
had, every kept probability is at most the teacher's, and the distance

    ½·Σ |teacher − restored| ≤ what the restored prediction gives to the others at T;

for T < 1 it is the other way round: at most what the teacher gives to them. Both are :func:`left_mass`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from temper.data.sources import SplitName
from temper.errors import RunError
from temper.plan.distill import CachePlan, FeaturePair
from temper.techniques.distill.cache_files import (
    TEMPERATURES,
    Columns,
    Cut,
    Tally,
    fetch_cache,
    join_tallies,
    map_columns,
    open_manifest,
    write_columns,
)
from temper.techniques.distill.signals import Signals

_FEATURE = "feature-"  # and the pair's index: the name of a column
_MOST_UINT16 = 2**16


# --------------------------------------------------------------------------------------------------------------- asking


def write_piece(
    file: Path,
    rows: Tensor,
    inputs_of: Callable[[Tensor], Tensor],
    ask: Callable[[Tensor], Signals],
    *,
    pass_rows: int,
    top_k: int | None,
    features: bool,
) -> None:
    """Asks the teacher about `rows`, of which `inputs_of` gives the inputs, `pass_rows` at a time, and writes it down.

    `features` says whether its features are kept beside the logits. Raises RunError where a number is not finite.
    """
    answers, tallies = [], []
    for asked in rows.split(pass_rows):
        signals = ask(inputs_of(asked)).to(torch.device("cpu"))
        signals = signals if features else Signals(signals.logits)
        _check_finite(signals)
        kept, tally = _kept(signals.logits, top_k)
        said = {f"{_FEATURE}{index}": feature.numpy() for index, feature in enumerate(signals.features)}
        answers.append({**kept, **said})
        tallies.append(tally)
    columns = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
    write_columns(file, columns, join_tallies(tallies))


def _check_finite(signals: Signals) -> None:
    """Here, because a teacher on a GPU does not wait to look."""
    if not all(tensor.isfinite().all() for tensor in (signals.logits, *signals.features)):
        kind = str(signals.logits.dtype).removeprefix("torch.")
        raise RunError(f"what the teacher says is not finite in {kind}; write `distill.signals: fp32`")


def _kept(logits: Tensor, top_k: int | None) -> tuple[Columns, Tally]:
    if top_k is None:
        return {"logits": logits.numpy()}, Tally(len(logits))
    kept = keep_largest(logits, top_k)
    total, largest, bound = zip(*_restoration_errors(logits, kept), strict=True)
    return kept, Tally(len(logits), kept["rest"].size, total, largest, bound)


def keep_largest(logits: Tensor, count: int) -> dict[str, npt.NDArray[Any]]:
    """Of logits (…, classes) the `count` largest (…, count), of equal ones those of lower classes, their classes, and
    the logarithm of the mean exponential of the others (…), float32."""
    values, classes = logits.float().sort(dim=-1, descending=True, stable=True)
    others = values[..., count:].double()
    rest = others.logsumexp(-1) - math.log(others.shape[-1])
    return {
        "largest": values[..., :count].to(logits.dtype).numpy(),
        "classes": classes[..., :count].numpy().astype(np.uint16 if logits.shape[-1] <= _MOST_UINT16 else np.int32),
        "rest": rest.float().numpy(),
    }


def restore(kept: Columns, num_classes: int) -> Tensor:
    """Logits (…, num_classes), float32, of what :func:`keep_largest` kept."""
    rest = torch.from_numpy(kept["rest"]).unsqueeze(-1)
    classes = torch.from_numpy(kept["classes"].astype(np.int64))
    return rest.repeat_interleave(num_classes, -1).scatter_(-1, classes, torch.from_numpy(kept["largest"]).float())


def left_mass(logits: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """What softmax(logits / temperature) gives to all but `classes` (…, k), for each prediction."""
    probabilities = torch.softmax(logits.double() / temperature, -1)
    return probabilities.scatter(-1, classes, 0.0).sum(-1)


def _restoration_errors(logits: Tensor, kept: Columns) -> list[tuple[float, float, float]]:
    """For each temperature the sum and the largest of the total variation distances, and their largest bound."""
    restored, classes = restore(kept, logits.shape[-1]), torch.from_numpy(kept["classes"].astype(np.int64))
    errors = []
    for temperature in TEMPERATURES:
        given, back = (torch.softmax(values.double() / temperature, -1) for values in (logits, restored))
        distances = (given - back).abs().sum(-1) / 2
        bound = left_mass(restored, classes, temperature)
        errors.append((float(distances.sum()), float(distances.max()), float(bound.max())))
    return errors


# -------------------------------------------------------------------------------------------------------------- reading


class CachedSignals:
    """What the teacher said, memory-mapped; safe to use in several processes, and pickled as the name of its folder.

    Opening it raises RunError as :func:`temper.techniques.distill.cache_files.open_manifest` does, and where it has not
    the features of `pairs`.
    """

    def __init__(self, plan: CachePlan, pairs: Sequence[FeaturePair] = ()) -> None:
        fetch_cache(plan.folder)
        manifest = open_manifest(plan)
        self._plan, self._pairs = plan, tuple(pairs)
        self._splits = {split: _MappedSplit(plan.folder, manifest, split) for split in manifest["splits"]}
        self._train = self._splits["train"]
        self._num_classes = self._splits["test"].shapes()["logits"][-1]
        cached = [shape for name, shape in self._train.shapes().items() if name.startswith(_FEATURE)]
        needed = [pair.teacher_shape for pair in pairs]
        if cached != needed:
            raise RunError(f"the cache in {plan.folder} has features of the shapes {cached}, the job needs {needed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedSignals, (self._plan, self._pairs)

    def signals(self, rows: Tensor, views: Tensor) -> Signals:
        """Of `rows` of the training split in `views`, both (examples,) int64, in their order: logits (examples, …,
        classes), float32 where they were restored, and, where they are cached, features.

        Where all views are alike the cache has one, and `views` is not looked at.
        """
        columns = self._train.gather(rows.numpy(), views.numpy())
        features = tuple(torch.from_numpy(column) for name, column in columns.items() if name.startswith(_FEATURE))
        if self._plan.top_k is None:
            return Signals(torch.from_numpy(columns["logits"]), features)
        return Signals(restore(columns, self._num_classes), features)

    def logits(self, split: SplitName, rows: Tensor) -> Tensor:
        """Logits (examples, …, classes) of `rows` of the held-out or the test split; all of them, also with `top_k`."""
        return torch.from_numpy(self._splits[split].gather(rows.numpy(), np.zeros(len(rows), np.int64))["logits"])


class _MappedSplit:
    """The columns of a split, view after view, in as many arrays each as there are parts."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], split: str) -> None:
        self.cut = Cut(**manifest["splits"][split])
        self.parts = [map_columns(folder / part.name) for part in self.cut.parts()]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one example, in each column."""
        return {name: column.shape[1:] for name, column in self.parts[0].items()}

    def gather(self, rows: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """Each column's values of `rows` in `views`, copied. Raises IndexError for one that is not there."""
        if rows.min() < 0 or rows.max() >= self.cut.rows:
            raise IndexError(f"rows {rows.min()} … {rows.max()} of {self.cut.rows}")
        parts, places = np.divmod(rows, self.cut.part_rows)
        if self.cut.views > 1:
            if views.min() < 0 or views.max() >= self.cut.views:
                raise IndexError(f"views {views.min()} … {views.max()} of {self.cut.views}")
            parts += views * -(-self.cut.rows // self.cut.part_rows)
        if (parts == parts[0]).all():
            return {name: column.take(places, axis=0) for name, column in self.parts[parts[0]].items()}
        return self._gather_apart(parts, places)

    def _gather_apart(self, parts: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        first = self.parts[0]
        gathered = {name: np.empty((len(places), *first[name].shape[1:]), first[name].dtype) for name in first}
        for part in np.unique(parts):
            here = np.flatnonzero(parts == part)
            for name, column in self.parts[part].items():
                gathered[name][here] = column.take(places[here], axis=0)
        return gathered
