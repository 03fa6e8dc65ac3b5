"""Distillation as a training step sees it: the loss, the taps on the student's levels, and where the teacher's signals
come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from temper.data.batches import Batch
from temper.data.sources import SplitName
from temper.losses import Loss
from temper.parallel.groups import MeshGroups
from temper.plan.build import Plan
from temper.techniques.distill.cache import CachedSignals
from temper.techniques.distill.features import FeatureTaps
from temper.techniques.distill.signals import Lesson, Signals, Taught
from temper.techniques.distill.soft_targets import DistillLoss
from temper.techniques.distill.teacher import Shard, build_teacher


class Source(Protocol):
    """Where the teacher's signals of a batch come from."""

    def teach(self, batch: Batch) -> Taught | Lesson:
        """The batch's targets with the signals of its examples, or with whom to ask for them."""

    def logits(self, split: SplitName, batch: Batch) -> Tensor:
        """What the teacher says of examples of a split that the student is evaluated on."""


@dataclass(frozen=True)
class LiveSource:
    """A teacher that is asked as the student trains. `at_once`: for all micro-batches of a step together, because
    stages come to them at different times and all ranks of a replica must ask at the same; a mini-batch of a parameter
    server is not cut into any."""

    ask: Callable[[Tensor], Signals]
    at_once: bool

    def teach(self, batch: Batch) -> Taught | Lesson:
        if self.at_once:
            return Taught(batch.targets, self.ask(batch.inputs))
        return Lesson(batch.targets, batch.inputs, self.ask)

    def logits(self, split: SplitName, batch: Batch) -> Tensor:
        return self.ask(batch.inputs).logits


@dataclass(frozen=True)
class CachedSource:
    """Signals that were computed before."""

    cached: CachedSignals

    def teach(self, batch: Batch) -> Taught | Lesson:
        return Taught(batch.targets, self.cached.signals(batch.indices, batch.views))

    def logits(self, split: SplitName, batch: Batch) -> Tensor:
        return self.cached.logits(split, batch.indices)


class Distillation:
    """The technique of one rank; see :class:`temper.engine.base.Technique`. `taps` is None without levels beside the
    last."""

    def __init__(self, plan: Plan, base: Loss, source: Source) -> None:
        assert plan.distill is not None and plan.job.distill is not None, "a plan without a teacher has no distillation"
        self.loss = DistillLoss(base, plan.job.distill, plan.job.loss, plan.phases[0].steps)
        self.taps = FeatureTaps(plan.distill.pairs, plan.job.seed) if plan.distill.pairs else None
        self._source = source

    def prepare(self, batch: Batch, applied: int) -> Taught | Lesson:
        self.loss.begin_step(applied)
        return self._source.teach(batch)

    def values(self) -> Mapping[str, float]:
        return self.loss.values()

    def asked(self, split: SplitName, batches: Iterator[tuple[Batch, int]]) -> Iterator[tuple[Batch, int]]:
        """Batches of a split that the student is evaluated on, each with the teacher's logits for inputs."""
        for batch, valid in batches:
            yield replace(batch, inputs=self._source.logits(split, batch).float()), valid


def build_distillation(
    plan: Plan, base: Loss, device: torch.device, groups: MeshGroups | None = None, shard: Shard | None = None
) -> Distillation | None:
    """The distillation of the plan's job, None where it has none; `base` is the loss on its labels.

    `shard` makes a network that is shared out over all ranks. Collective where the teacher is sharded. Without `groups`
    this process asks alone.
    """
    distill = plan.job.distill
    if plan.distill is None or distill is None:
        return None
    source: Source
    if plan.distill.cache is not None:
        source = CachedSource(CachedSignals(plan.distill.cache, plan.distill.pairs))
    else:
        teacher = build_teacher(
            plan.distill,
            plan.data,
            signals=distill.signals,
            device=device,
            groups=groups,
            shard=shard if distill.placement == "sharded" else None,
        )
        source = LiveSource(teacher.ask, at_once=plan.mesh.pipeline > 1 or plan.job.parallel.mode != "synchronous")
    return Distillation(plan, base, source)
