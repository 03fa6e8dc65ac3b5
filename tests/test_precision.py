"""The parts of mixed precision alone: master weights, twins, underflow, where a step went non-finite, TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from temper.errors import RunError
from temper.plan.precision import check_precision_device, local_capability
from temper.precision.device import apply_product_precision
from temper.precision.masters import drop_master_weights, round_weights
from temper.precision.non_finite import first_non_finite
from temper.precision.twin import build_twin, gathered_weights, skeleton_of
from temper.precision.underflow import Flushed, count_flushed
from temper.precision.watch import Observation, WatchedStep, unwatched, watch_skips

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# --------------------------------------------------------------------------------------------------- master weights


@pytest.mark.parametrize(("dtype", "update"), [(torch.float16, 2.0**-12), (torch.bfloat16, 2.0**-9)], ids=str)
def test_an_update_below_half_an_ulp_is_kept_by_masters_alone(dtype: torch.dtype, update: float) -> None:
    """1 + 2⁻¹² in fp16 is 1, a hundred times over; the sum of the hundred is not."""
    kept, lost = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with_masters, without = (torch.optim.SGD([weight], lr=1.0) for weight in (kept, lost))
    drop_master_weights(without, dtype)
    for _ in range(100):
        for weight, optimizer in ((kept, with_masters), (lost, without)):
            weight.grad = torch.full((3,), -update)
            optimizer.step()
    assert kept.tolist() == [1 + 100 * update] * 3
    assert lost.tolist() == [1.0] * 3


def test_weights_are_rounded_to_the_nearest() -> None:
    weights = nn.Parameter(torch.tensor([2048.0, 2049.0, 2051.0, 1e-8, 0.1]))
    round_weights(torch.optim.SGD([weights], lr=1.0), torch.float16)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [2048.0, 2048.0, 2052.0, 0.0, 0.0999755859375]


# ------------------------------------------------------------------------------------------------------------- twins


class Tied(nn.Module):
    """One matrix as first and last layer, a frozen scale, a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("offset", torch.arange(5.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens)) * self.scale + self.offset


def test_a_twin_computes_what_the_model_does_and_shares_nothing() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.tensor([0, 3, 4])
    skeleton = skeleton_of(model)
    assert {value.device.type for value in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    twin = build_twin(skeleton, weights, dict(model.named_buffers()))
    assert torch.equal(twin(tokens), model(tokens))
    assert twin.head.weight is twin.embedding.weight
    assert [name for name, param in twin.named_parameters() if not param.requires_grad] == ["scale"]
    twin.offset.zero_()
    twin(tokens).sum().backward()
    assert model.offset.tolist() == [0, 1, 2, 3, 4]
    assert model.head.weight.grad is None
    assert model.embedding.weight.device == CPU


def test_a_twin_trains_whatever_the_model_was_doing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    twin = build_twin(skeleton_of(model), dict(model.named_parameters()), {})
    assert twin.training
    assert twin[1].training


def test_weights_are_gathered_from_their_ranges() -> None:
    class Range:
        def __init__(self, name: str, start: int, values: list[float]) -> None:
            self.name, self.start, self.master = name, start, torch.tensor(values)

    ranges = [Range("b", 0, [7.0]), Range("a", 2, [3.0, 2049.0]), Range("a", 0, [1.0, 2.0])]
    found = gathered_weights(ranges, {"a": (2, 2), "b": (1,)}, torch.float16, CPU, None)
    assert {name: value.tolist() for name, value in found.items()} == {"a": [[1, 2], [3, 2048]], "b": [7]}
    assert found["a"].dtype == torch.float16


# --------------------------------------------------------------------------------------------------------- underflow


class Weighted(nn.Module):
    """Its loss has the gradient `slopes`, whatever the weights."""

    def __init__(self, dtype: torch.dtype, slopes: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(slopes), dtype=dtype))
        self.other = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.unused = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.slopes = slopes

    def forward(self) -> Tensor:
        # In fp32, so that a slope reaches the weight's gradient as the loss scale makes it.
        return (self.weight.float() * torch.tensor(self.slopes)).sum() + self.other.float().sum()


