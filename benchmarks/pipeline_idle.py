"""How long pipeline stages wait, beside what the schedule makes them: (p − 1)/(m + p − 1) of p stages, m micro-batches.

    python benchmarks/pipeline_idle.py [--repeats 9] [--stages 2]

One core and one thread a stage. Every stage is an equal stack of equal layers, so that no stage waits for a slower one.
Measured in each step, from its first forward pass to the end of its last backward pass: the share of this time, summed
over the stages, in which no forward or backward pass runs. Printed are medians over the steps; the last line is JSON.
The loss must be that of the same steps in one stage. More stages than cores would measure the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any

import torch
from torch import nn

from ranks import run_ranks
from temper.config.schema import JobConfig
from temper.engine.build import build_engine
from temper.engine.deepspeed_setup import prepare
from temper.losses import build_loss
from temper.parallel.groups import build_groups
from temper.plan.deepspeed_config import deepspeed_config
from temper.plan.mesh import MeshPlan, plan_batch

MICRO_BATCHES = (1, 2, 4, 8, 16)
MICRO_BATCH, WIDTH, LAYERS_PER_STAGE, WARM_UP = 128, 1024, 4, 2


def build_net(stages: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(stages * LAYERS_PER_STAGE)]
    return nn.Sequential(*blocks)


def build_job(stages: int, micro_batches: int) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "pipeline_idle",
            "model": {"kind": "mlp"},
            "data": {"kind": "synthetic", "global_batch": MICRO_BATCH * micro_batches},
            "loss": {"kind": "mse"},
            "optimizer": {"kind": "sgd", "lr": 0.01},
            "parallel": {"pipeline": stages, "micro_batch": MICRO_BATCH},
            "budget": {"steps": 1},
        }
    )


def measure(rank: int, stages: int, repeats: int) -> dict[str, Any]:
    """This rank's times for each number of micro-batches; losses of one stage where `stages` is 1."""
    prepare("cpu")
    groups = build_groups(1, stages)
    return {str(count): _measure_one(stages, count, repeats, groups) for count in MICRO_BATCHES}


def _measure_one(stages: int, count: int, repeats: int, groups: Any) -> dict[str, Any]:
    job = build_job(stages, count)
    batch = plan_batch(MICRO_BATCH * count, 1, MICRO_BATCH)
    cut = tuple(2 * LAYERS_PER_STAGE * stage for stage in range(stages)) if stages > 1 else ()
    mesh = MeshPlan(1, stages, "cpu", cut=cut)
    # One stage must have all the layers of the pipeline that it is compared with.
    model = build_net(max(stages, 2))
    trainable = sum(param.numel() for param in model.parameters())
    engine = build_engine(
        model, build_loss(job.loss), job, batch, mesh, groups, deepspeed_config(job, batch, mesh, trainable)
    )
    inputs = torch.randn(MICRO_BATCH * count, WIDTH, generator=torch.Generator().manual_seed(1))
    spans: list[list[tuple[float, float]]] = []
    if stages > 1:
        _listen(engine._engine, spans)
    losses = []
    for _ in range(WARM_UP + repeats):
        spans.append([])
        losses.append(float(engine.step(inputs, inputs.tanh(), lr=0.01, seed=0).loss))
    return {"losses": losses, "spans": spans[WARM_UP:]}


def _listen(engine: Any, spans: list[list[tuple[float, float]]]) -> None:
    """Notes begin and end of each forward and backward pass."""

    def timed(function: Any) -> Any:
        def run(self: Any, **arguments: Any) -> None:
            began = time.perf_counter()
            function(self, **arguments)
            spans[-1].append((began, time.perf_counter()))

        return run

    names = ("_exec_forward_pass", "_exec_backward_pass")
    engine._INSTRUCTION_MAP = {
        command: timed(function) if function.__name__ in names else function
        for command, function in engine._INSTRUCTION_MAP.items()
    }


def idle_share(stages: list[list[tuple[float, float]]]) -> float:
    """Of one step, from each stage's passes (seconds on one clock)."""
    passes = [span for stage in stages for span in stage]
    window = max(end for _, end in passes) - min(begin for begin, _ in passes)
    return 1 - sum(end - begin for begin, end in passes) / (window * len(stages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--stages", type=int, default=2)
    options = parser.parse_args()
    ranks = run_ranks(measure, options.stages, options.stages, options.repeats)
    (alone,) = run_ranks(measure, 1, 1, options.repeats)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; stages: {options.stages}")
    print("micro-batches  schedule  measured  quartiles        same loss as one stage")
    summary = {}
    for count in MICRO_BATCHES:
        steps = zip(*(rank[str(count)]["spans"] for rank in ranks), strict=True)
        first, middle, third = statistics.quantiles([idle_share(list(step)) for step in steps], n=4)
        schedule = (options.stages - 1) / (count + options.stages - 1)
        error = max(
            abs(one - other) / abs(one)
            for one, other in zip(alone[str(count)]["losses"], ranks[0][str(count)]["losses"], strict=True)
        )
        print(f"{count:13}  {schedule:8.1%}  {middle:8.1%}  {first:.1%} … {third:.1%}   to {error:.0e}")
        summary[count] = {"schedule": schedule, "measured": middle, "quartiles": [first, third], "loss_error": error}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
