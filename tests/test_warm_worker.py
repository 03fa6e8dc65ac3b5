"""A rank that outlives the runs that it serves: each of them ends with the bits that it has in processes of its own,
also where it was stopped on the way, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.modules.module as torch_module

from distributed import run_distributed
from temper import worker
from temper.checkpoint import list_checkpoints
from temper.config.schema import JobConfig
from temper.loop import Interrupted, Record
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import ClusterShape
from temper.run_folder import PHASE_MANIFEST, WorkerSpec
from temper.worker import Port, WarmWorker
from test_distill_worker import plan as student
from test_distill_worker import prepare
from test_dsd_resume import ends, moved, run
from test_resume import assert_same

STEPS = 5
ROUND = {"sparsity": 0.5, "sparse_steps": STEPS, "redense_steps": STEPS}
FP16 = {"dtype": "fp16", "initial_scale": 2.0**22, "scale_window": 3}  # some steps are skipped, and the scale grows
SHAPE = ClusterShape(nodes=1, cpus=4.0, gpus=0.0)


@dataclass(frozen=True)
class Storage:
    """Where plans are made, so that each model is looked at once; they are trained elsewhere."""

    folder: Path

    def plan(self, folder: Path, *, parallel: dict[str, Any] | None = None, **sections: Any) -> Plan:
        """A job with dropout, moments and everything else that a run before could get into, trained in `folder`."""
        job = {
            "name": "warm",
            "model": {"kind": "cnn", "channels": [4, 6], "hidden": 12, "dropout": 0.25},
            "data": {"kind": "digits", "global_batch": 32},
            "optimizer": {"kind": "adamw", "lr": 3.0e-3},
            "parallel": {"cpus_per_worker": 0.5, **(parallel or {})},
            "budget": {"steps": STEPS, "checkpoint_every": 2, "keep_checkpoints": 9},
            "storage": str(self.folder),
            **sections,
        }
        return moved(build_plan(JobConfig.model_validate(job), SHAPE, Path.cwd()), folder)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(tmp_path_factory.mktemp("planned"))


@pytest.fixture(scope="module")
def plain(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Trained in a process of its own, as everything whose bits are compared with."""
    alone = storage.plan(tmp_path_factory.mktemp("plain"))
    run(alone)
    return alone


