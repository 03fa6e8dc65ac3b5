"""What a teacher costs: steps that distil from the cache beside steps on labels, and steps with a live teacher beside a
loop written by hand.

    python benchmarks/distill_step.py [--repeats 31] [--steps 8] [--workers 1] [--only cached]

`cached`: one engine trains short blocks of steps, in turns on labels alone and with cached soft targets, so that both
have the same memory and the same batches. `live`: the same student and teacher twice, in temper and in a loop of torch
and DeepSpeed as one writes it, the teacher without gradients, then KL and cross entropy, in turns. temper's side is the
real loop, engine, data iterator, cache and teacher, wired as in a worker; whatever else the machine does hits both. A
block counts with the median of its steps, without the first ones. Printed are the medians over the blocks and the
median ratio of neighbouring blocks, with its quartiles; the last line is JSON.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ranks import run_ranks
from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.data.batches import Batch, DataState, train_batches
from temper.data.sources import Split, load_splits
from temper.engine.base import Technique
from temper.engine.build import build_engine
from temper.engine.deepspeed_setup import prepare
from temper.launch.teachers import plan_job
from temper.loop import Calendar, Reporter, TrainState, train
from temper.models.build import build_model
from temper.optim import build_optimizer
from temper.parallel.groups import build_groups
from temper.plan.build import Plan
from temper.plan.facts import data_facts
from temper.plan.mesh import ClusterShape
from temper.plan.peaks import Speed
from temper.techniques.distill.cache import write_piece
from temper.techniques.distill.cache_files import complete_cache, missing_pieces, plan_cut
from temper.techniques.distill.signals import Signals, Taught
from temper.worker import Parts, build_parts

JOBS = Path(__file__).parent.parent / "jobs"
BATCH, EXAMPLES, CLASSES = 128, 16_384, 10
WARM_UP = 2
TEMPERATURE, ALPHA = 4.0, 0.9
STUDENTS: dict[str, dict[str, Any]] = {
    "cnn": load_job(JOBS / "distill" / "soft_t4.yaml").model.model_dump(),
    "mlp": {"kind": "mlp", "hidden": [768, 512]},
    "resnet8": {"kind": "resnet", "depth": 8},
}


@dataclass(frozen=True)
class Case:
    source: str
    student: str
    zero: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.source}, {self.student}, ZeRO-{self.zero}, {self.dtype}"


CASES = [Case(*values) for values in itertools.product(("cached", "live"), STUDENTS, (0, 2), ("fp32", "bf16"))]
SIDES = {"cached": ("labels", "cached"), "live": ("by hand", "live")}


# ---------------------------------------------------------------------------------------------------------- the set-up


def build_job(case: Case, workers: int, storage: Path) -> JobConfig:
    teacher = load_job(JOBS / "fashion_teacher.yaml").model
    distill = {
        "teacher": {"model": teacher.model_dump(), "weights": str(storage / "teacher.safetensors")},
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
        "cache": "logits" if case.source == "cached" else "none",
    }
    return JobConfig.model_validate(
        {
            "name": "distill_step",
            "model": STUDENTS[case.student],
            "data": {
                "kind": "synthetic",
                "shape": [1, 28, 28],
                "num_classes": CLASSES,
                "global_batch": BATCH,
                "train_examples": EXAMPLES,
            },
            "optimizer": {"kind": "sgd", "lr": 1.0e-3, "momentum": 0.9},
            "precision": {"dtype": case.dtype},
            "parallel": {"workers": workers, "zero": case.zero},
            "budget": {"steps": 1_000_000},
            "distill": distill,
            "storage": str(storage),
        }
    )


def write_teacher(storage: Path, workers: int) -> None:
    """The shipped teacher with its first weights: how fast it answers does not depend on what it says."""
    job = build_job(CASES[0], workers, storage)
    model = build_model(load_job(JOBS / "fashion_teacher.yaml").model, data_facts(job.data, storage), 0)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, storage / "teacher.safetensors")


def write_cache(plan: Plan) -> None:
    """Answers that nobody gave, in the real files."""
    assert plan.distill is not None and plan.distill.cache is not None, "a case of the cache"
    cache, rows = plan.distill.cache, plan.distill.rows
    sizes = {"train": plan.data.train_examples, "test": plan.data.test_examples}
    size_of = {"asked_bytes": 2 * CLASSES, "kept_bytes": 2 * CLASSES, "pass_rows": rows}
    cuts = [plan_cut(split, count, 1, **size_of) for split, count in sizes.items()]
    generator = torch.Generator().manual_seed(0)

    def answer(rows: Tensor) -> Signals:
        return Signals((4 * torch.randn(len(rows), CLASSES, generator=generator)).half())

    for piece in missing_pieces(cache.folder, cuts):
        numbers = torch.arange(piece.first, piece.first + piece.rows)
        file = piece.file(cache.folder)
        write_piece(file, numbers, lambda rows: rows, answer, pass_rows=rows, top_k=None, features=False)
    complete_cache(cache, cuts)


def plan_cases(only: str, workers: int, storage: Path) -> dict[str, Plan]:
    """A plan for each case whose name has `only`, with all that it needs on the disk."""
    cluster = ClusterShape(nodes=1, cpus=float(workers), gpus=0.0)
    write_teacher(storage, workers)
    plans = {
        case.name: plan_job(build_job(case, workers, storage), cluster, JOBS) for case in CASES if only in case.name
    }
    for plan in plans.values():
        if plan.distill is not None and plan.distill.cache is not None:
            write_cache(plan)
    return plans


# ------------------------------------------------------------------------------------------------------------ the loops


class Stamps:
    """Hands batches on and notes when each is asked for: between two such times lies one step of any loop."""

    def __init__(self, batches: Iterator[tuple[Batch, DataState]]) -> None:
        self._batches = batches
        self._times: list[float] = []

    def __iter__(self) -> Iterator[tuple[Batch, DataState]]:
        for item in self._batches:
            self._times.append(time.perf_counter())
            yield item
        self._times.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Of a step, the median of all but the first ones."""
        return statistics.median(1000 * (end - begin) for begin, end in pairwise(self._times[WARM_UP:]))


