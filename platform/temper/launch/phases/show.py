"""`temper phases list` and `temper phases show`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from temper.config.text import format_yaml
from temper.launch.phases.inventory import (
    FINGERPRINT,
    SHORT,
    Reference,
    State,
    StoredPhase,
    find_phase,
    measure,
    read_references,
    read_store,
)
from temper.launch.phases.units import count, show_age
from temper.locks import is_held
from temper.plan.metric_names import without_classes
from temper.plan.show import show_size
from temper.storage import Stored, remote_of
from temper.techniques.distill.cache_files import MANIFEST as CACHE_MANIFEST

# ----------------------------------------------------------------------------------------------------------------- list


@dataclass(frozen=True)
class StoredCache:
    """What a teacher says, kept for the `jobs` that learn from it; `used_s` is when it was last written."""

    key: str
    jobs: tuple[str, ...]
    bytes: int
    used_s: float
    state: State

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": "teacher cache"}


def list_phases(storage: Path) -> dict[str, Any]:
    """`phases` and teachers' `caches`, those that were used last at the end, a phase always after the one that it goes
    on from; `bytes` of all."""
    phases, caches = _in_chains(read_store(storage)), _read_caches(storage)
    return {
        "storage": str(storage),
        "phases": [phase.to_dict() for phase in phases],
        "caches": [cache.to_dict() for cache in caches],
        "bytes": sum(phase.bytes for phase in phases) + sum(cache.bytes for cache in caches),
    }


def _in_chains(phases: Sequence[StoredPhase]) -> list[StoredPhase]:
    """Each phase is followed by those that build on it."""
    known = {phase.fingerprint for phase in phases}
    built_on: dict[str, list[StoredPhase]] = {}
    for phase in sorted(phases, key=lambda phase: (phase.used_s, phase.fingerprint)):
        built_on.setdefault(phase.before if phase.before in known else "", []).append(phase)

    def tree(before: str) -> Iterator[StoredPhase]:
        for phase in built_on.get(before, ()):
            yield phase
            yield from tree(phase.fingerprint)

    return list(tree(""))


def _read_caches(storage: Path) -> list[StoredCache]:
    remote, folder = remote_of(storage), storage / "teachers"
    if remote is None:
        there = {path.name: _measure_cache(path) for path in folder.glob("*") if FINGERPRINT.fullmatch(path.name)}
    else:
        found = remote.folders(remote.key(folder))
        there = {name: _measure_objects(found[name]) for name in found if FINGERPRINT.fullmatch(name)}
    references = read_references(storage) if there else []
    caches = [_read_cache(folder / name, references, *there[name]) for name in there]
    return sorted(caches, key=lambda cache: (cache.used_s, cache.key))


def _measure_cache(folder: Path) -> tuple[int, float, bool]:
    """Its bytes, when it was last written, whether it is complete."""
    return (*measure(folder), (folder / CACHE_MANIFEST).is_file())


def _measure_objects(objects: Mapping[str, Stored]) -> tuple[int, float, bool]:
    newest = max(stored.time_ns for stored in objects.values()) / 1e9
    return sum(stored.bytes for stored in objects.values()), newest, CACHE_MANIFEST in objects


def _read_cache(
    folder: Path, references: Sequence[Reference], size: int, newest: float, is_complete: bool
) -> StoredCache:
    jobs = {reference.job for reference in references if reference.cache == folder.name}
    state: State = "complete" if is_complete else "unfinished"
    is_made = is_held(folder.with_suffix(".lock"))
    return StoredCache(folder.name, tuple(sorted(jobs)), size, newest, "in use" if is_made else state)


def phases_table(listed: Mapping[str, Any], now_s: float) -> str:
    """What :func:`list_phases` gives, for people; phases are set in below the one that they go on from."""
    if not listed["phases"] and not listed["caches"]:
        return f"no phases in {listed['storage']}"
    header = ("phase", "name", "job", "kind", "steps", "size", "used", "computed", "took", "metric", "state", "run")
    depth: dict[str, int] = {}
    rows = []
    for phase in listed["phases"]:
        depth[phase["fingerprint"]] = depth.get(phase["before"], -1) + 1
        rows.append(_phase_row(phase, depth[phase["fingerprint"]], now_s))
    rows += [_cache_row(cache, now_s) for cache in listed["caches"]]
    total = f"{count(len(listed['phases']), 'phase')}, {count(len(listed['caches']), 'teacher cache')}: "
    return "\n".join([*_table([header, *rows]), total + show_size(listed["bytes"])])


def _phase_row(phase: Mapping[str, Any], depth: int, now_s: float) -> tuple[str, ...]:
    return (
        "  " * (depth - 1) + ("└ " if depth else "") + phase["fingerprint"][:SHORT],
        phase["name"],
        phase["job"],
        phase["kind"],
        str(phase["steps"]),
        show_size(phase["bytes"]),
        show_age(now_s - phase["used_s"]),
        "" if phase["computed_s"] is None else show_age(now_s - phase["computed_s"]),
        "" if phase["seconds"] is None else f"{phase['seconds']:.1f} s",
        "".join(f"{name} {value:.4f}" for name, value in phase["metric"].items()),
        phase["state"],
        phase["run"],
    )


def _cache_row(cache: Mapping[str, Any], now_s: float) -> tuple[str, ...]:
    used, jobs = show_age(now_s - cache["used_s"]), ", ".join(cache["jobs"])
    short, size = cache["key"][:SHORT], show_size(cache["bytes"])
    return (short, "", jobs, cache["kind"], "", size, used, "", "", "", cache["state"], "")


_RIGHT = range(4, 9)  # columns of numbers


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if place in _RIGHT else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# ----------------------------------------------------------------------------------------------------------------- show


def show_phase(reference: str, storage: Path) -> dict[str, Any]:
    """All that is known of one phase, and of what it is made of: `ingredients`, None where it was computed before these
    were kept; `runs` that need it; `phases` that go on from it. Raises JobError where `reference` is not one phase."""
    phases = read_store(storage)
    phase = find_phase(reference, phases, storage)
    manifest = phase.manifest or {}
    return {
        **phase.to_dict(),
        "ingredients": phase.chain[-1].get("ingredients") if phase.chain else None,
        "files": {name: known["bytes"] for name, known in manifest.get("files", {}).items()},
        "metrics": manifest.get("metrics", {}),
        "runs": [item.name for item in read_references(storage) if phase.fingerprint in item.phases],
        "phases": [other.fingerprint for other in phases if other.before == phase.fingerprint],
    }


def phase_text(shown: Mapping[str, Any]) -> str:
    """What :func:`show_phase` gives as YAML, sizes and times for people."""
    plain = ("fingerprint", "name", "job", "kind", "steps", "state", "before", "run")
    values = {
        **{name: shown[name] for name in plain if shown[name] != ""},
        "size": show_size(shown["bytes"]),
        "used": _moment(shown["used_s"]),
        **({} if shown["computed_s"] is None else {"computed": _moment(shown["computed_s"])}),
        "ingredients": shown["ingredients"] or "not kept by the temper that computed it",
        "files": {name: show_size(size) for name, size in shown["files"].items()},
        "metrics": without_classes(shown["metrics"]),
        "runs": shown["runs"],
        "phases": shown["phases"],
    }
    return format_yaml(values).rstrip()


def _moment(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
