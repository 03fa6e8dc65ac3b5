"""The plan's memory, and ZeRO's formulas, against the tensors that an engine really holds at the end of a backward pass.

Run as a program, it prints the table of ZeRO's formulas.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed import run_distributed
from engine_cases import BATCH, Case, build_batches, build_engine, step
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.models.probe import measure, with_parts
from temper.plan.memory import MemoryPlan, plan_memory
from temper.plan.mesh import plan_batch
from temper.plan.probe import ModelFacts

# -------------------------------------------------------------------------------------------------- what a rank holds


@dataclass(frozen=True)
class Held:
    """Bytes of a rank's engine when the backward passes of a step are done, by what they are for.

    `parameters` are the weights as forward uses them and the buffers, `optimizer_state` the masters and moments, `rest`
    everything else that a tensor keeps alive.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    rest: int
    buckets: int


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of every storage that a tensor among `tensors` keeps alive, by its address."""
    found = [item.untyped_storage() for item in tensors if isinstance(item, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def all_storages() -> dict[int, int]:
    gc.collect()
    found = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return storages([*found, *(item.grad for item in found if item.is_leaf)])


def parameters_of(engine: DeepSpeedEngine) -> list[Any]:
    """Stage 3 keeps a rank's part in `ds_tensor`, and in the parameter itself what it left whole or gathered."""
    params = list(engine.module.parameters())
    return [*params, *(getattr(param, "ds_tensor", None) for param in params), *engine.module.buffers()]


def gradients_of(engine: DeepSpeedEngine) -> list[Any]:
    """Stages 1 and 2 keep what the optimizer will step with in `averaged_gradients`, stage 3 in one flat buffer."""
    optimizer = engine._engine.optimizer
    averaged = getattr(optimizer, "averaged_gradients", {}).values()
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    return [*(param.grad for param in engine.module.parameters()), *itertools.chain(*filter(None, averaged)), flat]


def optimizer_state_of(engine: DeepSpeedEngine) -> list[Any]:
    fragments = engine.fragments()
    states = (item.optimizer_state.get(item.owner, {}) for item in fragments)
    return [*(item.owner for item in fragments), *itertools.chain(*(state.values() for state in states))]


def held(case: Case, build: Callable[[], nn.Module]) -> Held:
    """What this rank's engine holds in its second step, when there are moments."""
    before = all_storages()
    engine, batch = build_engine(case, model=build())
    step(engine, batch, case, 0)
    inner, seen = engine._engine, []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def observe(*args: Any, **kwargs: Any) -> Any:
            seen.append(_by_purpose(engine, before))
            return method(*args, **kwargs)

        return observe

    inner.allreduce_gradients = watched(inner.allreduce_gradients)
    inner._take_model_step = watched(inner._take_model_step)
    step(engine, batch, case, 1)
    del inner.allreduce_gradients, inner._take_model_step
    inner.destroy()
    print("OBS", case, seen)
    return Held(*(max(values) for values in zip(*map(astuple, seen), strict=True)))


def _by_purpose(engine: DeepSpeedEngine, before: dict[int, int]) -> Held:
    """In fp32 at stage 0 the parameters are their own masters."""
    rest = {address: size for address, size in all_storages().items() if address not in before}
    buckets = getattr(engine._engine.optimizer, "ipg_buckets", {}).values()
    bb = storages([t for bucket in buckets for t in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer])])
    b = sum(rest.pop(address, 0) for address in bb)
    found = []
    for of in (parameters_of, gradients_of, optimizer_state_of):
        own = storages(of(engine))
        found.append(sum(rest.pop(address, 0) for address in own))
    return Held(*found, rest=sum(rest.values())+0*b, buckets=b)


# ------------------------------------------------------------------------------------------------------- the networks


def uneven_net() -> nn.Module:
    """Parameters above and below the size from which stage 3 cuts them."""
    torch.manual_seed(0)
    sizes = (64, 1700, 300, 300, 300, 300, 10)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *layers)


def even_net() -> nn.Module:
    """Eight equal layers, so that no parameter reaches over the borders of 2 or 4 partitions; each weight is above the
    size from which stage 3 cuts it, and the biases are a 400th of the whole."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(400, 400), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(nn.Flatten(), nn.ConstantPad1d((0, 400 - 64), 0.0), *layers)


def conv_net() -> nn.Module:
    """An odd number of maps: the first tensor rank holds one more."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 257, 3, padding=1),
        nn.Flatten(),
        nn.Linear(257 * 4, 10),
    )


NETS = {"uneven": uneven_net, "even": even_net, "conv": conv_net}


def facts_of(net: str, case: Case) -> ModelFacts:
    """What the plan learns of the network."""
    inputs = build_batches()[0][0][:2]
    facts = measure(NETS[net](), tuple(inputs.shape[1:]), "cpu")
    return with_parts(facts, NETS[net](), inputs, case.tensor, case.splits) if case.tensor > 1 else facts


def plan_of(net: str, case: Case, workers: int) -> MemoryPlan:
    micro_batch = BATCH // workers // case.accumulation
    return plan_memory(case.job(workers), facts_of(net, case), case.mesh(workers), plan_batch(BATCH, workers, micro_batch))


# -------------------------------------------------------------------------------------------------- measured on ranks

ON_TWO = [
    Case(zero=0, optimizer="adam"),
    Case(zero=1, optimizer="adam"),
    Case(zero=2, optimizer="adagrad"),
    Case(zero=3, optimizer="adam"),
    *(Case(zero=zero, dtype="fp16", optimizer="sgd", accumulation=2) for zero in (0, 2, 3)),
    *(Case(zero=zero, offload="cpu", dtype="bf16", optimizer="adamw") for zero in (1, 2, 3)),
    Case(zero=2, offload="cpu", optimizer="adam", accumulation=2),
]
MAPS = {"0": "output_maps", "3": "output_maps", "5": "output_maps", "7": "output_activations"}
# Networks on two ranks without replicas. The first cut makes the second stage the larger one, the second the first.
PARTS = [
    ("uneven", Case(pipeline=2, cut=(0, 2), dtype="fp16", optimizer="adam", accumulation=2)),
    ("uneven", Case(pipeline=2, cut=(0, 4), optimizer="adam", accumulation=2)),
    ("conv", Case(tensor=2, splits=MAPS, dtype="fp16", optimizer="adam")),
    ("conv", Case(tensor=2, splits=MAPS, optimizer="adam")),
]
Item = tuple[str, Case]


def _held_all(rank: int, items: list[Item]) -> list[Held]:
    return [held(case, NETS[net]) for net, case in items]


def measured(ranks: int, items: list[Item]) -> list[Held]:
    """The rank that holds most of each."""
    by_rank = run_distributed(_held_all, ranks, items)
    return [max(found, key=lambda held: sum(astuple(held)[:3])) for found in zip(*by_rank, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    z = {1: [1], 2: [1, 2, 3], 4: [1, 2, 3]}
    for n, stages in z.items():
        items = [("even", Case(zero=s, dtype="fp16", optimizer="adam")) for s in stages]
        if n == 2:
            items += PARTS
            items += [("uneven", c) for c in ON_TWO]
        for (net, case), h in zip(items, measured(n, items), strict=True):
            w = n // case.pipeline // case.tensor
            print("RES", n, net, case, h, plan_of(net, case, w))