class Contest:
    """One case: a student in temper's engine and, beside a live teacher, the same one in a loop written by hand."""

    def __init__(self, plan: Plan, split: Split, rank: int) -> None:
        self.plan, self.split, self.rank = plan, split, rank
        groups = build_groups(plan.mesh.data)
        self.parts = build_parts(plan, groups)
        self.engine = build_engine(
            build_model(plan.job.model, plan.data, 0),
            either(self.parts),
            plan.job,
            plan.batch,
            plan.mesh,
            groups,
            plan.phases[0].deepspeed,
            self.parts.taps,
        )
        self.by_hand = None if plan.distill is None or plan.distill.cache is not None else ByHand(plan)

    def run(self, side: str, first_step: int, steps: int) -> float:
        """Milliseconds of a step, of so many from `first_step` on."""
        dist.barrier()
        stamps = Stamps(self._batches(first_step, first_step + WARM_UP + steps))
        if side == "by hand":
            assert self.by_hand is not None, "a case of a live teacher"
            self.by_hand.run(stamps)
        else:
            self._run_temper(stamps, None if side == "labels" else self.parts.technique)
        return stamps.milliseconds()

    def _batches(self, first_step: int, last_step: int) -> Iterator[tuple[Batch, DataState]]:
        return train_batches(
            self.plan.job.data,
            self.split,
            self.plan.data,
            seed=0,
            batch=self.plan.batch,
            rank=self.rank,
            world_size=self.plan.mesh.world_size,
            first_step=first_step,
            last_step=last_step,
        )

    def _run_temper(self, stamps: Stamps, technique: Technique | None) -> None:
        reporter = Reporter(
            lambda records: None,
            lambda: False,
            first_step=0,
            rank=self.rank,
            world_size=self.plan.mesh.world_size,
            speed=Speed(BATCH),
            record_every=1,
            device=torch.device("cpu"),
        )
        train(
            self.engine,
            stamps,
            TrainState(),
            calendar=Calendar(10**9, 0, 0),
            lr_at=lambda applied: self.plan.job.optimizer.lr,
            seed=0,
            rank=self.rank,
            reporter=reporter,
            evaluate=lambda step: {},
            save=lambda state: None,
            technique=technique,
        )


