"""The process groups of a mesh of ranks: who averages gradients, who shares a layer, who passes activations on.

Ranks are numbered as DeepSpeed's `PipeModelDataParallelTopology` does: rank = (stage × data + replica) × tensor +
part. Tensor ranks, which talk most, are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """A process group as one of its members sees it. `process_group` is None where it has one member, or where a model
    is only looked at and never run."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class MeshGroups:
    """This rank's groups.

    `data`: the ranks that hold the same part of the same stage, one a replica. `tensor`: those that share the layers of
    a stage of a replica. `pipeline`: the stages of a replica, in order. `stage`: data × tensor, all that compute one
    stage. `replica`: pipeline × tensor, all that compute one part of the batch.
    """

    data: Group
    tensor: Group
    pipeline: Group
    stage: Group
    replica: Group


def build_groups(data: int, pipeline: int = 1, tensor: int = 1) -> MeshGroups:
    """Makes the groups of a mesh over all ranks of the default process group. Collective: every rank calls it."""
    world_size = data * pipeline * tensor
    if dist.get_world_size() != world_size:
        raise ValueError(f"{dist.get_world_size()} ranks cannot form {data} × {pipeline} × {tensor}")
    ranks = range(world_size)
    stage_of = [rank // (data * tensor) for rank in ranks]
    replica_of = [rank // tensor % data for rank in ranks]
    part_of = [rank % tensor for rank in ranks]
    return MeshGroups(
        data=_group([(stage_of[rank], part_of[rank]) for rank in ranks]),
        tensor=_group([(stage_of[rank], replica_of[rank]) for rank in ranks]),
        pipeline=_group([(replica_of[rank], part_of[rank]) for rank in ranks]),
        stage=_group([(stage_of[rank],) for rank in ranks]),
        replica=_group([(replica_of[rank],) for rank in ranks]),
    )


def _group(colors: list[tuple[int, ...]]) -> Group:
    """This rank's group, where ranks of one colour form a group."""
    me, mine = dist.get_rank(), Group()
    for color in sorted(set(colors)):
        members = [rank for rank, other in enumerate(colors) if other == color]
        # The default group serves for all; further groups cost connections.
        whole = len(members) == len(colors)
        made = None if len(members) == 1 else dist.group.WORLD if whole else dist.new_group(members)
        if me in members:
            mine = Group(members.index(me), len(members), made)
    return mine
