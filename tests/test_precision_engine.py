"""Mixed precision in the engine, on two ranks: the scaler's trace, each switch, what is observed, and the policies.

One group of ranks computes everything; the tests look at what it brought back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import run_distributed
from engine_cases import BATCH, Case, build_batches, build_engine, build_net, cross_entropy, load, save, step
from temper import checkpoint
from temper.data.batches import Batch, DataState
from temper.engine.base import StepResult
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.errors import RunError
from temper.loop import Calendar, Record, Reporter, TrainState, build_recovery, train
from temper.parallel.groups import MeshGroups, build_groups
from temper.plan.peaks import Speed
from temper.precision.twin import gathered_weights
from temper.precision.watch import TwinWatch, WatchedStep

WORKERS = 2
MARK = 30_000.0
"""In one pixel of one example, it makes the gradient behind the gate infinite."""


class Gate(nn.Module):
    """The identity, but for a marked batch: its gradient is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and bool(x.abs().max() > MARK / 100):
            x.register_hook(lambda grad: grad * float("inf"))
        return x


def build_gated_net() -> nn.Module:
    """As `build_net`, with the gate behind the first convolution."""
    convolution, *rest = build_net()
    model = nn.Sequential()
    for name, module in [("stem", convolution), ("gate", Gate()), ("body", nn.Sequential(*rest))]:
        model.add_module(name, module)
    return model


