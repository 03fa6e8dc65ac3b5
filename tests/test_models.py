"""Models: built by name, for the data's shape, alike on every rank."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from temper.config.schema import ModelConfig
from temper.errors import JobError
from temper.models.build import build_model
from temper.models.gpt import CausalSelfAttention, Embedding, build_gpt
from temper.models.probe import answer, module_outputs
from temper.models.sequence import layer_sequence
from temper.outputs import aux_logits_of, logits_of
from temper.plan.facts import DataFacts


def model(**section: Any) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python(section)


def facts(*shape: int, num_classes: int | None = 10) -> DataFacts:
    return DataFacts(100, 0, 10, shape, num_classes, (), (), "")


def build(shape: tuple[int, ...] = (3, 32, 32), seed: int = 0, **section: Any) -> nn.Module:
    return build_model(model(**section), facts(*shape), seed)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnets_have_the_papers_numbers_of_parameters(depth: int, millions: float) -> None:
    # He et al. 2016, table 6.
    assert num_parameters(build(kind="resnet", depth=depth)) / 1e6 == pytest.approx(millions, abs=0.04 * millions)


def test_resnet20_layer_by_layer() -> None:
    convolutions = 3 * 9 * 16 + 6 * 16 * 16 * 9 + (16 + 5 * 32) * 32 * 9 + (32 + 5 * 64) * 64 * 9
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    network = build(kind="resnet")
    assert num_parameters(network) == convolutions + norms + 64 * 10 + 10
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == 20


def test_resnet_shortcut_halves_the_image_and_pads_the_maps() -> None:
    network = build(kind="resnet", depth=8)
    block = network.get_submodule("layer2_0")
    for name in ("conv1", "conv2"):
        nn.init.zeros_(block.get_submodule(name).weight)
    block.eval()
    image = torch.rand(1, 16, 6, 6)
    output = block(image).detach()
    assert torch.equal(output[:, 8:24], image[:, :, ::2, ::2])
    assert float(output[:, :8].abs().max()) == float(output[:, 24:].abs().max()) == 0.0


CASES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"kind": "resnet", "depth": 8, "width": 0.5}, (1, 28, 28)),
    ({"kind": "mlp", "hidden": [7, 5], "dropout": 0.1}, (1, 8, 8)),
    ({"kind": "mlp", "hidden": []}, (13,)),
    ({"kind": "cnn"}, (1, 8, 8)),
    ({"kind": "cnn", "channels": [4, 4, 4], "hidden": 9, "dropout": 0.2}, (2, 28, 20)),
    ({"kind": "torchvision", "name": "resnet18"}, (1, 8, 8)),
    ({"kind": "torchvision", "name": "resnet18"}, (3, 32, 32)),
    ({"kind": "torchvision", "name": "mobilenet_v3_small"}, (1, 28, 28)),
    ({"kind": "torchvision", "name": "squeezenet1_1"}, (2, 32, 32)),
    ({"kind": "torchvision", "name": "googlenet"}, (1, 32, 32)),
    ({"kind": "torchvision", "name": "vit_b_16", "args": {"image_size": 32}}, (1, 32, 32)),
]


@pytest.mark.parametrize(
    ("section", "shape"),
    CASES,
    ids=lambda case: str(case.get("name", case["kind"])) if isinstance(case, dict) else None,
)
def test_outputs_and_gradients(section: dict[str, Any], shape: tuple[int, ...]) -> None:
    network = build(shape, **section).train()
    outputs = network(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    logits = logits_of(outputs)
    assert logits.shape == (2, 10)
    (logits.sum() + sum(aux.sum() for aux in aux_logits_of(outputs).values())).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


def test_vgg_on_a_small_image() -> None:
    with torch.device("meta"):
        network = build((1, 32, 32), kind="torchvision", name="vgg11_bn")
        assert network(torch.empty(2, 1, 32, 32)).shape == (2, 10)
    assert network.get_submodule("features.0").weight.shape == (64, 1, 3, 3)


def test_googlenet_tells_its_auxiliary_logits() -> None:
    network = build(kind="torchvision", name="googlenet").train()
    images = torch.randn(2, 3, 32, 32)
    assert {name: logits.shape for name, logits in aux_logits_of(network(images)).items()} == {
        "aux_logits1": (2, 10),
        "aux_logits2": (2, 10),
    }
    assert aux_logits_of(network.eval()(images)) == {}
    plain = build(kind="torchvision", name="googlenet", args={"aux_logits": False}).train()
    assert aux_logits_of(plain(images)) == {}


def test_only_the_first_convolution_is_made_anew() -> None:
    def rest(channels: int) -> list[Any]:
        network = build((channels, 32, 32), kind="torchvision", name="resnet18")
        return [(name, parameter.shape) for name, parameter in network.named_parameters() if name != "conv1.weight"]

    conv = build((5, 32, 32), kind="torchvision", name="resnet18").get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.shape == (64, 5, 7, 7)
    assert (conv.stride, conv.padding, conv.bias) == ((2, 2), (3, 3), None)
    assert rest(5) == rest(3)


@pytest.mark.parametrize(
    "section", [{"kind": "cnn"}, {"kind": "resnet", "depth": 8}, {"kind": "torchvision", "name": "resnet18"}]
)
def test_the_seed_alone_decides_the_weights(section: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first = build((1, 8, 8), seed=4, **section).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = build((1, 8, 8), seed=4, **section).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    other = build((1, 8, 8), seed=5, **section).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_number_of_outputs() -> None:
    wider = build_model(model(kind="mlp", hidden=[], num_classes=12), facts(4), 0)
    regression = build_model(model(kind="mlp", hidden=[]), facts(4, num_classes=None), 0)
    assert [network(torch.zeros(1, 4)).shape[1] for network in (wider, regression)] == [12, 1]


@pytest.mark.parametrize(
    ("section", "shape", "key", "said"),
    [
        ({"kind": "mlp", "num_classes": 9}, (4,), "model.num_classes", "write 10"),
        ({"kind": "cnn", "channels": [4, 4, 4, 4]}, (1, 8, 8), "model.kind", "at least 16×16"),
        ({"kind": "resnet"}, (8,), "model.kind", "the shape [8]"),
        ({"kind": "torchvision", "name": "resnet81"}, (3, 8, 8), "model.name", "did you mean resnet18"),
        ({"kind": "torchvision", "name": "fcn_resnet50"}, (3, 8, 8), "model.name", "is not a torchvision classifier"),
        ({"kind": "torchvision", "name": "resnet18", "args": {"width": 2}}, (3, 8, 8), "model.args", "width"),
        (
            {"kind": "torchvision", "name": "resnet18", "args": {"weights": "DEFAULT"}},
            (3, 8, 8),
            "model.args.weights",
            "remove it",
        ),
        (
            {"kind": "torchvision", "name": "vit_b_16", "args": {"image_size": 30}},
            (3, 30, 30),
            "model.args",
            "divisible",
        ),
    ],
)
def test_what_does_not_fit(section: dict[str, Any], shape: tuple[int, ...], key: str, said: str) -> None:
    with pytest.raises(JobError) as raised:
        build(shape, **section)
    assert [problem.key for problem in raised.value.problems] == [key]
    assert said in str(raised.value)


# ----------------------------------------------------------------------------------------------------------------- GPT


def tokens(*shape: int, below: int = 11) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0))


def test_gpt_has_gpt2s_parameters() -> None:
    """GPT-2 small has 124,439,808, the output layer being the embedding; here it has weights of its own."""
    with torch.device("meta"):
        network = build_gpt(1024, 50257, 12, 12, 768, 0.0)
    assert num_parameters(network) == 124_439_808 + 50257 * 768


def test_gpt_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    network = build_gpt(32, 200, 8, 4, 64, 0.0)
    expected = {"attention.qkv": 0.02, "attention.proj": 0.02 / 4, "mlp.0": 0.02, "mlp.2": 0.02 / 4}
    for name, deviation in expected.items():
        layer = network.get_submodule(f"block_3.{name}")
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.05)
        assert float(layer.bias.detach().abs().max()) == 0.0
    for name in ("embedding.tokens", "embedding.positions", "head"):
        assert float(network.get_submodule(name).weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    # Such small weights tell nothing apart.
    loss = nn.functional.cross_entropy(network(tokens(4, 32, below=200)).flatten(0, 1), tokens(128, below=200))
    assert float(loss.detach()) == pytest.approx(math.log(200), abs=0.05)


def test_gpt_sees_the_past_only() -> None:
    network = build((8,), kind="gpt", layers=2, heads=2, width=8).eval()
    first, second = tokens(1, 8, below=10), tokens(1, 8, below=10)
    second[0, 5] = (second[0, 5] + 1) % 10
    a, b = network(first), network(second)
    assert a.shape == (1, 8, 10)
    assert torch.equal(a[0, :5], b[0, :5])
    assert all(not torch.equal(a[0, place], b[0, place]) for place in range(5, 8))
    assert torch.equal(network(first[:, :6]).argmax(), a[:, :6].argmax())


def test_gpt_adds_tokens_and_positions() -> None:
    embedding = Embedding(4, 5, 3, 0.0)
    ids = torch.tensor([[3, 0]])
    assert torch.equal(embedding(ids)[0, 1], embedding.tokens.weight[0] + embedding.positions.weight[1])


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    attention = CausalSelfAttention(6, 2, 0.0).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(3)
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ value[..., part])
    assert torch.allclose(attention(x), attention.proj(torch.cat(heads, -1)), atol=1e-12)


def test_attention_with_some_of_the_heads() -> None:
    """Tensor parallelism leaves the channels of some heads in the module; their size stays."""
    torch.manual_seed(0)
    attention = CausalSelfAttention(6, 2, 0.0)
    x = torch.randn(2, 4, 6)
    whole = attention(x) - attention.proj.bias
    halves = []
    for head in range(2):
        part = CausalSelfAttention(6, 1, 0.0)
        rows = torch.cat([torch.arange(3) + 6 * block + 3 * head for block in range(3)])
        part.qkv, part.proj = nn.Linear(6, 9), nn.Linear(3, 6, bias=False)
        part.qkv.weight.data, part.qkv.bias.data = attention.qkv.weight[rows], attention.qkv.bias[rows]
        part.proj.weight.data = attention.proj.weight[:, 3 * head : 3 * head + 3]
        halves.append(part(x))
    assert torch.allclose(halves[0] + halves[1], whole, atol=1e-6)


def test_gpt_drops_out_in_training_only() -> None:
    network = build((8,), kind="gpt", layers=1, heads=2, width=8, dropout=0.5)
    ids = tokens(1, 8, below=10)
    assert not torch.equal(network.train()(ids), network(ids))
    assert torch.equal(network.eval()(ids), network(ids))


# ------------------------------------------------------------------------------------------------- sequences of layers


class Branched(nn.Module):
    """Not a sequence by its type; `pipeline_layers` tells its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).reshape(len(x) * 2, 4))

    def pipeline_layers(self) -> Iterator[tuple[str, nn.Module]]:
        yield "body", self.body
        yield "rows", Rows()
        yield "head", self.head


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x) * 2, 4)


