"""What temper's step loop costs over a hand-written DeepSpeed loop: same model, data, DeepSpeed configuration, one run.

    python benchmarks/step_loop.py [--repeats 31] [--steps 40] [--workers 1]

Both loops run in the same gloo ranks, in turns and in short blocks, so that whatever else the machine does hits both.
One rank is the default, since the loop's cost is a rank's own and waiting for another rank only adds noise to it.
Each block trains `--steps` steps; the first steps of a block are not counted. Printed are the medians over the blocks
and the median ratio of neighbouring blocks, with its quartiles; the last line is JSON. temper's loop is the real
`temper.loop.train` with the real engine, data iterator and reporter; what is left out on both sides is what happens
between steps: evaluation, checkpoints, Ray's transport of a report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranks import run_ranks
from temper.config.schema import JobConfig
from temper.data.batches import train_batches
from temper.data.sources import load_splits
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.engine.deepspeed_setup import prepare
from temper.loop import Calendar, Reporter, TrainState, train
from temper.losses import build_loss
from temper.models.build import build_model
from temper.optim import build_optimizer
from temper.parallel.groups import build_groups
from temper.plan.deepspeed_config import deepspeed_config
from temper.plan.facts import data_facts
from temper.plan.mesh import MeshPlan, plan_batch
from temper.plan.peaks import Speed
from temper.schedules import build_schedule

WARM_UP = 5
# Widths of an MLP, small to large; the target holds for steps of 5 ms and more.
SIZES = {"small": [128, 128], "medium": [384, 384], "large": [1024, 768]}


def build_job(hidden: list[int], workers: int) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "step_loop",
            "model": {"kind": "mlp", "hidden": hidden},
            "data": {"kind": "synthetic", "shape": [1, 16, 16], "global_batch": 128, "train_examples": 4096},
            "optimizer": {"kind": "adamw", "lr": 1.0e-3, "clip_norm": 1.0},
            "parallel": {"workers": workers, "zero": 2, "cpus_per_worker": 0.5},
            "budget": {"steps": 1_000_000},
        }
    )


class Contest:
    """One model size: the same initial network twice, once in each loop, on the same batches."""

    def __init__(self, hidden: list[int], rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        self.job = build_job(hidden, workers)
        self.facts = data_facts(self.job.data, Path.cwd())
        self.split = load_splits(self.job.data, Path.cwd(), self.facts)["train"]
        self.batch, self.mesh = plan_batch(128, workers), MeshPlan(workers, 1, "cpu")
        self.loss = build_loss(self.job.loss)
        self.engine = DeepSpeedEngine(
            self._model(), self.loss, self.job, self.batch, self.mesh, build_groups(workers), self._config()
        )
        self.by_hand = self._engine_by_hand()

    def _model(self) -> nn.Module:
        return build_model(self.job.model, self.facts, 0)

    def _config(self) -> dict[str, Any]:
        trainable = sum(param.numel() for param in self._model().parameters())
        return deepspeed_config(self.job, self.batch, self.mesh, trainable)

    def _engine_by_hand(self) -> Any:
        import deepspeed

        model = self._model()
        optimizer = build_optimizer(self.job.optimizer, model.parameters())
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._config(), dist_init_required=False
        )
        return engine

    def _batches(self, steps: int) -> Iterator[Any]:
        return train_batches(
            self.job.data,
            self.split,
            self.facts,
            seed=0,
            batch=self.batch,
            rank=self.rank,
            world_size=self.workers,
            first_step=0,
            last_step=steps,
        )

    def run_by_hand(self, steps: int) -> float:
        """Milliseconds a step of the loop as DeepSpeed's documentation has it, keeping each loss."""
        losses: list[Tensor] = []
        started = 0.0
        for number, (batch, _) in enumerate(self._batches(steps)):
            if number == WARM_UP:
                started = time.perf_counter()
            loss = nn.functional.cross_entropy(self.by_hand(batch.inputs), batch.targets)
            self.by_hand.backward(loss)
            self.by_hand.step()
            losses.append(loss.detach())
        return (time.perf_counter() - started) * 1000 / (steps - WARM_UP)

    def run_temper(self, steps: int) -> float:
        """Milliseconds a step of `temper.loop.train`."""
        marks: list[float] = []
        reporter = Reporter(
            lambda records: None,
            lambda: False,
            first_step=0,
            rank=self.rank,
            world_size=self.workers,
            speed=Speed(128),
            record_every=1,
            device=torch.device("cpu"),
        )
        factor = build_schedule(self.job.optimizer.schedule, steps)

        def batches() -> Iterator[Any]:
            for number, item in enumerate(self._batches(steps)):
                if number == WARM_UP:
                    marks.append(time.perf_counter())
                yield item

        train(
            self.engine,
            batches(),
            TrainState(),
            calendar=Calendar(steps + 1, 0, 0),
            lr_at=lambda applied: self.job.optimizer.lr * factor(applied),
            seed=0,
            rank=self.rank,
            reporter=reporter,
            evaluate=lambda step: {},
            save=lambda state: None,
        )
        return (time.perf_counter() - marks[0]) * 1000 / (steps - WARM_UP)


def contest(rank: int, workers: int, repeats: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds a step of each block, by size and loop."""
    prepare("cpu")
    results = {}
    for name, hidden in SIZES.items():
        pair = Contest(hidden, rank, workers)
        blocks: dict[str, list[float]] = {"by hand": [], "temper": []}
        for repeat in range(repeats + 1):
            runs = [("by hand", pair.run_by_hand), ("temper", pair.run_temper)]
            for kind, run in runs if repeat % 2 else reversed(runs):
                dist.barrier()
                milliseconds = run(steps)
                if repeat > 0:  # the first block of each is for caches
                    blocks[kind].append(milliseconds)
        results[name] = blocks
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    results = run_ranks(contest, options.workers, options.workers, options.repeats, options.steps)[0]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"ZeRO-2, fp32, ranks: {options.workers}"
    )
    print(f"{'step':>6}  {'by hand':>10}  {'temper':>10}  {'ratio':>6}  quartiles of the ratio")
    summary = {}
    for name, blocks in results.items():
        by_hand, ours = statistics.median(blocks["by hand"]), statistics.median(blocks["temper"])
        pairs = [mine / other for mine, other in zip(blocks["temper"], blocks["by hand"], strict=True)]
        first, ratio, third = statistics.quantiles(pairs, n=4)
        print(f"{name:>6}  {by_hand:7.2f} ms  {ours:7.2f} ms  {ratio:6.3f}  {first:.3f} … {third:.3f}")
        summary[name] = {"by_hand_ms": by_hand, "temper_ms": ours, "ratio": ratio, "quartiles": [first, third]}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
