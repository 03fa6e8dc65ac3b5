"""What one rank holds while it trains: bytes, by what they are for.

In a mesh of pipeline stages and tensor ranks a rank holds its part of the model, and ZeRO shards that over the
replicas. The formulas are those of the ZeRO paper (Rajbhandari et al. 2020, section 3) with what DeepSpeed 0.19 really
does, measured tensor by tensor: with ZeRO it keeps a separate master partition in fp32, too; stage 2 keeps every
gradient whole that reaches into a rank's partition; stage 3 keeps small parameters on every rank. Not counted: the
interpreter and its libraries, workspaces of kernels, and copies that live within one call, such as the fp32 copy of the
gradients in a step.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from temper.config.schema import JobConfig
from temper.plan.deepspeed_config import bucket_elements, zero_stage
from temper.plan.distill import DistillPlan
from temper.plan.dsd import resolve_layers
from temper.plan.mesh import BatchPlan, MeshPlan
from temper.plan.probe import ModelFacts, Weights, join_weights

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
"""Of one value in the arithmetic of forward and backward."""

_FP32 = 4
# `stage3_param_persistence_threshold`: stage 3 leaves smaller parameters whole on every rank.
_PERSISTENT = 100_000


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the rank that holds most. With offload, `host_…` lies in the node's memory beside each rank.

    - `parameters`: weights as forward uses them, and the model's buffers
    - `gradients`: at the end of the backward pass
    - `optimizer_state`: fp32 masters, where they are separate from the parameters, and moments
    - `activations`: of one micro-batch; in a pipeline of all that are under way in the stage, with the inputs that it
      received. Tensor ranks are counted as if each kept the activations of the unsplit layers, which is an upper bound.
    - `buckets`: buffers in which gradients are gathered to be reduced
    - `masks`: in sparse phases; a byte for each element of the masters, also of layers that stay dense, since ZeRO
      flattens them together
    - `teacher`: the weights of live teachers, replicated or sharded, and the logits and features of a micro-batch; in a
      pipeline of all micro-batches
    - `server`: one shard of a parameter server: its part of the weights, of the masks and of the optimizer's state
    """

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    buckets: int
    host_gradients: int
    host_optimizer_state: int
    server: int = 0
    masks: int = 0
    host_masks: int = 0
    teacher: int = 0

    @property
    def device_bytes(self) -> int:
        """All that lies on the rank's device."""
        trained = self.parameters + self.gradients + self.optimizer_state + self.activations + self.buckets
        return trained + self.masks + self.teacher

    @property
    def host_bytes(self) -> int:
        """All that offload puts into host memory."""
        return self.host_gradients + self.host_optimizer_state + self.host_masks


@dataclass(frozen=True)
class _Part:
    """What of the model lies on the ranks of one pipeline stage; activations are of all micro-batches under way."""

    weights: Weights
    activation_bytes_per_example: int


@dataclass(frozen=True)
class _Shares:
    """Elements on one rank: `partition` of masters and moments, `touched` in parameters that reach into it."""

    partition: int
    touched: int
    persistent: int


def plan_memory(
    job: JobConfig, model: ModelFacts, mesh: MeshPlan, batch: BatchPlan, distill: DistillPlan | None = None
) -> MemoryPlan:
    """Memory of the rank that holds most, for the job's mesh, ZeRO stage, precision, optimizer and offload."""
    if job.parallel.mode == "parameter_server":
        worker = _worker_and_server(job, model, batch)
        return worker if distill is None else replace(worker, teacher=_teacher_memory(job, distill, mesh, batch))
    parts = _parts(model, mesh, batch)
    masked = _is_masked(job, model)
    ranks = (_rank_memory(job, part, mesh, batch, masked) for part in parts)
    largest = max(ranks, key=lambda memory: memory.device_bytes)
    return largest if distill is None else replace(largest, teacher=_teacher_memory(job, distill, mesh, batch))


