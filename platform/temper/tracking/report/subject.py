"""What `temper report RUN|SWEEP` is about: a run's folder, or a sweep as MLflow has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.errors import JobError, Problem
from temper.files import read_json
from temper.products import find_run
from temper.run_folder import PLAN, REPORT, RUN, SWEEP_RUN, SWEEPS
from temper.storage import storage_folder, storage_name
from temper.tracking import registry


@dataclass(frozen=True)
class Subject:
    """`folder` is the run's, None of a sweep. `uri` and `run_id` are where MLflow has it; empty where that is not
    known. `storage` has its trials' folders, and `page` is where its page goes."""

    folder: Path | None
    uri: str
    run_id: str
    storage: Path
    page: Path


def find_subject(reference: str, storage: Path, uri: str) -> Subject:
    """What `reference`, a folder or an MLflow run's id, means. A sweep may be of the store at `uri`, without a folder
    in `storage`. Raises JobError where there is no such thing, and RunError where the store cannot be asked."""
    place = Path(reference)
    folder = place if place.is_dir() else find_run(reference, storage)
    if folder is not None and not (folder / SWEEP_RUN).exists():
        if not (folder / PLAN).exists():
            raise _problem(reference, "is not the folder of a run or a sweep", "give one in the storage, or a run's id")
        known = read_json(folder / RUN) or {}
        return Subject(folder.absolute(), known.get("uri", ""), known.get("run_id", ""), storage, folder / REPORT)
    known_sweeps = [(folder, read_json(folder / SWEEP_RUN) or {})] if folder is not None else _sweeps(storage)
    for sweep, known in known_sweeps:
        if folder is not None or known.get("run_id") == reference:
            return Subject(None, known["uri"], known["run_id"], sweep.absolute().parents[1], sweep / REPORT)
    tags = registry.run_tags(uri, reference) or {}
    if tags.get("temper.kind") == "phase":
        rule = f"is the phase {tags['temper.phase']} of the run {tags['mlflow.parentRunId']}"
        raise _problem(reference, rule, "give that one")
    if tags.get("temper.kind") != "sweep":
        rule = f"is no folder, and no run or sweep in {storage_name(storage)} has this id"
        raise _problem(reference, rule, "name the storage with --storage, or of a sweep MLflow with --uri")
    return Subject(None, uri, reference, storage_folder(tags["temper.storage"]), Path(f"report-{reference[:8]}.html"))


def _sweeps(storage: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    return ((file.parent, read_json(file) or {}) for file in sorted(storage.glob(f"{SWEEPS}/*/{SWEEP_RUN}")))


def _problem(reference: str, rule: str, remedy: str) -> JobError:
    return JobError([Problem("RUN|SWEEP", reference, rule, remedy)])
