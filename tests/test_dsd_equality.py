"""Dense-sparse-dense is exact on every mesh: masks bit for bit those of a single-process reference, pruned weights at
exactly zero after every step wherever they are kept, weights at the end those of a plain masked loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import run_distributed
from engine_cases import OPTIMIZERS, TORCH, Case, build_batches, build_engine, build_net, save, step
from mesh_runs import Run, Trained, every, legal_cases
from temper.checkpoint import MASK, MASTER, CheckpointReader, model_state
from temper.engine.base import EngineState
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.parallel.cut import cut_of
from temper.parallel.groups import MeshGroups
from temper.plan.phases import PhasePlan, Pruning
from temper.techniques.dsd.border import begin_phase

SHARES = {"0.weight": 0.25, "3.weight": 0.5, "7.weight": 0.3}
DENSE, SPARSE, REDENSE = 2, 3, 2  # steps
END_SPARSE, END = DENSE + SPARSE, DENSE + SPARSE + REDENSE
CLIP = 1.0
SPLITS = {
    "maps": {"0": "output_maps", "3": "input_maps", "7": "output_activations"},
    "blocks": dict.fromkeys("012345", "image_blocks"),
}


# ------------------------------------------------------------------------------------------------ a single process


def reference_mask(weight: np.ndarray, share: float) -> np.ndarray:
    """Zeros at the round(N·share) smallest magnitudes; of equal ones at the first."""
    order = np.argsort(np.abs(weight), axis=None, kind="stable")
    mask = np.ones(weight.size, dtype=bool)
    mask[order[: round(weight.size * share)]] = False
    return mask.reshape(weight.shape)


def build_uneven_net() -> nn.Module:
    """In every layer the first half of the rows is ten times as large, so that a threshold taken on a part of the layer
    is not the layer's."""
    net = build_net()
    with torch.no_grad():
        for name, param in net.named_parameters():
            if name in SHARES:
                param[: len(param) // 2].mul_(10.0)
    return net


def masked_loop(case: Case, masks: dict[str, Tensor], fresh: bool) -> dict[str, Tensor]:
    """The plain loop of all three phases: after every sparse step the mask is laid over weights and moments."""
    model, batches = build_uneven_net(), build_batches()
    section = {key: value for key, value in OPTIMIZERS[case.optimizer].items() if key != "kind"}
    params = dict(model.named_parameters())
    stepper = TORCH[case.optimizer](model.parameters(), **section)
    for number in range(END):
        if number in (DENSE, END_SPARSE) and fresh:
            stepper = TORCH[case.optimizer](model.parameters(), **section)
        if number == DENSE:
            lay_over(masks, params, stepper)
        if number == END_SPARSE:
            stepper.param_groups[0]["lr"] = section["lr"] * 0.1
        inputs, targets = batches[number]
        stepper.zero_grad()
        for x, y in zip(inputs.chunk(case.accumulation), targets.chunk(case.accumulation), strict=True):
            (nn.functional.cross_entropy(model(x), y) / case.accumulation).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        stepper.step()
        if DENSE <= number < END_SPARSE:
            lay_over(masks, params, stepper)
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def lay_over(masks: dict[str, Tensor], params: dict[str, nn.Parameter], stepper: torch.optim.Optimizer) -> None:
    for name, mask in masks.items():
        for value in (params[name], *stepper.state.get(params[name], {}).values()):
            if torch.is_tensor(value) and value.shape == mask.shape:
                value.mul_(mask)


# ----------------------------------------------------------------------------------------------------- on a mesh


def phase(name: str, fresh: bool) -> PhasePlan:
    first, steps = (DENSE, SPARSE) if name == "sparse" else (END_SPARSE, REDENSE)
    pruning = Pruning("weights", "magnitude", SHARES, 0) if name == "sparse" else None
    return PhasePlan(f"{name}-1", name, first, steps, 0.1, "", {}, pruning, fresh)  # type: ignore[arg-type]


def enter(engine: DeepSpeedEngine, folder: Path, name: str, fresh: bool) -> None:
    """Begins a phase as the worker does."""

    def share(own: Any) -> list[Any]:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return parts

    start = begin_phase(folder, phase(name, fresh), rank=dist.get_rank(), size=dist.get_world_size(), share=share)
    engine.load(start, EngineState(**start.state["engine"]))


def free_zeros(engine: DeepSpeedEngine, masks: dict[str, Tensor]) -> dict[str, int]:
    """On this rank, by kind: pruned values that are not exactly zero, and kept masters that are."""
    wrong = {"masters": 0, "kept masters": 0, "moments": 0, "weights": 0}
    for item in engine.fragments():
        if item.name not in masks:
            continue
        mask = masks[item.name] if item.cut is None else item.cut.take(masks[item.name])
        pruned = ~mask.reshape(-1)[item.start : item.start + item.numel]
        wrong["masters"] += int(item.master[pruned].count_nonzero())
        wrong["kept masters"] += int((item.master[~pruned] == 0).sum())
        wrong["moments"] += sum(int(moment[pruned].count_nonzero()) for moment in item.moments().values())
    for name, weight in forward_weights(engine).items():
        if name in masks:
            mask = masks[name] if cut_of(weight) is None else cut_of(weight).take(masks[name])
            wrong["weights"] += int(weight.data[~mask].count_nonzero())
    return wrong


def forward_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """What forward computes with on this rank; under ZeRO-3 gathered."""
    import deepspeed

    named = dict(engine.named_parameters())
    if not hasattr(next(iter(named.values())), "ds_id"):
        return named
    with deepspeed.zero.GatheredParameters(list(named.values())):
        gathered = {name: param.detach().clone() for name, param in named.items()}
    for name, value in gathered.items():
        if cut_of(named[name]) is not None:
            value.temper_cut = cut_of(named[name])  # type: ignore[attr-defined]
    return gathered


def train_all_phases(run: DSDRun, folder: Path, groups: MeshGroups) -> dict[str, Any]:
    case, fresh = run.case, run.fresh
    engine, batch = build_engine(case, groups, build_uneven_net())
    applied = [step(engine, batch, case, number).applied for number in range(DENSE)]
    dense = save(engine, folder, DENSE)
    enter(engine, dense, "sparse", fresh)
    masks = {name: CheckpointReader(save(engine, folder / "begun", DENSE)).full(MASK, name) for name in SHARES}
    wrong = [free_zeros(engine, masks)]
    for number in range(DENSE, END_SPARSE):
        applied.append(step(engine, batch, case, number).applied)
        wrong.append(free_zeros(engine, masks))
    sparse = save(engine, folder, END_SPARSE)
    enter(engine, sparse, "redense", fresh)
    wrong.append({**free_zeros(engine, masks), "moments": 0})
    for number in range(END_SPARSE, END):
        applied.append(step(engine, batch, case, number, lr_factor=0.1).applied)
    return {"dense": dense, "sparse": sparse, "end": save(engine, folder, END), "wrong": wrong, "applied": applied}


# --------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class DSDRun(Run):
    """`fresh`: the optimizer begins each phase without moments."""

    fresh: bool

    def __str__(self) -> str:
        return f"{super().__str__()}-{'fresh' if self.fresh else 'kept'}"


# The moments are kept in every other run of an optimizer.
RUNS = [
    DSDRun(workers, case, fresh=number % 8 < 4)
    for number, (workers, case) in enumerate(legal_cases(Case(clip=CLIP, accumulation=2), SPLITS))
]
every_run = every(RUNS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(RUNS, train_all_phases, tmp_path_factory.mktemp("dsd"))


def masks_of(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.full(MASK, name) for name in reader.names(MASK)}


@every_run
def test_masks_are_those_of_one_process_bit_for_bit(trained: Trained, run: Run) -> None:
    """The dense weights' whole layers decide, whatever part of them a rank has."""
    result = trained[run][0]
    dense, found = CheckpointReader(result["dense"]), masks_of(result["sparse"])
    assert set(found) == set(SHARES)
    for name, share in SHARES.items():
        expected = reference_mask(dense.full(MASTER, name).numpy(), share)
        assert np.array_equal(found[name].numpy(), expected), name
        assert int((~found[name]).sum()) == round(expected.size * share)


@every_run
def test_pruned_weights_are_zero_after_every_step_wherever_they_are_kept(trained: Trained, run: Run) -> None:
    """Masters, moments and the weights of forward, on every rank; and no kept weight is."""
    for result in trained[run]:
        assert len(result["wrong"]) == SPARSE + 2
        assert all(set(wrong.values()) == {0} for wrong in result["wrong"]), result["wrong"]


@every_run
def test_the_sparse_checkpoint_has_as_many_zeros_as_were_pruned(trained: Trained, run: Run) -> None:
    reader = CheckpointReader(trained[run][0]["sparse"])
    for name, share in SHARES.items():
        weight = reader.full(MASTER, name)
        assert int((weight == 0).sum()) == round(weight.numel() * share)
        for kind in reader.moments():
            assert int(reader.full(kind, name)[~reader.full(MASK, name)].count_nonzero()) == 0


@every_run
def test_all_weights_are_trained_again_in_the_redense_phase(trained: Trained, run: Run) -> None:
    result = trained[run][0]
    reader = CheckpointReader(result["end"])
    assert reader.names(MASK) == []
    pruned = {name: ~mask for name, mask in masks_of(result["sparse"]).items()}
    for name, where in pruned.items():
        assert int((reader.full(MASTER, name)[where] == 0).sum()) < 0.2 * int(where.sum()), name


# As in parallel training alone; in low precision the error of the end point as a share of the way to it.
PATH_ERROR = {"bf16": 0.14, "fp16": 0.12}


@every_run
def test_the_weights_at_the_end_are_those_of_a_plain_masked_loop(trained: Trained, run: Run) -> None:
    result = trained[run][0]
    assert all(result["applied"])
    expected = masked_loop(run.case, masks_of(result["sparse"]), run.fresh)
    found = model_state(CheckpointReader(result["end"]))
    assert set(found) == set(expected)
    if run.case.dtype == "fp32":
        for name, value in expected.items():
            error = (found[name].double() - value.double()).norm() / value.double().norm()
            assert error < 1e-5, f"{name}: {error:.1e}"
        return
    start, names = build_uneven_net().state_dict(), dict(build_uneven_net().named_parameters())
    off = torch.cat([(found[name] - expected[name]).flatten() for name in names])
    path = torch.cat([(expected[name] - start[name]).flatten() for name in names])
    assert off.norm() / path.norm() < PATH_ERROR[run.case.dtype]


def test_a_threshold_of_each_rank_would_be_another_mask() -> None:
    """The networks here are such that the usual mistake shows."""
    weight = build_uneven_net().state_dict()["7.weight"].numpy()
    whole = reference_mask(weight, 0.5)
    halves = np.concatenate([reference_mask(half, 0.5) for half in np.split(weight, 2)])
    assert (whole != halves).mean() > 0.4


def _fresh_moments(rank: int, folder: Path) -> list[bool]:
    """Whether all that leads to a parameter's moments leads to the optimizer's own, after a step, a phase with a fresh
    optimizer, and a step."""
    case = Case(zero=1, optimizer="adamw")
    engine, batch = build_engine(case)
    step(engine, batch, case, 0)
    enter(engine, save(engine, folder, DENSE), "sparse", fresh=True)
    forgotten = [item.moments() == {} for item in engine.fragments()]
    step(engine, batch, case, 1)
    places = {moment.data_ptr() for item in engine.fragments() for moment in item.moments().values()}
    linked = [
        moment.data_ptr() in places
        for _, param in engine.named_parameters()
        for moment in param._hp_mapping.optim_fragment.values()
    ]
    return [*forgotten, *linked]


def test_a_fresh_optimizer_leaves_no_old_moments_in_memory(tmp_path: Path) -> None:
    """DeepSpeed keeps views of them beside each parameter."""
    found = run_distributed(_fresh_moments, 1, tmp_path)[0]
    assert len(found) == 8 + 2 * 8 and all(found)
