"""A live teacher: one trained network or several, frozen, asked for logits and features as the student trains.

What it says of an example depends on that example alone: every forward pass has the same number of examples, and what
else the process has set up (a student's own precision, say) does not act in it. So a cache holds the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from temper.checkpoint import check_checkpoint
from temper.errors import CheckpointError, JobError, RunError
from temper.files import read_json
from temper.models.build import build_model
from temper.models.weights import (
    CheckpointWeights,
    SafetensorsWeights,
    Weights,
    check_weights,
    load_weights,
    parameters_on_meta,
)
from temper.outputs import logits_of
from temper.parallel.batch_norm import apply_global_batch_norm
from temper.parallel.collectives import gather_from_group
from temper.parallel.groups import Group, MeshGroups
from temper.plan.distill import DistillPlan, FeaturePair, Teacher
from temper.plan.facts import DataFacts
from temper.precision.accumulation import arithmetic
from temper.precision.device import apply_product_precision
from temper.remote_store import fetch_phase
from temper.run_folder import PHASE_MANIFEST
from temper.targets import apply_target_folders
from temper.techniques.distill.signals import Signals

Forward = Callable[[Tensor], Any]
Shard = Callable[[nn.Module, Weights, torch.device], Forward]
"""Fills a model, whose parameters may be on the meta device, with this rank's share of its weights, and gives its
forward pass; see :func:`temper.engine.sharded.shard_module`."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_teacher(
    plan: DistillPlan,
    data: DataFacts,
    *,
    signals: Literal["fp16", "fp32"],
    device: torch.device,
    groups: MeshGroups | None = None,
    shard: Shard | None = None,
) -> LiveTeacher:
    """The teachers of `plan` with their weights, for a student on `data`; their `signals` are rounded to that type.

    The ranks of a replica share the passes out; without `groups` this rank computes all. `shard` shares each teacher's
    weights out over all ranks; without it every rank has them whole. Collective over all ranks where there are several.

    Raises:
        CheckpointError: weights are missing, damaged or of another model.
        JobError: a model cannot be built.
    """
    members = tuple(_build_member(teacher, data, device, shard) for teacher in plan.teachers)
    replica = Group() if groups is None else groups.replica
    return LiveTeacher(members, plan.pairs, plan.rows, _DTYPES[signals], device, replica)


