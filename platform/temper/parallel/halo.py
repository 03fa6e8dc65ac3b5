"""Images cut into blocks on a grid of ranks: who holds which pixels, who needs which, and their exchange.

A sliding window at the border of a block needs pixels of other blocks, its halo. Every rank works out, from the sizes
alone, what every other one holds and needs, so that one collective call moves all pieces, corners and the pixels of
ranks further away included (Dryden et al. 2019, "Improving strong-scaling of CNN training by exploiting finer-grained
parallelism"; DistBelief, Dean et al. 2012, cuts locally connected layers in the same way).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from temper.parallel.cut import even_range
from temper.parallel.groups import Group


@dataclass(frozen=True)
class Box:
    """Rows `[top, bottom)` and columns `[left, right)` of an image; padding lies beyond the image's own."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def __and__(self, other: Box) -> Box:
        """What lies in both; of height or width 0 where nothing does."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Box(top, max(top, min(self.bottom, other.bottom)), left, max(left, min(self.right, other.right)))

    def __contains__(self, other: Box) -> bool:
        return self & other == other

    def of(self, tensor: Tensor, held: Box) -> Tensor:
        """This box, which lies in `held`, out of a tensor `(…, height, width)` that holds `held`; a view."""
        rows = slice(self.top - held.top, self.bottom - held.top)
        return tensor[..., rows, self.left - held.left : self.right - held.left]


@dataclass(frozen=True)
class Window:
    """A window that slides along one side of an image: of a convolution, of pooling, of padding, of a strided slice.

    Output `o` sees the inputs `o × stride − before + i × dilation` for `i` in `range(kernel)`.
    """

    kernel: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    ceil: bool = False

    @property
    def extent(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def outputs(self, size: int) -> int:
        """How many outputs `size` inputs give, counted as torch does; less than 1 where the window does not fit."""
        room = size + self.before + self.after - self.extent
        count = (room + (self.stride - 1 if self.ceil else 0)) // self.stride + 1
        # A window that would begin in the padding behind the image is left out.
        return count - 1 if self.ceil and (count - 1) * self.stride >= size + self.before else count

    def inputs(self, start: int, stop: int) -> tuple[int, int]:
        """The range of inputs that outputs `[start, stop)` see; for no outputs, room for one before the image."""
        if start == stop:
            return -self.extent, 0
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.extent


@dataclass(frozen=True)
class Exchange:
    """Rank `r` holds `held[r]`, a block of the image, and needs `needed[r]`, which may reach beyond the image."""

    held: tuple[Box, ...]
    needed: tuple[Box, ...]

    def piece(self, source: int, target: int) -> Box:
        """What `source` has for `target`."""
        return self.held[source] & self.needed[target]

    @functools.cached_property
    def moves(self) -> bool:
        """Whether any rank needs what another one holds."""
        ranks = range(len(self.held))
        pairs = ((source, target) for source in ranks for target in ranks if source != target)
        return any(_area(self.piece(*pair)) for pair in pairs)

    @functools.cached_property
    def image(self) -> Box:
        return Box(0, self.held[-1].bottom, 0, self.held[-1].right)


def _area(box: Box) -> int:
    return box.height * box.width


def grid_shape(size: int) -> tuple[int, int]:
    """Rows and columns of `size` ranks, as square as can be and never wider than high: 2×1, 2×2, 3×2."""
    columns = max(number for number in range(1, math.isqrt(size) + 1) if size % number == 0)
    return size // columns, columns


@functools.lru_cache(maxsize=4096)
def blocks_of(height: int, width: int, size: int) -> tuple[Box, ...]:
    """The block of each of `size` ranks. It depends on the image's size only, so that equally large images are cut
    alike. Blocks of an image with fewer rows than the grid are empty on the last ranks."""
    rows, columns = grid_shape(size)
    return tuple(
        Box(*even_range(height, rank // columns, rows), *even_range(width, rank % columns, columns))
        for rank in range(size)
    )


@functools.lru_cache(maxsize=4096)
def plan_window(height: int, width: int, size: int, rows: Window, columns: Window) -> Exchange:
    """What each rank needs of images `height × width` to compute its block of the outputs of a window."""
    outputs = blocks_of(rows.outputs(height), columns.outputs(width), size)
    needed = tuple(Box(*rows.inputs(box.top, box.bottom), *columns.inputs(box.left, box.right)) for box in outputs)
    return Exchange(blocks_of(height, width, size), needed)


@functools.lru_cache(maxsize=4096)
def plan_whole(height: int, width: int, size: int) -> Exchange:
    """Every rank needs everything."""
    return Exchange(blocks_of(height, width, size), (Box(0, height, 0, width),) * size)


def fetch(block: Tensor, exchange: Exchange, group: Group, fill: float = 0.0) -> Tensor:
    """This rank's block `(N, C, height, width)` → what it needs. The gradient of every pixel goes back to its holder,
    which adds what all ranks send."""
    if exchange.held == exchange.needed:
        return block
    fetched: Tensor = _Fetch.apply(block, exchange, group, fill)
    return fetched


def gather_blocks(block: Tensor, exchange: Exchange, group: Group) -> Tensor:
    """All blocks → the whole image, on every rank. All of them go on alike, so that each has the whole gradient of the
    image already and takes its block of it."""
    image: Tensor = _Gather.apply(block, exchange, group)
    return image


def cut_block(image: Tensor, exchange: Exchange, group: Group) -> Tensor:
    """The whole image, alike on all ranks → this rank's block, a copy. Its gradient is gathered from all blocks."""
    block: Tensor = _CutBlock.apply(image, exchange, group)
    return block


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Tensor, exchange: Exchange, group: Group, fill: float) -> Tensor:  # type: ignore[override]
        ctx.exchange, ctx.group = exchange, group
        return _collect(block, exchange, group, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _give_back(grad, ctx.exchange, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Tensor, exchange: Exchange, group: Group) -> Tensor:  # type: ignore[override]
        ctx.exchange, ctx.rank = exchange, group.rank
        return _collect(block, exchange, group, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.exchange.held[ctx.rank].of(grad, ctx.exchange.image), None, None


class _CutBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, exchange: Exchange, group: Group) -> Tensor:  # type: ignore[override]
        ctx.exchange, ctx.group = exchange, group
        return exchange.held[group.rank].of(image, exchange.image).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _collect(grad, ctx.exchange, ctx.group, 0.0), None, None


def _collect(block: Tensor, exchange: Exchange, group: Group, fill: float) -> Tensor:
    """What this rank needs, put together from its own block and what the others send."""
    me, held, needed = group.rank, exchange.held[group.rank], exchange.needed[group.rank]
    collected = _empty(block, needed)
    if needed not in exchange.image:
        collected.fill_(fill)
    pieces = [exchange.piece(me, rank).of(block, held) for rank in range(group.size)]
    places = [exchange.piece(rank, me).of(collected, needed) for rank in range(group.size)]
    _swap(pieces, places, Tensor.copy_, exchange, group)
    return collected


def _give_back(grad: Tensor, exchange: Exchange, group: Group) -> Tensor:
    """The reverse of :func:`_collect`: the gradient of this rank's block, added up over the ranks that used it."""
    me, held, needed = group.rank, exchange.held[group.rank], exchange.needed[group.rank]
    total = _empty(grad, held).zero_()
    pieces = [exchange.piece(rank, me).of(grad, needed) for rank in range(group.size)]
    places = [exchange.piece(me, rank).of(total, held) for rank in range(group.size)]
    _swap(pieces, places, Tensor.add_, exchange, group)
    return total


def _swap(
    pieces: Sequence[Tensor],
    places: Sequence[Tensor],
    put: Callable[[Tensor, Tensor], Tensor],
    exchange: Exchange,
    group: Group,
) -> None:
    """Sends `pieces[r]` to rank `r` and puts what each rank `r` sent to this one in `places[r]`.

    On the meta device nothing is sent.
    """
    put(places[group.rank], pieces[group.rank])
    if not exchange.moves:
        return
    to_others = [piece.reshape(-1) if rank != group.rank else piece.new_empty(0) for rank, piece in enumerate(pieces)]
    sizes = [place.numel() if rank != group.rank else 0 for rank, place in enumerate(places)]
    sent = torch.cat(to_others)
    received = sent.new_empty(sum(sizes))
    if not sent.is_meta:
        dist.all_to_all_single(received, sent, sizes, [part.numel() for part in to_others], group=group.process_group)
    for place, values in zip(places, received.split(sizes), strict=True):
        if values.numel():
            put(place, values.view_as(place))


def _empty(like: Tensor, box: Box) -> Tensor:
    """A tensor for `box`, in the memory format of `like`, with other values undefined."""
    shape = (*like.shape[:-2], box.height, box.width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format_of(like))


def memory_format_of(images: Tensor) -> torch.memory_format:
    """Channels last only where the values lie so and not also as usual."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
