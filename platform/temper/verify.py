"""Proof that a topology computes what one process computes: traces of both, compared tensor by tensor.

A trace holds, for a few steps of the job, what every module gave, the gradient that the optimizer stepped with, and the
master weights after it: whole, whatever the topology, because it is written as checkpoints are. Two traces that differ
are searched in the order in which a step computes, so that the first difference names the layer at fault.

A sparse phase is traced as if it began with the initial weights. Those are the same bits on every topology, so the
masks must be, too; after steps of training, rounding may decide between two weights of nearly the same magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from temper import checkpoint
from temper.checkpoint import MASK, MASTER, CheckpointReader, Shard
from temper.data.batches import Batch
from temper.engine.base import EngineState, Technique
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.parallel.cut import cut_of
from temper.parallel.image_block import ImageBlock
from temper.plan.phases import PhasePlan
from temper.techniques.dsd.border import begin_phase

GRADIENT = "gradient"


@dataclass(frozen=True)
class Bounds:
    """Largest relative errors that rounding may make.

    `outputs`: of a module's sum and sum of squares; `loss`; `gradient`: norm of a tensor's error over its norm;
    `weights`: norm of a tensor's error over the norm of the way it has come since the start. A tensor whose norm is
    less than a tenth of its share of the whole is measured against that: the gradient of a bias before a batch
    norm is nothing but rounding. `noise`: elements whose gradient was less than this part of the model's mean square
    are left out of `weights`, because Adam makes a whole step out of a rounding error.
    """

    outputs: float
    loss: float
    gradient: float
    weights: float
    noise: float


BOUNDS = {
    "fp32": Bounds(outputs=1e-4, loss=1e-5, gradient=1e-4, weights=1e-3, noise=1e-4),
    "tf32": Bounds(outputs=1e-2, loss=1e-3, gradient=5e-2, weights=0.1, noise=1e-2),
    "fp16": Bounds(outputs=2e-2, loss=5e-3, gradient=5e-2, weights=0.1, noise=1e-2),
    "bf16": Bounds(outputs=0.1, loss=3e-2, gradient=0.25, weights=0.35, noise=5e-2),
}
"""By the arithmetic of the run; a number keeps 24 bits in fp32, 11 in fp16 and tf32, 8 in bf16."""

_LEAST_SHARE = 0.1


# ---------------------------------------------------------------------------------------------------------- tracing


def begin_at_once(engine: DeepSpeedEngine, phase: PhasePlan, folder: Path) -> None:
    """Begins a sparse phase with the weights that the engine has; `folder` takes them on the way. Collective."""
    start = checkpoint.checkpoint_folder(folder / "start", 0)
    checkpoint.write_shards(start, dist.get_rank(), engine.shards())
    dist.barrier()
    if dist.get_rank() == 0:
        state = {"step": 0, "engine": asdict(engine.state())}
        checkpoint.write_manifest(start, dist.get_world_size(), state, engine.shapes())
    dist.barrier()
    reader = begin_phase(start, phase)
    engine.load(reader, EngineState(**reader.state["engine"]))


def trace(
    engine: DeepSpeedEngine,
    model: nn.Module,
    batches: Iterable[Batch],
    folder: Path,
    *,
    lr_at: Callable[[int], float],
    seed: int,
    technique: Technique | None = None,
) -> None:
    """Trains on `batches` (this rank's parts) and writes into `folder` what each step did. Collective.

    `model` is what the engine was built from: its names are the trace's. Dropout is off, since what it drops depends on
    which rank draws.
    """
    tracer = _Tracer(engine, model)
    tracer.write(folder, 0, {})
    applied = 0
    with _NoDropout():
        for step, batch in enumerate(batches, start=1):
            targets = batch.targets if technique is None else technique.prepare(batch, applied)
            result = engine.step(batch.inputs, targets, lr=lr_at(applied), seed=seed)
            applied += int(result.applied)
            tracer.write(
                folder,
                step,
                {"loss": _mean_over_ranks(result.loss), "applied": result.applied, "loss_scale": result.loss_scale},
            )


def _mean_over_ranks(value: Tensor) -> float:
    summed = value.detach().double().clone()
    dist.all_reduce(summed)
    return float(summed) / dist.get_world_size()


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout):
            return args[0] if args else kwargs["input"]
        if "dropout_p" in kwargs:  # attention
            kwargs["dropout_p"] = 0.0
        return function(*args, **kwargs)


class _Tracer:
    """Listens to one rank's engine."""

    def __init__(self, engine: DeepSpeedEngine, model: nn.Module) -> None:
        self.engine = engine
        self.outputs: dict[str, list[float]] = {}
        self.gradients: dict[tuple[str, int], Tensor] = {}
        own = set(engine.module.modules())
        for name, module in model.named_modules():
            if name and module in own:
                module.register_forward_hook(self._listener(name))
        engine.optimizer.register_step_pre_hook(self._note_gradients)

    def _listener(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            # A part of an image counts as a part: over the tensor ranks the sums are those of the whole.
            part = output.block if isinstance(output, ImageBlock) else output
            if isinstance(part, Tensor) and part.is_floating_point():
                values = part.detach().double()
                found = [float(values.sum()), float(values.square().sum()), float(values.numel())]
                before = self.outputs.get(name, [0.0, 0.0, 0.0])
                self.outputs[name] = [old + new for old, new in zip(before, found, strict=True)]

        return note

    def _note_gradients(self, *_unused: Any) -> None:
        # ZeRO-3 steps its parameters in groups, and only those of the group have their gradients then.
        for item in self.engine.fragments():
            if item.owner.grad is not None:
                self.gradients[item.name, item.start] = item.gradient.clone()

    def write(self, folder: Path, step: int, facts: Mapping[str, Any]) -> None:
        place = checkpoint.checkpoint_folder(folder, step)
        checkpoint.write_shards(place, dist.get_rank(), [self._with_gradient(item) for item in self.engine.shards()])
        heard: list[Any] = [None] * dist.get_world_size()
        mine = {"outputs": self.outputs, "replicas": self._checksums()}
        dist.all_gather_object(heard, mine)
        if dist.get_rank() == 0:
            state = {"step": step, **facts, "outputs": _sum_outputs(heard), "unequal": _unequal(heard)}
            checkpoint.write_manifest(place, dist.get_world_size(), state, self.engine.shapes())
        self.outputs, self.gradients = {}, {}
        dist.barrier()

    def _with_gradient(self, shard: Shard) -> Shard:
        kept = {kind: value for kind, value in shard.tensors.items() if kind in (MASTER, MASK, checkpoint.BUFFER)}
        gradient = self.gradients.get((shard.name, shard.start))
        if gradient is not None and MASTER in kept:
            kept[GRADIENT] = gradient
        return Shard(shard.name, shard.start, kept, shard.cut)

    def _checksums(self) -> dict[str, Any]:
        """Of each parameter that other ranks hold, too; the same key on all that must be equal."""
        groups, sums = self.engine.groups, {}
        for name, param in self.engine.named_parameters():
            if hasattr(param, "ds_tensor"):
                continue  # ZeRO-3: nobody else has it
            part = groups.tensor.rank if cut_of(param) is not None else None
            values = param.detach().double()
            sums[f"{name}/{part}"] = (name, float(values.sum()), float(values.abs().sum()))
        return sums


def _sum_outputs(heard: list[Any]) -> dict[str, list[float]]:
    """Over the replicas; a layer that tensor ranks compute alike, or stages do not share, is heard from several."""
    sums: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for said in heard:
        for name, values in said["outputs"].items():
            before = sums.get(name, [0.0] * len(values))
            sums[name] = [old + new for old, new in zip(before, values, strict=True)]
            counts[name] = counts.get(name, 0) + 1
    return {name: [*values, counts[name]] for name, values in sums.items()}


def _unequal(heard: list[Any]) -> list[str]:
    """Parameters of which two ranks hold different values."""
    first: dict[str, Any] = {}
    unequal: dict[str, None] = {}
    for said in heard:
        for key, value in said["replicas"].items():
            if first.setdefault(key, value) != value:
                unequal[value[0]] = None
    return list(unequal)


# -------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Difference:
    """The first thing of a step that is not what one process computes. `name` is a module's, a parameter's or empty."""

    step: int
    what: str
    name: str
    error: float
    bound: float

    def __str__(self) -> str:
        place = f" of {self.name}" if self.name else ""
        return f"step {self.step}: {self.what}{place} differs by {self.error:.2g}, and rounding explains {self.bound:g}"


@dataclass(frozen=True)
class StepReport:
    """One step of both: losses, and the worst error of each kind with the tensor that has it."""

    step: int
    loss_of_one_process: float
    loss: float
    applied: bool
    worst: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Comparison:
    """Two traces of a phase in one precision; equal where there is no difference."""

    dtype: str
    phase: str
    bounds: Bounds
    steps: tuple[StepReport, ...]
    difference: Difference | None
    compared: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(one_process: Path, topology: Path, dtype: str, phase: str = "dense") -> Comparison:
    """Compares the trace of one process with that of a topology, step by step, up to the first difference.

    Within a step: whether it was applied, equal replicas, masks and what they prune, modules' outputs as they are
    computed, the loss, gradients from the last layer to the first as the backward pass makes them, weights.
    """
    pairs = list(_pairs(one_process, topology))
    weights = _WeightCheck(pairs[0][0], BOUNDS[dtype])
    reports: list[StepReport] = []
    for reference, other in pairs:
        errors = list(_errors(reference, other, BOUNDS[dtype], weights))
        reports.append(_report(reference, other, errors))
        wrong = next((item for item in errors if not item.error <= item.bound), None)
        if wrong is not None:
            return Comparison(dtype, phase, BOUNDS[dtype], tuple(reports), wrong, weights.compared())
    return Comparison(dtype, phase, BOUNDS[dtype], tuple(reports), None, weights.compared())


def _pairs(one: Path, other: Path) -> Iterator[tuple[CheckpointReader, CheckpointReader]]:
    for mine, theirs in zip(checkpoint.list_checkpoints(one), checkpoint.list_checkpoints(other), strict=True):
        yield CheckpointReader(mine), CheckpointReader(theirs)


def _errors(
    one: CheckpointReader, other: CheckpointReader, bounds: Bounds, weights: _WeightCheck
) -> Iterator[Difference]:
    step = one.step
    for key in ("applied", "loss_scale"):
        if key in one.state:
            differs = float(one.state[key] != other.state[key])
            yield Difference(step, f"{key.replace('_', ' ')} ({one.state[key]} → {other.state[key]})", "", differs, 0.0)
    for name in other.state["unequal"]:
        yield Difference(step, "the copy on another rank", name, math.inf, 0.0)
    for name in one.names(MASK):
        yield from _mask_errors(one, other, name)
    for name, values in one.state["outputs"].items():
        error = _output_error(values, other.state["outputs"].get(name))
        if error is not None:
            yield Difference(step, "output", name, error, bounds.outputs)
    if "loss" in one.state:
        error = abs(other.state["loss"] - one.state["loss"]) / max(abs(one.state["loss"]), 1e-12)
        yield Difference(step, "loss", "", error, bounds.loss)
    for name, error in _gradient_errors(one, other):
        yield Difference(step, "gradient", name, error, bounds.gradient)
    for name, error in weights.errors(one, other):
        yield Difference(step, "weight", name, error, bounds.weights)


def _mask_errors(one: CheckpointReader, other: CheckpointReader, name: str) -> Iterator[Difference]:
    """Shares of a layer: where its masks differ, and where a pruned weight is not zero. Rounding explains neither."""
    kept = one.full(MASK, name)
    found = other.full(MASK, name) if name in other.names(MASK) else torch.ones_like(kept)
    yield Difference(one.step, "mask", name, float((found != kept).double().mean()), 0.0)
    alive = (other.full(MASTER, name) != 0) & ~kept
    yield Difference(one.step, "pruned weight", name, float(alive.double().mean()), 0.0)


def _output_error(one: list[float], other: list[float] | None) -> float | None:
    """None where the topology's module gives a part only, or is not run: a later one is compared then."""
    if other is None or one[2] == 0:
        return None
    copies = other[2] / one[2]
    if copies != round(copies) or copies < 1:
        return None
    total, squares = other[0] / copies, other[1] / copies
    if not math.isfinite(one[1]):
        return 0.0 if not math.isfinite(squares) else math.inf  # an overflow that both have
    size = max(one[1], 1e-30)
    return max(abs(squares - one[1]) / size, abs(total - one[0]) / (one[2] * size) ** 0.5)


def _gradient_errors(one: CheckpointReader, other: CheckpointReader) -> Iterator[tuple[str, float]]:
    names = one.names(GRADIENT)
    gradients = {name: one.full(GRADIENT, name).double() for name in names}
    for name in reversed(names):
        difference = other.full(GRADIENT, name).double() - gradients[name]
        yield name, float(difference.norm()) / _size(name, gradients)


def _size(name: str, tensors: Mapping[str, Tensor]) -> float:
    """A tensor's norm, at least a tenth of its share of the norm of all."""
    whole = torch.stack([tensor.norm() for tensor in tensors.values()]).norm()
    share = (tensors[name].numel() / sum(tensor.numel() for tensor in tensors.values())) ** 0.5
    return max(float(tensors[name].norm()), _LEAST_SHARE * share * float(whole), 1e-30)


class _WeightCheck:
    """Compares weights where their gradients have said so far which way to go."""

    def __init__(self, start: CheckpointReader, bounds: Bounds) -> None:
        self._start, self._bounds = start, bounds
        self._clear = {name: torch.ones(start.shapes[name], dtype=torch.bool) for name in start.names(MASTER)}

    def compared(self) -> float:
        """Share of the weights that are compared."""
        counts = [(int(clear.sum()), clear.numel()) for clear in self._clear.values()]
        return sum(count for count, _ in counts) / max(sum(size for _, size in counts), 1)

    def errors(self, one: CheckpointReader, other: CheckpointReader) -> Iterator[tuple[str, float]]:
        self._narrow(one)
        ways = {name: self._of(one, name) - self._of(self._start, name) for name in self._clear}
        for name in self._clear:
            difference = (self._of(other, name) - self._of(one, name)) * self._clear[name]
            yield name, float(difference.norm()) / _size(name, ways)

    def _of(self, reader: CheckpointReader, name: str) -> Tensor:
        return reader.full(MASTER, name).double()

    def _narrow(self, one: CheckpointReader) -> None:
        gradients = {name: one.full(GRADIENT, name).double() for name in one.names(GRADIENT)}
        if not gradients:
            return
        count = sum(gradient.numel() for gradient in gradients.values())
        squares = sum(float(gradient.square().sum()) for gradient in gradients.values())
        least = self._bounds.noise * (squares / count) ** 0.5
        for name, gradient in gradients.items():
            self._clear[name] &= gradient.abs() > least


def _report(one: CheckpointReader, other: CheckpointReader, errors: list[Difference]) -> StepReport:
    worst: dict[str, tuple[str, float]] = {}
    for item in errors:
        if item.what in ("output", "gradient", "weight") and item.error >= worst.get(item.what, ("", -1.0))[1]:
            worst[item.what] = (item.name, item.error)
    loss, other_loss = one.state.get("loss", 0.0), other.state.get("loss", 0.0)
    return StepReport(one.step, loss, other_loss, one.state.get("applied", True), worst)
