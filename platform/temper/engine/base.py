"""What the loop knows of an engine: one optimizer step, one evaluation pass, and all of its resumable state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from temper.checkpoint import CheckpointReader, Shard
from temper.data.batches import Batch

LossFunction = Callable[[Any, Any], Mapping[str, Tensor]]
"""`(outputs, targets) -> named terms`, fp32 scalars, each the mean over the micro-batch; their sum is the loss."""


class Targets(Protocol):
    """What a loss compares outputs with: a tensor (examples, …), or targets with a teacher's signals."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Targets: ...

    def split(self, size: int) -> Iterable[Any]:
        """The micro-batches' targets, in order; all but the last of `size` examples."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did on this rank. Tensors stay on the device, so that nothing waits for them.

    `loss` and `terms` are means over the rank's part of the batch; `grad_norm` is global, before clipping;
    `applied` is false where fp16 gradients overflowed and the step was skipped; `loss_scale` is None but in fp16.
    `at_min_scale` is true where they overflowed and a dynamic loss scale cannot fall any further.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    grad_norm: float | Tensor | None
    applied: bool
    loss_scale: float | None
    at_min_scale: bool = False


@dataclass(frozen=True)
class EngineState:
    """The engine's scalars in a checkpoint; the tensors travel as shards."""

    optimizer_step: int = 0
    loss_scaler: Mapping[str, float] = field(default_factory=dict)


class Technique(Protocol):
    """What is done to a step beside training the network on its labels."""

    def prepare(self, batch: Batch, applied: int) -> Targets:
        """The targets of the batch, with whatever the loss needs beside them; `applied` counts the steps that are in
        the weights."""

    def values(self) -> Mapping[str, float]:
        """What is recorded of the step that was prepared last."""


class Engine(Protocol):
    """One rank's part of a training engine."""

    @property
    def module(self) -> nn.Module: ...

    def step(self, inputs: Tensor, targets: Targets, *, lr: float, seed: int) -> StepResult:
        """One optimizer step on the rank's part of a global batch, `(rank_batch, …)`; `seed` drives dropout."""

    def predict(self, inputs: Tensor) -> Any:
        """The model's outputs in evaluation mode, without gradients. Collective: all ranks call it equally often."""

    def shards(self) -> list[Shard]:
        """This rank's part of the fp32 masters, the optimizer's moments and the model's buffers, as views, and of the
        masks of pruned weights."""

    def state(self) -> EngineState: ...

    def load(self, reader: CheckpointReader, state: EngineState) -> None:
        """Takes masters, moments, masks, buffers and scalars from a checkpoint of any topology.

        Weights that a mask prunes are zero in the checkpoint, their moments too, and the steps that follow leave them
        so. Without masks there all weights are trained.
        """
