"""Whether a device has the arithmetic that `precision.dtype` asks for."""

from __future__ import annotations

import subprocess

from temper.errors import Problem

TF32_CAPABILITY = (8, 0)  # NVIDIA's Ampere


def check_precision_device(dtype: str, device: str, capability: tuple[int, int] | None) -> list[Problem]:
    """What is wrong with `precision.dtype` on `device`, `cpu` or `cuda`, whose GPUs have at least this capability.

    None stands for a capability that nobody knows yet, as that of a cluster's GPUs; the workers ask theirs.
    """
    if dtype != "tf32":
        return []
    if device == "cpu":
        return [Problem("precision.dtype", dtype, "needs a GPU, and the job runs on CPUs", "use fp32 or bf16")]
    if capability is not None and capability < TF32_CAPABILITY:
        rule = f"needs NVIDIA's Ampere or later (capability 8.0), and a GPU here has {capability[0]}.{capability[1]}"
        return [Problem("precision.dtype", dtype, rule, "use fp32 or fp16")]
    return []


def local_capability() -> tuple[int, int] | None:
    """The lowest compute capability of this machine's GPUs, asked of NVIDIA's driver; None where it does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min((int(major), int(minor)) for major, _, minor in (line.partition(".") for line in answer.split()))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
