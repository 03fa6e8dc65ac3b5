"""Networks on blocks of the image, on several ranks, against the same networks on whole images in one process."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from distributed import run_distributed
from temper.models.resnet import build_resnet
from temper.parallel import image_block
from temper.parallel.batch_norm import apply_global_batch_norm
from temper.parallel.blocks import compute_on_blocks, dry_run_on_blocks, join_blocks, join_chain
from temper.parallel.groups import Group, MeshGroups
from temper.parallel.halo import Box, Exchange, Window, blocks_of, grid_shape, plan_window
from temper.parallel.image_block import ImageBlock
from temper.torchvision_import import declare_torchvision_operators

ALONE = MeshGroups(Group(), Group(), Group(), Group(), Group())


# ----------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    """A module of one operation, by the name of its class in `torch.nn`, on images of `shape`."""

    kind: str
    shape: tuple[int, ...]
    args: dict[str, Any] = field(hash=False)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        kind = {"Slice": Slice, "Mean": Mean}.get(self.kind) or getattr(nn, self.kind)
        return kind(**self.args).double()

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{key}={value}' for key, value in self.args.items())}) on {self.shape}"


class Slice(nn.Module):
    def __init__(self, index: tuple[Any, ...]) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x[self.index]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def sides(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw: st.DrawFn) -> Operation:
    groups = draw(st.sampled_from([1, 1, 2]))
    same = draw(st.booleans()) and draw(st.booleans())
    args = {
        "in_channels": 2 * groups,
        "out_channels": draw(st.integers(1, 2)) * groups,
        "kernel_size": draw(sides(1, 5)),
        "stride": 1 if same else draw(sides(1, 3)),
        "padding": draw(st.sampled_from(["same", "valid"])) if same else draw(sides(0, 4)),
        "dilation": draw(sides(1, 3)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return Operation("Conv2d", (2, 2 * groups, *draw(sides(1, 13))), args)


@st.composite
def pools(draw: st.DrawFn) -> Operation:
    kernel = draw(sides(1, 5))
    args: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": draw(st.none() | sides(1, 4)),
        "padding": tuple(draw(st.integers(0, side // 2)) for side in kernel),
        "ceil_mode": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(["MaxPool2d", "AvgPool2d"]))
    if kind == "MaxPool2d":
        args["dilation"] = draw(sides(1, 3))
    else:
        args["count_include_pad"] = draw(st.booleans())
        args["divisor_override"] = draw(st.none() | st.integers(1, 9))
    return Operation(kind, (2, 2, *draw(sides(1, 13))), args)


@st.composite
def others(draw: st.DrawFn) -> Operation:
    shape = (2, 3, *draw(sides(1, 11)))
    kind = draw(st.sampled_from(["AdaptiveAvgPool2d", "ConstantPad2d", "Slice", "Mean"]))
    args: dict[str, Any] = {}
    if kind == "AdaptiveAvgPool2d":
        args = {"output_size": draw(st.integers(1, 5) | st.tuples(st.none() | st.integers(1, 4), st.integers(1, 7)))}
    elif kind == "ConstantPad2d":
        args = {
            "padding": tuple(draw(st.integers(-2, 4)) for _ in range(4)),
            "value": draw(st.sampled_from([0.0, 2.5])),
        }
    elif kind == "Slice":
        bound, step = st.none() | st.integers(-5, 9), st.integers(1, 4)
        rows, columns = (slice(draw(bound), draw(bound), draw(step)) for _ in range(2))
        args = {"index": draw(st.sampled_from([(..., rows, columns), (slice(None), slice(1, 3), rows)]))}
    return Operation(kind, shape, args)


def draw_cases(strategy: st.SearchStrategy[Operation], count: int) -> list[Operation]:
    """`count` operations that torch itself accepts and that leave something; always the same ones."""
    cases: dict[str, Operation] = {}

    @settings(
        derandomize=True,
        database=None,
        max_examples=count,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Operation) -> None:
        try:
            output = case.build()(torch.zeros(case.shape, dtype=torch.double))
        except RuntimeError:
            assume(False)
        # torch's max pooling writes past its memory in the backward pass of a window that sees padding alone.
        assume(output.numel() and output.isfinite().all())
        cases[str(case)] = case

    collect()
    return list(cases.values())


@functools.cache
def operations() -> list[Operation]:
    return [*draw_cases(convolutions(), 50), *draw_cases(pools(), 40), *draw_cases(others(), 30)]


# ------------------------------------------------------------------------------------------------------------- networks


class Twigs(nn.Module):
    """Several arguments and results; scales of every shape; in-place operations; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.place = nn.Parameter(torch.randn(1, 1, 7, 9))
        self.rows = nn.Parameter(torch.randn(7, 1))
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.conv = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
        self.prelu = nn.PReLU(4)
        self.dropout, self.dropout_maps = nn.Dropout(0.3), nn.Dropout2d(0.4, inplace=True)

    def forward(self, x: Tensor, *, twig: Tensor) -> dict[str, Tensor]:
        y = self.prelu(self.conv(x * self.scale + self.place))
        same = y
        y += self.rows * twig
        same *= self.factor
        y = self.dropout_maps(self.dropout(torch.cat([y, F.relu(2 - same), twig.to(x.dtype)], dim=1)))
        gate = torch.sigmoid(F.avg_pool2d(y, y.shape[2:]))
        z = F.leaky_relu_(torch.where(x > 0, x, self.factor / (x * x + 1)), 0.1)
        return {"y": 1 - y * gate, "z": F.pad(z, (0, 1, 0, 0, 1, 2)), "mean": y.mean((2, 3))}


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    training: bool = True


