"""Transforms of images, built from a job's list with torchvision, and drawn per example.

What happens to an example depends on (seed, epoch, row) and on nothing else: not on the number of ranks, not on the
loader's processes. Training's own random numbers are left untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from temper.config.schema import RandomAffine, Transform
from temper.torchvision_import import declare_torchvision_operators

ImageTransform = Callable[[Any], Any]


def build_transforms(transforms: Sequence[Transform]) -> ImageTransform | None:
    """One function from an image tensor (channels, height, width) to another; None where `transforms` is empty."""
    if not transforms:
        return None
    declare_torchvision_operators()
    from torchvision.transforms import v2

    return _Chain([_BUILDERS[transform.kind](v2, transform) for transform in transforms])


class _Chain:
    """Applies transforms one after the other; a class, so that loader processes can be sent it."""

    def __init__(self, transforms: Sequence[ImageTransform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, image: Tensor) -> Tensor:
        for transform in self.transforms:
            image = transform(image)
        return image


def apply_seeded(
    augmentation: ImageTransform,
    images: Iterable[Tensor],
    seed: int,
    epochs: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
) -> list[Tensor]:
    """Each image augmented with random numbers that (seed, epoch, row) decide."""
    seeds = example_seeds(seed, epochs, rows)
    augmented = []
    # The generator itself is seeded: torch.manual_seed would also reseed the GPU's, which is not restored here.
    with torch.random.fork_rng(devices=[]):
        for image, number in zip(images, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(number)
            augmented.append(augmentation(image))
    return augmented


def example_seeds(seed: int, epochs: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A seed below 2**32, which is all that torch's CPU generator takes in, for each (seed, epoch, row)."""
    mixed = _mix(_mix(_mix(np.full(rows.shape, seed, np.uint64)) + epochs.astype(np.uint64)) + rows.astype(np.uint64))
    return (mixed >> np.uint64(32)).astype(np.int64)


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's step and finaliser (Steele, Lea and Flood 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class _RandomCrop:
    """Pads with zeros and cuts a random window, of the image's own size where none is given.

    v2.RandomCrop takes four times as long on small images and wants its size in advance.
    """

    def __init__(self, padding: int, size: int | None) -> None:
        self.padding, self.size = padding, size

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:] if self.size is None else (self.size, self.size)
        # An image that is still smaller than the window is padded until it fits.
        vertical = max(self.padding, height - image.shape[-2])
        horizontal = max(self.padding, width - image.shape[-1])
        padded = F.pad(image, (horizontal, horizontal, vertical, vertical))
        top = int(torch.randint(padded.shape[-2] - height + 1, ()))
        left = int(torch.randint(padded.shape[-1] - width + 1, ()))
        return padded[..., top : top + height, left : left + width]


def _build_affine(v2: Any, config: RandomAffine) -> ImageTransform:
    affine: ImageTransform = v2.RandomAffine(
        config.degrees,
        translate=(config.translate, config.translate) if config.translate else None,
        scale=(1 - config.scale, 1 + config.scale) if config.scale else None,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return affine


# `v2` is torchvision.transforms.v2, handed in because jobs without transforms do not wait for its import.
_BUILDERS: dict[str, Callable[[Any, Any], ImageTransform]] = {
    "random_crop": lambda v2, config: _RandomCrop(config.padding, config.size),
    "random_horizontal_flip": lambda v2, config: v2.RandomHorizontalFlip(config.p),
    "random_rotation": lambda v2, config: v2.RandomRotation(config.degrees, v2.InterpolationMode.BILINEAR),
    "random_affine": _build_affine,
    "random_resized_crop": lambda v2, config: v2.RandomResizedCrop(config.size, scale=(config.min_scale, 1.0)),
    "random_erasing": lambda v2, config: v2.RandomErasing(config.p),
    "color_jitter": lambda v2, config: v2.ColorJitter(config.brightness, config.contrast, config.saturation),
    "trivial_augment": lambda v2, config: v2.TrivialAugmentWide(),
    "resize": lambda v2, config: v2.Resize(config.size),
    "center_crop": lambda v2, config: v2.CenterCrop(config.size),
}
