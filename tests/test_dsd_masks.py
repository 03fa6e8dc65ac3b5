"""Which weights are pruned: ties, structures, the random control; masks in checkpoints and at the border of a phase."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from temper.checkpoint import BUFFER, MASK, MASTER, CheckpointReader, Shard, write_manifest, write_shards
from temper.parallel.cut import cut_evenly
from temper.plan.phases import PhasePlan, Pruning
from temper.techniques.dsd.border import begin_phase, select_masks
from temper.techniques.dsd.masks import select_mask
from temper.techniques.dsd.sparsity import count_zeros, latest_pruning, sparsity_metrics


def pruning(share: float = 0.5, structure: str = "weights", criterion: str = "magnitude", seed: int = 0) -> Pruning:
    return Pruning(structure, criterion, {"layer": share}, seed)


def select(weight: Tensor, *arguments: object, **named: object) -> Tensor:
    return select_mask("layer", weight, pruning(*arguments, **named))  # type: ignore[arg-type]


# Few values, so that most weights have equals.
weights = st.lists(st.integers(-3, 3), min_size=1, max_size=60).map(lambda values: torch.tensor(values).float())


# -------------------------------------------------------------------------------------------------- single weights


@settings(deadline=None)
@given(weights, st.floats(0.0, 0.99))
def test_the_smallest_are_pruned_and_of_equal_ones_the_first(weight: Tensor, share: float) -> None:
    order = np.argsort(np.abs(weight.numpy()), kind="stable")
    expected = np.ones(len(weight), dtype=bool)
    expected[order[: round(len(weight) * share)]] = False
    assert select(weight, share).tolist() == expected.tolist()


def test_a_mask_has_the_shape_of_its_weight() -> None:
    mask = select(torch.arange(24.0).view(2, 3, 4), 0.25)
    assert mask.shape == (2, 3, 4) and mask.dtype == torch.bool
    assert mask.flatten().tolist() == [False] * 6 + [True] * 18


def test_zeros_of_an_earlier_round_are_pruned_first() -> None:
    assert select(torch.tensor([1.0, 0.0, -2.0, 0.0]), 0.5).tolist() == [True, False, True, False]


def test_a_share_of_zero_prunes_nothing() -> None:
    assert select(torch.zeros(5), 0.0).all()


# ------------------------------------------------------------------------------------------------------ structures


def test_whole_channels_of_the_smallest_norm_are_pruned() -> None:
    weight = torch.stack([torch.full((2, 3), value) for value in (3.0, -1.0, 2.0, 1.0)])
    mask = select(weight, 0.5, "channels")
    assert mask.flatten(1).all(1).tolist() == [True, False, True, False]
    assert mask.flatten(1).any(1).tolist() == [True, False, True, False]
    # Of channels of one norm the first.
    assert select(weight, 0.25, "channels").flatten(1).all(1).tolist() == [True, False, True, True]


def test_two_of_four_in_a_row_along_the_inputs_are_kept() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert select(weight, structure="2:4").tolist() == [[False, True, True, False, False, False, True, True]]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8)]), st.integers(0, 99))
def test_every_group_keeps_its_n_largest(rows: int, groups: int, kind: tuple[int, int], seed: int) -> None:
    kept, size = kind
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, 3, generator=generator)
    mask = select(weight, structure=f"{kept}:{size}")
    for row in range(rows):
        for place in range(3):
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                inside, values = mask[row, part, place], weight[row, part, place].abs()
                assert int(inside.sum()) == kept
                assert values[inside].min() >= values[~inside].max()


# ------------------------------------------------------------------------------------------------------ at random


def test_a_random_mask_depends_on_seed_and_name_only() -> None:
    one, other = torch.randn(1000), torch.zeros(1000)
    mask = select(one, 0.3, criterion="random")
    assert int((~mask).sum()) == 300
    assert torch.equal(mask, select(other, 0.3, criterion="random"))
    assert not torch.equal(mask, select(one, 0.3, criterion="random", seed=1))
    second = Pruning("weights", "random", {"second": 0.3}, 0)
    assert not torch.equal(mask, select_mask("second", one, second))


@pytest.mark.parametrize("structure", ["channels", "2:4"])
def test_every_structure_has_its_random_control(structure: str) -> None:
    weight = torch.arange(64.0).view(8, 8)
    mask = select(weight, 0.5, structure, "random")
    assert int((~mask).sum()) == 32
    assert not torch.equal(mask, select(weight, 0.5, structure))


# --------------------------------------------------------------------------------------------------- at the border


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, cut in the middle of `layer`; `layer` has moments and the mask of an earlier phase."""
    weight, moment = torch.arange(-6.0, 6.0).view(3, 4), torch.ones(12)
    folder = tmp_path / "step-00000007"
    for rank, part in enumerate((slice(0, 5), slice(5, 12))):
        tensors = {
            MASTER: weight.view(-1)[part],
            "exp_avg": moment[part],
            MASK: torch.zeros(12, dtype=torch.bool)[part],
        }
        shards = [Shard("layer", part.start, tensors)]
        if rank == 0:
            shards += [Shard("bias", 0, {MASTER: torch.ones(3)}), Shard("running", 0, {BUFFER: torch.zeros(2)})]
        write_shards(folder, rank, shards)
    shapes = {"layer": (3, 4), "bias": (3,), "running": (2,)}
    state = {"step": 7, "engine": {"optimizer_step": 7, "loss_scaler": {"cur_scale": 8.0}}}
    write_manifest(folder, 2, state, shapes)
    return folder


def phase(kind: str, *, fresh: bool = False) -> PhasePlan:
    return PhasePlan(kind, kind, 7, 3, 0.1, "", {}, pruning(0.25) if kind == "sparse" else None, fresh)  # type: ignore[arg-type]


