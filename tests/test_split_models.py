"""Whole networks split over several ranks against one process, pairs of layers, and what `parallel.split` may say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from distributed import run_distributed
from temper.errors import JobError
from temper.models.gpt import CausalSelfAttention, build_gpt
from temper.models.plain import build_cnn, build_mlp
from temper.models.resnet import build_resnet
from temper.parallel.cut import Cut, cut_of
from temper.parallel.groups import Group, MeshGroups, build_groups
from temper.parallel.layers import Conv2dByOutput, DropoutOfPart, LinearByInput, LinearByOutput, part_sizes
from temper.parallel.split import apply_split, resolve_split

TOLERANCE = 1e-10  # of the largest value, in fp64


def tensor_groups(group: Group) -> MeshGroups:
    return MeshGroups(data=Group(), tensor=group, pipeline=Group(), stage=group, replica=group)


# ------------------------------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Network:
    """A network, its input, and the patterns that it is split by."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    sizes: tuple[int, ...] = (2, 3, 4)
    patterns: Mapping[str, str] = field(default_factory=dict)

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.tokens:
            return torch.randint(self.tokens, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).requires_grad_()


def mlp() -> nn.Module:
    return build_mlp((3, 2), 5, [9, 7, 6], 0.0)


def cnn() -> nn.Module:
    return build_cnn((3, 9, 8), 5, [5, 6], 7, 0.0)


def resnet() -> nn.Module:
    return build_resnet(3, 5, 8, 0.5)


def gpt() -> nn.Module:
    return build_gpt(6, 11, 2, 5, 15, 0.0)


def encoder() -> nn.Module:
    """An even number of heads, as torch's fast path in evaluation wants it."""
    layers = [nn.TransformerEncoderLayer(12, 6, 7, 0.0, batch_first=True, norm_first=first) for first in (False, True)]
    return nn.Sequential(*layers, nn.Linear(12, 4))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions outside a sequence, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.pointwise(torch.relu(self.depthwise(x)))
        return self.head(torch.tanh(self.head(x.mean((2, 3)))))


MAPS = {"conv1": "output_maps", "layer*.conv1": "output_maps", "layer*.conv2": "input_maps"}
NETWORKS = {
    "mlp": Network(mlp, (4, 3, 2)),
    "mlp-by-output": Network(mlp, (4, 3, 2), patterns={"*": "output_activations"}),
    "mlp-by-input": Network(mlp, (4, 3, 2), patterns={"*": "input_activations"}),
    "cnn": Network(cnn, (2, 3, 9, 8)),
    "cnn-pair": Network(cnn, (2, 3, 9, 8), patterns={"0": "output_maps", "3": "input_maps", "*": "output_activations"}),
    "resnet": Network(resnet, (2, 3, 8, 8)),
    "resnet-by-maps": Network(resnet, (2, 3, 8, 8), patterns=MAPS),
    "gpt": Network(gpt, (2, 6), tokens=11),
    "encoder": Network(encoder, (2, 5, 12)),
    "separable": Network(Separable, (2, 3, 7, 6)),
    "separable-by-input": Network(
        Separable, (2, 3, 7, 6), sizes=(2, 3), patterns={"*wise": "output_maps", "*.0": "input_maps"}
    ),
}


def run(model: nn.Module, network: Network) -> dict[str, Tensor]:
    """Outputs in training and in evaluation, and all gradients."""
    inputs = network.input()
    output = model.train()(inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * weights).sum().backward()
    with torch.no_grad():
        evaluated = model.eval()(inputs)
    found = {"output": output.detach(), "evaluated": evaluated}
    if inputs.requires_grad:
        found["input"] = inputs.grad
    return found | {name: param.grad for name, param in model.named_parameters()}


