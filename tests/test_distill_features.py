"""Feature losses against closed forms, connectors, and the taps that put a loss into a backward pass from within."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed import run_distributed
from temper.errors import RunError
from temper.parallel.blocks import compute_on_blocks, join_blocks
from temper.parallel.groups import Group, MeshGroups
from temper.parallel.split import apply_split
from temper.plan.distill import Connector, FeaturePair
from temper.techniques.distill.features import FeatureTaps, build_connectors, connect, feature_loss, resize

KINDS = ("mse", "attention_transfer", "cosine", "gram")
NONE = Connector("none", 4, 4)
MAPS, SEQUENCE, VECTOR = (3, 4, 5), (6, 4), (5,)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(student: str = "0", connector: Connector = NONE, **fields: Any) -> FeaturePair:
    defaults: dict[str, Any] = {"teacher": "t", "of": 0, "loss": "mse", "weight": 1.0}
    shapes = {"student_shape": (4,), "teacher_shape": (4,)}
    return FeaturePair(student, connector=connector, **{**defaults, **shapes, **fields})


# ----------------------------------------------------------------------------------------------------------- the losses


def test_losses_by_hand() -> None:
    # Two channels of two positions; squares summed over the channels: (25, 0) → (1, 0), and (0, 4) → (0, 1).
    student = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]])
    teacher = torch.tensor([[[[0.0, 0.0]], [[0.0, 2.0]]]])
    assert feature_loss("mse", student, teacher) == (9 + 16 + 4) / 4
    assert feature_loss("attention_transfer", student, teacher) == 2
    # Gram matrices over two positions: ((9, 12), (12, 16)) / 2 and ((0, 0), (0, 4)) / 2.
    assert feature_loss("gram", student, teacher) == (4.5**2 + 6**2 + 6**2 + 6**2) / 4
    # Vectors (3, 4) and (4, 3): 24/25; of the second example opposite ones.
    vectors = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    assert feature_loss("cosine", *vectors).item() == pytest.approx((1 / 25 + 2) / 2)


def reference(kind: str, student: np.ndarray, teacher: np.ndarray) -> float:
    """With levels as (examples, channels, positions)."""
    if kind == "mse":
        return float(np.mean((student - teacher) ** 2))
    if kind == "attention_transfer":
        maps = [(level**2).sum(1) for level in (student, teacher)]
        ours, theirs = (item / np.linalg.norm(item, axis=1, keepdims=True) for item in maps)
        return float(np.mean(((ours - theirs) ** 2).sum(1)))
    if kind == "gram":
        ours, theirs = (np.einsum("nip,njp->nij", level, level) / level.shape[2] for level in (student, teacher))
        return float(np.mean((ours - theirs) ** 2))
    dots = (student * teacher).sum(1) / np.linalg.norm(student, axis=1) / np.linalg.norm(teacher, axis=1)
    return float(np.mean(1 - dots))


def by_channels(level: Tensor) -> np.ndarray:
    values = level.double().numpy()
    if level.dim() == 4:
        return values.reshape(*values.shape[:2], -1)
    return values.transpose(0, 2, 1) if level.dim() == 3 else values[:, :, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [MAPS, SEQUENCE])
def test_losses_equal_the_formulas(kind: str, shape: tuple[int, ...]) -> None:
    student, teacher = random(7, *shape), random(7, *shape, seed=1)
    expected = reference(kind, by_channels(student), by_channels(teacher))
    assert feature_loss(kind, student.double(), teacher.double()).item() == pytest.approx(expected, rel=1e-12)
    assert feature_loss(kind, student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # The teacher's precision, and the student's, change nothing but the values.
    rounded = feature_loss(kind, student.bfloat16(), teacher.half())
    assert rounded.dtype == torch.float32
    expected = reference(kind, by_channels(student.bfloat16()), by_channels(teacher.half()))
    assert rounded.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*((kind, shape) for kind in KINDS for shape in (MAPS, SEQUENCE)), ("mse", VECTOR), ("cosine", VECTOR)],
)
def test_gradients_equal_finite_differences(kind: str, shape: tuple[int, ...]) -> None:
    student = random(2, *shape, dtype=torch.float64).requires_grad_()
    teacher = random(2, *shape, seed=1, dtype=torch.float64)
    size = {MAPS: (2, 7), SEQUENCE: (4,), VECTOR: None}[shape] if kind != "gram" else None
    if size is not None:
        teacher = resize(teacher, size)
    assert torch.autograd.gradcheck(lambda student: feature_loss(kind, student, teacher, size), (student,))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_means_over_the_examples(kind: str) -> None:
    student, teacher = (random(6, *MAPS, seed=seed, dtype=torch.float64) for seed in (0, 1))
    parts = [feature_loss(kind, *part) * len(part[0]) for part in zip(student.split(4), teacher.split(4), strict=True)]
    torch.testing.assert_close(sum(parts) / 6, feature_loss(kind, student, teacher))


def test_attention_and_gram_need_not_agree_in_all() -> None:
    student, teacher = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1)
    assert feature_loss("attention_transfer", student, teacher) > 0
    ours, theirs = random(2, 3, 4, 4), random(2, 3, 2, 2, seed=1)
    assert feature_loss("gram", ours, theirs) > 0
    # The attention is resized, not the features, whose signs would cancel each other.
    signs = torch.tensor([1.0, -1.0]).repeat(2, 3, 4, 2)
    assert feature_loss("attention_transfer", signs, torch.ones(2, 5, 2, 2), (2, 2)).item() == pytest.approx(0)


def test_attention_to_nothing_has_a_gradient() -> None:
    student = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss = feature_loss("attention_transfer", student, torch.ones(1, 2, 2, 2))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(1)
    assert gradient.eq(0).all()


# ----------------------------------------------------------------------------------------------------------- connectors


def test_resizing_is_adaptive_pooling_and_linear_interpolation() -> None:
    maps = random(2, 3, 7, 5)
    torch.testing.assert_close(resize(maps, (3, 2)), F.adaptive_avg_pool2d(maps, (3, 2)))
    torch.testing.assert_close(resize(maps, (9, 8)), F.interpolate(maps, (9, 8), mode="bilinear"))
    both = F.interpolate(F.adaptive_avg_pool2d(maps, (3, 5)), (3, 8), mode="bilinear")
    torch.testing.assert_close(resize(maps, (3, 8)), both)
    tokens = random(2, 6, 4)
    torch.testing.assert_close(resize(tokens, (4,)), F.adaptive_avg_pool1d(tokens.mT, 4).mT)
    torch.testing.assert_close(resize(tokens, (8,)), F.interpolate(tokens.mT, 8, mode="linear").mT)


@pytest.mark.parametrize(
    ("connector", "shape", "connected"),
    [
        (Connector("none", 3, 3), MAPS, MAPS),
        (Connector("conv1x1", 3, 8, size=(2, 2)), MAPS, (8, 4, 5)),
        (Connector("linear", 4, 8), SEQUENCE, (6, 8)),
        (Connector("linear", 5, 8), VECTOR, (8,)),
        (Connector("linear", 3, 8, pool=True), MAPS, (8,)),
        (Connector("none", 4, 4, pool=True), SEQUENCE, (4,)),
    ],
)
def test_what_connectors_give(connector: Connector, shape: tuple[int, ...], connected: tuple[int, ...]) -> None:
    learnt = dict(build_connectors([pair(connector=connector)], seed=0).items()).get("0")
    assert (learnt is None) == (connector.kind == "none")
    level = random(2, *shape)
    given = connect(level, connector, learnt)
    assert given.shape == (2, *connected)
    if isinstance(learnt, nn.Module):
        assert [name for name, _ in learnt.named_parameters()] == ["weight"]
        positions = level.mean((2, 3)) if connector.pool else level
        weight = learnt.get_parameter("weight").reshape(connector.outputs, connector.inputs)
        product = torch.einsum("oc,nchw->nohw", weight, positions) if positions.dim() == 4 else positions @ weight.mT
        torch.testing.assert_close(given, product)
        assert connect(level.bfloat16(), connector, learnt.bfloat16()).dtype == torch.bfloat16


def test_the_seed_alone_decides_the_connectors() -> None:
    pairs = [pair(connector=Connector("conv1x1", 16, 8)), pair(), pair(connector=Connector("linear", 16, 8))]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_connectors(pairs, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert list(first.state_dict()) == ["0.weight", "2.weight"]
    again, other = build_connectors(pairs, seed=3).state_dict(), build_connectors(pairs, seed=4).state_dict()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again[name])
        assert not torch.equal(weight, other[name])
        # torch's default: uniform within 1/√inputs.
        assert 0.2 < weight.abs().max() <= 0.25


# ----------------------------------------------------------------------------------------------------------------- taps


def trained(
    model: nn.Module, taps: FeatureTaps, batches: Sequence[tuple[Tensor, Sequence[Tensor]]], scale: float
) -> Any:
    """Gradients of model and connectors after a step over the micro-batches, the engine's loss being scale · sum²."""
    taps.begin_step(scale)
    for inputs, features in batches:
        taps.feed(features)
        (scale * model(inputs).square().sum()).backward()
    both = nn.ModuleDict({"model": model, "connectors": taps.connectors})
    return {name: param.grad for name, param in both.named_parameters()}