def _torchvision(name: str, part: str = "", **args: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision_operators()
        from torchvision import models

        return models.get_model(name, **args).get_submodule(part)

    return build


def _vgg() -> nn.Module:
    declare_torchvision_operators()
    from torchvision.models.vgg import make_layers

    return make_layers([4, "M", 8, "M", 8, 8, "M"])


def _densenet() -> nn.Module:
    declare_torchvision_operators()
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8).features


def _inception() -> nn.Module:
    declare_torchvision_operators()
    from torchvision.models.googlenet import Inception

    return nn.Sequential(Inception(6, 3, 4, 5, 2, 3, 4), nn.MaxPool2d(3, 2, ceil_mode=True))


NETWORKS = {
    "ResNet-18, layer1": Network(_torchvision("resnet18", "layer1"), (2, 64, 8, 7)),
    "ResNet-18, layer2": Network(_torchvision("resnet18", "layer2"), (2, 64, 7, 9)),
    "ResNet-18, layer3": Network(_torchvision("resnet18", "layer3"), (3, 128, 3, 2)),
    "ResNet-18 in evaluation": Network(_torchvision("resnet18", num_classes=5), (2, 3, 33, 40), training=False),
    "temper's ResNet-14": Network(lambda: build_resnet(3, 10, 14, 0.25), (2, 3, 11, 13)),
    "VGG": Network(_vgg, (2, 3, 21, 18)),
    "Inception": Network(_inception, (2, 6, 9, 7)),
    "MobileNetV3, squeeze and excitation": Network(
        lambda: _torchvision("mobilenet_v3_small", "features")()[:5], (2, 3, 40, 33)
    ),
    "EfficientNet, stochastic depth": Network(
        lambda: _torchvision("efficientnet_b0", "features", stochastic_depth_prob=0.8)()[:4], (2, 3, 34, 30)
    ),
    "DenseNet": Network(_densenet, (2, 3, 40, 36)),
    "Twigs": Network(Twigs, (2, 4, 7, 9)),
}
_SOME = ["ResNet-18, layer2", "temper's ResNet-14", "Inception", "Twigs"]
SIZES = {2: _SOME, 3: _SOME, 4: list(NETWORKS)}


