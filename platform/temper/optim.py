"""Optimizers of a job: torch's own, built over the model's trainable parameters.

The learning rate is set before every step by the engine, as a pure function of the steps applied so far; nothing about
it is stored here.

Where the model is on the CPU, Adam, AdamW and Adagrad are torch's fused ones. They are three times as fast, and as fast
for a network full of zeros: the others take the square roots of all second moments in one call, and that takes six
times as long where many of them are zero, as those of pruned weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from temper.config.schema import (
    AdagradOptimizer,
    AdamOptimizer,
    AdamWOptimizer,
    OptimizerConfig,
    SGDOptimizer,
)


class LazyAdagrad(torch.optim.Adagrad):
    """Adagrad whose accumulators appear at the first step.

    torch's own makes them when it is built; DeepSpeed swaps the parameters for its masters afterwards, and the step
    would look for accumulators that belong to tensors it no longer has.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state.clear()

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for param in group["params"]:
            if param.grad is not None and "sum" not in self.state[param]:
                self.state[param]["step"] = torch.tensor(0.0)
                self.state[param]["sum"] = torch.full_like(param, group["initial_accumulator_value"])
        return super()._init_group(group, *args, **kwargs)


def _sgd(config: SGDOptimizer, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        params,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _adam(config: AdamOptimizer | AdamWOptimizer, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """They differ in how weight decay acts."""
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    betas = (config.betas[0], config.betas[1])
    return kind(
        params,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=_on_cpu(params),
    )


def _adagrad(config: AdagradOptimizer, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return LazyAdagrad(params, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay, fused=_on_cpu(params))


def _on_cpu(params: list[nn.Parameter]) -> bool | None:
    """For `fused`: elsewhere torch decides."""
    return all(param.device.type == "cpu" for param in params) or None


OPTIMIZERS: dict[str, Callable[[Any, list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adam,
    "adagrad": _adagrad,
}


def build_optimizer(config: OptimizerConfig, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The job's optimizer over those of `params` that are trainable."""
    return OPTIMIZERS[config.kind](config, [param for param in params if param.requires_grad])
