"""The files of a cache of what a teacher says: their cut, their format, their manifest. No torch is imported.

`<storage>/teachers/<key>/` has `train/view-<v>/part-….arrow`, `test/view-0/part-….arrow`, the same of `validation`
where examples are held out, and, written last, `manifest.json`: without it the cache is not there. A part is an Arrow
IPC file of one record batch without compression, whose columns are lists of a fixed size: each is one contiguous array,
which is mapped and not read. Parts are large, so that few files are mapped and a batch is gathered from few places.

The teacher is asked about smaller *pieces*, so that there is work for many and little is lost where one is killed. They
lie in `unfinished/` until a part has all of its own. Every file appears whole or not at all, and what is in it depends
on its rows alone, not on who asked or when.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from temper.errors import RunError
from temper.files import read_json, write_json
from temper.plan.distill import CachePlan
from temper.remote_store import fetch_parts, publish_parts

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"

PART_BYTES = 64 * 2**20
PIECE_ROWS = 1024

TEMPERATURES = (1, 2, 4, 8, 20)
"""At which the error of `top_k` is measured."""

Columns = Mapping[str, npt.NDArray[Any]]
"""By name, an array (rows, …) each."""

# What another value of an entry of the recipe means, for people.
_CHANGES = {
    "data": "another data set",
    "normalisation": "another normalisation of the inputs",
    "features": "other features",
    "signals": "another type of signals",
    "rows": "another number of examples in a pass of the teacher",
    "device": "another kind of device or number of threads",
    "libraries": "other versions of the libraries",
    "views": "another number of views",
}


# -------------------------------------------------------------------------------------------------------------- the cut


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a split from `first` on, in one view of them, of which the teacher is asked at once."""

    split: str
    view: int
    first: int
    rows: int

    def file(self, folder: Path) -> Path:
        return folder / UNFINISHED / f"{self.split}-{self.view}-{self.first}.arrow"


@dataclass(frozen=True)
class Part:
    """A file of the cache: `rows` rows of a split from `first` on, in one view of them."""

    split: str
    view: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.split}/view-{self.view}/part-{self.first:09d}.arrow"

    def pieces(self, size: int) -> list[Piece]:
        end = self.first + self.rows
        return [Piece(self.split, self.view, at, min(size, end - at)) for at in range(self.first, end, size)]


@dataclass(frozen=True)
class Cut:
    """How a split is cut: into parts of `part_rows` rows, and these into pieces of `piece_rows`."""

    split: str
    rows: int
    views: int
    part_rows: int
    piece_rows: int

    def parts(self) -> list[Part]:
        return [
            Part(self.split, view, first, min(self.part_rows, self.rows - first))
            for view in range(self.views)
            for first in range(0, self.rows, self.part_rows)
        ]