def build_network(name: str) -> nn.Module:
    torch.manual_seed(1)
    net = NETWORKS[name].build().double().train(NETWORKS[name].training)
    for module in net.modules():
        # Weights and statistics of batch norms that are not the initial ones.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return net


# -------------------------------------------------------------------------------------------------- what a run computes


def compute(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.double) -> dict[str, Tensor]:
    """Outputs, all gradients and the buffers after a forward and a backward pass on inputs that are always the same."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(shape, generator=generator, dtype=torch.double).to(dtype).requires_grad_()
    twig = torch.randn((*shape[:1], 1, *shape[2:]), generator=generator, dtype=torch.double).requires_grad_()
    kwargs = {"twig": twig} if isinstance(module, Twigs) else {}
    torch.manual_seed(3)
    outputs = module(images, **kwargs)
    outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
    weights = {name: torch.randn(value.shape, generator=generator).to(dtype) for name, value in outputs.items()}
    sum((value * weights[name]).sum() for name, value in outputs.items()).backward()
    found = {f"output {name}": value.detach() for name, value in outputs.items()}
    found |= {"gradient of the input": images.grad, **({"gradient of the twig": twig.grad} if kwargs else {})}
    found |= {f"gradient of {name}": param.grad for name, param in module.named_parameters()}
    return found | {f"buffer {name}": value for name, value in module.named_buffers()}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest value of its kind; a bias before a norm has a gradient of 0."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        if value.numel() == 0:
            continue
        alike = [other for key, other in expected.items() if key.split()[0] == name.split()[0] and other.numel()]
        scale = max(1e-3, *(float(other.abs().max()) for other in alike))
        error = float((found[name].double() - value.double()).abs().max())
        assert error <= tolerance * scale, f"{name}: {error:.1e} on a scale of {scale:.1e}"


def on_blocks(module: nn.Module, shape: tuple[int, ...], groups: MeshGroups, **options: Any) -> dict[str, Tensor]:
    compute_on_blocks(module, groups)
    return compute(module, shape, **options)


# ---------------------------------------------------------------------------------------------------- on several ranks


def all_sizes(rank: int, cases: list[Operation]) -> dict[Any, Any]:
    """Everything that needs ranks, for every number of them; the others wait."""
    found: dict[Any, Any] = {}
    for size in SIZES:
        groups = mesh(rank, 1, size)
        if rank < size:
            found |= one_size(size, groups, cases)
    groups = mesh(rank, 2, 2)
    if rank < 4:
        found["replicas"] = run_replicas(groups)
    return found


def mesh(rank: int, data: int, tensor: int) -> MeshGroups:
    """As `build_groups`, on the first data × tensor of the ranks."""
    ranks = torch.arange(data * tensor).view(data, tensor)
    alone = Group()
    return MeshGroups(
        data=new_group(rank, ranks.T.tolist()),
        tensor=new_group(rank, ranks.tolist()),
        pipeline=alone,
        stage=new_group(rank, [ranks.flatten().tolist()]),
        replica=alone,
    )


def new_group(rank: int, members: list[list[int]]) -> Group:
    made = {tuple(ranks): dist.new_group(ranks) for ranks in members}
    mine = next((ranks for ranks in made if rank in ranks), None)
    return Group() if mine is None else Group(mine.index(rank), len(mine), made[mine])


def one_size(size: int, groups: MeshGroups, cases: list[Operation]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for operation in cases:
        found[size, str(operation)] = on_blocks(operation.build(), operation.shape, groups)
    for name in SIZES[size]:
        found[size, name] = on_blocks(build_network(name), NETWORKS[name].shape, groups)
    if size == 4:
        found["joined"] = [run_joined(groups, join) for join in (False, True)]
        found["low precision"] = {str(case): run_low_precision(*case, groups) for case in LOW_PRECISION}
        found["reused"] = run_reused(groups)
        found["no halo"] = run_without_halo(groups)
        found["dropout"] = run_dropout(groups)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """`ranks[rank]` is what :func:`all_sizes` found there; one spawn for all."""
    return run_distributed(all_sizes, max(SIZES), operations())


def check_ranks(ranks: list[dict[Any, Any]], size: int, key: str, expected: dict[str, Tensor], bound: float) -> None:
    first, *others = (found[size, key] for found in ranks[:size])
    check(first, expected, bound)
    for other in others:
        # Replicated weights must not drift apart.
        assert all(torch.equal(first[name], other[name]) for name in expected)


@pytest.mark.parametrize(
    "kind", ["Conv2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "ConstantPad2d", "Slice", "Mean"]
)
def test_an_operation_equals_the_unsplit_one(ranks: Any, kind: str) -> None:
    cases = [case for case in operations() if case.kind == kind]
    assert len(cases) >= 4
    for case in cases:
        expected = compute(case.build(), case.shape)
        for size in SIZES:
            check_ranks(ranks, size, str(case), expected, 1e-13)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_equals_the_unsplit_one(ranks: Any, name: str) -> None:
    expected = compute(build_network(name), NETWORKS[name].shape)
    for size in (size for size, names in SIZES.items() if name in names):
        check_ranks(ranks, size, name, expected, 1e-11)


# -------------------------------------------------------------------------------------------------- regions in a model


def build_chain() -> nn.Sequential:
    """A linear layer after the blocks and a convolution before them, both replicated."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 4, 5),
    ).double()  # fmt: skip


