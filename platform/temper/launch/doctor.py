"""`temper doctor`: looks for what makes runs fail or hang, and names each fault with its remedy.

A check is a function that returns findings. None of them changes anything, but that on runs in MLflow: those that a
killed command left open are brought to their end.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from temper.errors import RunError
from temper.launch.reconcile import reconcile, settle_lost
from temper.plan.checks import check_tracking_uri
from temper.storage import remote_of
from temper.tracking.mlflow_store import storage_uri
from temper.tracking.redact import redact_text

Level = Literal["ok", "warning", "fault"]

_STALE_LOCK_S = 600.0
_LARGE_WORKING_FOLDER = 100 * 2**20
_LITTLE_SPACE = 2 * 2**30
# Ray keeps its objects in /dev/shm; with less it falls back to the disk.
_LITTLE_SHARED_MEMORY = 512 * 2**20
# What Ray leaves out of a working folder by itself; beside it, what .gitignore names.
_NOT_TRAVELLING = {".git", ".venv", "venv", "__pycache__"}


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `remedy` is empty where nothing need be done."""

    check: str
    level: Level
    text: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class VersionRange:
    """Versions `[lowest, below)` are tested; `known_bad` says what others do."""

    lowest: str
    below: str
    known_bad: str


VERSIONS: dict[str, VersionRange] = {
    "torch": VersionRange(
        "2.13", "2.14", "DeepSpeed's hooks and torchvision's operators are tied to the minor version"
    ),
    "ray": VersionRange("2.60", "2.61", "Ray Train's callbacks and controller change between minor versions"),
    "deepspeed": VersionRange("0.19.3", "0.20", "before 0.19.3 a pipeline's accumulated gradients are wrong"),
    "mlflow": VersionRange("3.17", "4", "before 3.17 system metrics read the whole history when a run resumes"),
}


def examine(storage: Path) -> list[Finding]:
    """All findings for this machine, with runs in `storage`."""
    return [finding for check in CHECKS for finding in check(storage)]


def _check_python(storage: Path) -> Iterator[Finding]:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        yield Finding("python", "ok", found)
    else:
        yield Finding("python", "fault", f"{found}; temper runs on 3.11 and 3.12", "make install PYTHON=python3.11")


def _check_versions(storage: Path) -> Iterator[Finding]:
    for name, wanted in VERSIONS.items():
        try:
            found = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "fault", "not installed", "make install")
            continue
        if Version(wanted.lowest) <= found < Version(wanted.below):
            yield Finding(name, "ok", str(found))
        else:
            text = f"{found} is outside {wanted.lowest} … {wanted.below}: {wanted.known_bad}"
            yield Finding(name, "fault", text, "pip install -c constraints.txt -e .")


def _check_ray_parts(storage: Path) -> Iterator[Finding]:
    if util.find_spec("aiohttp_cors") is None or util.find_spec("opencensus") is None:
        text = "Ray without its `default` extra: a stopped trial keeps its placement group, and a sweep hangs"
        yield Finding("ray[default]", "fault", text, "pip install -c constraints.txt 'ray[default,train,tune]'")
    else:
        yield Finding("ray[default]", "ok", "the dashboard's State API is there")


def _check_gpu(storage: Path) -> Iterator[Finding]:
    import torch

    driver = Path("/proc/driver/nvidia/version").is_file()
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        yield Finding("gpu", "ok", f"{torch.cuda.device_count()} × {', '.join(sorted(names))}")
    elif driver:
        text = f"an NVIDIA driver, but torch {torch.__version__} sees no GPU"
        yield Finding("gpu", "fault", text, "install the CUDA build of torch, or a driver that it supports")
    else:
        yield Finding("gpu", "ok", "none; jobs run on the CPU")


def _check_jit_locks(storage: Path) -> Iterator[Finding]:
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(configured) if configured else cache / "torch_extensions"
    stale = [lock for lock in sorted(folder.glob("**/lock")) if _age_s(lock) > _STALE_LOCK_S]
    for lock in stale:
        text = f"{lock}: left by a compilation that was killed; every later one waits for it without a word"
        yield Finding("jit lock", "fault", text, f"rm {shlex.quote(str(lock))}")
    if not stale:
        yield Finding("jit lock", "ok", f"none left behind in {folder}")


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # the compilation that held it has ended
        return 0.0


def _check_bucket(storage: Path) -> Iterator[Finding]:
    remote, key = remote_of(storage), f"doctor-{uuid.uuid4().hex}"
    if remote is None:
        return
    try:
        remote.write(key, b"x")
        intact = remote.read(key) == b"x"
        remote.delete([key])
    except RunError as error:
        yield Finding("bucket", "fault", str(error), "mend that, or choose another storage")
        return
    if intact:
        yield Finding("bucket", "ok", f"{remote.shown}: written, read, removed")
    else:
        yield Finding("bucket", "fault", f"{remote.shown}: what was written cannot be read", "use another bucket")


def _check_storage(storage: Path) -> Iterator[Finding]:
    existing = storage.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryDirectory(dir=existing, prefix=".temper-doctor-") as folder:
            first, second = Path(folder) / "a", Path(folder) / "b"
            with first.open("w") as file:
                file.write("x")
                os.fsync(file.fileno())
            second.write_text("y")
            os.replace(first, second)
            intact = second.read_text() == "x"
    except OSError as error:
        yield Finding("storage", "fault", f"{existing}: {error}", "choose another folder with storage=…")
        return
    if not intact:
        text = f"{existing}: a rename did not replace its target; checkpoints need that"
        yield Finding("storage", "fault", text, "choose a local or NFS folder with storage=…")
        return
    free = shutil.disk_usage(existing).free
    level: Level = "ok" if free > _LITTLE_SPACE else "warning"
    remedy = "" if level == "ok" else "free some space: a checkpoint holds weights and optimizer state"
    yield Finding("storage", level, f"{existing}: written, synced, renamed; {_bytes(free)} free", remedy)


