"""What a reference leads to: the folder of a run, a phase, a checkpoint or an export, and the job that it came from.

No torch is imported, so that a plan can find a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from temper.config.load import load_job
from temper.config.schema import JobConfig
from temper.errors import CheckpointError, JobError, Problem
from temper.files import check_file, check_size, describe_file, read_json, write_json
from temper.remote_store import fetch_checkpoint, fetch_place, fetch_run, publish_phase
from temper.run_folder import CHECKPOINT_MANIFEST, CHECKPOINTS, JOB, PHASE_MANIFEST, PHASES, PLAN, RUN, WEIGHTS
from temper.storage import remote_of, storage_name

MODEL = "model.safetensors"
"""The weights in an export's folder, beside its `job.yaml`."""

_RUN_FOLDERS = ("*", "sweeps/*/shared", "sweeps/*/trials/*")
"""Where run folders lie in a storage."""


@dataclass(frozen=True)
class Place:
    """A phase, or one of its checkpoints, on the disk.

    `folder` is the phase's or the checkpoint's. `job` and `plan` (as JSON has it) are those of the run that was asked
    for, else of the one that computed the phase.
    """

    kind: Literal["phase", "checkpoint"]
    folder: Path
    phase: str
    fingerprint: str
    job: JobConfig
    plan: Mapping[str, Any]

    @property
    def phase_folder(self) -> Path:
        return self.folder if self.kind == "phase" else self.folder.parent.parent

    @property
    def import_folders(self) -> tuple[str, ...]:
        """Where the `kind: python` targets of the job were."""
        return tuple(self.plan.get("import_folders", ()))

    @property
    def run(self) -> dict[str, Any]:
        """`run.json` of the run: its MLflow id and store; empty where that is gone."""
        return _run_record(self.phase_folder, self.plan)

    @property
    def is_complete(self) -> bool:
        """Whether the phase came to its end, or the checkpoint is whole."""
        if self.kind == "checkpoint":
            return read_json(self.folder / CHECKPOINT_MANIFEST) is not None
        manifest = read_phase(self.folder)
        return manifest is not None and (self.folder / manifest["checkpoint"] / CHECKPOINT_MANIFEST).is_file()


def find_place(reference: str, storage: Path, phase: str | None = None) -> Place:
    """What an MLflow run's id means, or the folder of a run, a phase or a checkpoint.

    `phase` names one of a run's phases; by default it is the last.

    Raises:
        JobError: there is no such thing, or the run has no such phase.
        CheckpointError: its folder lacks what says where it came from.
    """
    return open_place(find_folder(reference, storage), phase, reference)


def open_place(folder: Path, phase: str | None, reference: str) -> Place:
    """The phase or checkpoint of the folder that `reference` led to; see :func:`find_place`."""
    if is_phase(folder) or is_checkpoint(folder):
        if phase is not None:
            raise JobError([Problem("--phase", phase, f"names a phase of a run, and {folder} is none", "leave it out")])
        return _open_phase(folder) if is_phase(folder) else _open_checkpoint(folder)
    plan = read_json(folder / PLAN)
    if plan is None:
        rule = "is neither a run, nor a phase, nor a checkpoint"
        if (folder / "trials").is_dir():
            trials = sorted(path.name for path in (folder / "trials").iterdir())
            remedy = (
                f"name one of its trials, e.g. {folder / 'trials' / trials[0]}" if trials else "it has no trial yet"
            )
            raise JobError([Problem("RUN|CHECKPOINT", reference, "is a sweep", remedy)])
        raise JobError(
            [Problem("RUN|CHECKPOINT", reference, rule, "give a run's id or folder, or a checkpoint's folder")]
        )
    fingerprint = choose_phase({item["name"]: item["fingerprint"] for item in plan["phases"]}, phase)
    place = _open_phase(find_storage(folder) / PHASES / fingerprint)
    return replace(place, job=load_job(folder / JOB), plan=plan)


def choose_phase(phases: Mapping[str, str], phase: str | None, owner: str = "run") -> str:
    """The fingerprint of the phase of this name, by default of the last, out of those by name. Raises JobError, which
    calls what has the phases by the word `owner`."""
    name = phase or list(phases)[-1]
    if name not in phases:
        raise JobError([Problem("--phase", name, f"is not a phase of this {owner}", f"use {' or '.join(phases)}")])
    return phases[name]


def find_folder(reference: str, storage: Path) -> Path:
    """The folder that `reference` is, or that of the run with this MLflow id. Raises JobError where there is none."""
    folder = Path(reference) if Path(reference).is_dir() else find_run(reference, storage)
    if folder is None:
        rule = f"is no folder, and no run in {storage_name(storage)} has this id"
        raise JobError([Problem("RUN|CHECKPOINT", reference, rule, "name the storage of the run with --storage")])
    return folder.absolute()


