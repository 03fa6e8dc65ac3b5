"""Traces of a topology against one process: equal where nothing is wrong, and each planted fault named by its layer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import run_distributed
from engine_cases import OPTIMIZERS, Case, build_batches, build_engine, rank_rows
from temper.data.batches import Batch
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.errors import RunError
from temper.launch import verify
from temper.parallel import halo
from temper.parallel.groups import Group
from temper.plan.phases import PhasePlan, Pruning
from temper.verify import Comparison, begin_at_once, compare, trace

STEPS = 3
BLOCKS = dict.fromkeys("012345", "image_blocks")
MAPS = {"0": "output_maps", "3": "input_maps", "7": "output_activations"}
PRUNED = {"3.weight": 0.5, "7.weight": 0.3}
SPARSE = PhasePlan("sparse-1", "sparse", 0, STEPS, 0.1, "", {}, Pruning("weights", "magnitude", PRUNED, 0))
MASK = torch.rand(10, 7 * 64, generator=torch.Generator().manual_seed(3)) > 0.5


def build_net() -> nn.Module:
    """With a bias before a batch norm, whose gradient is rounding, and dropout: both must not count as differences."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 7, 3, padding=1, bias=False),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Sequential(nn.Dropout(0.5), nn.Flatten()),
        nn.Linear(7 * 64, 10),
    )


def _trace(case: Case, folder: Path, fault: str = "") -> None:
    model = build_net()
    engine, batch = build_engine(case, model=model)
    if "sparse" in fault:
        begin_at_once(engine, SPARSE, folder)
    _plant(fault, engine)
    rows = rank_rows(engine, batch)
    none = torch.zeros_like(rows)
    parts = (Batch(inputs[rows], targets[rows], rows, none) for inputs, targets in build_batches()[:STEPS])
    trace(engine, model, parts, folder, lr_at=lambda applied: OPTIMIZERS[case.optimizer]["lr"], seed=0)


def _trace_all(rank: int, items: dict[str, tuple[Case, str]], folder: Path) -> None:
    for name, (case, fault) in items.items():
        _trace(case, folder / name, fault)


# -------------------------------------------------------------------------------------------------- planted faults


def _plant(fault: str, engine: DeepSpeedEngine) -> None:
    if fault:
        FAULTS[fault](engine, dist.get_rank())


def _wrong_accumulation(engine: DeepSpeedEngine, rank: int) -> None:
    """The first stage divides by one micro-batch too few."""
    if engine.groups.pipeline.rank == 0:
        for _, param in engine.named_parameters():
            param.register_hook(lambda grad: grad * (4 / 3))


def _unsynchronised(engine: DeepSpeedEngine, rank: int) -> None:
    """Each rank steps one parameter with its own gradient."""
    param = dict(engine.named_parameters())["3.weight"]
    own: list[Tensor] = []
    param.register_hook(lambda grad: own.append(grad.clone()))

    def put_back(*_unused: Any) -> None:
        assert param.grad is not None
        param.grad.copy_(own[-1])

    engine.optimizer.register_step_pre_hook(put_back)


