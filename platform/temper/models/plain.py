"""Small plain networks, each one sequence of layers: a multi-layer perceptron and a convolutional network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def build_mlp(shape: Sequence[int], num_outputs: int, hidden: Sequence[int], dropout: float) -> nn.Sequential:
    """Fully connected layers on the flattened input of `shape`, each but the last followed by ReLU (and dropout)."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = math.prod(shape)
    for width in hidden:
        layers += [nn.Linear(size, width), nn.ReLU(), *_dropout(dropout)]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, num_outputs))


def build_cnn(
    shape: Sequence[int], num_outputs: int, channels: Sequence[int], hidden: int, dropout: float
) -> nn.Sequential:
    """3×3 convolution, ReLU and 2×2 max-pooling for each of `channels`, then a hidden layer and the output.

    `shape` is (channels, height, width), both sides at least 2 ** len(channels).
    """
    maps, height, width = shape
    layers: list[nn.Module] = []
    for out_maps in channels:
        layers += [nn.Conv2d(maps, out_maps, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        maps, height, width = out_maps, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(maps * height * width, hidden), nn.ReLU(), *_dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden, num_outputs))


def _dropout(p: float) -> list[nn.Module]:
    return [nn.Dropout(p)] if p else []
