"""Where DeepSpeed keeps a rank's fp32 master weights and optimizer moments, as one list whatever the ZeRO stage.

Everything that must touch the true weights (checkpoints, export, pruning masks) works on these :class:`Fragment`s and
needs to know nothing of stages: a fragment is a flat view of a range of one parameter's master and moments. There is
one function per optimizer class of DeepSpeed (`zero/stage_1_and_2.py`, `zero/stage3.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from temper.parallel.cut import Cut, cut_of

STEP = "step"


@dataclass(frozen=True)
class Fragment:
    """The range `[start, start + numel)` of the flattened parameter `name` that this rank's optimizer updates; of the
    flattened part that the rank holds, where tensor ranks share the parameter by a `cut`.

    `owner` is the tensor that the inner optimizer steps; the fragment lies in it at `offset`. The optimizer's moments
    for it are tensors of the owner's shape in `optimizer_state`.
    """

    name: str
    cut: Cut | None
    start: int
    numel: int
    owner: Tensor
    offset: int
    optimizer_state: dict[Any, Any]

    @property
    def master(self) -> Tensor:
        return self.part_of(self.owner)

    @property
    def gradient(self) -> Tensor:
        """What the inner optimizer is about to step with: reduced, unscaled, clipped. There only while it steps."""
        assert self.owner.grad is not None, "read in a hook of the optimizer's step"
        return self.part_of(self.owner.grad)

    def moments(self) -> dict[str, Tensor]:
        """Flat views of the moments; empty before the first step."""
        state = self.optimizer_state.get(self.owner, {})
        return {key: self.part_of(value) for key, value in state.items() if _is_moment(value, self.owner)}

    def moment(self, key: str) -> Tensor:
        """The moment `key`, made of zeros where the optimizer has not stepped yet."""
        state = self.optimizer_state.setdefault(self.owner, {})
        if not torch.is_tensor(state.get(key)):
            state[key] = torch.zeros_like(self.owner, requires_grad=False)
        return self.part_of(state[key])

    def part_of(self, tensor: Tensor) -> Tensor:
        """The fragment's place in a tensor of the owner's shape, as a flat view."""
        return tensor.detach().reshape(-1).narrow(0, self.offset, self.numel)


def _is_moment(value: Any, owner: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == owner.shape and value.is_floating_point() and value.dim() > 0


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper; fp32 at stage 0 has no wrapper."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _plain(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    """fp32 at stage 0: the parameters are their own masters."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield Fragment(names[param], cut_of(param), 0, param.numel(), param, 0, optimizer.state)


def _stage_1_and_2(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    """`DeepSpeedZeroOptimizer`: each group's masters are one flat partition; a parameter may cross its borders."""
    for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for param in group:
            mapping = param._hp_mapping
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            state = optimizer.optimizer.state
            yield Fragment(names[param], cut_of(param), here.start, here.numel, partition, there.start, state)


def _stage_3(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    """`DeepSpeedZeroOptimizer_Stage3`: every parameter is cut evenly over the ranks, padded at the end."""
    for param in (param for group in optimizer.fp16_groups for param in group):
        index, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        size = param.partition_numel()
        start = param.ds_zero_partition_rank * size
        numel = min(size, param.ds_numel - start)
        if numel > 0:
            owner = optimizer.fp32_partitioned_groups_flat[index]
            state = optimizer.optimizer.state
            yield Fragment(names[param], cut_of(param), start, numel, owner, offset, state)


MASTERS: dict[str, Callable[[Any, dict[nn.Parameter, str]], Iterator[Fragment]]] = {
    "DeepSpeedZeroOptimizer": _stage_1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
}


def master_fragments(optimizer: Any, names: dict[nn.Parameter, str]) -> list[Fragment]:
    """This rank's fragments, in the optimizer's order. `names` maps trainable parameters to their names."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return list(_plain(optimizer, names))
    return list(MASTERS[type(optimizer).__name__](optimizer, names))


def forget_moments(optimizer: Any, fragments: list[Fragment]) -> None:
    """Drops the moments, so that the next step makes new ones, and what else holds their memory: stages 1 and 2 keep
    views of them beside each parameter."""
    for item in fragments:
        item.optimizer_state.pop(item.owner, None)
    if type(optimizer).__name__ == "DeepSpeedZeroOptimizer":
        for param in (param for group in optimizer.bit16_groups for param in group):
            if param._hp_mapping is not None:
                param._hp_mapping.optim_fragment = None
        optimizer._hp_optimizer_states_linked = False


def optimizer_step(fragments: list[Fragment]) -> int:
    """Steps that the inner optimizer has applied; 0 where it keeps no count (SGD) or has not stepped."""
    for fragment in fragments:
        step = fragment.optimizer_state.get(fragment.owner, {}).get(STEP)
        if step is not None:
            return int(step)
    return 0


def set_optimizer_step(fragments: list[Fragment], step: int) -> None:
    """Sets the count that Adam's bias correction uses, in every owner that keeps moments."""
    for fragment in fragments:
        state = fragment.optimizer_state.get(fragment.owner)
        if state is not None:
            state[STEP] = torch.tensor(float(step))
