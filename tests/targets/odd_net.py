"""A `kind: python` model that computes something else on every rank but the first: a fault for `temper verify`."""

import os

from torch import Tensor, nn


class Odd(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * (1.01 if int(os.environ.get("RANK", "0")) else 1.0)


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), Odd(), nn.Linear(32, 10))
