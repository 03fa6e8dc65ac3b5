"""What every engine does to a step before the model sees it: types, memory order, random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepared(inputs: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inputs on the device, floating-point ones in `dtype`, images with their channels last."""
    inputs = inputs.to(device, non_blocking=True)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    # Convolutions are up to three times faster on images whose channels come last in memory, most of all in fp16.
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def apply_seed(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, which takes 130 µs where there is no CUDA: it notes a traceback for each call."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
