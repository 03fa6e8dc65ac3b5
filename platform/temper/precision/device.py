"""Products on a GPU: TF32 only where it is asked for, and no kernel that adds up in fp16 or bf16."""

from __future__ import annotations

import torch

from temper.errors import RunError
from temper.plan.precision import TF32_CAPABILITY


def apply_product_precision(dtype: str, device: torch.device) -> None:
    """Sets torch's switches of this process for `precision.dtype`; does nothing on a CPU, whose products are exact.

    torch's own defaults differ: convolutions of fp32 use TF32, and products of fp16 and bf16 may be split into parts
    whose sums are added in that precision. Raises RunError where tf32 is asked of a GPU that has none.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if dtype == "tf32" and capability < TF32_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise RunError(f"precision.dtype: tf32 needs an NVIDIA GPU from Ampere on, and {name} is older; use fp32")
    products = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = products  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
