"""A job's `model` section → a network: `build_model`, and the table of kinds.

Adding a kind: a section in `config/schema.py`, a builder here and one line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from temper.config.schema import (
    CNNModel,
    GPTModel,
    MLPModel,
    ModelConfig,
    PythonModel,
    ResNetModel,
    TorchvisionModel,
    TransformersModel,
)
from temper.errors import JobError, Problem
from temper.models.gpt import build_gpt
from temper.models.plain import build_cnn, build_mlp
from temper.models.resnet import build_resnet
from temper.models.torchvision import build_torchvision
from temper.models.transformers import build_transformers
from temper.plan.facts import DataFacts
from temper.plan.mesh import divisors
from temper.targets import load_target


def build_model(config: ModelConfig, facts: DataFacts, seed: int) -> nn.Module:
    """Build the network for data of `facts`, fp32, on torch's current default device.

    Only `seed` decides the weights, so that every rank builds the same; the process's random state is left as it was.
    Raises JobError where the architecture or its arguments do not exist or do not fit the data.
    """
    with torch.random.fork_rng(devices=[]):
        # The generator itself: torch.manual_seed would reseed the GPU's, too.
        torch.default_generator.manual_seed(seed)
        return KINDS[config.kind](config, facts)


def num_outputs(config: ModelConfig, facts: DataFacts) -> int:
    """Outputs of the network: `model.num_classes`, else the data's number of classes, else 1 (a regression)."""
    asked: int | None = getattr(config, "num_classes", None)
    if asked is not None and facts.num_classes is not None and asked < facts.num_classes:
        rule = f"is too few for the {facts.num_classes} classes of the data"
        raise JobError([Problem("model.num_classes", asked, rule, f"leave it out or write {facts.num_classes}")])
    return asked or facts.num_classes or 1


def _build_mlp(config: MLPModel, facts: DataFacts) -> nn.Module:
    return build_mlp(facts.shape, num_outputs(config, facts), config.hidden, config.dropout)


def _build_cnn(config: CNNModel, facts: DataFacts) -> nn.Module:
    _require_images("cnn", facts, smallest=2 ** len(config.channels))
    return build_cnn(facts.shape, num_outputs(config, facts), config.channels, config.hidden, config.dropout)


def _build_resnet(config: ResNetModel, facts: DataFacts) -> nn.Module:
    _require_images("resnet", facts, smallest=1)
    return build_resnet(facts.shape[0], num_outputs(config, facts), config.depth, config.width)


def _build_gpt(config: GPTModel, facts: DataFacts) -> nn.Module:
    if len(facts.shape) != 1:
        rule = f"needs token ids (tokens,), the data have the shape {list(facts.shape)}"
        raise JobError([Problem("model.kind", "gpt", rule, "use data of token ids or another model")])
    if config.width % config.heads:
        fitting = divisors(config.width)
        below = [heads for heads in fitting if heads < config.heads][-1:]
        above = [heads for heads in fitting if heads > config.heads][:1]
        rule = f"does not divide model.width: {config.width}"
        raise JobError([Problem("model.heads", config.heads, rule, f"use {' or '.join(map(str, below + above))}")])
    classes = num_outputs(config, facts)
    return build_gpt(facts.shape[0], classes, config.layers, config.heads, config.width, config.dropout)


def _build_torchvision(config: TorchvisionModel, facts: DataFacts) -> nn.Module:
    _require_images("torchvision", facts, smallest=1)
    return build_torchvision(config.name, facts.shape[0], num_outputs(config, facts), config.args)


def _build_transformers(config: TransformersModel, facts: DataFacts) -> nn.Module:
    return build_transformers(config, facts)


def _build_python(config: PythonModel, facts: DataFacts) -> nn.Module:
    build = load_target(config.target, "model.target")
    try:
        model = build(**config.args)
    except Exception as error:
        # The user's function may fail in any way.
        rule = f"raised {type(error).__name__}: {error}"
        raise JobError([Problem("model.target", config.target, rule, "mend the function or model.args")]) from error
    if not isinstance(model, nn.Module):
        rule = f"returned {type(model).__name__}, not a torch.nn.Module"
        raise JobError([Problem("model.target", config.target, rule, "return the network itself")])
    return model


def _require_images(kind: str, facts: DataFacts, smallest: int) -> None:
    if len(facts.shape) != 3:
        rule = f"needs images (channels, height, width), the data have the shape {list(facts.shape)}"
        raise JobError([Problem("model.kind", kind, rule, "use mlp or a model of your own")])
    if min(facts.shape[1:]) < smallest:
        rule = f"needs images of at least {smallest}×{smallest}, the data have {facts.shape[1]}×{facts.shape[2]}"
        raise JobError([Problem("model.kind", kind, rule, "use fewer layers of pooling or larger images")])


KINDS: dict[str, Callable[[Any, DataFacts], nn.Module]] = {
    "torchvision": _build_torchvision,
    "resnet": _build_resnet,
    "mlp": _build_mlp,
    "cnn": _build_cnn,
    "gpt": _build_gpt,
    "transformers": _build_transformers,
    "python": _build_python,
}
