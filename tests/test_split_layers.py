"""Exchanges and sharded layers on 2, 3 and 4 ranks against what one process computes, over drawn shapes."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distributed import run_distributed
from temper.models.gpt import CausalSelfAttention
from temper.parallel.collectives import copy_to_group, gather_from_group, reduce_from_group, scatter_to_group
from temper.parallel.cut import cut_of
from temper.parallel.groups import Group
from temper.parallel.layers import apply_head_split, apply_input_split, apply_output_split, part_random, part_sizes

SIZES = (2, 3, 4)
# Errors relative to the largest expected value. The low precisions round their terms before these are summed.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


# ---------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """A layer of `size` ranks, inputs of these shapes, and how it is called."""

    size: int
    build: functools.partial[nn.Module]
    split: str
    shapes: tuple[tuple[int, ...], ...]
    call: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float64
    channels_last: bool = False


SPLITS = {"output": apply_output_split, "input": apply_input_split, "heads": apply_head_split}
DTYPES = st.sampled_from([torch.float64] * 3 + [torch.float32, torch.bfloat16, torch.float16])


@st.composite
def linear_cases(draw: st.DrawFn) -> Case:
    size, split = draw(st.sampled_from(SIZES)), draw(st.sampled_from(["output", "input"]))
    features = {"in": draw(st.integers(1, 9)), "out": draw(st.integers(1, 9))}
    features[split.removesuffix("put")] += size - 1  # at least one for each rank
    build = functools.partial(nn.Linear, features["in"], features["out"], bias=draw(st.booleans()))
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    return Case(size, build, split, ((*leading, features["in"]),), dtype=draw(DTYPES))


@st.composite
def convolution_cases(draw: st.DrawFn) -> Case:
    size, split, dims = (
        draw(st.sampled_from(SIZES)),
        draw(st.sampled_from(["output", "input"])),
        draw(st.integers(1, 2)),
    )
    groups = draw(st.sampled_from([1, 1, size, size + 1])) if split == "output" else 1
    maps = {"in": draw(st.integers(1, 3)) * groups, "out": draw(st.integers(1, 3)) * groups}
    if groups == 1:
        maps[split.removesuffix("put")] += size - 1
    each = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.tuples(*[st.integers(0, 2)] * dims), st.just("valid")))
    if set(stride) == {1}:
        padding = draw(st.sampled_from([padding, "same"]))
    # Room for one output, and for reflected pixels.
    spatial = [reach * (width - 1) + 1 + draw(st.integers(2, 5)) for reach, width in zip(dilation, kernel, strict=True)]
    build = functools.partial(
        (nn.Conv1d, nn.Conv2d)[dims - 1],
        *(maps["in"], maps["out"], kernel, stride, padding, dilation, groups),
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    channels_last = dims == 2 and len(batch) == 1 and draw(st.booleans())
    return Case(size, build, split, ((*batch, maps["in"], *spatial),), dtype=draw(DTYPES), channels_last=channels_last)


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    """Torch's attention with every way to call it. Masks leave the first key free, so that no weight is 0/0."""
    size = draw(st.sampled_from(SIZES))
    heads, head_dim = draw(st.integers(size, size + 2)), draw(st.integers(1, 3))
    width, batched, batch_first = heads * head_dim, draw(st.booleans()), draw(st.booleans())
    examples, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    keys = draw(st.one_of(st.just(tokens), st.integers(1, 4)))
    of = functools.partial(_sequence_shape, batch_first=batch_first, batched=batched, examples=examples, width=width)
    # One tensor for all three, one for key and value, or three.
    shapes = (of(tokens), of(keys), of(keys)) if keys != tokens else (of(tokens),) * draw(st.sampled_from([1, 2, 3]))
    mask_shapes = [None, (tokens, keys), ((examples if batched else 1) * heads, tokens, keys)]
    call = {
        "attn_mask": draw(st.sampled_from(mask_shapes)),
        "key_padding_mask": draw(st.sampled_from([None, (examples, keys) if batched else (keys,)])),
        "float_masks": draw(st.booleans()),
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
    }
    build = functools.partial(nn.MultiheadAttention, width, heads, bias=draw(st.booleans()), batch_first=batch_first)
    return Case(size, build, "heads", shapes, tuple(call.items()))


def _sequence_shape(tokens: int, *, batch_first: bool, batched: bool, examples: int, width: int) -> tuple[int, ...]:
    if not batched:
        return (tokens, width)
    return (examples, tokens, width) if batch_first else (tokens, examples, width)


