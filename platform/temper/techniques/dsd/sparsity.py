"""How sparse a network is, counted in its fp32 masters wherever they lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from temper.checkpoint import MASTER, Shard
from temper.plan.phases import PhasePlan, Pruning


def latest_pruning(phases: Sequence[PhasePlan], phase: PhasePlan) -> Pruning | None:
    """The pruning of `phase`, or of the nearest sparse phase before it; None in the dense phase."""
    until = phases[: phases.index(phase) + 1]
    return next((item.pruning for item in reversed(until) if item.pruning is not None), None)


def count_zeros(shards: Iterable[Shard], layers: Sequence[str]) -> Tensor:
    """Weights in `shards` that are exactly zero, for each of `layers`: int64. A sum over all ranks counts each once."""
    zeros = dict.fromkeys(layers, 0)
    for shard in shards:
        if shard.name in zeros and MASTER in shard.tensors:
            master = shard.tensors[MASTER]
            zeros[shard.name] += master.numel() - int(torch.count_nonzero(master))
    return torch.tensor(list(zeros.values()), dtype=torch.int64)


def sparsity_metrics(
    zeros: Sequence[int], layers: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """`sparsity/<layer>` for each of `layers`, and `sparsity` of all of them together; nothing where none is pruned."""
    if not layers:
        return {}
    sizes = [math.prod(shapes[name]) for name in layers]
    each = {f"sparsity/{name}": count / size for name, count, size in zip(layers, zeros, sizes, strict=True)}
    return {"sparsity": sum(zeros) / sum(sizes), **each}
