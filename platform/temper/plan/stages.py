"""Where a pipeline is cut: layers → contiguous stages of which the most expensive is as cheap as can be.

A pipeline is as fast as its slowest stage. Its start and end, when not every stage has work, cost further time: the
bubble. Costs are derived from FLOPs and bytes or measured, as `parallel.stages` says; a user may also name the cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from temper.config.schema import JobConfig, ParallelConfig
from temper.errors import Problem
from temper.plan.memory import BYTES
from temper.plan.mesh import BatchPlan
from temper.plan.probe import LayerFacts

LEAST_MICRO_BATCHES = 4
"""For each stage, where `parallel.micro_batch` leaves it open: Huang et al. (2019), section 2.3, find the bubble
negligible from there on."""

# FLOPs that take as long as moving one byte: between CPUs (5 to 10) and GPUs at fp32 (10 to 20).
_FLOPS_PER_BYTE = 10


@dataclass(frozen=True)
class StagePlan:
    """Layers `first_layer` … `first_layer + layers - 1` of the model's sequence.

    `parameters` are those of the whole stage, also where tensor ranks share it. `cost_share` is its part of the cost of
    all layers, `sent_bytes` what one micro-batch sends to the next stage (as much comes back), 0 for the last.
    """

    first_layer: int
    layers: int
    parameters: int
    cost_share: float
    sent_bytes: int


def plan_stages(job: JobConfig, layers: Sequence[LayerFacts], batch: BatchPlan) -> tuple[StagePlan, ...]:
    """The stages of a job that :func:`check_stages` finds nothing wrong with; none without a pipeline."""
    if job.parallel.pipeline == 1:
        return ()
    costs = _costs(job.parallel, layers)
    cut = _cut(job.parallel, layers)
    width = BYTES[job.precision.dtype] / BYTES["fp32"]
    stages = []
    for first, end in itertools.pairwise([*cut, len(layers)]):
        sent = layers[end - 1].output_bytes * batch.micro_batch * width if end < len(layers) else 0
        stages.append(
            StagePlan(
                first_layer=first,
                layers=end - first,
                parameters=sum(layer.weights.num_parameters for layer in layers[first:end]),
                cost_share=sum(costs[first:end]) / sum(costs),
                sent_bytes=int(sent),
            )
        )
    return tuple(stages)


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage of a balanced pipeline idles: (p − 1)/(m + p − 1).

    Huang et al., GPipe (2019), section 2.3; the same under 1F1B: Narayanan et al., Efficient Large-Scale Language Model
    Training on GPU Clusters (2021), section 2.2.
    """
    return (stages - 1) / (micro_batches + stages - 1)


def imbalance(stages: Sequence[StagePlan]) -> float:
    """Cost of the most expensive stage over their mean; 1 is perfect balance."""
    return len(stages) * max(stage.cost_share for stage in stages)


def check_stages(parallel: ParallelConfig, layers: Sequence[LayerFacts]) -> list[Problem]:
    """What forbids to cut these layers, at least one, as `parallel` asks. Every stage needs something to train."""
    if parallel.pipeline == 1:
        return []
    trainable = sum(map(_is_trainable, layers))
    if parallel.pipeline > trainable:
        rule = f"is more than the {trainable} layers of the model that have trainable parameters"
        return [Problem("parallel.pipeline", parallel.pipeline, rule, f"use pipeline: {trainable}")]
    if isinstance(parallel.stages, str):
        return []
    rule = _broken_rule(parallel.stages, layers)
    if not rule:
        return []
    balanced = list(_balanced(parallel.pipeline, layers, _derived_costs(layers))[1:])
    return [Problem("parallel.stages", parallel.stages, rule, f"use e.g. {balanced}")]


def _broken_rule(firsts: Sequence[int], layers: Sequence[LayerFacts]) -> str:
    """What is wrong with the first layers, which rise, of all stages but the first; empty where nothing is."""
    if firsts[-1] >= len(layers):
        return f"names a layer that is not there: the model has layers 0 to {len(layers) - 1}"
    for stage, (first, end) in enumerate(itertools.pairwise([0, *firsts, len(layers)])):
        if not any(map(_is_trainable, layers[first:end])):
            return f"leaves stage {stage} (layers {first} to {end - 1}) without a trainable parameter"
    return ""


