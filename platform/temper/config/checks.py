"""Rules across a job's sections that need nothing but the job; each names the nearest setting that is legal.

What needs the data or the machine as well is checked in plan/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from temper.config.schema import (
    DataConfig,
    DistillConfig,
    DSDConfig,
    JobConfig,
    RampConfig,
    RoundConfig,
    ScheduleConfig,
    Section,
    Transform,
)
from temper.errors import Problem

_CLASS_METRICS = ("accuracy", "top5_accuracy", "f1", "precision", "recall", "auroc", "calibration_error")
_VALUE_METRICS = ("mse", "mae")
_MAX_SCALE_POWER = 32
_RESIZING = ("resize", "center_crop", "random_crop", "random_resized_crop")
_FIXED = ("resize", "center_crop")


def check_job(job: JobConfig) -> list[Problem]:
    """Every rule across sections that the job breaks, in the order of the sections."""
    return [problem for rule in _RULES for problem in rule(job)]


def is_random(transform: Transform) -> bool:
    """Whether the transform does something else to an example each time."""
    return transform.kind not in _FIXED


def has_random_augment(data: DataConfig) -> bool:
    """Whether an example looks different in each epoch."""
    return any(map(is_random, data.augment))


def _check_augment_order(job: JobConfig) -> list[Problem]:
    """Erasing before a crop or resize leaves holes of another size than asked for; the rest may come in any order."""
    problems = []
    erasing = False
    for index, transform in enumerate(job.data.augment):
        if erasing and transform.kind in _RESIZING:
            rule = "comes after random_erasing, which must work on the final image"
            problems.append(Problem(f"data.augment.{index}", transform.kind, rule, "move random_erasing to the end"))
        erasing = erasing or transform.kind == "random_erasing"
    return problems


def _check_global_batch(job: JobConfig) -> list[Problem]:
    batch, workers = job.data.global_batch, job.parallel.workers
    if batch % workers == 0:
        return []
    below, above = batch // workers * workers, -(-batch // workers) * workers
    nearest = f"{below} or {above}" if below else str(above)
    rule = f"cannot be split evenly over parallel.workers: {workers}"
    fit = max(size for size in range(1, min(workers, batch) + 1) if batch % size == 0)
    return [Problem("data.global_batch", batch, rule, f"use {nearest}, or workers: {fit}")]


def _check_loss(job: JobConfig) -> list[Problem]:
    """Which metrics say something about a model that is trained with this loss."""
    every = (*_CLASS_METRICS, *_VALUE_METRICS)
    wrong = {"cross_entropy": _VALUE_METRICS, "mse": _CLASS_METRICS, "ctc": every, "python": ()}[job.loss.kind]
    right = ", ".join(metric for metric in every if metric not in wrong)
    remedy = f"use some of {right}" if right else "use metrics: []"
    return [
        Problem(f"evaluation.metrics.{index}", metric, f"does not fit loss.kind: {job.loss.kind}", remedy)
        for index, metric in enumerate(job.evaluation.metrics)
        if metric in wrong
    ]


def _check_ctc(job: JobConfig) -> list[Problem]:
    if job.loss.kind != "ctc" or job.data.kind == "python":
        return []
    rule = f"needs a row of labels for each example, and data of kind {job.data.kind} have one label"
    return [Problem("loss.kind", "ctc", rule, "use data of kind python, or cross_entropy")]


def _check_omitted(job: JobConfig) -> list[Problem]:
    classes = job.data.omit_classes
    if len(set(classes)) == len(classes):
        return []
    return [Problem("data.omit_classes", classes, "names a class twice", f"use {sorted(set(classes))}")]


def _check_metrics(job: JobConfig) -> list[Problem]:
    problems = [
        Problem(f"evaluation.metrics.{index}", metric, "is listed twice", "keep one of them")
        for index, metric in enumerate(job.evaluation.metrics)
        if metric in job.evaluation.metrics[:index]
    ]
    num_classes = getattr(job.data, "num_classes", None) or getattr(job.model, "num_classes", None)
    if num_classes is not None and num_classes < 5 and "top5_accuracy" in job.evaluation.metrics:
        index = job.evaluation.metrics.index("top5_accuracy")
        rule = f"is always 1 with {num_classes} classes; it needs at least 5"
        problems.append(Problem(f"evaluation.metrics.{index}", "top5_accuracy", rule, "leave it out"))
    return problems


def _check_optimizer(job: JobConfig) -> list[Problem]:
    if job.optimizer.kind == "sgd" and job.optimizer.nesterov and job.optimizer.momentum == 0:
        rule = "needs momentum, and optimizer.momentum is 0"
        return [Problem("optimizer.nesterov", True, rule, "set momentum: 0.9 or nesterov: false")]
    return []


def _check_schedule(job: JobConfig) -> list[Problem]:
    schedule, steps = job.optimizer.schedule, job.budget.steps
    problems = _check_decay("optimizer.schedule", schedule)
    if steps is not None and schedule.warmup_steps >= steps:
        rule, key = f"never ends: budget.steps is {steps}", "optimizer.schedule.warmup_steps"
        problems.append(Problem(key, schedule.warmup_steps, rule, f"use at most {steps - 1}"))
    return problems


def _check_decay(key: str, schedule: ScheduleConfig) -> list[Problem]:
    problems = []
    if schedule.kind == "step" and not schedule.milestones:
        problems.append(Problem(f"{key}.milestones", [], "needs an entry for kind: step", "use e.g. [0.5, 0.75]"))
    if schedule.milestones != sorted(set(schedule.milestones)):
        ordered = sorted(set(schedule.milestones))
        problems.append(Problem(f"{key}.milestones", schedule.milestones, "must rise", f"use {ordered}"))
    return problems + _without_effect(key, schedule)


def _without_effect(key: str, schedule: ScheduleConfig) -> list[Problem]:
    """Keys that the schedule's kind does not read; a value there is a mistake that nobody would notice."""
    readers = {"milestones": ("step",), "gamma": ("step",), "final_factor": ("cosine", "linear")}
    return [
        Problem(
            f"{key}.{name}",
            getattr(schedule, name),
            f"has no effect with kind: {schedule.kind}",
            f"leave it out or use kind: {' or '.join(kinds)}",
        )
        for name, kinds in readers.items()
        if schedule.kind not in kinds and getattr(schedule, name) != getattr(ScheduleConfig(), name)
    ]