REGIONS = ("1", "2", "3")
CHAIN_SHAPE = (2, 2, 17, 15)


def run_joined(groups: MeshGroups, join: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_chain()
    for name in REGIONS:
        compute_on_blocks(model.get_submodule(name), groups)
    seen: list[str] = []
    for name in REGIONS:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(type(output).__name__))
    if join:
        join_blocks(model)
    return {"values": compute(model, CHAIN_SHAPE), "seen": seen}


def test_regions_that_follow_each_other_keep_their_blocks(ranks: Any) -> None:
    torch.manual_seed(0)
    expected = compute(build_chain(), CHAIN_SHAPE)
    for found in ranks[:4]:
        apart, joined = found["joined"]
        assert apart["seen"] == ["Tensor", "Tensor", "Tensor"]
        assert joined["seen"] == ["ImageBlock", "ImageBlock", "Tensor"]
        check(apart["values"], expected, 1e-13)
        check(joined["values"], expected, 1e-13)


class Reused(nn.Module):
    """Uses what a module on blocks has changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(2, 3, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.blocks(x) + x


def run_reused(split: MeshGroups | None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Reused().double()
    if split is not None:
        compute_on_blocks(model.blocks, split)
    with torch.inference_mode():
        inferred = model(torch.ones(CHAIN_SHAPE, dtype=torch.double))
    return {**compute(model, CHAIN_SHAPE), "output inferred": inferred.clone()}


def test_a_change_in_place_is_seen_outside(ranks: Any) -> None:
    expected = run_reused(None)
    for found in ranks[:4]:
        check(found["reused"], expected, 1e-13)


def test_only_neighbours_that_nothing_else_uses_are_joined() -> None:
    first, second, third = (nn.Conv2d(1, 1, 1) for _ in range(3))
    for layer in (first, second):
        compute_on_blocks(layer, ALONE)
    join_chain([first, third, second])
    assert not first.temper_region.hands_on
    join_blocks(nn.ModuleList([nn.Sequential(first, second), nn.Sequential(first, third)]))
    assert not first.temper_region.hands_on
    join_chain([first, second, third])
    assert first.temper_region.hands_on
    assert not second.temper_region.hands_on


# --------------------------------------------------------------------------------------- precision, replicas, dropout

LOW_PRECISION = [
    (dtype, memory_format)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last)
]


class FormatSpy(nn.Module):
    """Notes the memory format of the blocks that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: Any) -> Any:
        block = x.block if isinstance(x, ImageBlock) else x
        self.seen.append(block.is_contiguous(memory_format=torch.channels_last))
        return x


