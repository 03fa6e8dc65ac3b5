"""Which part of a parameter a tensor-parallel rank holds, and how that part lies in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """A rank's part of a tensor of `shape`: the index ranges `[start, stop)` of `ranges` along `dim`, in this order.

    More than one range stands for parameters that are stacked in one tensor, as query, key and value are.
    """

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def part_shape(self) -> tuple[int, ...]:
        size = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def take(self, whole: Tensor) -> Tensor:
        """The part out of the whole tensor; a view where it is one range."""
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Copies the part to its places in the whole tensor."""
        sizes = [stop - start for start, stop in self.ranges]
        for (start, stop), piece in zip(self.ranges, part.split(sizes, self.dim), strict=True):
            whole.narrow(self.dim, start, stop - start).copy_(piece)


def even_range(size: int, index: int, parts: int) -> tuple[int, int]:
    """Range `index` of `parts` that divide `size` as evenly as can be; the first ones are larger by one."""
    share, larger = divmod(size, parts)
    start = index * share + min(index, larger)
    return start, start + share + (index < larger)


def cut_evenly(shape: Sequence[int], dim: int, index: int, parts: int, stacked: int = 1) -> Cut:
    """The cut of rank `index` of `parts` along `dim`, which holds `stacked` equal blocks that are cut alike."""
    block = shape[dim] // stacked
    start, stop = even_range(block, index, parts)
    return Cut(tuple(shape), dim, tuple((number * block + start, number * block + stop) for number in range(stacked)))


def set_cut(param: nn.Parameter | Tensor, cut: Cut) -> None:
    """Marks a parameter or buffer as one rank's part. DeepSpeed reads the second mark: such a parameter counts on every
    tensor rank in norms, a replicated one only on the first."""
    param.temper_cut = cut  # type: ignore[union-attr]
    param.tensor_model_parallel = True  # type: ignore[union-attr]


def cut_of(param: nn.Parameter | Tensor) -> Cut | None:
    """The cut of a parameter or buffer; None where the rank holds the whole of it."""
    return getattr(param, "temper_cut", None)
