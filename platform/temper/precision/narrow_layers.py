"""Norms and convolutions with sums in a low precision, forward and backward.

Each function has the arguments of torch's operator of the same name in `torch.ops.aten`, after the precision and the
operator itself, and gives fp32 tensors with the values of that precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.errors import RunError
from temper.precision.sums import narrow_mean, narrow_moments, narrow_product, narrow_sum, round_to

# ------------------------------------------------------------------------------------------------------------- norms


@dataclass(frozen=True)
class _Norm:
    """A normalisation as rows: what is normalised together, `(rows, count)`. `affine` is the shape that the weight and
    bias have beside the input, `affine_dims` the dimensions that they are shared over."""

    shape: tuple[int, ...]
    affine: tuple[int, ...]
    affine_dims: tuple[int, ...]
    num_rows: int
    channels_first: bool = False

    def rows(self, x: Tensor) -> Tensor:
        x = x.float()
        return (x.transpose(0, 1) if self.channels_first else x).reshape(self.num_rows, -1)

    def back(self, rows: Tensor) -> Tensor:
        if not self.channels_first:
            return rows.reshape(self.shape)
        return rows.reshape(self.shape[1], self.shape[0], *self.shape[2:]).transpose(0, 1)

    def forward(
        self, dtype: torch.dtype, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and each row's mean and reciprocal deviation."""
        rows = self.rows(x)
        variance, mean = narrow_moments(rows, dtype, [1])
        inverse = round_to(torch.rsqrt(variance + eps), dtype)
        output = self.back(self._normalized(dtype, rows, mean, inverse))
        output = output if weight is None else output * weight.float().view(self.affine)
        output = output if bias is None else output + bias.float().view(self.affine)
        return round_to(output, dtype), mean, inverse

    def backward(
        self,
        dtype: torch.dtype,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        inverse: Tensor,
        weight: Tensor | None,
        mask: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias; None where `mask` asks for none."""
        mean, inverse = mean.float().reshape(-1), inverse.float().reshape(-1)
        normalized = self._normalized(dtype, self.rows(x), mean, inverse)
        scaled = grad.float() if weight is None else round_to(grad.float() * weight.float().view(self.affine), dtype)
        rows = self.rows(scaled)
        mean_grad = narrow_mean(rows, dtype, [1])
        mean_product = narrow_mean(round_to(rows * normalized, dtype), dtype, [1])
        grad_rows = inverse[:, None] * (rows - mean_grad[:, None] - normalized * mean_product[:, None])
        products = round_to(grad.float() * self.back(normalized), dtype)
        affine = [narrow_sum(values, dtype, self.affine_dims) for values in (products, grad)]
        shape = (math.prod(self.affine),) if weight is None else tuple(weight.shape)
        return (
            self.back(round_to(grad_rows, dtype)) if mask[0] else None,
            affine[0].reshape(shape) if mask[1] else None,
            affine[1].reshape(shape) if mask[2] else None,
        )

    def _normalized(self, dtype: torch.dtype, rows: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        return round_to((rows - mean[:, None]) * inverse[:, None], dtype)


def _layer(x: Tensor, shape: Sequence[int]) -> _Norm:
    leading = x.dim() - len(shape)
    return _Norm(tuple(x.shape), tuple(shape), tuple(range(leading)), math.prod(x.shape[:leading]))


def _channels(x: Tensor, num_rows: int, channels_first: bool = False) -> _Norm:
    shape, affine = tuple(x.shape), (1, x.shape[1], *(1 for _ in x.shape[2:]))
    return _Norm(shape, affine, tuple(dim for dim in range(x.dim()) if dim != 1), num_rows, channels_first)


def layer_norm(
    dtype: torch.dtype, func: Any, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, inverse = _layer(x, shape).forward(dtype, x, weight, bias, eps)
    kept = [*x.shape[: x.dim() - len(shape)], *(1 for _ in shape)]
    return output, mean.view(kept), inverse.view(kept)


def layer_norm_backward(
    dtype: torch.dtype,
    func: Any,
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return _layer(x, shape).backward(dtype, grad, x, mean, inverse, weight, mask)


def group_norm(
    dtype: torch.dtype,
    func: Any,
    x: Tensor,
    weight: Any,
    bias: Any,
    n: int,
    c: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, inverse = _channels(x, n * groups).forward(dtype, x, weight, bias, eps)
    return output, mean.view(n, groups), inverse.view(n, groups)


def group_norm_backward(
    dtype: torch.dtype,
    func: Any,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Any,
    n: int,
    c: int,
    size: int,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return _channels(x, n * groups).backward(dtype, grad, x, mean, inverse, weight, mask)


def batch_norm(
    dtype: torch.dtype,
    func: Any,
    x: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not training:
        return func(x, weight, bias, running_mean, running_variance, training, momentum, eps)
    output, mean, inverse = _channels(x, x.shape[1], channels_first=True).forward(dtype, x, weight, bias, eps)
    if running_mean is not None and running_variance is not None:
        count = x.numel() // x.shape[1]
        variance = inverse.pow(-2) - eps
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_variance.lerp_((variance * count / max(count - 1, 1)).to(running_variance.dtype), momentum)
    return output, mean, inverse


def batch_norm_backward(
    dtype: torch.dtype,
    func: Any,
    grad: Tensor,
    x: Tensor,
    weight: Any,
    running_mean: Any,
    running_variance: Any,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    if not training:
        return func(grad, x, weight, running_mean, running_variance, mean, inverse, training, eps, mask)
    return _channels(x, x.shape[1], channels_first=True).backward(dtype, grad, x, mean, inverse, weight, mask)


# ------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class _Convolution:
    """A convolution of any number of dimensions as products of matrices: its patches times its weights."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, [size for padding in reversed(self.padding) for size in (padding, padding)])

    def positions(self, sizes: Sequence[int]) -> Iterator[Any]:
        """For each place in the kernel, the index of what it meets in the padded image; `sizes` are the output's."""
        for place in itertools.product(*(range(size) for size in self.kernel)):
            starts = [offset * dilation for offset, dilation in zip(place, self.dilation, strict=True)]
            slices = (
                slice(start, start + (size - 1) * stride + 1, stride)
                for start, size, stride in zip(starts, sizes, self.stride, strict=True)
            )
            yield (..., *slices)

    def patches(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """`(N, groups, C / groups × kernel, places)`."""
        padded = self.padded(x.float())
        met = torch.stack([padded[place] for place in self.positions(sizes)], 2)
        return met.reshape(x.shape[0], self.groups, -1, math.prod(sizes))

    def add_patches(self, patches: Tensor, shape: Sequence[int], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The image of `shape` in which every patch is added at its place; the transpose of :meth:`patches`."""
        padded = self.padded(patches.new_zeros(*shape))
        met = patches.reshape(shape[0], shape[1], -1, *sizes)
        for index, place in enumerate(self.positions(sizes)):
            region = padded[place]
            region.copy_(round_to(region + met[:, :, index], dtype))
        for dim, (padding, size) in enumerate(zip(self.padding, shape[2:], strict=True), start=2):
            padded = padded.narrow(dim, padding, size)
        return padded

    def sizes(self, x: Tensor) -> list[int]:
        return [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        ]


def _planned(weight: Tensor, stride: Any, padding: Any, dilation: Any, transposed: bool, groups: int) -> _Convolution:
    if transposed:
        raise RunError("precision.fp32_accumulation: false knows no transposed convolutions; leave it out")
    return _Convolution(tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups)


def convolution(
    dtype: torch.dtype,
    func: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    plan = _planned(weight, stride, padding, dilation, transposed, groups)
    sizes = plan.sizes(x)
    product = narrow_product(weight.reshape(groups, weight.shape[0] // groups, -1), plan.patches(x, sizes), dtype)
    output = product.reshape(x.shape[0], weight.shape[0], *sizes)
    return output if bias is None else round_to(output + bias.float().view(1, -1, *(1 for _ in sizes)), dtype)


def convolution_backward(
    dtype: torch.dtype,
    func: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = _planned(weight, stride, padding, dilation, transposed, groups)
    sizes = grad.shape[2:]
    grads = grad.float().reshape(grad.shape[0], groups, weight.shape[0] // groups, -1)
    grad_x = grad_weight = None
    if mask[0]:
        weights = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
        grad_x = plan.add_patches(narrow_product(weights, grads, dtype), x.shape, sizes, dtype)
    if mask[1]:
        # Examples and places in one long sum.
        patches = plan.patches(x, sizes).permute(1, 0, 3, 2).flatten(1, 2)
        grad_weight = narrow_product(grads.permute(1, 2, 0, 3).flatten(2), patches, dtype).reshape(weight.shape)
    over = [dim for dim in range(grad.dim()) if dim != 1]
    return grad_x, grad_weight, narrow_sum(grad, dtype, over) if mask[2] else None