def build_low(dtype: torch.dtype, memory_format: torch.memory_format) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False), FormatSpy(), nn.BatchNorm2d(8), nn.ReLU(), FormatSpy(),
        nn.MaxPool2d(3, 2, 1), FormatSpy(), nn.Conv2d(8, 4, 3, padding=1), nn.AvgPool2d(3, 2, 1), FormatSpy(),
    )  # fmt: skip
    return apply_global_batch_norm(net, Group()).to(dtype, memory_format=memory_format)


def run_low(net: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Any]:
    images = torch.randn(2, 4, 15, 18, generator=torch.Generator().manual_seed(2)).to(dtype)
    images = images.contiguous(memory_format=memory_format).requires_grad_()
    output = net(images)
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    formats = [all(spy.seen) for spy in net.modules() if isinstance(spy, FormatSpy)]
    gradients = {name: param.grad for name, param in net.named_parameters()}
    return {"output": output.detach(), "input": images.grad, **gradients, "formats": formats}


def run_low_precision(dtype: torch.dtype, memory_format: torch.memory_format, groups: MeshGroups) -> dict[str, Any]:
    net = build_low(dtype, memory_format)
    compute_on_blocks(net, groups)
    return run_low(net, dtype, memory_format)


@pytest.mark.parametrize(("dtype", "memory_format"), LOW_PRECISION, ids=str)
def test_precision_and_memory_format_are_kept(
    ranks: Any, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    expected = run_low(build_low(dtype, memory_format), dtype, memory_format)
    # A few roundings: of each activation, and of the ranks' parts of a gradient.
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-6}[dtype]
    for found in ranks[:4]:
        here = found["low precision"][str((dtype, memory_format))]
        if memory_format == torch.channels_last:
            assert here["formats"] == [True] * 4
        for name, value in expected.items():
            if name != "formats":
                assert here[name].dtype == dtype
                error = (here[name].double() - value.double()).abs().max() / value.double().abs().max()
                assert error <= tolerance, f"{name}: {error:.1e}"


def run_replicas(groups: MeshGroups) -> dict[str, Any]:
    """Two replicas of two blocks each; every replica has one half of the examples."""
    net = build_network("temper's ResNet-14")
    compute_on_blocks(net, groups)
    images = replica_images().chunk(2)[groups.data.rank].clone().requires_grad_()
    output = net(images)
    (output * replica_weights().chunk(2)[groups.data.rank]).sum().backward()
    return {
        "output": output.detach(),
        "input": images.grad,
        "params": {name: param.grad for name, param in net.named_parameters()},
        "buffers": dict(net.named_buffers()),
    }


def replica_images() -> Tensor:
    return torch.randn(6, 3, 12, 10, generator=torch.Generator().manual_seed(4), dtype=torch.double)


def replica_weights() -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(5), dtype=torch.double)


def test_two_replicas_of_two_blocks(ranks: Any) -> None:
    net = build_network("temper's ResNet-14")
    images = replica_images().requires_grad_()
    output = net(images)
    (output * replica_weights()).sum().backward()
    parts = [found["replicas"] for found in ranks[:4]]
    for part in (0, 1):
        # Ranks are replica × 2 + part.
        found = [parts[part], parts[2 + part]]
        torch.testing.assert_close(torch.cat([one["output"] for one in found]), output.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat([one["input"] for one in found]), images.grad, rtol=0, atol=1e-11)
        for name, param in net.named_parameters():
            total = sum(one["params"][name] for one in found)
            torch.testing.assert_close(total, param.grad, rtol=0, atol=1e-11 * float(param.grad.abs().max()))
        for name, buffer in net.named_buffers():
            assert all((one["buffers"][name] - buffer).abs().max() <= 1e-12 for one in found)


