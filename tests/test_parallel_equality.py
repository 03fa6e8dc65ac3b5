"""Parallel means equal: every ZeRO stage, offload and worker count against a plain single-process PyTorch loop.

One process group per world size runs all cases; the tests then compare what each left in its checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distributed import run_distributed
from engine_cases import STEPS, Case, build_batches, build_engine, build_net, reference, step, train_case
from temper.checkpoint import CheckpointReader, model_state

WORLD_SIZES = (1, 2)
FP32 = [
    *(Case(zero=zero) for zero in (0, 1, 2, 3)),
    *(Case(zero=zero, offload="cpu", optimizer="adamw") for zero in (1, 2, 3)),
    *(Case(zero=zero, optimizer=name, clip=0.5) for zero in (0, 2, 3) for name in ("adam", "adamw", "adagrad")),
    *(Case(zero=zero, accumulation=4, clip=0.5) for zero in (0, 1, 2, 3)),
]
LOW = [
    *(Case(zero=zero, dtype=dtype) for zero in (0, 1, 2, 3) for dtype in ("bf16", "fp16")),
    *(Case(zero=zero, dtype=dtype, optimizer="adamw") for zero in (0, 2) for dtype in ("bf16", "fp16")),
    Case(zero=0, dtype="fp16", optimizer="adagrad"),
    Case(zero=2, dtype="fp16", optimizer="adagrad", accumulation=2),
]


def _train_all(rank: int, cases: list[Case], folder: Path) -> dict[str, dict[str, Any]]:
    return {str(case): train_case(case, folder) for case in cases}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("equal")
    return {size: run_distributed(_train_all, size, FP32 + LOW, folder)[0] for size in WORLD_SIZES}


def _state(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return model_state(CheckpointReader(result["checkpoint"]))


@pytest.mark.parametrize("case", FP32, ids=str)
@pytest.mark.parametrize("workers", WORLD_SIZES)
def test_fp32_equals_one_process(trained: Any, case: Case, workers: int) -> None:
    expected = reference(case.optimizer, case.clip, case.accumulation)
    found = _state(trained[workers][str(case)])
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


# The error of the end point, as a share of the way from start to end. A number keeps 8 bits in bf16 and 11 in fp16;
# that is the error of one step's gradient, and 20 steps with momentum through two batch norms amplify it: to 9 % and
# 7 % with SGD at lr 0.05, 3 % and 1.5 % with AdamW at lr 0.001; Adagrad's first step moves every weight by lr ×
# sign(gradient), so that a sign lost to rounding costs 2 lr. The bounds are about 1.5 times what was measured.
PATH_ERROR = {
    ("bf16", "sgd"): 0.14,
    ("fp16", "sgd"): 0.11,
    ("bf16", "adamw"): 0.05,
    ("fp16", "adamw"): 0.025,
    ("fp16", "adagrad"): 0.12,
}


@pytest.mark.parametrize("case", LOW, ids=str)
@pytest.mark.parametrize("workers", WORLD_SIZES)
def test_low_precision_follows_fp32(trained: Any, case: Case, workers: int) -> None:
    expected = reference(case.optimizer, case.clip, case.accumulation)
    found = _state(trained[workers][str(case)])
    start = build_net().state_dict()
    names = dict(build_net().named_parameters())
    off = torch.cat([(found[name] - expected[name]).flatten() for name in names])
    path = torch.cat([(expected[name] - start[name]).flatten() for name in names])
    assert off.norm() / path.norm() < PATH_ERROR[case.dtype, case.optimizer]


@pytest.mark.parametrize("workers", WORLD_SIZES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_low_precision_is_the_same_at_every_stage(trained: Any, workers: int, dtype: str, zero: int) -> None:
    """Stage 0 in DeepSpeed would begin with a step of its own, and divide by a loss scale that was never applied."""
    for optimizer in ("sgd", "adamw") if zero == 2 else ("sgd",):
        here = trained[workers][str(Case(zero=zero, dtype=dtype, optimizer=optimizer))]
        there = trained[workers][str(Case(zero=0, dtype=dtype, optimizer=optimizer))]
        assert here["losses"] == pytest.approx(there["losses"], rel=2e-3)
        assert here["scales"] == there["scales"]
        assert here["applied"] == there["applied"]


@pytest.mark.parametrize("workers", WORLD_SIZES)
def test_gradient_norm_is_global_and_from_before_clipping(trained: Any, workers: int) -> None:
    norms = [trained[workers][str(Case(zero=zero, accumulation=4, clip=0.5))]["norms"] for zero in (0, 1, 2, 3)]
    assert all(len(values) == STEPS for values in norms)
    assert max(norms[0]) > 0.5
    for values in norms[1:]:
        assert values == pytest.approx(norms[0], rel=1e-4)


def _evaluate_between(rank: int) -> list[list[float]]:
    """Losses of the same steps with and without an evaluation between them, on a network with dropout."""
    runs = []
    for evaluated in (False, True):
        case = Case(zero=2)
        engine, batch = build_engine(case, model=nn.Sequential(build_net(), nn.Dropout(0.5)))
        losses = []
        for number in range(4):
            losses.append(float(step(engine, batch, case, number).loss))
            if evaluated:
                engine.predict(build_batches()[0][0])
        runs.append(losses)
    return runs


def test_an_evaluation_leaves_training_as_it_was() -> None:
    without, between = run_distributed(_evaluate_between, 2)[0]
    assert without == between
