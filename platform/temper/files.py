"""Small JSON files that other processes read while they are written: whole, or not there; and what tells whether a file
is the one that was written."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that readers see the whole file or none of it, also after a power cut."""
    with replaced(path) as temporary, temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its place at the end of the block; nothing is left of it where
    the block fails. Each call has its own: threads of one process may write the same file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """The file's value, or None where it is missing or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def describe_file(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256, as manifests have them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def check_size(path: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that its manifest describes so, as far as can be seen without reading it, or None."""
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    return None if size == expected["bytes"] else f"{path}: {size} bytes, the manifest says {expected['bytes']}"


def check_file(path: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that its manifest describes so, or None."""
    problem = check_size(path, expected)
    if problem is None and describe_file(path)["sha256"] != expected["sha256"]:
        return f"{path}: its SHA-256 is not the manifest's; the file was damaged"
    return problem


def read_lines(path: Path) -> list[Any]:
    """The JSON values of a file's whole lines; none where the file is missing."""
    try:
        text = path.read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]
