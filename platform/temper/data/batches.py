"""The stream of examples and each rank's share of it.

The stream is one seeded permutation of the training split after the other, one an epoch. Global batch n is
`stream[n·B : (n+1)·B]`: a pure function of n, so that resuming is starting at another n, and every example is seen once
an epoch also where B does not divide the number of examples. How a global batch is dealt out does not change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from temper.config.schema import DataConfig, JobConfig
from temper.data.augment import ImageTransform, apply_seeded, build_transforms
from temper.data.sources import Split, random_order
from temper.errors import RunError
from temper.plan.facts import DataFacts

if TYPE_CHECKING:
    from temper.plan.mesh import BatchPlan


@dataclass(frozen=True)
class Batch:
    """Examples of one rank: `inputs` (examples, …) float32, or int64 where a user's data are token ids; `targets`
    (examples, …); `indices` (examples,) int64, each example's row in its split; `views` (examples,) int64, which
    augmented view of the example it is, 0 where views are not counted."""

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    views: Tensor


@dataclass(frozen=True)
class DataState:
    """What comes next: global batch `step` begins at `position` (examples) of `epoch`."""

    step: int
    epoch: int
    position: int


def data_state(step: int, train_examples: int, global_batch: int) -> DataState:
    """The state before global batch `step` (0-based)."""
    epoch, position = divmod(step * global_batch, train_examples)
    return DataState(step, epoch, position)


def views_of(job: JobConfig) -> int | None:
    """How many augmented views of an example the job counts; None: every epoch shows another one."""
    return None if job.distill is None else job.distill.views


def train_batches(
    config: DataConfig,
    split: Split,
    facts: DataFacts,
    *,
    seed: int,
    batch: BatchPlan,
    rank: int,
    world_size: int,
    first_step: int,
    last_step: int,
    views: int | None = None,
) -> Iterator[tuple[Batch, DataState]]:
    """This rank's share of global batches `first_step` to `last_step` - 1, each with the next state.

    Augmentation is new in every epoch or, where there are `views`, that of epoch e mod views.

    A global batch is cut into `batch.accumulation` chunks and each chunk evenly over the ranks; a rank gets its pieces
    in the order of the chunks, so that its micro-batch k is part of chunk k. `world_size` counts data-parallel ranks.
    """
    steps = _RankSteps(config, split, facts, seed, batch, rank, world_size, views)
    for step, made in zip(range(first_step, last_step), _prepare(steps, first_step, last_step), strict=True):
        yield made, data_state(step + 1, len(split), batch.global_batch)


def _prepare(steps: _RankSteps, first_step: int, last_step: int) -> Iterator[Batch]:
    if steps.config.loader_processes == 0:
        return (steps[step] for step in range(first_step, last_step))
    loader: DataLoader[Batch] = DataLoader(
        steps,
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=steps.config.loader_processes,
        collate_fn=_as_is,  # type: ignore[arg-type]  # without a batch size it is given one item
        # A generator of its own: the loader would otherwise draw from the one that dropout uses.
        generator=torch.Generator().manual_seed(0),
    )
    return iter(loader)


def _as_is(batch: Batch) -> Batch:
    return batch


class _RankSteps(Dataset[Batch]):
    """Item n is this rank's share of global batch n."""

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        facts: DataFacts,
        seed: int,
        batch: BatchPlan,
        rank: int,
        world_size: int,
        views: int | None,
    ) -> None:
        if batch.global_batch != batch.micro_batch * batch.accumulation * world_size:
            raise ValueError(f"{batch} does not fit {world_size} ranks")
        self.config, self.split, self.facts, self.seed = config, split, facts, seed
        self.global_batch = batch.global_batch
        self.offsets = rank_offsets(batch, rank, world_size)
        self.augmentation = build_transforms(config.augment)
        self.views = views

    def __getitem__(self, step: int) -> Batch:
        rows, epochs = stream(self.seed, len(self.split), step * self.global_batch + self.offsets)
        if self.views is None:
            batch = view_batch(self.split, self.facts, self.augmentation, self.seed, rows, epochs)
            return replace(batch, views=torch.zeros_like(batch.views))
        return view_batch(self.split, self.facts, self.augmentation, self.seed, rows, epochs % self.views)


