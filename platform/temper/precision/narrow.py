"""torch's operators with sums in a low precision; see :mod:`temper.precision.accumulation` for what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from temper.precision.narrow_layers import (
    batch_norm,
    batch_norm_backward,
    convolution,
    convolution_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from temper.precision.sums import kept_dims, narrow_mean, narrow_moments, narrow_product, narrow_sum, round_to

aten = torch.ops.aten


class NarrowAccumulation(TorchDispatchMode):
    """Every product and reduction of floats up to fp32 with partial sums in `dtype`, forward and backward.

    Also of fp32 tensors: a norm or a loss that takes care to compute in fp32 is what this ablation is to do without.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = _NARROW.get(func, _narrow_loss if _has_reduction(func) else None)
        first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
        if operator is None or first is None or first.dtype not in (torch.float32, self.dtype):
            return func(*args, **(kwargs or {}))
        results = operator(self.dtype, func, *args, **(kwargs or {}))
        asked = _result_dtype(func, first, args, kwargs or {})
        return tree_map(lambda value: value.to(asked) if isinstance(value, Tensor) else value, results)


def _result_dtype(func: Any, first: Tensor, args: Any, kwargs: Any) -> torch.dtype:
    if func in (aten._softmax.default, aten._log_softmax.default) and args[2]:
        return torch.float32
    if func in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default):
        return args[3]
    return kwargs.get("dtype") or first.dtype


@cache
def _has_reduction(func: Any) -> bool:
    """Losses take `reduction`; their backward passes do, too, and add nothing."""
    arguments = [argument.name for argument in func._schema.arguments]
    return "reduction" in arguments and len(func._schema.returns) == 1 and not func._schema.name.endswith("_backward")


def _mm(dtype: torch.dtype, func: Any, left: Tensor, right: Tensor) -> Tensor:
    return narrow_product(left, right, dtype)


def _mv(dtype: torch.dtype, func: Any, left: Tensor, right: Tensor) -> Tensor:
    return narrow_product(left, right[:, None], dtype)[:, 0]


def _dot(dtype: torch.dtype, func: Any, left: Tensor, right: Tensor) -> Tensor:
    return narrow_product(left[None], right[:, None], dtype)[0, 0]


def _addmm(
    dtype: torch.dtype, func: Any, bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = alpha * narrow_product(left, right, dtype)
    return round_to(product if beta == 0 else product + beta * bias.float(), dtype)


def _sum(
    dtype: torch.dtype, func: Any, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **_unused: Any
) -> Tensor:
    total = narrow_sum(x, dtype, dims)
    return kept_dims(total, x, dims) if keepdim else total


def _mean(
    dtype: torch.dtype, func: Any, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **_unused: Any
) -> Tensor:
    mean = narrow_mean(x, dtype, dims)
    return kept_dims(mean, x, dims) if keepdim else mean


def _var_mean(
    dtype: torch.dtype,
    func: Any,
    x: Tensor,
    dims: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    variance, mean = narrow_moments(x, dtype, dims, 1 if correction is None else correction)
    return (kept_dims(variance, x, dims), kept_dims(mean, x, dims)) if keepdim else (variance, mean)


def _var(dtype: torch.dtype, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return _var_mean(dtype, func, *args, **kwargs)[0]


def _narrow_loss(dtype: torch.dtype, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A loss from its values before the reduction: 0 none, 1 mean, 2 sum."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    reduction = given.get("reduction", 1)
    values = func(**{**given, "reduction": 0})
    if reduction == 0:
        return values
    return narrow_mean(values, dtype) if reduction == 1 else narrow_sum(values, dtype)


def _nll_loss(
    dtype: torch.dtype, func: Any, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> tuple[Tensor, Tensor]:
    _, total_weight = func(x, target, weight, reduction, ignored)
    values, _ = func(x, target, weight, 0, ignored)
    if reduction == 0:
        return values, total_weight
    total = narrow_sum(values, dtype)
    return (round_to(total / total_weight, dtype) if reduction == 1 else total), total_weight


# ---------------------------------------------------------------------------------------------- softmax and its twin


def _exponentials(dtype: torch.dtype, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x − max, its exponentials, and their sum along `dim`, which is kept."""
    shifted = round_to(x.float() - x.float().amax(dim, keepdim=True), dtype)
    powers = round_to(shifted.exp(), dtype)
    return shifted, powers, round_to(narrow_sum(powers, dtype, [dim]), dtype).unsqueeze(dim)


def _softmax(dtype: torch.dtype, func: Any, x: Tensor, dim: int, to_float: bool) -> Tensor:
    _, powers, total = _exponentials(dtype, x, dim)
    return round_to(powers / total, dtype)


def _log_softmax(dtype: torch.dtype, func: Any, x: Tensor, dim: int, to_float: bool) -> Tensor:
    shifted, _, total = _exponentials(dtype, x, dim)
    return round_to(shifted - total.log(), dtype)


def _softmax_backward(
    dtype: torch.dtype, func: Any, grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    product = round_to(grad.float() * output.float(), dtype)
    return round_to(product - output.float() * narrow_sum(product, dtype, [dim]).unsqueeze(dim), dtype)


def _log_softmax_backward(
    dtype: torch.dtype, func: Any, grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    return round_to(grad.float() - output.float().exp() * narrow_sum(grad, dtype, [dim]).unsqueeze(dim), dtype)


_NARROW: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
    aten._softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.native_layer_norm.default: layer_norm,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.native_group_norm.default: group_norm,
    aten.native_group_norm_backward.default: group_norm_backward,
    aten.native_batch_norm.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss2d_forward.default: _nll_loss,
}
