"""fp32 accumulation in the CPU kernels of torch that have none.

torch's CPU kernels add fp16 and bf16 numbers in fp32 in the forward pass. In the backward pass some add in the low
precision: the weight of a layer norm gets a gradient with fifty times the error of its rounding, a token's embedding
one with two hundred times, from 4,096 terms. These kernels are replaced here by themselves on fp32 copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Kernels, and how many of their results are low again; None: all of them.
_KERNELS: dict[Any, int | None] = {
    aten.native_layer_norm.default: 1,  # its backward needs mean and deviation in fp32
    aten.native_layer_norm_backward.default: None,
    aten.native_group_norm.default: 1,
    aten.native_group_norm_backward.default: None,
    aten.native_batch_norm.default: 1,
    aten.native_batch_norm_backward.default: None,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: None,
    aten.embedding_dense_backward.default: None,
    aten.im2col.default: None,
    aten.col2im.default: None,
    aten.avg_pool2d_backward.default: None,
    aten.max_pool2d_with_indices_backward.default: None,
}


@cache
def widen_cpu_kernels() -> torch.library.Library:
    """Replaces the kernels in this process, for good; fp32 is computed as ever.

    Convolutions in fp16 become three times faster by it on a CPU without fp16 arithmetic.
    """
    library = torch.library.Library("aten", "IMPL")
    kernels = {operator: _widened(operator, num_low) for operator, num_low in _KERNELS.items()}
    kernels[aten._index_put_impl_.default] = _widened_index_put(aten._index_put_impl_.default)
    kernels[aten.convolution.default] = _widened(aten.convolution.default, None, lambda args: args[6])
    kernels[aten.convolution_backward.default] = _widened(aten.convolution_backward.default, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        for operator, kernel in kernels.items():
            library.impl(operator, kernel, "CPU", with_keyset=True)
    return library


def _widened(operator: Any, num_low: int | None, applies: Callable[[Any], bool] = lambda args: True) -> Any:
    kernel = torch.library.get_kernel(operator, "CPU")
    convolves = operator in (aten.convolution.default, aten.convolution_backward.default)

    def compute(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        low = _low_precision(args)
        if low is None or not applies(args) or (convolves and _onednn_has(low)):
            return kernel.call_boxed(keyset, *args, **kwargs)
        results = kernel.call_boxed(keyset, *tree_map(_to_fp32, args), **tree_map(_to_fp32, kwargs))
        if isinstance(results, Tensor):
            return results.to(low)
        kept = len(results) if num_low is None else num_low
        return tuple(
            value.to(low) if value is not None and index < kept else value for index, value in enumerate(results)
        )

    return compute


def _widened_index_put(operator: Any) -> Any:
    """What the backward of indexing adds with, in place."""
    kernel = torch.library.get_kernel(operator, "CPU")

    def compute(keyset: Any, into: Tensor, indices: Any, values: Tensor, accumulate: bool = False, *rest: Any) -> Any:
        if not accumulate or _low_precision(into) is None:
            return kernel.call_boxed(keyset, into, indices, values, accumulate, *rest)
        return into.copy_(kernel.call_boxed(keyset, into.float(), indices, values.float(), accumulate, *rest))

    return compute


@cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes convolutions of this type on this CPU: it adds in fp32, torch's own kernels do not."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _low_precision(args: Any) -> torch.dtype | None:
    """The low precision among the arguments."""
    found = (leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return next((dtype for dtype in found if dtype in (torch.float16, torch.bfloat16)), None)


def _to_fp32(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value
