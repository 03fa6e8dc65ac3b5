"""The live teacher: what it says of an example depends on that example alone, wherever and however it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distributed import run_distributed
from engine_cases import Case, build_batches, build_engine, rank_rows
from temper.checkpoint import BUFFER, MASTER, Shard, write_manifest, write_shards
from temper.config.schema import GPTModel, ModelConfig, PythonModel, ResNetModel
from temper.engine.deepspeed_setup import prepare
from temper.engine.sharded import shard_module
from temper.errors import CheckpointError, RunError
from temper.files import write_json
from temper.models.build import build_model
from temper.models.gpt import Embedding
from temper.models.weights import SafetensorsWeights, parameters_on_meta
from temper.parallel.groups import build_groups
from temper.plan.distill import Connector, DistillPlan, FeaturePair, Teacher
from temper.plan.facts import DataFacts
from temper.techniques.distill.signals import Signals
from temper.techniques.distill.teacher import LiveTeacher, build_teacher

CPU = torch.device("cpu")
IMAGES = DataFacts(100, 0, 20, (1, 8, 8), 10, (), (), "images")
TOKENS = DataFacts(100, 0, 20, (6,), 12, (), (), "tokens")
RESNET = ResNetModel(kind="resnet", depth=8, width=0.25)
GPT = GPTModel(kind="gpt", layers=2, heads=2, width=8)
ODD = PythonModel(kind="python", target="test_distill_teacher:odd_net")
LEVELS = {
    "resnet": ("relu", "layer2_0", "fc"),
    "gpt": ("embedding", "block_0.mlp.1"),
    "python": ("norm", "attention.norm1", ""),
}
ROWS = 4


class OddNet(nn.Module):
    """An in-place ReLU and dropout after a batch norm; attention with a fused path for inference and an output
    projection that nobody calls; a recurrent layer, a tied weight, a parameter of its own, a buffer that no file has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.down.weight = self.up.weight
        self.head = nn.Linear(8, 10)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, 64)[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.relu(self.norm(self.conv(x))))
        x = self.attention(x.flatten(2).transpose(1, 2) * self.ramp) * self.scale
        x, _ = self.gru(x)
        return self.head(self.down(F.gelu(self.up(x))).mean(1))


def odd_net() -> nn.Module:
    return OddNet()


