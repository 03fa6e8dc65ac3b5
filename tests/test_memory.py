"""Bytes that the ranks of an engine really hold, by what they are for, against ZeRO's formulas and against the plan.

Run as a program, it prints the formulas, the plan and what was measured as a table.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed import run_distributed
from engine_cases import BATCH, Case, build_batches, build_engine, step
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.models.probe import measure, with_parts
from temper.plan.deepspeed_config import zero_stage
from temper.plan.memory import MemoryPlan, plan_memory
from temper.plan.mesh import plan_batch
from temper.plan.probe import ModelFacts

# -------------------------------------------------------------------------------------------------- what a rank holds


@dataclass(frozen=True)
class Held:
    """Bytes of one rank's engine in a step, by what they are for; storages that tensors keep alive, their padding
    included.

    - `parameters`: weights as forward uses them, and buffers, when the backward passes are done
    - `gradients`: then, or just before they are reduced, whichever is more
    - `optimizer_state`: masters, where they are separate, and moments
    - `buckets`: buffers in which gradients are gathered to be reduced
    - `rest`: everything else, such as the test's own batches
    """

    parameters: int
    gradients: int
    optimizer_state: int
    buckets: int
    rest: int

    @property
    def state(self) -> int:
        """What ZeRO's formulas count."""
        return self.parameters + self.gradients + self.optimizer_state


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of every storage that a tensor among `tensors` keeps alive, by its address."""
    found = [item.untyped_storage() for item in tensors if isinstance(item, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def all_storages() -> dict[int, int]:
    """Of all tensors, but those that `gc.freeze` hid."""
    gc.collect()
    found = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return storages([*found, *(item.grad for item in found if item.is_leaf)])


def buckets_of(engine: DeepSpeedEngine) -> list[Any]:
    """Stages 1 and 2 take turns between several; stage 3 has one."""
    buffers = [bucket.buffer for bucket in getattr(engine._engine.optimizer, "ipg_buckets", {}).values()]
    return [*buffers, *itertools.chain(*(buffer for buffer in buffers if isinstance(buffer, list)))]


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


def held_now(engine: DeepSpeedEngine, before: dict[int, int]) -> Held:
    """Of storages that are not in `before`. In fp32 at stage 0 the parameters are their own masters, and count as
    parameters."""
    rest = {address: size for address, size in all_storages().items() if address not in before}
    bytes_of = {
        of: sum(rest.pop(address, 0) for address in storages(of(engine)))
        for of in (buckets_of, parameters_of, gradients_of, optimizer_state_of)
    }
    return Held(
        parameters=bytes_of[parameters_of],
        gradients=bytes_of[gradients_of],
        optimizer_state=bytes_of[optimizer_state_of],
        buckets=bytes_of[buckets_of],
        rest=sum(rest.values()),
    )


def held(case: Case, net: str) -> Held:
    """What this rank's engine holds in its second step, when there are moments."""
    gc.unfreeze()
    before = all_storages()
    gc.freeze()  # half a million objects less to look through, each time
    engine, batch = build_engine(case, model=NETS[net]())
    step(engine, batch, case, 0)
    inner, seen = engine._engine, []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def observe(*args: Any, **kwargs: Any) -> Any:
            seen.append(held_now(engine, before))
            return method(*args, **kwargs)

        return observe

    inner.allreduce_gradients = watched(inner.allreduce_gradients)
    inner._take_model_step = watched(inner._take_model_step)
    step(engine, batch, case, 1)
    del inner.allreduce_gradients, inner._take_model_step
    inner.destroy()
    return replace(
        seen[-1],
        gradients=max(one.gradients for one in seen),
        buckets=max(one.buckets for one in seen),
        # gloo's threads let go of a buffer some time after they have reduced it.
        rest=min(one.rest for one in seen),
    )


def survivors(case: Case, net: str) -> list[str]:
    """The parameters of the whole model that this rank still has in memory when its engine is built."""
    model = NETS[net]()
    params = {name: weakref.ref(param) for name, param in model.named_parameters()}
    engine, _ = build_engine(case, model=model)
    del model
    gc.collect()
    alive = [name for name, param in params.items() if param() is not None]
    engine._engine.destroy()
    return alive


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


# -------------------------------------------------------------------------------------------------- the measurement

Item = tuple[str, Case]
Measured = dict[str, list[Held]]  # by the name of the item, what each rank holds