def run_dropout(groups: MeshGroups) -> dict[str, Any]:
    module = nn.Dropout(0.5)
    compute_on_blocks(module, groups)
    torch.manual_seed(9)
    twice = [module(torch.ones(1, 1, 8, 8)), module(torch.ones(1, 1, 8, 8))]
    return {"twice": twice, "next": torch.rand(())}


def test_dropout_is_that_of_one_rank(ranks: Any) -> None:
    torch.manual_seed(9)
    expected = [F.dropout(torch.ones(1, 1, 8, 8)), F.dropout(torch.ones(1, 1, 8, 8))]
    following = torch.rand(())
    corners = [expected[0][..., box.top : box.bottom, box.left : box.right] for box in blocks_of(8, 8, 4)]
    assert all(not torch.equal(corners[0], other) for other in corners[1:])
    for found in ranks[:4]:
        assert all(torch.equal(*pair) for pair in zip(found["dropout"]["twice"], expected, strict=True))
        assert found["dropout"]["next"] == following


# ----------------------------------------------------------------------------------------------------- a planted fault


def _fetch_zeros(block: Tensor, exchange: Exchange, group: Group, fill: float) -> Tensor:
    """As `fetch`, with zeros for what lies in other blocks."""
    held, needed = exchange.held[group.rank], exchange.needed[group.rank]
    columns, rows = (
        (held.left - needed.left, needed.right - held.right),
        (held.top - needed.top, needed.bottom - held.bottom),
    )
    return F.pad(block, (*columns, *rows))


def run_without_halo(groups: MeshGroups) -> Tensor:
    module = Operation("Conv2d", (), {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1}).build()
    compute_on_blocks(module, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_block, "fetch", _fetch_zeros)
        return compute(module, (1, 2, 8, 6))["output output"]


def test_a_missing_halo_shows_along_the_borders_of_the_blocks(ranks: Any) -> None:
    module = Operation("Conv2d", (), {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1}).build()
    expected = compute(module, (1, 2, 8, 6))
    seam = torch.zeros(8, 6, dtype=torch.bool)
    seam[3:5], seam[:, 2:4] = True, True
    for found in ranks[:4]:
        error = (found["no halo"] - expected["output output"]).abs().amax((0, 1))
        assert (error[seam] > 1e-3).all()
        assert (error[~seam] < 1e-13).all()
        with pytest.raises(AssertionError, match="output output: "):
            check({**expected, "output output": found["no halo"]}, expected, 1e-3)


# --------------------------------------------------------------------------------------------------------- one process


@given(sides(1, 13), st.integers(1, 12), *(st.builds(Window, *[st.integers(1, 4)] * 2, *[st.integers(0, 3)] * 2),) * 2)
def test_the_pieces_of_an_exchange_fill_what_a_rank_needs(size: Any, ranks: int, rows: Window, columns: Window) -> None:
    assume(rows.outputs(size[0]) > 0 and columns.outputs(size[1]) > 0)
    exchange = plan_window(*size, ranks, rows, columns)
    image = Box(0, size[0], 0, size[1])
    for target, needed in enumerate(exchange.needed):
        times = torch.zeros(needed.height, needed.width)
        for source in range(ranks):
            exchange.piece(source, target).of(times, needed).add_(1)
        inside = torch.zeros_like(times)
        (needed & image).of(inside, needed).fill_(1)
        assert torch.equal(times, inside)


def test_grids_are_as_square_as_can_be() -> None:
    shapes = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2), 7: (7, 1), 8: (4, 2), 12: (4, 3), 16: (4, 4)}
    assert {size: grid_shape(size) for size in shapes} == shapes


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_blocks_cover_the_image_once(height: int, width: int, size: int) -> None:
    image = torch.zeros(height, width)
    boxes = blocks_of(height, width, size)
    for box in boxes:
        image[box.top : box.bottom, box.left : box.right] += 1
    assert len(boxes) == size
    assert torch.equal(image, torch.ones(height, width))


