"""Resume from a checkpoint: bit for bit on the same mesh, within rounding on any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from engine_cases import Case, build_engine, build_net, load, reference, save, step, train_case
from temper.checkpoint import BUFFER, MASTER, CheckpointReader, model_state
from temper.parallel.groups import MeshGroups, build_groups

HALF, END = 4, 8
# The scale grows after steps 3 and 6: the second time where it should only if the scaler's counters go on, too.
SCALE = {"initial_scale": 1024.0, "scale_window": 3}
MAPS = {"0": "output_maps", "3": "input_maps", "7": "output_activations"}
BLOCKS = dict.fromkeys("012345", "image_blocks")


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor the norm of its error over its own norm."""
    assert list(found) == list(expected)
    return {
        name: float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in expected.items()
    }


def tensors(reader: CheckpointReader) -> dict[str, Tensor]:
    """Everything in a checkpoint, whole: masters, moments and buffers."""
    kinds = (MASTER, BUFFER, *reader.moments())
    return {f"{kind}/{name}": reader.full(kind, name) for kind in kinds for name in reader.names(kind)}


def assert_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same values, bit for bit, whatever rank holds them."""
    first, second = CheckpointReader(one), CheckpointReader(other)
    assert first.shapes == second.shapes
    assert first.state["engine"] == second.state["engine"]
    values = tensors(second)
    assert list(tensors(first)) == list(values)
    for name, value in tensors(first).items():
        assert torch.equal(value, values[name]), name


# -------------------------------------------------------------------------------------------------- on the same mesh

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


def _same(rank: int, folder: Path) -> dict[str, list[Any]]:
    """For each case the unbroken run, and the one that is broken at half time."""
    results = {}
    for case in SAME:
        whole = train_case(case, folder / "whole", last=END)
        first = train_case(case, folder / "first", last=HALF)
        second = train_case(case, folder / "second", first=HALF, last=END, resume=first["checkpoint"])
        results[str(case)] = [whole, first, second]
    return results


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_distributed(_same, 2, tmp_path_factory.mktemp("same"))[0]


@pytest.mark.parametrize("case", SAME, ids=str)
def test_the_same_mesh_goes_on_bit_for_bit(resumed: dict[str, list[Any]], case: Case) -> None:
    whole, first, second = resumed[str(case)]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["scales"] + second["scales"] == whole["scales"]
    assert_same(whole["checkpoint"], second["checkpoint"])


def test_the_loss_scale_grew_before_and_after_the_break(resumed: dict[str, list[Any]]) -> None:
    """Else the test above says nothing about the scaler's counters."""
    _, first, second = resumed[str(SAME[2])]
    assert first["scales"][0] < first["scales"][-1] < second["scales"][-1]


# -------------------------------------------------------------------------------------------------- on another mesh

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
}
NAMES = list(MESHES)
# Every mesh is a source and a target, of a near and of a far one.
PAIRS = [
    (source, NAMES[(place + distance) % len(NAMES)], arithmetic)
    for arithmetic, distances in {"fp32 SGD": (1, 5), "fp32 Adam": (2, 7), "fp16 AdamW": (4,)}.items()
    for distance in distances
    for place, source in enumerate(NAMES)
]


def _case(mesh: str, arithmetic: str) -> Case:
    return replace(MESHES[mesh][1], accumulation=2, **ARITHMETIC[arithmetic])


def _ranks(mesh: str) -> int:
    workers, case = MESHES[mesh]
    return workers * case.pipeline * case.tensor


class _Groups(dict[str, MeshGroups]):
    """The process groups of each mesh, made once."""

    def __missing__(self, mesh: str) -> MeshGroups:
        workers, case = MESHES[mesh]
        self[mesh] = build_groups(workers, case.pipeline, case.tensor)
        return self[mesh]


def _train(case: Case, engine: Any, batch: Any, first: int, last: int) -> list[float | None]:
    return [step(engine, batch, case, number).loss_scale for number in range(first, last)]


