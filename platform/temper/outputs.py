"""What networks return: a tensor of logits, or an object that holds them, as torchvision and transformers have it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(outputs: Any) -> Tensor:
    """The logits in a network's outputs: the tensor itself, or its `logits`. Raises TypeError where there are none."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"a model must return a tensor or an object with `logits`, not {type(outputs).__name__}")
    return logits


def aux_logits_of(outputs: Any) -> dict[str, Tensor]:
    """Auxiliary classifiers' logits by name, as torchvision's GoogLeNet and Inception v3 return them in training."""
    fields = getattr(outputs, "_fields", ())
    named = {name: getattr(outputs, name) for name in fields if name.startswith("aux_logits")}
    return {name: logits for name, logits in named.items() if isinstance(logits, Tensor)}