def expected(
    model: nn.Sequential, taps: FeatureTaps, batches: Sequence[tuple[Tensor, Sequence[Tensor]]], scale: float
) -> Any:
    """The same from plain losses: each module applied on its own."""
    model, connectors = copy.deepcopy((model, taps.connectors))
    for module in model.modules():
        module._forward_hooks.clear()
    learnt = dict(connectors.items())
    for outputs, features in batches:
        loss = torch.zeros(())
        for name, module in model.named_children():
            outputs = module(outputs.clone())
            for index, item in enumerate(taps.pairs):
                if item.tap == name:
                    level = connect(outputs, item.connector, learnt.get(str(index)))
                    distance = feature_loss(item.loss, level, features[index], item.connector.size)
                    loss = loss + item.weight * distance
        (scale * (loss + outputs.square().sum())).backward()
    both = nn.ModuleDict({"model": model, "connectors": connectors})
    return {name: param.grad for name, param in both.named_parameters()}


def network() -> nn.Sequential:
    """Tapped outputs are changed in place by what follows them."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )


PAIRS = (
    pair("0", Connector("conv1x1", 3, 6), weight=0.5),
    pair("0", loss="attention_transfer", connector=Connector("none", 3, 3, size=(4, 4))),
    pair("2", Connector("conv1x1", 4, 3), loss="gram", weight=2.0),
    pair("3", Connector("linear", 4, 6, pool=True), loss="cosine"),
    pair("5", Connector("linear", 4, 6)),
)


def micro_batches(*sizes: int) -> list[tuple[Tensor, list[Tensor]]]:
    shapes = [(6, 6, 6), (7, 4, 4), (3, 9, 9), (6,), (6,)]
    return [
        (random(size, 2, 8, 8, seed=size), [random(size, *shape, seed=size + 1).half() for shape in shapes])
        for size in sizes
    ]


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0**12])
def test_gradients_are_those_of_the_sum_of_all_losses(scale: float) -> None:
    model, taps, batches = network(), FeatureTaps(PAIRS, seed=0), micro_batches(3, 2)
    taps.hook(dict(model.named_modules()))
    wanted = expected(model, taps, batches, scale)
    assert "connectors.4.weight" in wanted
    for name, gradient in trained(model, taps, batches, scale).items():
        torch.testing.assert_close(
            gradient / scale, wanted[name] / scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_terms_are_weighted_and_summed_over_the_micro_batches_of_a_step() -> None:
    model, taps = network(), FeatureTaps(PAIRS, seed=0)
    taps.hook(dict(model.named_modules()))
    assert taps.names == ("features/0", "features/2", "features/3", "features/5")
    sums = []
    for sizes in ([3], [2], [3, 2]):
        trained(model, taps, micro_batches(*sizes), 7.0)
        sums.append(taps.terms())
        assert tuple(taps.terms()) == taps.names
    for name in taps.names:
        assert not sums[2][name].requires_grad
        torch.testing.assert_close(sums[0][name] + sums[1][name], sums[2][name])
    taps.begin_step(1.0)
    assert taps.terms() == {}


def test_forwards_may_run_ahead_of_backwards() -> None:
    """As in 1F1B: two micro-batches are fed and gone through before the first one's backward pass."""
    (model, taps), batches = (network(), FeatureTaps(PAIRS, seed=0)), micro_batches(3, 2)
    taps.hook(dict(model.named_modules()))
    wanted = expected(model, taps, batches, 1.0)
    taps.begin_step(1.0)
    for _, features in batches:
        taps.feed(features)
    losses = [model(inputs).square().sum() for inputs, _ in batches]
    for loss in losses:
        loss.backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, wanted[f"model.{name}"])


