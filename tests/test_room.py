"""How many trials a cluster has room for; shares of a GPU; what a finished sweep left in Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.util

from temper.config.checks import check_job
from temper.config.load import load_job
from temper.errors import JobError
from temper.launch.audit import Audit, Inventory, take_inventory
from temper.launch.cluster import node_rooms, ray_session
from temper.plan.mesh import ClusterShape, local_cluster, plan_mesh
from temper.plan.phases import _topology
from temper.plan.room import GroupShape, NodeRoom, count_groups, plan_concurrency, shape_of

DIGITS = Path(__file__).parents[1] / "jobs" / "digits.yaml"


def nodes(*rooms: tuple[float, float]) -> list[NodeRoom]:
    return [NodeRoom(cpus, gpus) for cpus, gpus in rooms]


def plan_of(parallel: str, cluster: ClusterShape) -> Any:
    job = load_job(DIGITS, [f"parallel={parallel}"])
    return SimpleNamespace(job=job, mesh=plan_mesh(job.parallel, cluster))


# --------------------------------------------------------------------------------------------------------- counting


def test_the_shape_of_a_plan_is_its_ranks_with_their_shares() -> None:
    on_cpus, on_gpus = ClusterShape(1, 8.0, 0.0), ClusterShape(1, 8.0, 4.0)
    parallel = "{workers: 2, cpus_per_worker: 1.5}"
    assert shape_of(plan_of(parallel, on_cpus)) == GroupShape(2, 1.5, 0.0)
    assert shape_of(plan_of(parallel, on_gpus)) == GroupShape(2, 1.5, 1.0)
    assert shape_of(plan_of("{gpus_per_worker: 0.25}", on_gpus)) == GroupShape(1, 1.0, 0.25)
    assert shape_of(plan_of("{gpus_per_worker: 0.25}", on_cpus)) == GroupShape(1, 1.0, 0.0)


@pytest.mark.parametrize(
    ("rooms", "shape", "groups"),
    [
        ([(2, 0)], GroupShape(1, 1), 2),
        ([(2, 0)], GroupShape(2, 1), 1),
        ([(2, 0)], GroupShape(3, 1), 0),
        ([(3, 0), (3, 0)], GroupShape(2, 1), 3),  # the second group has a rank on each node
        ([(3, 0), (3, 0)], GroupShape(1, 2), 2),  # a rank lies on one node
        ([(1, 0)], GroupShape(1, 0.1), 10),  # 0.1 is no binary fraction
        ([(1, 0)], GroupShape(1, 1 / 3), 3),
        ([(2, 0)], GroupShape(1, 1 / 6), 12),
        ([(8, 2)], GroupShape(1, 1, 1), 2),
        ([(8, 2)], GroupShape(1, 1, 0.5), 4),
        ([(8, 2)], GroupShape(1, 1, 0.6), 2),  # what is left of two GPUs is not one share
        ([(3, 2)], GroupShape(1, 1, 0.5), 3),  # CPUs end first
        ([(8, 3)], GroupShape(1, 1, 1.5), 1),  # Ray gives no GPU and a half
        ([(8, 0), (1, 4)], GroupShape(1, 1, 1), 1),  # CPUs of the one node do not help GPUs of the other
        ([(8, 0), (8, 4)], GroupShape(2, 1, 1), 2),
        ([], GroupShape(1, 1), 0),
    ],
)
def test_groups_that_fit(rooms: list[tuple[float, float]], shape: GroupShape, groups: int) -> None:
    assert count_groups(nodes(*rooms), shape) == groups


def test_this_machine_is_one_node() -> None:
    machine = local_cluster()
    assert node_rooms("local") == [NodeRoom(machine.cpus, machine.gpus)]


# ------------------------------------------------------------------------------------------------------ concurrency


@pytest.mark.parametrize(
    ("concurrency", "trials", "at_once"), [(None, None, 4), (None, 24, 4), (None, 3, 3), (2, 24, 2), (4, 1, 1)]
)
def test_as_many_trials_at_once_as_fit_unless_told_otherwise(
    concurrency: int | None, trials: int | None, at_once: int
) -> None:
    assert plan_concurrency(concurrency, nodes((8, 0)), GroupShape(2, 1), trials) == at_once


@pytest.mark.parametrize(
    ("concurrency", "rooms", "shape", "said"),
    [
        (
            5, [(8, 0)], GroupShape(2, 1),
            "concurrency: 5 is more than fit: a trial takes 2 ranks of 1 CPU each, and the cluster has 1 node "
            "(8 CPUs); use at most 4",
        ),
        (
            3, [(8, 1), (8, 0)], GroupShape(1, 1, 0.5),
            "concurrency: 3 is more than fit: a trial takes 1 rank of 1 CPU and 0.5 GPUs, and the cluster has 2 nodes "
            "(8 CPUs and 1 GPU; 8 CPUs); use at most 2",
        ),
        (
            None, [(2, 0), (2, 0)], GroupShape(1, 4),
            "parallel.cpus_per_worker: 4 leaves no room for a trial, which takes 1 rank of 4 CPUs, and the cluster has "
            "2 nodes (2 CPUs; 2 CPUs); use cpus_per_worker: 2",
        ),
        (
            None, [(4, 0)], GroupShape(3, 2.5),
            "parallel.cpus_per_worker: 2.5 leaves no room for a trial, which takes 3 ranks of 2.5 CPUs each, and the "
            "cluster has room for 1 rank: 1 node (4 CPUs); use cpus_per_worker: 1.33 or at most 1 rank",
        ),
        (
            None, [(8, 2), (8, 1)], GroupShape(4, 1, 1),
            "parallel.workers: leaves no room for a trial, which takes 4 ranks of 1 CPU and 1 GPU each, and the "
            "cluster has room for 3 ranks: 2 nodes (8 CPUs and 2 GPUs; 8 CPUs and 1 GPU); "
            "use at most 3 ranks or device: cpu",
        ),
        (
            1, [], GroupShape(1, 1),
            "parallel.workers: leaves no room for a trial, which takes 1 rank of 1 CPU, and the cluster has no node; "
            "use a larger cluster",
        ),
        (
            9, [(1, 0)] * 6, GroupShape(1, 1),
            "concurrency: 9 is more than fit: a trial takes 1 rank of 1 CPU, and the cluster has 6 nodes (1 CPU; "
            "1 CPU; 1 CPU; 1 CPU; …); use at most 6",
        ),
    ],
)  # fmt: skip
def test_what_the_cluster_has_no_room_for_is_refused_with_what_it_has(
    concurrency: int | None, rooms: list[tuple[float, float]], shape: GroupShape, said: str
) -> None:
    with pytest.raises(JobError) as refused:
        plan_concurrency(concurrency, nodes(*rooms), shape, 24)
    assert [str(problem) for problem in refused.value.problems] == [said]


def test_the_cpus_that_a_refusal_names_do_fit() -> None:
    for cpus in (0.5, 1.0, 2.0, 7.0):
        for ranks in range(1, 6):
            with pytest.raises(JobError) as refused:
                plan_concurrency(None, nodes((cpus, 0), (1.0, 0)), GroupShape(ranks, 9.0))
            share = float(refused.value.problems[0].remedy.removeprefix("use cpus_per_worker: "))
            assert count_groups(nodes((cpus, 0), (1.0, 0)), GroupShape(ranks, share)) >= 1
            assert count_groups(nodes((cpus, 0), (1.0, 0)), GroupShape(ranks, share + 0.01)) == 0


# -------------------------------------------------------------------------------------------------- shares of a GPU


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ("{gpus_per_worker: 0.5}", []),
        ("{gpus_per_worker: 1, device: cpu}", []),
        ("{workers: 2}", []),
        (
            "{gpus_per_worker: 0.5, workers: 2, tensor: 2}",
            [
                "parallel.gpus_per_worker: 0.5 would put several of the job's 4 ranks on one GPU, which NCCL refuses; "
                "use 1, or one rank"
            ],
        ),
        (
            "{gpus_per_worker: 0.5, device: cpu}",
            [
                "parallel.gpus_per_worker: 0.5 is a share of a GPU, and parallel.device is cpu; leave it out or use "
                "device: auto"
            ],
        ),
    ],
)
def test_a_share_of_a_gpu_is_for_one_rank_on_a_gpu(parallel: str, said: list[str]) -> None:
    assert [str(problem) for problem in check_job(load_job(DIGITS, [f"parallel={parallel}"]))] == said


@pytest.mark.parametrize("share", ["0", "-1", "1.5", "2", "0.001"])
def test_a_share_of_a_gpu_is_at_most_a_whole_one(share: str) -> None:
    with pytest.raises(JobError, match=r"parallel\.gpus_per_worker"):
        load_job(DIGITS, [f"parallel.gpus_per_worker={share}"])


def test_no_fingerprint_depends_on_the_share_of_a_gpu() -> None:
    batch: Any = SimpleNamespace(micro_batch=16)
    cluster = ClusterShape(1, 8.0, 1.0)
    whole, half = (plan_of(f"{{gpus_per_worker: {share}}}", cluster) for share in (1.0, 0.5))
    assert _topology(half.job, half.mesh, batch) == _topology(whole.job, whole.mesh, batch)


# ------------------------------------------------------------------------------------------------ what is left behind

EMPTY = Inventory({}, {}, cpus=2.0)


@pytest.mark.parametrize(
    ("audit", "text", "is_clean"),
    [
        (
            Audit(EMPTY, EMPTY, cpus=2.0),
            "left behind: nothing (0 actors, 0 placement groups, 2 of 2 CPUs free)",
            True,
        ),
        (
            Audit(
                Inventory({"a": "Old a"}, {"g": "old of 1 bundle"}, 1.5, 1.0),
                Inventory({"a": "Old a"}, {"g": "old of 1 bundle"}, 1.5, 1.0),
                cpus=2.0,
                gpus=1.0,
            ),
            "left behind: nothing (0 actors, 0 placement groups, 1.5 of 2 CPUs free, 1 of 1 GPUs free)",
            True,
        ),
        (
            Audit(EMPTY, Inventory({"a": "Planted here", "b": "Planted b"}, {"g": "g of 2 bundles"}, 0.5), cpus=2.0),
            "left behind: 2 actors (Planted here; Planted b), 1 placement group (g of 2 bundles), "
            "0.5 of 2 CPUs free (2 before)",
            False,
        ),
        (
            Audit(Inventory({}, {}, 2.0, 1.0), Inventory({}, {}, 2.0, 0.75), cpus=2.0, gpus=1.0),
            "left behind: 0 actors, 0 placement groups, 2 of 2 CPUs free, 0.75 of 1 GPUs free (1 before)",
            False,
        ),
        (
            Audit(Inventory({}, {}, 1.0), Inventory({}, {}, 2.0), cpus=2.0),
            "left behind: nothing (0 actors, 0 placement groups, 2 of 2 CPUs free (1 before))",
            True,
        ),
    ],
)
def test_what_an_audit_says(audit: Audit, text: str, is_clean: bool) -> None:
    assert (audit.text(), audit.is_clean) == (text, is_clean)


@pytest.mark.ray
def test_an_audit_finds_what_was_left_in_ray_and_nothing_once_it_is_gone(tmp_path: Path) -> None:
    class Planted:  # local, so that Ray sends its code along
        def answer(self) -> int:
            return 42

    with ray_session("local", tmp_path):
        before = take_inventory()
        assert (before.actors, before.groups, before.cpus) == ({}, {}, local_cluster().cpus)

        planted = ray.remote(num_cpus=0.25)(Planted).options(name="there").remote()
        group = ray.util.placement_group([{"CPU": 0.25}, {"CPU": 0.25}], name="group")
        ray.get([planted.answer.remote(), group.ready()])
        found = before.left_behind(timeout_s=0)
        assert (found.actors, found.groups, found.is_clean) == (["Planted there"], ["group of 2 bundles"], False)

        ray.kill(planted)
        ray.util.remove_placement_group(group)
        free = f"{before.cpus:.4g} of {before.cpus:.4g} CPUs free"
        assert before.left_behind().text() == f"left behind: nothing (0 actors, 0 placement groups, {free})"