def _is_trainable(layer: LayerFacts) -> bool:
    return bool(layer.weights.sizes)


# --------------------------------------------------------------------------------------------------------------- costs


def _costs(parallel: ParallelConfig, layers: Sequence[LayerFacts]) -> list[float]:
    if parallel.stages != "measured":
        return _derived_costs(layers)
    seconds = [layer.seconds for layer in layers if layer.seconds is not None]
    assert len(seconds) == len(layers), "the probe was asked to time the layers"
    return seconds


def _derived_costs(layers: Sequence[LayerFacts]) -> list[float]:
    """The forward pass of one example, in FLOPs; the backward pass takes twice that in every layer.

    Norms, activations and pooling have few FLOPs, but they too read their inputs and write their outputs.
    """
    inputs = [0, *(layer.output_bytes for layer in layers[:-1])]
    return [
        layer.forward_flops + _FLOPS_PER_BYTE * (before + layer.output_bytes)
        for before, layer in zip(inputs, layers, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------------- cut


def _cut(parallel: ParallelConfig, layers: Sequence[LayerFacts]) -> tuple[int, ...]:
    if isinstance(parallel.stages, list):
        return (0, *parallel.stages)
    return _balanced(parallel.pipeline, layers, _costs(parallel, layers))


def _balanced(pipeline: int, layers: Sequence[LayerFacts], costs: Sequence[float]) -> tuple[int, ...]:
    sent = [layer.output_bytes for layer in layers]
    return cut_layers(costs, [_is_trainable(layer) for layer in layers], sent, pipeline)


def cut_layers(costs: Sequence[float], trainable: Sequence[bool], sent: Sequence[int], stages: int) -> tuple[int, ...]:
    """The first layer of each of `stages` contiguous stages, each with a trainable layer; at least as many are there.

    The most expensive stage costs the least possible; of such cuts, one with the fewest bytes `sent` from stage to
    stage. Exact, by dynamic programming: first the cost of the most expensive stage, then the bytes under that bound.
    """
    best = _CutSearch(costs, trainable, stages).best
    highest, _ = best(lambda before, cost, first: max(before, cost), lambda cost, found: cost >= found)
    _, firsts = best(
        lambda before, cost, first: before + (sent[first - 1] if first else 0), lambda cost, found: cost > highest
    )
    return firsts


class _CutSearch:
    """Cuts of layers into stages, by dynamic programming over the layers before the end of each stage."""

    def __init__(self, costs: Sequence[float], trainable: Sequence[bool], stages: int) -> None:
        self.costs_before = list(itertools.accumulate(costs, initial=0.0))
        self.trainable_before = list(itertools.accumulate(trainable, initial=0))
        self.stages = stages

    def best(
        self, value_of: Callable[[float, float, int], float], is_hopeless: Callable[[float, float], bool]
    ) -> tuple[float, tuple[int, ...]]:
        """The least value of a legal cut, and its first layers.

        `value_of(before, cost, first)` is the value of a cut of the layers before `first`, whose value is `before`, and
        one more stage of that cost. `is_hopeless(cost, found)`: no stage of that cost or a higher one is better.
        """
        layers = len(self.costs_before) - 1
        values, history = [0.0] + [math.inf] * layers, []
        for _ in range(self.stages):
            steps = [self._last_stage(values, end, value_of, is_hopeless) for end in range(layers + 1)]
            values = [value for value, _ in steps]
            history.append([first for _, first in steps])
        firsts, end = [], layers
        for chosen in reversed(history):
            end = chosen[end]
            firsts.append(end)
        return values[layers], tuple(reversed(firsts))

    def _last_stage(
        self,
        values: Sequence[float],
        end: int,
        value_of: Callable[[float, float, int], float],
        is_hopeless: Callable[[float, float], bool],
    ) -> tuple[float, int]:
        """The best last stage of a cut of the layers before `end`: its value and first layer, the earliest of equals.

        An early stage of a pipeline holds activations for longer, so that it had better be the smaller one.
        """
        found, chosen = math.inf, 0
        for first in reversed(range(end)):
            cost = self.costs_before[end] - self.costs_before[first]
            if is_hopeless(cost, found):
                break
            if self.trainable_before[end] > self.trainable_before[first]:
                value = value_of(values[first], cost, first)
                if value <= found:
                    found, chosen = value, first
        return found, chosen