@pytest.mark.parametrize("prepare", [lambda model, taps: model.eval() and taps.feed([]), lambda model, taps: None])
def test_what_is_not_taught_is_left_alone(prepare: Callable[[nn.Module, FeatureTaps], Any]) -> None:
    model, taps = network(), FeatureTaps(PAIRS, seed=0)
    inputs = micro_batches(2)[0][0]
    plain = model(inputs)
    taps.hook(dict(model.named_modules()))
    prepare(model, taps)
    assert torch.equal(model(inputs), plain)
    taps.begin_step(1.0)
    assert taps.terms() == {}


def test_a_level_that_a_micro_batch_skips_is_named() -> None:
    """Those after it would be compared with what the teacher gives for another one."""
    model, taps = network(), FeatureTaps(PAIRS, seed=0)
    taps.hook(dict(model.named_modules()))
    taps.begin_step(1.0)
    for _, features in micro_batches(3, 2):
        taps.feed(features)
    model(micro_batches(3)[0][0])
    with pytest.raises(RunError, match="of the student is not called in every pass"):
        taps.terms()


def test_a_level_whose_gradient_is_computed_later_is_refused() -> None:
    model, taps = network(), FeatureTaps(PAIRS, seed=0)
    taps.hook(dict(model.named_modules()))
    taps.begin_step(1.0)
    ((inputs, features),) = micro_batches(2)
    taps.feed(features)
    with pytest.raises(RunError, match="of the student is checkpointed"):
        checkpoint(model, inputs.requires_grad_(), use_reentrant=True)


