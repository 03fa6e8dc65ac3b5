"""Batch normalisation over the micro-batches of all ranks, in fp32 whatever the precision of the activations.

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


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of the global micro-batch; inputs `(N, C, *)` of any float type, statistics and buffers in fp32."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm expects (N, C, …), got {tuple(input.shape)}")

    def _apply(self, fn: Any, recurse: bool = True) -> GlobalBatchNorm:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            # `module.half()` must not round the running statistics: their updates are smaller than fp16 resolves.
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.is_floating_point() and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device, torch.float32)
        return self

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        use_batch_statistics = self.training or self.running_mean is None
        if use_batch_statistics and dist.is_initialized() and dist.get_world_size() > 1:
            output, mean, variance, count = _GlobalNormalize.apply(input.float(), weight, bias, self.eps)
            self._update_running(mean, variance, count)
            return output.to(input.dtype)
        momentum = self._count_batch()
        output = F.batch_norm(
            input.float(), self.running_mean, self.running_var, weight, bias, use_batch_statistics, momentum, self.eps
        )
        return output.to(input.dtype)

    def _count_batch(self) -> float:
        """The weight of this batch in the running statistics; `momentum=None` means a plain average."""
        if not (self.training and self.num_batches_tracked is not None):
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self._count_batch()
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), momentum)


class _GlobalNormalize(torch.autograd.Function):
    """(x − mean) / sqrt(var + eps) · weight + bias with mean and var over all ranks; differentiable through both."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _global_moments(x)
        inverse = torch.rsqrt(variance + eps)
        normalized = (x - _per_channel(mean, x)) * _per_channel(inverse, x)
        ctx.save_for_backward(normalized, inverse, weight, count)
        ctx.has_bias = bias is not None
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
        dist.all_reduce(sums)
        mean_grad, mean_grad_normalized = (sums / count).chunk(2)
        grad_x = grad - _per_channel(mean_grad, grad) - normalized * _per_channel(mean_grad_normalized, grad)
        scale = inverse if weight is None else inverse * weight
        return (
            grad_x * _per_channel(scale, grad),
            None if weight is None else grad_weight,
            grad_bias if ctx.has_bias else None,
            None,
        )


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance `(C,)` and count over all ranks, merged as in Chan et al. 1979 (no cancellation)."""
    dims = _reduced_dims(x)
    variance, mean = torch.var_mean(x, dims, correction=0)
    count = x.new_tensor([x.numel() // x.shape[1]])
    local = torch.cat([mean, variance, count])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    ranks = torch.stack(gathered)
    channels = x.shape[1]
    means, variances, counts = ranks[:, :channels], ranks[:, channels : 2 * channels], ranks[:, 2 * channels :]
    total = counts.sum()
    global_mean = (means * counts).sum(0) / total
    global_variance = ((variances + (means - global_mean) ** 2) * counts).sum(0) / total
    return global_mean, global_variance, total


def _reduced_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view([1, -1] + [1] * (like.dim() - 2))


def apply_global_batch_norm(model: nn.Module) -> nn.Module:
    """Replaces every batch norm in `model` by :class:`GlobalBatchNorm`, keeping parameters, buffers and names.

    A norm that `model` uses under several names stays one module.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and not isinstance(child, GlobalBatchNorm):
                parent._modules[name] = replaced.setdefault(child, _converted(child))
    return model


def _converted(source: _BatchNorm) -> GlobalBatchNorm:
    norm = GlobalBatchNorm(
        source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats, device="meta"
    )
    norm._parameters, norm._buffers, norm.training = source._parameters, source._buffers, source.training
    return norm