def pickle_net() -> nn.Module:
    """Its code looks at a weight's value, which a weight without memory has not."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert net[1].weight[0, 0].item() < 1
    return net


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the ranks of the tests have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------- helpers


def trained(model: ModelConfig, data: DataFacts, seed: int) -> nn.Module:
    """The network with weights that are none of its initialisation's, batch norms' statistics included."""
    net, generator = build_model(model, data, seed), torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.2)
    return net.eval()


def data_of(model: ModelConfig) -> DataFacts:
    return TOKENS if model.kind == "gpt" else IMAGES


def inputs_of(model: ModelConfig, count: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if model.kind == "gpt":
        return torch.randint(0, 12, (count, 6), generator=generator)
    return torch.randn(count, 1, 8, 8, generator=generator)


def teacher_of(folder: Path, model: ModelConfig, seed: int = 7, **values: Any) -> Teacher:
    """A teacher whose weights are in a safetensors file; of a tied weight the file has one name."""
    state = trained(model, data_of(model), seed).state_dict()
    state.pop("down.weight", None)
    path = folder / f"{model.kind}-{seed}.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return Teacher(f"{model.kind}-{seed}", str(path), "weights", path, model, f"f{seed}", **values)


def pair(teacher: str, of: int = 0) -> FeaturePair:
    return FeaturePair("level", teacher, of, "mse", 1.0, (), (), Connector("none", 0, 0))


def plan_of(*teachers: Teacher, pairs: tuple[FeaturePair, ...] = (), rows: int = ROWS) -> DistillPlan:
    return DistillPlan(teachers, (), pairs, rows, cache=None, evaluation=Path())


def built(*teachers: Teacher, levels: tuple[str, ...] = (), signals: Any = "fp32", **values: Any) -> LiveTeacher:
    plan = plan_of(*teachers, pairs=tuple(pair(level) for level in levels))
    data = data_of(teachers[0].model)
    return build_teacher(plan, values.pop("data", data), signals=signals, device=CPU, **values)


def all_of(signals: Signals) -> tuple[Tensor, ...]:
    return signals.logits, *signals.features


def same(left: Signals, right: Signals) -> bool:
    pairs = zip(all_of(left), all_of(right), strict=True)
    return all(a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", [RESNET, GPT, ODD], ids=lambda model: model.kind)
def test_an_example_has_the_same_signals_in_any_company(tmp_path: Path, model: ModelConfig, precision: str) -> None:
    prepare("cpu")
    teacher = built(teacher_of(tmp_path, model, precision=precision), levels=LEVELS[model.kind], signals="fp16")
    inputs = inputs_of(model, 64)
    whole = teacher.ask(inputs)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = teacher.ask(inputs[order])
    for size in (1, 7):
        parts = [all_of(teacher.ask(part)) for part in inputs.split(size)]
        for index, signal in enumerate(all_of(whole)):
            assert torch.equal(torch.cat([part[index] for part in parts]), signal)
            assert torch.equal(all_of(shuffled)[index], signal[order])
    assert all(signal.dtype == torch.float16 and len(signal) == 64 for signal in all_of(whole))


@pytest.mark.parametrize("model", [RESNET, GPT, ODD], ids=lambda model: model.kind)
def test_it_says_what_the_network_computes(tmp_path: Path, model: ModelConfig) -> None:
    net, inputs = trained(model, data_of(model), 7), inputs_of(model)
    kept: list[Tensor] = []
    for name in LEVELS[model.kind]:
        # Copied at once: what follows may change it in place.
        net.get_submodule(name).register_forward_hook(lambda module, given, output: kept.append(output.clone()))
    with torch.no_grad():
        logits = net(inputs)
    signals = built(teacher_of(tmp_path, model), levels=LEVELS[model.kind]).ask(inputs)
    torch.testing.assert_close(signals.logits, logits, rtol=1e-5, atol=1e-6)
    for feature, expected in zip(signals.features, kept, strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-6)


def test_it_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    teacher = built(teacher_of(tmp_path, ODD))
    net = teacher.members[0].model
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    first, second = teacher.ask(inputs_of(ODD)), teacher.ask(inputs_of(ODD))
    assert same(first, second), "dropout drew"
    assert torch.equal(torch.get_rng_state(), state), "the student would draw other numbers"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(param.requires_grad for param in net.parameters())
    assert not first.logits.requires_grad and not first.logits.is_inference()


def test_an_ensemble_says_the_weighted_mean_of_raw_logits(tmp_path: Path) -> None:
    teachers = [teacher_of(tmp_path, RESNET, 7, weight=3.0), teacher_of(tmp_path, ODD, 8, precision="bf16")]
    inputs = inputs_of(RESNET)
    alone = [built(replace(teacher, weight=5.0)).ask(inputs).logits for teacher in teachers]
    plan = plan_of(*teachers, pairs=(pair("norm", of=1), pair("relu", of=0)))
    signals = build_teacher(plan, IMAGES, signals="fp32", device=CPU).ask(inputs)
    torch.testing.assert_close(signals.logits, 0.75 * alone[0] + 0.25 * alone[1], rtol=1e-6, atol=1e-6)
    expected = [built(teachers[1], levels=("norm",)), built(teachers[0], levels=("relu",))]
    for feature, teacher in zip(signals.features, expected, strict=True):
        assert torch.equal(feature, teacher.ask(inputs).features[0])


def test_inputs_are_brought_to_the_teachers_normalisation(tmp_path: Path) -> None:
    student = replace(IMAGES, mean=(0.3,), std=(0.2,))
    raw = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    teacher = teacher_of(tmp_path, RESNET, mean=(0.5,), std=(0.25,))
    own = built(teacher, data=replace(IMAGES, mean=(0.5,), std=(0.25,))).ask((raw - 0.5) / 0.25)
    converted = built(teacher, data=student).ask((raw - 0.3) / 0.2)
    torch.testing.assert_close(converted.logits, own.logits, rtol=1e-5, atol=1e-5)
    unknown = built(replace(teacher, mean=None, std=None), data=student).ask((raw - 0.5) / 0.25)
    assert same(unknown, own), "nothing is converted where the teacher's is unknown, or both are equal"
    # Inputs that are used as they are have mean 0 and deviation 1.
    plain = built(teacher, data=replace(IMAGES, mean=(), std=())).ask(raw)
    torch.testing.assert_close(plain.logits, own.logits, rtol=1e-5, atol=1e-5)
    used = built(replace(teacher, mean=(), std=()), data=replace(IMAGES, mean=(), std=())).ask(raw)
    taken = built(replace(teacher, mean=(), std=()), data=student).ask((raw - 0.3) / 0.2)
    torch.testing.assert_close(taken.logits, used.logits, rtol=1e-5, atol=1e-4)


def test_what_the_process_has_set_up_for_a_student_does_not_act_in_it(tmp_path: Path) -> None:
    teacher = built(teacher_of(tmp_path, ODD), levels=("attention.norm1",))
    expected = teacher.ask(inputs_of(ODD))

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise AssertionError("DeepSpeed's, for ZeRO-3")

    with mock.patch.object(F, "linear", linear):
        assert same(teacher.ask(inputs_of(ODD)), expected)
        assert F.linear is linear
    assert torch.backends.mha.get_fastpath_enabled()
    plain = built(teacher_of(tmp_path, ODD)).ask(inputs_of(ODD))
    assert torch.equal(plain.logits, expected.logits), "taps change nothing"


# -------------------------------------------------------------------------------------------------------------- weights


def write_phase(folder: Path, net: nn.Module) -> Path:
    """A phase with its checkpoint, in which connectors lie beside the model."""
    parameters = dict(net.named_parameters())
    state = {**net.state_dict(), "distill.connectors.0.weight": torch.ones(3)}
    shards = [
        Shard(name, 0, {MASTER if name in parameters or "connectors" in name else BUFFER: value.detach().flatten()})
        for name, value in state.items()
    ]
    step = folder / "checkpoints" / "step-00000005"
    write_shards(step, 0, shards)
    write_manifest(step, 1, {"step": 5}, {name: tuple(value.shape) for name, value in state.items()})
    write_json(folder / "phase.json", {"checkpoint": "checkpoints/step-00000005"})
    return step


def test_weights_come_from_a_phase_a_checkpoint_or_a_file(tmp_path: Path) -> None:
    step = write_phase(tmp_path / "phase", trained(RESNET, IMAGES, 7))
    teacher = teacher_of(tmp_path, RESNET)
    phase = replace(teacher, kind="phase", place=tmp_path / "phase")
    checkpoint = replace(teacher, kind="checkpoint", place=step)
    expected = built(teacher).ask(inputs_of(RESNET))
    assert same(built(phase).ask(inputs_of(RESNET)), expected)
    assert same(built(checkpoint).ask(inputs_of(RESNET)), expected)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path, RESNET)
    with pytest.raises(CheckpointError, match=r"teacher resnet-7: .*missing \['embedding.*unexpected \['bn1"):
        built(replace(teacher, model=GPT), data=TOKENS)
    with pytest.raises(CheckpointError, match=r"teacher resnet-7: .*bn1.bias has the shape \[4\].*is \[8\]"):
        built(replace(teacher, model=ResNetModel(kind="resnet", depth=8, width=0.5)))
    with pytest.raises(CheckpointError, match=r"teacher resnet-7: .*not a complete phase"):
        built(replace(teacher, kind="phase", place=tmp_path))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(CheckpointError, match=r"teacher resnet-7: .*text\.safetensors: cannot be read"):
        built(replace(teacher, place=tmp_path / "text.safetensors"))
    step = write_phase(tmp_path / "phase", trained(RESNET, IMAGES, 7))
    damaged = bytearray((step / "rank-00000.safetensors").read_bytes())
    damaged[-1] ^= 1
    (step / "rank-00000.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"teacher resnet-7: .*was damaged"):
        built(replace(teacher, kind="checkpoint", place=step))


def test_signals_beyond_fp16_are_refused_with_the_remedy(tmp_path: Path) -> None:
    net = trained(RESNET, IMAGES, 7)
    with torch.no_grad():
        net.get_submodule("fc").bias[3] = 1e5
    teacher = teacher_of(tmp_path, RESNET)
    save_file(net.state_dict(), teacher.place)
    with pytest.raises(RunError, match=r"teacher resnet-7 .*not finite in fp16; write `distill.signals: fp32`"):
        built(teacher, signals="fp16").ask(inputs_of(RESNET))
    assert built(teacher).ask(inputs_of(RESNET)).logits.isfinite().all()
    live = built(teacher, levels=("relu",))
    live.ask(inputs_of(RESNET))
    with pytest.raises(RunError, match="give it more `precision`"):
        live.ask(torch.full((1, 1, 8, 8), torch.nan))


@pytest.mark.parametrize("start", range(0, 25, 4))
def test_any_range_of_a_file_is_read(tmp_path: Path, start: int) -> None:
    tensor = torch.arange(24.0).reshape(4, 3, 2)
    save_file({"w": tensor, "scalar": torch.tensor(5.0)}, tmp_path / "w.safetensors")
    weights = SafetensorsWeights(tmp_path / "w.safetensors")
    assert weights.shapes == {"w": (4, 3, 2), "scalar": ()}
    for numel in range(25 - start):
        assert torch.equal(weights.read("w", start, numel), tensor.flatten()[start : start + numel])
    assert weights.read("scalar", 0, 1).tolist() == [5.0]


def test_a_model_is_built_without_the_memory_of_its_parameters() -> None:
    with parameters_on_meta():
        net = OddNet()
    assert all(param.is_meta for param in net.parameters())
    assert net.down.weight is net.up.weight
    assert net.gru._flat_weights[0] is net.gru.weight_ih_l0
    assert net.ramp[-1] == 1.5 and not net.norm.running_var.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


# ---------------------------------------------------------------------------------------------------- several processes


def _shared_by_a_replica(rank: int, teacher: Teacher, mesh: tuple[int, int, int]) -> list[tuple[bool, int]]:
    prepare("cpu")
    groups = build_groups(*mesh)
    found = []
    for count in (1, 4, 11):
        inputs = inputs_of(RESNET, count, seed=groups.data.rank)
        live = built(teacher, levels=LEVELS["resnet"], signals="fp16", groups=groups)
        forwards: list[int] = []
        live.members[0].model.register_forward_hook(lambda *call, counted=forwards: counted.append(len(call[1][0])))
        alone = built(teacher, levels=LEVELS["resnet"], signals="fp16")
        found.append((same(live.ask(inputs), alone.ask(inputs)), sum(forwards)))
    return found


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 2, 2), (2, 1, 2)], ids=str)
def test_ranks_of_a_replica_share_the_passes_out(tmp_path: Path, mesh: tuple[int, int, int]) -> None:
    teacher = teacher_of(tmp_path, RESNET, precision="bf16")
    size = mesh[1] * mesh[2]
    # 1, 1 and 3 passes of 4 rows.
    computed = [ROWS, ROWS, ROWS * -(-3 // size)]
    results = run_distributed(_shared_by_a_replica, mesh[0] * size, teacher, mesh)
    assert results == [[(True, count) for count in computed]] * (mesh[0] * size)


class Gathered:
    """Watches how many elements of a model's parameters are whole on this rank, at the moments before any is freed."""

    def __init__(self) -> None:
        self.peak, self.model = 0, nn.Module()

    def __call__(self, free: Callable[[Any], None], param: nn.Parameter) -> None:
        params = set(self.model.parameters()) or {param}
        self.peak = max(self.peak, sum(item.data.numel() for item in params))
        free(param)


