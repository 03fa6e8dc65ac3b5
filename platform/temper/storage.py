"""Where results lie: in a folder, or in a bucket together with a working folder that stands for it on each machine.

An address such as `s3://bucket/prefix` is served by `$TEMPER_CACHE/storage/<the address, escaped>`. What is written in
a storage is written there, and what others need is pushed to the bucket under the same relative path, its *key*. A path
in a working folder tells its bucket, so that code which has a path needs nothing else. Any working folder may be
removed while no command uses it: what counts is in the bucket.

Credentials are found as Arrow's file systems find them: in the environment, the cloud's own files or the node's role;
`AWS_ENDPOINT_URL`, `AWS_DEFAULT_REGION` and the parameters of an address (`?region=…`) say where a service is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from temper.errors import JobError, Problem, RunError

Answer = TypeVar("Answer")

SCHEMES = ("s3", "gs", "file")
_OPTIONS = {
    "s3": ("region", "scheme", "endpoint_override", "tls_ca_file_path"),
    "gs": ("scheme", "endpoint_override", "retry_limit_seconds"),
    "file": (),
}
# Small objects in one request; an answer in seconds where nobody answers (Google's library tries for 15 minutes).
_SETTINGS = {"s3": {"allow_delayed_open": "true"}, "gs": {"retry_limit_seconds": "10"}, "file": {}}

_WORKING_FOLDERS = "storage"
_LONGEST_NAME = 200
_CHUNK_BYTES = 8 * 2**20
_THREADS = 8
RETRY_DELAYS_S = (0.5, 2.0)
"""Between attempts; Arrow itself has tried three times in each."""

# What a service answers, and what helps. Only the last kind passes by itself.
_REFUSED = re.compile(
    r"ACCESS_DENIED|FORBIDDEN|UNRECOGNIZED_CLIENT|INVALID_(ACCESS_KEY|CLIENT_TOKEN|SIGNATURE)|SIGNATURE_DOES_NOT|"
    r"EXPIRED|PERMISSION_DENIED|UNAUTHENTICATED|HTTP response code: 40[13]|Permission denied|OAuth2|credentials",
    re.IGNORECASE,
)
_ABSENT = re.compile(r"NO_SUCH_BUCKET|bucket does not exist|NOT_FOUND", re.IGNORECASE)
_REMEDIES = (
    (_REFUSED, "give this machine credentials that may read and write there, e.g. AWS_ACCESS_KEY_ID and AWS_PROFILE"),
    (_ABSENT, "make the bucket, or name another"),
)
_UNREACHED = "check the network and AWS_ENDPOINT_URL and start again; what is done is kept"


def is_remote(storage: str) -> bool:
    """Whether `storage` is an address and no folder."""
    return "://" in storage


def absolute_storage(storage: str) -> str:
    """The storage by its one name: an absolute path, or the address without a slash at its end."""
    return storage.rstrip("/") if is_remote(storage) else str(Path(storage).absolute())


def storage_folder(storage: str) -> Path:
    """The folder in which this machine reads and writes the storage; it need not exist."""
    return _cache() / _WORKING_FOLDERS / _escape(absolute_storage(storage)) if is_remote(storage) else Path(storage)


def open_storage(storage: str) -> Path:
    """The folder of a storage that a command names with `--storage`. Raises JobError where that is an address that
    cannot be used."""
    problems = (check_address(storage) or check_reachable(storage)) if is_remote(storage) else []
    if problems:
        raise JobError([replace(problem, key="--storage") for problem in problems])
    return storage_folder(storage)


def storage_name(folder: Path) -> str:
    """The storage of this folder as people know it."""
    remote = remote_of(folder)
    return str(folder) if remote is None else remote.shown


def shared_path(folder: Path) -> str:
    """The folder as every node reaches it: its path, or its address in the bucket."""
    remote = remote_of(folder)
    if remote is None:
        return str(folder)
    parts = urlsplit(remote.address)
    return parts._replace(path=f"{parts.path}/{remote.key(folder)}").geturl()


def _cache() -> Path:
    return Path(os.environ.get("TEMPER_CACHE") or Path.home() / ".cache" / "temper").absolute()


def _escape(address: str) -> str:
    """As the name of a folder, from which the address can be read back."""
    return re.sub(rb"[^A-Za-z0-9.-]", lambda match: b"_%02x" % match[0][0], address.encode()).decode()


def _unescape(name: str) -> str:
    return re.sub(rb"_([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), name.encode()).decode()


def remote_of(path: Path) -> Remote | None:
    """The bucket of the working folder that `path` lies in; None in any other folder."""
    for folder in (path, *path.parents):
        if folder.parent.name == _WORKING_FOLDERS and folder.name.startswith(_WORKING_NAMES):
            return Remote(_unescape(folder.name), folder)
    return None


_WORKING_NAMES = tuple(_escape(f"{scheme}://") for scheme in SCHEMES)


# ---------------------------------------------------------------------------------------------------- what is asked for


def check_address(address: str) -> list[Problem]:
    """What is wrong with the address of a storage, as far as can be seen without a network."""
    parts = urlsplit(absolute_storage(address))
    shown = hide_credentials(address)
    known = _OPTIONS.get(parts.scheme)
    if known is None:
        rule = f"has the scheme {parts.scheme}, in which nothing can be stored"
        return [Problem("storage", shown, rule, "use s3://bucket/prefix, gs://bucket/prefix or a folder")]
    if parts.username not in (None, "anonymous") or parts.password is not None:
        rule = "holds credentials, which would be logged"
        return [Problem("storage", shown, rule, "give them in the environment, e.g. AWS_ACCESS_KEY_ID")]
    unknown = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name not in known]
    if unknown:
        remedy = f"use {' or '.join(known)}" if known else "leave it out"
        return [Problem("storage", shown, f"has the parameter {unknown[0]}, which {parts.scheme}:// has not", remedy)]
    return _check_place(parts.scheme, parts.hostname, parts.path, shown)


def _check_place(scheme: str, bucket: str | None, path: str, shown: str) -> list[Problem]:
    if scheme == "file" and (bucket or not path):
        return [Problem("storage", shown, "names no absolute path", "write file:///folder, or only the folder")]
    if scheme != "file" and not bucket:
        return [Problem("storage", shown, "names no bucket", f"write {scheme}://bucket/prefix")]
    if re.search(r"\s", shown) or len(_escape(shown)) > _LONGEST_NAME:
        return [Problem("storage", shown, "is too long or has spaces", "use a shorter prefix of letters and digits")]
    return []


def hide_credentials(address: str) -> str:
    """The address as it may be shown and logged."""
    return re.sub(r"\?.+", "?…", re.sub(r"(?<=://)(?!anonymous@)[^/?@]*@", "***@", address))


def check_reachable(address: str) -> list[Problem]:
    """Whether this machine is let into the bucket of a right address; a bucket that answered is not asked again."""
    remote = Remote(absolute_storage(address), storage_folder(address))
    try:
        _reach(remote)
    except RunError as error:
        return [Problem("storage", hide_credentials(address), f"cannot be used: {error}")]
    return []


@lru_cache
def _reach(remote: Remote) -> None:
    """Raises RunError where the bucket is not there or does not let this machine in."""
    remote.check_bucket()
    remote.exists("phases")


# ----------------------------------------------------------------------------------------------------------- the bucket


@dataclass(frozen=True)
class Stored:
    """An object in a bucket: its size, and when it was written, by the clock of the service, in nanoseconds."""

    bytes: int
    time_ns: int


@dataclass(frozen=True)
class Remote:
    """A bucket's prefix and the working folder that stands for it. Keys are paths relative to both.

    Every method tries again for some seconds where the service does not answer, and raises RunError, which names the
    place, what is wrong and what helps, where that is in vain.
    """

    address: str
    folder: Path

    def key(self, path: Path) -> str:
        return "" if path == self.folder else path.relative_to(self.folder).as_posix()

    def check_bucket(self) -> None:
        """Raises RunError where there is no such bucket."""
        import pyarrow.fs

        bucket = self._open()[1].split("/")[0]
        if not bucket:
            return  # a path, whose folders are made as they are needed
        found = self._try(bucket, lambda files, _: files.get_file_info(bucket).type)
        if found == pyarrow.fs.FileType.NotFound:
            raise RunError(f"there is no bucket {bucket}, or it cannot be seen; make it, or name another")

    def push(self, keys: Iterable[str]) -> None:
        """Brings files of the working folder into the bucket, several at a time."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._push, keys))

    def _push(self, key: str) -> None:
        with (self.folder / key).open("rb") as file:
            self._upload(key, lambda: (file.seek(0), iter(lambda: file.read(_CHUNK_BYTES), b""))[1])

    def write(self, key: str, content: bytes) -> None:
        """Writes an object that has no file."""
        self._upload(key, lambda: [content])

    def _upload(self, key: str, chunks: Callable[[], Iterable[bytes]]) -> None:
        def upload(files: Any, path: str) -> None:
            if files.type_name == "local":
                files.create_dir(path.rpartition("/")[0])
            with files.open_output_stream(path) as sink:
                for chunk in chunks():
                    sink.write(chunk)

        self._try(key, upload)

    def pull(self, digests: Mapping[str, str | None]) -> str | None:
        """Brings objects into the working folder, several at a time, each whole or not at all.

        `digests` gives for each key the SHA-256 that the object must have, where that is known. Returns what is wrong
        with one of them, missing or different, or None; those that are right are there then.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            problems = list(pool.map(self._pull, digests.keys(), digests.values()))
        return next((problem for problem in problems if problem), None)

    def _pull(self, key: str, digest: str | None) -> str | None:
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            found = self._try(key, lambda files, path: _download(files, path, unfinished), absent=None)
            if found is None:
                return f"{self.shown}/{key}: missing"
            if digest not in (None, found):
                return f"{self.shown}/{key}: its SHA-256 is not the manifest's; it was damaged"
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        return None

    def read(self, key: str) -> bytes | None:
        """An object's content; None where it is missing."""

        def read(files: Any, path: str) -> bytes:
            with files.open_input_stream(path) as source:
                return bytes(source.readall())

        return self._try(key, read, absent=None)

    def read_json(self, key: str) -> Any:
        """An object's value; None where it is missing or not whole."""
        try:
            return json.loads(self.read(key) or b"")
        except ValueError:
            return None

    def exists(self, key: str) -> bool:
        return self._try(key, lambda files, path: bool(files.get_file_info(path).is_file))

    def files(self, prefix: str) -> dict[str, Stored]:
        """The objects below a prefix, by key."""
        import pyarrow.fs

        def look(files: Any, path: str) -> dict[str, Stored]:
            selector = pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True)
            found = [info for info in files.get_file_info(selector) if info.is_file]
            return {f"{prefix}{info.path[len(path) :]}": Stored(info.size, info.mtime_ns) for info in found}

        return self._try(prefix, look)

    def folders(self, prefix: str) -> dict[str, dict[str, Stored]]:
        """The objects in each folder right below a prefix, by their paths in it."""
        found: dict[str, dict[str, Stored]] = {}
        for key, stored in self.files(prefix).items():
            name, _, path = key[len(prefix) :].lstrip("/").partition("/")
            if path:
                found.setdefault(name, {})[path] = stored
        return found

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects, one after the other; one that is not there is none too few."""
        for key in keys:
            self._try(key, lambda files, path: files.delete_file(path), absent=None)

    def delete_folder(self, prefix: str) -> None:
        self._try(prefix, lambda files, path: files.delete_dir(path), absent=None)

    @property
    def shown(self) -> str:
        return self.address.partition("?")[0]

    def _open(self) -> tuple[Any, str]:
        return _open(self.address)

    def _try(self, key: str, action: Callable[[Any, str], Any], **absent: Any) -> Any:
        """What `action` returns of the file system and the key's path in it; `absent`, where that is given and the
        action finds nothing."""
        import pyarrow

        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                files, base = self._open()
                return action(files, f"{base}/{key}" if base else key)
            except FileNotFoundError as error:
                if absent:
                    return absent["absent"]
                raise self._failure(key, error) from error
            except (OSError, pyarrow.ArrowException) as error:
                if delay_s is None or any(pattern.search(str(error)) for pattern, _ in _REMEDIES):
                    raise self._failure(key, error) from error
                time.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def _failure(self, key: str, error: Exception) -> RunError:
        text = " ".join(str(error).split())
        remedy = next((remedy for pattern, remedy in _REMEDIES if pattern.search(text)), _UNREACHED)
        return RunError(f"{self.shown}: {key}: {text}; {remedy}")


@lru_cache
def _open(address: str) -> tuple[Any, str]:
    """Arrow's file system, and the path of the prefix in it."""
    import pyarrow.fs

    parts = urlsplit(address)
    options = {**_SETTINGS[parts.scheme], **dict(parse_qsl(parts.query))}
    files, base = pyarrow.fs.FileSystem.from_uri(parts._replace(query=urlencode(options)).geturl())
    return files, base.rstrip("/")


def _download(files: Any, path: str, to: Path) -> str:
    """Copies an object into the file `to`; its SHA-256."""
    digest = hashlib.sha256()
    with files.open_input_stream(path) as source, to.open("wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
