"""A `kind: python` model that can be told to break in its first training step, which no plan can see."""

from torch import Tensor, nn


class FragileNet(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.breaks and self.training and inputs.device.type != "meta":
            raise ValueError("this network breaks on purpose")
        return self.head(inputs.flatten(1))


def build(breaks: bool) -> nn.Module:
    return FragileNet(breaks)
