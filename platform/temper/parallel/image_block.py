"""One rank's block of a batch of images, as a value that a network computes with in place of the whole images.

It stands in for a tensor by torch's `__torch_function__` protocol: `nn.Conv2d`, `F.relu`, `torch.cat`, `x + y` and the
rest call the operations of this module, which fetch what a block lacks from the other ranks. What is not listed here
raises RunError. A plain tensor among the operands is one that all tensor ranks hold alike (a weight, a scale for each
channel), and so is the result of an operation that leaves no image, such as global pooling.
"""

from __future__ import annotations

import functools
import operator
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from temper.errors import RunError
from temper.parallel.batch_norm import batch_norm
from temper.parallel.collectives import copy_to_group, reduce_from_group
from temper.parallel.groups import Group, MeshGroups
from temper.parallel.halo import (
    Box,
    Window,
    blocks_of,
    cut_block,
    fetch,
    gather_blocks,
    memory_format_of,
    plan_whole,
    plan_window,
)


def _operator(function: Callable[..., Any]) -> Callable[..., ImageBlock]:
    return lambda self, *others: _elementwise(function, self, *others)


def _reflected(function: Callable[..., Any]) -> Callable[..., ImageBlock]:
    return lambda self, other: _elementwise(function, other, self)


class ImageBlock:
    """This rank's block `(N, C, h, w)` of images `(N, C, height, width)` that the ranks of `groups.tensor` share.

    It answers for the whole images: `shape`, `size()` and indices are theirs.
    """

    def __init__(self, block: Tensor, height: int, width: int, groups: MeshGroups) -> None:
        self.block, self.height, self.width, self.groups = block, height, width, groups

    @classmethod
    def cut(cls, images: Tensor, groups: MeshGroups) -> ImageBlock:
        """This rank's block, a copy, of images `(N, C, height, width)` that all tensor ranks hold alike."""
        height, width = images.shape[-2:]
        block = cut_block(images, plan_whole(height, width, groups.tensor.size), groups.tensor)
        return cls(block, height, width, groups)

    def whole(self) -> Tensor:
        """The whole images, on every tensor rank; collective. What the ranks do with them must be alike, too."""
        exchange = plan_whole(self.height, self.width, self.groups.tensor.size)
        return gather_blocks(self.block, exchange, self.groups.tensor)

    def with_block(self, block: Tensor) -> ImageBlock:
        """Another block of equally large images."""
        return ImageBlock(block, self.height, self.width, self.groups)

    @property
    def box(self) -> Box:
        """Where the block lies in the images."""
        return blocks_of(self.height, self.width, self.groups.tensor.size)[self.groups.tensor.rank]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.block.shape[:2], self.height, self.width))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return self.block.dtype

    @property
    def device(self) -> torch.device:
        return self.block.device

    @property
    def requires_grad(self) -> bool:
        return self.block.requires_grad

    def is_floating_point(self) -> bool:
        return self.block.is_floating_point()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = _OPERATIONS.get(function)
        if operation is None:
            raise refusal(f"{getattr(function, '__name__', function)}")
        return operation(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """The methods of a tensor."""
        function = None if name.startswith("_") else getattr(Tensor, name, None)
        if function is None:
            raise AttributeError(f"an image block has no {name}")
        operation = _OPERATIONS.get(function)
        if operation is None:
            raise refusal(name)
        return functools.partial(operation, self)

    def __getitem__(self, index: Any) -> ImageBlock:
        return _slice(self, index if isinstance(index, tuple) else (index,))

    def __bool__(self) -> bool:
        raise refusal("bool")

    __hash__ = object.__hash__

    __add__, __radd__, __iadd__ = _operator(operator.add), _reflected(operator.add), _operator(operator.iadd)
    __sub__, __rsub__, __isub__ = _operator(operator.sub), _reflected(operator.sub), _operator(operator.isub)
    __mul__, __rmul__, __imul__ = _operator(operator.mul), _reflected(operator.mul), _operator(operator.imul)
    __truediv__, __rtruediv__ = _operator(operator.truediv), _reflected(operator.truediv)
    __itruediv__ = _operator(operator.itruediv)
    __pow__, __neg__ = _operator(operator.pow), _operator(operator.neg)
    __lt__, __le__, __gt__, __ge__ = (_operator(sign) for sign in (operator.lt, operator.le, operator.gt, operator.ge))
    __eq__, __ne__ = _operator(operator.eq), _operator(operator.ne)  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------------- elementwise

_ELEMENTWISE = (
    *("abs", "add", "clamp", "clamp_max", "clamp_min", "div", "divide", "exp", "log", "maximum", "minimum", "mul"),
    *("multiply", "neg", "negative", "pow", "reciprocal", "rsqrt", "sqrt", "square", "sub", "subtract", "true_divide"),
    *("eq", "ge", "gt", "le", "lt", "ne", "masked_fill", "where"),
    *("bfloat16", "clone", "contiguous", "detach", "double", "float", "half", "to", "type_as"),
    *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu"),
    *("relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh", "tanhshrink", "threshold"),
)


def _elementwise(function: Callable[..., Any], *args: Any, **kwargs: Any) -> ImageBlock:
    """`function` on the blocks of all operands that are images; the largest gives the result's size."""
    operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, ImageBlock)]
    images = max(operands, key=lambda value: value.height * value.width)
    if "out" in kwargs or (_is_in_place(function, kwargs) and args[0] is not images):
        raise refusal(f"{getattr(function, '__name__', function)} that writes to a tensor that is no image block")
    args, kwargs = tree_map(functools.partial(_operand, like=images), (args, kwargs))
    return images.with_block(function(*args, **kwargs))


