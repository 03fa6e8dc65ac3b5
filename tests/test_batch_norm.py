"""Global batch norm: what the ranks compute together against torch's own batch norm on the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distributed import run_distributed
from temper.parallel.batch_norm import GlobalBatchNorm, apply_global_batch_norm
from temper.parallel.groups import Group

STEPS = 3
CHANNELS = 5
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class Case:
    """One norm on inputs `(sum(sizes), CHANNELS, *rest)`, dealt out to as many ranks as there are sizes."""

    sizes: tuple[int, ...]
    rest: tuple[int, ...] = ()
    momentum: float | None = 0.1
    affine: bool = True
    tracked: bool = True
    dtype: torch.dtype = torch.float32
    offset: float = 0.0
    training: bool = True

    def __str__(self) -> str:
        default = Case(self.sizes)
        changed = {key: value for key, value in vars(self).items() if value != getattr(default, key)}
        return "-".join([f"sizes={self.sizes}", *(f"{key}={value}" for key, value in changed.items())]).replace(" ", "")


def cases(*sizes: tuple[int, ...]) -> list[Case]:
    even, uneven = sizes
    return [
        Case(even),
        Case(uneven),
        Case(uneven, (6,)),
        Case(even, (4, 3)),
        Case(uneven, (4, 3)),
        Case(uneven, (2, 3, 2)),
        Case(uneven, (4,), momentum=None),
        Case(uneven, (4, 3), momentum=None, affine=False),
        Case(uneven, (4,), affine=False),
        Case(uneven, (4,), tracked=False),
        Case(uneven, (4,), training=False),
        Case(uneven, (4,), training=False, tracked=False),
        # The last rank has no examples.
        Case((*uneven[:-2], uneven[-2] + uneven[-1], 0), (4, 3)),
        Case(even, (4, 4), dtype=torch.float16),
        Case(uneven, (4, 4), dtype=torch.bfloat16),
        # Where E[x²] − E[x]² cancels in fp32.
        Case(uneven, (4, 4), offset=3000.0),
    ]


CASES = {2: cases((4, 4), (5, 2)), 3: cases((3, 3, 3), (1, 4, 2))}


def build_norm(case: Case) -> nn.Module:
    """A plain norm with weights and statistics that are not the initial ones, all values exact in every precision."""
    norm = PLAIN[2 + len(case.rest)](
        CHANNELS, momentum=case.momentum, affine=case.affine, track_running_stats=case.tracked
    )
    ramp = torch.arange(CHANNELS, dtype=torch.float32)
    with torch.no_grad():
        if case.affine:
            norm.weight.copy_(ramp / 4 + 0.5)
            norm.bias.copy_(ramp / 2 - 1)
        if case.tracked:
            norm.running_mean.copy_(ramp / 8)
            norm.running_var.copy_(ramp / 4 + 1)
    return norm.train(case.training)


def batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs, and weights of the outputs in the loss, so that no gradient is zero by symmetry."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        shape = (sum(case.sizes), CHANNELS, *case.rest)
        inputs = torch.randn(shape, generator=generator) * 2 + 1 + case.offset
        yield inputs.to(case.dtype), torch.randn(shape, generator=generator)


def run_norm(norm: nn.Module, parts: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Outputs and input gradients of every batch, parameter gradients summed over them, buffers at the end."""
    outputs, gradients = [], []
    for inputs, loss_weights in parts:
        inputs = inputs.clone().requires_grad_()
        output = norm(inputs)
        (output.float() * loss_weights).sum().backward()
        outputs.append(output.detach())
        gradients.append(inputs.grad)
    return {
        "outputs": outputs,
        "gradients": gradients,
        "params": {name: param.grad for name, param in norm.named_parameters()},
        "buffers": dict(norm.named_buffers()),
    }