def _start(rank: int, meshes: list[str], folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The unbroken runs, which save at half time and at the end."""
    groups, results = _Groups(), {}
    for mesh in meshes:
        for arithmetic in ARITHMETIC:
            case, place = _case(mesh, arithmetic), folder / mesh / arithmetic
            engine, batch = build_engine(case, groups[mesh])
            scales = _train(case, engine, batch, 0, HALF)
            half = save(engine, place, HALF)
            scales += _train(case, engine, batch, HALF, END)
            results[mesh, arithmetic] = {"half": half, "end": save(engine, place, END), "scales": scales}
    return results


def _go_on(
    rank: int, pairs: list[tuple[str, str, str]], started: dict[tuple[str, str], dict[str, Any]], folder: Path
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Loads what another mesh saved at half time, saves it again as it is, and goes on."""
    groups, results = _Groups(), {}
    for source, target, arithmetic in pairs:
        case, place = _case(target, arithmetic), folder / target / arithmetic / source
        engine, batch = build_engine(case, groups[target])
        load(engine, started[source, arithmetic]["half"])
        again = save(engine, place, HALF)
        scales = _train(case, engine, batch, HALF, END)
        results[source, target, arithmetic] = {"half": again, "end": save(engine, place, END), "scales": scales}
    return results


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("started")
    results = {}
    for ranks in sorted(set(map(_ranks, MESHES))):
        results |= run_distributed(_start, ranks, [mesh for mesh in MESHES if _ranks(mesh) == ranks], folder)[0]
    return results


@pytest.fixture(scope="module")
def moved(started: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("moved")
    results = {}
    for ranks in sorted(set(map(_ranks, MESHES))):
        pairs = [pair for pair in PAIRS if _ranks(pair[1]) == ranks]
        results |= run_distributed(_go_on, ranks, pairs, started, folder)[0]
    return results


def _pair_name(pair: tuple[str, str, str]) -> str:
    return f"{pair[0]} > {pair[1]}, {pair[2]}"


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_saves_the_whole_model_under_its_own_names(started: Any, mesh: str, arithmetic: str) -> None:
    reader, net = CheckpointReader(started[mesh, arithmetic]["half"]), build_net()
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
def test_what_it_saves_is_what_one_process_has(started: Any, mesh: str, arithmetic: str) -> None:
    alone = tensors(CheckpointReader(started["one process", arithmetic]["half"]))
    found = errors(tensors(CheckpointReader(started[mesh, arithmetic]["half"])), alone)
    assert max(found.values()) < 1e-5, found
    plain = reference(ARITHMETIC[arithmetic]["optimizer"], None, 2, HALF)
    assert max(errors(model_state(CheckpointReader(started[mesh, arithmetic]["half"])), plain).values()) < 1e-5


@pytest.mark.parametrize("pair", PAIRS, ids=_pair_name)
def test_another_mesh_loses_no_bit(started: Any, moved: Any, pair: tuple[str, str, str]) -> None:
    """Masters, moments, buffers, the optimizer's step and the loss scaler, loaded and written again."""
    source, _, arithmetic = pair
    assert_same(started[source, arithmetic]["half"], moved[pair]["half"])


@pytest.mark.parametrize("pair", PAIRS, ids=_pair_name)
def test_another_mesh_goes_on_to_the_same_weights(started: Any, moved: Any, pair: tuple[str, str, str]) -> None:
    source, _, arithmetic = pair
    unbroken = started[source, arithmetic]
    assert moved[pair]["scales"] == unbroken["scales"][HALF:]
    expected, found = (CheckpointReader(run["end"]) for run in (unbroken, moved[pair]))
    assert expected.state["engine"] == found.state["engine"]
    if arithmetic.startswith("fp32"):
        off = errors(model_state(found), model_state(expected))
        assert max(off.values()) < 1e-5, off
        return
    # In fp16 the two halves of a sum are rounded before they are added: an error of the way, not of the end point.
    half = CheckpointReader(unbroken["half"])
    start, end, there = (_flat(reader) for reader in (half, expected, found))
    assert (there - end).norm() / (end - start).norm() < 0.02


def _flat(reader: CheckpointReader) -> Tensor:
    return torch.cat([reader.full(MASTER, name).flatten() for name in reader.names(MASTER)])


@pytest.mark.parametrize("mesh", MESHES)
def test_the_loss_scale_of_every_mesh_grew_before_and_after_the_break(started: Any, mesh: str) -> None:
    scales = started[mesh, "fp16 AdamW"]["scales"]
    assert scales[0] < scales[HALF] < scales[-1]
