"""Downpour SGD (Dean et al. 2012, section 4.1): parameters on shards, workers that fetch and push when they like.

All trainable parameters of a model, one behind the other, are one flat fp32 tensor. :class:`ParameterShard` owns a
range of it and the optimizer that acts there; :class:`DownpourWorker` is the paper's `DownpourSGDClient` (appendix,
algorithm 1.1) on a :class:`Replica` of the model. How they reach each other is not decided here: a worker is given
clients whose calls return something to await, and no Ray is imported.

What is asynchronous: a worker's parameters travel while its next mini-batch is prepared, and its gradient while the one
after it is computed. Nothing waits for other workers, unless their lead is bounded (see :mod:`temper.launch.ledger`).
With one worker and `n_fetch = n_push = 1` this is the plain loop of the optimizer, because a worker's push reaches a
shard before its next fetch. With more, the gradient of each mini-batch is an update of its own: a step of the job makes
as many as there are workers, and a learning rate that is tuned for one update a step may be too large.

In a sparse phase each shard has the masks of its range and zeroes the gradients of pruned weights that workers push. A
worker has all masks, because between two fetches it descends by itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from temper.checkpoint import BUFFER, MASK, MASTER, CheckpointReader, Shard
from temper.config.schema import OptimizerConfig, PrecisionConfig
from temper.engine.base import LossFunction, Targets
from temper.engine.inputs import DTYPES, apply_seed, prepared
from temper.engine.masks import MasterMasks
from temper.engine.masters import Fragment, set_optimizer_step
from temper.optim import build_optimizer
from temper.parallel.batch_norm import apply_global_batch_norm
from temper.parallel.cut import even_range
from temper.parallel.groups import Group
from temper.precision.accumulation import arithmetic
from temper.precision.device import apply_product_precision

Result = TypeVar("Result")
Values = npt.NDArray[np.float32]


# ------------------------------------------------------------------------------------------------------------ the cut


@dataclass(frozen=True)
class Slot:
    """The place of a parameter in the flat tensor: it begins at `start`."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


def plan_slots(model: nn.Module) -> list[Slot]:
    """Slots of the trainable parameters, in the model's order."""
    slots: list[Slot] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            slots.append(Slot(name, tuple(param.shape), slots[-1].stop if slots else 0))
    return slots


def plan_ranges(slots: Sequence[Slot], shards: int) -> list[tuple[int, int]]:
    """The range of the flat tensor that each shard owns: as even as can be, cut wherever that falls."""
    return [even_range(slots[-1].stop, index, shards) for index in range(shards)]


