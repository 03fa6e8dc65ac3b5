"""What a plan reads of a safetensors file: the shapes of its tensors and a hash of its content. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, TypeAdapter

from temper.errors import CheckpointError

_LENGTH_BYTES = 8  # of the number in front that says how long the header is
_MOST_HEADER_BYTES = 100_000_000  # the library's own limit
_METADATA = "__metadata__"


class _Entry(BaseModel):
    """What the header says of a tensor; `data_offsets` are where it begins and ends in the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_OBJECT = TypeAdapter(dict[str, Any])
_ENTRIES = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True)
class WeightsFile:
    """`shapes` are by the tensors' names. `content` is a SHA-256 over names, types, shapes and data: files that hold
    the same have the same, whatever their metadata, which safetensors writes in another order every time."""

    shapes: Mapping[str, tuple[int, ...]]
    content: str


def read_weights_file(path: Path) -> WeightsFile:
    """Reads all of the file. Raises CheckpointError where it is no safetensors file, or not a whole one."""
    with path.open("rb") as stream:
        entries = _read_header(stream, path)
        expected = stream.tell() + max((entry.data_offsets[1] for entry in entries.values()), default=0)
        if path.stat().st_size != expected:
            raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, and by its header {expected:,}")
        header = {name: entry.model_dump() for name, entry in entries.items()}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        content = hashlib.file_digest(stream, lambda: digest).hexdigest()  # goes on where the header ends
    return WeightsFile({name: entry.shape for name, entry in entries.items()}, content)


def _read_header(stream: BinaryIO, path: Path) -> dict[str, _Entry]:
    """The length of the header, then the header, in JSON (https://github.com/huggingface/safetensors#format)."""
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    try:
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = _OBJECT.validate_json(stream.read(length))
        return _ENTRIES.validate_python({name: entry for name, entry in header.items() if name != _METADATA})
    except ValueError:
        raise CheckpointError(f"{path}: is not a safetensors file") from None
