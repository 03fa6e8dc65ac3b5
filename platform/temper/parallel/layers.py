"""Layers whose work the ranks of a group share: by output activations, by input activations, by feature maps, by heads.

`apply_…_split` turns a layer into its sharded twin in place: the module object, its hooks and the names of its
parameters stay; its class becomes one of this module, and each parameter that is cut holds the rank's part only and
says so (`cut_of`). A twin takes whole inputs and gives whole outputs, the same on all ranks, and so works in any
model; between the two layers of a pair both exchanges can be left out (Krizhevsky 2014; Shoeybi et al. 2019, section
3). Parts may differ in size by one unit: a feature, a map, a group of maps, a head.

Gradients are those of the unsharded layer: of a part, the part of the gradient; of a parameter that is not cut, the
whole gradient, on every rank.

Why not the libraries': DeepSpeed 0.19 fails on torch's DTensor parameters before its first step at every ZeRO stage
("Couldn't swap Linear.weight"), and DTensor's convolution in torch 2.13 gives wrong results without an error where the
weight is sharded by maps. DeepSpeed's AutoTP shards linear layers and embeddings, in an engine and groups of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from temper.parallel.collectives import copy_to_group, gather_from_group, reduce_from_group, scatter_to_group
from temper.parallel.cut import Cut, even_range, set_cut
from temper.parallel.groups import Group

Convolution = nn.Conv1d | nn.Conv2d


def part_sizes(size: int, units: int, parts: int) -> tuple[int, ...]:
    """How much of `size`, which is `units` units that are not divided, each of `parts` ranks has."""
    ranges = (even_range(units, index, parts) for index in range(parts))
    return tuple((stop - start) * (size // units) for start, stop in ranges)


def cut_units(shape: torch.Size, dim: int, units: int, group: Group, stacked: int = 1) -> Cut:
    """The cut along `dim`, which holds `stacked` equal blocks of `units` units each, that gives a rank whole units."""
    block = shape[dim] // stacked
    start, stop = (index * (block // units) for index in even_range(units, group.rank, group.size))
    return Cut(tuple(shape), dim, tuple((number * block + start, number * block + stop) for number in range(stacked)))


def _cut_parameter(module: nn.Module, name: str, dim: int, units: int, group: Group, stacked: int = 1) -> None:
    """Leaves the rank's part of a parameter in its place, in memory of its own."""
    whole = getattr(module, name)
    if whole is None:
        return
    cut = cut_units(whole.shape, dim, units, group, stacked)
    part = nn.Parameter(cut.take(whole.detach()).clone(memory_format=torch.contiguous_format), whole.requires_grad)
    set_cut(part, cut)
    setattr(module, name, part)


# ------------------------------------------------------------------------------------------- linear and convolution


class _ByOutput(nn.Module):
    """Each rank computes its own outputs (features or maps), from the whole input or the groups that they read."""

    weight: Tensor
    group: Group
    # Of the input along the features: empty where every rank reads the whole.
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]
    gathers: bool

    def forward(self, input: Tensor) -> Tensor:
        dim = _feature_dim(self)
        if self.input_sizes:
            own = scatter_to_group(input, dim, self.input_sizes, self.group)
        else:
            own = copy_to_group(input, self.group)
        output: Tensor = super().forward(own)
        return gather_from_group(output, dim, self.output_sizes, self.group) if self.gathers else output


class _ByInput(nn.Module):
    """Each rank computes the term of every output that its own inputs (features or maps) give; the terms are summed."""

    weight: Tensor
    bias: Any
    group: Group
    input_sizes: tuple[int, ...]
    scatters: bool

    def forward(self, input: Tensor) -> Tensor:
        own = scatter_to_group(input, _feature_dim(self), self.input_sizes, self.group) if self.scatters else input
        output = reduce_from_group(self._term(own), self.group)
        if self.bias is None:
            return output
        return output + self.bias.to(output.dtype).view(-1, *[1] * (self.weight.dim() - 2))

    def _term(self, input: Tensor) -> Tensor:
        raise NotImplementedError


def output_parts(layer: _ByOutput) -> tuple[int, tuple[int, ...], Group]:
    """How to gather what a layer gives that leaves its outputs on their ranks: dim, sizes, group."""
    return _feature_dim(layer), layer.output_sizes, layer.group


def _feature_dim(layer: _ByOutput | _ByInput) -> int:
    """Features or maps come last in a linear layer, and before the spatial dims in a convolution, batched or not."""
    return 1 - layer.weight.dim()


class LinearByOutput(_ByOutput, nn.Linear):
    """`nn.Linear` by output activations; weight `(part of out_features, in_features)`."""


class Conv1dByOutput(_ByOutput, nn.Conv1d):
    """`nn.Conv1d` by output feature maps."""