def test_a_sparse_phase_begins_with_pruned_weights_and_moments_at_zero(dense: Path) -> None:
    start = begin_phase(dense, phase("sparse"))
    expected = [-6.0, -5.0, -4.0, -3.0, -2.0, 0.0, 0.0, 0.0, 2.0, 3.0, 4.0, 5.0]  # of -1, 0 and 1 in the middle
    assert start.full(MASTER, "layer").flatten().tolist() == expected
    assert start.names(MASK) == ["layer"]
    kept = start.full(MASK, "layer").flatten()
    assert kept.tolist() == [value != 0.0 for value in expected]
    assert start.moments() == ["exp_avg"]
    assert start.full("exp_avg", "layer").flatten().tolist() == kept.float().tolist()
    assert start.full(MASTER, "bias").tolist() == [1.0] * 3
    assert start.full(BUFFER, "running").tolist() == [0.0] * 2
    assert start.state["engine"] == {"optimizer_step": 7, "loss_scaler": {"cur_scale": 8.0}}


def test_any_range_and_any_cut_of_it_can_be_read(dense: Path) -> None:
    start = begin_phase(dense, phase("sparse"))
    whole, kept = start.full(MASTER, "layer"), start.full(MASK, "layer")
    cut = cut_evenly((3, 4), 1, 1, 2)
    for kind, values in ((MASTER, whole), (MASK, kept)):
        part = cut.take(values).reshape(-1)
        for first in range(6):
            for numel in range(1, 7 - first):
                assert torch.equal(start.read(kind, "layer", first, numel, cut), part[first : first + numel])
                assert torch.equal(start.read(kind, "layer", first, numel), values.reshape(-1)[first : first + numel])


def test_a_redense_phase_begins_without_masks(dense: Path) -> None:
    start = begin_phase(dense, phase("redense"))
    assert start.names(MASK) == []
    assert start.full(MASTER, "layer").flatten().tolist() == list(range(-6, 6))
    assert start.moments() == ["exp_avg"]


def test_a_fresh_optimizer_has_no_moments_and_keeps_the_loss_scale(dense: Path) -> None:
    start = begin_phase(dense, phase("sparse", fresh=True))
    assert start.moments() == []
    assert start.state["engine"] == {"optimizer_step": 0, "loss_scaler": {"cur_scale": 8.0}}


def test_ranks_that_share_the_work_have_the_same_masks(dense: Path) -> None:
    both = Pruning("weights", "magnitude", {"layer": 0.25, "bias": 0.4}, 0)
    reader = CheckpointReader(dense)
    alone = select_masks(reader, both)
    parts: list[dict[str, object]] = []
    for rank in range(3):
        select_masks(reader, both, rank=rank, size=3, share=lambda own: parts.append(own) or [own])  # type: ignore[func-returns-value,arg-type]
    assert [list(part) for part in parts] == [["layer"], ["bias"], []]
    together = select_masks(reader, both, share=lambda own: parts)  # type: ignore[arg-type,return-value]
    for name, mask in alone.items():
        assert torch.equal(together[name].unpack(), mask.unpack())


# -------------------------------------------------------------------------------------------------- in checkpoints


@settings(deadline=None, max_examples=20)
@given(numel=st.integers(1, 40), data=st.data())
def test_masks_are_stored_eight_to_a_byte_and_read_in_any_range(
    tmp_path_factory: pytest.TempPathFactory, numel: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, numel - 1), max_size=3))) if numel > 1 else []
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=numel, max_size=numel)))
    folder = tmp_path_factory.mktemp("packed") / "step-00000001"
    borders = [0, *cuts, numel]
    for rank, (start, stop) in enumerate(itertools.pairwise(borders)):
        write_shards(folder, rank, [Shard("layer", start, {MASK: mask[start:stop]})])
    write_manifest(folder, len(cuts) + 1, {"step": 1}, {"layer": (numel,)})
    reader = CheckpointReader(folder)
    first = data.draw(st.integers(0, numel - 1))
    length = data.draw(st.integers(1, numel - first))
    assert torch.equal(reader.read(MASK, "layer", first, length), mask[first : first + length])
    assert torch.equal(reader.full(MASK, "layer"), mask)
    assert reader.moments() == []


# -------------------------------------------------------------------------------------------------------- sparsity


def test_zeros_are_counted_per_layer_and_in_all(dense: Path) -> None:
    shards = [
        Shard("one", 0, {MASTER: torch.tensor([0.0, 1.0])}),
        Shard("one", 2, {MASTER: torch.tensor([0.0, 0.0])}),
        Shard("other", 0, {MASTER: torch.zeros(3)}),
        Shard("two", 0, {MASTER: torch.ones(6)}),
        Shard("two", 0, {BUFFER: torch.zeros(6)}),
    ]
    zeros = count_zeros(shards, ["one", "two"]).tolist()
    assert zeros == [3, 0]
    metrics = sparsity_metrics(zeros, ["one", "two"], {"one": (2, 2), "two": (6,), "other": (3,)})
    assert metrics == {"sparsity": 0.3, "sparsity/one": 0.75, "sparsity/two": 0.0}


def test_a_redense_phase_counts_in_the_layers_of_the_sparse_one_before_it() -> None:
    dense, sparse, redense = (PhasePlan(kind, kind, 0, 1, 0.1, kind, {}) for kind in ("dense", "sparse", "redense"))  # type: ignore[arg-type]
    sparse = PhasePlan("sparse", "sparse", 0, 1, 0.1, "", {}, pruning())
    phases = (dense, sparse, redense)
    assert latest_pruning(phases, dense) is None
    assert latest_pruning(phases, redense) == latest_pruning(phases, sparse) == pruning()