@pytest.fixture(scope="module")
def pruned(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    alone = storage.plan(tmp_path_factory.mktemp("pruned"), precision=FP16, dsd={"rounds": [ROUND]})
    run(alone)
    return alone


def spec_of(plan: Plan) -> WorkerSpec:
    """What is still to be trained, in folders that are there."""
    pending = tuple(phase for phase in plan.phases if not (plan.phase_folder(phase) / PHASE_MANIFEST).exists())
    for folder in (plan.run_folder, *map(plan.phase_folder, pending)):
        folder.mkdir(parents=True, exist_ok=True)
    return WorkerSpec(plan, pending, ())


def serve(rank: int, plans: Sequence[Plan]) -> None:
    """One run after the other in this process."""
    rank_for_all = WarmWorker("cpu")
    for each in plans:
        rank_for_all.work(spec_of(each), Port())


def assert_same_run(one: Plan, other: Plan) -> None:
    assert [phase.name for phase in one.phases] == list(ends(other))
    for name, folder in ends(one).items():
        assert_same(folder, ends(other)[name])


# -------------------------------------------------------------------------------------------------- one after the other


def test_a_run_after_others_has_the_bits_of_one_alone(plain: Plan, pruned: Plan, tmp_path: Path) -> None:
    """fp16 before fp32, DSD before a plain job, distillation before none; and the other way round."""
    distilled = student(tmp_path / "taught", precision=FP16)
    prepare(distilled)
    alone = [pruned, plain, distilled, plain, pruned]
    warm = [moved(each, tmp_path / str(place)) for place, each in enumerate(alone)]
    run_distributed(serve, 1, warm)
    run(distilled)
    for expected, found in zip(alone, warm, strict=True):
        assert_same_run(expected, found)


MESHES: dict[str, dict[str, Any]] = {
    "two stages": {"parallel": {"pipeline": 2, "micro_batch": 8}},
    "two replicas, ZeRO-2": {"parallel": {"workers": 2, "zero": 2}, "precision": FP16},
    "ZeRO-3": {"parallel": {"workers": 2, "zero": 3}},
    "split layers": {"parallel": {"tensor": 2}, "precision": FP16},
    "ZeRO-1, offloaded": {"parallel": {"workers": 2, "zero": 1, "offload": "cpu"}, "precision": {"dtype": "bf16"}},
}


@pytest.mark.parametrize(
    "names",
    [
        ("two stages", "two replicas, ZeRO-2"),
        pytest.param(("two replicas, ZeRO-2", "ZeRO-3", "two stages"), marks=pytest.mark.slow),
        pytest.param(("ZeRO-3", "split layers", "two replicas, ZeRO-2"), marks=pytest.mark.slow),
        pytest.param(("ZeRO-1, offloaded", "two stages", "split layers", "ZeRO-3"), marks=pytest.mark.slow),
    ],
    ids=" > ".join,
)
def test_a_mesh_after_another_has_the_bits_of_one_alone(names: Sequence[str], storage: Storage, tmp_path: Path) -> None:
    alone = [storage.plan(tmp_path / "alone", **MESHES[name]) for name in names]
    warm = [moved(each, tmp_path / "warm") for each in alone]
    run_distributed(serve, 2, warm)
    # The first one had no other before it.
    for expected, found in list(zip(alone, warm, strict=True))[1:]:
        run(expected)
        assert_same_run(expected, found)


@pytest.mark.slow
def test_a_sharded_teacher_leaves_the_next_run_alone(storage: Storage, tmp_path: Path) -> None:
    parallel = {"workers": 2, "zero": 3, "cpus_per_worker": 0.5}
    distilled = student(tmp_path / "taught", parallel=parallel, distill={"placement": "sharded"})
    prepare(distilled)
    replicas = storage.plan(tmp_path / "alone", parallel={"workers": 2, "zero": 2})
    alone = [distilled, replicas, distilled]
    warm = [moved(each, tmp_path / str(place)) for place, each in enumerate(alone)]
    run_distributed(serve, 2, warm)
    run(distilled)
    run(replicas)
    for expected, found in zip(alone, warm, strict=True):
        assert_same_run(expected, found)


# ------------------------------------------------------------------------------------------------------------ decisions


class StopAt(Port):
    """Asks for a stop when step `stop` was reported."""

    def __init__(self, decisive: Iterable[int] = (), stop: int = 0) -> None:
        self.decisive = frozenset(decisive)
        self._stop = stop
        self.steps: list[int] = []

    def report(self, phase: str, records: list[Record]) -> None:
        self.steps += [record["step"] for record in records]

    def stop_requested(self) -> bool:
        return self._stop in self.steps


def stop_and_go(rank: int, stopped: Plan, decided: Plan) -> list[tuple[str, list[int]]]:
    """`stopped` is stopped within a phase and at the end of one, and `decided` goes on after each of its steps."""
    warm, told = WarmWorker("cpu"), []

    def work(plan: Plan, port: StopAt) -> None:
        try:
            warm.work(spec_of(plan), port)
            told.append(("done", port.steps))
        except Interrupted:
            told.append(("interrupted", port.steps))

    work(stopped, StopAt([3], stop=3))
    work(decided, StopAt(range(1, 3 * STEPS)))
    work(stopped, StopAt([STEPS], stop=STEPS))
    work(stopped, StopAt())
    port = StopAt()
    warm.work(WorkerSpec(decided, decided.phases, ()), port)
    return [*told, ("done", port.steps)]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_at_a_decision_goes_on_to_the_same_bits(
    workers: int, storage: Storage, pruned: Plan, tmp_path: Path
) -> None:
    alone = pruned
    if workers > 1:
        alone = storage.plan(tmp_path, parallel={"workers": 2, "zero": 1}, dsd={"rounds": [ROUND]})
        run(alone)
    stopped, decided = moved(alone, tmp_path / "stopped"), moved(alone, tmp_path / "decided")
    told, *others = run_distributed(stop_and_go, workers, stopped, decided)
    assert told == [
        ("interrupted", [1, 2, 3]),
        ("done", list(range(1, 16))),
        # What the checkpoint at the stop has is told again, since it may not have been heard.
        ("interrupted", [3, 4, 5]),
        ("done", list(range(6, 16))),
        # So is, of phases that are complete, what came after the last checkpoint but one.
        ("done", [5, 9, 10, 15]),
    ]
    # Only rank 0 hears the records, and its answer is that of all.
    assert others == [[(end, []) for end, _ in told]] * (workers - 1)
    saved = list_checkpoints(spec_of(stopped).checkpoints(stopped.phases[0]))
    assert [folder.name for folder in saved] == [f"step-{step:08}" for step in (2, 3, 4, 5)]
    assert_same_run(alone, stopped)
    assert_same_run(alone, decided)


# --------------------------------------------------------------------------------------------------------- nothing left


def left() -> dict[str, Any]:
    """What a process has that a run could add to."""
    import deepspeed

    gc.collect()
    registers = [value for name, value in vars(torch_module).items() if name.startswith("_global_")]
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "Python's threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "engines": sum(isinstance(each, deepspeed.DeepSpeedEngine) for each in gc.get_objects()),
        "modules": sum(isinstance(each, torch.nn.Module) for each in gc.get_objects()),
        "tensors": sum(type(each) is torch.Tensor for each in gc.get_objects()),
        "hooks": sum(len(register) for register in registers if isinstance(register, dict)),
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "linear": torch.nn.functional.linear.__module__,
    }