def vgg() -> nn.Module:
    """With a narrow classifier: the real one has 120 million parameters."""
    from torchvision import models

    with torch.device("meta"):
        network = models.vgg11_bn()
    network.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 10))
    network.features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    return network


def torchvision(name: str, **args: Any) -> Callable[[], nn.Module]:
    return lambda: build((3, 32, 32), kind="torchvision", name=name, args=args)


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: build((3, 8, 8), kind="resnet", depth=8), (3, 8, 8)),
    "mlp": (lambda: build((12,), kind="mlp", dropout=0.5), (12,)),
    "cnn": (lambda: build((1, 8, 8), kind="cnn"), (1, 8, 8)),
    "own": (Branched, (12,)),
    "resnet18": (torchvision("resnet18"), (3, 32, 32)),
    "resnet50": (torchvision("resnet50"), (3, 32, 32)),
    "vgg11_bn": (vgg, (3, 32, 32)),
    "alexnet": (torchvision("alexnet"), (3, 64, 64)),
    "googlenet": (torchvision("googlenet", aux_logits=False), (3, 32, 32)),
    "mobilenet_v2": (torchvision("mobilenet_v2"), (3, 32, 32)),
    "mobilenet_v3_small": (torchvision("mobilenet_v3_small"), (3, 32, 32)),
    "efficientnet_b0": (torchvision("efficientnet_b0"), (3, 32, 32)),
    "densenet121": (torchvision("densenet121"), (3, 32, 32)),
    "squeezenet1_1": (torchvision("squeezenet1_1"), (3, 32, 32)),
    "convnext_tiny": (torchvision("convnext_tiny"), (3, 32, 32)),
    "regnet_y_400mf": (torchvision("regnet_y_400mf"), (3, 32, 32)),
    "swin_t": (torchvision("swin_t"), (3, 32, 32)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_layers_are_the_model(name: str) -> None:
    make, shape = SEQUENCES[name]
    network = make()
    layers = layer_sequence(network)
    assert layers is not None
    inputs = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        network.train(training)
        torch.manual_seed(0)
        expected = network(inputs.clone())
        # Running statistics play no part in the outputs of training.
        torch.manual_seed(0)
        outputs = inputs.clone()
        for _, layer in layers:
            outputs = layer(outputs)
        assert torch.equal(outputs, expected)
    own = Counter(f"{place}.{key}" for place, layer in layers for key, _ in layer.named_parameters())
    assert own == Counter(key for key, _ in network.named_parameters())
    assert len({place for place, _ in layers}) == len(layers)


def test_layers_of_gpt() -> None:
    network = build((8,), kind="gpt", layers=2, heads=2, width=8)
    layers = layer_sequence(network)
    assert layers is not None
    assert [name for name, _ in layers] == ["embedding", "block_0", "block_1", "norm", "head"]
    outputs = ids = tokens(2, 8, below=10)
    for _, layer in layers:
        outputs = layer(outputs)
    assert torch.equal(outputs, network(ids))


def test_nested_sequences_are_flattened_and_hooked_ones_are_not() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    assert [name for name, _ in layer_sequence(network) or []] == ["0", "1.0", "1.1.0", "1.1.1"]
    network[1].register_forward_hook(lambda *_: None)
    assert [name for name, _ in layer_sequence(network) or []] == ["0", "1"]
    network.register_forward_hook(lambda *_: None)
    assert layer_sequence(network) is None


def test_a_module_without_parameters_may_come_twice() -> None:
    relu = nn.ReLU()
    network = nn.Sequential(relu, nn.Linear(2, 2), relu)
    assert layer_sequence(network) == [("0", relu), ("1", network[1]), ("2", relu)]


class Forgetful(Branched):
    def pipeline_layers(self) -> Iterator[tuple[str, nn.Module]]:
        yield "body", self.body


class Overridden(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    network[2].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: Overridden(nn.Linear(2, 2)),
        Forgetful,
        tied,
        torchvision("googlenet"),
        torchvision("vit_b_16", image_size=32),
        torchvision("shufflenet_v2_x0_5"),
    ],
)
def test_what_is_no_sequence(make: Callable[[], nn.Module]) -> None:
    assert layer_sequence(make()) is None


