"""Any torchvision classifier by the name of its builder, for images of any number of channels."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from temper.errors import JobError, Problem
from temper.torchvision_import import declare_torchvision_operators


def build_torchvision(name: str, in_channels: int, num_classes: int, args: dict[str, Any]) -> nn.Module:
    """Build the classifier with random weights; `args` are further arguments of its builder.

    Torchvision's networks take three channels. For another number the first convolution is made anew with the same
    arguments, and nothing else changes. Raises JobError where name or arguments do not exist.
    """
    declare_torchvision_operators()
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(names)}"
        raise JobError([Problem("model.name", name, "is not a torchvision classifier", remedy)])
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **_arguments(name, args))
    except (TypeError, ValueError, AssertionError) as error:
        raise JobError([Problem("model.args", args, f"does not suit {name}: {error}", "correct model.args")]) from error
    if in_channels != 3:
        _apply_channels(model, name, in_channels)
    return model


def _arguments(name: str, args: dict[str, Any]) -> dict[str, Any]:
    reserved = {"weights", "num_classes", "weights_backbone"} & args.keys()
    if reserved:
        key = min(reserved)
        raise JobError([Problem(f"model.args.{key}", args[key], "is set by temper", "remove it")])
    # These two warn unless told whether to draw their weights from the slow truncated normal distribution.
    return {"init_weights": False, **args} if name in ("googlenet", "inception_v3") else args


def _apply_channels(model: nn.Module, name: str, in_channels: int) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _with_channels(module, in_channels))
            break
    else:
        raise JobError(
            [Problem("model.name", name, f"has no convolution to take {in_channels} channels", "use 3 channels")]
        )
    if getattr(model, "transform_input", False):
        rule = f"needs three channels, the data have {in_channels}"
        raise JobError([Problem("model.args.transform_input", True, rule, "set it to false")])


def _with_channels(conv: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        conv.out_channels,
        kernel_size=conv.kernel_size,  # type: ignore[arg-type]  # tuples of two, as the constructor takes them
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
