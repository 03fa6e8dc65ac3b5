"""Downpour SGD without Ray: the shards' arithmetic, the worker's order of doing things, and the books."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from temper.checkpoint import (
    MASK,
    CheckpointReader,
    checkpoint_folder,
    model_state,
    write_manifest,
    write_shards,
)
from temper.checkpoint import Shard as Range
from temper.config.schema import OptimizerConfig, PrecisionConfig
from temper.engine.parameter_server import (
    DownpourWorker,
    MiniBatch,
    ParameterShard,
    Push,
    Replica,
    ShardState,
    Values,
    flatten,
    named_shapes,
    plan_ranges,
    plan_slots,
    stored_tensors,
)
from temper.errors import RunError
from temper.files import write_json
from temper.launch.ledger import LARGEST_STALENESS, Computed, Ledger, Pushed, StepRecords, Ticket
from temper.launch.parameter_server import plan_gates
from temper.launch.server_actors import PhaseSpec, find_start
from temper.optim import build_optimizer
from temper.plan.phases import PhasePlan, Pruning
from temper.run_folder import PHASE_MANIFEST
from temper.techniques.dsd.border import begin_phase
from temper.techniques.dsd.sparsity import count_zeros

CPU = torch.device("cpu")
OPTIMIZERS: list[dict[str, Any]] = [
    {"kind": "adagrad", "lr": 0.05},
    {"kind": "adagrad", "lr": 0.05, "weight_decay": 0.01},
    {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    {"kind": "adam", "lr": 0.01},
    {"kind": "adamw", "lr": 0.01, "weight_decay": 0.05},
]
ADAGRAD = OPTIMIZERS[0]
SIZE = 73  # parameters of the model


def optimizer_config(values: dict[str, Any]) -> OptimizerConfig:
    return TypeAdapter(OptimizerConfig).validate_python(values)


def build_model() -> nn.Module:
    # No bias before the norm: its gradient is rounding noise, which Adagrad and Adam would make a step of.
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3))


def cross_entropy(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"cross_entropy": nn.functional.cross_entropy(outputs.float(), targets)}


def mini_batch(number: int, lr: float = 0.05) -> MiniBatch:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(8, 5, generator=generator)
    return MiniBatch(inputs, inputs[:, :3].argmax(1), lr, seed=number)


class LocalShard:
    """A client of a shard in this process: a call is done when it is made. `log` notes the calls of all shards."""

    def __init__(self, shard: ParameterShard, log: list[str] | None = None) -> None:
        self.shard, self.log = shard, [] if log is None else log

    def fetch(self) -> Awaitable[tuple[Values, int]]:
        self.log.append("fetch")
        values, version = self.shard.fetch()
        return done((values.copy(), version))

    def push(self, worker: str, clock: int, gradient: Values, fetched_version: int, lr: float) -> Awaitable[int]:
        self.log.append("push")
        return done(self.shard.push(worker, clock, gradient, fetched_version, lr))


def done(value: Any) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def build_shards(number: int, config: dict[str, Any] = ADAGRAD) -> list[ParameterShard]:
    return [ParameterShard(build_model(), index, number, optimizer_config(config)) for index in range(number)]


def build_worker(
    shards: list[ParameterShard],
    *,
    name: str = "worker",
    n_fetch: int = 1,
    n_push: int = 1,
    clip_norm: float | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    log: list[str] | None = None,
) -> DownpourWorker:
    replica = Replica(build_model(), cross_entropy, PrecisionConfig(dtype=dtype), CPU)
    clients = [LocalShard(shard, log) for shard in shards]
    return DownpourWorker(name, replica, clients, n_fetch=n_fetch, n_push=n_push, clip_norm=clip_norm)


def values_of(shards: list[ParameterShard]) -> Tensor:
    return torch.cat([torch.from_numpy(shard.fetch()[0].copy()) for shard in shards])


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("shards", [1, 2, 3, 200])
def test_ranges_cover_the_parameters_evenly(shards: int) -> None:
    slots = plan_slots(build_model())
    ranges = plan_ranges(slots, shards)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == sum(param.numel() for param in build_model().parameters()) == SIZE
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


def plain_loop(config: dict[str, Any], steps: int, clip_norm: float | None) -> nn.Module:
    """What a user would write by hand."""
    model = build_model()
    optimizer = build_optimizer(optimizer_config(config), model.parameters())
    for number in range(steps):
        batch = mini_batch(number, config["lr"] / (1 + number))
        for group in optimizer.param_groups:
            group["lr"] = batch.lr
        torch.manual_seed(batch.seed)
        optimizer.zero_grad()
        cross_entropy(model(batch.inputs), batch.targets)["cross_entropy"].backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: "-".join(map(str, config.values())))
def test_one_worker_is_the_plain_loop(config: dict[str, Any], shards: int, clip_norm: float | None) -> None:
    made = build_shards(shards, config)
    worker = build_worker(made, clip_norm=clip_norm)

    async def train() -> None:
        for number in range(12):
            batch = mini_batch(number, config["lr"] / (1 + number))
            push = await worker.train(number, lambda batch=batch: batch)  # type: ignore[misc]
            assert push is not None
            assert push.staleness == 0

    asyncio.run(train())
    plain = plain_loop(config, 12, clip_norm)
    assert (values_of(made) - flatten(plain, plan_slots(plain))).abs().max() < 1e-6
    for name, value in stored_tensors(plain).items():
        assert torch.allclose(stored_tensors(worker.replica.module)[name], value, atol=1e-6), name


def test_staleness_is_the_updates_since_the_fetch() -> None:
    (shard,) = build_shards(1)
    gradient = torch.ones(SIZE).numpy()
    _, version = shard.fetch()
    assert shard.push("a", 1, gradient, version, 0.1) == 0
    assert shard.push("b", 1, gradient, version, 0.1) == 1
    assert shard.push("a", 2, gradient, version, 0.1) == 2
    _, version = shard.fetch()
    assert version == 3
    assert shard.push("b", 2, gradient, version, 0.1) == 0


def test_a_repeated_push_is_applied_once() -> None:
    (shard,) = build_shards(1)
    gradient = torch.ones(SIZE).numpy()
    shard.push("b", 1, gradient, 0, 0.1)
    assert shard.push("a", 1, gradient, 0, 0.1) == 1
    before = values_of([shard])
    assert shard.push("a", 1, gradient, 0, 0.1) == 1
    assert torch.equal(values_of([shard]), before)
    assert shard.version == 2


def save(folder: Path, step: int, shards: list[ParameterShard], model: nn.Module) -> Path:
    """A checkpoint as the shards of a run write it together."""
    target = checkpoint_folder(folder, step)
    for index, shard in enumerate(shards):
        stored = stored_tensors(model) if index == 0 else {}
        extra = [Range(name, 0, {"buffer": value.reshape(-1)}) for name, value in stored.items()]
        write_shards(target, index, [*shard.shards(), *extra])
    state = {"step": step, "engine": {"optimizer_step": shards[0].version}}
    write_manifest(target, len(shards), state, named_shapes(model))
    return target


@pytest.mark.parametrize("config", [OPTIMIZERS[0], OPTIMIZERS[2], OPTIMIZERS[3]], ids=lambda config: config["kind"])
def test_a_shard_goes_on_from_its_checkpoint(tmp_path: Path, config: dict[str, Any]) -> None:
    shards = build_shards(3, config)
    gradients = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(0)).numpy()

    def push(shard: ParameterShard, clock: int) -> int:
        return shard.push("a", clock, gradients[clock - 1][shard.start : shard.stop], shard.version, 0.1)

    for shard in shards:
        for clock in (1, 2, 3):
            push(shard, clock)
    model = build_model()
    reader = CheckpointReader(save(tmp_path, 3, shards, model))
    # The checkpoint is one of the whole model, whoever wrote which part.
    state = model_state(reader)
    assert torch.equal(torch.cat([state[slot.name].reshape(-1) for slot in plan_slots(model)]), values_of(shards))
    assert set(state) == set(model.state_dict())
    for index, shard in enumerate(shards):
        restored = build_shards(3, config)[index]
        restored.load(reader, shard.state())
        assert restored.version == 3
        # A push from before the checkpoint that is repeated now is known; those from after it are taken.
        push(restored, 3)
        for clock in (4, 5):
            push(shard, clock)
            assert push(restored, clock) == 0
        assert torch.equal(values_of([restored]), values_of([shard]))


def test_updates_that_a_lost_shard_forgot_do_not_count(tmp_path: Path) -> None:
    """The worker has fetched a version that the restored shard does not know."""
    (shard,) = build_shards(1)
    assert shard.push("a", 7, torch.ones(SIZE).numpy(), fetched_version=6, lr=0.1) == 0


# ------------------------------------------------------------------------------------------------------------ workers


def test_fetches_and_pushes_come_as_often_as_asked() -> None:
    shards, log = build_shards(1), []
    worker = build_worker(shards, n_fetch=3, n_push=2, log=log)

    async def train() -> list[Push | None]:
        pushes = [await worker.train(number, lambda number=number: mini_batch(number)) for number in range(7)]
        return [*pushes, await worker.flush(0.05), await worker.flush(0.05)]

    pushes = asyncio.run(train())
    assert log == ["fetch", "push", "fetch", "push", "push", "fetch", "push"]
    assert [[item.ticket for item in push.outcomes] if push else None for push in pushes] == [
        None, [0, 1], None, [2, 3], None, [4, 5], None, [6], None,
    ]  # fmt: skip


def test_a_worker_descends_by_itself_between_fetches_and_pushes_the_sum() -> None:
    shards = build_shards(1, {"kind": "sgd", "lr": 1.0})
    worker = build_worker(shards, n_fetch=4, n_push=2)
    start = values_of(shards)
    seen: list[Tensor] = []

    def prepare(number: int) -> MiniBatch:
        seen.append(worker.replica.values.clone())
        return mini_batch(number, lr=0.1)

    async def train() -> None:
        for number in range(3):
            await worker.train(number, lambda number=number: prepare(number))

    asyncio.run(train())
    reference = build_model()
    expected, gradients = start.clone(), []
    for number in range(2):
        vector = expected.clone()
        nn.utils.vector_to_parameters(vector, reference.parameters())
        reference.zero_grad()
        torch.manual_seed(number)
        batch = mini_batch(number)
        cross_entropy(reference(batch.inputs), batch.targets)["cross_entropy"].backward()
        gradients.append(torch.cat([param.grad.reshape(-1) for param in reference.parameters()]))
        expected = expected - 0.1 * gradients[-1]
        assert torch.allclose(seen[number + 1], expected, atol=1e-6)
    assert torch.allclose(values_of(shards), start - 0.1 * (gradients[0] + gradients[1]), atol=1e-6)


def test_a_push_is_as_stale_as_its_oldest_gradient() -> None:
    shards = build_shards(2)
    worker, other = build_worker(shards, n_fetch=1, n_push=2), build_worker(shards, name="other")

    async def train() -> Push | None:
        await worker.train(0, lambda: mini_batch(0))
        await other.train(1, lambda: mini_batch(1))
        return await worker.train(2, lambda: mini_batch(2))

    push = asyncio.run(train())
    assert push is not None
    assert push.staleness == 1


def test_parameters_travel_while_a_batch_is_prepared_and_gradients_while_one_is_computed() -> None:
    (shard,) = build_shards(1)
    log: list[str] = []
    answers: list[asyncio.Future[int]] = []

    class SlowShard(LocalShard):
        """Answers a push only when the test says so."""

        def push(self, worker: str, clock: int, gradient: Values, fetched_version: int, lr: float) -> Awaitable[int]:
            self.log.append(f"push {clock}")
            answers.append(asyncio.get_running_loop().create_future())
            return answers[-1]

    replica = Replica(build_model(), cross_entropy, PrecisionConfig(), CPU)
    worker = DownpourWorker("worker", replica, [SlowShard(shard, log)], n_fetch=1, n_push=1, clip_norm=None)

    def prepare(number: int) -> MiniBatch:
        log.append(f"prepare {number}")
        return mini_batch(number)

    async def train() -> None:
        first = asyncio.create_task(worker.train(1, lambda: prepare(1)))
        second = asyncio.create_task(worker.train(2, lambda: prepare(2)))
        while len(answers) < 2:
            await asyncio.sleep(0)
        assert not first.done()
        assert not second.done()
        for answer in answers:
            answer.set_result(0)
        assert [item.ticket for push in await asyncio.gather(first, second) for item in push.outcomes] == [1, 2]

    asyncio.run(train())
    assert log == ["fetch", "prepare 1", "push 1", "fetch", "prepare 2", "push 2"]


def test_bf16_computes_with_rounded_weights_and_keeps_fp32_parameters() -> None:
    shards = build_shards(2)
    worker = build_worker(shards, dtype="bf16")
    push = asyncio.run(worker.train(0, lambda: mini_batch(0)))
    assert push is not None
    state = worker.replica.module.state_dict()
    assert state["0.weight"].dtype == torch.bfloat16
    assert state["1.running_mean"].dtype == torch.float32
    assert worker.replica.values.dtype == torch.float32
    assert torch.equal(
        flatten(worker.replica.module, plan_slots(worker.replica.module)), worker.replica.values.bfloat16().float()
    )
    exact = asyncio.run(build_worker(build_shards(2)).train(0, lambda: mini_batch(0)))
    assert exact is not None
    assert push.outcomes[0].terms["cross_entropy"] == pytest.approx(exact.outcomes[0].terms["cross_entropy"], rel=0.02)
    assert push.outcomes[0].grad_norm == pytest.approx(exact.outcomes[0].grad_norm, rel=0.05)


# ---------------------------------------------------------------------------------------------------- sparse phases

PRUNED = {"0.weight": 0.5, "4.weight": 0.3}
MASKED_OPTIMIZERS = [*OPTIMIZERS, {"kind": "adam", "lr": 0.01, "weight_decay": 0.05}]


def build_phase(kind: Literal["sparse", "redense"], *, fresh: bool = True) -> PhasePlan:
    pruning = Pruning("weights", "magnitude", PRUNED, seed=0) if kind == "sparse" else None
    return PhasePlan(f"{kind}-1", kind, 6, 8, 0.1, kind, {}, pruning, fresh)


def select_by_sorting(model: nn.Module) -> dict[str, Tensor]:
    """The masks, the slow and plain way: of each layer the round(N·share) smallest magnitudes are pruned."""
    masks = {}
    for name, share in PRUNED.items():
        weight = model.get_parameter(name).detach()
        order = weight.abs().flatten().argsort(stable=True)
        masks[name] = torch.ones(weight.numel(), dtype=torch.bool)
        masks[name][order[: round(weight.numel() * share)]] = False
        masks[name] = masks[name].view(weight.shape)
    return masks


def full_masks(shards: list[ParameterShard]) -> dict[str, Tensor]:
    """The masks that shards hold together, flat."""
    parts: dict[str, list[Tensor]] = {}
    for item in (item for shard in shards for item in shard.shards()):
        if MASK in item.tensors:
            parts.setdefault(item.name, []).append(item.tensors[MASK])
    return {name: torch.cat(found) for name, found in parts.items()}


def check_pruned_are_zero(shards: list[ParameterShard]) -> None:
    """Weights and moments, exactly; and nothing else is."""
    for item in (item for shard in shards for item in shard.shards()):
        if MASK in item.tensors:
            for kind, values in item.tensors.items():
                assert torch.equal(values == 0, ~item.tensors[MASK]) or kind == MASK, (item.name, kind)


def train_steps(worker: DownpourWorker, numbers: range, check: Callable[[], None] = lambda: None) -> None:
    async def train() -> None:
        for number in numbers:
            await worker.train(number, lambda number=number: mini_batch(number, 0.1 / (1 + number)))
            check()

    asyncio.run(train())


def enter(folder: Path, phase: PhasePlan, number: int, config: dict[str, Any]) -> list[ParameterShard]:
    """Fresh shards that begin `phase` with the checkpoint `folder`."""
    reader = begin_phase(folder, phase)
    shards = build_shards(number, config)
    for shard in shards:
        shard.load(reader, ShardState(reader.state["engine"]["optimizer_step"], {}))
    return shards


class MaskedLoop:
    """Dense, sparse and re-dense training as a user would write it by hand."""

    def __init__(self, config: dict[str, Any], clip_norm: float | None) -> None:
        self.config, self.clip_norm, self.model = config, clip_norm, build_model()
        self.masks: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        self.optimizer = build_optimizer(optimizer_config(self.config), self.model.parameters())

    @torch.no_grad()
    def prune(self) -> None:
        self.masks = select_by_sorting(self.model)
        for name, mask in self.masks.items():
            weight = self.model.get_parameter(name)
            weight[~mask] = 0.0
            for value in self.optimizer.state.get(weight, {}).values():
                if torch.is_tensor(value) and value.shape == mask.shape:
                    value[~mask] = 0.0

    def train(self, numbers: range) -> None:
        for number in numbers:
            batch = mini_batch(number, 0.1 / (1 + number))
            self.optimizer.param_groups[0]["lr"] = batch.lr
            torch.manual_seed(batch.seed)
            self.optimizer.zero_grad()
            cross_entropy(self.model(batch.inputs), batch.targets)["cross_entropy"].backward()
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            for name, mask in self.masks.items():
                gradient = self.model.get_parameter(name).grad
                assert gradient is not None
                gradient[~mask] = 0.0
            self.optimizer.step()

    def check_equals(self, shards: list[ParameterShard]) -> None:
        assert (values_of(shards) - flatten(self.model, plan_slots(self.model))).abs().max() < 1e-6


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("config", MASKED_OPTIMIZERS, ids=lambda config: "-".join(map(str, config.values())))
def test_dense_sparse_dense_is_the_plain_masked_loop(
    tmp_path: Path, config: dict[str, Any], number: int, fresh: bool
) -> None:
    """Of four shards, the ranges of three begin in the middle of a pruned layer or end there."""
    plain, clip_norm = MaskedLoop(config, 0.5), 0.5
    shards = build_shards(number, config)
    worker = build_worker(shards, clip_norm=clip_norm)
    train_steps(worker, range(6))
    plain.train(range(6))
    folder = save(tmp_path / "dense", 6, shards, worker.replica.module)

    phase = build_phase("sparse", fresh=fresh)
    shards = enter(folder, phase, number, config)
    worker = build_worker(shards, clip_norm=clip_norm)
    worker.replica.load(begin_phase(folder, phase))
    if fresh:
        plain.restart()
    plain.prune()
    found = full_masks(shards)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        name: mask.flatten().tolist() for name, mask in plain.masks.items()
    }
    train_steps(worker, range(6, 14), lambda: check_pruned_are_zero(shards))
    plain.train(range(6, 14))
    plain.check_equals(shards)
    zeros = sum(count_zeros(shard.shards(), list(PRUNED)) for shard in shards)
    assert torch.is_tensor(zeros)
    assert zeros.tolist() == [round(35 * 0.5), round(21 * 0.3)]

    folder = save(tmp_path / "sparse", 14, shards, worker.replica.module)
    phase = build_phase("redense", fresh=fresh)
    shards = enter(folder, phase, number, config)
    worker = build_worker(shards, clip_norm=clip_norm)
    worker.replica.load(begin_phase(folder, phase))
    assert full_masks(shards) == {}
    assert int((values_of(shards) == 0).sum()) == sum(zeros.tolist())
    if fresh:
        plain.restart()
    plain.masks = {}
    train_steps(worker, range(14, 18))
    plain.train(range(14, 18))
    plain.check_equals(shards)
    assert int((values_of(shards) == 0).sum()) == 0


@pytest.mark.parametrize("config", [OPTIMIZERS[0], OPTIMIZERS[2], OPTIMIZERS[3]], ids=lambda config: config["kind"])
def test_masks_survive_a_checkpoint_and_another_number_of_shards(tmp_path: Path, config: dict[str, Any]) -> None:
    shards = build_shards(2, config)
    train_steps(build_worker(shards), range(3))
    folder = save(tmp_path / "dense", 3, shards, build_model())
    shards = enter(folder, build_phase("sparse"), 4, config)
    train_steps(build_worker(shards), range(3, 6))
    reader = CheckpointReader(save(tmp_path / "sparse", 6, shards, build_model()))
    assert reader.names(MASK) == list(PRUNED)
    assert MASK not in reader.moments()
    restored = build_shards(3, config)
    for shard in restored:
        shard.load(reader, shards[0].state())
    gradients = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0)).numpy()
    for clock, gradient in enumerate(gradients, start=1):
        for shard in (*shards, *restored):
            shard.push("other", clock, gradient[shard.start : shard.stop], shard.version, 0.1)
    check_pruned_are_zero(restored)
    # Fused optimizers round the last elements of a tensor in another way, and these are others here.
    torch.testing.assert_close(values_of(restored), values_of(shards), rtol=1e-6, atol=1e-7)
    masks, others = full_masks(shards), full_masks(restored)
    assert list(masks) == list(others) == list(PRUNED)
    assert all(torch.equal(masks[name], others[name]) for name in PRUNED)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_worker_stays_sparse_while_it_descends_by_itself(tmp_path: Path, dtype: Literal["fp32", "bf16"]) -> None:
    config = {"kind": "sgd", "lr": 1.0}
    folder, phase = save(tmp_path, 6, build_shards(2, config), build_model()), build_phase("sparse")
    worker = build_worker(enter(folder, phase, 2, config), n_fetch=5, n_push=5, dtype=dtype)
    worker.replica.load(begin_phase(folder, phase))
    reader = begin_phase(folder, phase)
    pruned = {name: ~reader.full(MASK, name) for name in PRUNED}
    values = []

    def check() -> None:
        values.append(worker.replica.values.clone())
        for name, gone in pruned.items():
            weight = worker.replica.module.get_parameter(name)
            assert torch.equal(weight == 0, gone), name

    train_steps(worker, range(5), check)
    assert all(not torch.equal(one, other) for one, other in pairwise(values)), "it has descended"
    assert all(int((one == 0).sum()) == sum(int(gone.sum()) for gone in pruned.values()) for one in values)


class FakeRun:
    """What :func:`find_start` asks of a run: folders, and the order of the phases."""

    def __init__(self, root: Path, *phases: PhasePlan) -> None:
        self.root, self.phases, self.plan = root, phases, self

    def phase_folder(self, phase: PhasePlan) -> Path:
        return self.root / phase.name

    def checkpoints(self, phase: PhasePlan) -> Path:
        return self.phase_folder(phase) / "checkpoints"

    def phase_before(self, phase: PhasePlan) -> PhasePlan | None:
        index = self.phases.index(phase)
        return self.phases[index - 1] if index else None


def test_a_phase_starts_from_its_newest_checkpoint_or_the_end_of_the_one_before(tmp_path: Path) -> None:
    dense, sparse = PhasePlan("dense", "dense", 0, 6, 0.1, "dense", {}), build_phase("sparse")
    run: Any = FakeRun(tmp_path, dense, sparse)
    first = find_start(PhaseSpec(run, dense))
    assert first.reader is None
    assert first.describe(dense)["step"] == 0

    shards = build_shards(2)
    folder = save(run.checkpoints(dense), 6, shards, build_model())
    write_json(run.phase_folder(dense) / PHASE_MANIFEST, {"checkpoint": f"checkpoints/{folder.name}"})
    border = find_start(PhaseSpec(run, sparse))
    assert border.reader is not None
    assert not border.is_resumed
    assert border.describe(sparse)["step"] == 6
    assert border.describe(sparse)["records"] == []
    masks = {name: border.reader.full(MASK, name) for name in PRUNED}
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 18, "4.weight": 6}

    shards = enter(folder, sparse, 2, ADAGRAD)
    train_steps(build_worker(shards), range(6, 8))
    newest = save(run.checkpoints(sparse), 8, shards, build_model())
    resumed = find_start(PhaseSpec(run, sparse))
    assert resumed.is_resumed
    assert resumed.describe(sparse)["step"] == 8
    assert resumed.reader is not None
    assert all(torch.equal(resumed.reader.full(MASK, name), masks[name]) for name in PRUNED)

    for damaged in (newest, folder):
        path = damaged / "rank-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        if damaged == newest:
            again = find_start(PhaseSpec(run, sparse))
            assert again.reader is not None
            assert again.refused is not None
            assert newest.name in again.refused
            assert all(torch.equal(again.reader.full(MASK, name), masks[name]) for name in PRUNED)
    with pytest.raises(RunError, match=r"sparse-1 cannot begin with the end of the phase before: .*rank-00001"):
        find_start(PhaseSpec(run, sparse))


# ------------------------------------------------------------------------------------------------------------- ledger


class Play:
    """Workers that are only played: a seed decides who moves next, who dies and who comes back.

    What each worker has begun and pushed is counted here, apart from the ledger's own books.
    """

    def __init__(self, seed: int, ledger: Ledger, *, n_push: int = 1, bound: int | None = None) -> None:
        self.random, self.ledger, self.n_push, self.bound = random.Random(seed), ledger, n_push, bound
        self.queues: dict[int, list[tuple[Ticket, int]]] = {}
        self.accrued: dict[int, list[Ticket]] = {}
        self.clocks: dict[int, int] = {}
        self.alone = False
        self.pushed: Counter[Ticket] = Counter()
        self.begun_by: dict[Ticket, int] = {}
        self.largest_lead = 0

    def open(self, step: int, *, alone: bool = False) -> None:
        self.ledger.open(step, alone=alone)
        if self.alone:
            self.clocks = dict.fromkeys(self.clocks, max(self.clocks.values()))
        self.alone = alone

    def join(self, worker: int) -> None:
        self.ledger.join(worker)
        self.clocks[worker] = max(self.clocks.get(worker, 0), self.slowest())
        self.queues[worker], self.accrued[worker] = [], []

    def die(self, worker: int) -> None:
        self.ledger.leave(worker)
        del self.queues[worker], self.accrued[worker]

    def slowest(self) -> int:
        return min((self.clocks[worker] for worker in self.queues), default=0)

    def move(self, worker: int) -> None:
        """The worker takes what it may, and computes one mini-batch if it has one."""
        while len(self.queues[worker]) < 2 and (taken := self.ledger.take(worker)):
            self.queues[worker].append(taken)
        if self.queues[worker]:
            ticket, lead = self.queues[worker].pop(0)
            true_lead = self.clocks[worker] - self.slowest()
            assert self.alone or true_lead <= lead
            assert self.alone or self.bound is None or true_lead <= self.bound
            self.largest_lead = max(self.largest_lead, true_lead)
            self.begun_by[ticket] = worker
            self.accrued[worker].append(ticket)
        exhausted = self.ledger.exhausted and not self.queues[worker]
        if len(self.accrued[worker]) >= self.n_push or (exhausted and self.accrued[worker]):
            self.ledger.pushed(worker, self.accrued[worker])
            self.pushed.update(self.accrued[worker])
            self.accrued[worker] = []
            self.clocks[worker] += 1

    def run(self, deaths: int = 0) -> None:
        """Until all is done; one worker is fast, so that it would run away where nothing held it."""
        turns = 0
        while not self.ledger.drained:
            turns += 1
            assert turns < 100_000, "nobody can go on"
            worker = self.random.choice([*self.queues, *[min(self.queues)] * 6])
            if deaths and self.random.random() < 0.05 and len(self.queues) > 1:
                deaths -= 1
                self.die(worker)
                if self.random.random() < 0.7:
                    self.join(worker)
            else:
                self.move(worker)


def all_tickets(first: int, last: int, parts: int) -> Counter[Ticket]:
    return Counter(Ticket(step, part) for step in range(first, last) for part in range(parts))


@pytest.mark.parametrize("n_push", [1, 3])
@pytest.mark.parametrize("bound", [0, 1, 4, None])
def test_no_lead_exceeds_the_bound_and_no_ticket_is_lost_or_doubled(bound: int | None, n_push: int) -> None:
    leads = []
    for seed in range(20):
        play = Play(seed, Ledger(3, 5, n_push=n_push, max_staleness=bound), n_push=n_push, bound=bound)
        for worker in range(3):
            play.join(worker)
        for gate in (20, 40):
            play.open(gate)
            play.run(deaths=3)
        assert play.pushed == all_tickets(5, 40, 3)
        leads.append(play.largest_lead)
    # The bound is reached, and without one somebody runs away: else this proves nothing.
    assert max(leads) == bound if bound is not None else max(leads) > 4


def test_tickets_come_in_the_order_of_the_stream_and_a_dead_workers_first() -> None:
    ledger = Ledger(2, 0)
    ledger.join(0)
    ledger.join(1)
    ledger.open(3)
    assert ledger.take(0) == (Ticket(0, 0), 0)
    assert ledger.take(0) == (Ticket(0, 1), 1)
    assert ledger.take(1) == (Ticket(1, 0), 0)
    ledger.leave(0)
    assert ledger.take(0) is None
    assert [ledger.take(1) for _ in range(3)] == [(Ticket(0, 0), 1), (Ticket(0, 1), 2), (Ticket(1, 1), 3)]


def test_the_last_ticket_comes_back_too() -> None:
    ledger = Ledger(1, 0)
    ledger.join(0)
    ledger.open(1)
    assert ledger.take(0) == (Ticket(0, 0), 0)
    assert ledger.exhausted
    ledger.leave(0)
    assert not ledger.exhausted
    assert not ledger.drained
    ledger.join(1)
    assert ledger.take(1) == (Ticket(0, 0), 0)
    ledger.pushed(1, [Ticket(0, 0)])
    assert ledger.drained


def test_a_worker_that_joins_starts_at_the_clock_of_the_slowest() -> None:
    ledger = Ledger(1, 0, max_staleness=1)
    ledger.open(100)
    ledger.join(0)
    for _ in range(10):
        taken = ledger.take(0)
        assert taken is not None
        ledger.pushed(0, [taken[0]])
    ledger.join(1)
    assert ledger.take(0) == (Ticket(10, 0), 0)
    assert ledger.take(0) == (Ticket(11, 0), 1)
    assert ledger.take(0) is None, "the new worker is at clock 10 and must not be left behind by more than 1"


@pytest.mark.parametrize("seed", range(5))
def test_one_worker_trains_alone_at_first(seed: int) -> None:
    play = Play(seed, Ledger(3, 0, max_staleness=1), bound=1)
    for worker in range(3):
        play.join(worker)
    play.open(10, alone=True)
    play.run()
    assert set(play.begun_by.values()) == {0}
    play.open(40)
    play.run()
    assert set(play.begun_by.values()) == {0, 1, 2}
    assert play.pushed == all_tickets(0, 40, 3)


def test_another_worker_takes_over_a_warm_start() -> None:
    ledger = Ledger(1, 0)
    ledger.join(0)
    ledger.join(1)
    ledger.open(5, alone=True)
    assert ledger.take(1) is None
    assert ledger.take(0) == (Ticket(0, 0), 0)
    ledger.leave(0)
    assert ledger.take(1) == (Ticket(0, 0), 0)
    ledger.join(0)
    assert ledger.take(0) is None, "one is at work"


def test_a_stop_ends_with_the_step_under_way() -> None:
    ledger = Ledger(3, 2)
    ledger.join(0)
    ledger.open(100)
    assert Ledger(3, 2).close() == 2
    tickets = [ledger.take(0) for _ in range(4)]
    assert ledger.close() == 4
    tickets += [ledger.take(0), ledger.take(0)]
    assert ledger.take(0) is None
    assert not ledger.drained
    for taken in tickets:
        assert taken is not None
        ledger.pushed(0, [taken[0]])
    assert ledger.drained


def test_gates_are_the_steps_at_which_something_is_due() -> None:
    def gates(first: int, **due: int) -> list[int]:
        return plan_gates(first, 20, **{"evaluate_every": 0, "checkpoint_every": 0, "warm_start": 0, **due})

    assert gates(0) == [20]
    assert gates(0, evaluate_every=8, checkpoint_every=5) == [5, 8, 10, 15, 16, 20]
    assert gates(10, evaluate_every=8, checkpoint_every=5, warm_start=3) == [15, 16, 20]
    assert gates(0, warm_start=3) == [3, 20]
    assert gates(20, evaluate_every=5) == []


# ------------------------------------------------------------------------------------------------------------ records


TIMES = {"time/step_s": 0.1}


def build_records(record_every: int = 1) -> StepRecords:
    return StepRecords(
        2,
        4,
        record_every=record_every,
        values_at=lambda step: {"train/lr": step / 10},
        staleness={0: 3},
        pushes={0: 3},
        constants={"phase": 1.0},
    )


def push_step(records: StepRecords, step: int, staleness: int = 0) -> None:
    for part in range(2):
        records.begun(Ticket(step, part), lead=part)
        found = Computed({"train/loss": float(step + part)}, grad_norm=2.0 + part)
        records.pushed(part, Pushed(staleness + part, {Ticket(step, part): found}))


def test_a_record_is_the_mean_over_the_steps_mini_batches() -> None:
    records = build_records()
    push_step(records, 4, staleness=1)
    (record,) = records.take(20, {"time/step_s": 0.5, "time/mfu": 0.25})
    assert record["step"] == 5
    assert record["metrics"] == {
        "train/loss": 4.5,
        "train/lr": 0.4,
        "train/grad_norm": 2.5,
        "time/step_s": 0.5,
        "time/mfu": 0.25,
        "server/staleness_mean": 1.5,
        "server/staleness_max": 2.0,
        "server/clock_lead": 1.0,
        "phase": 1.0,
    }


def test_records_come_in_the_order_of_the_steps() -> None:
    records = build_records()
    for step in (5, 7, 6):
        push_step(records, step)
    assert records.num_complete(20) == 0
    assert records.take(20, TIMES) == []
    push_step(records, 4)
    assert records.num_complete(20) == 4
    assert [record["step"] for record in records.take(6, TIMES)] == [5, 6]
    last = records.take(20, TIMES, {"eval/accuracy": 0.5})
    assert [("eval/accuracy" in record["metrics"]) for record in last] == [False, True]


def test_not_every_step_need_be_recorded() -> None:
    records = build_records(record_every=3)
    for step in range(4, 10):
        push_step(records, step)
    assert [record["step"] for record in records.take(8, TIMES)] == [6]
    assert [record["step"] for record in records.take(10, TIMES, {"eval/accuracy": 0.5})] == [9, 10]


def test_the_summary_has_the_whole_run() -> None:
    records = build_records()
    push_step(records, 4, staleness=LARGEST_STALENESS)
    assert records.summary() == {
        "server/staleness/0": 0.6,
        f"server/staleness/{LARGEST_STALENESS}": 0.4,
        "server/clock/0": 4.0,
        "server/clock/1": 1.0,
    }


# ----------------------------------------------------------------------------------------------------------- together


def test_stale_workers_learn() -> None:
    """Three workers, two shards, random interleavings within the bound: the loss falls as with one worker."""
    losses = {workers: train_together(workers) for workers in (1, 3)}
    assert losses[3] < 0.35 * 1.0986  # ln 3: knowing nothing
    assert losses[3] < losses[1] + 0.1


def train_together(number: int) -> float:
    shards = build_shards(2, {"kind": "adagrad", "lr": 0.1})
    workers = [build_worker(shards, name=str(index)) for index in range(number)]
    ledger, chance = Ledger(number, 0, max_staleness=4), random.Random(0)
    steps = 240 // number
    ledger.open(steps)
    for index in range(number):
        ledger.join(index)

    async def compute(index: int, ticket: Ticket) -> None:
        await workers[index].train(ticket, lambda: mini_batch(ticket.step * number + ticket.part, lr=0.1))

    async def run() -> None:
        while not ledger.drained:
            index = chance.randrange(number)
            if taken := ledger.take(index):
                await compute(index, taken[0])
                ledger.pushed(index, [taken[0]])

    asyncio.run(run())
    model: Callable[[Tensor], Tensor] = workers[0].replica.predict
    asyncio.run(workers[0].fetch())
    batches = [mini_batch(1000 + index) for index in range(20)]
    found = [float(cross_entropy(model(batch.inputs), batch.targets)["cross_entropy"]) for batch in batches]
    return sum(found) / len(found)