def build(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return network.build().double()


def check_network(network: Network, group: Group) -> None:
    whole, sharded = build(network), build(network)
    modules = list(sharded.modules())
    splits = resolve_split(sharded, network.patterns, group.size)
    apply_split(sharded, splits, tensor_groups(group))
    assert all(one is other for one, other in zip(sharded.modules(), modules, strict=True)), "modules stay themselves"
    params = dict(sharded.named_parameters())
    assert list(params) == list(dict(whole.named_parameters()))
    check_parts(whole, params, group)
    expected, found = run(whole, network), run(sharded, network)
    assert list(found) == list(expected)
    for name, value in expected.items():
        cut = cut_of(params[name]) if name in params else None
        close(found[name], value if cut is None else cut.take(value), name)
        if cut is None:
            assert_same_on_all(found[name], group, name)


def check_parts(whole: nn.Module, params: Mapping[str, nn.Parameter], group: Group) -> None:
    """The ranks' parts, put together, are the weights; each is in memory of its own."""
    assert any(cut_of(param) for param in params.values())
    for name, param in whole.named_parameters():
        cut, together = cut_of(params[name]), torch.zeros_like(param)
        if cut is None:
            assert torch.equal(params[name], param)
            continue
        assert params[name].tensor_model_parallel
        assert params[name].shape == cut.part_shape
        assert params[name].untyped_storage().nbytes() == 8 * params[name].numel()
        with torch.no_grad():
            cut.put(params[name], together)
        dist.all_reduce(together, group=group.process_group)
        assert torch.equal(together, param), name


def close(found: Tensor, expected: Tensor, name: str) -> None:
    tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def assert_same_on_all(tensor: Tensor, group: Group, name: str) -> None:
    tensor = tensor.contiguous()
    others = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(others, tensor, group=group.process_group)
    assert all(torch.equal(other, tensor) for other in others), f"{name} differs between ranks"


# ---------------------------------------------------------------------------------------------------------- the ranks


def run_all(rank: int) -> None:
    groups = {size: dist.new_group(range(size)) for size in (2, 3, 4)}
    for name, network in NETWORKS.items():
        for size in network.sizes:
            if rank < size:
                try:
                    check_network(network, Group(rank, size, groups[size]))
                except Exception as error:
                    raise AssertionError(f"{name} on {size} ranks: {error}") from error
    if rank < 3:
        group = Group(rank, 3, groups[3])
        check_exchanges(group)
        check_dropout_in_a_pair(group)
        check_dropout_of_heads(group)
        check_dropout_of_torch_heads(group)
    check_mesh(rank)


def check_exchanges(group: Group) -> None:
    """A pair exchanges once forward and once backward; apart, its layers need two each way."""
    pair = lambda: nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Identity(), nn.Linear(9, 4)).double()  # noqa: E731
    assert exchanges(pair(), {"0": "output_activations", "3": "input_activations"}, group, (2, 5)) == (
        {"all_reduce": 1, "all_gather": 0},
        {"all_reduce": 1, "all_gather": 0},
    )
    assert exchanges(pair(), {"0": "output_activations", "3": "output_activations"}, group, (2, 5)) == (
        {"all_reduce": 0, "all_gather": 2},
        {"all_reduce": 2, "all_gather": 0},
    )
    maps = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 3, 1)).double()
    assert exchanges(maps, {"0": "output_maps", "3": "input_maps"}, group, (2, 2, 8, 8)) == (
        {"all_reduce": 1, "all_gather": 0},
        {"all_reduce": 1, "all_gather": 0},
    )
    # Pooling mixes features, so that a linear layer behind it needs them all; and a norm has weights.
    for between in (nn.AvgPool1d(1), nn.LayerNorm(9)):
        mixed = nn.Sequential(nn.Linear(5, 9), between, nn.Linear(9, 4)).double()
        assert exchanges(mixed, {"0": "output_activations", "2": "input_activations"}, group, (2, 5)) == (
            {"all_reduce": 1, "all_gather": 1},
            {"all_reduce": 1, "all_gather": 1},
        )
    attention = nn.Sequential(CausalSelfAttention(9, 3, 0.0)).double()
    assert exchanges(attention, {"0": "heads"}, group, (2, 4, 9)) == (
        {"all_reduce": 1, "all_gather": 0},
        {"all_reduce": 1, "all_gather": 0},
    )


def exchanges(
    model: nn.Module, splits: Mapping[str, str], group: Group, shape: tuple[int, ...]
) -> tuple[dict[str, int], dict[str, int]]:
    apply_split(model, splits, tensor_groups(group))
    with ExitStack() as stack:
        calls = {
            name: stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
            for name in ("all_reduce", "all_gather")
        }
        output = model(torch.ones(shape, dtype=torch.float64, requires_grad=True))
        forward = {name: call.call_count for name, call in calls.items()}
        output.sum().backward()
        backward = {name: call.call_count - forward[name] for name, call in calls.items()}
    return forward, backward


