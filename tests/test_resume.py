"""Resume from a checkpoint: bit for bit on the same mesh, within rounding on any other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from engine_cases import Case, build_engine, build_net, load, reference, save, step, train_case
from temper.checkpoint import BUFFER, MASK, MASTER, CheckpointReader, model_state
from temper.engine.base import EngineState
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.parallel.groups import MeshGroups, build_groups
from temper.plan.phases import PhasePlan, Pruning
from temper.techniques.dsd.border import begin_phase

HALF, END = 3, 6
# The scale grows after steps 3 and 5; the second time only if the scaler's counters go on, too.
SCALE = {"initial_scale": 1024.0, "scale_window": 2}
MAPS = {"0": "output_maps", "3": "input_maps", "7": "output_activations"}
BLOCKS = dict.fromkeys("012345", "image_blocks")

# Cases on two ranks.
SAME = [
    Case(zero=0, optimizer="adam"),
    Case(zero=1, dtype="bf16", optimizer="adamw"),
    Case(zero=2, dtype="fp16", optimizer="adamw", scale=SCALE),
    Case(zero=2, offload="cpu", optimizer="adamw"),
    Case(zero=3, dtype="fp16", optimizer="sgd", scale=SCALE),
    Case(zero=3, optimizer="adagrad", clip=0.5, accumulation=2),
    Case(pipeline=2, optimizer="adamw", clip=0.5, accumulation=2),
    Case(pipeline=2, zero=1, dtype="fp16", scale=SCALE, accumulation=2),
    Case(tensor=2, splits=MAPS, dtype="fp16", optimizer="adam", scale=SCALE),
    Case(tensor=2, splits=BLOCKS, optimizer="adam"),
]
# Name → data replicas and the rest of the mesh.
MESHES = {
    "one process": (1, Case()),
    "data 2": (2, Case()),
    "data 2, ZeRO-1": (2, Case(zero=1)),
    "data 2, ZeRO-2": (2, Case(zero=2)),
    "data 2, ZeRO-3": (2, Case(zero=3)),
    "pipeline 2": (1, Case(pipeline=2)),
    "tensor 2, maps": (1, Case(tensor=2, splits=MAPS)),
    "tensor 2, blocks": (1, Case(tensor=2, splits=BLOCKS)),
    "pipeline 2 × tensor 2": (1, Case(pipeline=2, tensor=2, splits=MAPS)),
}
ARITHMETIC = {
    "fp32 SGD": {"optimizer": "sgd"},
    "fp32 Adam": {"optimizer": "adam"},
    "fp16 AdamW": {"optimizer": "adamw", "dtype": "fp16", "scale": SCALE},
    "fp16 AdamW under masks": {"optimizer": "adamw", "dtype": "fp16", "scale": SCALE},
}
SPARSE = PhasePlan(
    "sparse-1", "sparse", 0, END, 0.1, "", {}, Pruning("weights", "magnitude", {"3.weight": 0.5, "7.weight": 0.3}, 0)
)


@dataclass(frozen=True)
class Move:
    """From the mesh that saves to the one that goes on."""

    source: str
    target: str
    arithmetic: str

    def __str__(self) -> str:
        return f"{self.source} > {self.target}, {self.arithmetic}"


@dataclass(frozen=True)
class Run:
    """The checkpoints at half time and at the end, and the loss scale of each step."""

    half: Path
    end: Path
    scales: list[float | None]


Started = dict[tuple[str, str], Run]  # by mesh and arithmetic
NAMES = list(MESHES)
# Every mesh comes before and after several others.
MOVES = [
    Move(source, NAMES[(place + distance) % len(NAMES)], arithmetic)
    for arithmetic, distances in {
        "fp32 SGD": (1, 5),
        "fp32 Adam": (2,),
        "fp16 AdamW": (4,),
        "fp16 AdamW under masks": (3,),
    }.items()
    for distance in distances
    for place, source in enumerate(NAMES)
]


def _case(mesh: str, arithmetic: str) -> Case:
    return replace(MESHES[mesh][1], accumulation=2, **ARITHMETIC[arithmetic])


def _ranks(mesh: str) -> int:
    workers, case = MESHES[mesh]
    return workers * case.pipeline * case.tensor


RANKS = sorted(set(map(_ranks, MESHES)))


class _Groups(dict[str, MeshGroups]):
    """The process groups of each mesh, made once."""

    def __missing__(self, mesh: str) -> MeshGroups:
        workers, case = MESHES[mesh]
        self[mesh] = build_groups(workers, case.pipeline, case.tensor)
        return self[mesh]


def _train(case: Case, engine: Any, batch: Any, first: int, last: int) -> list[float | None]:
    return [step(engine, batch, case, number).loss_scale for number in range(first, last)]


# -------------------------------------------------------------------------------------------------- the runs


def _broken(cases: list[Case], folder: Path) -> dict[str, list[Any]]:
    """For each case the unbroken run, and the one that is broken at half time."""
    results = {}
    for case in cases:
        whole = train_case(case, folder / "whole", last=END)
        first = train_case(case, folder / "first", last=HALF)
        second = train_case(case, folder / "second", first=HALF, last=END, resume=first["checkpoint"])
        results[str(case)] = [whole, first, second]
    return results


def _unbroken(meshes: list[str], folder: Path) -> Started:
    """Runs that save at half time and at the end."""
    groups, results = _Groups(), {}
    for mesh, arithmetic in itertools.product(meshes, ARITHMETIC):
        case, place = _case(mesh, arithmetic), folder / mesh / arithmetic
        engine, batch = build_engine(case, groups[mesh])
        if arithmetic.endswith("under masks"):
            _enter_sparse_phase(engine, save(engine, place, 0))
        scales = _train(case, engine, batch, 0, HALF)
        half = save(engine, place, HALF)
        scales += _train(case, engine, batch, HALF, END)
        results[mesh, arithmetic] = Run(half, save(engine, place, END), scales)
    return results


def _enter_sparse_phase(engine: DeepSpeedEngine, folder: Path) -> None:
    start = begin_phase(folder, SPARSE)
    engine.load(start, EngineState(**start.state["engine"]))


def _start(rank: int, meshes: list[str], same: list[Case], folder: Path) -> tuple[Any, Any]:
    return _unbroken(meshes, folder), _broken(same, folder)


def _go_on(rank: int, moves: list[Move], started: Started, folder: Path) -> dict[Move, Run]:
    """Loads what another mesh saved at half time, saves it again as it is, and goes on."""
    groups, results = _Groups(), {}
    for move in moves:
        case, place = _case(move.target, move.arithmetic), folder / str(move)
        engine, batch = build_engine(case, groups[move.target])
        load(engine, started[move.source, move.arithmetic].half)
        half = save(engine, place, HALF)
        scales = _train(case, engine, batch, HALF, END)
        results[move] = Run(half, save(engine, place, END), scales)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What was run from the start: one group of processes for each number of ranks."""
    folder = tmp_path_factory.mktemp("started")
    unbroken, broken = {}, {}
    for ranks in RANKS:
        meshes = [mesh for mesh in MESHES if _ranks(mesh) == ranks]
        found = run_distributed(_start, ranks, meshes, SAME if ranks == 2 else [], folder)[0]
        unbroken |= found[0]
        broken |= found[1]
    return unbroken, broken