# ----------------------------------------------------------------------------------------------------------- the probe


def ask(section: dict[str, Any], shape: tuple[int, ...], **question: Any) -> dict[str, Any]:
    asked = {"model": section, "shape": list(shape), "num_classes": 10, "tensor": None, "timing": None}
    return answer({**asked, **question})


def test_the_probe_tells_the_layers_apart() -> None:
    facts = ask({"kind": "mlp", "hidden": [32], "dropout": 0.5}, (64,))["facts"]
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert list(layers) == ["0", "1", "2", "3", "4"]
    assert layers["1"]["weights"] == {"num_parameters": 64 * 32 + 32, "sizes": (64 * 32, 32), "buffer_bytes": 0}
    assert [layer["forward_flops"] for layer in layers.values()] == [0, 2 * 64 * 32, 0, 0, 2 * 32 * 10]
    # The input and what ReLU gives; dropout's mask, of a byte or a float each, and what it gives.
    assert [layers[name]["activation_bytes"] for name in ("0", "1", "2")] == [0, 4 * 64, 4 * 32]
    assert [layer["output_bytes"] for layer in layers.values()] == [4 * 64, 4 * 32, 4 * 32, 4 * 32, 4 * 10]
    assert facts["activation_bytes_per_example"] == sum(layer["activation_bytes"] for layer in layers.values())