def _is_in_place(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("inplace")) or getattr(function, "__name__", "").endswith("_")


def _operand(value: Any, like: ImageBlock) -> Any:
    """What of an operand meets the block of `like`."""
    if isinstance(value, ImageBlock):
        if (value.height, value.width) == (like.height, like.width):
            return value.block
        value = value.whole()
    if not isinstance(value, Tensor):
        return value
    rows, columns = (1, 1, *value.shape)[-2:]
    if value.dim() > 4 or rows not in (1, like.height) or columns not in (1, like.width):
        raise refusal(f"a tensor {tuple(value.shape)} with images {tuple(like.shape)}")
    value, box = copy_to_group(value, like.groups.tensor), like.box
    value = value if rows == 1 else value[..., box.top : box.bottom, :]
    return value if columns == 1 else value[..., box.left : box.right]


def _prelu(images: Any, weight: Tensor) -> ImageBlock:
    if not isinstance(images, ImageBlock):
        raise refusal("prelu with an image block as weight")
    return images.with_block(F.prelu(images.block, _alike(weight, images.groups.tensor)))


def _dropout(images: ImageBlock, p: float = 0.5, training: bool = True, inplace: bool = False) -> ImageBlock:
    """Draws the mask of the whole images on every rank: blocks get different parts of it, the generators of all ranks
    stay in step, and the result is that of one rank."""
    if not training:
        return images
    ones = torch.ones(images.shape, dtype=images.dtype, device=images.device)
    ones = ones.contiguous(memory_format=memory_format_of(images.block))
    mask = images.box.of(F.dropout(ones, p), Box(0, images.height, 0, images.width))
    return images.with_block(images.block.mul_(mask) if inplace else images.block * mask)


def _dropout2d(images: ImageBlock, p: float = 0.5, training: bool = True, inplace: bool = False) -> ImageBlock:
    """Drops whole maps, the same ones on every rank."""
    if not training:
        return images
    mask = F.dropout2d(torch.ones((*images.shape[:2], 1, 1), dtype=images.dtype, device=images.device), p)
    return images.with_block(images.block.mul_(mask) if inplace else images.block * mask)


