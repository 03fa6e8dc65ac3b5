"""Every legal combination of degrees, ZeRO stages and precisions computes what one process computes; every other one is
refused before the start.

The combinations are generated from the lists of degrees and sorted by the rules themselves. One group of processes per
number of ranks runs all of its cases; ranks may be more than cores.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import run_distributed
from engine_cases import Case, build_batches, build_net, reference, train_case
from temper.checkpoint import CheckpointReader, model_state
from temper.config.checks import check_job
from temper.config.compose import FEATURES, compose_table, conflict, legal_pairs
from temper.parallel.groups import MeshGroups, build_groups

STEPS = 4
CLIP = 1.0  # gradients are two to three times as long
WORKERS, PIPELINE, TENSOR, ZERO, DTYPES = (1, 2), (1, 2), (1, 2), (0, 1, 2, 3), ("fp32", "bf16", "fp16")
SPLITS = {
    "maps": {"0": "output_maps", "3": "input_maps", "7": "output_activations"},
    "blocks": dict.fromkeys("012345", "image_blocks"),
}


def _cases() -> list[tuple[int, Case]]:
    """(workers, case) for every combination of degrees."""
    cases = []
    for workers, pipeline, tensor, zero, dtype in itertools.product(WORKERS, PIPELINE, TENSOR, ZERO, DTYPES):
        for splits in SPLITS.values() if tensor > 1 else ({},):
            case = Case(
                zero=zero, dtype=dtype, pipeline=pipeline, tensor=tensor, splits=splits, accumulation=2, clip=CLIP
            )
            cases.append((workers, case))
            if (workers, dtype) == (2, "fp16"):
                cases.append((workers, replace(case, offload="cpu")))
    return cases


def _is_legal(workers: int, case: Case) -> bool:
    return not check_job(case.job(workers))


LEGAL = [item for item in _cases() if _is_legal(*item)]
ILLEGAL = [item for item in _cases() if not _is_legal(*item)]


def _ranks(workers: int, case: Case) -> int:
    return workers * case.pipeline * case.tensor


def _name(item: tuple[int, Case]) -> str:
    return f"data{item[0]}-{item[1]}"


def _train_all(rank: int, items: list[tuple[int, Case]], folder: Path) -> dict[str, dict[str, Any]]:
    groups: dict[tuple[int, int, int], MeshGroups] = {}
    results = {}
    for workers, case in items:
        mesh = workers, case.pipeline, case.tensor
        if mesh not in groups:
            groups[mesh] = build_groups(*mesh)
        results[_name((workers, case))] = train_case(case, folder / str(workers), last=STEPS, groups=groups[mesh])
    return results


def _is_slow(item: tuple[int, Case]) -> bool:
    """Four and more ranks on two cores take long; of four, fp32 alone is quick enough."""
    return _ranks(*item) > 4 or (_ranks(*item) == 4 and item[1].dtype != "fp32")


class Trained:
    """What each case gave; the first one of so many ranks trains all of them, slow ones apart."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[tuple[int, bool], dict[str, dict[str, Any]]] = {}

    def __getitem__(self, item: tuple[int, Case]) -> dict[str, Any]:
        group = ranks, slow = _ranks(*item), _is_slow(item)
        if group not in self._results:
            items = [other for other in LEGAL if (_ranks(*other), _is_slow(other)) == (ranks, slow)]
            self._results[group] = run_distributed(_train_all, ranks, items, self._folder)[0]
        return self._results[group][_name(item)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("matrix"))


EVERY_LEGAL = [pytest.param(item, marks=pytest.mark.slow if _is_slow(item) else ()) for item in LEGAL]


# Errors of the end point as a share of the way to it; test_parallel_equality tells where they come from.
PATH_ERROR = {"bf16": 0.1, "fp16": 0.05}


@pytest.mark.parametrize("item", EVERY_LEGAL, ids=_name)
def test_a_legal_combination_equals_one_process(trained: Trained, item: tuple[int, Case]) -> None:
    expected = reference("sgd", CLIP, 2, STEPS)
    found = model_state(CheckpointReader(trained[item]["checkpoint"]))
    assert set(found) == set(expected)
    if item[1].dtype == "fp32":
        for name, value in expected.items():
            error = (found[name].double() - value.double()).norm() / value.double().norm()
            assert error < 1e-5, f"{name}: {error:.1e}"
        return
    start = build_net().state_dict()
    names = dict(build_net().named_parameters())
    off = torch.cat([(found[name] - expected[name]).flatten() for name in names])
    path = torch.cat([(expected[name] - start[name]).flatten() for name in names])
    assert off.norm() / path.norm() < PATH_ERROR[item[1].dtype]


@pytest.mark.parametrize("item", EVERY_LEGAL, ids=_name)
def test_predictions_are_those_of_the_whole_model(trained: Trained, item: tuple[int, Case]) -> None:
    net = build_net().eval()
    net.load_state_dict(model_state(CheckpointReader(trained[item]["checkpoint"])))
    with torch.no_grad():
        expected = net(build_batches()[0][0][:30])
    tolerance = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}[item[1].dtype]
    error = (trained[item]["logits"] - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("item", EVERY_LEGAL, ids=_name)
def test_norms_and_skipped_steps_are_those_of_one_worker(trained: Trained, item: tuple[int, Case]) -> None:
    alone = trained[1, Case(dtype=item[1].dtype, accumulation=2, clip=CLIP)]
    here = trained[item]
    tolerance = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}[item[1].dtype]
    assert here["norms"] == pytest.approx(alone["norms"], rel=tolerance)
    assert here["applied"] == alone["applied"]
    assert here["scales"] == alone["scales"]


@pytest.mark.parametrize("item", ILLEGAL, ids=_name)
def test_an_illegal_combination_is_refused_with_the_nearest_legal_setting(item: tuple[int, Case]) -> None:
    problems = check_job(item[1].job(item[0]))
    assert all(problem.key.startswith(("parallel.", "precision.")) for problem in problems)
    assert all("use " in problem.remedy for problem in problems)


def test_the_table_says_of_every_pair_what_the_rules_say() -> None:
    assert len(legal_pairs()) == compose_table().count("✓")
    assert ("pipeline", "split layers") in legal_pairs()
    problem = conflict("ZeRO-3", "pipeline")
    assert problem is not None and problem.remedy == "use zero: 1"
    assert set(FEATURES) >= {"pipeline", "split layers", "image blocks", "parameter server", "fp16"}