@pytest.mark.parametrize(
    ("power", "zeros"),
    # fp16 ends at 2⁻²⁴; half of that rounds to zero.
    [(0, 3), (1, 2), (6, 1), (16, 0)],
)
def test_flushed_gradients_are_counted(power: int, zeros: int) -> None:
    slopes = [1.0, 2.0**-24, 2.0**-25, 2.0**-30, 2.0**-40, 0.0]

    def backward(twin: nn.Module, dtype: torch.dtype) -> None:
        (twin() * 2.0**power).backward()

    flushed = count_flushed(lambda dtype: Weighted(dtype, slopes), backward)
    assert flushed == Flushed({"weight": zeros, "other": 0, "unused": 0}, {"weight": 6, "other": 2, "unused": 2})
    expected = {"precision/underflow": zeros / 10}
    assert flushed.metrics() == expected | ({"precision/underflow/weight": zeros / 6} if zeros else {})


def test_only_the_worst_parameters_are_named() -> None:
    names = [f"layer{index}" for index in range(30)]
    flushed = Flushed({name: index for index, name in enumerate(names)}, dict.fromkeys(names, 100))
    metrics = flushed.metrics()
    assert metrics.pop("precision/underflow") == sum(range(30)) / 3000
    assert list(metrics) == [f"precision/underflow/layer{index}" for index in range(29, 9, -1)]
    assert metrics["precision/underflow/layer29"] == 0.29


# -------------------------------------------------------------------------------------------------------- non-finite


class Times(nn.Module):
    """Multiplies activations by one number and their gradients by another."""

    def __init__(self, forward: float = 1.0, backward: float = 1.0) -> None:
        super().__init__()
        self.factors = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        forward, backward = self.factors
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda grad: grad * backward)
        return x * forward


def network(**parts: nn.Module) -> nn.Module:
    """first → relu → inner.gate → inner.last, any of them replaced."""
    torch.manual_seed(0)
    model = nn.Sequential()
    inner = nn.Sequential()
    inner.add_module("gate", parts.get("gate", nn.Identity()))
    inner.add_module("last", parts.get("last", nn.Linear(4, 3)))
    for name, module in {"first": nn.Linear(2, 4), "relu": nn.ReLU(inplace=True), "inner": inner}.items():
        model.add_module(name, module)
    nn.init.ones_(model.first.weight)
    return model.half()


def squares(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"squares": outputs.float().square().mean(), "none": outputs.float().mean() * 0}


def batches(*values: float) -> Iterator[tuple[Tensor, Tensor]]:
    for value in values:
        yield torch.full((3, 2), value, dtype=torch.float16), torch.zeros(3)


INF = float("inf")
Loss = Callable[[Any, Tensor], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("model", "values", "factor", "place"),
    [
        (network(), (1.0, 1.0), 1.0, None),
        (network(gate=Times(forward=INF)), (1.0,), 1.0, "first non-finite output in inner.gate"),
        # 60000 + 60000 is no fp16 number; only the second micro-batch is that large.
        (network(), (1.0, 60000.0), 1.0, "first non-finite output in first"),
        (network(), (1.0, INF), 1.0, "non-finite values in the inputs"),
        (network(gate=Times(backward=INF)), (1.0,), 1.0, "first non-finite gradient in relu (its output)"),
        (network(), (1.0,), 2.0**30, "first non-finite gradient in inner.last (its output)"),
    ],
)
def test_the_first_module_is_named(
    model: nn.Module, values: tuple[float, ...], factor: float, place: str | None
) -> None:
    assert first_non_finite(model, squares, batches(*values), factor, None) == place


