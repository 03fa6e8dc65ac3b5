"""Section 3.3 of Micikevicius et al. (2018): sums of low-precision numbers in fp32, and the ablation without.

*With fp32 accumulation* a product of fp16 or bf16 matrices, a convolution, norm or softmax adds in fp32 and rounds the
result. CUDA's kernels do, once their reduced-precision reductions are turned off. torch's CPU kernels do in the forward
pass; in the backward pass some add in the low precision, and :class:`WideAccumulation` computes those in fp32.

*Without*, :class:`temper.precision.narrow.NarrowAccumulation` computes every product and reduction with partial sums
that are rounded to the low precision. It is an emulation, and the same on every device: a CPU has no such kernels, and
CUDA's `allow_fp16_accumulation` covers matrix products in fp16 alone. Products are added sixteen at a time, exactly, to
a rounded accumulator, one group after the other, as tensor cores with fp16 accumulators do (PTX `mma.m16n8k16`);
reductions add groups of sixteen in a tree. What it does not know (fused recurrent cells, losses with kernels of their
own such as CTC) computes as ever; transposed convolutions are refused.

What autograd adds itself, a tensor's gradients from several uses, is added in the tensor's own precision either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from temper.precision.narrow import NarrowAccumulation

aten = torch.ops.aten
Arithmetic = Callable[[], AbstractContextManager[Any]]


def arithmetic(dtype: torch.dtype, device: torch.device, fp32_accumulation: bool) -> Arithmetic:
    """A maker of contexts in which a forward and backward pass accumulate as asked for. In fp32 it does nothing."""
    if dtype == torch.float32:
        return nullcontext
    if not fp32_accumulation:
        return lambda: _narrow(dtype)
    return WideAccumulation if device.type == "cpu" else nullcontext


@contextmanager
def _narrow(dtype: torch.dtype) -> Iterator[None]:
    with ExitStack() as stack:
        # Fused kernels would hide their sums.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(NarrowAccumulation(dtype))
        yield


# ------------------------------------------------------------------------------------------------------------- fp32

# CPU kernels that add in the low precision, and how many of the results stay low; None: all of them.
_WIDE: dict[Any, int | None] = {
    aten.native_layer_norm.default: 1,  # its backward needs mean and deviation in fp32
    aten.native_layer_norm_backward.default: None,
    aten.native_group_norm.default: 1,
    aten.native_group_norm_backward.default: None,
    aten.native_batch_norm.default: 1,
    aten.native_batch_norm_backward.default: None,
    aten.convolution_backward.default: None,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: None,
    aten.embedding_dense_backward.default: None,
    aten.index_put.default: None,  # the backward of indexing adds where an index comes twice
    aten.im2col.default: None,
    aten.col2im.default: None,
    aten.avg_pool2d_backward.default: None,
    aten.max_pool2d_with_indices_backward.default: None,
}


class WideAccumulation(TorchDispatchMode):
    """Computes in fp32, and rounds the result, what torch's CPU kernels would add up in fp16 or bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _WIDE and not _is_transposed(func, args):
            return func(*args, **kwargs)
        low = _low_precision(args)
        if low is None:
            return func(*args, **kwargs)
        results = func(*tree_map(_widened, args), **tree_map(_widened, kwargs))
        if not isinstance(results, tuple):
            return results.to(low)
        num_low = _WIDE.get(func)
        return tuple(
            value.to(low) if value is not None and (num_low is None or index < num_low) else value
            for index, value in enumerate(results)
        )


def _is_transposed(func: Any, args: Any) -> bool:
    return func is aten.convolution.default and args[6]


def _low_precision(args: Any) -> torch.dtype | None:
    """The low precision among the arguments."""
    found = (leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return next((dtype for dtype in found if dtype in (torch.float16, torch.bfloat16)), None)


def _widened(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value
