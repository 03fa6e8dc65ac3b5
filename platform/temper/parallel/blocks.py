"""Convolutional networks on blocks of the image: spatial parallelism for modules that know nothing of it.

Each tensor rank computes one block of every image of a module (2×2 blocks on four ranks; see
:mod:`temper.parallel.halo`). Parameters are replicated, and the module and its names stay as they are: a hook before it
cuts its images, :class:`temper.parallel.image_block.ImageBlock` carries the blocks through it, and a hook behind it
gathers them.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from temper.errors import RunError
from temper.parallel.groups import Group, MeshGroups
from temper.parallel.image_block import ImageBlock, refusal


def compute_on_blocks(module: nn.Module, groups: MeshGroups) -> None:
    """From now on the ranks of `groups.tensor` share the images among the arguments of `module` and in its result.

    Images are floating-point tensors `(N, C, height, width)`; every tensor rank gives the same ones and gets the same
    result. Batch norms inside take their statistics over `groups.stage`. Gradients of inputs and parameters are, on
    every tensor rank, those of the unsplit module. What the module does with its images must be an operation that
    :mod:`temper.parallel.image_block` lists; another one raises RunError.
    """
    region = _Region(groups)
    module.temper_region = region  # type: ignore[assignment]
    module.register_forward_pre_hook(region.enter, with_kwargs=True)
    module.register_forward_hook(region.leave)


def join_blocks(model: nn.Module) -> None:
    """Where modules that compute on blocks follow each other in an nn.Sequential, the images stay cut in between.

    What looks at the values between them, as a hook may, then sees an :class:`ImageBlock`. For a model that is called
    as a whole; the layers of a pipeline's stage go to :func:`join_chain`.
    """
    uses = Counter(child for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _join(list(module), uses)


def join_chain(layers: Iterable[nn.Module]) -> None:
    """:func:`join_blocks` for layers that are applied one after the other, and nowhere else."""
    chain = list(layers)
    _join(chain, Counter(chain))


def _join(chain: list[nn.Module], uses: Counter[nn.Module | None]) -> None:
    for layer, following in itertools.pairwise(chain):
        region = _region_of(layer)
        # A layer that is used twice may have two successors.
        if region is not None and uses[layer] == 1:
            region.hands_on = _region_of(following) is not None


def dry_run_on_blocks(model: nn.Module, names: Collection[str], inputs: Tensor, tensor: int) -> str | None:
    """Why the modules `names` of `model` cannot compute on the blocks of `tensor` ranks; None where they can.

    Runs a copy of the model once on `inputs`, on the meta device and as the rank with the smallest block, in the mode
    that the model is in.
    """
    model = copy.deepcopy(model).to("meta")
    alone, part = Group(), Group(tensor - 1, tensor)
    groups = MeshGroups(data=alone, tensor=part, pipeline=alone, stage=part, replica=part)
    for name in names:
        compute_on_blocks(model.get_submodule(name), groups)
    try:
        with torch.no_grad():
            model(inputs.to("meta"))
    except RunError as error:
        return str(error)
    return None


class _Region:
    """The two hooks of a module that computes on blocks."""

    def __init__(self, groups: MeshGroups) -> None:
        self.groups = groups
        self.hands_on = False
        self._cut: list[tuple[Tensor, ImageBlock, int]] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._cut = []
        args, kwargs = tree_map(self._cut_images, (args, kwargs))
        if not any(isinstance(value, ImageBlock) for value in tree_leaves((args, kwargs))):
            raise refusal("an input without images (N, C, height, width)")
        return args, kwargs

    def _cut_images(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()):
            return value
        images = ImageBlock.cut(value, self.groups)
        self._cut.append((value, images, _version(images)))
        return images

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        cut, self._cut = self._cut, []
        for original, images, version in cut:
            # The block is a copy, and a change in place is the caller's to see. Inference mode does not tell of one.
            if images.block.is_inference() or _version(images) != version:
                original.copy_(images.whole())
        return output if self.hands_on else tree_map(_whole, output)


def _region_of(module: nn.Module) -> _Region | None:
    region = getattr(module, "temper_region", None)
    return region if isinstance(region, _Region) else None


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, ImageBlock) else value


def _version(images: ImageBlock) -> int:
    """Counts the changes in place."""
    return 0 if images.block.is_inference() else images.block._version
