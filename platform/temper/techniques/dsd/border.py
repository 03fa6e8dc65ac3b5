"""The border between two phases: the end of the one before, as the phase that begins there finds it.

A phase always begins with the last checkpoint of the one before it, also where the same process goes on. That
checkpoint holds whole fp32 weights, whatever mesh wrote it, so the masks do not depend on the mesh, and whoever is
killed here comes to the same ones again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from temper.checkpoint import BUFFER, MASK, MASTER, CheckpointReader, pack_bits, unpack_bits
from temper.parallel.cut import Cut
from temper.plan.phases import PhasePlan, Pruning
from temper.techniques.dsd.masks import select_mask

Part = TypeVar("Part")
Share = Callable[[dict[str, Part]], list[dict[str, Part]]]
"""What every rank has, by layer, from what this rank has. Collective."""


@dataclass(frozen=True)
class PackedMask:
    """The mask of one whole layer, one bit a weight."""

    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, mask: Tensor) -> PackedMask:
        return cls(pack_bits(mask.flatten()), tuple(mask.shape))

    def unpack(self) -> Tensor:
        return unpack_bits(self.bits, math.prod(self.shape)).view(self.shape)


def select_masks(
    reader: CheckpointReader,
    pruning: Pruning,
    *,
    rank: int = 0,
    size: int = 1,
    share: Share[PackedMask] = lambda own: [own],
) -> dict[str, PackedMask]:
    """The masks of all pruned layers. Each of `size` ranks computes some of them, and `share` brings them together."""
    names = list(pruning.layers)[rank::size]
    own = {name: PackedMask.pack(select_mask(name, reader.full(MASTER, name), pruning)) for name in names}
    return {name: mask for part in share(own) for name, mask in part.items()}


def begin_phase(
    folder: Path,
    phase: PhasePlan,
    *,
    rank: int = 0,
    size: int = 1,
    share: Share[PackedMask] = lambda own: [own],
) -> PhaseStart:
    """The last checkpoint of the phase before, `folder`, as `phase` begins with it. Its masks come about as in
    :func:`select_masks`."""
    masks: dict[str, PackedMask] = {}
    if phase.pruning is not None:
        masks = select_masks(CheckpointReader(folder), phase.pruning, rank=rank, size=size, share=share)
    return PhaseStart(folder, masks, fresh=phase.fresh)


class PhaseStart(CheckpointReader):
    """The checkpoint `folder` as a phase begins with it.

    Weights that `masks` prunes are zero, and so are their moments; the masks are read as kind `mask`. With `fresh`
    there are no moments. Masks in the checkpoint are those of an earlier sparse phase and are not read.
    """

    def __init__(self, folder: Path, masks: Mapping[str, PackedMask], *, fresh: bool) -> None:
        super().__init__(folder)
        self._masks, self._fresh = masks, fresh
        if fresh:
            self.state["engine"] = {**self.state["engine"], "optimizer_step": 0}
        self._unpacked: tuple[str, Tensor] | None = None

    def names(self, kind: str) -> list[str]:
        return [name for name in self.shapes if name in self._masks] if kind == MASK else super().names(kind)

    def moments(self) -> list[str]:
        return [] if self._fresh else super().moments()

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None, cut: Cut | None = None) -> Tensor:
        if kind == MASK:
            return self._kept(name, start, numel, cut)
        values = super().read(kind, name, start, numel, cut)
        if kind == BUFFER or name not in self._masks:
            return values
        return torch.where(self._kept(name, start, numel, cut), values, 0.0)

    def _kept(self, name: str, start: int, numel: int | None, cut: Cut | None) -> Tensor:
        # The last one is kept: a rank asks for many ranges of one tensor in a row.
        if self._unpacked is None or self._unpacked[0] != name:
            self._unpacked = name, self._masks[name].unpack()
        whole = self._unpacked[1]
        flat = (whole if cut is None else cut.take(whole)).reshape(-1)
        return flat if numel is None else flat[start : start + numel]