def test_a_loss_of_finite_outputs_may_be_to_blame() -> None:
    def logarithm(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"log": (outputs.float() * 0).log().mean()}

    assert first_non_finite(network(), logarithm, batches(1.0), 1.0, None) == "non-finite loss of finite outputs"


def test_a_sum_over_micro_batches_may_be_to_blame() -> None:
    """Each micro-batch's gradient of the weight, 40000, is an fp16 number, and their sum is not."""
    model = nn.Linear(1, 1, bias=False).half()
    ones = [(torch.ones(1, 1, dtype=torch.float16), torch.zeros(1))]

    def mean(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"mean": outputs.float().mean()}

    assert first_non_finite(model, mean, ones, 40000.0, None) is None
    model.weight.grad = None
    assert first_non_finite(model, mean, ones * 2, 40000.0, None) == "first non-finite gradient in the model (weight)"


def test_hooks_are_gone_afterwards() -> None:
    model = network()
    first_non_finite(model, squares, batches(1.0), 1.0, None)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_what_is_said_where_no_rank_has_the_model() -> None:
    inputs = torch.zeros(1)
    skipped = WatchedStep(3, inputs, inputs, 0, applied=False, loss_scale=512.0)
    applied = WatchedStep(3, inputs, inputs, 0, applied=True, loss_scale=512.0)
    assert unwatched(skipped) == watch_skips(applied) == Observation()
    [event] = watch_skips(skipped).events
    assert event.startswith("loss scale 512: the step was skipped; its module is not searched for")


# -------------------------------------------------------------------------------------------------------------- TF32


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "rule"),
    [
        ("fp32", "cpu", None, None),
        ("bf16", "cuda", (7, 0), None),
        ("tf32", "cuda", (8, 0), None),
        ("tf32", "cuda", (9, 0), None),
        ("tf32", "cuda", None, None),
        ("tf32", "cpu", None, "precision.dtype: tf32 needs a GPU, and the job runs on CPUs; use fp32 or bf16"),
        (
            "tf32",
            "cuda",
            (7, 5),
            "precision.dtype: tf32 needs NVIDIA's Ampere or later (capability 8.0), and a GPU here has 7.5; "
            "use fp32 or fp16",
        ),
    ],
)
def test_tf32_is_refused_where_it_is_not(
    dtype: str, device: str, capability: tuple[int, int] | None, rule: str | None
) -> None:
    assert [str(problem) for problem in check_precision_device(dtype, device, capability)] == ([rule] if rule else [])


@pytest.mark.parametrize(
    ("answer", "capability"), [("9.0\n7.5\n", (7, 5)), ("10.0\n", (10, 0)), ("", None), ("[N/A]\n", None)]
)
def test_the_driver_is_asked(
    answer: str, capability: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local_capability() == capability
    program.unlink()
    assert local_capability() is None


@pytest.fixture
def switches() -> Iterator[Callable[[], list[Any]]]:
    """torch's switches of this process, put back afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    places: list[tuple[Any, str]] = [
        (matmul, "fp32_precision"),
        (cudnn.conv, "fp32_precision"),
        (cudnn.rnn, "fp32_precision"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
    ]
    before = [getattr(place, name) for place, name in places]
    yield lambda: [getattr(place, name) for place, name in places]
    for (place, name), value in zip(places, before, strict=True):
        setattr(place, name, value)


def test_products_on_a_gpu(switches: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    before = switches()
    apply_product_precision("fp32", CPU)
    assert switches() == before
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    apply_product_precision("tf32", CUDA)
    assert switches() == ["tf32", "tf32", "tf32", False, False]
    for dtype in ("fp32", "fp16"):
        apply_product_precision(dtype, CUDA)
        assert switches() == ["ieee", "ieee", "ieee", False, False]


def test_a_worker_refuses_tf32_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(RunError, match=r"precision\.dtype: tf32 needs .* Ampere on, and Tesla V100 is older; use fp32"):
        apply_product_precision("tf32", CUDA)
