"""Checkpoints that belong to no topology: every tensor is stored as flat ranges of the whole, unsharded tensor.

A checkpoint is a folder `step-00000500/`:

    rank-00000.safetensors   the ranges that rank 0 owns, one per key `<kind>/<name>/<start>`, of a tensor that is
                             cut over tensor ranks `<kind>/<name>@<dim>:<from>-<to>[,…]/<start>`
    …
    state.json               step, counters, the optimizer's step, the loss scaler, shapes
    records.jsonl            the records since the checkpoint before it (see tracking.history)
    manifest.json            size and SHA-256 of each file; written last, atomically

`kind` is `master` (fp32 weights), `buffer`, `mask` (true where a weight is kept), or the name of an optimizer's moment.
`start` counts in the flattened tensor, or in the flattened part of it that the cut describes. Truth values are stored
eight to a byte, under a key that ends in `<start>+<number of values>`. A reader assembles any range of any tensor from
whatever ranges were written, so a run resumes on any other topology. Nothing is pickled. Without a manifest, or where a
file differs from it, a checkpoint does not exist.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from temper.errors import CheckpointError
from temper.files import check_file, describe_file, read_json, sync, write_json
from temper.parallel.cut import Cut
from temper.plan.distill import CONNECTORS
from temper.remote_store import fetch_checkpoint
from temper.run_folder import CHECKPOINT_MANIFEST

FORMAT = 1
MANIFEST = CHECKPOINT_MANIFEST
STATE = "state.json"
RECORDS = "records.jsonl"
MASTER = "master"
BUFFER = "buffer"
MASK = "mask"
_FOLDER = re.compile(r"^step-(\d{8,})$")
_KEY = re.compile(r"^(?P<kind>[^/]+)/(?P<name>[^@]+)(@(?P<cut>\d+:[\d,-]+))?/(?P<start>\d+)(\+(?P<packed>\d+))?$")


@dataclass(frozen=True)
class Shard:
    """One rank's range `[start, start + numel)` of the flattened tensor `name`, for each kind of value it holds.

    `tensors` are flat views of the live values, all of the same length. With a `cut`, the range is one of the flattened
    part that the cut describes.
    """

    name: str
    start: int
    tensors: Mapping[str, Tensor]
    cut: Cut | None = None

    def key(self, kind: str) -> str:
        tensor = self.tensors[kind]
        packed = f"+{tensor.numel()}" if tensor.dtype == torch.bool else ""
        return f"{kind}/{self.name}{_cut_text(self.cut)}/{self.start}{packed}"


def _cut_text(cut: Cut | None) -> str:
    return "" if cut is None else f"@{cut.dim}:{','.join(f'{start}-{stop}' for start, stop in cut.ranges)}"


def _parse_cut(text: str | None, shape: tuple[int, ...]) -> Cut | None:
    if text is None:
        return None
    dim, _, ranges = text.partition(":")
    pairs = (tuple(map(int, pair.split("-"))) for pair in ranges.split(","))
    return Cut(shape, int(dim), tuple((start, stop) for start, stop in pairs))


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


# --------------------------------------------------------------------------------------------------------- writing


def write_shards(folder: Path, rank: int, shards: Sequence[Shard]) -> None:
    """Writes a rank's shards and, beside them, their size and digest for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        shard.key(kind): _stored(tensor.detach().cpu()) for shard in shards for kind, tensor in shard.tensors.items()
    }
    path = folder / f"rank-{rank:05d}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    sync(temporary)
    os.replace(temporary, path)
    write_json(_digest_path(folder, rank), {path.name: describe_file(path)})


def _stored(tensor: Tensor) -> Tensor:
    return pack_bits(tensor) if tensor.dtype == torch.bool else tensor.contiguous()