def _name(item: Item) -> str:
    return f"{item[0]}-{item[1]}"


def _held_all(rank: int, items: list[Item]) -> list[Held]:
    return [held(case, net) for net, case in items]


def measure_ranks(ranks: int, items: list[Item]) -> Measured:
    return _by_name(items, run_distributed(_held_all, ranks, items))


def _by_name(items: list[Item], by_rank: list[list[Held]]) -> Measured:
    return {_name(item): [of_rank[index] for of_rank in by_rank] for index, item in enumerate(items)}


def largest(ranks: list[Held]) -> Held:
    return max(ranks, key=lambda held: held.state)


# ---------------------------------------------------------------------------------------------------- ZeRO's formulas


@dataclass(frozen=True)
class Formula:
    """Bytes of parameters, gradients and optimizer state on one of N ranks, for mixed-precision Adam: Rajbhandari et
    al. (2020), figure 1 and section 5, with K = 12."""

    text: str
    ranks: int
    zero: int
    bytes: Callable[[int, int], tuple[float, float, float]]

    @property
    def item(self) -> Item:
        return "even", Case(zero=self.zero, dtype="fp16", optimizer="adam")

    def __str__(self) -> str:
        return f"N{self.ranks}-zero{self.zero}"


def _formulas() -> list[Formula]:
    """In fp16 temper runs stage 0 as stage 1, so that the row without ZeRO is one rank's: there they are the same."""
    by_stage = {
        1: ("4Ψ + 12Ψ/N", lambda size, n: (2 * size, 2 * size, 12 * size / n)),
        2: ("2Ψ + 14Ψ/N", lambda size, n: (2 * size, 2 * size / n, 12 * size / n)),
        3: ("16Ψ/N", lambda size, n: (2 * size / n, 2 * size / n, 12 * size / n)),
    }
    none = Formula("16Ψ", 1, 0, by_stage[1][1])
    return [none, *(Formula(text, n, zero, of) for n in (2, 4) for zero, (text, of) in by_stage.items())]


FORMULAS = _formulas()


def measure_formulas(ranks: int) -> Measured:
    return measure_ranks(ranks, [formula.item for formula in FORMULAS if formula.ranks == ranks])