def part(case: Case, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    for inputs, loss_weights in batches(case):
        yield inputs.split(case.sizes)[rank], loss_weights.split(case.sizes)[rank]


def all_cases(rank: int) -> dict[int, list[dict[str, Any]]]:
    """The cases of every number of ranks, each in a group of that many of them."""
    found = {}
    for size in CASES:
        members = dist.new_group(list(range(size)))
        if rank < size:
            found[size] = [run_case(case, rank, Group(rank, size, members)) for case in CASES[size]]
    return found


def run_case(case: Case, rank: int, group: Group) -> dict[str, Any]:
    # A whole model is turned to half precision, the norm's own parameters with it.
    model = apply_global_batch_norm(nn.Sequential(build_norm(case)), group).to(case.dtype)
    return run_norm(model[0], part(case, rank))


@pytest.fixture(scope="module")
def ranks() -> list[dict[int, list[dict[str, Any]]]]:
    """`ranks[rank][size][case]`; one spawn for all."""
    return run_distributed(all_cases, max(CASES))


@pytest.mark.parametrize("size", sorted(CASES))
def test_equals_the_whole_batch_in_one_process(size: int, ranks: Any, subtests: pytest.Subtests) -> None:
    for index, case in enumerate(CASES[size]):
        with subtests.test(str(case)):
            check(case, [found[size][index] for found in ranks[:size]])


def check(case: Case, found: list[dict[str, Any]]) -> None:
    # The reference computes in fp32 on the same, already rounded inputs.
    expected = run_norm(build_norm(case), ((inputs.float(), weights) for inputs, weights in batches(case)))
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.dtype]
    if case.offset:
        tolerance = 2e-3  # 3000 has an ulp of 2.4e-4 in fp32
    for step in range(STEPS):
        output = torch.cat([one["outputs"][step] for one in found])
        gradient = torch.cat([one["gradients"][step] for one in found])
        assert output.dtype == gradient.dtype == case.dtype
        close(output.float(), expected["outputs"][step], tolerance)
        close(gradient.float(), expected["gradients"][step], tolerance)
    for name, value in expected["params"].items():
        total = sum(one["params"][name].float() for one in found)
        close(total, value, tolerance * float(value.abs().max()))
    for one in found:
        assert list(one["buffers"]) == list(expected["buffers"])
        for name, value in expected["buffers"].items():
            assert one["buffers"][name].dtype == value.dtype
            close(one["buffers"][name], value, 1e-5 * max(1.0, float(value.abs().max())))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ one process


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 6),
    rest=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    momentum=st.sampled_from([None, 0.0, 0.1, 1.0]),
    affine=st.booleans(),
    tracked=st.booleans(),
    training=st.booleans(),
)
def test_alone_it_is_torchs_own(size, rest, momentum, affine, tracked, training) -> None:
    case = Case((size,), rest, momentum, affine, tracked, training=training)
    model = apply_global_batch_norm(nn.Sequential(build_norm(case)), Group())
    found, expected = run_norm(model[0], batches(case)), run_norm(build_norm(case), batches(case))
    assert isinstance(model[0], GlobalBatchNorm)
    for kind in ("outputs", "gradients"):
        assert all(torch.equal(a, b) for a, b in zip(found[kind], expected[kind], strict=True))
    for kind in ("params", "buffers"):
        assert list(found[kind]) == list(expected[kind])
        assert all(torch.equal(found[kind][name], value) for name, value in expected[kind].items())


def test_half_precision_leaves_the_running_statistics_alone() -> None:
    norm = GlobalBatchNorm(2)
    # Neither is a number of fp16: one would be rounded, the other become infinite.
    mean, variance = torch.tensor([0.1, 1234.567]), torch.tensor([1.0001, 1.0e6])
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.half()
    assert norm.weight.dtype == norm.bias.dtype == torch.float16
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, variance)
    assert norm.num_batches_tracked.dtype == torch.int64
    # An update that fp16 would lose: 1.0001 is 1 there, and its neighbour 1.001.
    norm(torch.full((4, 2), 1.0, dtype=torch.float16))
    torch.testing.assert_close(norm.running_mean[0], torch.tensor(0.9 * 0.1 + 0.1))


def test_moves_between_devices_with_its_module() -> None:
    norm = GlobalBatchNorm(3, device="meta")
    assert norm.to_empty(device="cpu").running_mean.device.type == "cpu"
    assert norm.to("meta", torch.bfloat16).running_var.device.type == "meta"
    assert norm.running_var.dtype == torch.float32


def test_an_input_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expects \(N, C, …\), got \(3,\)"):
        GlobalBatchNorm(3)(torch.zeros(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3))
        self.shared = self.again = nn.BatchNorm2d(4)
        self.block = nn.ModuleDict({"norm": self.shared, "free": nn.BatchNorm3d(4, affine=False)})
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)
        self.other = nn.ModuleList([nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)])


def test_replacing_keeps_names_parameters_and_buffers() -> None:
    model = Net()
    model.stem[1].requires_grad_(False)
    model.shared.eval()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    state, modules = list(model.state_dict()), list(dict(model.named_modules()))
    group = Group(1, 2)
    assert apply_global_batch_norm(model, group) is model
    assert {name: id(param) for name, param in model.named_parameters()} == {k: id(v) for k, v in params.items()}
    assert {name: id(value) for name, value in model.named_buffers()} == {k: id(v) for k, v in buffers.items()}
    assert list(model.state_dict()) == state
    assert list(dict(model.named_modules())) == modules
    norm = model.stem[1]
    assert (type(norm), norm.eps, norm.momentum, norm.num_features) == (GlobalBatchNorm, 1e-3, 0.3, 4)
    assert not norm.weight.requires_grad
    assert not model.shared.training
    assert model.untracked.running_mean is None
    assert [type(child) for child in model.other] == [nn.InstanceNorm2d, nn.GroupNorm]
    assert not [child for child in model.modules() if type(child) in PLAIN.values()]
    # One module under three names stays one.
    assert model.shared is model.again is model.block["norm"]
    assert type(model.shared) is GlobalBatchNorm
    assert norm.group == model.shared.group == group
    before = dict(model.named_modules())
    apply_global_batch_norm(model, Group())
    assert dict(model.named_modules()) == before
    assert norm.group == model.shared.group == Group()