@pytest.fixture(scope="module")
def started(runs: Any) -> Started:
    return runs[0]


@pytest.fixture(scope="module")
def resumed(runs: Any) -> dict[str, list[Any]]:
    return runs[1]


@pytest.fixture(scope="module")
def moved(started: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Move, Run]:
    folder = tmp_path_factory.mktemp("moved")
    results = {}
    for ranks in RANKS:
        moves = [move for move in MOVES if _ranks(move.target) == ranks]
        results |= run_distributed(_go_on, ranks, moves, started, folder)[0]
    return results


# -------------------------------------------------------------------------------------------------- the same mesh


def tensors(reader: CheckpointReader) -> dict[str, Tensor]:
    """Everything in a checkpoint, whole: masters, moments, masks and buffers."""
    kinds = (MASTER, BUFFER, MASK, *reader.moments())
    return {f"{kind}/{name}": reader.full(kind, name) for kind in kinds for name in reader.names(kind)}


def assert_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same values, bit for bit, whichever ranks wrote them."""
    first, second = CheckpointReader(one), CheckpointReader(other)
    assert first.shapes == second.shapes
    assert first.state["engine"] == second.state["engine"]
    values = tensors(second)
    assert list(tensors(first)) == list(values)
    for name, value in tensors(first).items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("case", SAME, ids=str)
def test_the_same_mesh_goes_on_bit_for_bit(resumed: dict[str, list[Any]], case: Case) -> None:
    whole, first, second = resumed[str(case)]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["scales"] + second["scales"] == whole["scales"]
    assert_same(whole["checkpoint"], second["checkpoint"])


# -------------------------------------------------------------------------------------------------- another mesh


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor the norm of its error over its own norm."""
    assert set(found) == set(expected)
    return {
        name: float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in expected.items()
    }


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_saves_the_whole_model_under_its_own_names(started: Started, mesh: str, arithmetic: str) -> None:
    reader, net = CheckpointReader(started[mesh, arithmetic].half), build_net()
    expected = {name: value.shape for name, value in net.state_dict().items()}
    parameters = [name for name, _ in net.named_parameters()]
    assert reader.shapes == expected
    assert set(reader.names(BUFFER)) == set(expected) - set(parameters)
    moments = ["momentum_buffer"] if ARITHMETIC[arithmetic]["optimizer"] == "sgd" else ["exp_avg", "exp_avg_sq"]
    assert reader.moments() == moments
    for kind in (MASTER, *moments):
        assert reader.names(kind) == parameters
        assert all(reader.full(kind, name).shape == expected[name] for name in parameters)
    net.load_state_dict(model_state(reader))