@pytest.mark.parametrize(
    ("section", "shape"),
    [({"kind": "resnet", "depth": 8}, (3, 8, 8)), ({"kind": "torchvision", "name": "resnet18"}, (1, 32, 32))],
)
def test_layers_cost_what_the_model_costs(section: dict[str, Any], shape: tuple[int, ...]) -> None:
    facts = ask(section, shape)["facts"]
    for whole, part in (
        ("forward_flops_per_example", lambda layer: layer["forward_flops"]),
        ("activation_bytes_per_example", lambda layer: layer["activation_bytes"]),
        ("num_parameters", lambda layer: layer["weights"]["num_parameters"]),
        ("buffer_bytes", lambda layer: layer["weights"]["buffer_bytes"]),
    ):
        assert facts[whole] == sum(map(part, facts["layers"])) > 0


def test_the_probe_gives_token_ids_where_floats_are_not_taken() -> None:
    facts = ask({"kind": "gpt", "layers": 1, "heads": 2, "width": 8}, (6,))["facts"]
    assert facts["output_shape"] == (6, 10)
    assert facts["layers"][0]["weights"]["sizes"] == (10 * 8, 6 * 8)
    # Four products of 6 tokens, q·k and the sum over the values; then the output layer.
    block = 2 * 6 * 8 * (24 + 8 + 32 + 32) + 2 * 2 * 6 * 6 * 8
    assert facts["forward_flops_per_example"] == block + 2 * 6 * 8 * 10


