"""Which gradients fp16 flushes to zero: Micikevicius et al. (2018), section 3.2 and figure 3, for the model at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

WORST = 20
"""Parameters that are reported by name."""

Backward = Callable[[nn.Module, torch.dtype], None]
"""Runs one micro-batch, in this type, through a twin, with the loss scaled, and its loss backward."""


@dataclass(frozen=True)
class Flushed:
    """By parameter: gradient values that are zero in fp16 and not in fp32, and all gradient values."""

    zeros: Mapping[str, int]
    values: Mapping[str, int]

    def metrics(self) -> dict[str, float]:
        """`precision/underflow`, the share over all parameters, and `precision/underflow/<parameter>` for those with
        the largest shares, at most 20 and none where nothing was flushed."""
        shares = {name: self.zeros[name] / max(self.values[name], 1) for name in self.zeros}
        worst = sorted((name for name in shares if shares[name] > 0), key=lambda name: -shares[name])[:WORST]
        total = sum(self.zeros.values()) / max(sum(self.values.values()), 1)
        return {"precision/underflow": total, **{f"precision/underflow/{name}": shares[name] for name in worst}}


def count_flushed(twin_in: Callable[[torch.dtype], nn.Module], backward: Backward) -> Flushed:
    """What fp16 flushes of the gradients that `backward` makes, the loss scale included. `twin_in(dtype)` builds a twin
    with the same fp16 weights; the two live one after the other.

    Takes a forward and backward pass in fp16 and one in fp32. Memory beside the training: at most 9 bytes a parameter
    (fp32 weights and gradients, and a note of what was zero in fp16) and the activations of one micro-batch in fp32;
    none of it stays.
    """
    low = _gradients(twin_in(torch.float16), torch.float16, backward)
    was_zero = {name: grad == 0 for name, grad in low.items()}
    del low
    full = _gradients(twin_in(torch.float32), torch.float32, backward)
    return Flushed(
        {name: int((was_zero[name] & (grad != 0)).sum()) for name, grad in full.items()},
        {name: grad.numel() for name, grad in full.items()},
    )


def _gradients(twin: nn.Module, dtype: torch.dtype, backward: Backward) -> dict[str, Tensor]:
    """By parameter; zeros where the loss does not depend on one."""
    backward(twin, dtype)
    return {
        name: torch.zeros_like(param) if param.grad is None else param.grad
        for name, param in twin.named_parameters()
        if param.requires_grad
    }


def over_ranks(flushed: Flushed, group: dist.ProcessGroup | None, device: torch.device) -> Flushed:
    """The counts of all ranks of `group` together; None: this rank's. Collective."""
    if group is None:
        return flushed
    names = list(flushed.zeros)
    counts = torch.tensor([[flushed.zeros[name], flushed.values[name]] for name in names], device=device)
    dist.all_reduce(counts, group=group)
    zeros, values = counts.t().tolist()
    return Flushed(dict(zip(names, zeros, strict=True)), dict(zip(names, values, strict=True)))
