"""CIFAR-style residual networks: He et al., Deep Residual Learning for Image Recognition (2016), section 4.2.

A 3×3 convolution, three stages of n blocks with 16, 32 and 64 maps, global average pooling, one linear layer: 6n + 2
layers. Shortcuts are the paper's option A, which it uses on CIFAR-10: identity, and where the maps double, every second
pixel with zeros for the new maps. They have no parameters, so the counts are the paper's (ResNet-20: 0.27 M).
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

_STAGE_MAPS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, each with batch normalisation, and a shortcut around them."""

    def __init__(self, in_maps: int, out_maps: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_maps, out_maps, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_maps)
        self.conv2 = nn.Conv2d(out_maps, out_maps, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_maps)
        self.stride, self.new_maps = stride, out_maps - in_maps

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_maps == 0:
            return x
        before = self.new_maps // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_maps - before))


def build_resnet(in_channels: int, num_classes: int, depth: int, width: float) -> nn.Sequential:
    """The network of `depth` = 6n + 2 layers with `width` times the paper's maps, weights as in He et al. (2015).

    Takes (examples, in_channels, height, width) of any size. A plain sequence: stem, blocks, pool, flatten, fc.
    """
    maps = [max(1, round(width * size)) for size in _STAGE_MAPS]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(in_channels, maps[0], 3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(maps[0])
    layers["relu"] = nn.ReLU()
    in_maps = maps[0]
    for stage, out_maps in enumerate(maps):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers[f"layer{stage + 1}_{block}"] = BasicBlock(in_maps, out_maps, stride)
            in_maps = out_maps
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(in_maps, num_classes)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