def marked_batches(marked: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Steps of `marked` (0-based) have a marked example, which rank 1 gets."""
    batches = [(inputs.clone(), targets) for inputs, targets in build_batches()]
    for number in marked:
        batches[number][0][-1, 0, 3, 3] = MARK
    return batches


def gated_steps(engine: DeepSpeedEngine, count: int, marked: tuple[int, ...]) -> list[StepResult]:
    half, rank = BATCH // WORKERS, engine.groups.data.rank
    rows = slice(rank * half, (rank + 1) * half)
    return [
        engine.step(inputs[rows], targets[rows], lr=0.05, seed=number)
        for number, (inputs, targets) in enumerate(marked_batches(marked)[:count])
    ]


# --------------------------------------------------------------------------------------------------- what ranks compute


def fp16(zero: int = 1, **precision: Any) -> Case:
    return Case(zero=zero, dtype="fp16", scale=precision)


def scaler_traces(groups: MeshGroups) -> dict[str, Any]:
    """Scale before each step, whether it was applied, whether the scale was at its end."""
    traces = {}
    for name, zero, precision, marked in (
        ("halved", 1, {"initial_scale": 16.0, "scale_window": 3, "hysteresis": 1, "min_scale": 4.0}, (2, 3, 4)),
        ("halved-3", 3, {"initial_scale": 16.0, "scale_window": 3, "hysteresis": 1, "min_scale": 4.0}, (2, 3, 4)),
        ("hysteresis", 1, {"initial_scale": 4.0, "scale_window": 100, "hysteresis": 2, "min_scale": 2.0}, (1, 3, 4, 5)),
        ("static", 1, {"loss_scale": 4.0}, (1, 2)),
    ):
        engine, _ = build_engine(fp16(zero, **precision), groups, build_gated_net())
        results = gated_steps(engine, 10, marked)
        traces[name] = [(result.loss_scale, result.applied, result.at_min_scale) for result in results]
        traces[f"{name} finite"] = all(bool(param.isfinite().all()) for param in engine.module.parameters())
    return traces


def growth(groups: MeshGroups) -> dict[str, Any]:
    """Ten steps with a scale that doubles every other step, and the same with a fixed one."""
    found = {}
    for zero in (1, 3):
        for name, precision in (
            ("growing", {"initial_scale": 256.0, "scale_window": 2}),
            ("fixed", {"loss_scale": 1024.0}),
        ):
            case = fp16(zero, **precision)
            engine, batch = build_engine(case, groups)
            results = [step(engine, batch, case, number) for number in range(10)]
            found[f"{name}-{zero}"] = {
                "weights": whole_masters(engine),
                "norms": [float(result.grad_norm or 0) for result in results],
                "scales": [result.loss_scale for result in results],
            }
    return found


def whole_masters(engine: DeepSpeedEngine) -> Tensor:
    """All fp32 weights of the model as one tensor."""
    shapes = {name: engine.shapes()[name] for name, _ in engine.named_parameters()}
    group = engine.groups.data.process_group
    weights = gathered_weights(engine.fragments(), shapes, torch.float32, engine.device, group)
    return torch.cat([value.flatten() for value in weights.values()])


MASTERED = (("fp16", 1), ("fp16", 3), ("bf16", 2))


def switches(groups: MeshGroups) -> dict[str, Any]:
    """Weights and losses with nothing switched off, and with one part off."""
    found: dict[str, Any] = {}
    for dtype, zero in MASTERED:
        for switch in (None, "master_weights", *(["fp32_accumulation"] if dtype == "fp16" else [])):
            scale: dict[str, Any] = {"loss_scale": 128.0} if dtype == "fp16" else {}
            case = Case(zero=zero, dtype=dtype, scale=scale | ({switch: False} if switch else {}))
            engine, batch = build_engine(case, groups)
            losses = [float(step(engine, batch, case, number).loss) for number in range(4)]
            found[f"{dtype}-{zero}-{switch}"] = (whole_masters(engine), losses)
    return found


def observed(groups: MeshGroups) -> dict[str, Any]:
    found: dict[str, Any] = {}
    half, rank = BATCH // WORKERS, groups.data.rank
    inputs, targets = marked_batches((0,))[0]
    inputs, targets = inputs[rank * half : (rank + 1) * half], targets[rank * half : (rank + 1) * half]
    clean = inputs.clamp(-4, 4)
    for zero, offload in ((1, "none"), (2, "cpu"), (3, "none")):
        case = Case(zero=zero, offload=offload, dtype="fp16", scale={"loss_scale": 64.0})
        engine, _ = build_engine(case, groups, build_gated_net())
        engine.step(clean, targets, lr=0.05, seed=0)
        before = whole_masters(engine)
        watch = TwinWatch(engine, cross_entropy, 1, groups.data.process_group, underflow_every=2)

        def look(number: int, x: Tensor, applied: bool, scale: float) -> Any:
            return watch(WatchedStep(number, x, targets, 0, applied, scale))  # noqa: B023

        twin = engine.twin(torch.float16).eval()
        found[f"{zero}-{offload}"] = {
            "twin": torch.equal(twin(clean.half()), engine.predict(clean)),
            "dtypes": {param.dtype for param in engine.twin(torch.float32).parameters()},
            "marked": look(1, inputs, False, 64.0),
            "high": look(1, clean, False, 2.0**30),
            "nothing": look(1, clean, False, 64.0),
            "applied": look(1, clean, True, 64.0),
            "low scale": look(2, clean, True, 2.0**-20),
            "good scale": look(4, clean, True, 2.0**12),
            "untouched": torch.equal(before, whole_masters(engine)),
        }
    return found


EXHAUSTING = {"initial_scale": 4.0, "scale_window": 100, "hysteresis": 1, "min_scale": 2.0}
MARKED = (7, 8, 12)


def train_with(
    policy: Any, zero: int, folder: Path, groups: MeshGroups, last: int = 16, marked: tuple[int, ...] = MARKED
) -> dict[str, Any]:
    """Trains as a worker does, from the newest checkpoint in `folder`; a checkpoint every fifth step."""
    engine, batch = build_engine(fp16(zero, **EXHAUSTING), groups, build_gated_net())
    records: list[Record] = []
    reached: list[TrainState] = []
    rank, half = groups.data.rank, BATCH // WORKERS

    def write(state: TrainState) -> None:
        reached.append(state)
        saved = save(engine, folder, state.step)
        if rank == 0:
            torch.save(asdict(state), saved / "train.pt")
        dist.barrier()

    def restore() -> TrainState | None:
        saved = checkpoint.list_checkpoints(folder)
        if not saved:
            return None
        load(engine, saved[-1])
        return TrainState(**torch.load(saved[-1] / "train.pt"))

    def batches(first: int) -> Iterator[tuple[Batch, DataState]]:
        rows = slice(rank * half, (rank + 1) * half)
        for number, (inputs, targets) in enumerate(marked_batches(marked)[:last]):
            if number >= first:
                yield Batch(inputs[rows], targets[rows], targets[rows], targets[rows]), DataState(number + 1, 0, 0)

    state = restore() or TrainState()
    reporter = Reporter(
        records.extend,
        lambda: False,
        first_step=state.step,
        rank=rank,
        world_size=WORKERS,
        speed=Speed(BATCH),
        record_every=1,
        device=torch.device("cpu"),
    )
    failure = ""
    try:
        train(
            engine,
            batches(state.step),
            state,
            calendar=Calendar(16, 0, 5),
            lr_at=lambda applied: 0.05 / (1 + applied),
            seed=3,
            rank=rank,
            reporter=reporter,
            evaluate=lambda step: {},
            save=write,
            watch=TwinWatch(engine, cross_entropy, batch.accumulation, groups.data.process_group, 0),
            recover=build_recovery(policy, restore),
        )
    except RunError as error:
        failure = str(error)
    metrics = {record["step"]: record["metrics"] for record in records}
    return {
        "state": asdict(reached[-1]) | {"seconds": 0.0},
        "engine": engine.state(),
        "weights": {item.name + str(item.start): item.master.clone() for item in engine.fragments()},
        "failure": failure,
        "events": {record["step"]: record["events"] for record in records if "events" in record},
        "scales": {step: values["precision/loss_scale"] for step, values in metrics.items()},
        "back_offs": {step: values.get("precision/back_offs") for step, values in metrics.items()},
    }


def policies(groups: MeshGroups, folder: Path) -> dict[str, Any]:
    found = {policy: train_with(policy, 1, folder / policy, groups) for policy in ("stop", "hold")}
    for zero, killed in ((1, 12), (3, 9)):
        found[f"back_off-{zero}"] = train_with("back_off", zero, folder / f"whole-{zero}", groups)
        # What was done after the last checkpoint is lost.
        place = folder / f"killed-{zero}"
        train_with("back_off", zero, place, groups, last=killed)
        found[f"killed-{zero}"] = train_with("back_off", zero, place, groups)
    found["never applied"] = train_with("back_off", 1, folder / "row", groups, marked=tuple(range(6, 16)))
    return found


def fresh_moments(groups: MeshGroups, folder: Path) -> bool:
    """Whether a checkpoint from before the first applied step, loaded later, brings the first step back."""
    case = Case(zero=1, dtype="fp16", optimizer="adamw", scale={"loss_scale": 64.0})
    engine, batch = build_engine(case, groups)
    start = save(engine, folder / "start", 0)
    step(engine, batch, case, 0)
    once = whole_masters(engine)
    step(engine, batch, case, 1)
    load(engine, start)
    step(engine, batch, case, 0)
    return torch.equal(once, whole_masters(engine))


def compute(rank: int, folder: Path) -> dict[str, Any]:
    groups = build_groups(WORKERS)
    return {
        "traces": scaler_traces(groups),
        "growth": growth(groups),
        "switches": switches(groups),
        "observed": observed(groups),
        "policies": policies(groups, folder),
        "fresh": fresh_moments(groups, folder),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(compute, WORKERS, tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def found(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return ranks[0]


# --------------------------------------------------------------------------------------------------------- loss scaling


@pytest.mark.parametrize("name", ["halved", "halved-3"])
def test_skip_halve_and_double(found: dict[str, Any], name: str) -> None:
    """Overflow in steps 2, 3, 4: 16 → 8 → 4, which is the minimum; after three clean steps and one more it doubles."""
    trace = found["traces"][name]
    assert [scale for scale, _, _ in trace] == [16, 16, 16, 8, 4, 4, 4, 4, 4, 8]
    assert [number for number, (_, applied, _) in enumerate(trace) if not applied] == [2, 3, 4]
    assert [number for number, (_, _, at_min_scale) in enumerate(trace) if at_min_scale] == [4]
    assert found["traces"][f"{name} finite"]


def test_hysteresis_is_used_up_first(found: dict[str, Any]) -> None:
    trace = found["traces"]["hysteresis"]
    assert [scale for scale, _, _ in trace] == [4, 4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert [number for number, (_, _, at_min_scale) in enumerate(trace) if at_min_scale] == [4, 5]


def test_a_static_scale_skips_and_has_no_end(found: dict[str, Any]) -> None:
    trace = found["traces"]["static"]
    assert trace == [(4.0, number not in (1, 2), False) for number in range(10)]


@pytest.mark.parametrize("zero", [1, 3])
def test_a_growing_scale_does_not_shrink_a_step(found: dict[str, Any], zero: int) -> None:
    """DeepSpeed alone divides the gradients of the step in which the scale doubles by the new scale, half of them."""
    growing, fixed = found["growth"][f"growing-{zero}"], found["growth"][f"fixed-{zero}"]
    assert growing["scales"] == [256, 256, 256, 512, 512, 1024, 1024, 2048, 2048, 4096]
    assert growing["norms"] == pytest.approx(fixed["norms"], rel=1e-5)
    # Powers of two round nothing.
    assert torch.equal(growing["weights"], fixed["weights"])


# ------------------------------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize(("name", "zero"), MASTERED)
def test_master_weights(found: dict[str, Any], name: str, zero: int) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    masters, losses = found["switches"][f"{name}-{zero}-None"]
    rounded, other_losses = found["switches"][f"{name}-{zero}-master_weights"]
    assert torch.equal(rounded, rounded.to(dtype).float())
    assert (masters != masters.to(dtype).float()).float().mean() > 0.9
    # The first loss is of weights that nothing has updated.
    assert losses[0] == other_losses[0]
    assert losses[1:] != other_losses[1:]
    assert losses == pytest.approx(other_losses, abs=0.1)


@pytest.mark.parametrize("zero", [1, 3])
def test_fp32_accumulation(found: dict[str, Any], zero: int) -> None:
    wide, losses = found["switches"][f"fp16-{zero}-None"]
    narrow, other_losses = found["switches"][f"fp16-{zero}-fp32_accumulation"]
    assert losses != other_losses
    assert losses == pytest.approx(other_losses, rel=0.02)
    start = torch.cat([param.detach().flatten() for param in build_net().parameters()])
    assert 0 < (wide - narrow).norm() < 0.2 * (wide - start).norm()


# ------------------------------------------------------------------------------------------------------------- observed

STAGES = ["1-none", "2-cpu", "3-none"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_twin_has_the_weights_of_forward(found: dict[str, Any], stage: str) -> None:
    assert found["observed"][stage]["twin"]
    assert found["observed"][stage]["dtypes"] == {torch.float32}
    assert found["observed"][stage]["untouched"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_module_is_named_on_every_rank(ranks: list[dict[str, Any]], stage: str) -> None:
    """The marked example is on rank 1 alone; batch norms spread what it does over both."""
    for rank in ranks:
        seen = rank["observed"][stage]
        assert seen["marked"].events == ("loss scale 64: first non-finite gradient in gate (its output)",)
        assert seen["high"].events == ("loss scale 1.07374e+09: first non-finite gradient in body.6 (its output)",)
        [event] = seen["nothing"].events
        assert event.startswith("loss scale 64: no value of any rank alone is non-finite")
        assert seen["applied"].events == ()
        assert seen["applied"].metrics == {}


@pytest.mark.parametrize("stage", STAGES)
def test_underflow_is_sampled_alike_on_every_rank(ranks: list[dict[str, Any]], stage: str) -> None:
    first, second = (rank["observed"][stage] for rank in ranks)
    low, good = first["low scale"].metrics, first["good scale"].metrics
    assert low == second["low scale"].metrics
    assert 0.3 < low["precision/underflow"] <= 1
    assert good["precision/underflow"] < 0.001
    assert set(low) > {"precision/underflow", "precision/underflow/stem.weight"}
    assert low["precision/underflow"] == pytest.approx(
        sum(low.get(f"precision/underflow/{name}", 0.0) * param.numel() for name, param in parameters())
        / sum(param.numel() for _, param in parameters())
    )


def parameters() -> list[tuple[str, Tensor]]:
    return list(build_gated_net().named_parameters())


# ------------------------------------------------------------------------------------------------------------- policies


def test_stop_saves_and_says_where(found: dict[str, Any]) -> None:
    run = found["policies"]["stop"]
    assert run["state"]["step"] == 9
    assert run["failure"].startswith(
        "step 9: gradients overflow at the smallest loss scale "
        "(loss scale 2: first non-finite gradient in gate (its output)). The state is saved"
    )
    assert run["events"] == {
        8: ["loss scale 4: first non-finite gradient in gate (its output)"],
        9: ["loss scale 2: first non-finite gradient in gate (its output)"],
    }


def test_hold_skips(found: dict[str, Any]) -> None:
    run = found["policies"]["hold"]
    assert run["failure"] == ""
    assert run["state"] == asdict(TrainState(16, 13))
    assert run["scales"][13] == 2.0
    assert sorted(run["events"]) == [8, 9, 13]


def test_back_off_brings_scale_and_weights_back(found: dict[str, Any]) -> None:
    """Steps 8 and 9 overflow, at scale 4 and 2: back to step 5 with scale 4; step 13 overflows at scale 4 again."""
    run = found["policies"]["back_off-1"]
    assert run["failure"] == ""
    assert run["state"] == asdict(TrainState(16, 11, undone=2, back_offs=1))
    assert run["scales"] == {step: {9: 2.0}.get(step, 4.0 if step < 14 else 2.0) for step in range(1, 17)}
    assert run["back_offs"] == {step: None if step < 9 else 1.0 for step in range(1, 17)}


@pytest.mark.parametrize("zero", [1, 3])
def test_a_killed_run_backs_off_to_the_same_weights(ranks: list[dict[str, Any]], zero: int) -> None:
    for rank in ranks:
        whole, broken = rank["policies"][f"back_off-{zero}"], rank["policies"][f"killed-{zero}"]
        assert whole["state"] == broken["state"]
        assert whole["engine"] == broken["engine"]
        assert whole["weights"].keys() == broken["weights"].keys()
        assert all(torch.equal(value, broken["weights"][name]) for name, value in whole["weights"].items())


def test_back_off_gives_up(found: dict[str, Any]) -> None:
    """Everything from step 7 on overflows: 4 → 2 → end, three times back to step 5, and the fourth time it stops."""
    run = found["policies"]["never applied"]
    assert "after 3 returns to the last checkpoint" in run["failure"]
    assert run["state"]["back_offs"] == 3
    assert run["state"]["step"] == 14


def test_a_checkpoint_from_before_the_first_step_has_no_moments(found: dict[str, Any]) -> None:
    assert found["fresh"]