def test_the_probe_without_layers() -> None:
    facts = ask({"kind": "torchvision", "name": "googlenet"}, (3, 32, 32))["facts"]
    assert facts["layers"] == ()
    assert facts["num_parameters"] > 0


class Odd(nn.Module):
    """Modules that give what is no level, are called twice, never, or in another order than they are listed in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.lstm = nn.LSTM(4, 4)
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.turned, self.summed, self.tokens = Turned(), Summed(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        self.tokens(x.argmax(1))
        x = x + self.summed(x) + self.turned(x).T + self.lstm(x.unsqueeze(0))[0].squeeze(0)
        return self.head(self.relu(x))


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.T


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_probe_tells_what_modules_give(device: str) -> None:
    with torch.device(device):
        network = Odd()
    outputs = module_outputs(network, (4,), device)
    assert [(output.name, output.shape, output.calls) for output in outputs] == [
        ("first.0", (4,), 1),
        ("first.1.0", (4,), 1),
        ("first.1.1", (4,), 1),
        ("first.1", (4,), 1),
        ("first", (4,), 1),
        ("tokens", None, 1),  # integers
        ("summed", None, 1),  # one for all examples
        ("turned", None, 1),  # the batch comes last
        ("lstm", None, 1),  # several tensors
        ("relu", (4,), 2),
        ("head", (3,), 1),
    ]
    assert {output.name: output.last for output in outputs if output.last} == dict.fromkeys(
        ("first", "first.1"), "first.1.1"
    )
    assert [output.tap for output in outputs[3:6]] == ["first.1.1", "first.1.1", "tokens"]
    assert outputs[-1].kind == "Linear"
    assert not any(module._forward_hooks for module in network.modules())
    assert not nn.modules.module._global_forward_hooks


def test_the_probe_watches_a_sequence_without_joining_it() -> None:
    facts = ask({"kind": "resnet", "depth": 8}, (3, 8, 8))["facts"]
    shapes = {output["name"]: output["shape"] for output in facts["outputs"]}
    assert shapes["layer2_0.bn1"] == shapes["layer2_0"] == (32, 4, 4)
    assert "" not in shapes
    assert [layer["name"] for layer in facts["layers"]][3:6] == ["layer1_0", "layer2_0", "layer3_0"]
    split = ask({"kind": "resnet", "depth": 8}, (3, 8, 8), tensor={"size": 2, "split": [["fc", "output_activations"]]})
    assert split["facts"]["outputs"] == facts["outputs"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_probe_times_every_layer(dtype: str) -> None:
    timing = {"device": "cpu", "threads": torch.get_num_threads(), "dtype": dtype, "examples": 2, "machine": []}
    for section, shape in (
        ({"kind": "resnet", "depth": 8}, (3, 8, 8)),
        ({"kind": "gpt", "heads": 2, "width": 8}, (6,)),
    ):
        layers = ask(section, shape, timing=timing)["facts"]["layers"]
        assert all(layer["seconds"] > 0 for layer in layers)


def test_the_probe_tells_what_a_tensor_rank_holds() -> None:
    tensor = {"size": 2, "split": [["*.attention", "heads"], ["head", "output_activations"]]}
    facts = ask({"kind": "gpt", "layers": 1, "heads": 2, "width": 8}, (6,), tensor=tensor)["facts"]
    assert facts["splits"] == {"block_0.attention": "heads", "head": "output_activations"}
    parts = [layer["part"]["num_parameters"] for layer in facts["layers"]]
    rest = 4 * 8 + 8 * 32 + 32 + 32 * 8 + 8  # of the block, whole: norms and MLP
    assert parts == [16 * 8, rest + (8 * 24 + 24) // 2 + 8 * 8 // 2 + 8, 16, 8 * 10 // 2]
    assert facts["part"]["num_parameters"] == sum(facts["part"]["sizes"]) == sum(parts)
    assert facts["num_parameters"] > facts["part"]["num_parameters"]


def test_a_stage_on_image_blocks_is_one_layer() -> None:
    tensor = {"size": 4, "split": [["layer1", "image_blocks"]]}
    section = {"kind": "torchvision", "name": "resnet18"}
    plain, split = (ask(section, (3, 32, 32), **more)["facts"]["layers"] for more in ({}, {"tensor": tensor}))
    assert [layer["name"] for layer in split[3:6]] == ["maxpool", "layer1", "layer2.0"]
    assert split[4]["forward_flops"] == plain[4]["forward_flops"] + plain[5]["forward_flops"]
    assert split[4]["output_bytes"] == plain[5]["output_bytes"]
    assert split[4]["part"] == split[4]["weights"]


@pytest.mark.parametrize(
    ("section", "shape", "tensor", "key", "said"),
    [
        ({"kind": "gpt", "heads": 3}, (6,), None, "model.heads", "does not divide model.width: 128; use 2 or 4"),
        ({"kind": "gpt", "heads": 129}, (6,), None, "model.heads", "use 128"),
        ({"kind": "gpt"}, (3, 8, 8), None, "model.kind", "needs token ids (tokens,)"),
        ({"kind": "mlp", "hidden": [4]}, (8,), {"size": 2, "split": [["9", "heads"]]}, "parallel.split.9", "no module"),
        (
            {"kind": "resnet", "depth": 8},
            (3, 8, 8),
            {"size": 4, "split": [["fc", "image_blocks"]]},
            "parallel.split",
            "fc (Linear): an input without images",
        ),
    ],
)
def test_what_the_probe_refuses(
    section: dict[str, Any], shape: tuple[int, ...], tensor: dict[str, Any] | None, key: str, said: str
) -> None:
    (problem,) = ask(section, shape, tensor=tensor)["problems"]
    assert problem["key"] == key
    assert said in f"{problem['rule']}; {problem['remedy']}"


OWN_LAYERS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 10)
    def forward(self, x):
        return self.b(self.a(x))
    def pipeline_layers(self):
        return [(name, getattr(self, name)) for name in ORDER]

def right(): return make("ab")
def wrong(): return make("ba")

def make(order):
    global ORDER
    ORDER = order
    return Net()
"""