def _check_tracking(storage: Path) -> Iterator[Finding]:
    configured = os.environ.get("MLFLOW_TRACKING_URI") or None
    problems = check_tracking_uri(configured, "MLFLOW_TRACKING_URI") if configured else []
    if problems:
        yield from (
            Finding("tracking", "fault", redact_text(str(item)), "set another one, or none") for item in problems
        )
        return
    uri = storage_uri(storage)
    shown = redact_text(uri)
    if uri.startswith("sqlite:///"):
        yield _sqlite_finding(Path(uri.removeprefix("sqlite:///")))
    elif uri.startswith(("http://", "https://")):
        try:
            yield Finding("tracking", "ok", f"{shown} answers {_health_status(uri)}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            remedy = "start the server, or unset MLFLOW_TRACKING_URI to use SQLite in the storage"
            yield Finding("tracking", "fault", f"{shown}: {redact_text(str(error))}", remedy)
    else:
        yield Finding("tracking", "ok", f"{shown} (not contacted)")


def _health_status(uri: str) -> int:
    """What the server answers. Raises OSError, ValueError or HTTPException where there is none."""
    parts = urllib.parse.urlsplit(uri)
    # Without the credentials, which urllib would take for a part of the host's name.
    host, path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/") + "/health"
    try:
        with urllib.request.urlopen(f"{parts.scheme}://{host}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there, and wants them
            return error.code
        raise


def _sqlite_finding(path: Path) -> Finding:
    if not os.path.exists(path):  # which says no, too, where the storage cannot be
        return Finding("tracking", "ok", f"{path} will be made by the first run")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)) as database:
            tables = {row[0] for row in database.execute("select name from sqlite_master where type = 'table'")}
            runs = database.execute("select count(*) from runs").fetchone()[0] if "runs" in tables else 0
    except sqlite3.Error as error:
        remedy = "move the file away; the next run makes a new one"
        return Finding("tracking", "fault", f"{path}: {error}", remedy)
    return Finding("tracking", "ok", f"{path}: {runs} run{'s' if runs != 1 else ''}")


def _check_runs(storage: Path) -> Iterator[Finding]:
    """Runs that MLflow shows as RUNNING and nobody is at."""
    if not os.path.isdir(storage):
        return  # another check says so
    uri = storage_uri(storage)
    settled = reconcile(storage)
    if uri.startswith(("http://", "https://")) or os.path.exists(uri.removeprefix("sqlite:///")):
        try:
            settled += settle_lost(storage, uri)
        except RunError as error:
            yield Finding("runs", "warning", str(error), "see what the check on tracking says")
    if not settled:
        yield Finding("runs", "ok", "none was left open in MLflow")
    for run in settled:
        text = f"{run.name}, MLflow run {run.run_id}, was left open by a command that died; it is {run.status} now"
        yield Finding("runs", "ok", text, "the same command goes on with it" if run.status == "KILLED" else "")


def _check_working_folder(storage: Path) -> Iterator[Finding]:
    sizes: Counter[str] = Counter()
    for name in _listed_files(Path.cwd()):
        if _NOT_TRAVELLING.intersection(Path(name).parts):
            continue
        with contextlib.suppress(OSError):  # removed meanwhile
            sizes[Path(name).parts[0]] += os.lstat(name).st_size
    total = sizes.total()
    if total <= _LARGE_WORKING_FOLDER:
        yield Finding("working folder", "ok", f"{_bytes(total)}; it travels with a submitted job")
        return
    largest = ", ".join(f"{name} ({_bytes(size)})" for name, size in sizes.most_common(3))
    text = f"{_bytes(total)}, and all of it travels with a submitted job; largest: {largest}"
    yield Finding("working folder", "warning", text, "move data elsewhere, or name it in .gitignore")


def _listed_files(folder: Path) -> list[str]:
    """Paths of files relative to `folder`; in a git repository, without the ignored ones."""
    try:
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(listing, cwd=folder, capture_output=True, check=True)
        return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return list(_walk(folder))


def _walk(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NOT_TRAVELLING]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in files)


def _check_shared_memory(storage: Path) -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total
    if size >= _LITTLE_SHARED_MEMORY:
        yield Finding("shared memory", "ok", _bytes(size))
    else:
        text = f"/dev/shm has {_bytes(size)}; Ray keeps its objects there and falls back to the disk"
        yield Finding("shared memory", "warning", text, "in a container: --shm-size=2g")


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


CHECKS: tuple[Callable[[Path], Iterator[Finding]], ...] = (
    _check_python,
    _check_versions,
    _check_ray_parts,
    _check_gpu,
    _check_jit_locks,
    _check_bucket,
    _check_storage,
    _check_tracking,
    _check_runs,
    _check_working_folder,
    _check_shared_memory,
)


def show_findings(findings: list[Finding]) -> str:
    """The findings as lines for people, faults last, where they are read."""
    order: dict[Any, int] = {"ok": 0, "warning": 1, "fault": 2}
    marks = {"ok": "ok     ", "warning": "warning", "fault": "FAULT  "}
    lines = []
    for finding in sorted(findings, key=lambda item: order[item.level]):
        remedy = f"\n         → {finding.remedy}" if finding.remedy else ""
        lines.append(f"{marks[finding.level]}  {finding.check}: {finding.text}{remedy}")
    return "\n".join(lines)
