"""What the teacher says of examples, and how it travels: with the targets, so that it is split into micro-batches and
reaches the loss as they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """Of some examples: raw logits (examples, …, classes), and the teacher's features, one (examples, …) a pair."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()

    def to(self, device: torch.device, non_blocking: bool = False) -> Signals:
        moved = (feature.to(device, non_blocking=non_blocking) for feature in self.features)
        return Signals(self.logits.to(device, non_blocking=non_blocking), tuple(moved))

    def split(self, size: int) -> Iterator[Signals]:
        features = zip(*(feature.split(size) for feature in self.features), strict=True)
        for logits in self.logits.split(size):
            yield Signals(logits, next(features, ()))


@dataclass(frozen=True)
class Taught:
    """Targets (examples, …) together with what the teacher says of the same examples."""

    targets: Tensor
    signals: Signals

    def to(self, device: torch.device, non_blocking: bool = False) -> Taught:
        return Taught(self.targets.to(device, non_blocking=non_blocking), self.signals.to(device, non_blocking))

    def split(self, size: int) -> Iterator[Taught]:
        for targets, signals in zip(self.targets.split(size), self.signals.split(size), strict=True):
            yield Taught(targets, signals)


@dataclass(frozen=True)
class Lesson:
    """Targets of which the teacher is asked only when their micro-batch comes: its features of a whole step may be
    more than fits."""

    targets: Tensor
    inputs: Tensor
    ask: Callable[[Tensor], Signals]

    def to(self, device: torch.device, non_blocking: bool = False) -> Lesson:
        return Lesson(self.targets.to(device, non_blocking=non_blocking), self.inputs, self.ask)

    def split(self, size: int) -> Iterator[Taught]:
        for targets, inputs in zip(self.targets.split(size), self.inputs.split(size), strict=True):
            yield Taught(targets, self.ask(inputs).to(targets.device))