_LOW_ONLY = ("master_weights", "fp32_accumulation")
_DYNAMIC_ONLY = ("initial_scale", "scale_window", "hysteresis", "min_scale", "at_min_scale")
_FP16_ONLY = ("loss_scale", *_DYNAMIC_ONLY, "underflow_every")


def _check_precision(job: JobConfig) -> list[Problem]:
    precision = job.precision
    problems = []
    if not precision.is_low:
        rule = f"acts on bf16 and fp16 only, and precision.dtype is {precision.dtype}"
        problems += _unread(precision, "precision", _LOW_ONLY, rule, "dtype: bf16")
    if precision.dtype != "fp16":
        rule = f"acts on fp16 only, and precision.dtype is {precision.dtype}"
        return problems + _unread(precision, "precision", _FP16_ONLY, rule, "dtype: fp16")
    problems += _check_underflow(job)
    if precision.loss_scale != "dynamic":
        rule = f"acts on a dynamic scale only, and precision.loss_scale is {precision.loss_scale:g}"
        return problems + _unread(precision, "precision", _DYNAMIC_ONLY, rule, "loss_scale: dynamic")
    return problems + _check_dynamic_scale(job)


def _check_underflow(job: JobConfig) -> list[Problem]:
    every, parallel = job.precision.underflow_every, job.parallel
    parts = [name for name in ("pipeline", "tensor") if getattr(parallel, name) > 1]
    if not every or not parts:
        return []
    rule = f"runs the whole model on every rank, and parallel.{parts[0]} is {getattr(parallel, parts[0])}"
    return [Problem("precision.underflow_every", every, rule, f"leave it out or use {parts[0]}: 1")]


