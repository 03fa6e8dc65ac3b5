"""Batch normalisation over the micro-batches of several ranks, in fp32 whatever the precision of the activations.

With plain `nn.BatchNorm2d` each rank normalises by its own examples, so that two workers train another function than
one. Here the statistics are those of the global micro-batch (Ioffe and Szegedy 2015, over all ranks), and parallel
means equal. torch's own `SyncBatchNorm` does the same on CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from temper.parallel.groups import Group


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: Group,
) -> Tensor:
    """`F.batch_norm` of `(N, C, *)`, where the batch is that of all ranks of `group`; N may differ, and be 0.

    Computes in fp32, or in fp64 for such inputs. The gradients of `weight` and `bias` stay the rank's own.
    """
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    weight, bias = (None if value is None else value.to(x.dtype) for value in (weight, bias))
    if not training or group.size == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).to(input.dtype)
    output, mean, variance, count = _GlobalNormalize.apply(x, weight, bias, eps, group)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1).clamp(min=1))).to(running_var.dtype), momentum)
    normalized: Tensor = output.to(input.dtype)
    return normalized


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of the micro-batches of `group`; inputs `(N, C, *)` of any float type, statistics and buffers in fp32.

    A group of one rank, the default, normalises by that rank's examples alone.
    """

    group = Group()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm expects (N, C, …), got {tuple(input.shape)}")

    def _apply(self, fn: Any, recurse: bool = True) -> GlobalBatchNorm:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            # `module.half()` must not round the running statistics: their updates are smaller than fp16 resolves.
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(moved.device, torch.float32)
        return self

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        training = self.training or self.running_mean is None
        momentum = self._count_batch()
        values = (self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps)
        # Something that stands in for a tensor, as an image block does, knows its own group.
        return batch_norm(input, *values, self.group) if isinstance(input, Tensor) else F.batch_norm(input, *values)

    def _count_batch(self) -> float:
        """The weight of this batch in the running statistics; `momentum=None` means a plain average."""
        if not (self.training and self.num_batches_tracked is not None):
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class _GlobalNormalize(torch.autograd.Function):
    """(x − mean) / sqrt(var + eps) · weight + bias with mean and var over the group; differentiable through both."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _global_moments(x, group)
        inverse = torch.rsqrt(variance + eps)
        normalized = (x - _per_channel(mean, x)) * _per_channel(inverse, x)
        ctx.save_for_backward(normalized, inverse, weight, count)
        ctx.has_bias, ctx.group = bias is not None, group
        ctx.mark_non_differentiable(mean, variance, count)
        output = normalized if weight is None else normalized * _per_channel(weight, x)
        output = output if bias is None else output + _per_channel(bias, x)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        normalized, inverse, weight, count = ctx.saved_tensors
        dims = _reduced_dims(grad)
        grad_bias = grad.sum(dims)
        grad_weight = (grad * normalized).sum(dims)
        sums = torch.cat([grad_bias, grad_weight])
        # The weight's gradient stays the rank's own, as data parallelism averages it; the input's needs all ranks.
        dist.all_reduce(sums, group=ctx.group.process_group)
        mean_grad, mean_grad_normalized = (sums / count).chunk(2)
        grad_x = grad - _per_channel(mean_grad, grad) - normalized * _per_channel(mean_grad_normalized, grad)
        scale = inverse if weight is None else inverse * weight
        return (
            grad_x * _per_channel(scale, grad),
            None if weight is None else grad_weight,
            grad_bias if ctx.has_bias else None,
            None,
            None,
        )


def _global_moments(x: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance `(C,)` and count over the group, merged as in Chan et al. 1979 (no cancellation)."""
    channels = x.shape[1]
    # A rank without pixels has no moments, and counts nothing.
    moments = torch.var_mean(x, _reduced_dims(x), correction=0) if x.numel() else x.new_zeros(2, channels).unbind()
    ranks = _gathered(torch.cat([*moments, x.new_tensor([x.numel() // channels])]), group)
    variances, means, counts = ranks[:, :channels], ranks[:, channels : 2 * channels], ranks[:, 2 * channels :]
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, ((variances + (means - mean) ** 2) * counts).sum(0) / total, total


def _gathered(values: Tensor, group: Group) -> Tensor:
    """`(ranks, values)`; on the meta device nothing is sent, and they are this rank's."""
    if values.is_meta:
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(group.size)]
    dist.all_gather(gathered, values, group=group.process_group)
    return torch.stack(gathered)


def _reduced_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view([1, -1] + [1] * (like.dim() - 2))


def apply_global_batch_norm(model: nn.Module, group: Group) -> nn.Module:
    """Replaces every batch norm in `model` by :class:`GlobalBatchNorm`, keeping parameters, buffers and names.

    A norm that `model` uses under several names stays one module. Those that are global already go over to `group`.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, GlobalBatchNorm):
                child.group = group
            elif isinstance(child, _BatchNorm):
                parent._modules[name] = replaced.setdefault(child, _converted(child, group))
    return model


def _converted(source: _BatchNorm, group: Group) -> GlobalBatchNorm:
    norm = GlobalBatchNorm(
        source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats, device="meta"
    )
    norm._parameters, norm._buffers, norm.training = source._parameters, source._buffers, source.training
    norm.group = group
    return norm
