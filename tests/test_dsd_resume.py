"""A job of several phases, killed with -9 in each of them and exactly at their borders, ends with the same bits; on
another number of workers with the same masks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from distributed import start_server
from temper import worker
from temper.checkpoint import MASK, MASTER, CheckpointReader, check_checkpoint, list_checkpoints, model_state
from temper.config.schema import JobConfig
from temper.files import read_json
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import ClusterShape
from temper.run_folder import PHASE_MANIFEST, WorkerSpec
from test_resume import assert_same

PHASES = ["dense", "sparse-1", "redense-1", "sparse-2", "redense-2"]
STEPS = 6  # of each phase; a checkpoint every 2
SHARES = {"sparse-1": 0.5, "sparse-2": 0.25}


@dataclass(frozen=True)
class Kill:
    """SIGKILL of rank `rank`, `before` or after the `turn`-th call of a method of the worker in a phase."""

    method: str
    phase: str
    before: bool
    turn: int = 1
    rank: int = 0

    def __str__(self) -> str:
        when = "before" if self.before else "after"
        return f"{when} {self.method.strip('_')} {self.turn} of {self.phase}, rank {self.rank}"


KILLS = [
    Kill("_save", "dense", before=False, turn=1),
    # The border: the last checkpoint is written, the phase is not yet called complete; then it is; then the masks are
    # chosen, and no checkpoint holds them.
    Kill("_finish", "dense", before=True),
    Kill("_enter", "sparse-1", before=True, rank=1),
    Kill("_enter", "sparse-1", before=False),
    Kill("_save", "sparse-1", before=False, turn=1, rank=1),
    Kill("_save", "sparse-1", before=True, turn=3),
    Kill("_finish", "sparse-1", before=True),
    Kill("_enter", "redense-1", before=False, rank=1),
    Kill("_save", "redense-1", before=True, turn=2),
    Kill("_enter", "sparse-2", before=False),
    Kill("_save", "sparse-2", before=False, turn=2),
    Kill("_enter", "redense-2", before=True),
]


def plan(folder: Path, **parallel: Any) -> Plan:
    """fp16 under a scale that grows, AdamW with kept moments, dropout, batch norm: all that has state."""
    job = {
        "name": "phases",
        "model": {"kind": "cnn", "channels": [4, 6], "hidden": 12},
        "data": {"kind": "digits", "global_batch": 32},
        "optimizer": {"kind": "adamw", "lr": 3.0e-3, "schedule": {"kind": "cosine", "warmup_steps": 2}},
        "precision": {"dtype": "fp16", "initial_scale": 1024.0, "scale_window": 4},
        "parallel": {"workers": 2, "zero": 2, "cpus_per_worker": 0.5, **parallel},
        "budget": {"steps": STEPS, "checkpoint_every": 2},
        "dsd": {
            "rounds": [
                {"sparsity": SHARES["sparse-1"], "sparse_steps": STEPS, "redense_steps": STEPS},
                {"sparsity": SHARES["sparse-2"], "sparse_steps": STEPS, "redense_steps": STEPS},
            ],
            "optimizer_state": "kept",
        },
        "storage": str(folder),
    }
    shape = ClusterShape(nodes=1, cpus=4.0, gpus=0.0)
    return build_plan(JobConfig.model_validate(job), shape, Path.cwd())


def moved(plan: Plan, folder: Path) -> Plan:
    """The same plan in another storage."""
    return replace(plan, job=plan.job.model_copy(update={"storage": str(folder)}))


def run(plan: Plan, kill: Kill | None = None) -> None:
    """One attempt on all ranks."""
    pending = tuple(phase for phase in plan.phases if not (plan.phase_folder(phase) / PHASE_MANIFEST).exists())
    for phase in pending:
        plan.phase_folder(phase).mkdir(parents=True, exist_ok=True)
    plan.run_folder.mkdir(parents=True, exist_ok=True)
    start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = plan.mesh.world_size
    arguments = (ranks, port, WorkerSpec(plan, pending, ()), kill)
    context = mp.start_processes(_rank, args=arguments, nprocs=ranks, join=False, start_method="forkserver")
    for process in context.processes:
        process.join()
    codes = [process.exitcode for process in context.processes]
    if kill is None:
        assert codes == [0] * ranks, (plan.run_folder / "logs" / "rank-0.log").read_text()[-3000:]
    else:
        assert codes[kill.rank] == -signal.SIGKILL, "it came to the place where it is killed"


def _rank(rank: int, ranks: int, port: int, spec: WorkerSpec, kill: Kill | None) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    if kill is not None and kill.rank == rank:
        _arm(kill)
    worker.work(spec, lambda phase, records: None)


def _arm(kill: Kill) -> None:
    """Makes this process die at its place."""
    method, calls = getattr(worker._Worker, kill.method), 0

    def deadly(self: Any, phase: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += phase.name == kill.phase
        here = phase.name == kill.phase and calls == kill.turn
        if here and kill.before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(self, phase, *arguments)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(worker._Worker, kill.method, deadly)


def ends(plan: Plan) -> dict[str, Path]:
    """The last checkpoint of each phase."""
    found = {}
    for phase in plan.phases:
        manifest = read_json(plan.phase_folder(phase) / PHASE_MANIFEST)
        found[phase.name] = plan.phase_folder(phase) / manifest["checkpoint"]
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    whole = plan(tmp_path_factory.mktemp("unbroken"))
    run(whole)
    return whole


@pytest.fixture(scope="module")
def one_worker(unbroken: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan that goes on with what `unbroken` has stored, on one rank and at another ZeRO stage."""
    alone = plan(tmp_path_factory.mktemp("alone"), workers=1, zero=1)
    same = zip(alone.phases, unbroken.phases, strict=True)
    return replace(alone, phases=tuple(replace(own, fingerprint=other.fingerprint) for own, other in same))