def pack_bits(flags: Tensor) -> Tensor:
    """Flat truth values as bytes; the first is the lowest bit of the first byte."""
    return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """The first `number` truth values in `bits`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=number, bitorder="little").view(np.bool_))


def write_manifest(
    folder: Path,
    num_ranks: int,
    state: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    records: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Completes a checkpoint whose ranks have all called :func:`write_shards`. One rank calls it."""
    write_json(folder / STATE, {**state, "shapes": {name: list(shape) for name, shape in shapes.items()}})
    (folder / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))
    sync(folder / RECORDS)
    files = {name: describe_file(folder / name) for name in (STATE, RECORDS)}
    for rank in range(num_ranks):
        digest = _digest_path(folder, rank)
        files.update(json.loads(digest.read_text()))
    # An earlier attempt on more ranks may have left shards behind; a manifest names exactly what belongs.
    for path in folder.glob("rank-*.safetensors"):
        if path.name not in files:
            path.unlink()
    write_json(folder / MANIFEST, {"format": FORMAT, "step": state["step"], "files": files})
    for path in folder.glob("rank-*.digest.json"):
        path.unlink()


def prune_checkpoints(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` complete checkpoints, and what half-written ones older than these left."""
    complete = list_checkpoints(root)
    if len(complete) < keep:
        return
    oldest_kept = _step_of(complete[-keep])
    for folder in root.iterdir():
        if _FOLDER.match(folder.name) and _step_of(folder) < oldest_kept:
            # Without its manifest the folder no longer counts, so a reader never meets one that is half removed.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _digest_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.digest.json"


# --------------------------------------------------------------------------------------------------------- finding


def _step_of(folder: Path) -> int:
    match = _FOLDER.match(folder.name)
    assert match is not None
    return int(match.group(1))


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of `root` that hold a manifest, oldest first."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if _FOLDER.match(path.name) and (path / MANIFEST).is_file()]
    return sorted(folders, key=_step_of)


def check_checkpoint(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. `part` of `parts` reads only its share of the files (one per rank).
    Where the storage is a bucket, what this machine lacks of the checkpoint is brought first."""
    problem = fetch_checkpoint(folder)
    if problem is not None:
        return problem
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return f"{folder / MANIFEST}: not a manifest"
    if manifest.get("format") != FORMAT:
        return f"{folder / MANIFEST}: format {manifest.get('format')!r}, this temper reads {FORMAT}"
    for name in sorted(manifest["files"])[part::parts]:
        problem = check_file(folder / name, manifest["files"][name])
        if problem is not None:
            return problem
    return None


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Range:
    start: int
    stop: int
    file: int
    key: str
    packed: bool


class CheckpointReader:
    """Reads any range of any tensor of a checkpoint, memory-mapped.

    Raises:
        CheckpointError: the checkpoint is incomplete, or a range is asked for that no rank wrote.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{folder}: no complete checkpoint (manifest missing or unreadable)")
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
        self.shapes = {name: tuple(shape) for name, shape in self.state["shapes"].items()}
        paths = [folder / name for name in sorted(manifest["files"]) if name.endswith(".safetensors")]
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._ranges: dict[tuple[str, str, Cut | None], list[_Range]] = {}
        for index, file in enumerate(self._files):
            self._index(index, file)
        for ranges in self._ranges.values():
            ranges.sort(key=lambda item: item.start)
        self._joined: tuple[tuple[str, str], Tensor] | None = None

    def _index(self, index: int, file: Any) -> None:
        for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
            match = _KEY.match(key)
            if match is None or match["name"] not in self.shapes:
                raise CheckpointError(f"{self.folder}: unexpected tensor {key!r}")
            start = int(match["start"])
            packed = match["packed"] is not None
            stop = start + (int(match["packed"]) if packed else file.get_slice(key).get_shape()[0])
            place = match["kind"], match["name"], _parse_cut(match["cut"], self.shapes[match["name"]])
            self._ranges.setdefault(place, []).append(_Range(start, stop, index, key, packed))

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def names(self, kind: str) -> list[str]:
        """Names of the tensors that have values of `kind`, in the order of the model."""
        found = {name for other, name, _ in self._ranges if other == kind}
        return [name for name in self.shapes if name in found]

    def moments(self) -> list[str]:
        """Kinds of the optimizer's moments in this checkpoint."""
        return sorted({kind for kind, *_ in self._ranges} - {MASTER, BUFFER, MASK})

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None, cut: Cut | None = None) -> Tensor:
        """The flat range `[start, start + numel)` of a tensor, or of the part of it that `cut` describes; by default
        all of it."""
        if (kind, name, cut) not in self._ranges and self._cuts(kind, name):
            # Written under another cut, or whole: the tensor is put together and cut as asked.
            whole = self._join(kind, name)
            flat = (whole if cut is None else cut.take(whole)).reshape(-1)
            return flat if numel is None else flat[start : start + numel]
        total = math.prod(self.shapes[name] if cut is None else cut.part_shape)
        stop = total if numel is None else start + numel
        pieces = list(self._pieces(kind, name, cut, start, stop))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _cuts(self, kind: str, name: str) -> list[Cut | None]:
        return [cut for other_kind, other_name, cut in self._ranges if (other_kind, other_name) == (kind, name)]

    def _join(self, kind: str, name: str) -> Tensor:
        """The whole tensor from the parts that tensor ranks wrote. The last one is kept: a rank asks for many ranges of
        one tensor in a row."""
        if self._joined is None or self._joined[0] != (kind, name):
            self._joined = (kind, name), self._put_together(kind, name)
        return self._joined[1]

    def _put_together(self, kind: str, name: str) -> Tensor:
        cuts = self._cuts(kind, name)
        if None in cuts:
            return self.read(kind, name).reshape(self.shapes[name])
        parts = [(cut, self.read(kind, name, cut=cut).reshape(cut.part_shape)) for cut in cuts if cut is not None]
        covered = sum(part.numel() for _, part in parts)
        whole = torch.empty(self.shapes[name], dtype=parts[0][1].dtype)
        if covered != whole.numel():
            raise CheckpointError(f"{self.folder}: the parts of {kind} of {name} do not make the whole")
        for cut, part in parts:
            cut.put(part, whole)
        return whole

    def _pieces(self, kind: str, name: str, cut: Cut | None, start: int, stop: int) -> Iterator[Tensor]:
        position = start
        for item in self._ranges.get((kind, name, cut), ()):
            if item.stop <= position or item.start > position:
                continue
            end = min(stop, item.stop)
            yield self._values(item, position - item.start, end - item.start)
            position = end
            if position >= stop:
                return
        if position < stop or start == stop:
            raise CheckpointError(f"{self.folder}: no rank wrote {kind} of {name} at {position}")

    def _values(self, item: _Range, first: int, stop: int) -> Tensor:
        values = self._files[item.file].get_slice(item.key)
        if not item.packed:
            return values[first:stop]
        begin = first // 8
        return unpack_bits(values[begin : -(-stop // 8)], stop - 8 * begin)[first - 8 * begin :]

    def full(self, kind: str, name: str) -> Tensor:
        """A whole tensor in its own shape."""
        return self.read(kind, name).reshape(self.shapes[name])

    def records(self) -> list[dict[str, Any]]:
        """The records of the steps between the checkpoint before this one and this one."""
        return [json.loads(line) for line in (self.folder / RECORDS).read_text().splitlines()]


def model_state(reader: CheckpointReader) -> dict[str, Tensor]:
    """The model's full fp32 weights and buffers by their own names; not the connectors that were trained beside it."""
    return {name: reader.full(kind, name) for name, kind in model_kinds(reader).items()}


def model_kinds(reader: CheckpointReader) -> dict[str, str]:
    """The model's weights and buffers, by name with the kind that they are stored as; not the connectors."""
    kinds = {name: kind for kind in (MASTER, BUFFER) for name in reader.names(kind)}
    return {name: kind for name, kind in kinds.items() if not name.startswith(f"{CONNECTORS}.")}