def _missing_halo(engine: DeepSpeedEngine, rank: int) -> None:
    """The rows and columns next to a block are taken for zeros in the second convolution."""
    conv: Any = dict(engine.module.named_modules())["3"]
    forward = conv.forward

    def keep_own(pieces: Any, places: Any, put: Any, exchange: Any, group: Group) -> None:
        put(places[group.rank], pieces[group.rank])

    def alone(images: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(halo, "_swap", keep_own)
            return forward(images)

    conv.forward = alone


def _masked(engine: DeepSpeedEngine, offset_of: Any) -> None:
    def apply(*_unused: Any) -> None:
        for item in engine.fragments():
            if item.name == "7.weight":
                start = offset_of(item)
                item.master.mul_(MASK.flatten()[start : start + item.numel])

    engine.optimizer.register_step_post_hook(apply)


def _own_threshold(engine: DeepSpeedEngine, rank: int) -> None:
    """Each rank prunes the smallest of the part that it has."""
    for owner, kept in engine._masks._kept.items():
        values = owner.detach().abs().flatten()
        threshold = values.kthvalue(round(0.5 * len(values))).values
        kept.copy_((owner.detach().abs() > threshold).to(kept.dtype))


def _moving_weights(engine: DeepSpeedEngine, rank: int) -> None:
    """The masks are not held: pruned weights move again."""
    for kept in engine._masks._kept.values():
        kept.fill_(1)
    engine._masks.shard_of = _shard_of(engine)  # type: ignore[method-assign]


def _shard_of(engine: DeepSpeedEngine) -> Any:
    """What was chosen, whatever is held."""
    chosen = {(item.name, item.start): item.master != 0 for item in engine.fragments()}

    def shard_of(item: Any) -> dict[str, Tensor]:
        return {"mask": chosen[item.name, item.start]} if item.name in PRUNED else {}

    return shard_of


FAULTS = {
    "sparse": lambda engine, rank: None,
    "sparse, own threshold": _own_threshold,
    "sparse, moving weights": _moving_weights,
    "wrong accumulation factor": _wrong_accumulation,
    "unsynchronised parameter": _unsynchronised,
    "missing halo": _missing_halo,
    "mask": lambda engine, rank: _masked(engine, lambda item: item.start),
    "mask on the wrong shard": lambda engine, rank: _masked(engine, lambda item: 0),
}

# Name → case and what is planted in it. Those named "alone…" run in one process.
ALONE = {
    "alone-1-sgd": (Case(accumulation=1), ""),
    "alone-4-sgd": (Case(accumulation=4), ""),
    "alone-1-adam": (Case(optimizer="adam"), ""),
    "alone-1-fp16": (Case(dtype="fp16"), ""),
    "alone-1-bf16": (Case(dtype="bf16"), ""),
    "alone-1-mask": (Case(), "mask"),
    "alone-1-sparse": (Case(), "sparse"),
    "alone-1-sparse-fp16": (Case(dtype="fp16"), "sparse"),
}
TWO = {
    "zero0": (Case(), ""),
    "zero3": (Case(zero=3), ""),
    "adam": (Case(zero=1, optimizer="adam"), ""),
    "pipeline": (Case(pipeline=2, accumulation=4), ""),
    "maps": (Case(tensor=2, splits=MAPS), ""),
    "blocks": (Case(tensor=2, splits=BLOCKS), ""),
    "fp16": (Case(zero=2, dtype="fp16"), ""),
    "bf16": (Case(tensor=2, dtype="bf16", splits=MAPS), ""),
    "masked": (Case(zero=1), "mask"),
    "sparse": (Case(zero=2), "sparse"),
    "sparse maps": (Case(tensor=2, splits=MAPS), "sparse"),
    "sparse zero3": (Case(zero=3, dtype="fp16"), "sparse"),
    "threshold": (Case(zero=1), "sparse, own threshold"),
    "moving": (Case(zero=1), "sparse, moving weights"),
    "accumulation": (Case(pipeline=2, accumulation=4), "wrong accumulation factor"),
    "unsynchronised": (Case(), "unsynchronised parameter"),
    "halo": (Case(tensor=2, splits=BLOCKS), "missing halo"),
    "shard": (Case(zero=1), "mask on the wrong shard"),
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    run_distributed(_trace_all, 1, ALONE, folder)
    run_distributed(_trace_all, 2, TWO, folder)
    return folder


def _compared(traces: Path, name: str, against: str) -> Comparison:
    return compare(traces / against, traces / name, TWO[name][0].dtype)


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("zero0", "alone-1-sgd"),
        ("zero3", "alone-1-sgd"),
        ("adam", "alone-1-adam"),
        ("pipeline", "alone-4-sgd"),
        ("maps", "alone-1-sgd"),
        ("blocks", "alone-1-sgd"),
        ("fp16", "alone-1-fp16"),
        ("bf16", "alone-1-bf16"),
        ("masked", "alone-1-mask"),
        ("sparse", "alone-1-sparse"),
        ("sparse maps", "alone-1-sparse"),
        ("sparse zero3", "alone-1-sparse-fp16"),
    ],
)
def test_a_right_topology_is_equal(traces: Path, name: str, against: str) -> None:
    found = _compared(traces, name, against)
    assert found.difference is None, str(found.difference)
    assert [step.step for step in found.steps] == list(range(STEPS + 1))
    share = 0.8 if TWO[name][0].dtype != "fp32" else 0.99
    # A weight that is pruned, 31 % of them, is compared with zero instead.
    assert found.compared > (share - 0.31 if "sparse" in name else share)


@pytest.mark.parametrize(
    ("name", "against", "step", "what", "layer"),
    [
        # Gradients are searched as the backward pass makes them: the first stage's last parameter is the first wrong.
        ("accumulation", "alone-4-sgd", 1, "gradient", "3.weight"),
        ("unsynchronised", "alone-1-sgd", 1, "the copy on another rank", "3.weight"),
        ("halo", "alone-1-sgd", 1, "output", "3"),
        ("shard", "alone-1-mask", 1, "weight", "7.weight"),
        ("threshold", "alone-1-sparse", 0, "mask", "7.weight"),
        ("moving", "alone-1-sparse", 1, "pruned weight", "3.weight"),
    ],
)
def test_a_planted_fault_is_named(traces: Path, name: str, against: str, step: int, what: str, layer: str) -> None:
    found = _compared(traces, name, against).difference
    assert found is not None
    assert (found.step, found.what, found.name) == (step, what, layer)
    assert str(found).startswith(f"step {step}: {what} of {layer} differs by ")


@pytest.mark.parametrize("call", ["open_run", "log_certificate", ""])
def test_the_certificate_outlasts_a_store_that_is_away(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise RunError("MLflow is away")

    def open_run(uri: str, plan: Any, *, created: Any, **_: Any) -> str:
        created("run-1")
        return "run-1"

    closed: list[Any] = []
    said: list[str] = []
    for name, value in {
        "tracking_uri": lambda job: "here",
        "job_to_yaml": str,
        "open_run": open_run,
        "log_certificate": lambda *_: None,
        "close_run": lambda *told: closed.append(told),
    }.items():
        monkeypatch.setattr(verify, name, away if name == call else value)
    certificate = verify.Certificate("tiny", "f", {}, {}, 3, (), None, 1.0)
    plan: Any = SimpleNamespace(job=SimpleNamespace(name="tiny"), run_folder=tmp_path)
    kept = verify._keep(certificate, plan, "temper verify job.yaml", said.append)
    assert kept.run_id == ("" if call else "run-1")
    assert json.loads((tmp_path / verify.CERTIFICATE).read_text())["run_id"] == kept.run_id
    assert len(said) == (1 if call else 0)
    assert closed == ([] if call == "open_run" else [("here", "run-1", "FINISHED")])