class Conv2dByOutput(_ByOutput, nn.Conv2d):
    """`nn.Conv2d` by output feature maps; weight `(part of out_channels, in_channels / groups, height, width)`."""


class LinearByInput(_ByInput, nn.Linear):
    """`nn.Linear` by input activations; weight `(out_features, part of in_features)`, bias whole."""

    def _term(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class Conv1dByInput(_ByInput, nn.Conv1d):
    """`nn.Conv1d` by input feature maps."""

    def _term(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, None)


class Conv2dByInput(_ByInput, nn.Conv2d):
    """`nn.Conv2d` by input feature maps; weight `(out_channels, part of in_channels, height, width)`, bias whole."""

    def _term(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, None)


_BY_OUTPUT: dict[type[nn.Module], type[_ByOutput]] = {
    nn.Linear: LinearByOutput,
    nn.Conv1d: Conv1dByOutput,
    nn.Conv2d: Conv2dByOutput,
}
_BY_INPUT: dict[type[nn.Module], type[_ByInput]] = {
    nn.Linear: LinearByInput,
    NonDynamicallyQuantizableLinear: LinearByInput,
    nn.Conv1d: Conv1dByInput,
    nn.Conv2d: Conv2dByInput,
}


def output_units(layer: nn.Linear | Convolution) -> int:
    """Units of a layer's output; those of a grouped convolution are its groups."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if layer.groups == 1 else layer.groups


def apply_output_split(
    layer: nn.Linear | Convolution, group: Group, gathers: bool = True, units: int | None = None, stacked: int = 1
) -> None:
    """Splits a layer by its outputs. With `gathers=False` each rank keeps its own part of them.

    `units` says how many units the output has where that is not :func:`output_units`; `stacked`, how many equal blocks
    it holds, each of so many units, of which a rank gets its part of every one.
    """
    sharded: Any = layer
    features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    units = output_units(layer) if units is None else units
    sharded.__class__ = _BY_OUTPUT[type(layer)]
    sharded.group, sharded.gathers = group, gathers
    sharded.output_sizes = part_sizes(features, units, group.size)
    sharded.input_sizes = ()
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        sharded.input_sizes = part_sizes(layer.in_channels, units, group.size)
        sharded.groups = part_sizes(units, units, group.size)[group.rank]
    for name in ("weight", "bias"):
        _cut_parameter(layer, name, 0, units, group, stacked)


def apply_input_split(
    layer: nn.Linear | Convolution, group: Group, scatters: bool = True, units: int | None = None
) -> None:
    """Splits a layer by its inputs. With `scatters=False` a rank's input is its own part already.

    A convolution has one group. `units` says how many units the input has where that is not its features or maps.
    """
    sharded: Any = layer
    features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    units = features if units is None else units
    sharded.__class__ = _BY_INPUT[type(layer)]
    sharded.group, sharded.scatters = group, scatters
    sharded.input_sizes = part_sizes(features, units, group.size)
    _cut_parameter(layer, "weight", 1, units, group)


# --------------------------------------------------------------------------------------------------- random numbers


@contextmanager
def part_random(group: Group, device: torch.device) -> Iterator[None]:
    """Inside, each rank draws random numbers of its own, as dropout on parts must; outside, all draw the same.

    The rank's numbers follow from the common state, so that nothing new has to be seeded or saved. The common state
    moves on if a number has been drawn: without dropout the sequence stays that of one process.
    """
    generator = _generator(device)
    common = generator.get_state()
    digest = hashlib.blake2b(common.numpy().tobytes(), digest_size=8, salt=group.rank.to_bytes(8, "big"))
    generator.manual_seed(int.from_bytes(digest.digest(), "big"))
    own = generator.get_state()
    try:
        yield
    finally:
        drawn = not torch.equal(generator.get_state(), own)
        generator.set_state(common)
        if drawn:
            torch.rand(1, generator=generator, device=generator.device)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


class DropoutOfPart(nn.Dropout):
    """`nn.Dropout` between the two layers of a pair, where each rank has its own part of the activations."""

    group: Group

    def forward(self, input: Tensor) -> Tensor:
        with part_random(self.group, input.device):
            return super().forward(input)


def apply_dropout_split(dropout: nn.Dropout, group: Group) -> None:
    """Lets the ranks drop different activations."""
    sharded: Any = dropout
    sharded.__class__ = DropoutOfPart
    sharded.group = group


# --------------------------------------------------------------------------------------------------- attention heads


class AttentionByHeads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` of which each rank computes its own heads.

    In-projection weight `(3 × part of embed_dim, embed_dim)`, in-projection bias `(3 × part of embed_dim,)`, out
    projection `(embed_dim, part of embed_dim)` with its bias whole. Arguments and results are torch's.
    """

    group: Group
    part_heads: tuple[int, ...]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        example_dim = None if query.dim() == 2 else 0 if self.batch_first else 1
        # One exchange for a tensor that comes as two or three of the arguments.
        copies = {id(tensor): copy_to_group(tensor, self.group) for tensor in (query, key, value)}
        q, k, v = self._own_heads([copies[id(tensor)] for tensor in (query, key, value)], example_dim)
        mask = self._mask(attn_mask, key_padding_mask, query.dtype)
        with part_random(self.group, query.device):
            context, weights = _attend(q, k, v, mask, self.dropout if self.training else 0.0, need_weights)
        context = context.transpose(1, 2).flatten(2)
        output = self.out_proj(context.squeeze(0) if example_dim is None else context.movedim(0, example_dim))
        if weights is None:
            return output, None
        weights = self._whole_weights(weights, average_attn_weights)
        return output, weights.squeeze(0) if example_dim is None else weights

    def _own_heads(self, inputs: list[Tensor], example_dim: int | None) -> list[Tensor]:
        """Query, key and value of this rank's heads, each `(examples, heads, tokens, head_dim)`."""
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = map(F.linear, inputs, self.in_proj_weight.chunk(3), biases)
        examples = (x.unsqueeze(0) if example_dim is None else x.movedim(example_dim, 0) for x in projected)
        return [x.unflatten(-1, (self.part_heads[self.group.rank], self.head_dim)).transpose(1, 2) for x in examples]

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of this rank's heads, broadcastable to `(examples, heads, tokens, keys)`."""
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            if mask.dim() == 3:
                of_heads = mask.unflatten(0, (-1, self.num_heads))
                mask = scatter_to_group(of_heads, 1, self.part_heads, self.group)
            masks.append(mask)
        if key_padding_mask is not None:
            masks.append(_additive(torch.atleast_2d(key_padding_mask), dtype)[:, None, None, :])
        return sum(masks[1:], masks[0]) if masks else None

    def _whole_weights(self, weights: Tensor, average: bool) -> Tensor:
        if average:
            return reduce_from_group(weights.sum(1), self.group) / self.num_heads
        return gather_from_group(weights, 1, self.part_heads, self.group)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans, true where attention is forbidden, as 0 and −∞; others as they are."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), and its weights where they are asked for."""
    if not need_weights:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout), None
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout)
    return weights @ value, weights