def test_a_users_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_layers.py").write_text(OWN_LAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    facts = ask({"kind": "python", "target": "own_layers:right"}, (4,))["facts"]
    assert [layer["name"] for layer in facts["layers"]] == ["a", "b"]
    (problem,) = ask({"kind": "python", "target": "own_layers:wrong"}, (4,))["problems"]
    assert problem["key"] == "model"
    assert problem["value"] == "Net"
    assert "cannot be applied one after the other: RuntimeError" in problem["rule"]


# ----------------------------------------------------------------------------------------------- a user's own function

SOURCE = """
from torch import nn

def linear(width):
    return nn.Linear(4, width)

def words():
    return "a model"

table = {}
"""


@pytest.fixture
def user_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_nets.py").write_text(SOURCE)
    (tmp_path / "user_broken.py").write_text("import user_nets\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("user_nets", "user_broken"):
        sys.modules.pop(name, None)


def test_python_model(user_nets: None) -> None:
    first, second = (build((4,), kind="python", target="user_nets:linear", args={"width": 3}) for _ in range(2))
    assert isinstance(first, nn.Linear)
    assert first.weight.shape == (3, 4)
    assert torch.equal(first.weight, second.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("user_nets:absent", "`absent` does not exist in module `user_nets`"),
        ("user_nets:table", "`table` is not a function"),
        ("user_nets:words", "returned str, not a torch.nn.Module"),
        ("user_nets:linear", "raised TypeError"),
        ("user_other:linear", "module `user_other` is not found"),
        ("user_broken:linear", "importing `user_broken` raised ZeroDivisionError"),
    ],
)
def test_python_model_that_is_wrong(user_nets: None, target: str, said: str) -> None:
    with pytest.raises(JobError) as raised:
        build((4,), kind="python", target=target)
    assert [problem.key for problem in raised.value.problems] == ["model.target"]
    assert said in str(raised.value)


# -------------------------------------------------------------------------------------------------------- transformers

SMALL_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
}
VIT = {"kind": "transformers", "auto_class": "AutoModelForImageClassification", "model_type": "vit"}
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="an extra")


@needs_transformers
def test_transformers_model_takes_shape_and_classes_from_the_data() -> None:
    network = build((1, 8, 8), **VIT, args=SMALL_VIT)
    assert logits_of(network(torch.zeros(2, 1, 8, 8))).shape == (2, 10)


@needs_transformers
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "vitt"}, "model.model_type"),
        ({"args": {**SMALL_VIT, "hidden_size": "wide"}}, "model.args"),
        ({"args": {**SMALL_VIT, "hiden_size": 15}}, "model.args.hiden_size"),
        ({"auto_class": "AutoModelForCausalLM"}, "model.args"),
    ],
)
def test_transformers_model_that_is_wrong(change: dict[str, Any], key: str) -> None:
    with pytest.raises(JobError) as raised:
        build((1, 8, 8), **{**VIT, "args": SMALL_VIT, **change})
    assert [problem.key for problem in raised.value.problems] == [key]


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(JobError, match=r"pip install 'temper\[transformers\]'"):
        build((1, 8, 8), **VIT)