def _check_dynamic_scale(job: JobConfig) -> list[Problem]:
    precision, problems = job.precision, []
    if precision.at_min_scale == "back_off" and job.budget.checkpoint_every == 0:
        rule = "goes back to a checkpoint, and budget.checkpoint_every: 0 saves none before the end"
        remedy = "set budget.checkpoint_every or use stop or hold"
        problems.append(Problem("precision.at_min_scale", "back_off", rule, remedy))
    initial, minimum = precision.initial_scale, precision.min_scale
    if not (1 <= initial <= 2**_MAX_SCALE_POWER and math.log2(initial).is_integer()):
        power = 2 ** min(max(round(math.log2(initial)), 0), _MAX_SCALE_POWER)
        rule = f"must be a power of two from 1 to 2**{_MAX_SCALE_POWER}"
        problems.append(Problem("precision.initial_scale", initial, rule, f"use {power}"))
    if minimum < 1 or not minimum.is_integer():
        nearest = max(round(minimum), 1)
        problems.append(Problem("precision.min_scale", minimum, "must be a whole number, at least 1", f"use {nearest}"))
    if minimum > initial:
        rule = f"is above precision.initial_scale: {initial:g}"
        problems.append(Problem("precision.min_scale", minimum, rule, f"use at most {initial:g}"))
    return problems


def _check_pipeline(job: JobConfig) -> list[Problem]:
    parallel = job.parallel
    if parallel.pipeline == 1:
        return _unread(
            job.parallel, "parallel", ("stages",), "acts with stages only; parallel.pipeline is 1", "pipeline: 2"
        )
    problems = []
    if parallel.zero > 1:
        rule = f"shards more than the optimizer's state, which parallel.pipeline: {parallel.pipeline} cannot have"
        problems.append(Problem("parallel.zero", parallel.zero, rule, "use zero: 1"))
    if isinstance(parallel.stages, list):
        problems += _check_stages(parallel.stages, parallel.pipeline)
    return problems


def _check_stages(stages: list[int], pipeline: int) -> list[Problem]:
    if len(stages) != pipeline - 1:
        rule = f"names {len(stages)} first layers, and all of {pipeline} stages but the first need one"
        return [Problem("parallel.stages", stages, rule, f"name {pipeline - 1} or use pipeline: {len(stages) + 1}")]
    if stages != sorted(set(stages)):
        return [Problem("parallel.stages", stages, "must rise", f"use {sorted(set(stages))}")]
    return []


def _check_tensor(job: JobConfig) -> list[Problem]:
    if job.parallel.tensor > 1:
        return _check_blocks(job)
    return _unread(
        job.parallel, "parallel", ("split",), "acts with tensor ranks only; parallel.tensor is 1", "tensor: 2"
    )


def _check_blocks(job: JobConfig) -> list[Problem]:
    if job.parallel.zero < 3 or "image_blocks" not in job.parallel.split.values():
        return []
    rule = "fetches a layer's parameters when its tensors come, and image blocks (parallel.split) are not tensors to it"
    return [Problem("parallel.zero", 3, rule, "use zero: 2")]


def _check_offload(job: JobConfig) -> list[Problem]:
    parallel = job.parallel
    if parallel.offload != "none" and parallel.zero == 0:
        rule = "needs ZeRO, which owns the state that moves to the host; parallel.zero is 0"
        return [Problem("parallel.offload", parallel.offload, rule, "use zero: 1 or offload: none")]
    return []


def _check_gpu_share(job: JobConfig) -> list[Problem]:
    parallel = job.parallel
    ranks = parallel.workers * parallel.pipeline * parallel.tensor
    if parallel.device == "cpu":
        rule = "is a share of a GPU, and parallel.device is cpu"
        return _unread(parallel, "parallel", ("gpus_per_worker",), rule, "device: auto")
    if parallel.gpus_per_worker < 1 and ranks > 1:
        rule = f"would put several of the job's {ranks} ranks on one GPU, which NCCL refuses"
        return [Problem("parallel.gpus_per_worker", parallel.gpus_per_worker, rule, "use 1, or one rank")]
    return []


_SERVER_KEYS = ("shards", "n_fetch", "n_push", "max_staleness", "warm_start_steps")
# What the parameter server does without: key, the value that means "without", why.
_NOT_ON_A_SERVER: tuple[tuple[str, Any, str], ...] = (
    ("parallel.zero", 0, "shards optimizer state over workers, and the server has it"),
    ("parallel.offload", "none", "moves optimizer state to the host, and the server has it"),
    ("parallel.pipeline", 1, "joins ranks in step, and workers of a parameter server run on their own"),
    ("parallel.tensor", 1, "joins ranks in step, and workers of a parameter server run on their own"),
    ("parallel.micro_batch", None, "cuts a step into parts, and a worker's mini-batch is one"),
    ("data.loader_processes", 0, "prepares batches ahead, and a worker learns which comes next when it asks"),
    ("precision.master_weights", True, "rounds the weights of a synchronous optimizer"),
)


