"""Checkpoints: any range of any tensor from any writer's ranges; what is damaged is refused by name."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from temper import checkpoint
from temper.checkpoint import BUFFER, MASTER, CheckpointReader, Shard
from temper.errors import CheckpointError
from temper.parallel.cut import Cut, cut_evenly

WEIGHT = torch.arange(24, dtype=torch.float32)
SHAPES = {"net.weight": (4, 6), "net.running_mean": (3,), "net.count": ()}


def write(root: Path, step: int, cuts: tuple[int, ...] = (0, 10, 24), records: tuple[dict, ...] = ()) -> Path:
    """A checkpoint in which rank r holds elements `cuts[r] … cuts[r+1]` of the weight and of its moment."""
    folder = checkpoint.checkpoint_folder(root, step)
    for rank, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = WEIGHT[start:stop]
        shards = [Shard("net.weight", start, {MASTER: part, "exp_avg": part * 2})] if stop > start else []
        if rank == 0:
            shards.append(Shard("net.running_mean", 0, {BUFFER: torch.tensor([1.0, 2.0, 3.0])}))
            shards.append(Shard("net.count", 0, {BUFFER: torch.tensor([7])}))
        checkpoint.write_shards(folder, rank, shards)
    checkpoint.write_manifest(folder, len(cuts) - 1, {"step": step, "engine": {}}, SHAPES, records)
    return folder


def test_whole_tensors_come_back_in_their_shapes(tmp_path: Path) -> None:
    folder = write(tmp_path, 5, records=({"step": 5, "metrics": {"train/loss": 0.5}},))
    reader = CheckpointReader(folder)
    assert reader.step == 5
    assert torch.equal(reader.full(MASTER, "net.weight"), WEIGHT.view(4, 6))
    assert torch.equal(reader.full("exp_avg", "net.weight"), WEIGHT.view(4, 6) * 2)
    assert reader.full(BUFFER, "net.count").shape == ()
    assert reader.moments() == ["exp_avg"]
    assert reader.records() == [{"step": 5, "metrics": {"train/loss": 0.5}}]
    assert list(checkpoint.model_state(reader)) == ["net.weight", "net.running_mean", "net.count"]


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 24), max_size=5).map(lambda inner: (0, *sorted(inner), 24)),
    start=st.integers(0, 23),
    data=st.data(),
)
def test_any_range_from_any_writers(tmp_path_factory: pytest.TempPathFactory, cuts, start, data) -> None:
    numel = data.draw(st.integers(1, 24 - start))
    reader = CheckpointReader(write(tmp_path_factory.mktemp("ranges"), 1, cuts))
    assert torch.equal(reader.read(MASTER, "net.weight", start, numel), WEIGHT[start : start + numel])


def test_a_missing_range_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, 1, (0, 10)))
    with pytest.raises(CheckpointError, match=r"no rank wrote master of net\.weight at 10"):
        reader.full(MASTER, "net.weight")


# ------------------------------------------------------------------------------------------ tensors cut over ranks


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)))


@st.composite
def tensor_cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Cut]:
    """The cuts of all tensor ranks of one mesh along some dim, none of them empty."""
    dim = draw(st.integers(0, len(shape) - 1))
    stacked = draw(st.sampled_from([number for number in (1, 2, 3) if shape[dim] % number == 0]))
    parts = draw(st.integers(1, min(shape[dim] // stacked, 4)))
    return [cut_evenly(shape, dim, index, parts, stacked) for index in range(parts)]


@st.composite
def zero_ranges(draw: st.DrawFn, numel: int) -> list[tuple[int, int]]:
    """What each ZeRO rank holds of a flattened part; ranks without any of it are left out."""
    inner = draw(st.lists(st.integers(1, numel - 1), max_size=3, unique=True)) if numel > 1 else []
    return list(itertools.pairwise([0, *sorted(inner), numel]))


def values(shape: tuple[int, ...], first: int = 0) -> Tensor:
    return torch.arange(first, first + math.prod(shape), dtype=torch.float32).view(shape)


def write_cut(folder: Path, shards: list[Shard], shape: tuple[int, ...], ranks: int = 2) -> CheckpointReader:
    """The shards, dealt out to `ranks` files."""
    for rank in range(ranks):
        checkpoint.write_shards(folder, rank, shards[rank::ranks])
    checkpoint.write_manifest(folder, ranks, {"step": 1, "engine": {}}, {"qkv.weight": shape})
    return CheckpointReader(folder)


def cut_shards(cuts: list[Cut], ranges: list[list[tuple[int, int]]], shape: tuple[int, ...]) -> list[Shard]:
    """A weight and its moment as tensor ranks hold them, each part in the ranges of its ZeRO ranks."""
    shards = []
    for cut, of_part in zip(cuts, ranges, strict=True):
        weight, moment = (cut.take(values(shape, first)).reshape(-1) for first in (0, 1000))
        shards += [
            Shard("qkv.weight", start, {MASTER: weight[start:stop], "exp_avg": moment[start:stop]}, cut)
            for start, stop in of_part
        ]
    return shards


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_reader_gets_the_values_of_a_cut_tensor(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    shape = data.draw(shapes())
    written = data.draw(tensor_cuts(shape))
    ranges = [data.draw(zero_ranges(math.prod(cut.part_shape))) for cut in written]
    reader = write_cut(tmp_path_factory.mktemp("cut"), cut_shards(written, ranges, shape), shape)
    asked = [None, *data.draw(tensor_cuts(shape)), *written]
    for kind, first in ((MASTER, 0), ("exp_avg", 1000)):
        whole = values(shape, first)
        assert torch.equal(reader.full(kind, "qkv.weight"), whole)
        for cut in asked:
            expected = (whole if cut is None else cut.take(whole)).reshape(-1)
            start = data.draw(st.integers(0, len(expected) - 1))
            numel = data.draw(st.integers(1, len(expected) - start))
            found = reader.read(kind, "qkv.weight", start, numel, cut)
            assert torch.equal(found, expected[start : start + numel]), (kind, cut)
            assert torch.equal(reader.read(kind, "qkv.weight", cut=cut), expected), (kind, cut)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_missing_part_or_range_of_one_is_an_error(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    shape = data.draw(shapes())
    written = data.draw(tensor_cuts(shape))
    ranges = [data.draw(zero_ranges(math.prod(cut.part_shape))) for cut in written]
    shards = cut_shards(written, ranges, shape)
    lost = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
    reader = write_cut(tmp_path_factory.mktemp("lost"), shards, shape)
    with pytest.raises(CheckpointError, match=r"of qkv\.weight"):
        reader.full(MASTER, "qkv.weight")
    with pytest.raises(CheckpointError, match=r"of qkv\.weight"):
        reader.read("exp_avg", "qkv.weight", cut=lost.cut)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_cut_reader_of_a_tensor_that_was_written_whole(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    shape = data.draw(shapes())
    whole = values(shape)
    flat = whole.reshape(-1)
    ranges = data.draw(zero_ranges(len(flat)))
    shards = [Shard("qkv.weight", start, {MASTER: flat[start:stop]}) for start, stop in ranges]
    reader = write_cut(tmp_path_factory.mktemp("whole"), shards, shape)
    for cut in data.draw(tensor_cuts(shape)):
        assert torch.equal(reader.read(MASTER, "qkv.weight", cut=cut), cut.take(whole).reshape(-1))


def test_without_a_manifest_it_does_not_exist(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / checkpoint.MANIFEST).unlink()
    assert checkpoint.list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        CheckpointReader(folder)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "state.json", "records.jsonl"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "extend"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = write(tmp_path, 1, records=({"step": 1, "metrics": {}},))
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-3])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "extend":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
    problem = checkpoint.check_checkpoint(folder)
    assert problem is not None
    assert str(path) in problem


def test_a_sound_checkpoint_has_no_problem_whoever_reads_which_part(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert [checkpoint.check_checkpoint(folder, part, 3) for part in range(3)] == [None] * 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99, "files": {}}', '{"files": 3}'])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path, 1)
    (folder / checkpoint.MANIFEST).write_text(content)
    problem = checkpoint.check_checkpoint(folder)
    assert problem is not None
    assert checkpoint.MANIFEST in problem


def test_shards_of_an_attempt_on_more_ranks_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, (0, 8, 16, 24))
    folder = write(tmp_path, 1, (0, 12, 24))
    assert sorted(json.loads((folder / checkpoint.MANIFEST).read_text())["files"]) == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "records.jsonl",
        "state.json",
    ]
    assert torch.equal(CheckpointReader(folder).full(MASTER, "net.weight"), WEIGHT.view(4, 6))


def test_old_checkpoints_go_and_half_written_ones_before_them(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    half = checkpoint.checkpoint_folder(tmp_path, 2)
    (half / checkpoint.MANIFEST).unlink()
    newer_half = checkpoint.checkpoint_folder(tmp_path, 9)
    newer_half.mkdir()
    checkpoint.prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004", "step-00000009"]
