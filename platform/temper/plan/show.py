"""The plan as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from temper.config.schema import DistillConfig, JobConfig, PrecisionConfig, RampConfig
from temper.plan.build import Plan
from temper.plan.distill import DistillPlan, FeaturePair, Teacher
from temper.plan.dsd import count_pruned
from temper.plan.facts import labelled_examples
from temper.plan.memory import MemoryPlan
from temper.plan.phases import PhasePlan, Pruning, learning_rate, phase_schedule
from temper.plan.probe import ModelFacts, PrunableWeight
from temper.plan.stages import StagePlan, bubble, imbalance

Row = tuple[str, str]
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_TIMES = "×"
_COLUMNS = 120
_NAMES_SHOWN = 3
_LAYERS_SHOWN = 6


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
            f"{job.data.kind}: {data.train_examples:,} examples{_labelled(plan)}, {data.test_examples:,} for the test; "
            f"{_TIMES.join(map(str, data.shape))}" + (f", {data.num_classes} classes" if data.num_classes else ""),
        ),
        ("loss", f"{job.loss.kind}; metrics: {', '.join(job.evaluation.metrics) or 'none'}"),
    ]


def _labelled(plan: Plan) -> str:
    data, share = plan.data, plan.job.data.labels
    every = data.train_examples + data.left_out_examples
    labelled = f", {labelled_examples(share, every):,} of {every:,} labelled" if share < 1 else ""
    return labelled + (f" + {data.validation_examples:,} held out" if data.validation_examples else "")


def _model_name(job: JobConfig) -> str:
    model = job.model
    detail = getattr(model, "target", None) or getattr(model, "name", None) or getattr(model, "model_type", None)
    return f"{model.kind} {detail}" if detail else model.kind


def _how(plan: Plan) -> Sequence[Row]:
    job = plan.job
    synchronous = job.parallel.mode == "synchronous"
    return [
        ("mesh", _mesh(plan)),
        *(_synchronous_rows(plan) if synchronous else _server_rows(plan)),
        ("precision", _precision(job.precision)),
        ("batch", _batch(plan)),
        ("optimizer", f"{job.optimizer.kind}, lr {job.optimizer.lr:g}" + _clipping(job)),
        ("schedule", _schedule(plan)),
        *_teaching_rows(plan),
        *[row for phase in plan.phases for row in _phase_rows(plan, phase)],
    ]


def _teaching_rows(plan: Plan) -> Sequence[Row]:
    distill, plans = plan.job.distill, plan.distill
    if distill is None or plans is None:
        return []
    of_several = len(plans.teachers) > 1
    members = zip(plans.teachers, plans.facts, strict=True)
    return [
        *[("teacher", _teacher(teacher, facts, of_several)) for teacher, facts in members],
        *([] if distill.alpha == 0 else [("soft targets", describe_soft_targets(distill))]),
        *[("level", describe_level(pair, len(plans.teachers))) for pair in plans.pairs],
        ("teaching", _placement(plan, plans, distill)),
    ]


def _teacher(teacher: Teacher, facts: ModelFacts, of_several: bool) -> str:
    trained = "trained" if teacher.is_trained else "is trained first"
    weight = f", weight {teacher.weight:g}" if of_several else ""
    return (
        f"{teacher.name}: {teacher.model.kind}, {facts.num_parameters:,} parameters in {teacher.precision}{weight}, "
        f"{teacher.fingerprint[:10]}…, {f'from {teacher.place}' if teacher.plan is None else trained}"
    )


def describe_soft_targets(distill: DistillConfig) -> str:
    """e.g. `T 4, alpha 0.9, decoupled (non_target_weight 8), logits standardized`."""
    decoupled = f", decoupled (non_target_weight {distill.non_target_weight:g})" if distill.loss == "decoupled" else ""
    standardized = ", logits standardized" if distill.standardize else ""
    return f"T {_ramp(distill.temperature)}, alpha {_ramp(distill.alpha)}{decoupled}{standardized}"


def _ramp(value: float | RampConfig) -> str:
    return f"{value.start:g} → {value.end:g} ({value.kind})" if isinstance(value, RampConfig) else f"{value:g}"


def describe_level(pair: FeaturePair, teachers: int) -> str:
    """e.g. `layer2 16×14×14 → conv1x1 → layer2 64×14×14, mse, weight 1`."""
    student, teacher = (_TIMES.join(map(str, shape)) for shape in (pair.student_shape, pair.teacher_shape))
    which = f" of teacher {pair.of}" if teachers > 1 else ""
    steps = [f"{pair.student} {student}", *_connector(pair), f"{pair.teacher}{which} {teacher}"]
    return f"{' → '.join(steps)}, {pair.loss.replace('_', ' ')}, weight {pair.weight:g}"


def _connector(pair: FeaturePair) -> Sequence[str]:
    connector = pair.connector
    resized = "attention " if pair.loss == "attention_transfer" else ""
    return [
        *(["mean"] if connector.pool else []),
        *([connector.kind] if connector.kind != "none" else []),
        *([f"{resized}to {_TIMES.join(map(str, connector.size))}"] if connector.size else []),
    ]


def _placement(plan: Plan, plans: DistillPlan, distill: DistillConfig) -> str:
    if plans.cache is None:
        where = "whole on every rank" if distill.placement == "replicated" else "shared out by ZeRO-3"
        views = f", {_count(distill.views, 'view')} of each example" if distill.views else ""
        return f"live, {where}, {_count(plans.rows, 'example')} in a pass{views}"
    views = f"{_count(plans.cache.views, 'view')} of " if distill.views else ""
    kept = f"the {plans.cache.top_k} largest logits" if plans.cache.top_k else "all logits"
    what = f"{kept}{' and features' if plans.cache.features else ''} in {distill.signals}"
    return f"computed once for {views}{plan.data.train_examples:,} examples ({what}), kept in {plans.cache.folder}"


def _mesh(plan: Plan) -> str:
    mesh = plan.mesh
    if plan.job.parallel.mode == "parameter_server":
        shards = _count(plan.job.parallel.shards, "shard")
        return f"{_count(mesh.data, 'worker')} on {mesh.device}, each on its own, and a parameter server of {shards}"
    axes = [("data", mesh.data), ("pipeline", mesh.pipeline), ("tensor", mesh.tensor)]
    product = f" {_TIMES} ".join(f"{name} {size}" for name, size in axes)
    return f"{product} = {_count(mesh.world_size, 'rank')} on {mesh.device}"


def _synchronous_rows(plan: Plan) -> Sequence[Row]:
    parallel = plan.job.parallel
    offload = ", masters and optimizer state in host memory" if parallel.offload == "cpu" else ""
    sharding = f"ZeRO stage {parallel.zero}" if parallel.zero else "none (ZeRO stage 0)"
    return [
        *_stage_rows(plan),
        *[("split", _split(kind, plan.mesh.splits)) for kind in dict.fromkeys(plan.mesh.splits.values())],
        ("sharding", sharding + offload),
    ]


def _stage_rows(plan: Plan) -> Sequence[Row]:
    if not plan.stages:
        return []
    idle = bubble(len(plan.stages), plan.batch.accumulation)
    micro_batches = _count(plan.batch.accumulation, "micro-batch")
    return [
        *[(f"stage {index}", _stage(plan, stage)) for index, stage in enumerate(plan.stages)],
        (
            "bubble",
            f"{idle:.0%} of a step with {micro_batches}; the most expensive stage costs "
            f"{imbalance(plan.stages):.2f} {_TIMES} the mean of all",
        ),
    ]


def _stage(plan: Plan, stage: StagePlan) -> str:
    """e.g. `layers 0 to 4 (conv1 … layer1_1), 9,728 parameters, 51% of the cost, sends 512.0 KiB a micro-batch`."""
    layers, last = plan.model.layers, stage.first_layer + stage.layers - 1
    first_name, last_name = layers[stage.first_layer].name, layers[last].name
    which = (
        f"layer {last} ({last_name})"
        if stage.layers == 1
        else f"layers {stage.first_layer} to {last} ({first_name} … {last_name})"
    )
    cost = "measured time" if plan.job.parallel.stages == "measured" else "cost"
    sends = f", sends {show_size(stage.sent_bytes)} a micro-batch" if stage.sent_bytes else ""
    return f"{which}, {stage.parameters:,} parameters, {stage.cost_share:.0%} of the {cost}{sends}"


def _split(kind: str, splits: Mapping[str, str]) -> str:
    """e.g. `output_maps: conv1, layer1_0.conv1, layer1_0.conv2, … (12)`."""
    return f"{kind}: {_names([name for name, split in splits.items() if split == kind], _NAMES_SHOWN)}"


def _names(names: Sequence[str], shown: int) -> str:
    return ", ".join(names) if len(names) <= shown else f"{', '.join(names[:shown])}, … ({len(names)})"


def _server_rows(plan: Plan) -> Sequence[Row]:
    parallel = plan.job.parallel
    elements = -(-plan.model.num_trainable // parallel.shards)
    bound = parallel.max_staleness
    ahead = "any number of pushes" if bound is None else f"at most {bound} {'push' if bound == 1 else 'pushes'}"
    warm = _count(parallel.warm_start_steps, "step")
    return [
        ("server", f"{_count(parallel.shards, 'shard')} of {elements:,} parameters and their optimizer state"),
        (
            "exchange",
            f"fetch every {_count(parallel.n_fetch, 'step')}, push every {_count(parallel.n_push, 'step')}; a worker "
            f"may be ahead of the slowest by {ahead}",
        ),
        ("warm start", f"one worker alone for {warm}" if parallel.warm_start_steps else "none"),
    ]


def _batch(plan: Plan) -> str:
    if plan.job.parallel.mode == "parameter_server":
        workers, examples = _count(plan.mesh.data, "worker"), _count(plan.batch.micro_batch, "example")
        return f"{plan.batch.global_batch} = {workers} {_TIMES} {examples}"
    replicas = "rank" if plan.mesh.world_size == plan.mesh.data else "replica"
    factors = (plan.mesh.data, replicas), (plan.batch.accumulation, "micro-batch"), (plan.batch.micro_batch, "example")
    product = f" {_TIMES} ".join(_count(number, name) for number, name in factors)
    return f"{plan.batch.global_batch} = {product}"


def _count(number: int, name: str) -> str:
    plural = name if number == 1 else f"{name}es" if name.endswith("ch") else f"{name}s"
    return f"{number} {plural}"


def _phase_rows(plan: Plan, phase: PhasePlan) -> Sequence[Row]:
    row = f"phase {phase.name}", ", ".join(_phase(plan, phase))
    return [row] if phase.pruning is None else [row, *_layer_rows(phase.pruning, plan.model.prunable)]


def _phase(plan: Plan, phase: PhasePlan) -> Sequence[str]:
    stored = f"stored under {phase.fingerprint[:10]}…"
    steps = f"steps {phase.first_step:,} to {phase.last_step:,}"
    if len(plan.phases) == 1:
        return [steps, stored]
    parts = [steps, _phase_lr(plan.job, phase)]
    if phase.pruning is not None:
        parts.append(_pruned(phase.pruning, plan.model.prunable))
    if phase.kind == "redense":
        parts.append(_regrown(plan.phase_before(phase)))
    if phase.kind != "dense":
        parts.append(f"optimizer {'fresh' if phase.fresh else 'kept'}")
    return [*parts, stored]


def _regrown(before: PhasePlan | None) -> str:
    pruned = before is not None and before.pruning is not None and before.pruning.layers
    return "all weights train again, pruned ones from zero" if pruned else "all weights train on"


def _phase_lr(job: JobConfig, phase: PhasePlan) -> str:
    """e.g. `lr 0.1 → 0.001 (cosine)`, from the end of the warm-up to the end of the phase."""
    config = phase_schedule(job, phase.kind)
    lr = learning_rate(job, phase)
    highest, last = lr(config.warmup_steps), lr(phase.steps)
    warmup = f" after {_count(config.warmup_steps, 'step')} of warm-up" if config.warmup_steps else ""
    way = f"{highest:.3g}" if highest == last else f"{highest:.3g} → {last:.3g}"
    return f"lr {way} ({config.kind}{warmup})"


def _pruned(pruning: Pruning, prunable: Sequence[PrunableWeight]) -> str:
    """e.g. `30% of 5 layers pruned: 31,740 of 105,800 prunable weights are zero`."""
    if not pruning.layers:
        return "nothing pruned"
    total = sum(weight.numel for weight in prunable)
    zeros = sum(
        count_pruned(weight, pruning.layers[weight.name], pruning.structure)
        for weight in prunable
        if weight.name in pruning.layers
    )
    least, most = min(pruning.layers.values()), max(pruning.layers.values())
    share = _percent(most) if least == most else f"{_percent(least)} to {_percent(most)}"
    # N:M is always a share of the weights in a row, so its name says it.
    what = {"weights": "", "channels": " of the channels"}.get(pruning.structure, f" ({pruning.structure})")
    chance = " at random" if pruning.criterion == "random" else ""
    layers = _count(len(pruning.layers), "layer")
    return f"{share}{what} of {layers} pruned{chance}: {zeros:,} of {total:,} prunable weights are zero"


def _layer_rows(pruning: Pruning, prunable: Sequence[PrunableWeight]) -> Sequence[Row]:
    """Which layers are pruned, by their share, and which of those that could be are not."""
    dense = [weight.name for weight in prunable if weight.name not in pruning.layers]
    return [
        *[
            ("  pruned", f"{_percent(share)}: {_names(_layers_of(pruning, share), _LAYERS_SHOWN)}")
            for share in dict.fromkeys(pruning.layers.values())
        ],
        *([("  left dense", _names(dense, _LAYERS_SHOWN))] if dense else []),
    ]


def _layers_of(pruning: Pruning, share: float) -> list[str]:
    return [name for name, other in pruning.layers.items() if other == share]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _precision(precision: PrecisionConfig) -> str:
    return ", ".join([precision.dtype, *_loss_scale(precision), *_switched_off(precision)])


def _loss_scale(precision: PrecisionConfig) -> Sequence[str]:
    if precision.dtype != "fp16":
        return []
    if precision.loss_scale != "dynamic":
        return [f"loss scale {precision.loss_scale:g}"]
    minimum = _AT_MIN_SCALE[precision.at_min_scale]
    return [
        f"dynamic loss scale from {precision.initial_scale:g}",
        f"doubled after {precision.scale_window} clean steps",
        *([f"at scale {precision.min_scale:g} {minimum}"] if minimum else []),
    ]


# What an overflow at the least loss scale does; to stop goes without saying.
_AT_MIN_SCALE = {"stop": "", "hold": "skips steps", "back_off": "goes back to the last checkpoint"}


def _switched_off(precision: PrecisionConfig) -> Sequence[str]:
    sampled = precision.underflow_every
    return [
        *([] if precision.master_weights else ["no master weights"]),
        *([] if precision.fp32_accumulation else ["no fp32 accumulation"]),
        *([f"flushed gradients counted every {_count(sampled, 'step')}"] if sampled else []),
    ]


def _clipping(job: JobConfig) -> str:
    return f", gradients clipped to {job.optimizer.clip_norm:g}" if job.optimizer.clip_norm else ""


def _schedule(plan: Plan) -> str:
    """The kind and the dense phase's learning rate on its way, e.g. `cosine: 0.001 at step 0, 0.1 at step 100, …`."""
    config, dense = plan.job.optimizer.schedule, plan.phases[0]
    if config.kind == "constant" and config.warmup_steps == 0:
        return "constant"
    lr, last = learning_rate(plan.job, dense), dense.steps - 1
    steps = sorted({0, min(config.warmup_steps, last), dense.steps // 4, dense.steps // 2, dense.steps * 3 // 4, last})
    where = " in the dense phase" if len(plan.phases) > 1 else ""
    return f"{config.kind}{where}: " + ", ".join(f"{lr(step):.3g} at step {step}" for step in steps)


def _cost(plan: Plan) -> Sequence[Row]:
    memory = plan.memory
    most = "at most " if plan.stages else ""
    return [
        ("compute", most + _compute(plan)),
        ("memory", f"{most}{show_size(memory.device_bytes)} on each rank's {plan.mesh.device}: {_parts(memory)}"),
        *_host_row(memory),
        *_server_row(plan),
    ]


def _compute(plan: Plan) -> str:
    # Backward costs twice what forward does: one product for the inputs' gradients, one for the weights'.
    flops = 3 * _busiest_stage_flops(plan) * plan.batch.rank_batch
    where = "each rank" if plan.mesh.tensor == 1 else f"every {plan.mesh.tensor} tensor ranks together"
    return f"{flops / 1e9:,.3g} GFLOP in a step on {where}"


def _busiest_stage_flops(plan: Plan) -> int:
    if not plan.stages:
        return plan.model.forward_flops_per_example
    layers = plan.model.layers
    return max(
        sum(layer.forward_flops for layer in layers[stage.first_layer : stage.first_layer + stage.layers])
        for stage in plan.stages
    )


def _parts(memory: MemoryPlan) -> str:
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer_state,
        "activations": memory.activations,
        "buckets": memory.buckets,
        **({"masks": memory.masks} if memory.masks else {}),
        **({"teacher": memory.teacher} if memory.teacher else {}),
    }
    return ", ".join(f"{name} {show_size(size)}" for name, size in parts.items())


def _host_row(memory: MemoryPlan) -> Sequence[Row]:
    if not memory.host_bytes:
        return []
    parts = f"gradients {show_size(memory.host_gradients)}, optimizer {show_size(memory.host_optimizer_state)}"
    parts += f", masks {show_size(memory.host_masks)}" if memory.host_masks else ""
    return [("host memory", f"{show_size(memory.host_bytes)} beside each rank: {parts}")]


def _server_row(plan: Plan) -> Sequence[Row]:
    if plan.job.parallel.mode != "parameter_server":
        return []
    masks = ", masks" if plan.memory.masks else ""
    return [("server memory", f"{show_size(plan.memory.server)} in each shard: weights{masks} and optimizer state")]


def show_size(size: int) -> str:
    """Bytes, e.g. `1.5 GiB`."""
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _where(plan: Plan) -> Sequence[Row]:
    return [("storage", plan.job.storage), ("run folder", str(plan.run_folder)), ("fingerprint", plan.fingerprint)]