def _check_parameter_server(job: JobConfig) -> list[Problem]:
    if job.parallel.mode != "parameter_server":
        return _unread(
            job.parallel, "parallel", _SERVER_KEYS, "acts on a parameter server only", "mode: parameter_server"
        )
    problems = []
    for key, without, rule in _NOT_ON_A_SERVER:
        section, _, name = key.partition(".")
        value = getattr(getattr(job, section), name)
        if value != without:
            remedy = f"use {name}: {_yaml(without)} or mode: synchronous"
            problems.append(Problem(key, value, f"{rule} (parallel.mode: parameter_server)", remedy))
    if job.precision.dtype == "fp16":
        rule = "needs one loss scale, and workers of a parameter server run on their own"
        problems.append(Problem("precision.dtype", "fp16", rule, "use bf16, fp32 or mode: synchronous"))
    steps, warm = job.budget.steps, job.parallel.warm_start_steps
    if steps is not None and warm >= steps:
        rule = f"never ends: budget.steps is {steps}"
        problems.append(Problem("parallel.warm_start_steps", warm, rule, f"use at most {steps - 1}"))
    return problems


def _unread(given: Section, key: str, names: tuple[str, ...], rule: str, instead: str) -> list[Problem]:
    """Keys of a section that were given and that nothing will read; a value there is a mistake that nobody would
    notice."""
    fields = type(given).model_fields
    return [
        Problem(f"{key}.{name}", getattr(given, name), rule, f"leave it out or use {instead}")
        for name in names
        if getattr(given, name) != fields[name].get_default(call_default_factory=True)
    ]


def _yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _check_budget(job: JobConfig) -> list[Problem]:
    budget = job.budget
    if budget.steps is None and budget.epochs is None:
        return [Problem("budget", None, "names neither steps nor epochs", "give one of them, e.g. steps: 1000")]
    if budget.steps is not None and budget.epochs is not None:
        rule = f"is given beside budget.steps: {budget.steps}, and only one of them can hold"
        return [Problem("budget.epochs", budget.epochs, rule, "leave one of them out")]
    return []


def _check_dsd(job: JobConfig) -> list[Problem]:
    if job.dsd is None:
        return []
    problems = [] if job.dsd.schedule is None else _check_decay("dsd.schedule", job.dsd.schedule)
    for index, round_ in enumerate(job.dsd.rounds):
        key = f"dsd.rounds.{index}"
        problems += _check_length(key, round_, "sparse")
        problems += _check_length(key, round_, "redense")
        problems += _check_sparsity(key, round_)
    return [*problems, *_check_lr_factor(job.dsd, "sparse"), *_check_lr_factor(job.dsd, "redense")]


def _check_lr_factor(dsd: DSDConfig, kind: str) -> list[Problem]:
    """The factor for all rounds must be read by one of them."""
    name = f"{kind}_lr_factor"
    given = getattr(dsd, name)
    readers = [
        round_ for round_ in dsd.rounds if getattr(round_, name) is None and getattr(round_, f"{kind}_steps") != 0
    ]
    if readers or given == DSDConfig.model_fields[name].default:
        return []
    rule = f"has no effect: every round has its own or no {kind} phase"
    return [Problem(f"dsd.{name}", given, rule, "leave it out")]


def _check_length(key: str, round_: RoundConfig, kind: str) -> list[Problem]:
    steps, epochs = getattr(round_, f"{kind}_steps"), getattr(round_, f"{kind}_epochs")
    if steps is None and epochs is None:
        none = ", or 0 to end the round sparse" if kind == "redense" else ""
        rule = f"is missing: the {kind} phase needs a length"
        return [Problem(f"{key}.{kind}_steps", None, rule, f"give it, or {kind}_epochs{none}")]
    if steps is not None and epochs is not None:
        rule = f"is given beside {kind}_steps: {steps}, and only one of them can hold"
        return [Problem(f"{key}.{kind}_epochs", epochs, rule, "leave one of them out")]
    factor = getattr(round_, f"{kind}_lr_factor")
    if steps == 0 and factor is not None:
        rule = f"has no effect with {kind}_steps: 0"
        return [Problem(f"{key}.{kind}_lr_factor", factor, rule, "leave it out")]
    return []


