"""A `kind: python` model whose forward pass takes a given time, so that a test can break a run in its midst."""

import time

from torch import Tensor, nn


class SlowNet(nn.Module):
    """A small network with dropout, whose random numbers a resumed run must draw again exactly."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self.delay_s = delay_s
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        time.sleep(self.delay_s)
        return self.head(self.body(inputs))


def build(delay_s: float) -> nn.Module:
    return SlowNet(delay_s)


def build_broken() -> nn.Module:
    """Builds, and fails at the first training step: a mistake that no plan can see."""
    return BrokenNet()


class BrokenNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "meta" and self.training:
            raise ValueError("this network is broken on purpose")
        return self.head(inputs.flatten(1))
