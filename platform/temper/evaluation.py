"""Evaluation of a model on a split, and of its teacher: exact for any number of ranks, no example counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from temper.data.batches import Batch
from temper.data.sources import SplitName
from temper.engine.base import LossFunction
from temper.files import read_json, replaced, write_json
from temper.metrics import Metrics
from temper.outputs import logits_of
from temper.parallel.groups import Group
from temper.plan.distill import DistillPlan
from temper.plan.facts import NO_LABEL
from temper.remote_store import fetch, publish

ALONE = Group()

Answers = npt.NDArray[np.integer[Any]]
"""A teacher's most probable class of each row of a split (examples, …)."""


def evaluate_splits(on: Callable[[SplitName], dict[str, float]], held_out: bool, last: bool) -> dict[str, float]:
    """`eval/…` on the held-out examples, where there are some, else on the test split; `test/…` at the end.

    `on` evaluates one split.
    """
    values = {f"eval/{key}": value for key, value in on("validation" if held_out else "test").items()}
    if last:
        tested = on("test") if held_out else {key.removeprefix("eval/"): value for key, value in values.items()}
        values |= {f"test/{key}": value for key, value in tested.items()}
    return values


def evaluate(
    predict: Callable[[Tensor], Any],
    batches: Iterator[tuple[Batch, int]],
    loss: LossFunction,
    metrics: Metrics,
    device: torch.device,
    group: Group | None = None,
    answers: Answers | None = None,
) -> dict[str, float]:
    """Mean loss and metrics over the split whose share `batches` gives this rank of `group`, by default all of it; with
    a teacher's `answers` also `teacher_agreement`, the share of examples, or of their labelled positions, of which the
    most probable class is the teacher's.

    Collective: every rank must be given equally many batches. A batch's `int` counts its valid leading rows.
    """
    metrics.reset()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss × examples, examples, agreeing, compared
    for batch, num_valid in batches:
        outputs = logits_of(predict(batch.inputs)).float()[:num_valid]
        targets = batch.targets.to(device)[:num_valid]
        if num_valid == 0:
            continue
        terms = loss(outputs, targets)
        batch_loss = sum(float(value) for value in terms.values())
        totals[:2] += torch.tensor([batch_loss * num_valid, num_valid], dtype=torch.float64, device=device)
        metrics.update(outputs, targets)
        if answers is not None:
            totals[2:] += _count_agreeing(outputs, targets, answers[batch.indices[:num_valid].numpy()])
    if group is not None and group.size > 1:
        dist.all_reduce(totals, group=group.process_group)
    loss_sum, examples, agreeing, compared = totals.tolist()
    agreement = {"teacher_agreement": agreeing / compared} if compared else {}
    return {"loss": loss_sum / examples, **metrics.compute(), **agreement}


def _count_agreeing(outputs: Tensor, targets: Tensor, answers: Answers) -> Tensor:
    """How often the most probable class is the teacher's, and how many have been compared: what has a label."""
    own = outputs.argmax(-1)
    labelled = targets.reshape(own.shape) != NO_LABEL
    agreeing = (own == torch.from_numpy(answers.astype(np.int64)).to(own.device)) & labelled
    return torch.stack([agreeing.sum(), labelled.sum()])


# ---------------------------------------------------------------------------------------------------------- the teacher


class TeacherView:
    """What a teacher says of the splits that its students are evaluated on. It is asked about each once, by the first
    of them; the others read it.

    `asked` gives this rank's batches of a split with the teacher's logits for inputs, and `measure` the metrics of
    such. The ranks of `data` have the rows in consecutive blocks. Collective over the ranks of `everyone`; without
    groups this process is alone.
    """

    def __init__(
        self,
        plan: DistillPlan,
        asked: Callable[[SplitName], Iterator[tuple[Batch, int]]],
        measure: Callable[[Iterator[tuple[Batch, int]]], dict[str, float]],
        data: Group = ALONE,
        everyone: Group = ALONE,
    ) -> None:
        self._plan, self._asked, self._measure = plan, asked, measure
        self._data, self._everyone = data, everyone
        self._answers: dict[SplitName, Answers] = {}

    def metrics(self) -> dict[str, float]:
        """`teacher/…` on the test split."""
        known = self._known(self._plan.evaluation, read_json)
        metrics = self._ask("test") if known is None else known
        return {f"teacher/{name}": value for name, value in metrics.items()}

    def answers(self, split: SplitName) -> Answers | None:
        """Its answers for the split; None where its outputs are no classes."""
        if split in self._plan.answers and split not in self._answers:
            known = self._known(self._plan.answers[split], _read_answers)
            if known is None:
                self._ask(split)
            else:
                self._answers[split] = known
        return self._answers.get(split)

    def _known(self, file: Path, read: Callable[[Path], Any]) -> Any:
        """What rank 0 reads in `file`; None where it is not there."""
        known = [None]
        if self._everyone.rank == 0:
            fetch(file)
            known = [read(file)]
        if self._everyone.size > 1:
            dist.broadcast_object_list(known, src=0, group=self._everyone.process_group)
        return known[0]

    def _ask(self, split: SplitName) -> dict[str, float]:
        """The teacher's metrics on the split. They, of the test split, and its answers are written down."""
        said: list[Tensor] = []
        metrics = self._measure(self._noted(split, said))
        if split == "test":
            self._write(self._plan.evaluation, partial(write_json, value=metrics))
        if said:
            answers = self._answers[split] = self._gathered(torch.cat(said).numpy())
            self._write(self._plan.answers[split], partial(_write_answers, answers=answers))
        return metrics

    def _noted(self, split: SplitName, said: list[Tensor]) -> Iterator[tuple[Batch, int]]:
        """The batches that the teacher was asked about, its answers added to `said`."""
        for batch, num_valid in self._asked(split):
            if split in self._plan.answers:
                said.append(batch.inputs[:num_valid].argmax(-1).cpu())
            yield batch, num_valid

    def _gathered(self, own: Answers) -> Answers:
        if self._data.size == 1:
            return own
        parts = [own] * self._data.size
        dist.all_gather_object(parts, own, group=self._data.process_group)
        return np.concatenate(parts)

    def _write(self, file: Path, write: Callable[[Path], None]) -> None:
        if self._everyone.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file)
            publish([file])


def _write_answers(path: Path, answers: Answers) -> None:
    """In the smallest type that holds them; whole or not at all."""
    with replaced(path) as temporary, temporary.open("wb") as content:
        np.save(content, answers.astype(np.min_scalar_type(answers.max())), allow_pickle=False)


def _read_answers(file: Path) -> Answers | None:
    """None where the file is missing or not whole."""
    try:
        return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError):
        return None