def plan_cut(split: str, rows: int, views: int, *, asked_bytes: int, kept_bytes: int, pass_rows: int) -> Cut:
    """Parts of about `PART_BYTES` and pieces of about `PIECE_ROWS` rows, or of fewer whose answers have `PART_BYTES`;
    both of whole passes of the teacher, which take `pass_rows` each.

    Of one row the teacher says `asked_bytes`, and `kept_bytes` are kept.
    """
    piece_rows = max(min(PART_BYTES // asked_bytes, PIECE_ROWS) // pass_rows, 1) * pass_rows
    part_rows = max(PART_BYTES // kept_bytes // piece_rows, 1) * piece_rows
    return Cut(split, rows, views, part_rows, piece_rows)


# ----------------------------------------------------------------------------------------------------------- the format


@dataclass(frozen=True)
class Tally:
    """What came of asking: the number of examples that the teacher was run on, and, with `top_k`, of how many
    predictions the error was measured, its sum and its largest value, and the largest bound, each by `TEMPERATURES`.
    """

    examples: int
    predictions: int = 0
    total: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()
    bound: tuple[float, ...] = ()


def join_tallies(tallies: Sequence[Tally]) -> Tally:
    measured = [tally for tally in tallies if tally.predictions]
    return Tally(
        examples=sum(tally.examples for tally in tallies),
        predictions=sum(tally.predictions for tally in measured),
        total=tuple(map(math.fsum, zip(*(tally.total for tally in measured), strict=True))),
        largest=tuple(map(max, zip(*(tally.largest for tally in measured), strict=True))),
        bound=tuple(map(max, zip(*(tally.bound for tally in measured), strict=True))),
    )


def write_columns(file: Path, columns: Columns, tally: Tally) -> None:
    """Writes `file`, whole or not at all; several that write the same do not disturb each other."""
    import pyarrow as pa

    count = len(next(iter(columns.values())))
    arrays, fields = [], []
    for name, column in columns.items():
        shape, width = column.shape[1:], math.prod(column.shape[1:])
        values = pa.array(np.ascontiguousarray(column).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(values, width))
        fields.append(pa.field(name, arrays[-1].type, metadata={"shape": json.dumps(shape)}))
    schema = pa.schema(fields, metadata={"rows": str(count), "tally": json.dumps(asdict(tally))})
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def map_columns(file: Path) -> dict[str, npt.NDArray[Any]]:
    """The columns of `file`, read-only and mapped: what is not looked at is not read, and processes share the pages."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
        batch = reader.get_batch(0)
    columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        values = column.values.to_numpy(zero_copy_only=True)
        columns[field.name] = values.reshape(batch.num_rows, *json.loads(field.metadata[b"shape"]))
    return columns


def read_tally(file: Path, rows: int) -> Tally | None:
    """What `file` says of how it was made; None where it is missing, not whole or not of so many rows."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
            metadata = reader.schema.metadata
            found = json.loads(metadata[b"tally"]) if int(metadata[b"rows"]) == rows else None
    except (OSError, pa.ArrowInvalid):
        return None
    if found is None:
        return None
    errors = (tuple(found[name]) for name in ("total", "largest", "bound"))
    return Tally(found["examples"], found["predictions"], *errors)


# --------------------------------------------------------------------------------------------- what is there, and whole


def missing_pieces(folder: Path, cuts: Sequence[Cut]) -> list[Piece]:
    """What the teacher has yet to be asked."""
    return [
        piece
        for cut in cuts
        for part in cut.parts()
        if read_tally(folder / part.name, part.rows) is None
        for piece in part.pieces(cut.piece_rows)
        if read_tally(piece.file(folder), piece.rows) is None
    ]


def complete_cache(plan: CachePlan, cuts: Sequence[Cut]) -> None:
    """Makes the parts of their pieces, which must all be there, and declares the cache complete."""
    tallies = [_complete_part(plan.folder, cut, part) for cut in cuts for part in cut.parts()]
    parts = [part for cut in cuts for part in cut.parts()]
    files = [plan.folder / part.name for part in parts]
    known = [
        {**asdict(part), "name": part.name, "size": file.stat().st_size, "sha256": digest}
        for part, file, digest in zip(parts, files, _digests(files), strict=True)
    ]
    tally = join_tallies(tallies)
    manifest = {
        "key": plan.key,
        "recipe": _recipe(plan),
        "splits": {cut.split: asdict(cut) for cut in cuts},
        "teacher_examples": tally.examples,
        "top_k_error": _shown_error(tally),
        "parts": known,
    }
    write_json(plan.folder / MANIFEST, manifest)
    shutil.rmtree(plan.folder / UNFINISHED, ignore_errors=True)


def _complete_part(folder: Path, cut: Cut, part: Part) -> Tally:
    file = folder / part.name
    whole = read_tally(file, part.rows)
    if whole is not None:
        return whole
    pieces = part.pieces(cut.piece_rows)
    found = [read_tally(piece.file(folder), piece.rows) for piece in pieces]
    tally = join_tallies([known for known in found if known is not None])
    if len(pieces) == 1:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(pieces[0].file(folder), file)
        return tally
    mapped = [map_columns(piece.file(folder)) for piece in pieces]
    write_columns(file, {name: np.concatenate([columns[name] for columns in mapped]) for name in mapped[0]}, tally)
    return tally


def _shown_error(tally: Tally) -> list[dict[str, float]]:
    """The total variation distance between the teacher's softened predictions and the restored ones."""
    found = zip(TEMPERATURES, tally.total, tally.largest, tally.bound, strict=True) if tally.predictions else ()
    return [
        {"temperature": temperature, "mean": total / tally.predictions, "largest": largest, "bound": bound}
        for temperature, total, largest, bound in found
    ]


def open_manifest(plan: CachePlan) -> dict[str, Any]:
    """The manifest of a complete cache.

    Raises RunError where there is none, where a file has not its size, and, by name, where the cache was made by
    another teacher, of other data or otherwise than planned.
    """
    manifest = read_json(plan.folder / MANIFEST)
    if manifest is None:
        raise RunError(f"what the teacher says has not been computed into {plan.folder}; run the job again")
    changes = _changes(manifest["recipe"], _recipe(plan))
    if changes:
        raise RunError(f"the cache in {plan.folder} was made with {changes}; delete it and run the job again")
    for part in manifest["parts"]:
        file = plan.folder / part["name"]
        if not file.is_file() or file.stat().st_size != part["size"]:
            raise RunError(f"{file} is missing or damaged; run the job again, and it is computed anew")
    return dict(manifest)


def fetch_cache(folder: Path) -> None:
    """Where the storage is a bucket: brings what this machine lacks of a complete cache, if that is there."""
    fetch_parts(folder / MANIFEST, _part_digests)


def publish_cache(folder: Path) -> None:
    """Where the storage is a bucket: brings a complete cache there, unless it is there."""
    publish_parts(folder / MANIFEST, _part_digests(read_json(folder / MANIFEST)))


def _part_digests(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    return {part["name"]: part["sha256"] for part in manifest["parts"]}


def _recipe(plan: CachePlan) -> dict[str, Any]:
    """As JSON gives it back."""
    recipe: dict[str, Any] = json.loads(json.dumps({**plan.recipe, "views": plan.views}))
    return recipe


def _changes(made: Mapping[str, Any], planned: Mapping[str, Any]) -> str:
    changed = [key for key in {**planned, **made} if made.get(key) != planned.get(key)]
    told = [
        f"{_CHANGES.get(key, f'another {key}')} ({_shorten(made.get(key))}, now {_shorten(planned.get(key))})"
        for key in changed
    ]
    return " and ".join(told)


def _shorten(value: Any, limit: int = 100) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def damaged_parts(folder: Path) -> list[Path]:
    """The files of a complete cache that are missing or have not the checksum that its manifest says; only reads."""
    manifest = read_json(folder / MANIFEST) or {"parts": []}
    parts = {folder / part["name"]: part["sha256"] for part in manifest["parts"]}
    found = dict(zip(parts, _digests(list(parts)), strict=True))
    return [file for file, digest in parts.items() if found[file] != digest]


def remove_damaged(folder: Path) -> list[Path]:
    """Removes the damaged files of a complete cache, which is incomplete then, and returns them. For who has the
    cache's lock: what another command mends is not damaged for long."""
    damaged = damaged_parts(folder)
    if damaged:
        (folder / MANIFEST).unlink(missing_ok=True)
    for file in damaged:
        file.unlink(missing_ok=True)
    return damaged


def _digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, empty where it is missing; hashing lets go of Python's lock, so threads share it."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
