"""Models: built by name, for the data's shape, alike on every rank."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from temper.config.schema import ModelConfig
from temper.errors import JobError
from temper.models.build import build_model
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
