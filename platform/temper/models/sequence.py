"""A model as layers that are applied one after the other, which is what a pipeline can be cut from."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from torch import nn

Layer = tuple[str, nn.Module]


@runtime_checkable
class Layered(Protocol):
    """A model that tells its own layers.

    `layer_n(… layer_1(layer_0(inputs)))` must be `model(inputs)`. Each layer comes with its dotted name in the model,
    and each parameter and buffer of the model lies in exactly one layer. What stands between the model's modules, such
    as a reshape, is a module without parameters under any other name: `("flatten", nn.Flatten())`.
    """

    def pipeline_layers(self) -> Iterable[Layer]: ...


def layer_sequence(model: nn.Module) -> list[Layer] | None:
    """The layers of the model in their order, each with its dotted name; None where the model is no such sequence.

    Known are nn.Sequential, models that have `pipeline_layers` (:class:`Layered`), and the networks of torchvision that
    `_CHAINS` lists. An nn.Sequential inside is replaced by its own layers. Forward hooks keep a module in one piece, as
    they are called for the whole of it. A model that uses a parameter in two layers, or one in none, is not a sequence:
    no stage could own it.
    """
    chain = None if _is_hooked(model) else _chain(model)
    if chain is None:
        return None
    layers = [layer for name, module in chain for layer in _flattened(name, module)]
    return layers if _own_everything_once(model, layers) else None


def _chain(model: nn.Module) -> Iterable[Layer] | None:
    if isinstance(model, Layered):
        return model.pipeline_layers()
    if is_plain_sequence(model):
        return [("", model)]
    names = _CHAINS.get(f"{type(model).__module__}.{type(model).__qualname__}")
    if names is None or any(getattr(model, flag, False) for flag in _BRANCHES):
        return None
    return [(name, getattr(model, name) if hasattr(model, name) else _FUNCTIONS[name]()) for name in names]


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether the module only applies its children one after the other, so that a pipeline may cut it."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _flattened(name: str, module: nn.Module) -> Iterator[Layer]:
    if not is_plain_sequence(module) or _is_hooked(module):
        yield name, module
        return
    # Not named_children, which leaves out a module that comes a second time.
    for child, layer in module._modules.items():
        assert layer is not None, "nn.Sequential applies all of its modules"
        yield from _flattened(f"{name}.{child}" if name else child, layer)


def _own_everything_once(model: nn.Module, layers: list[Layer]) -> bool:
    owned = Counter(id(tensor) for _, layer in layers for tensor in _tensors(layer))
    return owned == Counter(id(tensor) for tensor in _tensors(model))


def _tensors(module: nn.Module) -> Iterator[object]:
    return itertools.chain(module.parameters(), module.buffers())


_FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "flatten": nn.Flatten,
    "pool": lambda: nn.AdaptiveAvgPool2d(1),
    "relu": lambda: nn.ReLU(inplace=True),
}
# What torchvision's forward methods apply: modules by their names in the model, functions by those in _FUNCTIONS.
_CLASSIFIER = ("features", "avgpool", "flatten", "classifier")
_CHAINS: dict[str, tuple[str, ...]] = {
    "torchvision.models.alexnet.AlexNet": _CLASSIFIER,
    "torchvision.models.convnext.ConvNeXt": ("features", "avgpool", "classifier"),
    "torchvision.models.densenet.DenseNet": ("features", "relu", "pool", "flatten", "classifier"),
    "torchvision.models.efficientnet.EfficientNet": _CLASSIFIER,
    "torchvision.models.googlenet.GoogLeNet": (
        *("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
        *("inception3a", "inception3b", "maxpool3"),
        *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
        *("inception5a", "inception5b", "avgpool", "flatten", "dropout", "fc"),
    ),
    "torchvision.models.mobilenetv2.MobileNetV2": ("features", "pool", "flatten", "classifier"),
    "torchvision.models.mobilenetv3.MobileNetV3": _CLASSIFIER,
    "torchvision.models.regnet.RegNet": ("stem", "trunk_output", "avgpool", "flatten", "fc"),
    "torchvision.models.resnet.ResNet": (
        *("conv1", "bn1", "relu", "maxpool"),
        *("layer1", "layer2", "layer3", "layer4"),
        *("avgpool", "flatten", "fc"),
    ),
    "torchvision.models.squeezenet.SqueezeNet": ("features", "classifier", "flatten"),
    "torchvision.models.swin_transformer.SwinTransformer": (
        *("features", "norm", "permute", "avgpool", "flatten", "head"),
    ),
    "torchvision.models.vgg.VGG": _CLASSIFIER,
}
# GoogLeNet's second and third output, and what it does to its input before the first layer.
_BRANCHES = ("aux_logits", "transform_input")