def check_dropout_in_a_pair(group: Group) -> None:
    """Each rank drops other features of the pair, all drop the same outside it."""
    model = nn.Sequential(nn.Linear(4, 60), nn.Dropout(0.5), nn.Linear(60, 30), nn.Dropout(0.5))
    splits = resolve_split(model, {}, group.size)
    apply_split(model, splits, tensor_groups(group))
    assert splits == {"0": "output_activations", "2": "input_activations"}
    assert type(model[1]) is DropoutOfPart
    dropped: dict[nn.Module, Tensor] = {}
    for index in (1, 3):
        model[index].register_forward_hook(lambda module, args, output: dropped.update({module: output == 0}))
    torch.manual_seed(0)
    model(torch.ones(2, 4))
    inside, after = dropped[model[1]], dropped[model[3]]
    assert inside.shape == (2, 20)
    assert 0.2 < inside.double().mean() < 0.8
    assert_differs_on_all(inside.byte(), group)
    assert_same_on_all(after.byte(), group, "the dropped outputs")
    assert_same_on_all(torch.get_rng_state(), group, "the random state")
    model(torch.ones(2, 4))
    assert not torch.equal(dropped[model[1]], inside), "every step drops others"
    before = torch.get_rng_state()
    model.eval()(torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), before)


def assert_differs_on_all(tensor: Tensor, group: Group) -> None:
    others = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(others, tensor, group=group.process_group)
    assert len({tuple(other.flatten().tolist()) for other in others}) == group.size


def check_dropout_of_heads(group: Group) -> None:
    """Heads with the same weights give the same, unless dropout tells them apart."""
    attention = CausalSelfAttention(12, 6, 0.5)
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.randn(3, 1, 2, 12).expand(3, 6, 2, 12).reshape(36, 12))
        attention.qkv.bias.zero_()
    apply_split(attention, {"": "heads"}, tensor_groups(group))
    assert attention.num_heads == 2
    contexts = []
    attention.proj.register_forward_pre_hook(lambda module, args: contexts.append(args[0]))
    torch.manual_seed(0)
    attention(torch.ones(3, 8, 12))
    assert contexts[0].shape == (3, 8, 4)
    assert_differs_on_all(contexts[0].detach(), group)
    assert_same_on_all(torch.get_rng_state(), group, "the random state")
    before = torch.get_rng_state()
    attention.eval()(torch.ones(3, 8, 12))
    assert_same_on_all(contexts[1].detach(), group, "the heads in evaluation")
    assert torch.equal(torch.get_rng_state(), before)


def check_dropout_of_torch_heads(group: Group) -> None:
    attention = nn.MultiheadAttention(12, 6, dropout=0.5, batch_first=True)
    apply_split(attention, {"": "heads"}, tensor_groups(group))
    torch.manual_seed(0)
    x = torch.ones(3, 8, 12)
    _, weights = attention(x, x, x, average_attn_weights=False)
    assert_same_on_all(weights.detach(), group, "the attention weights")
    assert weights.shape == (3, 6, 8, 8)
    heads = (weights == 0).flatten(2).transpose(0, 1).flatten(1)
    assert len({tuple(head.tolist()) for head in heads}) == 6, "each head drops others"
    output, _ = attention(x, x, x, need_weights=False)
    assert_same_on_all(output.detach(), group, "the output")
    assert_same_on_all(torch.get_rng_state(), group, "the random state")


def check_mesh(rank: int) -> None:
    """Two replicas of two parts: each replica gives the whole network's output for its own examples."""
    groups = build_groups(data=2, tensor=2)
    network = Network(gpt, (2, 6), tokens=11)
    whole, sharded = build(network), build(network)
    apply_split(sharded, resolve_split(sharded, {}, 2), groups)
    inputs = network.input()[groups.data.rank : groups.data.rank + 1]
    assert groups.data.rank == rank // 2
    close(sharded(inputs), whole(inputs), "output")


def test_networks_pairs_and_dropout_on_several_ranks() -> None:
    run_distributed(run_all, 4)


# --------------------------------------------------------------------------------------------------------- one process


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    """Splitting a model with torch's attention turns its fast path off for the process."""
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_without_memory_shows_what_each_rank_holds(name: str) -> None:
    network = NETWORKS[name]
    size = network.sizes[-1]
    whole = build(network)
    held = []
    for rank in range(size):
        with torch.device("meta"):
            model = network.build().double()
        apply_split(model, resolve_split(model, network.patterns, size), tensor_groups(Group(rank, size)))
        held.append(dict(model.named_parameters()))
        # It can be looked at further: what a forward pass on it takes and gives.
        output = model(network.input().to("meta"))
        assert output.shape == whole(network.input()).shape
    for name, param in whole.named_parameters():
        parts = [params[name] for params in held]
        whole_sizes = {cut_of(part).shape if cut_of(part) else part.shape for part in parts}
        assert whole_sizes == {tuple(param.shape)}
        if cut_of(parts[0]):
            assert sum(part.numel() for part in parts) == param.numel()
            assert max(part.numel() for part in parts) < param.numel()


