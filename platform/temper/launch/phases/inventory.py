"""What lies in a storage: its phases, and the runs that need them.

Only small files are read. A phase is known by its folder's `plan.json`, that of the run which computed it; the runs
that need it, by the `plan.json` in their own folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from temper.claims import claimed_keys
from temper.errors import JobError, Problem
from temper.files import read_json
from temper.launch.phase_store import is_in_use
from temper.products import find_runs, read_phase, run_name
from temper.remote_store import fetch_outlines
from temper.run_folder import PHASE_MANIFEST, PHASES, PLAN
from temper.storage import Remote, Stored, remote_of

State = Literal["complete", "unfinished", "in use"]
Chain = Sequence[Mapping[str, Any]]
"""A job's phases from the first to one of them, each as its `plan.json` has it."""

SHORT = 10
"""Characters of a fingerprint that people are shown."""

FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredPhase:
    """A phase's folder. `plan` is that of the run which computed it, `chain` its phases up to this one, empty where the
    plan is gone; `manifest` is None while the phase is unfinished. `bytes` is what it takes on the disk. `used_s` is
    when it was last used, also by a phase that builds on it, and `computed_s` when its manifest was written, in seconds
    since 1970."""

    folder: Path
    plan: Mapping[str, Any]
    chain: Chain
    manifest: Mapping[str, Any] | None
    bytes: int
    used_s: float
    computed_s: float | None
    in_use: bool

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    @property
    def before(self) -> str:
        """The fingerprint of the phase that it goes on from; empty for the first."""
        return self.chain[-2]["fingerprint"] if len(self.chain) > 1 else ""

    @property
    def state(self) -> State:
        if self.in_use:
            return "in use"
        return "unfinished" if self.manifest is None else "complete"

    @property
    def metric(self) -> dict[str, float]:
        """What tells best how good it is: the job's first metric on the test split, or the nearest to that; empty where
        there is none."""
        metrics = {} if self.manifest is None else self.manifest["metrics"]
        wanted = [*self.plan.get("job", {}).get("evaluation", {}).get("metrics", ()), "loss"]
        names = [f"{split}/{name}" for name in wanted for split in ("test", "eval", "train")]
        return next(({name: metrics[name]} for name in names if name in metrics), {})

    def to_dict(self) -> dict[str, Any]:
        entry = self.chain[-1] if self.chain else {}
        return {
            "fingerprint": self.fingerprint,
            "name": entry.get("name", "unknown"),
            "job": self.plan.get("job", {}).get("name", ""),
            "kind": entry.get("kind", ""),
            "steps": entry.get("steps", 0),
            "before": self.before,
            "bytes": self.bytes,
            "used_s": self.used_s,
            "computed_s": self.computed_s,
            "seconds": None if self.manifest is None else self.manifest["seconds"],
            "metric": self.metric,
            "state": self.state,
            "is_complete": self.manifest is not None,
            "run": run_name(self.plan),
        }


def read_store(storage: Path) -> list[StoredPhase]:
    """Every phase in the storage, complete or not; of a bucket, those that are there, wherever they are besides."""
    remote = remote_of(storage)
    if remote is not None:
        fetch_outlines(storage)
        return _used_through(_read_bucket(remote, storage))
    folders = sorted(path for path in (storage / PHASES).glob("*") if path.is_dir())
    return _used_through([_read_stored(folder) for folder in folders])


def _read_bucket(remote: Remote, storage: Path) -> list[StoredPhase]:
    prefix, claimed = remote.key(storage / PHASES), claimed_keys(remote)
    return [
        _read_remote(remote, storage / PHASES / name, objects, f"{prefix}/{name}" in claimed)
        for name, objects in sorted(remote.folders(prefix).items())
    ]


def _read_remote(remote: Remote, folder: Path, objects: Mapping[str, Stored], is_claimed: bool) -> StoredPhase:
    plan = read_json(folder / PLAN) or {}
    manifest = remote.read_json(remote.key(folder / PHASE_MANIFEST)) if PHASE_MANIFEST in objects else None
    sizes = {name: stored.bytes for name, stored in objects.items()}
    is_whole = manifest is not None and all(sizes.get(name) == of["bytes"] for name, of in manifest["files"].items())
    return StoredPhase(
        folder=folder,
        plan=plan,
        chain=chain_to(plan, folder.name),
        manifest=manifest if is_whole else None,
        bytes=sum(sizes.values()),
        used_s=max(stored.time_ns for stored in objects.values()) / 1e9,
        computed_s=objects[PHASE_MANIFEST].time_ns / 1e9 if PHASE_MANIFEST in objects else None,
        in_use=is_claimed or is_in_use(folder),
    )


