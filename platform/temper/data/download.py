"""The published files of built-in data sets: where they lie, whether they are there, fetching and checking them.

The data folder is `TEMPER_DATA`, else `~/.cache/temper/data`; each set has a folder of its own in it. No torch here, so
that the driver can look for missing files before anything starts.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import urllib.request
import zlib
from pathlib import Path

from filelock import FileLock

from temper.errors import RunError
from temper.plan.built_in import BUILT_INS, RemoteFile

CIFAR10_MOSAIC_INDEX = "cifar10/index.json.gz"

_TIMEOUT_S = 30.0
_DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


def data_root() -> Path:
    """The folder that holds the published files of all data sets."""
    chosen = os.environ.get("TEMPER_DATA")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "temper" / "data"


def check_files(kind: str) -> list[RemoteFile]:
    """Files of the built-in set `kind` that are not in the data folder yet; looks at names only."""
    if kind not in BUILT_INS or has_mosaics(kind):
        return []
    return [file for file in BUILT_INS[kind].files if not (data_root() / file.name).is_file()]


def has_mosaics(kind: str) -> bool:
    """Whether CIFAR-10 lies in the data folder as mosaics, the other layout that is accepted."""
    return kind == "cifar10" and (data_root() / CIFAR10_MOSAIC_INDEX).is_file()


def fetch_files(kind: str) -> None:
    """Download what is missing of the built-in set `kind`. Raises RunError where that fails."""
    for file in check_files(kind):
        fetch_file(file)


def fetch_file(file: RemoteFile) -> Path:
    """The path of `file`, downloaded and checked first if it is missing; one process of a machine does so, others wait.

    Raises RunError that names the file, its address and the folder to put it in where there is no network, and the two
    checksums where they differ.
    """
    path = data_root() / file.name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                _download(file, path)
    except OSError as error:
        raise RunError(
            f"{path.name} is missing and could not be fetched from {file.url} ({error}); "
            f"download it elsewhere and put it into {path.parent}, or set TEMPER_DATA to a folder that has {file.name}"
        ) from error
    return path


def _download(file: RemoteFile, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT_S) as response, part.open("wb") as target:
            shutil.copyfileobj(response, target, 1 << 20)
        read_checked(file, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_file(file: RemoteFile) -> bytes:
    """The content of `file`, fetched if missing, checked, and unpacked if it is a .gz that is no .tar.gz."""
    return read_checked(file, fetch_file(file))


def read_checked(file: RemoteFile, path: Path) -> bytes:
    """The content of the copy of `file` at `path`. Raises RunError where its checksum differs or it is damaged."""
    packed = path.read_bytes()
    is_packed = file.name.endswith(".gz") and not file.name.endswith(".tar.gz")
    if file.of == "file" or not is_packed:
        _check_digest(file, path, packed)
    try:
        content = gzip.decompress(packed) if is_packed else packed
    except _DAMAGED_GZIP as error:
        raise RunError(f"{path} is damaged ({error}); delete it and get it again from {file.url}") from error
    if file.of == "content":
        _check_digest(file, path, content)
    return content


def _check_digest(file: RemoteFile, path: Path, content: bytes) -> None:
    algorithm, _, expected = file.digest.partition(":")
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise RunError(
            f"{path} is not the published file: {algorithm} of its {file.of} should be {expected} and is {found}; "
            f"delete it and get it again from {file.url}"
        )