def test_image_blocks_leave_the_module_to_the_blocks() -> None:
    model, groups = resnet(), tensor_groups(Group(0, 2))
    with mock.patch("temper.parallel.split.compute_on_blocks") as compute:
        apply_split(model, resolve_split(model, {"layer1*": "image_blocks", "fc": "input_activations"}, 2), groups)
    compute.assert_called_once_with(model.layer1_0, groups)
    assert not any(cut_of(param) for param in model.layer1_0.parameters())
    assert cut_of(model.fc.weight) == Cut((5, 32), 1, ((0, 16),))


def test_parts_are_whole_units_and_differ_by_one() -> None:
    assert part_sizes(7, 7, 3) == (3, 2, 2)
    assert part_sizes(15, 5, 4) == (6, 3, 3, 3)


def test_frozen_weights_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[0].weight.requires_grad_(False)
    apply_split(model, {"0": "output_activations", "1": "output_activations"}, tensor_groups(Group(1, 2)))
    assert [param.requires_grad for param in model.parameters()] == [False, True, True]
    assert model[1].bias is None


def test_the_default_plan_of_each_network() -> None:
    by_output, by_input = "output_activations", "input_activations"
    assert resolve_split(mlp(), {}, 2) == {"1": by_output, "3": by_input, "5": by_output, "7": by_input}
    # Five outputs are too few for six ranks, and the second of a pair needs none.
    assert resolve_split(mlp(), {}, 6) == {"1": by_output, "3": by_input, "5": by_output, "7": by_input}
    assert resolve_split(mlp(), {}, 7) == {"1": by_output, "3": by_input}
    assert resolve_split(cnn(), {}, 4) == {"0": "output_maps", "3": "output_maps", "7": by_output, "9": by_input}
    block = {f"{name}.{conv}": "output_maps" for name in ("layer1_0", "layer2_0", "layer3_0") for conv in CONVS}
    assert resolve_split(resnet(), {}, 2) == {"conv1": "output_maps", **block, "fc": by_output}
    layer = {"self_attn": "heads", "linear1": by_output, "linear2": by_output}
    layers = {f"{index}.{name}": kind for index in (0, 1) for name, kind in layer.items()}
    assert resolve_split(encoder(), {}, 4) == {**layers, "2": by_output}
    # Torch's attention needs its out-projection whole where the heads are too few.
    assert resolve_split(encoder(), {}, 7) == {
        name: kind for name, kind in layers.items() if not name.endswith("self_attn")
    }
    blocks = {
        f"block_{index}.{name}": kind
        for index in (0, 1)
        for name, kind in {"attention": "heads", "mlp.0": by_output, "mlp.2": by_input}.items()
    }
    assert resolve_split(gpt(), {}, 5) == {**blocks, "head": by_output}
    assert resolve_split(Separable(), {}, 3) == {
        "stem.0": "output_maps",
        "depthwise": "output_maps",
        "pointwise": "output_maps",
        "head": by_output,
    }


CONVS = ("conv1", "conv2")


def test_the_first_pattern_that_fits_counts() -> None:
    splits = resolve_split(resnet(), {"layer1*": "image_blocks", "*2": "input_maps", "*": "output_maps"}, 2)
    assert splits == {
        "conv1": "output_maps",
        "layer1_0": "image_blocks",
        "layer2_0.conv1": "output_maps",
        "layer2_0.conv2": "input_maps",
        "layer3_0.conv1": "output_maps",
        "layer3_0.conv2": "input_maps",
    }
    assert resolve_split(gpt(), {"*.attention": "heads", "block_0.*": "output_activations"}, 2) == {
        "block_0.attention": "heads",
        "block_0.mlp.0": "output_activations",
        "block_0.mlp.2": "output_activations",
        "block_1.attention": "heads",
    }
    assert resolve_split(nn.Linear(3, 4), {}, 2) == {"": "output_activations"}


def problems(model: nn.Module, patterns: Mapping[str, str], size: int) -> list[str]:
    with pytest.raises(JobError) as error:
        resolve_split(model, patterns, size)
    return [str(problem) for problem in error.value.problems]