def find_run(run_id: str, storage: Path) -> Path | None:
    """The folder in `storage` of the run with this MLflow id."""
    records = _in_run_folders(storage, RUN)
    here = next((record.parent for record in records if (read_json(record) or {}).get("run_id") == run_id), None)
    return here or fetch_run(run_id, storage)


def find_runs(storage: Path) -> list[Path]:
    """The folders of all runs in `storage`, those in sweeps too."""
    return [plan.parent for plan in _in_run_folders(storage, PLAN)]


def _in_run_folders(storage: Path, name: str) -> list[Path]:
    return [path for folder in _RUN_FOLDERS for path in sorted(storage.glob(f"{folder}/{name}"))]


def find_storage(run_folder: Path) -> Path:
    """The storage that a run's folder lies in, at whatever depth: the first folder above it that has phases."""
    return next((folder for folder in run_folder.parents if (folder / PHASES).is_dir()), run_folder.parent)


def is_phase(folder: Path) -> bool:
    return folder.parent.name == PHASES or (folder / CHECKPOINTS).is_dir()


def is_checkpoint(folder: Path) -> bool:
    return folder.parent.name == CHECKPOINTS


def is_export(folder: Path) -> bool:
    return (folder / MODEL).is_file() and (folder / JOB).is_file()


def computing_run(phase_folder: Path) -> dict[str, Any]:
    """`run.json` of the run in whose folder the phase's folder says that it was computed; empty where that is gone."""
    return _run_record(phase_folder, read_json(phase_folder / PLAN) or {})


def _run_record(phase_folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    name = run_name(plan)
    return (read_json(phase_folder.parent.parent / name / RUN) or {}) if name else {}


def run_name(plan: Mapping[str, Any]) -> str:
    """The path of a run's folder within its storage, which may have been moved since the plan was written, e.g.
    `digits-0123456789`; empty where the plan does not say it."""
    folder, storage = Path(plan.get("run_folder", "")), plan.get("job", {}).get("storage")
    remote = remote_of(folder)
    if remote is not None:
        return remote.key(folder)
    if storage is not None and folder.is_relative_to(storage):
        return str(folder.relative_to(storage))
    # A bucket's working folder has another name on each machine.
    depths = (len(Path(pattern).parts) for pattern in reversed(_RUN_FOLDERS) if folder.match(pattern))
    return "/".join(folder.parts[-next(depths, 1) :])


def complete_phase(folder: Path, values: Mapping[str, Any]) -> None:
    """Declares the phase in `folder` complete: writes its manifest, which is `values` and, as `files`, the size and
    SHA-256 of all that a later phase or a user needs: the checkpoint `values["checkpoint"]`, a path in `folder`, and
    the summary of the weights."""
    checkpoint = str(values["checkpoint"])
    fetch_checkpoint(folder / checkpoint)
    written = read_json(folder / checkpoint / CHECKPOINT_MANIFEST)["files"]
    own = [name for name in (f"{checkpoint}/{CHECKPOINT_MANIFEST}", WEIGHTS) if (folder / name).is_file()]
    files = {f"{checkpoint}/{name}": description for name, description in written.items()}
    files |= {name: describe_file(folder / name) for name in own}
    write_json(folder / PHASE_MANIFEST, {**values, "files": files})
    publish_phase(folder)


def read_phase(folder: Path) -> dict[str, Any] | None:
    """The manifest of the phase in `folder`; None where the phase is not complete: it has no manifest, or a file that
    this names is missing or has another size. No such file is read: see :func:`damage`."""
    manifest = read_json(folder / PHASE_MANIFEST)
    if not isinstance(manifest, dict):
        return None
    is_whole = all(check_size(folder / name, known) is None for name, known in manifest.get("files", {}).items())
    return manifest if is_whole else None


def damage(folder: Path) -> str | None:
    """Where the phase in `folder` differs from its manifest, with the file's name, or None. Reads the files."""
    manifest = read_json(folder / PHASE_MANIFEST)
    if not isinstance(manifest, dict):
        return f"{folder / PHASE_MANIFEST}: missing, or not a manifest"
    checks = (check_file(folder / name, known) for name, known in manifest.get("files", {}).items())
    return next((problem for problem in checks if problem is not None), None)


def _open_phase(folder: Path) -> Place:
    fetch_place(folder)
    plan = read_json(folder / PLAN)
    if plan is None:
        raise CheckpointError(f"{folder}: {PLAN} is missing, so it is unknown which job this phase belongs to")
    # A folder that was copied elsewhere has another name, and still its manifest.
    fingerprint = (read_json(folder / PHASE_MANIFEST) or {}).get("fingerprint", folder.name)
    names = [item["name"] for item in plan["phases"] if item["fingerprint"] == fingerprint]
    if not names:
        raise CheckpointError(f"{folder}: is not named by the fingerprint of a phase in its {PLAN}; rename it back")
    return Place("phase", folder, names[0], fingerprint, load_job(folder / JOB), plan)


def _open_checkpoint(folder: Path) -> Place:
    return replace(_open_phase(folder.parent.parent), kind="checkpoint", folder=folder)
