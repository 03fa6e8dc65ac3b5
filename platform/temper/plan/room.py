"""How many worker groups a cluster has room for: arithmetic on what its nodes have and what a group takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from temper.errors import JobError, Problem

if TYPE_CHECKING:
    from temper.plan.build import Plan

_UNITS = 10_000  # Ray counts resources in whole ten-thousandths, rounded down
_NODES_SHOWN = 4


@dataclass(frozen=True)
class NodeRoom:
    """What one node has."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return _resources(self.cpus, self.gpus)


@dataclass(frozen=True)
class GroupShape:
    """A worker group: `ranks` processes, each with its share of one node. Groups of one shape are interchangeable."""

    ranks: int
    cpus_per_rank: float
    gpus_per_rank: float = 0.0

    def __str__(self) -> str:
        each = " each" if self.ranks > 1 else ""
        return f"{_count(self.ranks, 'rank')} of {_resources(self.cpus_per_rank, self.gpus_per_rank)}{each}"


def shape_of(plan: Plan) -> GroupShape:
    """The worker group that trains the plan."""
    parallel = plan.job.parallel
    gpus = parallel.gpus_per_worker if plan.mesh.device == "cuda" else 0.0
    return GroupShape(plan.mesh.world_size, parallel.cpus_per_worker, gpus)


def count_groups(nodes: Sequence[NodeRoom], shape: GroupShape) -> int:
    """Groups of this shape that fit at once. The ranks of one group may lie on several nodes, a rank on one; a share of
    a GPU is of one GPU."""
    return _count_ranks(nodes, shape) // shape.ranks


def plan_concurrency(
    concurrency: int | None, nodes: Sequence[NodeRoom], shape: GroupShape, trials: int | None = None
) -> int:
    """Trials at once: as many as asked for (None: as many as fit), and no more than there are `trials` (None: unknown).

    Raises JobError where not one fits, or fewer than asked for.
    """
    fit = count_groups(nodes, shape)
    if fit == 0:
        raise JobError([_no_room(nodes, shape)])
    if concurrency is not None and concurrency > fit:
        rule = f"is more than fit: a trial takes {shape}, and the cluster has {_describe(nodes)}"
        raise JobError([Problem("concurrency", concurrency, rule, f"use at most {fit}")])
    at_once = fit if concurrency is None else concurrency
    return at_once if trials is None else min(at_once, trials)


def _count_ranks(nodes: Sequence[NodeRoom], shape: GroupShape) -> int:
    return sum(_ranks_on(node, shape) for node in nodes)


def _ranks_on(node: NodeRoom, shape: GroupShape) -> int:
    by_cpus = _units(node.cpus) // _units(shape.cpus_per_rank)
    if shape.gpus_per_rank == 0:
        return by_cpus
    if shape.gpus_per_rank > 1:
        return min(by_cpus, int(node.gpus) // math.ceil(shape.gpus_per_rank))
    return min(by_cpus, int(node.gpus) * (_UNITS // _units(shape.gpus_per_rank)))


def _units(amount: float) -> int:
    """Whole units; what is less than one is one here, since Ray refuses it."""
    return max(int(amount * _UNITS), 1) if amount > 0 else 0


def _no_room(nodes: Sequence[NodeRoom], shape: GroupShape) -> Problem:
    fit, cpus = _count_ranks(nodes, shape), _most_cpus(nodes, shape)
    has_room = f"has room for {_count(fit, 'rank')}: {_describe(nodes)}" if fit else f"has {_describe(nodes)}"
    rule = f"leaves no room for a trial, which takes {shape}, and the cluster {has_room}"
    fewer = [f"at most {_count(fit, 'rank')}"] if fit else []
    if cpus is not None:
        remedy = "use " + " or ".join([f"cpus_per_worker: {cpus:g}", *fewer])
        return Problem("parallel.cpus_per_worker", shape.cpus_per_rank, rule, remedy)
    without_gpus = ["device: cpu"] if shape.gpus_per_rank else []
    return Problem(
        "parallel.workers", None, rule, "use " + " or ".join([*fewer, *without_gpus] or ["a larger cluster"])
    )


def _most_cpus(nodes: Sequence[NodeRoom], shape: GroupShape) -> float | None:
    """The most CPUs, in hundredths, that each rank of one group can have; None where CPUs are not what is missing."""
    shares = {math.floor(node.cpus / ranks * 100) / 100 for node in nodes for ranks in range(1, shape.ranks + 1)}
    fit = (share for share in shares if share > 0 and count_groups(nodes, replace(shape, cpus_per_rank=share)))
    return max(fit, default=None)


def _describe(nodes: Sequence[NodeRoom]) -> str:
    """e.g. `2 nodes (4 CPUs, 1 GPU; 4 CPUs)`."""
    shown = [str(node) for node in nodes[:_NODES_SHOWN]] + (["…"] if len(nodes) > _NODES_SHOWN else [])
    return f"{_count(len(nodes), 'node')} ({'; '.join(shown)})" if nodes else "no node"


def _resources(cpus: float, gpus: float) -> str:
    return _count(cpus, "CPU") + (f" and {_count(gpus, 'GPU')}" if gpus else "")


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")
