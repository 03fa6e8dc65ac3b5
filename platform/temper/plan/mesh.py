"""How ranks and examples are laid out: the cluster's shape, the mesh of ranks, the arithmetic of batches."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from temper.config.schema import ParallelConfig
from temper.errors import Problem

_NVIDIA_FOLDER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class ClusterShape:
    """What a plan may use, over all nodes."""

    nodes: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class MeshPlan:
    """`data` replicas of a model cut into `pipeline` stages, each on `tensor` ranks that compute on one `device` each.

    `cut` holds the index of each stage's first layer, 0 first; empty where there is one stage. `splits` tells how the
    work of the modules named is split over the tensor ranks.
    """

    data: int
    pipeline: int
    device: str
    tensor: int = 1
    cut: tuple[int, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.tensor


@dataclass(frozen=True)
class BatchPlan:
    """Examples in one optimizer step: global_batch = rank_batch × data, rank_batch = micro_batch × accumulation."""

    global_batch: int
    rank_batch: int
    micro_batch: int
    accumulation: int


def local_cluster() -> ClusterShape:
    """This machine as a cluster of one node; counts GPUs without importing torch."""
    return ClusterShape(nodes=1, cpus=float(os.cpu_count() or 1), gpus=float(_count_gpus()))


def _count_gpus() -> int:
    """GPUs that the NVIDIA driver lists, less those that CUDA_VISIBLE_DEVICES hides."""
    present = sum(1 for _ in _NVIDIA_FOLDER.iterdir()) if _NVIDIA_FOLDER.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",")]
    # CUDA stops at the first entry that is not a device; "" and "-1" therefore hide every GPU.
    listed = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(present, listed)


def check_mesh(parallel: ParallelConfig, cluster: ClusterShape) -> list[Problem]:
    """What of `parallel` the cluster cannot give. Ray would wait for it for ever, so it is said before the start."""
    per_replica = parallel.pipeline * parallel.tensor
    world_size = parallel.workers * per_replica
    if parallel.device == "cuda" and cluster.gpus < 1:
        return [Problem("parallel.device", "cuda", "needs a GPU, and this cluster has none", "use cpu or auto")]
    problems = []
    if _device(parallel, cluster) == "cuda" and world_size > cluster.gpus:
        gpus = int(cluster.gpus)
        rule = f"needs {world_size} GPUs, one for each rank, and the cluster has {gpus}"
        fit = gpus // per_replica
        remedy = f"use workers: {fit} or device: cpu" if fit else "use device: cpu"
        problems.append(Problem("parallel.workers", parallel.workers, rule, remedy))
    cpus = world_size * parallel.cpus_per_worker
    if cpus > cluster.cpus + 1e-6:
        rule = (
            f"needs {cpus:g} CPUs (cpus_per_worker: {parallel.cpus_per_worker:g}), and the cluster has {cluster.cpus:g}"
        )
        fit = int(cluster.cpus / parallel.cpus_per_worker / per_replica)
        share = math.floor(cluster.cpus / world_size * 100) / 100
        remedies = ([f"workers: {fit}"] if fit else []) + ([f"cpus_per_worker: {share:g}"] if share else [])
        problems.append(
            Problem("parallel.workers", parallel.workers, rule, "use " + " or ".join(remedies or ["a larger cluster"]))
        )
    return problems


def plan_mesh(parallel: ParallelConfig, cluster: ClusterShape) -> MeshPlan:
    """The mesh of a job that :func:`check_mesh` finds nothing wrong with."""
    return MeshPlan(data=parallel.workers, pipeline=parallel.pipeline, device=_device(parallel, cluster))


def _device(parallel: ParallelConfig, cluster: ClusterShape) -> str:
    if parallel.device == "auto":
        return "cuda" if cluster.gpus >= 1 else "cpu"
    return parallel.device


def plan_batch(
    global_batch: int, data: int, micro_batch_limit: int | None = None, least_accumulation: int = 1
) -> BatchPlan:
    """Split `global_batch`, a multiple of `data`, with the fewest micro-batches that are no larger than the limit.

    They are at least `least_accumulation`, or as many as a rank has examples. Micro-batches of one step are equally
    large, because the mean over the step is taken as a mean of their means.
    """
    rank_batch = global_batch // data
    limit = max(rank_batch // least_accumulation, 1)
    if micro_batch_limit is not None:
        limit = min(limit, micro_batch_limit)
    micro_batch = max(divisor for divisor in divisors(rank_batch) if divisor <= limit)
    return BatchPlan(global_batch, rank_batch, micro_batch, rank_batch // micro_batch)


def divisors(number: int) -> list[int]:
    """All divisors, ascending. Takes √number steps: a batch of 2⁴⁰ examples is answered, if not wise."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    high = [number // divisor for divisor in reversed(low)]
    return low + high[1:] if low[-1] == high[0] else low + high
