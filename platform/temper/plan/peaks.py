"""How fast devices can compute, and how much of that a training uses.

Model FLOPs utilisation, MFU (Chowdhery et al. 2022, "PaLM", appendix B): the FLOPs that a step takes whatever computes
it, three times those of the forward pass, over its time and over the peak of all devices together. What activation
checkpointing computes again is not counted, nor a teacher's passes; pruned weights count as they are multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from temper.plan.build import Plan

_TERA = 1e12

# TFLOP/s by the name that the driver gives a device, without the maker's. Dense: half of what a data sheet gives "with
# sparsity". Products of fp16 and bf16 are summed in fp32. What is missing the device has no units for.
_PEAKS: dict[str, dict[str, float]] = {
    # NVIDIA V100 and T4 data sheets
    r"V100-SXM2-\d+GB": {"fp32": 15.7, "fp16": 125},
    r"V100-PCIE-\d+GB": {"fp32": 14, "fp16": 112},
    "T4": {"fp32": 8.1, "fp16": 65},
    # NVIDIA A10, A30, A40 and A100 data sheets
    "A10": {"fp32": 31.2, "tf32": 62.5, "fp16": 125, "bf16": 125},
    "A30": {"fp32": 10.3, "tf32": 82, "fp16": 165, "bf16": 165},
    "A40": {"fp32": 37.4, "tf32": 74.8, "fp16": 149.7, "bf16": 149.7},
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312},
    # NVIDIA Ampere GA102 and Ada whitepapers, appendix A
    "GeForce RTX 3090": {"fp32": 35.6, "tf32": 35.6, "fp16": 71, "bf16": 71},
    "GeForce RTX 4090": {"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2},
    # NVIDIA L4, L40 and L40S data sheets
    "L4": {"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121},
    "L40": {"fp32": 90.5, "tf32": 90.5, "fp16": 181.05, "bf16": 181.05},
    "L40S": {"fp32": 91.6, "tf32": 183, "fp16": 362.05, "bf16": 362.05},
    # NVIDIA H100, H200 and GH200 data sheets
    "H100 PCIe": {"fp32": 51, "tf32": 378, "fp16": 756.5, "bf16": 756.5},
    "H100 NVL|H200 NVL": {"fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5},
    r"H100 \d+GB HBM3|H200|GH200 \d+GB?( HBM3e)?": {"fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5},
    # NVIDIA Blackwell data sheet, one GPU of HGX B200 and of GB200 NVL72
    "B200": {"fp32": 75, "tf32": 1100, "fp16": 2250, "bf16": 2250},
    "GB200": {"fp32": 80, "tf32": 1250, "fp16": 2500, "bf16": 2500},
}


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s of a whole device in the arithmetic of `precision.dtype`, by the name that its driver gives it; None where
    that is not known, as of a part of a GPU (MIG) and of every CPU."""
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device)
    known = next((peaks for pattern, peaks in _PEAKS.items() if re.fullmatch(pattern, name)), {})
    return known[dtype] * _TERA if dtype in known else None


@dataclass(frozen=True)
class Speed:
    """What tells from the time of a step how fast the training is: the `examples` of a step, the `flops` of the model
    in it, 0 where they are not known, and the `peak` FLOP/s of all devices together, None where it is not known."""

    examples: int
    flops: float = 0.0
    peak: float | None = None

    def metrics(self, step_s: float) -> dict[str, float]:
        """`time/…` of steps that take `step_s` seconds."""
        rate = 1 / max(step_s, 1e-9)
        values = {"time/step_s": step_s, "time/examples_per_s": self.examples * rate}
        if self.flops:
            values["time/tflops_per_s"] = self.flops * rate / _TERA
            if self.peak is not None:
                values["time/mfu"] = self.flops * rate / self.peak
        return values


def plan_speed(plan: Plan, devices: Sequence[str]) -> Speed:
    """Of the plan's training on `devices`, the names of one for each rank; of a GPU that ranks share, each has
    `parallel.gpus_per_worker`."""
    flops = 3.0 * plan.model.forward_flops_per_example * plan.batch.global_batch
    peaks = [peak_flops(device, plan.job.precision.dtype) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    share = min(1.0, plan.job.parallel.gpus_per_worker)
    return Speed(plan.batch.global_batch, flops, share * sum(known) if known and len(known) == len(peaks) else None)