MORE_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "pow", "eq", "ge", "gt", "le", "lt", "ne"), (0.4,)),
    "threshold": (0.1, 2.0),
    "to": (torch.double,),
}
WITH_ANOTHER = (
    "add",
    "sub",
    "mul",
    "div",
    "divide",
    "multiply",
    "subtract",
    "true_divide",
    "maximum",
    "minimum",
    "type_as",
)


def call_by_every_name(name: str, x: Any, y: Any) -> Iterator[tuple[str, Any]]:
    """Results of the torch function, the method and those in place, with arguments that suit them."""
    more = (y,) if name in WITH_ANOTHER else MORE_ARGUMENTS.get(name, ())
    more = {"where": (y > 0.5, y), "masked_fill": (y > 0.5, 0.25)}.get(name, more)
    for variant in (name, f"{name}_"):
        if callable(getattr(Tensor, variant, None)):
            yield f"Tensor.{variant}", getattr(x.clone(), variant)(*more)
        for place in (torch, F):
            function = getattr(place, variant, None)
            if callable(function):
                arguments = (y > 0.5, x, y) if name == "where" else (x.clone(), *more)
                yield f"{place.__name__}.{variant}", function(*arguments)


@pytest.mark.parametrize("name", image_block._ELEMENTWISE)
def test_an_elementwise_function_is_torchs_own(name: str) -> None:
    x, y = torch.rand(2, 3, 4, 5) + 0.1, torch.rand(2, 3, 4, 5) + 0.1
    expected = dict(call_by_every_name(name, x, y))
    found = dict(call_by_every_name(name, ImageBlock.cut(x, ALONE), ImageBlock.cut(y, ALONE)))
    assert list(found) == list(expected) != []
    for key, value in expected.items():
        assert isinstance(found[key], ImageBlock)
        assert torch.equal(found[key].block, value), key


def test_operators_and_the_answers_of_a_tensor() -> None:
    x, y = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    a, b = (ImageBlock.cut(value, ALONE) for value in (x, y))
    for found, expected in [
        (a + b, x + y), (2 + a, 2 + x), (y - a, y - x), (1 - a, 1 - x), (a * y, x * y), (y / a, y / x), (1 / a, 1 / x),
        (a**2, x**2), (-a, -x), (a < b, x < y), (a <= 0.5, x <= 0.5), (a > y, x > y), (a >= b, x >= y),
        (a == x, x == x), (a != b, x != y), (a.relu(), x.relu()), (a.half(), x.half()), (a[:, 1:, ::2], x[:, 1:, ::2]),
    ]:  # fmt: skip
        assert torch.equal(found.whole(), expected)
    assert (a.shape, a.size(), a.size(-1), a.dim(), a.ndim) == (x.shape, x.size(), 5, 4, 4)
    assert (a.dtype, a.device, a.requires_grad, a.is_floating_point()) == (x.dtype, x.device, False, True)
    assert len({a, b}) == 2
    with pytest.raises(AttributeError, match="has no frobnicate"):
        a.frobnicate()


def test_changes_in_place_are_seen_by_all_names_of_a_value() -> None:
    x = ImageBlock.cut(torch.tensor([[[[-1.0, 2.0]]]]), ALONE)
    same, relu = x, F.relu(x, inplace=True)
    x += 1
    x *= 3
    x -= 2
    x /= 2
    x.clamp_(max=3)
    for value in (same, relu, x):
        assert value.whole().flatten().tolist() == [0.5, 3.0]