def table(measured: dict[int, Measured]) -> str:
    """As Markdown, in MB."""
    size = sum(param.numel() for param in even_net().parameters())
    lines = [
        "| ZeRO | ranks | formula | formula, MB | planned, MB | measured, MB | parameters | gradients | optimizer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for formula in FORMULAS:
        found = largest(measured[formula.ranks][_name(formula.item)])
        plan = plan_of(*formula.item, formula.ranks)
        planned = plan.parameters + plan.gradients + plan.optimizer_state
        numbers = [sum(formula.bytes(size, formula.ranks)), planned, found.state, *astuple(found)[:3]]
        texts = [str(formula.zero), str(formula.ranks), formula.text, *(f"{number / 1e6:.2f}" for number in numbers)]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def _measure_two(rank: int, items: list[Item], cut: Item) -> tuple[list[Held], list[str]]:
    return _held_all(rank, items), survivors(cut[1], cut[0])


@pytest.fixture(scope="module")
def on_two() -> tuple[Measured, list[list[str]]]:
    """All that runs on two ranks, and which parameters survive on each of two stages."""
    formulas = [formula.item for formula in FORMULAS if formula.ranks == 2]
    items = [*formulas, *(("uneven", case) for case in REPLICAS), *PARTS]
    found = run_distributed(_measure_two, 2, items, PARTS[0])
    return _by_name(items, [of_rank[0] for of_rank in found]), [of_rank[1] for of_rank in found]


@pytest.fixture(scope="module")
def by_ranks(on_two: tuple[Measured, list[list[str]]]) -> dict[int, Measured]:
    return {1: measure_formulas(1), 2: on_two[0], 4: measure_formulas(4)}


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_each_rank_holds_what_zero_says(by_ranks: dict[int, Measured], formula: Formula) -> None:
    """Fp16 with Adam, on every rank, for parameters, gradients and optimizer state alone and together.

    What DeepSpeed holds beyond the formulas: the bucket in which gradients are reduced, which is as large as all
    gradients where these are fewer than 500 million (given back after the backward pass, but by stage 3); at stage 3
    parameters of up to 100,000 elements, whole on every rank, and in forward and backward the layers that are gathered
    at the time; at stage 2 whole gradients of the two parameters that reach over a partition's borders; padding of a
    partition to an even number of elements, and at stage 3 of each parameter to a multiple of N; Adam's step counts;
    within the optimizer's step, an fp32 copy of the rank's gradients.
    """
    size = sum(param.numel() for param in even_net().parameters())
    expected = formula.bytes(size, formula.ranks)
    for found in by_ranks[formula.ranks][_name(formula.item)]:
        assert (found.parameters, found.gradients, found.optimizer_state) == pytest.approx(expected, rel=0.1)
        assert found.state == pytest.approx(sum(expected), rel=0.1)
        assert found.buckets == 2 * size


# ----------------------------------------------------------------------------------------------------------- the plan

REPLICAS = [
    Case(zero=0, optimizer="adam"),
    Case(zero=1, optimizer="adam"),
    Case(zero=2, optimizer="adagrad"),
    Case(zero=3, optimizer="adam"),
    *(Case(zero=zero, dtype="fp16", optimizer="sgd", accumulation=2) for zero in (0, 2, 3)),
    *(Case(zero=zero, offload="cpu", dtype="bf16", optimizer="adamw") for zero in (1, 2, 3)),
    Case(zero=2, offload="cpu", optimizer="adam", accumulation=2),
]
MAPS = {"0": "output_maps", "3": "output_maps", "5": "output_maps", "7": "output_activations"}
# On two ranks without replicas. The first cut makes the second stage the larger one, the other one the first.
PARTS = [
    ("uneven", Case(pipeline=2, cut=(0, 2), dtype="fp16", optimizer="adam", accumulation=2)),
    ("uneven", Case(pipeline=2, cut=(0, 4), optimizer="adam", accumulation=2)),
    ("conv", Case(tensor=2, splits=MAPS, dtype="fp16", optimizer="adam")),
    ("conv", Case(tensor=2, splits=MAPS, optimizer="adam")),
]


def facts_of(net: str, case: Case) -> ModelFacts:
    """What the plan learns of the network."""
    inputs = build_batches()[0][0][:2]
    facts = measure(NETS[net](), tuple(inputs.shape[1:]), "cpu")
    return with_parts(facts, NETS[net](), inputs, case.tensor, case.splits) if case.tensor > 1 else facts


def plan_of(net: str, case: Case, workers: int) -> MemoryPlan:
    batch = plan_batch(BATCH, workers, BATCH // workers // case.accumulation)
    return plan_memory(case.job(workers), facts_of(net, case), case.mesh(workers), batch)


@pytest.mark.parametrize("case", REPLICAS, ids=str)
def test_the_plan_is_within_a_tenth_of_what_is_held(by_ranks: dict[int, Measured], case: Case) -> None:
    found, memory = largest(by_ranks[2][_name(("uneven", case))]), plan_of("uneven", case, workers=2)
    everything = memory.parameters + memory.gradients + memory.optimizer_state + memory.host_bytes
    if zero_stage(case.job(2)) > 0:
        everything += memory.buckets  # stage 0 makes its own within one call
    assert sum(astuple(found)) == pytest.approx(everything, rel=0.1)
    if case.offload == "none":
        planned = memory.parameters, memory.gradients, memory.optimizer_state
        assert (found.parameters, found.gradients, found.optimizer_state) == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("item", PARTS, ids=_name)
def test_the_plan_knows_what_a_stage_and_a_tensor_rank_hold(by_ranks: dict[int, Measured], item: Item) -> None:
    found, memory = largest(by_ranks[2][_name(item)]), plan_of(*item, workers=1)
    planned = memory.parameters, memory.gradients, memory.optimizer_state
    assert (found.parameters, found.gradients, found.optimizer_state) == pytest.approx(planned, rel=0.1)


def test_a_stage_keeps_nothing_of_the_others(on_two: tuple[Measured, list[list[str]]]) -> None:
    """Layer 0 is the flattening; the first linear layer, in the sequence inside, is the first stage."""
    names = [name for name, _ in uneven_net().named_parameters()]
    first = [name for name in names if name.startswith("1.")]
    assert on_two[1] == [first, [name for name in names if name not in first]]


if __name__ == "__main__":
    sys.stdout.write(table({ranks: measure_formulas(ranks) for ranks in (1, 2, 4)}) + "\n")
