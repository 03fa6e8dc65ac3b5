"""What holding a mask costs: the time of a sparse step over that of a dense one, by one engine in turns.

    python benchmarks/dsd_step.py [--repeats 51] [--steps 8] [--workers 1] [--sparsity 0.3]

One engine trains short blocks of steps, in turns without masks and with those of a sparse phase that begins where the
dense block began. So both have the same memory and the same batch, and whatever else the machine does hits both. A
block counts with the median of its steps, without the first one, which finds nothing in the caches. Printed are the
medians over the blocks and the median ratio of neighbouring blocks, with its quartiles; the last line is JSON. At the
end of each case the pruned weights are checked to be zero.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ranks import run_ranks
from temper.checkpoint import MASK, MASTER, CheckpointReader, write_manifest, write_shards
from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.engine.base import EngineState
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.engine.deepspeed_setup import prepare
from temper.loop import TrainState
from temper.losses import build_loss
from temper.models.build import build_model
from temper.parallel.groups import build_groups
from temper.plan.deepspeed_config import deepspeed_config
from temper.plan.facts import data_facts
from temper.plan.mesh import MeshPlan, plan_batch
from temper.plan.phases import PhasePlan, Pruning
from temper.techniques.dsd.border import begin_phase

BATCH = 128
LR = 1.0e-3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": LR, "momentum": 0.9, "weight_decay": 5.0e-4},
    "adamw": {"kind": "adamw", "lr": LR, "weight_decay": 1.0e-2},
}


@dataclass(frozen=True)
class Case:
    model: str
    optimizer: str
    zero: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.model}, {self.optimizer}, ZeRO-{self.zero}, {self.dtype}"


CASES = [Case(*values) for values in itertools.product(("cnn", "mlp"), OPTIMIZERS, (0, 2), ("fp32", "bf16"))]


def model_section(name: str) -> dict[str, Any]:
    """The network of the shipped jobs, and a perceptron with ten times its parameters."""
    if name == "mlp":
        return {"kind": "mlp", "hidden": [768, 512]}
    return load_job(Path(__file__).parent.parent / "jobs" / "dsd" / "dsd_30.yaml").model.model_dump()


def build_job(case: Case, workers: int) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "dsd_step",
            "model": model_section(case.model),
            "data": {"kind": "synthetic", "shape": [1, 28, 28], "global_batch": BATCH},
            "optimizer": OPTIMIZERS[case.optimizer],
            "precision": {"dtype": case.dtype},
            "parallel": {"workers": workers, "zero": case.zero},
            "budget": {"steps": 1},
        }
    )


class Contest:
    """One case: an engine, and the checkpoint with which a dense and a sparse block begin."""

    def __init__(self, case: Case, rank: int, workers: int, sparsity: float, folder: Path) -> None:
        job = build_job(case, workers)
        batch, mesh = plan_batch(BATCH, workers), MeshPlan(workers, 1, "cpu")
        model = build_model(job.model, data_facts(job.data, Path.cwd()), 0)
        layers = {name: sparsity for name, param in model.named_parameters() if param.dim() > 1}
        trainable = sum(param.numel() for param in model.parameters())
        config = deepspeed_config(job, batch, mesh, trainable)
        self.engine = DeepSpeedEngine(model, build_loss(job.loss), job, batch, mesh, build_groups(workers), config)
        generator = torch.Generator().manual_seed(rank)
        self.inputs = torch.randn(batch.rank_batch, 1, 28, 28, generator=generator)
        self.targets = torch.randint(10, (batch.rank_batch,), generator=generator)
        self._step()  # so that there are moments to be saved
        write_shards(folder, rank, self.engine.shards())
        dist.barrier()
        if rank == 0:
            scalars = {**asdict(TrainState()), "engine": asdict(self.engine.state())}
            write_manifest(folder, workers, scalars, self.engine.shapes(), [])
        dist.barrier()
        pruning = Pruning("weights", "magnitude", layers, 0)
        phase = PhasePlan("sparse-1", "sparse", 1, 1, LR, "", {}, pruning)
        self.starts = {"dense": CheckpointReader(folder), "sparse": begin_phase(folder, phase)}

    def _step(self) -> None:
        self.engine.step(self.inputs, self.targets, lr=LR, seed=0)

    def run(self, kind: str, steps: int) -> float:
        """Milliseconds of a step, the median of `steps`."""
        start = self.starts[kind]
        self.engine.load(start, EngineState(**start.state["engine"]))
        dist.barrier()
        self._step()
        return statistics.median(milliseconds(self._step) for _ in range(steps))

    def num_pruned(self) -> int:
        """How many of this rank's masters a mask holds at zero. Raises RuntimeError where one is not."""
        masked = [shard.tensors for shard in self.engine.shards() if MASK in shard.tensors]
        pruned = [tensors[MASTER][~tensors[MASK]] for tensors in masked]
        if any(bool(values.any()) for values in pruned):
            raise RuntimeError("a pruned weight has moved")
        return sum(len(values) for values in pruned)


def milliseconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1000


def contest(rank: int, workers: int, repeats: int, steps: int, sparsity: float, storage: str) -> dict[str, Any]:
    """By case: milliseconds a step of each block, dense and sparse, and how many weights were pruned."""
    prepare("cpu")
    results = {}
    for case in CASES:
        pair = Contest(case, rank, workers, sparsity, Path(storage) / case.name)
        blocks: dict[str, list[float]] = {"dense": [], "sparse": []}
        for repeat in range(repeats + 1):
            for kind in ("dense", "sparse") if repeat % 2 else ("sparse", "dense"):
                time_ms = pair.run(kind, steps)
                if repeat > 0:  # the first block of each is for caches
                    blocks[kind].append(time_ms)
        pair.run("sparse", 1)
        results[case.name] = {**blocks, "pruned": pair.num_pruned()}
    return results


def summarize(dense: list[float], sparse: list[float]) -> dict[str, Any]:
    """Medians, and the median ratio of neighbouring blocks with its quartiles."""
    ratios = [ours / other for ours, other in zip(sparse, dense, strict=True)]
    first, ratio, third = statistics.quantiles(ratios, n=4)
    times = {"dense_ms": statistics.median(dense), "sparse_ms": statistics.median(sparse)}
    return {**times, "ratio": ratio, "quartiles": [first, third]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sparsity", type=float, default=0.3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        arguments = (options.workers, options.repeats, options.steps, options.sparsity, storage)
        found = run_ranks(contest, options.workers, *arguments)[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; ranks: {options.workers}")
    print(f"{'':<26}  {'pruned':>7}  {'dense':>10}  {'sparse':>10}  {'ratio':>6}  quartiles of the ratio")
    summary = {}
    for name, blocks in found.items():
        row = summary[name] = {**summarize(blocks["dense"], blocks["sparse"]), "pruned": blocks["pruned"]}
        times = f"{row['dense_ms']:7.2f} ms  {row['sparse_ms']:7.2f} ms"
        first, third = row["quartiles"]
        print(f"{name:<26}  {row['pruned']:7}  {times}  {row['ratio']:6.3f}  {first:.3f} … {third:.3f}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