@st.composite
def stacked_attention_cases(draw: st.DrawFn) -> Case:
    size = draw(st.sampled_from(SIZES))
    heads = draw(st.integers(size, size + 2))
    width = heads * draw(st.integers(1, 3))
    build = functools.partial(build_stacked_attention, width, heads, draw(st.booleans()))
    return Case(size, build, "heads", ((draw(st.integers(1, 2)), draw(st.integers(1, 4)), width),))


def build_stacked_attention(width: int, heads: int, bias: bool) -> nn.Module:
    module = CausalSelfAttention(width, heads, dropout=0.0)
    if not bias:
        module.qkv.bias = module.proj.bias = None
    return module


def drawn(cases: st.SearchStrategy[Case], count: int) -> list[Case]:
    """The same cases at every run."""
    collected: list[Case] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def collect(case: Case) -> None:
        collected.append(case)

    collect()
    return collected


# ------------------------------------------------------------------------------------------------------- one case


def run(module: nn.Module, case: Case) -> dict[str, Tensor]:
    """Outputs, and the gradients of inputs and parameters for a loss that weighs every output differently."""
    generator = torch.Generator().manual_seed(5)
    inputs = [draw_tensor(generator, shape, case) for shape in case.shapes]
    outputs = call(module, inputs, case, generator)
    loss = sum(
        (output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
        for output in outputs
    )
    loss.backward()
    gradients = {f"gradient of input {index}": tensor.grad for index, tensor in enumerate(inputs)}
    gradients |= {name: param.grad for name, param in module.named_parameters()}
    return {f"output {index}": output.detach() for index, output in enumerate(outputs)} | gradients


def draw_tensor(generator: torch.Generator, shape: tuple[int, ...], case: Case) -> Tensor:
    tensor = torch.randn(shape, generator=generator).to(case.dtype)
    if case.channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_()


def call(module: nn.Module, inputs: list[Tensor], case: Case, generator: torch.Generator) -> list[Tensor]:
    if not isinstance(module, nn.MultiheadAttention):
        return [module(*inputs)]
    arguments = dict(case.call)
    as_floats = arguments.pop("float_masks")
    for name in ("attn_mask", "key_padding_mask"):
        if arguments[name] is not None:
            forbidden = torch.rand(arguments[name], generator=generator) < 0.4
            forbidden[..., 0] = False
            arguments[name] = forbidden.to(case.dtype) * -3 if as_floats else forbidden
    query, key, value = [*inputs, *[inputs[-1]] * (3 - len(inputs))]
    return [output for output in module(query, key, value, **arguments) if output is not None]


def check(case: Case, group: Group) -> None:
    torch.manual_seed(0)
    whole = case.build().to(case.dtype)
    sharded = copy.deepcopy(whole)
    SPLITS[case.split](sharded, group)
    expected, found = run(whole, case), run(sharded, case)
    cuts = {name: cut_of(param) for name, param in sharded.named_parameters()}
    assert list(found) == list(expected)
    assert any(cuts.values())
    for name, value in expected.items():
        cut = cuts.get(name)
        close(found[name], value if cut is None else cut.take(value), TOLERANCES[case.dtype], name)
        if cut is None:
            assert_same_on_all(found[name], group, name)
        if name.startswith("output"):
            assert found[name].is_contiguous() or not value.is_contiguous()
    output = expected["output 0"]
    # A part of one map is in both formats.
    if (
        case.channels_last
        and output.is_contiguous(memory_format=torch.channels_last)
        and output.shape[1] >= 2 * case.size
    ):
        assert found["output 0"].is_contiguous(memory_format=torch.channels_last)


def close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(scale, 1.0), msg=lambda text: f"{name}: {text}"
    )


def assert_same_on_all(tensor: Tensor, group: Group, name: str) -> None:
    """Bit for bit: a difference would stay in the replicated weights and grow."""
    tensor = tensor.contiguous()
    others = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(others, tensor, group=group.process_group)
    assert all(torch.equal(other, tensor) for other in others), f"{name} differs between ranks"


# -------------------------------------------------------------------------------------------------------- the ranks


def run_all(rank: int, cases: list[Case]) -> int:
    """Every case on its ranks; gives the number of cases this rank took part in."""
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    for size in SIZES:
        if rank < size:
            group = Group(rank, size, groups[size])
            for dtype in TOLERANCES:
                check_collectives(group, dtype)
            check_random_numbers(group)
    taken = [case for case in cases if rank < case.size]
    for case in taken:
        try:
            check(case, Group(rank, case.size, groups[case.size]))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    return len(taken)