def largest_at_once(net: nn.Module) -> int:
    """Elements of a module's own parameters and of those around it. Two kinds use those of parts they don't call."""
    own = {
        name: set(module.parameters(recurse=isinstance(module, nn.MultiheadAttention | Embedding)))
        for name, module in net.named_modules()
    }
    paths = [[".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 2)] for name in own]
    return max(sum(param.numel() for param in set().union(*map(own.__getitem__, path))) for path in paths)


def _sharded(rank: int, teachers: list[Teacher], world: int) -> list[tuple[bool, int, int]]:
    from deepspeed.runtime.zero import partition_parameters

    prepare("cpu")
    groups = build_groups(world)
    found = []
    for teacher in teachers:
        levels, inputs = LEVELS[teacher.model.kind], inputs_of(teacher.model, 11, seed=rank)
        gathered, free = Gathered(), partition_parameters.free_param
        with mock.patch.object(partition_parameters, "free_param", partial(gathered, free)):
            live = built(teacher, levels=levels, groups=groups, shard=shard_module)
            built_peak = gathered.peak
            gathered.model, gathered.peak = live.members[0].model, 0
            signals = [live.ask(inputs) for _ in range(3)]
        whole = built(teacher, levels=levels)
        expected = whole.ask(inputs)
        equal = all(same(item, expected) for item in signals)
        assert built_peak == max(param.numel() for param in whole.members[0].model.parameters())
        assert not any(param.data.numel() for param in live.members[0].model.parameters()), "all are released"
        held = sum(param.ds_tensor.numel() for param in live.members[0].model.parameters())
        found.append((equal, gathered.peak, held))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_it_says_the_same_and_never_is_whole(tmp_path: Path, world: int) -> None:
    precisions = ["fp32", "fp16", "bf16"]
    teachers = [
        teacher_of(tmp_path, model, precision=precision)
        for model, precision in zip([ODD, GPT, RESNET], precisions, strict=True)
    ]
    step = write_phase(tmp_path / "phase", trained(RESNET, IMAGES, 7))
    teachers += [
        teacher_of(tmp_path, ODD, precision="fp16"),
        replace(teacher_of(tmp_path, RESNET), kind="checkpoint", place=step),
    ]
    nets = [build_model(teacher.model, data_of(teacher.model), 0) for teacher in teachers]
    for results in run_distributed(_sharded, world, teachers, world):
        for net, (equal, peak, held) in zip(nets, results, strict=True):
            assert equal
            assert peak <= largest_at_once(net) < sum(param.numel() for param in net.parameters())
            assert held == sum(-(-param.numel() // world) for param in net.parameters())


def _model_that_looks_at_its_weights(rank: int, teacher: Teacher) -> bool:
    prepare("cpu")
    inputs = inputs_of(teacher.model)
    return same(built(teacher, shard=shard_module).ask(inputs), built(teacher).ask(inputs))


def test_a_model_that_must_be_built_whole_is_sharded_all_the_same(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path, PythonModel(kind="python", target="test_distill_teacher:pickle_net"))
    assert run_distributed(_model_that_looks_at_its_weights, 2, teacher) == [True, True]


STUDENTS = (
    Case(zero=0),
    Case(zero=1, pipeline=2, accumulation=2),
    Case(zero=1, tensor=2, splits={"7": "output_activations"}),
    Case(zero=3, accumulation=2),
    Case(zero=3, dtype="fp16", scale={"loss_scale": 128.0}),
)


def _students(rank: int, teacher: Teacher | None, teacher_first: bool) -> list[Any]:
    """Of each student its logits and weights after some steps, and what a sharded teacher said of its rows before."""
    prepare("cpu")
    found = []
    for case in STUDENTS:
        groups = build_groups(2 // (case.pipeline * case.tensor), case.pipeline, case.tensor)
        build = partial(built, levels=("norm",), groups=groups, shard=shard_module)
        live = build(teacher) if teacher is not None and teacher_first else None
        engine, batch = build_engine(case, groups)
        if teacher is not None and not teacher_first:
            live = build(teacher)
        rows, said = rank_rows(engine, batch), []
        for number, (inputs, targets) in enumerate(build_batches()[:4]):
            if live is not None:
                said += all_of(live.ask(inputs[rows]))
            engine.step(inputs[rows], targets[rows], lr=0.05, seed=number)
        logits = engine.predict(build_batches()[-1][0][:8]).clone()
        found.append(([logits, *(fragment.master.clone() for fragment in engine.fragments())], rows, said))
    return found


@pytest.fixture(scope="module")
def students_alone() -> list[Any]:
    return run_distributed(_students, 2, None, False)


@pytest.mark.parametrize("teacher_first", [True, False], ids=["teacher first", "student first"])
def test_a_sharded_teacher_and_a_student_change_no_bit_of_each_other(
    tmp_path: Path, students_alone: list[Any], teacher_first: bool
) -> None:
    teacher = teacher_of(tmp_path, ODD, precision="fp16")
    whole = [built(teacher, levels=("norm",)).ask(inputs) for inputs, _ in build_batches()[:4]]
    beside = run_distributed(_students, 2, teacher, teacher_first)
    for alone, together in zip(students_alone, beside, strict=True):
        for (expected, _, _), (found, rows, said) in zip(alone, together, strict=True):
            assert len(found) == len(expected) > 1
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            signals = [signal[rows] for step in whole for signal in all_of(step)]
            assert all(torch.equal(a, b) for a, b in zip(said, signals, strict=True))
