"""Accumulation in fp32 and without: torch's CPU kernels, the emulation against torch, and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from distributed import run_distributed
from temper.errors import RunError
from temper.precision.accumulation import arithmetic
from temper.precision.cpu_kernels import widen_cpu_kernels
from temper.precision.narrow import NarrowAccumulation
from temper.precision.sums import narrow_mean, narrow_product, narrow_sum, round_to

CPU = torch.device("cpu")
LOW = (torch.float16, torch.bfloat16)
Function = Callable[..., Tensor]


def outputs_and_grads(function: Function, inputs: list[Tensor], mode: AbstractContextManager[Any]) -> list[Tensor]:
    """The output and the gradients by every input, for one fixed gradient of the output."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    with mode:
        output = function(*leaves)
        seed = torch.rand(output.shape, generator=torch.Generator().manual_seed(3))
        # Numbers that every precision has.
        grads = torch.autograd.grad(output, leaves, seed.to(torch.bfloat16).to(output.dtype))
    return [output.detach(), *grads]


def cases() -> Iterator[Any]:
    """Every kind of operator with sums in it: name, function, inputs in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.randint(0, 4, (4096,), generator=generator)
    image = draw(8, 6, 9, 10)
    yield "linear", F.linear, [draw(2, 40, 33), draw(5, 33), draw(5)]
    yield "bmm", torch.matmul, [draw(3, 4, 40), draw(3, 40, 5)]
    yield "conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=2, dilation=2), [draw(4, 6, 20), draw(4, 6, 3), draw(4)]
    yield "conv2d", lambda x, w, b: F.conv2d(x, w, b, padding=1), [image, draw(4, 6, 3, 3), draw(4)]
    yield "conv2d strided", lambda x, w: F.conv2d(x, w, stride=(2, 3), padding=(2, 0)), [image, draw(4, 6, 5, 2)]
    yield "conv2d grouped", lambda x, w, b: F.conv2d(x, w, b, groups=3), [image, draw(9, 2, 2, 2), draw(9)]
    yield "conv3d", lambda x, w: F.conv3d(x, w, padding=1), [draw(2, 3, 5, 5, 5), draw(4, 3, 2, 3, 3)]
    yield "layer norm", lambda x, w, b: F.layer_norm(x, (33,), w, b), [draw(200, 33), draw(33), draw(33)]
    yield "group norm", lambda x, w, b: F.group_norm(x, 3, w, b), [image, draw(6), draw(6)]
    yield "batch norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [image, draw(6), draw(6)]
    yield "softmax", lambda x: x.softmax(1), [draw(5, 40)]
    yield "log softmax", lambda x: x.log_softmax(0), [draw(40, 5)]
    yield "sums", lambda x, b: (x + b).sum(0) + (x * b).mean(dim=0), [draw(300, 4), draw(4)]
    yield (
        "variance",
        lambda x: torch.cat([*torch.var_mean(x, [0, 2], correction=0), x.var(0).flatten()]),
        [draw(40, 3, 4)],
    )
    yield "cross entropy", lambda x: F.cross_entropy(x.float(), tokens[:300], label_smoothing=0.1), [draw(300, 4)]
    yield "mse", lambda x: F.mse_loss(x, torch.zeros_like(x)), [draw(300, 4)]
    yield "attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [draw(2, 2, 24, 8)] * 3
    yield "gru", run_gru, [draw(5, 3, 4), *(draw(*param.shape) * 0.5 for param in nn.GRU(4, 3).parameters())]
    yield "embedding", lambda w: F.embedding(tokens, w), [draw(4, 16)]
    yield "indexing", lambda w: w[tokens], [draw(4, 16)]
    yield "average pooling", lambda x: F.avg_pool2d(x, 3, 1), [image]
    yield "max pooling", lambda x: F.max_pool2d(x, 3, 1), [image]


def run_gru(x: Tensor, *weights: Tensor) -> Tensor:
    return torch.gru(x, x.new_zeros(1, x.shape[1], 3), weights, True, 1, 0.0, True, False, False)[0]


CASES = {name: (function, inputs) for name, function, inputs in cases()}


# ------------------------------------------------------------------------------------------------- fp32 accumulation

EXACT = sorted(set(CASES) - {"softmax", "log softmax", "attention", "gru", "variance", "cross entropy", "mse", "sums"})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_sums_are_as_good_as_their_rounding(name: str, dtype: torch.dtype) -> None:
    """Forward and backward differ from float64 by no more than rounding the exact result would."""
    function, inputs = CASES[name]
    low = [value.abs().to(dtype) for value in inputs]
    found = outputs_and_grads(function, low, arithmetic(dtype, CPU, True)())
    exact = outputs_and_grads(function, [value.double() for value in low], nullcontext())
    for value, expected in zip(found, exact, strict=True):
        assert value.dtype == dtype
        rounding = (expected.to(dtype).double() - expected).norm()
        assert (value.double() - expected).norm() <= 1.05 * rounding + 1e-12


def fp32_results() -> dict[str, list[Tensor]]:
    names = ("conv2d", "layer norm", "embedding", "indexing", "max pooling")
    return {
        name: outputs_and_grads(CASES[name][0], [value.float() for value in CASES[name][1]], nullcontext())
        for name in names
    }


def equal(values: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(value, other) for value, other in zip(values, others, strict=True))


def torch_alone(rank: int) -> tuple[dict[str, float], list[str]]:
    """In a process of its own, whose kernels nobody has replaced yet: errors as multiples of those of one rounding, and
    what replacing the kernels changes in fp32."""
    errors = {}
    for name in ("layer norm", "embedding", "indexing"):
        function, inputs = CASES[name]
        low = [value.abs().to(torch.bfloat16) for value in inputs]
        *_, grad = outputs_and_grads(function, low, nullcontext())
        *_, exact = outputs_and_grads(function, [value.double() for value in low], nullcontext())
        rounding = (exact.to(torch.bfloat16).double() - exact).norm()
        errors[name] = float((grad.double() - exact).norm() / rounding)
    before = fp32_results()
    widen_cpu_kernels()
    return errors, [name for name, values in fp32_results().items() if not equal(values, before[name])]


def test_torch_alone_adds_in_the_low_precision() -> None:
    """Else the test above would say nothing. In fp32 the new kernels are the old ones."""
    [(errors, changed)] = run_distributed(torch_alone, 1)
    assert all(error > 3 for error in errors.values()), errors
    assert errors["embedding"] > 100
    assert changed == []


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_forward_kernels_add_in_fp32(dtype: torch.dtype) -> None:
    ones, small = torch.ones(4, 16384, dtype=dtype), torch.full((16384, 4), 2.0**-6, dtype=dtype)
    assert torch.equal(ones @ small, torch.full((4, 4), 256.0, dtype=dtype))
    assert torch.equal(small.sum(0), torch.full((4,), 256.0, dtype=dtype))
    assert torch.equal(small.mean(0), torch.full((4,), 2.0**-6, dtype=dtype))
    assert float(small.flatten().norm()) == 4.0


# ------------------------------------------------------------------------------------------------------- without it


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_emulation_in_fp32_is_torch(name: str) -> None:
    """With partial sums rounded to fp32, which rounds nothing, all formulas must give what torch gives."""
    function, inputs = CASES[name]
    inputs = [value.float() for value in inputs]
    found = outputs_and_grads(function, inputs, NarrowAccumulation(torch.float32))
    for value, expected in zip(found, outputs_and_grads(function, inputs, nullcontext()), strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_convolutions_of_any_shape(data: st.DataObject) -> None:
    dims, groups = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2]))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    stride, padding, dilation = (
        data.draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))
        for low, high in ((1, 3), (0, 2), (1, 2))
    )
    size = data.draw(st.lists(st.integers(5, 8), min_size=dims, max_size=dims))
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2 * groups, *size), torch.randn(3 * groups, 2, *kernel), torch.randn(3 * groups)]
    convolve = F.conv1d if dims == 1 else F.conv2d

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve(x, weight, bias, stride, padding, dilation, groups)

    found = outputs_and_grads(function, inputs, NarrowAccumulation(torch.float32))
    for value, expected in zip(found, outputs_and_grads(function, inputs, nullcontext()), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_a_chain_of_multiply_adds_stalls() -> None:
    """4096 × 2⁻⁶ is 64; adding one by one in fp16, 32 + 2⁻⁶ is 32 again."""
    ones, small = torch.ones(1, 4096), torch.full((4096, 1), 2.0**-6)
    assert narrow_product(ones, small, torch.float16, group=1).item() == 32.0
    # Sixteen at a time: 2⁻² is lost on an accumulator of 512 only, and of 65536 terms half are.
    assert narrow_product(ones, small, torch.float16).item() == 64.0
    assert narrow_product(ones.repeat(1, 16), small.repeat(16, 1), torch.float16).item() == 512.0
    assert narrow_product(ones, small, torch.bfloat16).item() == 64.0
    assert narrow_product(ones.repeat(1, 2), small.repeat(2, 1), torch.bfloat16).item() == 64.0


def test_a_tree_does_not_stall_and_overflows() -> None:
    assert narrow_sum(torch.full((65536,), 2.0**-6), torch.float16).item() == 1024.0
    # A mean needs the sum, and fp16 ends at 65504: in fp32 this is 1.
    assert narrow_mean(torch.ones(65536), torch.float16).item() == float("inf")
    # No accumulator is needed for sixteen terms, as in counts of examples over the ranks.
    assert narrow_sum(torch.tensor([100_000.0, 100_000.0]), torch.float16).item() == 200_000.0


def test_rounding_has_the_values_of_the_low_precision() -> None:
    assert round_to(torch.tensor([2049.0, 1e-8, 70000.0]), torch.float16).tolist() == [2048.0, 0.0, float("inf")]
    assert round_to(torch.tensor([257.0]), torch.bfloat16).tolist() == [256.0]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["linear", "conv2d", "layer norm", "batch norm", "softmax", "gru"])
def test_results_have_the_low_precision_and_its_error(name: str, dtype: torch.dtype) -> None:
    """Worse than one rounding, and still near: within 30 units of the last place in norm."""
    function, inputs = CASES[name]
    low = [value.to(dtype) for value in inputs]
    found = outputs_and_grads(function, low, arithmetic(dtype, CPU, False)())
    exact = outputs_and_grads(function, [value.double() for value in low], nullcontext())
    errors = [float((value.double() - right).norm() / right.norm()) for value, right in zip(found, exact, strict=True)]
    assert all(value.dtype == dtype for value in found)
    assert max(errors) < 30 * torch.finfo(dtype).eps


def test_it_reaches_fp32_tensors_too() -> None:
    """A loss computes in fp32, and that is what the ablation takes away: the mean of 70,000 losses of 1 overflows."""
    with arithmetic(torch.float16, CPU, False)():
        loss = F.mse_loss(torch.ones(70_000), torch.zeros(70_000))
    assert loss.dtype == torch.float32
    assert loss.item() == float("inf")
    assert F.mse_loss(torch.ones(70_000), torch.zeros(70_000)).item() == 1.0


def test_integers_and_doubles_are_left_alone() -> None:
    with NarrowAccumulation(torch.float16):
        assert torch.arange(1000).sum().item() == 499_500
        assert torch.full((100_000,), 1.0, dtype=torch.float64).sum().item() == 100_000.0


def test_a_transposed_convolution_is_refused() -> None:
    with NarrowAccumulation(torch.float16), pytest.raises(RunError, match=r"fp32_accumulation.*transposed"):
        F.conv_transpose2d(torch.ones(1, 2, 4, 4), torch.ones(2, 3, 2, 2))
