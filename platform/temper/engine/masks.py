"""Masks of pruned weights beside the fp32 masters, sharded as they are, and held inside the optimizer's step.

A weight stays at exactly zero when it begins there, its moments do, and its gradient is zero at every step: SGD with
momentum and weight decay, Adam, AdamW and Adagrad then move it by zero. So one product with the reduced and clipped
gradient is all that a step costs, and it comes before the masters are rounded and gathered for the forward pass.
The gradient is clipped as in dense training: to a norm that pruned weights count in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from temper.checkpoint import MASK, CheckpointReader
from temper.engine.masters import Fragment


class MasterMasks:
    """The masks of one rank; none until they are loaded."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # By the tensor that the optimizer steps. Bytes: a product with them is several times faster than filling by
        # truth values, and needs a quarter of the memory of floats.
        self._kept: dict[Tensor, Tensor] = {}
        self._names: set[str] = set()
        optimizer.register_step_pre_hook(self._mask_gradients)

    def load(self, fragments: Sequence[Fragment], reader: CheckpointReader) -> None:
        """Takes the masks that `reader` has; where it has none, all weights are free."""
        self._kept.clear()
        self._names = set(reader.names(MASK))
        for item in fragments:
            if item.name in self._names:
                owner = item.owner
                kept = self._kept.setdefault(owner, torch.ones(owner.shape, dtype=torch.uint8, device=owner.device))
                item.part_of(kept).copy_(reader.read(MASK, item.name, item.start, item.numel, item.cut))

    def shard_of(self, item: Fragment) -> dict[str, Tensor]:
        """The mask of a fragment as a checkpoint holds it; nothing where its parameter is not masked."""
        if item.name not in self._names:
            return {}
        return {MASK: item.part_of(self._kept[item.owner]).bool()}

    def _mask_gradients(self, *_unused: Any) -> None:
        # ZeRO-3 steps its parameters in groups, and only those of the group have their gradients then.
        for owner, kept in self._kept.items():
            if owner.grad is not None:
                owner.grad.mul_(kept)