class Foreign(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


PLAIN = torch.ones(2, 3, 6, 6)
REFUSED: dict[str, tuple[nn.Module | Callable[[Any], Any], str]] = {
    "linear": (nn.Linear(6, 6), r"fc \(Linear\): linear does"),
    "flatten": (nn.Flatten(), r"fc \(Flatten\): flatten does"),
    "inside": (nn.Sequential(nn.ReLU(), nn.LayerNorm(6)), r"fc.1 \(LayerNorm\): layer_norm does"),
    "group norm": (nn.GroupNorm(1, 3), "group_norm"),
    "instance norm": (nn.InstanceNorm2d(3), "instance_norm"),
    "local response norm": (nn.LocalResponseNorm(3), "local_response_norm"),
    "reflect": (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), r"fc \(Conv2d\): reflect padding does"),
    "circular": (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "circular padding"),
    "upsample": (nn.Upsample(scale_factor=2), "interpolate"),
    "transposed": (nn.ConvTranspose2d(3, 3, 3), "conv_transpose2d"),
    "indices": (nn.MaxPool2d(2, return_indices=True), "max_pool2d_with_indices"),
    "adaptive max": (nn.AdaptiveMaxPool2d(1), "adaptive_max_pool2d"),
    "window": (nn.Conv2d(3, 3, 9), "a window of 9×9 on images of 6×6"),
    "view": (lambda x: x.view(2, -1), "view"),
    "softmax": (lambda x: x.softmax(1), "softmax"),
    "sum": (lambda x: torch.sum(x), "sum"),
    "max": (lambda x: torch.max(x), "max"),
    "mean": (lambda x: x.mean(1), "mean over dim 1"),
    "truth": (lambda x: x or 0, "bool"),
    "number": (lambda x: x[0], "an index other than slices"),
    "mask": (lambda x: x[x > 0], "an index other than slices"),
    "flip": (lambda x: x[..., ::-1], "an index other than slices"),
    "cat": (lambda x: torch.cat([x, x], 2), "cat along dim 2"),
    "sizes": (lambda x: torch.cat([x, x[:, :, 1:]], 1), "cat of images of different sizes"),
    "shapes": (lambda x: x + PLAIN[..., :5].to("meta"), r"a tensor \(2, 3, 6, 5\) with images \(2, 3, 6, 6\)"),
    "to a plain tensor": (lambda x: PLAIN.to("meta").add_(x), "add_ that writes to a tensor that is no image block"),
    "out": (lambda x: torch.add(x, x, out=PLAIN.to("meta")), "add that writes to a tensor"),
    "weight": (lambda x: F.conv2d(PLAIN.to("meta"), x), "conv2d with an image block as weight"),
    "functional norm": (lambda x: F.normalize(x), "norm"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_on_the_list_is_refused_by_name(case: str) -> None:
    made, rule = REFUSED[case]
    module = made if isinstance(made, nn.Module) else Foreign(made)
    model = nn.Sequential()
    model.add_module("stem", nn.Identity())
    model.add_module("fc", module)
    problem = dry_run_on_blocks(model, ["fc"], PLAIN, tensor=4)
    assert problem is not None
    assert problem.startswith("fc")
    assert re.search(rule, problem), problem
    # The model itself was only looked at.
    assert not hasattr(module, "temper_region")


def test_a_module_without_images_is_refused() -> None:
    problem = dry_run_on_blocks(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), ["1"], PLAIN, tensor=2)
    assert problem is not None
    assert problem.startswith("1 (Linear): an input without images (N, C, height, width) does not work")


@pytest.mark.parametrize("tensor", [2, 4, 6, 64])
def test_a_dry_run_finds_nothing_wrong_with_what_works(tensor: int) -> None:
    model = build_resnet(3, 10, 8, 0.25)
    before = copy.deepcopy(model.state_dict())
    assert dry_run_on_blocks(model, ["layer1_0", "layer2_0", "layer3_0"], PLAIN, tensor) is None
    assert dry_run_on_blocks(model, [""], PLAIN, tensor) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