def check_collectives(group: Group, dtype: torch.dtype) -> None:
    """Each exchange and its transpose on small whole numbers, which every dtype holds, contiguous or not."""
    whole = torch.arange(2.0 * 7 * 3).view(2, 7, 3).to(dtype)
    sizes = part_sizes(7, 7, group.size)
    start = sum(sizes[: group.rank])
    own = whole[:, start : start + sizes[group.rank]]
    total = sum(range(1, group.size + 1))
    for leaf in (contiguous_leaf, permuted_leaf):
        x = leaf(whole)
        assert_exchange(copy_to_group(x, group), x, whole, (group.rank + 1) * whole, total * whole)
        x = leaf(whole)
        assert_exchange(scatter_to_group(x, 1, sizes, group), x, own, own, whole)
        x = leaf((group.rank + 1) * whole)
        assert_exchange(reduce_from_group(x, group), x, total * whole, whole, whole)
        x = leaf(own)
        assert_exchange(gather_from_group(x, -2, sizes, group), x, whole, whole, own)


def contiguous_leaf(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).requires_grad_()


def permuted_leaf(tensor: Tensor) -> Tensor:
    """The same values, laid out with the first dim last."""
    return tensor.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0).requires_grad_()


def assert_exchange(output: Tensor, input: Tensor, expected: Tensor, grad: Tensor, expected_grad: Tensor) -> None:
    assert torch.equal(output, expected)
    output.backward(permuted_leaf(grad).detach())
    assert torch.equal(input.grad, expected_grad)
    assert output.dtype == input.grad.dtype == input.dtype


def check_random_numbers(group: Group) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with part_random(group, torch.device("cpu")):
        pass
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn"
    with part_random(group, torch.device("cpu")):
        own = torch.rand(8)
    others = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(others, own, group=group.process_group)
    assert len({tuple(other.tolist()) for other in others}) == group.size, "each rank draws its own"
    after = torch.rand(8)
    assert_same_on_all(after, group, "the common numbers")
    torch.manual_seed(3)
    assert not torch.equal(torch.rand(8), after), "the common state has moved on"
    torch.manual_seed(3)
    with part_random(group, torch.device("cpu")):
        assert torch.equal(torch.rand(8), own), "the same state gives the same numbers"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [
        *drawn(linear_cases(), 60),
        *drawn(convolution_cases(), 120),
        *drawn(attention_cases(), 60),
        *drawn(stacked_attention_cases(), 20),
    ]


def test_every_layer_equals_its_unsharded_twin(cases: list[Case]) -> None:
    taken = run_distributed(run_all, max(SIZES), cases)
    assert taken == [sum(rank < case.size for case in cases) for rank in range(max(SIZES))]


def test_the_drawn_cases_cover_what_they_should(cases: list[Case]) -> None:
    """Guards the test itself: no draw may shrink to the easy cases."""
    modules = [case.build() for case in cases]
    convolutions = [module for module in modules if isinstance(module, nn.Conv1d | nn.Conv2d)]
    assert {case.size for case in cases} == set(SIZES)
    assert {case.dtype for case in cases} == set(TOLERANCES)
    assert {module.padding_mode for module in convolutions} == {"zeros", "reflect", "replicate", "circular"}
    assert {type(module) for module in convolutions} == {nn.Conv1d, nn.Conv2d}
    assert any(module.groups == module.in_channels > 1 for module in convolutions), "depthwise"
    assert any(1 < module.groups < module.in_channels for module in convolutions)
    assert any(max(module.stride) > 1 and max(module.dilation) > 1 for module in convolutions)
    assert any(case.channels_last for case in cases)
    uneven = [case for case in cases if case.split == "output" and case.build().weight.shape[0] % case.size]
    assert len(uneven) > 10
    assert any(
        module.in_proj_bias is None and len(case.shapes) == 3 and dict(case.call)["attn_mask"] is not None
        for module, case in zip(modules, cases, strict=True)
        if isinstance(module, nn.MultiheadAttention)
    )


def test_one_rank_alone_is_the_plain_layer(cases: list[Case]) -> None:
    """Without a process group; a group of one exchanges nothing."""
    for case in [replace(case, size=1) for case in cases[::10]]:
        torch.manual_seed(0)
        whole = case.build().to(case.dtype)
        alone = copy.deepcopy(whole)
        SPLITS[case.split](alone, Group())
        expected = run(whole, case)
        for name, value in run(alone, case).items():
            close(value, expected[name], TOLERANCES[case.dtype], name)