def serve_counting(rank: int, plans: Sequence[Plan], warm_up: int) -> tuple[Any, Any, int]:
    """What there is after the first `warm_up` runs and after all; and how often data were loaded."""
    rank_for_all = WarmWorker("cpu")
    with mock.patch.object(worker, "load_splits", wraps=worker.load_splits) as loading:
        counts = []
        for part in (plans[:warm_up], plans[warm_up:]):
            for each in part:
                rank_for_all.work(spec_of(each), Port())
            counts.append(left())
    return counts[0], counts[1], loading.call_count


def check_nothing_grows(plans: Sequence[Plan], warm_up: int) -> None:
    for before, after, loaded in run_distributed(serve_counting, plans[0].mesh.world_size, plans, warm_up):
        assert after == before
        assert before["engines"] == before["modules"] == 0
        assert loaded == 1


TINY = {"steps": 1, "checkpoint_every": 1}
PRECISIONS = ({"dtype": "fp32"}, FP16, {"dtype": "bf16"})


def test_nothing_is_left_after_many_runs(storage: Storage, tmp_path: Path) -> None:
    plans = [storage.plan(tmp_path, seed=seed, precision=PRECISIONS[seed % 3], budget=TINY) for seed in range(15)]
    check_nothing_grows(plans, warm_up=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_nothing_is_left_of_a_mesh(name: str, storage: Storage, tmp_path: Path) -> None:
    """DeepSpeed makes process groups for an engine, whose threads and connections would be there for ever."""
    plans = [storage.plan(tmp_path, seed=seed, budget=TINY, **MESHES[name]) for seed in range(6)]
    check_nothing_grows(plans, warm_up=2)


@pytest.mark.slow
def test_nothing_is_left_of_a_teacher(tmp_path: Path) -> None:
    parallel = {"workers": 2, "zero": 3, "cpus_per_worker": 0.5}
    more = {"budget": TINY, "parallel": parallel, "distill": {"placement": "sharded"}}
    plans = [student(tmp_path, seed=seed, **more) for seed in range(5)]
    prepare(plans[0])
    check_nothing_grows(plans, warm_up=2)


class Failing(Port):
    def report(self, phase: str, records: list[Record]) -> None:
        if records:
            raise ValueError("the disk is full")


def fail_and_serve(rank: int, failing: Sequence[Plan], sound: Plan) -> list[dict[str, Any]]:
    rank_for_all, counts = WarmWorker("cpu"), []
    for each in failing:
        with pytest.raises(ValueError, match="the disk is full"):
            rank_for_all.work(spec_of(each), Failing())
        counts.append(left())
    rank_for_all.work(spec_of(sound), Port())
    return counts


def test_a_run_that_fails_leaves_the_next_one_alone(storage: Storage, plain: Plan, tmp_path: Path) -> None:
    failing = [storage.plan(tmp_path, seed=seed, precision=FP16) for seed in (1, 2)]
    sound = moved(plain, tmp_path / "warm")
    ((first, second),) = run_distributed(fail_and_serve, 1, failing, sound)
    assert first == second
    assert first["engines"] == first["modules"] == 0
    assert_same_run(plain, sound)
