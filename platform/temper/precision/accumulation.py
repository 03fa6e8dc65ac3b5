"""Section 3.3 of Micikevicius et al. (2018): sums of low-precision numbers in fp32, and the ablation without.

*With fp32 accumulation* a product of fp16 or bf16 matrices, a convolution, norm or softmax adds in fp32 and rounds the
result. CUDA's kernels do, once their reduced-precision reductions are turned off (:mod:`temper.precision.device`);
torch's CPU kernels do, once those that do not are replaced (:mod:`temper.precision.cpu_kernels`).

*Without*, :class:`temper.precision.narrow.NarrowAccumulation` computes every product and reduction of the forward and
backward pass with partial sums that are rounded to the low precision. It is an emulation, and the same on every device:
a CPU has no such kernels, and CUDA's `allow_fp16_accumulation` covers matrix products in fp16 alone. Products are added
sixteen at a time, exactly, to a rounded accumulator, one group after the other, as tensor cores with fp16 accumulators
do (PTX `mma.m16n8k16`); reductions add groups of sixteen in a tree. What it does not know (fused recurrent cells,
losses with kernels of their own such as CTC) computes as ever; transposed convolutions are refused. On a CPU a step
takes about ten times as long as in bf16. Evaluation always accumulates in fp32.

What autograd adds itself, a tensor's gradients from several uses, is added in the tensor's own precision either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from temper.precision.cpu_kernels import widen_cpu_kernels
from temper.precision.narrow import NarrowAccumulation

Arithmetic = Callable[[], AbstractContextManager[Any]]


def arithmetic(dtype: torch.dtype, device: torch.device, fp32_accumulation: bool) -> Arithmetic:
    """A maker of contexts in which a forward and backward pass accumulate as asked for; for fp32, of empty ones."""
    if dtype == torch.float32:
        return nullcontext
    if device.type == "cpu":
        widen_cpu_kernels()
    return nullcontext if fp32_accumulation else lambda: _narrow(dtype)


@contextmanager
def _narrow(dtype: torch.dtype) -> Iterator[None]:
    # Fused kernels would hide their sums.
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), NarrowAccumulation(dtype):
        yield