@pytest.mark.parametrize("arithmetic", ["fp32 SGD", "fp32 Adam"])
@pytest.mark.parametrize("mesh", MESHES)
def test_what_it_saves_is_what_one_process_has(started: Started, mesh: str, arithmetic: str) -> None:
    alone = tensors(CheckpointReader(started["one process", arithmetic].half))
    reader = CheckpointReader(started[mesh, arithmetic].half)
    off = errors(tensors(reader), alone)
    assert max(off.values()) < 1e-5, off
    plain = reference(ARITHMETIC[arithmetic]["optimizer"], None, 2, HALF)
    off = errors(model_state(reader), plain)
    assert max(off.values()) < 1e-5, off


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_another_mesh_loses_no_bit(started: Started, moved: dict[Move, Run], move: Move) -> None:
    """Masters, moments, masks, buffers, the optimizer's step and the loss scaler, loaded and written again."""
    assert_same(started[move.source, move.arithmetic].half, moved[move].half)


@pytest.mark.parametrize("move", [move for move in MOVES if move.arithmetic.endswith("under masks")], ids=str)
def test_another_mesh_goes_on_under_the_same_masks(started: Started, moved: dict[Move, Run], move: Move) -> None:
    before, after = CheckpointReader(started[move.source, move.arithmetic].half), CheckpointReader(moved[move].end)
    assert SPARSE.pruning is not None
    assert after.names(MASK) == list(SPARSE.pruning.layers)
    for name, share in SPARSE.pruning.layers.items():
        mask, weight = after.full(MASK, name), after.full(MASTER, name)
        assert torch.equal(mask, before.full(MASK, name))
        assert int((~mask).sum()) == round(mask.numel() * share)
        assert torch.equal(weight == 0, ~mask)


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_another_mesh_goes_on_to_the_same_weights(started: Started, moved: dict[Move, Run], move: Move) -> None:
    unbroken = started[move.source, move.arithmetic]
    assert moved[move].scales == unbroken.scales[HALF:]
    expected, found = CheckpointReader(unbroken.end), CheckpointReader(moved[move].end)
    assert expected.state["engine"] == found.state["engine"]
    if move.arithmetic.startswith("fp32"):
        off = errors(model_state(found), model_state(expected))
        assert max(off.values()) < 1e-5, off
        return
    # In fp16 the parts of a sum are rounded before they are added: an error of the way, not of the end point.
    start, end, there = (_flat(reader) for reader in (CheckpointReader(unbroken.half), expected, found))
    assert (there - end).norm() / (end - start).norm() < 0.02


def _flat(reader: CheckpointReader) -> Tensor:
    return torch.cat([reader.full(MASTER, name).flatten() for name in reader.names(MASTER)])


def test_the_loss_scale_grows_before_and_after_the_break(resumed: dict[str, list[Any]], started: Started) -> None:
    """Else equal scales say nothing of the scaler's counters."""
    halves = [first["scales"] + second["scales"] for _, first, second in resumed.values()]
    unbroken = [run.scales for (_, arithmetic), run in started.items() if arithmetic == "fp16 AdamW"]
    dynamic = [scales for scales in [*halves, *unbroken] if scales[0] is not None]
    assert len(dynamic) == 4 + len(MESHES)
    assert all(scales == [1024.0] * 3 + [2048.0] * 2 + [4096.0] for scales in dynamic)