def test_what_one_step_leaves_does_not_reach_the_next() -> None:
    model, taps = network(), FeatureTaps(PAIRS, seed=0)
    taps.hook(dict(model.named_modules()))
    (first, stale), (second, features) = micro_batches(3, 2)
    taps.begin_step(1.0)
    taps.feed(stale)
    taps.begin_step(1.0)
    taps.feed(features)
    model(second)
    with_right = taps.terms()
    assert set(with_right) == set(taps.names)
    model(first)
    assert taps.terms() == with_right


def test_a_stage_taps_what_it_has() -> None:
    """A sequence is tapped at its last module, under whatever stage that is; connectors are those of the stage's."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    connector = Connector("linear", 4, 2)
    pairs = [pair("a", connector), pair("body", connector, last="b"), pair("c", connector)]
    taps = FeatureTaps(pairs, seed=0)
    assert list(taps.hook({"b": model["b"]})) == ["1"]
    taps.begin_step(1.0)
    taps.feed([torch.zeros(3, 2)] * 3)
    inputs = random(3, 4)
    model["b"](inputs)
    level = taps.connectors["1"](model["b"](inputs))
    torch.testing.assert_close(taps.terms(), {"features/body": level.square().mean().detach()})


def test_a_level_in_low_precision() -> None:
    """The connector computes in the student's type, and the loss in fp32."""
    model, taps = nn.Linear(4, 4).bfloat16(), FeatureTaps([pair("0", Connector("linear", 4, 2))], seed=0)
    taps.connectors.bfloat16()
    taps.hook({"0": model})
    taps.begin_step(8.0)
    taps.feed([torch.zeros(3, 2, dtype=torch.float16)])
    outputs = model(random(3, 4).bfloat16())
    outputs.sum().backward()
    assert (outputs.dtype, taps.terms()["features/0"].dtype) == (torch.bfloat16, torch.float32)
    weight = taps.connectors["0"].weight
    level = outputs.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(8 * F.linear(level, weight).float().square().mean(), [weight])
    torch.testing.assert_close(weight.grad, wanted)


# ------------------------------------------------------------------------------------------------------ parts of levels


def setting(kind: str) -> tuple[nn.Sequential, FeatureTaps, list[tuple[Tensor, list[Tensor]]]]:
    torch.manual_seed(0)
    if kind == "blocks":
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1))
        taps = FeatureTaps([pair("0", Connector("conv1x1", 3, 5))], seed=0)
        return model, taps, [(random(2, 2, 6, 6), [random(2, 5, 6, 6, seed=1)])]
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    taps = FeatureTaps([pair("0", Connector("linear", 5, 6))], seed=0)
    return model, taps, [(random(2, 4), [random(2, 6, seed=1)])]


def gradients_of_parts(rank: int, kind: str) -> dict[str, Tensor]:
    """Tensor ranks that hold a part of a level each: blocks of its maps, or some of its features."""
    model, taps, batches = setting(kind)
    tensor = Group(rank, 2, torch.distributed.group.WORLD)
    groups = MeshGroups(data=Group(), tensor=tensor, pipeline=Group(), stage=tensor, replica=tensor)
    if kind == "blocks":
        for layer in model:
            compute_on_blocks(layer, groups)
        join_blocks(model)
    else:
        apply_split(model, {"0": "output_activations", "2": "input_activations"}, groups)
    taps.hook(dict(model.named_modules()))
    return trained(model, taps, batches, 1.0)


@pytest.mark.parametrize("kind", ["blocks", "features"])
def test_tensor_ranks_with_a_part_each_learn_as_one(kind: str) -> None:
    whole = expected(*setting(kind), 1.0)
    first, second = run_distributed(gradients_of_parts, 2, kind)
    for name, gradient in whole.items():
        if first[name].shape == gradient.shape:
            torch.testing.assert_close(first[name], gradient)
            torch.testing.assert_close(second[name], gradient)
        else:
            dim = 1 if name == "model.2.weight" else 0
            torch.testing.assert_close(torch.cat([first[name], second[name]], dim), gradient)