def test_a_pattern_without_a_module_is_a_problem() -> None:
    assert problems(resnet(), {"layer1_1": "image_blocks", "head.*": "output_activations", "fc": "heads"}, 2) == [
        "parallel.split.layer1_1: image_blocks matches no module; did you mean layer1_0?",
        "parallel.split.head.*: output_activations matches no module; "
        "the modules are conv1, bn1, relu, layer1_0, layer1_0.conv1, …",
        "parallel.split.fc: heads fits no module that it matches (fc is a Linear); it fits nn.MultiheadAttention with "
        "one packed in-projection, and modules with qkv, proj and num_heads",
    ]
    assert problems(resnet(), {"bn*": "output_maps", "relu": "input_maps"}, 2) == [
        "parallel.split.bn*: output_maps fits no module that it matches (bn1 is a BatchNorm2d); "
        "it fits nn.Conv1d and nn.Conv2d",
        "parallel.split.relu: input_maps fits no module that it matches (relu is a ReLU); "
        "it fits nn.Conv1d and nn.Conv2d with groups: 1",
    ]
    assert problems(resnet(), {"*": "output_maps", "conv1": "input_maps"}, 2) == [
        "parallel.split.conv1: input_maps matches only what patterns before it split; remove it or put it before them"
    ]


def test_too_few_units_are_a_problem() -> None:
    assert problems(resnet(), {"fc": "output_activations", "conv1": "input_maps"}, 6) == [
        "parallel.split.fc: output_activations cannot deal fc out to 6 tensor ranks: it has 5 output features; "
        "use parallel.tensor: 5 or leave it whole",
        "parallel.split.conv1: input_maps cannot deal conv1 out to 6 tensor ranks: it has 3 input maps; "
        "use parallel.tensor: 3 or leave it whole",
    ]
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 7, 1))
    assert problems(grouped, {"*": "output_maps"}, 3) == [
        "parallel.split.*: output_maps cannot deal 0 out to 3 tensor ranks: it has 2 groups of maps; "
        "use parallel.tensor: 2 or leave it whole"
    ]
    assert problems(gpt(), {"*attention": "heads"}, 6) == [
        "parallel.split.*attention: heads cannot deal block_0.attention out to 6 tensor ranks: it has 5 heads; "
        "use parallel.tensor: 5 or leave it whole"
    ]


def test_a_split_inside_a_split_is_a_problem() -> None:
    assert problems(resnet(), {"layer1_0": "image_blocks", "layer1_0.conv1": "output_maps"}, 2) == [
        "parallel.split.layer1_0.conv1: output_maps splits layer1_0.conv1, which lies inside layer1_0, split by "
        "image_blocks; leave one of the two out"
    ]
    assert problems(gpt(), {"*.proj": "input_activations", "*.attention": "heads"}, 2) == [
        "parallel.split.*.proj: input_activations splits block_0.attention.proj, which lies inside block_0.attention, "
        "split by heads; put *.attention before *.proj"
    ]


def test_shared_weights_are_a_problem() -> None:
    model = gpt()
    model.head.weight = model.embedding.tokens.weight
    assert problems(model, {"head": "output_activations"}, 2) == [
        "parallel.split.head: output_activations splits head, whose weights are shared: embedding.tokens.weight is "
        "head.weight; leave it whole"
    ]
    assert "head" not in resolve_split(model, {}, 2)


def test_a_model_with_nothing_to_split_is_a_problem() -> None:
    assert problems(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2)), {}, 4) == [
        "parallel.tensor: 4 finds nothing to split: no layer has 4 features, maps or heads; use 3"
    ]
    assert problems(nn.ReLU(), {}, 2) == [
        "parallel.tensor: 2 finds nothing to split: no layer has 2 features, maps or heads; use 1"
    ]


def test_what_only_looks_like_a_layer_is_not_split() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(
        Scaled(4, 4), weight_norm(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2, kdim=3), nn.Linear(4, 4)
    )
    assert resolve_split(model, {}, 2) == {"3": "output_activations"}


def test_layers_of_a_pair_must_be_neighbours_and_alone() -> None:
    """A layer used twice, a repeated norm between two, a sequence with a forward of its own: all exchange."""
    linear, norm, relu = nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()

    class Residual(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return input + super().forward(input)

    for model in (
        nn.Sequential(linear, relu, linear),
        nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Linear(4, 4)),
        Residual(nn.Linear(4, 4), nn.Linear(4, 4)),
    ):
        assert set(resolve_split(model, {}, 2).values()) == {"output_activations"}
    # An activation function may come twice.
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4))
    assert list(resolve_split(model, {}, 2).values()) == ["output_activations", "input_activations"] * 2


def test_twins_are_the_same_modules_with_another_class() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 2))
    seen: list[str] = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    twins = list(model)
    apply_split(model, resolve_split(model, {}, 2), tensor_groups(Group(0, 2)))
    assert list(model) == twins
    assert [type(module) for module in model] == [Conv2dByOutput, nn.Flatten, LinearByOutput, LinearByInput]
    copy.deepcopy(model).to("meta")(torch.empty(3, 1, 4, 4, device="meta"))
    assert seen == ["LinearByOutput"]
