"""What a command has left behind in Ray: its actors and placement groups that still live, CPUs and GPUs not free again.

It is read from Ray's control store: the State API would need the dashboard, and an embedded Ray has none.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.util.client

_POLL_S = 0.1
_LEAST_MISSING = 0.01  # of a CPU or GPU: sums of shares are not exact
# Ray Data's, one of each for all that a driver or a cluster does with it; they take no CPU.
_KEPT_BY_RAY = ("_StatsActor", "ActorLocationTracker", "_AutoscalingCoordinatorActor")


@dataclass(frozen=True)
class Inventory:
    """What this driver has in Ray now, and what of the cluster is free, whoever uses the rest. Actors and placement
    groups by id, with what people know them by."""

    actors: Mapping[str, str]
    groups: Mapping[str, str]
    cpus: float
    gpus: float = 0.0

    def left_behind(self, timeout_s: float = 10.0) -> Audit:
        """What is there now that was not there then. Ray frees what has ended with some delay: so long is waited for
        it."""
        gc.collect()  # an actor lives as long as a handle to it, which may lie in a cycle of references
        total = ray.cluster_resources()
        deadline_s = time.monotonic() + timeout_s
        while True:
            audit = Audit(self, take_inventory(), total.get("CPU", 0.0), total.get("GPU", 0.0))
            if audit.is_clean or time.monotonic() >= deadline_s:
                return audit
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class Audit:
    """What there was `before`, and what there is when it should be over; `cpus` and `gpus` are the whole cluster's."""

    before: Inventory
    after: Inventory
    cpus: float
    gpus: float = 0.0

    @property
    def actors(self) -> list[str]:
        return [name for key, name in self.after.actors.items() if key not in self.before.actors]

    @property
    def groups(self) -> list[str]:
        return [name for key, name in self.after.groups.items() if key not in self.before.groups]

    @property
    def is_clean(self) -> bool:
        is_free = self.after.cpus > self.before.cpus - _LEAST_MISSING
        is_free = is_free and self.after.gpus > self.before.gpus - _LEAST_MISSING
        return is_free and not self.actors and not self.groups

    def text(self) -> str:
        """e.g. `left behind: nothing (0 actors, 0 placement groups, 2 of 2 CPUs free)`."""
        found = [_listed("actor", self.actors), _listed("placement group", self.groups), *self._free()]
        return f"left behind: nothing ({', '.join(found)})" if self.is_clean else f"left behind: {', '.join(found)}"

    def _free(self) -> list[str]:
        kinds = [("CPUs", self.before.cpus, self.after.cpus, self.cpus)]
        if self.gpus:
            kinds.append(("GPUs", self.before.gpus, self.after.gpus, self.gpus))
        return [
            f"{after:.4g} of {total:.4g} {kind} free" + (f" ({before:.4g} before)" if before != after else "")
            for kind, before, after, total in kinds
        ]


def take_inventory() -> Inventory:
    """Needs a connection to Ray, also by `ray://`."""
    # A client's process has no connection of its own to the control store; a task has, and belongs to the same job.
    is_client = ray.util.client.ray.is_connected()
    actors, groups = ray.get(ray.remote(num_cpus=0)(_own).remote()) if is_client else _own()
    free = ray.available_resources()
    return Inventory(actors, groups, free.get("CPU", 0.0), free.get("GPU", 0.0))


def _own() -> tuple[dict[str, str], dict[str, str]]:
    """This job's actors that are not dead and its placement groups that are not removed."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    state = ray._private.state.state
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    actors = state.actor_table(None, ray.JobID(job)).values()
    # `ray.util.placement_group_table` leaves out whose they are.
    tables = map(PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table())
    return (
        {actor["ActorID"]: _actor_name(actor) for actor in actors if _is_left(actor)},
        {
            table.placement_group_id.hex(): _group_name(table)
            for table in tables
            if table.creator_job_id == job and table.state != PlacementGroupTableData.REMOVED
        },
    )


def _is_left(actor: dict[str, Any]) -> bool:
    return actor["State"] != "DEAD" and actor["ActorClassName"] not in _KEPT_BY_RAY


def _actor_name(actor: dict[str, Any]) -> str:
    return f"{actor['ActorClassName'].rpartition('.')[2]} {actor['Name'] or actor['ActorID'][:8]}"


def _group_name(table: Any) -> str:
    return f"{table.name or table.placement_group_id.hex()[:8]} of {_count(len(table.bundles), 'bundle')}"


def _listed(noun: str, names: list[str]) -> str:
    return _count(len(names), noun) + (f" ({'; '.join(names)})" if names else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