def test_every_phase_has_its_checkpoints_and_its_masks(unbroken: Plan) -> None:
    assert [phase.name for phase in unbroken.phases] == PHASES
    for phase in unbroken.phases:
        manifest = read_json(unbroken.phase_folder(phase) / PHASE_MANIFEST)
        reader = CheckpointReader(ends(unbroken)[phase.name])
        assert manifest["steps"] == STEPS
        assert reader.step == phase.last_step
        assert check_checkpoint(reader.folder) is None
        masked = SHARES.get(phase.name)
        assert reader.names(MASK) == (list(phase.pruning.layers) if phase.pruning else [])
        for name in reader.names(MASK):
            weight, mask = reader.full(MASTER, name), reader.full(MASK, name)
            assert torch.equal(weight == 0, ~mask)
            assert int((~mask).sum()) == round(mask.numel() * masked)


def test_the_learning_rate_restarts_in_each_phase(unbroken: Plan) -> None:
    rates = []
    for phase in unbroken.phases:
        folders = list_checkpoints(unbroken.phase_folder(phase) / "checkpoints")
        records = [record for folder in folders for record in CheckpointReader(folder).records()]
        rates.append({record["step"]: record["metrics"]["train/lr"] for record in records})
    assert [min(steps) for steps in rates[1:]] == [phase.first_step + 3 for phase in unbroken.phases[1:]]
    for phase, steps, base in zip(unbroken.phases, rates, [3e-3, 3e-3, 3e-4, 3e-3, 3e-4], strict=True):
        # Warm-up ends with the second step; the third is the first at the full rate, whatever the phase.
        assert steps[phase.first_step + 3] == pytest.approx(base)
        assert steps[phase.first_step + 4] == pytest.approx(rates[0][4] * base / 3e-3)


# Each kill is an attempt of two processes and one more; the rest is a slow proof of the same kind.
QUICK = (1, 3, 5, 8)


@pytest.mark.parametrize(
    "kill",
    [pytest.param(kill, marks=() if place in QUICK else pytest.mark.slow) for place, kill in enumerate(KILLS)],
    ids=str,
)
def test_killed_anywhere_it_ends_with_the_same_bits(unbroken: Plan, tmp_path: Path, kill: Kill) -> None:
    # What comes before the phase is taken over, so that only what is killed is computed again.
    broken = moved(unbroken, tmp_path)
    for phase in broken.phases[: PHASES.index(kill.phase)]:
        if not (kill.method == "_enter" and kill.before):
            shutil.copytree(unbroken.phase_folder(phase), broken.phase_folder(phase))
    run(broken, kill)
    run(broken)
    for name, folder in ends(broken).items():
        assert_same(ends(unbroken)[name], folder)


@pytest.mark.parametrize(
    "phase",
    [pytest.param(name, marks=() if name in ("sparse-1", "redense-1") else pytest.mark.slow) for name in PHASES],
)
def test_another_number_of_workers_goes_on_with_the_same_masks(
    unbroken: Plan, one_worker: Plan, tmp_path: Path, phase: str
) -> None:
    """From the last checkpoint but one of each phase, on one rank instead of two."""
    place = PHASES.index(phase)
    alone = moved(one_worker, tmp_path)
    for item in unbroken.phases[: place + 1]:
        shutil.copytree(unbroken.phase_folder(item), alone.phase_folder(item))
    begun = alone.phase_folder(alone.phases[place])
    (begun / PHASE_MANIFEST).unlink()
    shutil.rmtree(list_checkpoints(begun / "checkpoints")[-1])
    run(alone)
    masks, expected = CheckpointReader(ends(alone)[phase]), CheckpointReader(ends(unbroken)[phase])
    assert masks.names(MASK) == expected.names(MASK)
    for name in masks.names(MASK):
        assert torch.equal(masks.full(MASK, name), expected.full(MASK, name))
        assert torch.equal(masks.full(MASTER, name) == 0, ~masks.full(MASK, name))
    found, there = model_state(masks), model_state(expected)
    for name, value in there.items():
        assert (found[name].double() - value.double()).norm() <= 0.02 * value.double().norm(), name