def _batch_norm(
    images: ImageBlock,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ImageBlock:
    """Over all pixels of all replicas."""
    groups = images.groups
    weight, bias = _alike(weight, groups.tensor), _alike(bias, groups.tensor)
    return images.with_block(
        batch_norm(images.block, running_mean, running_var, weight, bias, training, momentum, eps, groups.stage)
    )


def _cat(tensors: Sequence[ImageBlock | Tensor], dim: int = 0) -> ImageBlock:
    if not isinstance(tensors, list | tuple) or dim % 4 > 1:
        raise refusal(f"cat along dim {dim}")
    images = next(value for value in tensors if isinstance(value, ImageBlock))
    if any(value.shape[-2:] != images.shape[-2:] for value in tensors):
        raise refusal("cat of images of different sizes")
    return images.with_block(torch.cat([_operand(value, images) for value in tensors], dim))


# ----------------------------------------------------------------------------------------------------------- windows


def _slide(
    images: ImageBlock, rows: Window, columns: Window, compute: Callable[[Tensor], Tensor], fill: float = 0.0
) -> ImageBlock:
    """`compute` on all that the windows of this rank's outputs see; beyond the image that is `fill`."""
    group = images.groups.tensor
    height, width = rows.outputs(images.height), columns.outputs(images.width)
    if height < 1 or width < 1:
        raise refusal(f"a window of {rows.extent}×{columns.extent} on images of {images.height}×{images.width}")
    exchange = plan_window(images.height, images.width, group.size, rows, columns)
    box = blocks_of(height, width, group.size)[group.rank]
    # A rank without outputs has computed one from fill alone, so that all ranks do the same collective calls.
    block = compute(fetch(images.block, exchange, group, fill))[..., : box.height, : box.width]
    return ImageBlock(block, height, width, images.groups)


def _conv2d(
    input: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ImageBlock:
    if not isinstance(input, ImageBlock):
        raise refusal("conv2d with an image block as weight")
    strides, dilations, group = _pair(stride), _pair(dilation), input.groups.tensor
    rows, columns = (
        Window(weight.shape[2 + dim], strides[dim], *_padding(padding, dim, weight, dilations), dilations[dim])
        for dim in (0, 1)
    )
    weight, bias = _alike(weight, group), _alike(bias, group)
    return _slide(input, rows, columns, lambda pixels: F.conv2d(pixels, weight, bias, strides, 0, dilations, groups))


def _padding(padding: Any, dim: int, weight: Tensor, dilations: tuple[int, int]) -> tuple[int, int]:
    """Rows or columns of padding before and after the image."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        total = dilations[dim] * (weight.shape[2 + dim] - 1)
        return total // 2, total - total // 2
    return (_pair(padding)[dim],) * 2


def _max_pool2d(
    input: ImageBlock,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> ImageBlock:
    if return_indices:
        raise refusal("max_pool2d with return_indices")
    kernels, strides, dilations = _pair(kernel_size), _pair(stride or kernel_size), _pair(dilation)
    rows, columns = (
        Window(kernels[dim], strides[dim], *(_pair(padding)[dim],) * 2, dilations[dim], ceil_mode) for dim in (0, 1)
    )
    return _slide(input, rows, columns, lambda pixels: F.max_pool2d(pixels, kernels, strides, 0, dilations), -torch.inf)


def _avg_pool2d(
    input: ImageBlock,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ImageBlock:
    kernels, strides = _pair(kernel_size), _pair(stride or kernel_size)
    rows, columns = (Window(kernels[dim], strides[dim], *(_pair(padding)[dim],) * 2, ceil=ceil_mode) for dim in (0, 1))
    pooled = _slide(
        input,
        rows,
        columns,
        lambda pixels: F.avg_pool2d(pixels, kernels, strides, divisor_override=divisor_override),
    )
    if divisor_override is not None or not (ceil_mode or (any(_pair(padding)) and not count_include_pad)):
        return pooled
    box, like = pooled.box, pooled.block
    high = _counts(rows, input.height, range(box.top, box.bottom), count_include_pad, like)
    wide = _counts(columns, input.width, range(box.left, box.right), count_include_pad, like)
    return pooled.with_block(like * (rows.kernel / high[:, None]) * (columns.kernel / wide))


def _counts(window: Window, size: int, outputs: range, count_padding: bool, like: Tensor) -> Tensor:
    """How many inputs count in the average of each output."""
    low, high = (-window.before, size + window.before) if count_padding else (0, size)
    counts = []
    for output in outputs:
        start, stop = window.inputs(output, output + 1)
        counts.append(min(stop, high) - max(start, low))
    return torch.tensor(counts, dtype=like.dtype, device=like.device)


def _pad(images: ImageBlock, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> ImageBlock:
    if mode != "constant":
        raise refusal(f"{mode} padding")
    left, right, top, bottom, *others = (*pad, 0, 0)[: max(4, len(pad))]
    fill = value or 0.0
    padded = _slide(
        images, Window(before=top, after=bottom), Window(before=left, after=right), lambda pixels: pixels, fill
    )
    return padded.with_block(F.pad(padded.block, (0, 0, 0, 0, *others), value=fill)) if any(others) else padded


def _slice(images: ImageBlock, index: tuple[Any, ...]) -> ImageBlock:
    if any(part is Ellipsis for part in index):
        place = next(number for number, part in enumerate(index) if part is Ellipsis)
        index = (*index[:place], *(slice(None),) * (5 - len(index)), *index[place + 1 :])
    index = (*index, *(slice(None),) * (4 - len(index)))
    if len(index) != 4 or not all(isinstance(part, slice) and (part.step or 1) > 0 for part in index):
        raise refusal("an index other than slices")
    windows = []
    for part, size in zip(index[2:], images.shape[2:], strict=True):
        start, stop, step = part.indices(size)
        windows.append(Window(1, step, before=-start, after=stop - size))
    sliced = _slide(
        images, windows[0], windows[1], lambda pixels: pixels[..., :: windows[0].stride, :: windows[1].stride]
    )
    return sliced.with_block(sliced.block[index[:2]])


# ---------------------------------------------------------------------------------------- what leaves no image


def _adaptive_avg_pool2d(images: ImageBlock, output_size: Any) -> Tensor:
    """Each rank sums up its part of every average; all ranks get the whole result as a plain tensor."""
    wanted = output_size if isinstance(output_size, list | tuple) else (output_size,) * 2
    height, width = (size if asked is None else asked for size, asked in zip(images.shape[2:], wanted, strict=True))
    block = images.block.to(torch.promote_types(images.dtype, torch.float32))
    rows = _averages(images.height, height, block)[:, images.box.top : images.box.bottom]
    columns = _averages(images.width, width, block)[:, images.box.left : images.box.right]
    return reduce_from_group(rows @ block @ columns.T, images.groups.tensor).to(images.dtype)


def _averages(size: int, outputs: int, like: Tensor) -> Tensor:
    """The matrix `(outputs, size)` that takes the averages of adaptive pooling along one side."""
    matrix = like.new_zeros(outputs, size)
    for output in range(outputs):
        start, stop = output * size // outputs, -(-(output + 1) * size // outputs)
        matrix[output, start:stop] = 1 / (stop - start)
    return matrix


def _mean(images: ImageBlock, dim: Any = None, keepdim: bool = False) -> Tensor:
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    if None in dims or sorted(each % 4 for each in dims) != [2, 3]:
        raise refusal(f"mean over dim {dim}")
    pooled = _adaptive_avg_pool2d(images, 1)
    return pooled if keepdim else pooled.flatten(1)


# ------------------------------------------------------------------------------------------------------------- parts


def _alike(tensor: Tensor | None, group: Group) -> Any:
    """What all ranks hold alike and use on their blocks: its gradient is the sum over them."""
    return None if tensor is None else copy_to_group(tensor, group)


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (values[0], values[-1])


def refusal(what: str) -> RunError:
    """Names the module whose forward method asked for what does not work: the innermost one being called."""
    modules = []
    for frame, _ in traceback.walk_stack(None):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
    place = "a function"
    if modules:
        name = next((name for name, module in modules[-1].named_modules() if module is modules[0]), "")
        place = f"{name} ({type(modules[0]).__name__})".lstrip()
    return RunError(f"{place}: {what} does not work on image blocks; split this module in another way or not at all")


def _functions_named(name: str) -> set[Callable[..., Any]]:
    """`torch.relu`, `torch.relu_`, `F.relu`, `Tensor.relu_` and so on: all by one name, those in place included."""
    places = (torch, Tensor, F)
    found = (getattr(place, variant, None) for place in places for variant in (name, f"{name}_"))
    return {function for function in found if callable(function)}


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    **{
        function: functools.partial(_elementwise, function)
        for name in _ELEMENTWISE
        for function in _functions_named(name)
    },
    torch.prelu: _prelu,
    Tensor.prelu: _prelu,
    F.dropout: _dropout,
    F.dropout2d: _dropout2d,
    F.batch_norm: _batch_norm,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.conv2d: _conv2d,
    torch.max_pool2d: _max_pool2d,
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.pad: _pad,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    torch.mean: _mean,
    Tensor.mean: _mean,
}