def _read_stored(folder: Path) -> StoredPhase:
    plan, manifest = read_json(folder / PLAN) or {}, folder / PHASE_MANIFEST
    size, newest = measure(folder)
    return StoredPhase(
        folder=folder,
        plan=plan,
        chain=chain_to(plan, folder.name),
        manifest=read_phase(folder),
        bytes=size,
        used_s=newest,
        computed_s=manifest.stat().st_mtime if manifest.is_file() else None,
        in_use=is_in_use(folder),
    )


def measure(folder: Path) -> tuple[int, float]:
    """The bytes of all files below the folder, and when the newest was written, in seconds since 1970."""
    size, newest = 0, 0.0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(os.path.join(place, name))
            except FileNotFoundError:  # who runs the phase replaces its files
                continue
            size, newest = size + status.st_size, max(newest, status.st_mtime)
    return size, newest


def _used_through(phases: Sequence[StoredPhase]) -> list[StoredPhase]:
    """What is built on a phase uses it."""
    used = {phase.fingerprint: phase.used_s for phase in phases}
    for phase in sorted(phases, key=lambda phase: -len(phase.chain)):
        if phase.before in used:
            used[phase.before] = max(used[phase.before], used[phase.fingerprint])
    return [replace(phase, used_s=used[phase.fingerprint]) for phase in phases]


def chain_to(plan: Mapping[str, Any], fingerprint: str) -> Chain:
    """The phases of a plan, as JSON has it, up to the one with this fingerprint; none where it has no such phase."""
    phases = plan.get("phases", [])
    places = [index for index, phase in enumerate(phases) if phase["fingerprint"] == fingerprint]
    return phases[: places[0] + 1] if places else []


@dataclass(frozen=True)
class Reference:
    """A run in the storage, and what it needs there: `phases`, its teachers' among them, and a teacher's `cache`."""

    name: str
    job: str
    phases: frozenset[str]
    cache: str


def read_references(storage: Path) -> list[Reference]:
    return [_reference(storage, folder, read_json(folder / PLAN) or {}) for folder in find_runs(storage)]


def _reference(storage: Path, folder: Path, plan: Mapping[str, Any]) -> Reference:
    distill = plan.get("distill") or {}
    places = [part for teacher in distill.get("teachers", ()) for part in Path(teacher["place"]).parts]
    return Reference(
        name=str(folder.relative_to(storage)),
        job=plan.get("job", {}).get("name", ""),
        phases=frozenset(
            [phase["fingerprint"] for phase in plan.get("phases", ())]
            + [part for part in places if FINGERPRINT.fullmatch(part)]
        ),
        cache=Path((distill.get("cache") or {}).get("folder", "")).name,
    )


def find_phase(reference: str, phases: Sequence[StoredPhase], storage: Path) -> StoredPhase:
    """The phase whose fingerprint begins with `reference`. Raises JobError unless there is exactly one."""
    known = {phase.fingerprint: phase for phase in phases}
    return known[find_fingerprint(reference, known, storage)]


def find_fingerprint(reference: str, fingerprints: Iterable[str], storage: Path) -> str:
    """The one that begins with `reference`. Raises JobError unless there is exactly one."""
    fitting = [fingerprint for fingerprint in fingerprints if reference and fingerprint.startswith(reference)]
    if not fitting:
        rule, remedy = f"is the beginning of no phase's fingerprint in {storage}", "see temper phases list"
        raise JobError([Problem("PHASE", reference, rule, remedy)])
    if len(fitting) > 1:
        longer = [fingerprint[: len(reference) + 4] for fingerprint in fitting[:3]]
        rule = f"is the beginning of {len(fitting)} phases' fingerprints"
        raise JobError([Problem("PHASE", reference, rule, f"give more of it, e.g. {' or '.join(longer)}")])
    return fitting[0]