def is_torch_attention(module: nn.Module) -> bool:
    """Whether it is torch's own attention with query, key and value projected by one weight, and nothing else."""
    return (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


def is_stacked_attention(module: nn.Module) -> bool:
    """Whether it is an attention module by the convention of `qkv`, `proj` and `num_heads`.

    `qkv` is a linear layer from the width to three times the width, stacked as query, key and value; `proj` one from
    width to width; the module splits `qkv(x).chunk(3, -1)` into `num_heads` heads, whose size it takes from the
    channels, and gives `proj` the heads' results side by side.
    """
    qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if type(qkv) is not nn.Linear or type(proj) is not nn.Linear or not isinstance(heads, int):
        return False
    width = proj.in_features
    return qkv.out_features == 3 * width and width % heads == 0


def apply_head_split(attention: nn.Module, group: Group) -> None:
    """Splits an attention module that is one of the two kinds above by its heads."""
    if is_torch_attention(attention):
        _apply_torch_head_split(attention, group)
    else:
        _apply_stacked_head_split(attention, group)


def _apply_torch_head_split(attention: Any, group: Group) -> None:
    heads = attention.num_heads
    attention.__class__ = AttentionByHeads
    attention.group, attention.part_heads = group, part_sizes(heads, heads, group.size)
    for name in ("in_proj_weight", "in_proj_bias"):
        _cut_parameter(attention, name, 0, heads, group, stacked=3)
    apply_input_split(attention.out_proj, group, scatters=False, units=heads)


def _apply_stacked_head_split(attention: Any, group: Group) -> None:
    heads = attention.num_heads
    attention.num_heads = part_sizes(heads, heads, group.size)[group.rank]
    apply_output_split(attention.qkv, group, gathers=False, units=heads, stacked=3)
    apply_input_split(attention.proj, group, scatters=False, units=heads)
    # What the module does between the two is its own affair; there its dropout acts on the rank's heads.
    between = ExitStack()

    def begin(_module: nn.Module, _args: Any, output: Tensor) -> None:
        between.enter_context(part_random(group, output.device))

    def end(_module: nn.Module, _args: Any) -> None:
        between.close()

    attention.qkv.register_forward_hook(begin)
    attention.proj.register_forward_pre_hook(end)
