"""A twin: the model once more, plain, whole and unsharded, to be looked at without touching the one in training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatRange(Protocol):
    """A rank's range of a flattened parameter, as :class:`temper.engine.masters.Fragment`."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def master(self) -> Tensor: ...


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers take no memory. Made before DeepSpeed shards the model."""
    memo: dict[int, object] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def build_twin(skeleton: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
    """The skeleton, in training mode, with these parameters and with copies of these buffers, both by name.

    Tensors that the model has under several names stay one.
    """
    memo: dict[int, object] = {}
    for name, param in skeleton.named_parameters():
        memo[id(param)] = nn.Parameter(weights[name], requires_grad=param.requires_grad)
    for name, buffer in skeleton.named_buffers():
        memo[id(buffer)] = buffers[name].detach().clone()
    return copy.deepcopy(skeleton, memo).train()


def gathered_weights(
    ranges: Iterable[FlatRange],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """Whole parameters in `dtype` from the ranges of masters that the ranks of `group` hold, each range on one rank;
    `group` is None where one rank holds them all.

    Collective. Takes the memory of the parameters in `dtype` once; what is added to each value are zeros.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
    flats = dict(zip(shapes, flat.split(sizes), strict=True))
    for item in ranges:
        flats[item.name].narrow(0, item.start, item.master.numel()).copy_(item.master)
    if group is not None:
        dist.all_reduce(flat, group=group)
    return {name: flats[name].view(tuple(shape)) for name, shape in shapes.items()}
