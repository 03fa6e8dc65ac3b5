"""Resume from a checkpoint: bit for bit on the same topology, within rounding on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import run_distributed
from engine_cases import STEPS, Case, train_case
from temper.checkpoint import MASTER, CheckpointReader, model_state

HALF = STEPS // 2
SCALE = {"initial_scale": 1024.0, "scale_window": 6}
SAME = [
    Case(zero=0, optimizer="adam"),
    Case(zero=1, dtype="bf16", optimizer="adamw"),
    Case(zero=2, dtype="fp16", optimizer="adamw", scale=SCALE),
    Case(zero=2, offload="cpu", optimizer="adamw"),
    Case(zero=3, dtype="fp16", optimizer="sgd", scale=SCALE),
    Case(zero=3, optimizer="adagrad", clip=0.5, accumulation=2),
]
STAGES = [Case(zero=zero, optimizer="adam") for zero in (0, 1, 2, 3)]


def _same(rank: int, folder: Path) -> dict[str, list[Any]]:
    """For each case the unbroken run, and the one that is broken at half time."""
    results = {}
    for case in SAME:
        whole = train_case(case, folder / "whole")
        first = train_case(case, folder / "first", last=HALF)
        second = train_case(case, folder / "second", first=HALF, resume=first["checkpoint"])
        results[str(case)] = [whole, first, second]
    return results


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_distributed(_same, 2, tmp_path_factory.mktemp("same"))[0]


@pytest.mark.parametrize("case", SAME, ids=str)
def test_same_topology_is_bit_identical(resumed: dict[str, list[Any]], case: Case) -> None:
    whole, first, second = resumed[str(case)]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["scales"] + second["scales"] == whole["scales"]
    unbroken, broken = CheckpointReader(whole["checkpoint"]), CheckpointReader(second["checkpoint"])
    assert unbroken.moments() == broken.moments()
    for kind in (MASTER, *unbroken.moments()):
        for name in unbroken.names(kind):
            assert torch.equal(unbroken.full(kind, name), broken.full(kind, name)), (kind, name)
    assert unbroken.state["engine"] == broken.state["engine"]
    for name, value in model_state(unbroken).items():
        assert torch.equal(value, model_state(broken)[name]), name


def test_the_loss_scale_grew_before_and_after_the_break(resumed: dict[str, list[Any]]) -> None:
    """Else the test above says nothing about the scaler's counters."""
    _, first, second = resumed[str(SAME[2])]
    assert first["scales"][0] < first["scales"][-1] < second["scales"][-1]


def _start(rank: int, folder: Path) -> dict[str, Any]:
    return {str(case): train_case(case, folder, last=HALF) for case in STAGES}


def _go_on(rank: int, starts: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        f"{name} > {case}": train_case(case, folder / name, first=HALF, resume=start["checkpoint"])
        for name, start in starts.items()
        for case in STAGES
    }


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """Begun on 1 and 2 workers at each stage, ended on 2 and 1 at each stage."""
    folder = tmp_path_factory.mktemp("moved")
    results = {}
    for before, after in ((1, 2), (2, 1)):
        starts = run_distributed(_start, before, folder / f"{before}")[0]
        results[before, after] = run_distributed(_go_on, after, starts, folder / f"{before}-{after}")[0]
    return results


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_distributed(_unbroken, 1, tmp_path_factory.mktemp("unbroken"))[0]


def _unbroken(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    return model_state(CheckpointReader(train_case(STAGES[0], folder)["checkpoint"]))


@pytest.mark.parametrize("workers", [(1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("after", STAGES, ids=str)
@pytest.mark.parametrize("before", STAGES, ids=str)
def test_another_topology_goes_on_to_the_same_weights(
    moved: Any, unbroken: dict[str, torch.Tensor], before: Case, after: Case, workers: tuple[int, int]
) -> None:
    found = model_state(CheckpointReader(moved[workers][f"{before} > {after}"]["checkpoint"]))
    for name, value in unbroken.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < 1e-5, f"{name}: {error:.1e}"
