"""What a run in fp16 is asked beside its steps: how much underflows, and where a skipped step went non-finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temper.precision.non_finite import LossTerms, first_non_finite
from temper.precision.underflow import count_flushed, over_ranks


@dataclass(frozen=True)
class Observation:
    """What was seen of one step: numbers for its record, and events in words. The same on every rank."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class WatchedStep:
    """A step that is over: its number (1-based), the rank's examples, its seed, and the scale that its loss had."""

    step: int
    inputs: Tensor
    targets: Any
    seed: int
    applied: bool
    loss_scale: float | None


Watch = Callable[[WatchedStep], Observation]


class Watchable(Protocol):
    """What a watch needs of an engine."""

    device: torch.device

    def twin(self, dtype: torch.dtype) -> nn.Module:
        """A plain copy of the model with the weights that the forward pass uses, cast to `dtype`. Collective."""

    def micro_batches(self, inputs: Tensor, targets: Any) -> Iterator[tuple[Tensor, Any]]:
        """The micro-batches of a step as the model is given them."""

    def seed(self, seed: int) -> None:
        """Sets the random numbers of a step as its first micro-batch finds them."""

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The context that forward and backward run in."""


def unwatched(step: WatchedStep) -> Observation:
    """For a precision that has no loss scale: nothing is asked."""
    return Observation()


def watch_skips(step: WatchedStep) -> Observation:
    """For a model that no rank holds whole: a skipped step is named, the module is not searched for."""
    if step.applied:
        return Observation()
    text = "the step was skipped; its module is not searched for in a pipeline or with split layers"
    return Observation(events=(f"{_scale(step)}: {text}",))


@dataclass(frozen=True)
class TwinWatch:
    """Looks at steps on a twin of the model. `group` holds the ranks that share the batch, None where it is one.

    Every `underflow_every` steps (0: never) two further passes through one micro-batch, which on a CPU take 1.2 times
    as long as a step with one micro-batch; after a skipped step a pass through its micro-batches up to the one that is
    not finite, at most two steps' time. Twins are freed before the next step. They have no levels of a distillation,
    whose gradients are in no sample: `has_levels` says that there are some.
    """

    engine: Watchable
    loss: LossTerms
    accumulation: int
    group: dist.ProcessGroup | None
    underflow_every: int
    has_levels: bool = False

    def __call__(self, step: WatchedStep) -> Observation:
        metrics = self._underflow(step) if self.underflow_every and step.step % self.underflow_every == 0 else {}
        events = () if step.applied else (f"{_scale(step)}: {self._place(step)}",)
        return Observation(metrics, events)

    def _factor(self, step: WatchedStep) -> float:
        """What the loss of a micro-batch is multiplied with."""
        return (step.loss_scale or 1.0) / self.accumulation

    def _underflow(self, step: WatchedStep) -> dict[str, float]:
        inputs, targets = next(self.engine.micro_batches(step.inputs, step.targets))

        def backward(twin: nn.Module, dtype: torch.dtype) -> None:
            self.engine.seed(step.seed)
            with self.engine.arithmetic() if dtype == torch.float16 else nullcontext():
                terms = self.loss(twin(inputs.to(dtype) if inputs.is_floating_point() else inputs), targets)
                (torch.stack(list(terms.values())).sum().float() * self._factor(step)).backward()

        flushed = count_flushed(self.engine.twin, backward)
        return over_ranks(flushed, self.group, self.engine.device).metrics()

    def _place(self, step: WatchedStep) -> str:
        twin = self.engine.twin(torch.float16)
        self.engine.seed(step.seed)
        micro_batches = self.engine.micro_batches(step.inputs, step.targets)
        with self.engine.arithmetic():
            place = first_non_finite(twin, self.loss, micro_batches, self._factor(step), self.group)
        unsearched = ", or the loss of a level, which is not searched," if self.has_levels else ""
        return place or f"no value of any rank alone is non-finite; the sum of the gradients over ranks{unsearched} was"


def _scale(step: WatchedStep) -> str:
    return f"loss scale {step.loss_scale:g}"
