"""The plan as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from temper.config.schema import JobConfig
from temper.plan.build import Plan
from temper.plan.memory import MemoryPlan
from temper.plan.phases import PhasePlan
from temper.schedules import build_schedule

Row = tuple[str, str]
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_TIMES = "×"
_COLUMNS = 120


def plan_table(plan: Plan) -> str:
    """What will happen and what it costs: one aligned table, then the notes."""
    rows = [*_what(plan), *_how(plan), *_cost(plan), *_where(plan)]
    width = max(len(label) for label, _ in rows)
    lines = [_wrapped(f"{label:<{width}}  ", text) for label, text in rows]
    return "\n".join([*lines, *(_wrapped("note: ", note) for note in plan.notes)])


def _wrapped(label: str, text: str) -> str:
    """The text beside its label, in lines of `_COLUMNS`; words stay in one piece, so that a path can be copied."""
    indent = " " * len(label)
    return textwrap.fill(
        text,
        _COLUMNS,
        initial_indent=label,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _what(plan: Plan) -> Sequence[Row]:
    job, data, model = plan.job, plan.data, plan.model
    held_out = f" + {data.validation_examples:,} held out" if data.validation_examples else ""
    frozen = model.num_parameters - model.num_trainable
    return [
        ("job", job.name),
        (
            "model",
            f"{_model_name(job)}: {model.num_parameters:,} parameters"
            + (f", {frozen:,} of them frozen" if frozen else ""),
        ),
        (
            "data",
            f"{job.data.kind}: {data.train_examples:,} examples{held_out}, {data.test_examples:,} for the test; "
            f"{_TIMES.join(map(str, data.shape))}" + (f", {data.num_classes} classes" if data.num_classes else ""),
        ),
        ("loss", f"{job.loss.kind}; metrics: {', '.join(job.evaluation.metrics) or 'none'}"),
    ]


def _model_name(job: JobConfig) -> str:
    model = job.model
    detail = getattr(model, "target", None) or getattr(model, "name", None) or getattr(model, "model_type", None)
    return f"{model.kind} {detail}" if detail else model.kind


def _how(plan: Plan) -> Sequence[Row]:
    job, mesh = plan.job, plan.mesh
    offload = ", masters and optimizer state in host memory" if job.parallel.offload == "cpu" else ""
    return [
        (
            "mesh",
            f"data {mesh.data} {_TIMES} pipeline {mesh.pipeline} = {_count(mesh.world_size, 'rank')} on {mesh.device}",
        ),
        ("sharding", (f"ZeRO stage {job.parallel.zero}" if job.parallel.zero else "none (ZeRO stage 0)") + offload),
        ("precision", _precision(job)),
        ("batch", _batch(plan)),
        ("optimizer", f"{job.optimizer.kind}, lr {job.optimizer.lr:g}" + _clipping(job)),
        ("schedule", _schedule(plan)),
        *[
            (
                f"phase {phase.name}",
                _phase(phase),
            )
            for phase in plan.phases
        ],
    ]


def _batch(plan: Plan) -> str:
    factors = (plan.mesh.data, "rank"), (plan.batch.accumulation, "micro-batch"), (plan.batch.micro_batch, "example")
    product = f" {_TIMES} ".join(_count(number, name) for number, name in factors)
    return f"{plan.batch.global_batch} = {product}"


def _count(number: int, name: str) -> str:
    plural = name if number == 1 else f"{name}es" if name.endswith("ch") else f"{name}s"
    return f"{number} {plural}"


def _phase(phase: PhasePlan) -> str:
    return f"steps {phase.first_step} to {phase.first_step + phase.steps}, stored under {phase.fingerprint[:10]}…"


def _precision(job: JobConfig) -> str:
    precision = job.precision
    if precision.dtype != "fp16":
        return precision.dtype
    if precision.loss_scale == "dynamic":
        doubling = f"doubled after {precision.scale_window} clean steps"
        return f"fp16, dynamic loss scale from {precision.initial_scale:g}, {doubling}"
    return f"fp16, loss scale {precision.loss_scale:g}"


def _clipping(job: JobConfig) -> str:
    return f", gradients clipped to {job.optimizer.clip_norm:g}" if job.optimizer.clip_norm else ""


def _schedule(plan: Plan) -> str:
    """The kind and the learning rate along the way, e.g. `cosine: 0.001 at step 0, 0.1 at step 100, …`."""
    config = plan.job.optimizer.schedule
    if config.kind == "constant" and config.warmup_steps == 0:
        return "constant"
    schedule = build_schedule(config, plan.steps)
    last = plan.steps - 1
    steps = sorted({0, min(config.warmup_steps, last), plan.steps // 4, plan.steps // 2, plan.steps * 3 // 4, last})
    return f"{config.kind}: " + ", ".join(
        f"{plan.job.optimizer.lr * schedule(step):.3g} at step {step}" for step in steps
    )


def _cost(plan: Plan) -> Sequence[Row]:
    memory, rank_batch = plan.memory, plan.batch.rank_batch
    # Backward costs twice what forward does: one product for the inputs' gradients, one for the weights'.
    flops = 3 * plan.model.forward_flops_per_example * rank_batch
    return [
        ("compute", f"{flops / 1e9:,.3g} GFLOP in a step on each rank"),
        ("memory", f"{_size(memory.device_bytes)} on each rank's {plan.mesh.device}: {_parts(memory)}"),
        *_host_row(memory),
    ]


def _parts(memory: MemoryPlan) -> str:
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer_state,
        "activations": memory.activations,
        "buckets": memory.buckets,
    }
    return ", ".join(f"{name} {_size(size)}" for name, size in parts.items())


def _host_row(memory: MemoryPlan) -> Sequence[Row]:
    if not memory.host_bytes:
        return []
    parts = f"gradients {_size(memory.host_gradients)}, optimizer {_size(memory.host_optimizer_state)}"
    return [("host memory", f"{_size(memory.host_bytes)} beside each rank: {parts}")]


def _size(size: int) -> str:
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _where(plan: Plan) -> Sequence[Row]:
    return [("storage", plan.job.storage), ("run folder", str(plan.run_folder)), ("fingerprint", plan.fingerprint)]