def _teacher_memory(job: JobConfig, plan: DistillPlan, mesh: MeshPlan, batch: BatchPlan) -> int:
    assert job.distill is not None, "the plan is that of its section"
    said = sum(math.prod(pair.teacher_shape) for pair in plan.pairs) + math.prod(plan.facts[0].output_shape or ())
    signals = BYTES[job.distill.signals] * said * (batch.rank_batch if mesh.pipeline > 1 else batch.micro_batch)
    if plan.cache is not None:
        return signals
    weights = 0
    for teacher, facts in zip(plan.teachers, plan.facts, strict=True):
        whole = BYTES[teacher.precision] * facts.num_parameters
        weights += facts.buffer_bytes + (-(-whole // mesh.world_size) if job.distill.placement == "sharded" else whole)
    return weights + signals


def stage_weights(model: ModelFacts, mesh: MeshPlan) -> list[Weights]:
    """What the first tensor rank of each pipeline stage holds, before ZeRO shards it."""
    if not mesh.cut:
        return [model.part or model.weights]
    layers = [layer.part or layer.weights for layer in model.layers]
    return [join_weights(layers[first:end]) for first, end in itertools.pairwise([*mesh.cut, len(layers)])]


def _parts(model: ModelFacts, mesh: MeshPlan, batch: BatchPlan) -> list[_Part]:
    if not mesh.cut:
        return [_Part(weights, model.activation_bytes_per_example) for weights in stage_weights(model, mesh)]
    layers, parts = model.layers, []
    bounds = itertools.pairwise([*mesh.cut, len(layers)])
    for stage, ((first, end), weights) in enumerate(zip(bounds, stage_weights(model, mesh), strict=True)):
        received = layers[first - 1].output_bytes if first else 0
        kept = received + sum(layer.activation_bytes for layer in layers[first:end])
        # Under 1F1B a stage starts no more micro-batches than there are stages from it to the end.
        under_way = min(mesh.pipeline - stage, batch.accumulation)
        parts.append(_Part(weights, under_way * kept))
    return parts


def _is_masked(job: JobConfig, model: ModelFacts) -> bool:
    dsd = job.dsd
    return dsd is not None and any(resolve_layers(dsd, round_, model.prunable) for round_ in dsd.rounds)


def _rank_memory(job: JobConfig, part: _Part, mesh: MeshPlan, batch: BatchPlan, masked: bool) -> MemoryPlan:
    zero, width, weights = zero_stage(job), BYTES[job.precision.dtype], part.weights
    shares = _shares(zero, weights.sizes, mesh.data)
    offload = job.parallel.offload == "cpu"
    state = _optimizer_state(job, shares)
    gradients = _gradients(zero, width, weights, shares)
    masks = shares.partition if masked else 0
    return MemoryPlan(
        parameters=_parameters(zero, width, weights, mesh, shares),
        gradients=_staged_gradients(zero, width, weights) if offload else gradients,
        optimizer_state=0 if offload else state,
        activations=part.activation_bytes_per_example * batch.micro_batch * width // _FP32,
        buckets=_buckets(zero, width, weights, mesh),
        host_gradients=_host_gradients(zero, width, weights, batch, shares) if offload else 0,
        host_optimizer_state=state if offload else 0,
        masks=0 if offload else masks,
        host_masks=masks if offload else 0,
    )


def _worker_and_server(job: JobConfig, model: ModelFacts, batch: BatchPlan) -> MemoryPlan:
    """A worker has its own fp32 weights and gradients, rounded ones beside them in bf16, and a second set of gradients
    where it adds them up between pushes (Dean et al. 2012, algorithm 1.1); the optimizer's state is the server's. Masks
    are on both sides."""
    width, shard = BYTES[job.precision.dtype], -(-model.num_trainable // job.parallel.shards)
    rounded = width if job.precision.is_low else 0
    accrued = _FP32 if job.parallel.n_push > 1 else 0
    masked = _is_masked(job, model)
    return MemoryPlan(
        parameters=(_FP32 + rounded) * model.num_parameters + model.buffer_bytes,
        gradients=(_FP32 + rounded + accrued) * model.num_trainable,
        optimizer_state=0,
        activations=model.activation_bytes_per_example * batch.micro_batch * width // _FP32,
        buckets=0,
        host_gradients=0,
        host_optimizer_state=0,
        server=(_FP32 * (1 + _num_moments(job)) + masked) * shard,
        masks=masked * model.num_trainable,
    )


def _shares(zero: int, sizes: Sequence[int], ranks: int) -> _Shares:
    total = sum(sizes)
    if zero == 0:
        return _Shares(total, total, total)
    if zero == 3:
        partition = sum(-(-size // ranks) for size in sizes)
        return _Shares(partition, partition, sum(size for size in sizes if size <= _PERSISTENT))
    # Stages 1 and 2 cut one flat vector, padded to an even number of elements for each rank.
    partition = -(-total // (2 * ranks)) * 2
    return _Shares(partition, _touched(sizes, partition, ranks), 0)


def _touched(sizes: Sequence[int], partition: int, ranks: int) -> int:
    """Elements of all parameters that reach into a rank's partition, on the rank where they are most."""
    ends = list(itertools.accumulate(sizes))
    largest = 0
    for rank in range(ranks):
        first, last = rank * partition, min((rank + 1) * partition, ends[-1] if ends else 0)
        if first >= last:
            break
        low = bisect.bisect_right(ends, first)
        high = bisect.bisect_left(ends, last)
        largest = max(largest, ends[high] - (ends[low - 1] if low else 0))
    return largest


def _parameters(zero: int, width: int, weights: Weights, mesh: MeshPlan, shares: _Shares) -> int:
    if zero < 3:
        return width * weights.num_parameters + weights.buffer_bytes
    frozen = weights.num_parameters - sum(weights.sizes)
    return width * (shares.partition + shares.persistent - (-frozen // mesh.data)) + weights.buffer_bytes


def _optimizer_state(job: JobConfig, shares: _Shares) -> int:
    separate_masters = zero_stage(job) > 0
    return _FP32 * shares.partition * (separate_masters + _num_moments(job))


def _num_moments(job: JobConfig) -> int:
    """fp32 values that the optimizer keeps for each parameter."""
    if job.optimizer.kind == "sgd":
        return 1 if job.optimizer.momentum > 0 else 0
    return {"adam": 2, "adamw": 2, "adagrad": 1}[job.optimizer.kind]


def _gradients(zero: int, width: int, weights: Weights, shares: _Shares) -> int:
    return width * (shares.touched if zero >= 2 else sum(weights.sizes))


def _staged_gradients(zero: int, width: int, weights: Weights) -> int:
    """What of the gradients stays on the device when they move to the host as they are made."""
    if zero == 3:
        return 0
    staging = width * max(weights.sizes, default=0)
    # Stage 1 has all gradients on the device at the end of the backward pass, and only then moves anything.
    return staging + (width * sum(weights.sizes) if zero == 1 else 0)


def _host_gradients(zero: int, width: int, weights: Weights, batch: BatchPlan, shares: _Shares) -> int:
    masters_gradient = _FP32 * shares.partition
    if zero == 3:
        return masters_gradient + width * shares.partition
    staging = width * (shares.partition + max(weights.sizes, default=0))
    accumulated = width * shares.touched if zero == 2 and batch.accumulation > 1 else 0
    return masters_gradient + staging + accumulated


def _buckets(zero: int, width: int, weights: Weights, mesh: MeshPlan) -> int:
    if zero == 0 and mesh.data == 1:
        return 0
    # Stages 1 and 2 take turns between two where reduction overlaps with the backward pass, which it does on a GPU.
    number = 2 if zero in (1, 2) and mesh.device == "cuda" else 1
    return width * bucket_elements(sum(weights.sizes)) * number
