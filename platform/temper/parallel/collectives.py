"""Exchanges of activations between the ranks of a group, each differentiable: its backward is its transpose.

The four of Megatron-LM (Shoeybi et al. 2019, section 3, where the first two are called f and g):

| exchange            | forward                         | backward                        |
|---------------------|---------------------------------|---------------------------------|
| `copy_to_group`     | the same tensor                 | sum over the ranks (all-reduce) |
| `reduce_from_group` | sum over the ranks (all-reduce) | the same gradient               |
| `gather_from_group` | the ranks' parts, put together  | the rank's own part             |
| `scatter_to_group`  | the rank's own part             | the ranks' parts, put together  |

All ranks of a group compute one loss, so a gradient of a whole tensor is the same on all of them. That is why these are
not `torch.distributed.nn.functional`'s, which differentiate the sum of the ranks' losses and give `size` times as much.

Any float type, any strides. Sums of fp16 and bf16 are taken in fp32 and rounded once. On the meta device nothing is
sent, so that a model can be looked at without its ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from temper.parallel.groups import Group

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def copy_to_group(whole: Tensor, group: Group) -> Tensor:
    """The tensor as it is, for ranks that each compute something else from it; their gradients are summed."""
    return whole if group.size == 1 else _Copy.apply(whole, group)


def reduce_from_group(term: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' terms, on every rank and bit for bit the same."""
    return term if group.size == 1 else _Reduce.apply(term, group)


def gather_from_group(part: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """The ranks' parts in their order along `dim`, on every rank; the part of rank r is `sizes[r]` long."""
    return part if group.size == 1 else _Gather.apply(part, dim, tuple(sizes), group)


def scatter_to_group(whole: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """This rank's part, a view, of a tensor that every rank holds; along `dim`, where rank r has `sizes[r]`."""
    return whole if group.size == 1 else _Scatter.apply(whole, dim, tuple(sizes), group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Reduce.apply(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Tensor, group: Group) -> Tensor:  # type: ignore[override]
        ctx.group = group
        dtype = torch.float32 if term.dtype in _LOW_PRECISION else term.dtype
        total = term.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not total.is_meta:
            dist.all_reduce(total, group=group.process_group)
        return _in_format_of(term, total.to(term.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Copy.apply(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, part: Tensor, dim: int, sizes: tuple[int, ...], group: Group
    ) -> Tensor:
        ctx.layout = (dim, sizes, group)
        # All ranks must send equally much.
        longest = _resized(part, dim, max(sizes))
        received = [torch.empty_like(longest) for _ in sizes]
        if not part.is_meta:
            dist.all_gather(received, longest, group=group.process_group)
        whole = torch.cat([piece.narrow(dim, 0, size) for piece, size in zip(received, sizes, strict=True)], dim)
        return _in_format_of(part, whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Scatter.apply(grad, *ctx.layout), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, whole: Tensor, dim: int, sizes: tuple[int, ...], group: Group
    ) -> Tensor:
        ctx.layout = (dim, sizes, group)
        return whole.narrow(dim, sum(sizes[: group.rank]), sizes[group.rank])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Gather.apply(grad, *ctx.layout), None, None, None


def _resized(part: Tensor, dim: int, size: int) -> Tensor:
    """The part, contiguous, with zeros after it up to `size` along `dim`."""
    if part.shape[dim] == size:
        return part.contiguous()
    shape = list(part.shape)
    shape[dim] = size
    resized = part.new_zeros(shape)
    resized.narrow(dim, 0, part.shape[dim]).copy_(part)
    return resized


def _in_format_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The contiguous tensor, in channels-last memory format where `like` is."""
    if like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
