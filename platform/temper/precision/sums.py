"""Sums whose partial sums are rounded to a low precision: what fp16 or bf16 accumulation does, computed in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 16
"""Terms that are added exactly before their sum is rounded."""


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 tensor of what `dtype` makes of the values."""
    return values.to(dtype).float()


def narrow_product(left: Tensor, right: Tensor, dtype: torch.dtype, group: int = GROUP) -> Tensor:
    """left `(…, m, k)` @ right `(…, k, n)` → fp32 `(…, m, n)` with dtype's values.

    One accumulator an output, rounded to `dtype` after every `group` products; `group` 1 is a chain of multiply-adds,
    as on GPUs before Volta. k / group small products instead of one large one.
    """
    left, right = left.float(), right.float()
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    total = left.new_zeros(*batch, left.shape[-2], right.shape[-1])
    for begin in range(0, left.shape[-1], group):
        here = slice(begin, begin + group)
        total = round_to(total + left[..., here] @ right[..., here, :], dtype)
    return total


def narrow_sum(values: Tensor, dtype: torch.dtype, dims: Sequence[int] | None = None) -> Tensor:
    """Sum over `dims` (all by default) → fp32, dims removed: a tree of groups of sixteen, each sum rounded to `dtype`.

    Up to sixteen terms make one exact sum, which is not rounded.
    """
    dims = range(values.dim()) if not dims else [dim % values.dim() for dim in dims]
    kept = [dim for dim in range(values.dim()) if dim not in dims]
    terms = values.float().permute(*kept, *dims).reshape(*(values.shape[dim] for dim in kept), -1)
    if terms.shape[-1] <= GROUP:
        return terms.sum(-1)
    while terms.shape[-1] > 1:
        missing = -terms.shape[-1] % GROUP
        terms = round_to(F.pad(terms, (0, missing)).unflatten(-1, (-1, GROUP)).sum(-1), dtype)
    return terms.squeeze(-1)


def narrow_mean(values: Tensor, dtype: torch.dtype, dims: Sequence[int] | None = None) -> Tensor:
    """Mean over `dims` (all by default), dims removed: the sum, divided and rounded. Overflows where the sum does."""
    total = narrow_sum(values, dtype, dims)
    return round_to(total / (values.numel() // max(total.numel(), 1)), dtype)


def narrow_moments(
    values: Tensor, dtype: torch.dtype, dims: Sequence[int] | None = None, correction: float = 0
) -> tuple[Tensor, Tensor]:
    """Variance and mean over `dims` (all by default), dims removed."""
    mean = narrow_mean(values, dtype, dims)
    centred = round_to(values.float() - kept_dims(mean, values, dims), dtype)
    squares = narrow_sum(round_to(centred * centred, dtype), dtype, dims)
    count = values.numel() // max(mean.numel(), 1)
    return round_to(squares / max(count - correction, 0), dtype), mean


def kept_dims(reduced: Tensor, values: Tensor, dims: Sequence[int] | None) -> Tensor:
    """`reduced` with the dims that were summed over back as dims of one."""
    gone = range(values.dim()) if not dims else [dim % values.dim() for dim in dims]
    return reduced.reshape([1 if dim in gone else size for dim, size in enumerate(values.shape)])