def either(parts: Parts) -> Callable[[Any, Any], Any]:
    """The loss of a step that is taught, or of one on labels alone."""
    return lambda outputs, targets: (parts.loss if isinstance(targets, Taught) else parts.base)(outputs, targets)


class ByHand:
    """Distillation as one writes it with torch and DeepSpeed, keeping each loss."""

    def __init__(self, plan: Plan) -> None:
        import deepspeed

        assert plan.distill is not None, "there is a teacher"
        (teacher,) = plan.distill.teachers
        self.teacher = build_model(teacher.model, plan.data, 0).eval().requires_grad_(False)
        self.dtype = torch.bfloat16 if plan.job.precision.dtype == "bf16" else torch.float32
        model = build_model(plan.job.model, plan.data, 0)
        optimizer = build_optimizer(plan.job.optimizer, model.parameters())
        config = dict(plan.phases[0].deepspeed)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        self.student: Any = engine

    def run(self, batches: Stamps) -> None:
        losses = []
        for batch, _ in batches:
            inputs = batch.inputs.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                said = self.teacher(inputs)
            logits = self.student(inputs.to(self.dtype)).float()
            loss = ALPHA * softened(logits, said) + (1 - ALPHA) * F.cross_entropy(logits, batch.targets)
            self.student.backward(loss)
            self.student.step()
            losses.append(loss.detach())


def softened(logits: Tensor, said: Tensor) -> Tensor:
    ours, others = ((values / TEMPERATURE).log_softmax(-1) for values in (logits, said))
    return TEMPERATURE**2 * F.kl_div(ours, others, reduction="batchmean", log_target=True)


def contest(rank: int, plans: dict[str, Plan], repeats: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """By case: milliseconds a step of each block, on both sides."""
    prepare("cpu")
    first = next(iter(plans.values()))
    split = load_splits(first.job.data, Path(first.job.storage), first.data)["train"]
    results = {}
    for name, plan in plans.items():
        sides = SIDES[name.split(",")[0]]
        pair = Contest(plan, split, rank)
        blocks: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(repeats + 1):
            for side in sides if repeat % 2 else reversed(sides):
                time_ms = pair.run(side, repeat * (WARM_UP + steps), steps)
                if repeat > 0:  # the first block of each is for caches
                    blocks[side].append(time_ms)
        results[name] = blocks
    return results


# ------------------------------------------------------------------------------------------------------------ reporting


def summarize(others: list[float], ours: list[float]) -> dict[str, Any]:
    """Medians, and the median ratio of neighbouring blocks with its quartiles."""
    ratios = [mine / other for mine, other in zip(ours, others, strict=True)]
    first, ratio, third = statistics.quantiles(ratios, n=4)
    times = {"others_ms": statistics.median(others), "ours_ms": statistics.median(ours)}
    return {**times, "ratio": ratio, "quartiles": [first, third]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help='the cases whose names have this, e.g. "live, cnn"')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        plans = plan_cases(options.only, options.workers, Path(storage))
        found = run_ranks(contest, options.workers, plans, options.repeats, options.steps)[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; ranks: {options.workers}")
    print("labels : distilling from the cache; by hand : with a live teacher")
    print(f"{'':<30}  {'other':>10}  {'temper':>10}  {'ratio':>6}  quartiles of the ratio")
    summary = {}
    for name, blocks in found.items():
        row = summary[name] = summarize(*blocks.values())
        first, third = row["quartiles"]
        times = f"{row['others_ms']:7.2f} ms  {row['ours_ms']:7.2f} ms"
        print(f"{name:<30}  {times}  {row['ratio']:6.3f}  {first:.3f} … {third:.3f}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