def view_batch(
    split: Split,
    facts: DataFacts,
    augmentation: ImageTransform | None,
    seed: int,
    rows: npt.NDArray[np.int64],
    views: npt.NDArray[np.int64],
) -> Batch:
    """The examples at `rows`, each as the augmented view whose number `views` has, ready for a network.

    The view of an example in an epoch without counted views has the number of the epoch.
    """
    indices = torch.from_numpy(rows)
    inputs, targets = split.examples(indices)
    if augmentation:
        inputs = apply_seeded(augmentation, inputs, seed, views, rows)
    return Batch(normalized(stacked(inputs, facts), facts), targets, indices, torch.from_numpy(views))


def rank_offsets(batch: BatchPlan, rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """Places in the global batch that `rank` takes, in its order."""
    places = np.arange(batch.global_batch).reshape(batch.accumulation, world_size, batch.micro_batch)
    return places[:, rank].reshape(-1)


def stream(
    seed: int, count: int, positions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows at `positions` of the stream over a split of `count` examples, and the epoch of each."""
    epochs, places = np.divmod(positions, count)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _epoch_order(seed, int(epoch), count)[places[here]]
    return rows, epochs


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return random_order(count, seed, epoch)


def eval_batches(
    config: DataConfig, split: Split, facts: DataFacts, *, rank: int, world_size: int, batch: int
) -> Iterator[tuple[Batch, int]]:
    """This rank's part of the split in order, with the number of valid leading rows of each batch.

    Ranks take consecutive blocks and yield equally often, all batches having one size of at most `batch`; rows behind
    the valid ones repeat the split's first example.
    """
    share, larger = divmod(len(split), world_size)  # the first `larger` ranks have one example more
    first, count = rank * share + min(rank, larger), share + (rank < larger)
    most = share + (larger > 0)
    rounds = -(-most // batch)
    size = -(-most // max(rounds, 1))
    transform = build_transforms(config.eval_transforms)
    for start in range(0, rounds * size, size or 1):
        valid = min(max(count - start, 0), size)
        indices = torch.zeros(size, dtype=torch.int64)
        indices[:valid] = torch.arange(first + start, first + start + valid)
        inputs, targets = split.examples(indices)
        ready = normalized(stacked(transformed(transform, inputs), facts), facts)
        yield Batch(ready, targets, indices, torch.zeros_like(indices)), valid


def transformed(transform: ImageTransform | None, inputs: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """Inputs after a transform, if there is one."""
    if transform is None:
        return inputs
    return transform(inputs) if isinstance(inputs, Tensor) else [transform(image) for image in inputs]


def stacked(inputs: Tensor | Sequence[Tensor], facts: DataFacts) -> Tensor:
    """Inputs as one tensor. Raises RunError where one has not the planned shape."""
    if isinstance(inputs, Tensor):
        return inputs
    for example in inputs:
        if tuple(example.shape) != facts.shape:
            raise RunError(
                f"an example has the shape {list(example.shape)} where {list(facts.shape)} was planned; "
                "make all of one size with data.augment and data.eval_transforms"
            )
    return torch.stack(list(inputs))


def normalized(inputs: Tensor, facts: DataFacts) -> Tensor:
    """Inputs scaled to 0…1 if they are uint8, then (x − mean) / std per channel if the data have a mean."""
    if inputs.dtype == torch.uint8:
        inputs = inputs.float().div_(255)
    if not facts.mean:
        return inputs
    shape = (1, -1) + (1,) * (inputs.dim() - 2)
    mean, std = torch.tensor(facts.mean).view(shape), torch.tensor(facts.std).view(shape)
    return inputs.float().sub(mean).div_(std)
