"""The DeepSpeed configuration of a phase. Keys are those of `deepspeed.runtime.config`, `zero.config`,
`precision_config`.

The optimizer and the schedule are not in it: temper builds torch's own optimizer and sets the learning rate itself.
"""

from __future__ import annotations

import math
from typing import Any

from temper.config.schema import JobConfig, PrecisionConfig
from temper.plan.mesh import BatchPlan, MeshPlan

# DeepSpeed's own default, in elements. It allocates the whole bucket, also for a much smaller model.
_LARGEST_BUCKET = 500_000_000
_NEVER = 2**40


def deepspeed_config(job: JobConfig, batch: BatchPlan, mesh: MeshPlan, num_trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `num_trainable` trainable parameters."""
    return {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": job.optimizer.clip_norm or 0.0,
        "zero_optimization": _zero(job, mesh, num_trainable),
        **_precision(job.precision),
        # torch's own optimizers are neither on DeepSpeed's list of tested ones nor its C++ ones; temper tests them.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Stages pass whole activations on. DeepSpeed would send each tensor rank's share of them and gather them again,
        # which is wrong where a stage ends between two layers that hand parts to each other.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }


def bucket_elements(num_trainable: int) -> int:
    """Elements of the buffer in which gradients are gathered before they are reduced."""
    return max(min(num_trainable, _LARGEST_BUCKET), 1)


def zero_stage(job: JobConfig) -> int:
    """The ZeRO stage that runs: the one asked for, but 1 for 0 in fp16 and bf16.

    DeepSpeed's stage 0 is wrong there: it starts with an optimizer step of its own, and in fp16 it divides the
    gradients by a loss scale that `engine.backward` never multiplied the loss by. Stage 1 computes what 0 should.
    """
    return 1 if job.parallel.zero == 0 and job.precision.is_low else job.parallel.zero


def _zero(job: JobConfig, mesh: MeshPlan, num_trainable: int) -> dict[str, Any]:
    stage = zero_stage(job)
    if stage == 0:
        return {"stage": 0}
    on_gpu = mesh.device == "cuda"
    config: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        # On a CPU there is no second stream to overlap with; DeepSpeed would only allocate a second buffer.
        "overlap_comm": on_gpu,
        "reduce_bucket_size": bucket_elements(num_trainable),
    }
    if job.parallel.offload == "cpu":
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return config


def _precision(precision: PrecisionConfig) -> dict[str, Any]:
    if not precision.is_low:
        return {}
    if precision.dtype == "bf16":
        return {"bf16": {"enabled": True}}
    if precision.loss_scale != "dynamic":
        return {"fp16": {"enabled": True, "loss_scale": precision.loss_scale}}
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,  # DeepSpeed's word for dynamic
            "initial_scale_power": round(math.log2(precision.initial_scale)),
            "loss_scale_window": precision.scale_window,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": int(precision.min_scale),
        }
    }