def flatten(model: nn.Module, slots: Sequence[Slot]) -> Tensor:
    """A copy of the trainable parameters as one flat fp32 tensor."""
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[slot.name].detach().reshape(-1).float() for slot in slots])


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds beside the trainable parameters: persistent buffers and frozen parameters."""
    parameters = dict(model.named_parameters())
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in names}
    return {**buffers, **{name: param.detach() for name, param in parameters.items() if not param.requires_grad}}


def named_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a checkpoint of the model holds: trainable parameters first."""
    stored = {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
    return {**{slot.name: slot.shape for slot in plan_slots(model)}, **stored}


# ------------------------------------------------------------------------------------------------------------ a shard


@dataclass(frozen=True)
class ShardState:
    """A shard's scalars in a checkpoint. `version`: updates applied; `clocks`: pushes applied, by worker."""

    version: int
    clocks: Mapping[str, int]


class ParameterShard:
    """The range `[start, stop)` of the flat parameters and the job's optimizer on it.

    Every optimizer of :mod:`temper.optim` works element by element, so that shards together do what one would.
    """

    def __init__(self, model: nn.Module, index: int, shards: int, optimizer: OptimizerConfig) -> None:
        slots = plan_slots(model)
        self.start, self.stop = plan_ranges(slots, shards)[index]
        self._values = nn.Parameter(flatten(model, slots)[self.start : self.stop].clone())
        self._optimizer = build_optimizer(optimizer, [self._values])
        self._masks = MasterMasks(self._optimizer)
        self._slots = [slot for slot in slots if slot.stop > self.start and slot.start < self.stop]
        self._pushes: dict[str, tuple[int, int]] = {}
        self.version = 0

    def fetch(self) -> tuple[Values, int]:
        """The values, as a view, and their version: the number of updates in them."""
        return self._values.detach().numpy(), self.version

    def push(self, worker: str, clock: int, gradient: Values, fetched_version: int, lr: float) -> int:
        """Applies a gradient; returns its staleness: the updates since the worker fetched version `fetched_version`.

        `worker` names a process, and `clock` counts its pushes from 1: one that is repeated, because its answer was
        lost, is applied once. A shard that was restored counts on from an older version, and no update is older.
        """
        last, staleness = self._pushes.get(worker, (0, 0))
        if clock <= last:
            return staleness
        staleness = max(0, self.version - fetched_version)
        self._values.grad = torch.tensor(gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.version += 1
        self._pushes[worker] = clock, staleness
        return staleness

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> ShardState:
        return ShardState(self.version, {worker: clock for worker, (clock, _) in self._pushes.items()})

    def shards(self) -> list[Shard]:
        """The masters and moments as a checkpoint holds them, as views; beside those of pruned layers, the masks."""
        return [
            Shard(item.name, item.start, {MASTER: item.master, **item.moments(), **self._masks.shard_of(item)})
            for item in self._fragments()
        ]

    def _fragments(self) -> list[Fragment]:
        fragments = []
        for slot in self._slots:
            start, stop = max(slot.start, self.start), min(slot.stop, self.stop)
            place = start - slot.start, stop - start
            state = self._optimizer.state
            fragments.append(Fragment(slot.name, None, *place, self._values, start - self.start, state))
        return fragments

    @torch.no_grad()
    def load(self, reader: CheckpointReader, state: ShardState) -> None:
        """Takes values, moments, masks and scalars from a checkpoint."""
        fragments = self._fragments()
        self._masks.load(fragments, reader)
        for item in fragments:
            item.master.copy_(reader.read(MASTER, item.name, item.start, item.numel))
            for key in reader.moments():
                item.moment(key).copy_(reader.read(key, item.name, item.start, item.numel))
        if state.version > 0:
            set_optimizer_step(fragments, state.version)
        self.version = state.version
        self._pushes = {worker: (clock, 0) for worker, clock in state.clocks.items()}


# ----------------------------------------------------------------------------------------------------------- a worker


@dataclass(frozen=True)
class MiniBatch:
    """What a worker computes one gradient of. `seed` drives dropout."""

    inputs: Tensor
    targets: Targets
    lr: float
    seed: int


class Replica:
    """A model whose trainable parameters are views of one flat tensor, and whose gradients are views of another.

    In bf16 the model computes with a rounded copy of `values`, which stay fp32.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, precision: PrecisionConfig, device: torch.device) -> None:
        self._slots = plan_slots(model)
        self.values = flatten(model, self._slots).to(device)
        self._kept: Tensor | None = None  # 0 where a weight is pruned, else 1; as the shards have it
        self._loss, self._dtype, self.device = loss, DTYPES[precision.dtype], device
        apply_product_precision(precision.dtype, device)
        self._arithmetic = arithmetic(self._dtype, device, precision.fp32_accumulation)
        if precision.is_low:
            # Its running statistics stay fp32.
            apply_global_batch_norm(model, Group())
        self.module = model.to(device, self._dtype)
        self._weights = self.values.to(self._dtype)
        self._gradient = torch.zeros_like(self._weights)
        parameters = dict(self.module.named_parameters())
        for slot in self._slots:
            parameters[slot.name].data = self._weights[slot.start : slot.stop].view(slot.shape)
            parameters[slot.name].grad = self._gradient[slot.start : slot.stop].view(slot.shape)

    def adopt(self, start: int, values: Values) -> None:
        """Takes the parameters from place `start` on; :meth:`refresh` brings the model in line."""
        self.values[start : start + len(values)].copy_(torch.from_numpy(values))

    def refresh(self) -> None:
        if self._weights is not self.values:
            self._weights.copy_(self.values)

    def descend(self, gradient: Tensor, lr: float) -> None:
        """A step of plain SGD on the worker's own parameters, until it fetches others (algorithm 1.1). Pruned weights
        stay zero."""
        self.values.sub_(gradient if self._kept is None else gradient * self._kept, alpha=lr)
        self.refresh()

    def compute(self, batch: MiniBatch) -> tuple[dict[str, Tensor], Tensor]:
        """The loss's terms, each the mean over the mini-batch, and the gradient of their sum, flat, in fp32.

        The gradient's memory is used again for the next mini-batch.
        """
        apply_seed(batch.seed, self.device)
        if not self.module.training:
            self.module.train()
        self._gradient.zero_()
        with self._arithmetic():
            terms = self._loss(
                self.module(self._prepared(batch.inputs)), batch.targets.to(self.device, non_blocking=False)
            )
            torch.stack(list(terms.values())).sum().backward()
        return {name: value.detach() for name, value in terms.items()}, self._gradient.float()

    def predict(self, inputs: Tensor) -> Any:
        """The model's outputs in evaluation mode, without gradients."""
        if self.module.training:
            self.module.eval()
        with torch.no_grad():
            return self.module(self._prepared(inputs))

    def _prepared(self, inputs: Tensor) -> Tensor:
        return prepared(inputs, self._dtype, self.device)

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> None:
        """Takes buffers, frozen parameters and masks from a checkpoint; trainable parameters are fetched."""
        for name, value in stored_tensors(self.module).items():
            value.copy_(reader.full(BUFFER, name))
        pruned = set(reader.names(MASK))
        self._kept = torch.ones_like(self.values, dtype=torch.uint8) if pruned else None
        for slot in self._slots:
            if self._kept is not None and slot.name in pruned:
                self._kept[slot.start : slot.stop] = reader.read(MASK, slot.name)


class ShardClient(Protocol):
    """A worker's way to one shard. Calls are begun when they are made, not when they are awaited, and those of one
    worker reach the shard in their order. What they are given is no longer read when they return."""

    def fetch(self) -> Awaitable[tuple[Values, int]]: ...

    def push(self, worker: str, clock: int, gradient: Values, fetched_version: int, lr: float) -> Awaitable[int]: ...


@dataclass(frozen=True)
class Outcome:
    """One mini-batch, by the ticket it was asked for with: the loss's terms, and the gradient's norm before
    clipping."""

    ticket: Any
    terms: Mapping[str, float]
    grad_norm: float


@dataclass(frozen=True)
class Push:
    """A push that every shard has, and the mini-batches in it. `staleness` is that on the shard where it is largest."""

    outcomes: tuple[Outcome, ...]
    staleness: int


class DownpourWorker:
    """`DownpourSGDClient`: fetches every `n_fetch` mini-batches, pushes the sum of the gradients every `n_push`.

    Mini-batches may be asked for before the one at work is finished; they are computed in the order of the calls. A
    gradient is clipped to `clip_norm` before anything is done with it. `name` is the process's own, see
    :meth:`ParameterShard.push`.
    """

    def __init__(
        self,
        name: str,
        replica: Replica,
        shards: Sequence[ShardClient],
        *,
        n_fetch: int,
        n_push: int,
        clip_norm: float | None,
    ) -> None:
        self.name, self.replica = name, replica
        self._shards, self._n_fetch, self._n_push, self._clip_norm = shards, n_fetch, n_push, clip_norm
        self._ranges = plan_ranges(plan_slots(replica.module), len(shards))
        self._accrued = torch.empty(0)
        self._outcomes: list[Outcome] = []  # of what is accrued
        self._clock = 0
        self._age: int | None = None  # mini-batches since the last fetch
        self._versions = self._base = [0] * len(shards)
        self._turn = asyncio.Lock()
        # Answers of shards are taken while it computes.
        self._thread = ThreadPoolExecutor(1, "replica")

    async def train(self, ticket: Any, prepare: Callable[[], MiniBatch]) -> Push | None:
        """Computes one mini-batch; where that is the last of a push, returns it when every shard has it."""
        async with self._turn:
            fetching = self._begin_fetch() if self._age is None or self._age >= self._n_fetch else []
            batch = await self._compute(prepare)
            await self._adopt(fetching)
            outcome, gradient = await self._compute(lambda: self._gradient(ticket, batch))
            self._accrue(outcome, gradient)
            self.replica.descend(gradient, batch.lr)
            pushing = self._begin_push(batch.lr) if len(self._outcomes) >= self._n_push else None
        # The next mini-batch is computed meanwhile.
        return await pushing if pushing is not None else None

    async def flush(self, lr: float) -> Push | None:
        """Pushes what is accrued of less than `n_push` mini-batches, where there is something."""
        async with self._turn:
            pushing = self._begin_push(lr) if self._outcomes else None
        return await pushing if pushing is not None else None

    async def fetch(self) -> None:
        """Brings the replica up to date, for another use than training; the next mini-batch fetches again."""
        async with self._turn:
            await self._adopt(self._begin_fetch())
            self._age = None

    async def use(self, work: Callable[[], Result]) -> Result:
        """What `work` makes of the replica, with no mini-batch in between."""
        async with self._turn:
            return await self._compute(work)

    async def _compute(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # ---------------------------------------------------------------------------------------------- parts of the step

    def _begin_fetch(self) -> list[Awaitable[tuple[Values, int]]]:
        return [shard.fetch() for shard in self._shards]

    async def _adopt(self, fetching: Sequence[Awaitable[tuple[Values, int]]]) -> None:
        if not fetching:
            return
        fetched = await asyncio.gather(*fetching)
        for (start, _), (values, _) in zip(self._ranges, fetched, strict=True):
            self.replica.adopt(start, values)
        self.replica.refresh()
        self._versions = [version for _, version in fetched]
        self._age = 0

    def _gradient(self, ticket: Any, batch: MiniBatch) -> tuple[Outcome, Tensor]:
        terms, gradient = self.replica.compute(batch)
        norm = torch.linalg.vector_norm(gradient)
        if self._clip_norm is not None:
            gradient.mul_(torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0))
        return Outcome(ticket, {name: float(value) for name, value in terms.items()}, float(norm)), gradient

    def _accrue(self, outcome: Outcome, gradient: Tensor) -> None:
        if self._outcomes:
            self._accrued += gradient
        else:
            self._accrued = gradient if self._n_push == 1 else gradient.clone()
            # A push is as stale as the oldest gradient in it.
            self._base = self._versions
        self._outcomes.append(outcome)
        self._age = (self._age or 0) + 1

    def _begin_push(self, lr: float) -> Awaitable[Push]:
        self._clock += 1
        accrued, outcomes = self._accrued.cpu().numpy(), tuple(self._outcomes)
        pushing = [
            shard.push(self.name, self._clock, accrued[start:stop], version, lr)
            for shard, (start, stop), version in zip(self._shards, self._ranges, self._base, strict=True)
        ]
        self._outcomes = []
        return _arrived(outcomes, pushing)


async def _arrived(outcomes: tuple[Outcome, ...], pushing: Sequence[Awaitable[int]]) -> Push:
    return Push(outcomes, max(await asyncio.gather(*pushing)))