class LiveTeacher:
    """See :func:`build_teacher`."""

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[FeaturePair],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        replica: Group,
    ) -> None:
        self.members = tuple(members)
        self._rows, self._dtype, self._device, self._replica = rows, dtype, device, replica
        total = sum(member.teacher.weight for member in members)
        self._weights = [member.teacher.weight / total for member in members]
        taps = [(members[pair.of].model, pair.teacher) for pair in pairs]
        self._taps = [_Tap(model.get_submodule(name), dtype) for model, name in taps]
        self._finite = _FiniteCheck(self._not_finite(), device)

    @torch.no_grad()
    def ask(self, inputs: Tensor) -> Signals:
        """What it says of `inputs` (examples, …), normalised as the student's: the weighted mean of the members' raw
        logits, and the features of the pairs, on its device.

        The ranks of a replica ask together, of the same inputs; where the teacher is sharded all ranks ask together, of
        equally many. Raises RunError where a signal is not finite; on a GPU, where looking means waiting, this may be
        noticed some calls later.
        """
        passes, ranks = inputs.split(self._rows), self._replica.size
        rounds = -(-len(passes) // ranks)
        # Ranks without a pass in the last round repeat the first one: all compute, and exchange, equally often.
        mine = [index if index < len(passes) else 0 for index in range(self._replica.rank, rounds * ranks, ranks)]
        said = [self._compute(passes[index]) for index in mine]
        whole = [self._exchanged(parts)[: len(inputs)] for parts in zip(*said, strict=True)]
        self._finite(whole)
        return Signals(whole[0], tuple(whole[1:]))

    def _compute(self, inputs: Tensor) -> list[Tensor]:
        """One pass: logits and features of `rows` examples."""
        inputs = inputs.to(self._device, non_blocking=True)
        if len(inputs) < self._rows:
            inputs = torch.cat([inputs, inputs[:1].expand(self._rows - len(inputs), *inputs.shape[1:])])
        with _alone(self._device):
            logits = [
                weight * member(inputs).float() for weight, member in zip(self._weights, self.members, strict=True)
            ]
        return [torch.stack(logits).sum(0).to(self._dtype), *(tap.take() for tap in self._taps)]

    def _exchanged(self, parts: Sequence[Tensor]) -> Tensor:
        """All passes in their order, from those of this rank: each `size`-th one."""
        own = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        size = self._replica.size
        if size == 1:
            return own
        ranks = gather_from_group(own, 0, [len(own)] * size, self._replica)
        return ranks.unflatten(0, (size, len(parts), self._rows)).transpose(0, 1).flatten(0, 2)

    def _not_finite(self) -> str:
        names = " + ".join(member.teacher.name for member in self.members)
        if self._dtype == torch.float16:
            return f"what teacher {names} says is not finite in fp16; write `distill.signals: fp32`"
        return f"what teacher {names} says is not finite; give it more `precision`, or use another one"


@dataclass(frozen=True)
class Member:
    """One network of the teacher. `scale` and `shift` (channels,) bring the student's inputs to its own normalisation,
    None where they are so already."""

    teacher: Teacher
    model: nn.Module
    forward: Forward
    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Raw logits of inputs on its device."""
        if not inputs.is_floating_point():
            return logits_of(self.forward(inputs))
        if self.scale is not None and self.shift is not None:
            channels = (-1,) + (1,) * (inputs.dim() - 2)
            inputs = inputs * self.scale.view(channels) + self.shift.view(channels)
        inputs = inputs.to(_DTYPES[self.teacher.precision])
        # As the engines lay images out.
        images = inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs
        return logits_of(self.forward(images))


# ------------------------------------------------------------------------------------------------------------- building


def _build_member(teacher: Teacher, data: DataFacts, device: torch.device, shard: Shard | None) -> Member:
    apply_target_folders([Path(folder) for folder in teacher.import_folders])
    dtype = _DTYPES[teacher.precision]
    classes = data.num_classes if teacher.num_classes is None else teacher.num_classes
    facts = replace(data, num_classes=classes)
    try:
        weights = _open_weights(teacher)
        if shard is None:
            model = build_model(teacher.model, facts, seed=0)
            load_weights(model, weights)
            forward: Forward = _frozen(model, dtype).to(device)
        else:
            model = _build_empty(teacher, facts)
            check_weights(model, weights)
            forward = shard(_frozen(model, dtype), weights, device)
    except CheckpointError as error:
        raise CheckpointError(f"teacher {teacher.name}: {error}") from error
    arithmetic(dtype, device, fp32_accumulation=True)
    return Member(teacher, model, forward, *_renormalisation(data, teacher, device))


def _build_empty(teacher: Teacher, facts: DataFacts) -> nn.Module:
    """The model without its parameters' values; code that looks at them gets them."""
    try:
        with parameters_on_meta():
            return build_model(teacher.model, facts, seed=0)
    except (RuntimeError, JobError):
        return build_model(teacher.model, facts, seed=0)


def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As a student in this precision computes: with the statistics of batch norms in fp32."""
    if dtype != torch.float32:
        apply_global_batch_norm(model, Group())
    return model.requires_grad_(False).eval().to(dtype)


def _open_weights(teacher: Teacher) -> Weights:
    if teacher.kind == "weights":
        return SafetensorsWeights(teacher.place)
    folder = teacher.place
    if teacher.kind == "phase":
        fetch_phase(folder)
        manifest = read_json(folder / PHASE_MANIFEST)
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{folder} is not a complete phase: it has no {PHASE_MANIFEST}")
        folder = folder / manifest["checkpoint"]
    problem = _problem(folder)
    if problem is not None:
        raise CheckpointError(problem)
    return CheckpointWeights(folder)


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None; each rank reads a part of it."""
    if not dist.is_initialized():
        return check_checkpoint(folder)
    size = dist.get_world_size()
    problems: list[str | None] = [None] * size
    dist.all_gather_object(problems, check_checkpoint(folder, dist.get_rank(), size))
    return next((problem for problem in problems if problem), None)


def _renormalisation(
    data: DataFacts, teacher: Teacher, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """From x = (value − mean) / std with the student's mean and std to the same with the teacher's: scale and shift."""
    if teacher.mean is None or teacher.std is None or (data.mean, data.std) == (teacher.mean, teacher.std):
        return None, None
    # Without a mean inputs are used as they are.
    channels = len(data.mean or teacher.mean)
    plain = (0.0,) * channels, (1.0,) * channels
    (mean, std), (own_mean, own_std) = (
        (torch.tensor(values, dtype=torch.float64) for values in (pair if pair[0] else plain))
        for pair in ((data.mean, data.std), (teacher.mean, teacher.std))
    )
    return (std / own_std).float().to(device), ((mean - own_mean) / own_std).float().to(device)


# ------------------------------------------------------------------------------------------------------------ computing


class _Tap:
    """Keeps what a module gives, rounded: a copy, which an in-place operation after the module leaves alone."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: Tensor | None = None
        self._kind = type(module).__name__
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._kept = output.detach().to(self._dtype, copy=True, memory_format=torch.contiguous_format)

    def take(self) -> Tensor:
        """Of the last pass. Raises RunError where it did not call the module, as with an auxiliary classifier."""
        if self._kept is None:
            raise RunError(f"distill.features: a {self._kind} of the teacher is not called in evaluation; pair another")
        kept, self._kept = self._kept, None
        return kept


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Within it the process computes as if it had no student.

    DeepSpeed's ZeRO-3 replaces `linear`, for good, by a product and a sum that round differently. Attention has a fused
    path for inference that hooks, a tap's or those of sharding, would switch off. A student in tf32 sets the GPU's
    products to it.
    """
    products: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
    before, fast = [product.fp32_precision for product in products], torch.backends.mha.get_fastpath_enabled()
    apply_product_precision("fp32", device)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(nn.functional, "linear", torch._C._nn.linear):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if device.type == "cuda":
            for product, precision in zip(products, before, strict=True):
                product.fp32_precision = precision


class _FiniteCheck:
    """Raises RunError with `message` where a tensor is not finite: at once in the first call and on a CPU, on a GPU
    later, when it can be known without waiting."""

    def __init__(self, message: str, device: torch.device) -> None:
        self._message, self._on_gpu = message, device.type == "cuda"
        self._finite: Tensor | None = None
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        # Extremes are not finite where any value is not, and take a thirtieth of the time of `isfinite`.
        extremes = torch.stack([value.float() for tensor in tensors for value in tensor.aminmax()])
        finite = extremes.isfinite().all()
        if self._finite is None or not self._on_gpu:
            self._finite = finite
            self._require(finite)
            return
        self._finite = self._finite & finite
        if self._on_its_way is not None and self._on_its_way[1].query():
            self._require(self._on_its_way[0])
            self._on_its_way = None
        if self._on_its_way is None:
            known, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            known.copy_(self._finite, non_blocking=True)
            event.record()
            self._on_its_way = known, event

    def _require(self, finite: Tensor) -> None:
        if not finite:
            raise RunError(self._message)
