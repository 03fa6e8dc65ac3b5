"""Evaluation of a model on a split: exact for any number of ranks, no example counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from temper.data.batches import Batch
from temper.data.sources import SplitName
from temper.engine.base import LossFunction
from temper.files import read_json, write_json
from temper.outputs import logits_of
from temper.parallel.groups import Group
from temper.remote_store import fetch, publish

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


ALONE = Group()


def evaluate_splits(on: Callable[[SplitName], dict[str, float]], held_out: bool, last: bool) -> dict[str, float]:
    """`eval/…` on the held-out examples, where there are some, else on the test split; `test/…` at the end.

    `on` evaluates one split.
    """
    values = {f"eval/{key}": value for key, value in on("validation" if held_out else "test").items()}
    if last:
        tested = on("test") if held_out else {key.removeprefix("eval/"): value for key, value in values.items()}
        values |= {f"test/{key}": value for key, value in tested.items()}
    return values


def teacher_metrics(file: Path, measure: Callable[[], dict[str, float]], group: Group = ALONE) -> dict[str, float]:
    """`teacher/…`: what `file` has, or else what `measure` gives, which rank 0 then writes there: once for all students
    of a teacher. Collective over the ranks of `group`, by default this one alone."""
    if group.rank == 0:
        fetch(file)
    known = [read_json(file) if group.rank == 0 else None]
    if group.size > 1:
        dist.broadcast_object_list(known, src=0, group=group.process_group)
    metrics = known[0]
    if metrics is None:
        metrics = measure()
        if group.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, metrics)
            publish([file])
    return {f"teacher/{name}": value for name, value in metrics.items()}


def evaluate(
    predict: Callable[[Tensor], Any],
    batches: Iterator[tuple[Batch, int]],
    loss: LossFunction,
    metrics: MetricCollection,
    device: torch.device,
    group: Group | None = None,
) -> dict[str, float]:
    """Mean loss and metrics over the split whose share `batches` gives this rank of `group`, by default all of it.

    Collective: every rank must be given equally many batches. A batch's `int` counts its valid leading rows.
    """
    metrics.reset()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch, num_valid in batches:
        outputs = logits_of(predict(batch.inputs)).float()[:num_valid]
        targets = batch.targets.to(device)[:num_valid]
        if num_valid == 0:
            continue
        terms = loss(outputs, targets)
        batch_loss = sum(float(value) for value in terms.values())
        totals += torch.tensor([batch_loss * num_valid, num_valid], dtype=torch.float64, device=device)
        metrics.update(outputs, targets)
    if group is not None and group.size > 1:
        dist.all_reduce(totals, group=group.process_group)
    values = {name: float(value) for name, value in metrics.compute().items()}
    return {"loss": float(totals[0] / totals[1]), **values}