def _check_sparsity(key: str, round_: RoundConfig) -> list[Problem]:
    if ":" in round_.structure:
        return _check_groups(key, round_)
    if round_.sparsity is None:
        rule = f"is missing, and structure: {round_.structure} does not decide it"
        return [Problem(f"{key}.sparsity", None, rule, "give it, e.g. sparsity: 0.3")]
    if round_.sparsity == {}:
        return [Problem(f"{key}.sparsity", {}, "names no layer", "give one share for all, or some patterns")]
    if not any(_shares(round_)):
        return [
            Problem(f"{key}.{name}", getattr(round_, name), "has no effect: with sparsity 0 nothing is pruned", remedy)
            for name, remedy in (("structure", "use structure: weights"), ("criterion", "use criterion: magnitude"))
            if getattr(round_, name) != getattr(RoundConfig(), name)
        ]
    return []


def _shares(round_: RoundConfig) -> Iterable[float | None]:
    return round_.sparsity.values() if isinstance(round_.sparsity, dict) else [round_.sparsity]


def _check_groups(key: str, round_: RoundConfig) -> list[Problem]:
    problems = []
    if round_.sparsity is not None:
        rule = f"is given beside structure: {round_.structure}, which decides it"
        problems.append(Problem(f"{key}.sparsity", round_.sparsity, rule, "leave one of them out"))
    kept, group = map(int, round_.structure.split(":"))
    if kept >= group:
        rule = f"keeps {kept} of every {group} weights, which prunes nothing"
        problems.append(Problem(f"{key}.structure", round_.structure, rule, 'use a smaller N, e.g. "2:4"'))
    return problems


def _check_labels(job: JobConfig) -> list[Problem]:
    """What of a distillation needs labels where not every example has one."""
    distill, share = job.distill, job.data.labels
    if distill is None or share == 1:
        return []
    problems = []
    if distill.loss == "decoupled":
        rule = f"needs the label of every example, and data.labels is {share:g}"
        problems.append(Problem("distill.loss", "decoupled", rule, "use loss: soft_targets or labels: 1"))
    if job.loss.kind == "python" and distill.alpha != 1:
        rule = f"is not told which examples have no label, and data.labels is {share:g}"
        problems.append(Problem("loss.kind", "python", rule, "use cross_entropy, or distill.alpha: 1"))
    if share == 0 and distill.alpha != 1:
        shown = None if isinstance(distill.alpha, RampConfig) else distill.alpha
        rule = "gives weight to labels, and data.labels: 0 leaves none"
        problems.append(Problem("distill.alpha", shown, rule, "use alpha: 1 or more labels"))
    return problems


def _check_distill(job: JobConfig) -> list[Problem]:
    if job.distill is None:
        return []
    return [problem for rule in _DISTILL_RULES for problem in rule(job, job.distill)]


def _check_distill_loss(job: JobConfig, distill: DistillConfig) -> list[Problem]:
    problems = []
    if job.loss.kind == "mse":
        rule = "has no classes, whose probabilities a teacher could soften"
        problems.append(Problem("loss.kind", "mse", rule, "use cross_entropy, ctc or python, or leave distill out"))
    if job.loss.kind == "ctc" and distill.loss == "decoupled":
        rule = "needs the class of every frame, which targets of loss.kind: ctc do not have"
        problems.append(Problem("distill.loss", "decoupled", rule, "use loss: soft_targets"))
    if distill.loss != "decoupled":
        rule = "weighs a part of decoupled distillation only"
        problems += _unread(distill, "distill", ("non_target_weight",), rule, "loss: decoupled")
    return problems


def _check_ramps(job: JobConfig, distill: DistillConfig) -> list[Problem]:
    problems = []
    for name in ("temperature", "alpha"):
        value = getattr(distill, name)
        if isinstance(value, RampConfig) and value.start == value.end:
            rule = f"is no ramp: it starts and ends at {value.start:g}"
            problems.append(Problem(f"distill.{name}", None, rule, f"use {name}: {value.start:g}"))
    for end in ("start", "end"):
        if isinstance(distill.temperature, RampConfig) and getattr(distill.temperature, end) == 0:
            problems.append(Problem(f"distill.temperature.{end}", 0.0, "must be more than 0", "use 1"))
        if isinstance(distill.alpha, RampConfig) and getattr(distill.alpha, end) > 1:
            share = getattr(distill.alpha, end)
            problems.append(Problem(f"distill.alpha.{end}", share, "must be at most 1", "use 1"))
    return problems


def _check_alpha(job: JobConfig, distill: DistillConfig) -> list[Problem]:
    if distill.alpha != 0:
        return []
    if not distill.features:
        return [
            Problem("distill.alpha", distill.alpha, "teaches nothing without features", "use more, e.g. alpha: 0.9")
        ]
    rule = "acts on the soft targets, and distill.alpha is 0"
    return _unread(distill, "distill", ("temperature", "standardize", "loss"), rule, "alpha: 0.9")


def _check_features(job: JobConfig, distill: DistillConfig) -> list[Problem]:
    """The loss and the weight for all pairs must be read by one of them."""
    problems = []
    for name in ("feature_loss", "feature_weight"):
        own = name.removeprefix("feature_")
        if distill.features and (distill.features == "auto" or any(getattr(p, own) is None for p in distill.features)):
            continue
        rule = f"has no effect: every pair has its own {own}" if distill.features else "acts on features only"
        problems += _unread(distill, "distill", (name,), rule, "features: auto")
    return problems


def _check_cache(job: JobConfig, distill: DistillConfig) -> list[Problem]:
    random = has_random_augment(job.data)
    problems = []
    if distill.views is not None and not random:
        rule = "acts on random augmentation only, and data.augment has none"
        problems.append(Problem("distill.views", distill.views, rule, "leave it out"))
    if distill.cache == "none":
        return problems + _unread(distill, "distill", ("top_k",), "acts on a cache only", "cache: logits")
    if random and distill.views is None:
        rule = "holds what the teacher says of an example once, and data.augment shows another one in every epoch"
        problems.append(Problem("distill.cache", distill.cache, rule, "set views: 4 or use cache: none"))
    if (distill.cache == "features") != bool(distill.features):
        rule = "lacks the features that are taught" if distill.features else "has no features to hold"
        remedy = "use cache: features" if distill.features else "use cache: logits"
        problems.append(Problem("distill.cache", distill.cache, rule, remedy))
    rule = f"acts on a live teacher only, and distill.cache is {distill.cache}"
    return problems + _unread(distill, "distill", ("placement",), rule, "cache: none")


def _check_teacher_batch(job: JobConfig, distill: DistillConfig) -> list[Problem]:
    rows, most = distill.teacher_batch, max(job.data.global_batch // job.parallel.workers, 1)
    if rows is None or rows <= most or distill.cache != "none":
        return []
    rule = f"is more than the {most} examples that a rank has in a step: the rest of every pass would be copies"
    return [Problem("distill.teacher_batch", rows, rule, f"use at most {most}")]


def _check_distill_mode(job: JobConfig, distill: DistillConfig) -> list[Problem]:
    if job.parallel.mode != "parameter_server":
        return []
    problems = []
    if distill.features:
        rule = "trains connectors, and a parameter server holds the parameters of the model alone"
        remedy = "use parallel.mode: synchronous or soft targets only"
        problems.append(Problem("distill.features", None, rule, remedy))
    if distill.placement == "sharded":
        rule = "joins ranks in step, and workers of a parameter server run on their own"
        problems.append(Problem("distill.placement", "sharded", rule, "use placement: replicated"))
    return problems


_DISTILL_RULES: tuple[Callable[[JobConfig, DistillConfig], list[Problem]], ...] = (
    _check_distill_loss,
    _check_ramps,
    _check_alpha,
    _check_features,
    _check_cache,
    _check_teacher_batch,
    _check_distill_mode,
)

_RULES: tuple[Callable[[JobConfig], list[Problem]], ...] = (
    _check_augment_order,
    _check_global_batch,
    _check_omitted,
    _check_loss,
    _check_ctc,
    _check_metrics,
    _check_optimizer,
    _check_schedule,
    _check_precision,
    _check_pipeline,
    _check_tensor,
    _check_offload,
    _check_gpu_share,
    _check_parameter_server,
    _check_budget,
    _check_labels,
    _check_distill,
    _check_dsd,
)
