"""What of a storage lies in its bucket, and how it gets there and back; nothing is done where the storage is a folder.

In the bucket, whose keys are the paths in the storage, are

    <run folder>/job.yaml, plan.json, run.json      and runs/<MLflow run>.json, which says where that is
    phases/<fingerprint>/                           job.yaml, plan.json, checkpoints/, weights.json, phase.json
    phases/<fingerprint>/records/<checkpoint>.jsonl what the checkpoint has of the history; kept when it is removed
    teachers/, data/                                what teachers said, and ingested data
    claims/                                         see :mod:`temper.claims`

A manifest is the last to come into the bucket, and the last to come out of it: what it names is there then, each file
with the manifest's SHA-256. Each rank publishes its own shards, and fetches those of others that it needs.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from temper.files import check_file, check_size, read_json
from temper.locks import awaited
from temper.run_folder import CHECKPOINT_MANIFEST, CHECKPOINTS, HISTORY, JOB, PHASE_MANIFEST, PHASES, PLAN, RUN
from temper.storage import Remote, remote_of

RECORDS = "records"  # of a phase, in the bucket only: what its checkpoints have as `records.jsonl`
_RUNS = "runs"
_LOOK_S = 2.0


def publish(files: Iterable[Path], manifest: Path | None = None) -> None:
    """Brings files of one storage into its bucket, and the manifest once they are all there."""
    files = list(files)
    remote = remote_of(manifest or files[0])
    if remote is not None:
        remote.push(map(remote.key, files))
        remote.push([] if manifest is None else [remote.key(manifest)])


def fetch(file: Path) -> None:
    """Brings one file from the bucket, unless it is here, or is not there either."""
    remote = remote_of(file)
    if remote is not None and not file.exists():
        remote.pull({remote.key(file): None})


class Flag:
    """A file whose presence says something on the node where it lies, and, of a job on several nodes, on all: there it
    is in the bucket, too, and looked for every few seconds."""

    def __init__(self, file: Path, nodes: int) -> None:
        self._file = file
        self._remote = remote_of(file) if nodes > 1 else None
        self._looked_at = -math.inf

    def set(self) -> None:
        self._file.touch()
        if self._remote is not None:
            publish([self._file])

    def clear(self) -> None:
        self._file.unlink(missing_ok=True)
        if self._remote is not None:
            self._remote.delete([self._remote.key(self._file)])

    def is_set(self) -> bool:
        if self._file.exists():
            return True
        if self._remote is None or time.monotonic() < self._looked_at + _LOOK_S:
            return False
        self._looked_at = time.monotonic()
        return self._remote.exists(self._remote.key(self._file))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def publish_shards(folder: Path, rank: int) -> None:
    """What a rank has written of the checkpoint `folder`. Its older shards that are of no checkpoint here are removed:
    on another node than that of rank 0 nobody else does it."""
    if remote_of(folder) is None:
        return
    publish(folder / f"rank-{rank:05d}.{kind}" for kind in ("safetensors", "digest.json"))
    for older in folder.parent.glob(f"*/rank-{rank:05d}.*"):
        if older.parent != folder and not (older.parent / CHECKPOINT_MANIFEST).exists():
            older.unlink()


def fetch_digests(folder: Path, num_ranks: int) -> None:
    """For who writes the manifest: what ranks on other nodes have said of their shards."""
    for rank in range(num_ranks):
        fetch(folder / f"rank-{rank:05d}.digest.json")


def publish_checkpoint(folder: Path, keep: int) -> None:
    """Completes the checkpoint `folder`, whose ranks have published their shards, and removes all but the newest `keep`
    complete ones, and what broken ones older than these left."""
    remote = remote_of(folder)
    if remote is None:
        return
    own = [folder / name for name in read_json(folder / CHECKPOINT_MANIFEST)["files"] if not name.startswith("rank-")]
    publish(own, folder / CHECKPOINT_MANIFEST)
    phase = remote.key(folder.parent.parent)
    remote.write(f"{phase}/{RECORDS}/{folder.name}.jsonl", (folder / f"{RECORDS}.jsonl").read_bytes())
    found = list(remote.files(f"{phase}/{CHECKPOINTS}"))
    remote.delete(key for key in found if key.endswith(".digest.json"))
    complete = sorted(_checkpoints(found, CHECKPOINT_MANIFEST))
    for name in sorted(_checkpoints(found)):
        if name < complete[-keep:][0]:
            # Without its manifest it no longer counts, so that nobody meets one that is half removed.
            remote.delete([f"{phase}/{CHECKPOINTS}/{name}/{CHECKPOINT_MANIFEST}"])
            remote.delete_folder(f"{phase}/{CHECKPOINTS}/{name}")


def _checkpoints(keys: Iterable[str], file: str | None = None) -> set[str]:
    """Names of the checkpoints that these keys are of, or only of those with this file."""
    return {key.split("/")[-2] for key in keys if file is None or key.endswith(f"/{file}")}


def fetch_newest_checkpoint(root: Path) -> None:
    """Brings the newest whole checkpoint of those in the bucket to `root`, where there is none as new."""
    remote = remote_of(root)
    if remote is None:
        return
    here = [path.parent.name for path in root.glob(f"*/{CHECKPOINT_MANIFEST}")]
    there = _checkpoints(remote.files(remote.key(root)), CHECKPOINT_MANIFEST)
    for name in sorted(there - set(here), reverse=True):
        if name < max(here, default="") or fetch_checkpoint(root / name) is None:
            return


def fetch_checkpoint(folder: Path) -> str | None:
    """Brings what this machine lacks of a checkpoint. Returns what is wrong with the bucket's, or None; also where it
    has none."""
    remote = remote_of(folder)
    if remote is None:
        return None
    with _alone(folder):
        known = read_json(folder / CHECKPOINT_MANIFEST)
        manifest = known or remote.read_json(remote.key(folder / CHECKPOINT_MANIFEST))
        if manifest is None:
            return None
        # Of a checkpoint that is here, only what other nodes have written may lack; whoever loads it reads the rest.
        problem = _pull(remote, folder, manifest["files"], is_known=known is not None)
        return problem or (None if known else remote.pull({remote.key(folder / CHECKPOINT_MANIFEST): None}))


def _pull(remote: Remote, folder: Path, files: Mapping[str, Mapping[str, Any]], *, is_known: bool) -> str | None:
    """Brings those of a manifest's files that are not here as it says; of `is_known` ones the size is enough."""
    check = check_size if is_known else check_file
    wanted = {name: known for name, known in files.items() if check(folder / name, known) is not None}
    return remote.pull({remote.key(folder / name): known["sha256"] for name, known in wanted.items()})


def _alone(folder: Path) -> Any:
    """One process of a machine at a time fetches what belongs into `folder`."""
    return awaited(folder.with_name(f"{folder.name}.fetch.lock"), lambda: None)


# --------------------------------------------------------------------------------------------------------------- phases


def publish_phase(folder: Path) -> None:
    """Brings the phase in `folder`, which is complete, into the bucket, unless that has it; of its checkpoint only what
    has not been published yet."""
    remote = remote_of(folder)
    if remote is None or remote.exists(remote.key(folder / PHASE_MANIFEST)):
        return
    manifest = read_json(folder / PHASE_MANIFEST)
    last = folder / manifest["checkpoint"] / CHECKPOINT_MANIFEST
    is_there = remote.read(remote.key(last)) == last.read_bytes()
    files = [name for name in manifest["files"] if not (is_there and name.startswith(manifest["checkpoint"]))]
    files += [name for name in (JOB, PLAN) if (folder / name).exists()]  # which the driver's node has published
    publish([folder / name for name in files], folder / PHASE_MANIFEST)
    publish_records(folder)


def publish_records(folder: Path) -> None:
    """The history of a phase as it is here, where the bucket lacks a part of it."""
    remote = remote_of(folder)
    if remote is None or not (folder / HISTORY).exists():
        return
    known = remote.files(f"{remote.key(folder)}/{RECORDS}")
    if not known:
        remote.write(f"{remote.key(folder)}/{RECORDS}/{HISTORY}", (folder / HISTORY).read_bytes())


def fetch_phase(folder: Path) -> None:
    """Brings what this machine lacks of the phase that belongs into `folder`; where that is not whole in the bucket, it
    is no more complete here than before."""
    remote = remote_of(folder)
    if remote is None:
        return
    with _alone(folder):
        known = read_json(folder / PHASE_MANIFEST)
        manifest = known or remote.read_json(remote.key(folder / PHASE_MANIFEST))
        if manifest is None or _pull(remote, folder, manifest["files"], is_known=known is not None) is not None:
            return
        if known is None:
            for name in (JOB, PLAN):
                fetch(folder / name)
            fetch_history(folder)
            fetch(folder / PHASE_MANIFEST)


def mend_phase(folder: Path) -> None:
    """Brings those files of a complete phase anew that are damaged here and are not in the bucket."""
    remote = remote_of(folder)
    if remote is not None:
        with _alone(folder):
            _pull(remote, folder, read_json(folder / PHASE_MANIFEST)["files"], is_known=False)


def fetch_history(folder: Path) -> None:
    """Adds the records that the bucket has of a phase to those that are here; for who has the phase claimed."""
    remote = remote_of(folder)
    if remote is None:
        return
    keys = sorted(remote.files(f"{remote.key(folder)}/{RECORDS}"))
    texts = [(remote.read(key) or b"").decode() for key in keys]
    here = folder / HISTORY
    texts.append(here.read_text() if here.exists() else "")
    lines = {json.loads(line)["step"]: line for text in texts for line in text.split("\n")[:-1]}
    if keys and len(lines) > texts[-1].count("\n"):
        folder.mkdir(parents=True, exist_ok=True)
        whole = here.with_name(f".{HISTORY}.{uuid.uuid4().hex}")
        whole.write_text("".join(f"{lines[step]}\n" for step in sorted(lines)))
        os.replace(whole, here)


def has_phase(folder: Path) -> bool:
    """Whether the bucket has the phase that belongs into `folder`; no file of it is read but the manifest."""
    remote = remote_of(folder)
    return remote is not None and remote.exists(remote.key(folder / PHASE_MANIFEST))


def fetch_place(folder: Path) -> None:
    """What there is of a phase, for who looks at it: the whole, or else what its newest checkpoint has."""
    if remote_of(folder) is None:
        return
    fetch_phase(folder)
    if not (folder / PHASE_MANIFEST).exists():
        for name in (JOB, PLAN):
            fetch(folder / name)
        fetch_history(folder)
        fetch_newest_checkpoint(folder / CHECKPOINTS)


def discard_phase(folder: Path) -> None:
    """A phase that the bucket has, but not whole, is complete there no more; for who has it claimed."""
    remote = remote_of(folder)
    if remote is not None:
        remote.delete([remote.key(folder / PHASE_MANIFEST)])


def forget_phase(folder: Path) -> None:
    """Removes a phase from the bucket, its manifest first."""
    remote = remote_of(folder)
    if remote is not None:
        remote.delete([remote.key(folder / PHASE_MANIFEST)])
        remote.delete_folder(remote.key(folder))


# ----------------------------------------------------------------------------------------------------------------- runs


def publish_run(folder: Path, storage: Path) -> None:
    """What says which job a run is, and which MLflow run; for who knows only the latter. `storage` is the run's."""
    remote = remote_of(folder)
    if remote is None:
        return
    publish([folder / name for name in (JOB, PLAN)])
    record = read_json(folder / RUN)
    if record is not None:
        publish([folder / RUN])
        place = {"folder": remote.key(folder), "storage": remote.key(storage)}
        remote.write(f"{_RUNS}/{record['run_id']}.json", json.dumps(place).encode())


def fetch_run(run_id: str, storage: Path) -> Path | None:
    """The folder of the run with this MLflow id, brought from the bucket of `storage`; None where that has none."""
    remote = remote_of(storage)
    place = None if remote is None else remote.read_json(f"{_RUNS}/{run_id}.json")
    if remote is None or place is None:
        return None
    folder = remote.folder / place["folder"]
    (remote.folder / place["storage"] / PHASES).mkdir(parents=True, exist_ok=True)
    for name in (JOB, PLAN, RUN):
        fetch(folder / name)
    return folder


def fetch_outlines(storage: Path) -> None:
    """Brings what says which jobs the runs and phases are that the bucket has and this machine has not."""
    remote = remote_of(storage)
    if remote is not None:
        names = {f"/{name}" for name in (JOB, PLAN, RUN)}
        keys = [key for key in remote.files(remote.key(storage)) if key[key.rfind("/") :] in names]
        remote.pull({key: None for key in keys if not (remote.folder / key).exists()})


def fetch_run_record(folder: Path) -> None:
    """`run.json` of a run that another machine has begun; not where that tracks into a file of its own."""
    remote = remote_of(folder)
    if remote is None or (folder / RUN).exists():
        return
    record = remote.read_json(remote.key(folder / RUN))
    if record is not None and not record["uri"].startswith("sqlite:"):
        fetch(folder / RUN)


# ----------------------------------------------------------------------------------------------------- parts of a whole


def publish_parts(manifest: Path, digests: Mapping[str, str | None]) -> None:
    """Brings what lies beside a manifest, by names, into the bucket, unless that has it, and then the manifest."""
    remote = remote_of(manifest)
    if remote is None:
        return
    there = remote.files(remote.key(manifest.parent))
    files = [manifest.parent / name for name in digests]
    if remote.key(manifest) not in there:
        publish([file for file in files if remote.key(file) not in there], manifest)


def fetch_parts(manifest: Path, digests_of: Callable[[Any], Mapping[str, str | None]]) -> None:
    """Brings what a manifest names and this machine lacks from the bucket, and then the manifest; not where something
    there is damaged. `digests_of` gives for a manifest the SHA-256 of each file, by its path beside it."""
    remote = remote_of(manifest)
    if remote is None:
        return
    folder = manifest.parent
    with _alone(folder):
        known = read_json(manifest) or remote.read_json(remote.key(manifest))
        if known is None:
            return
        digests = digests_of(known)
        lacking = {name: digest for name, digest in digests.items() if not (folder / name).exists()}
        if remote.pull({remote.key(folder / name): digest for name, digest in lacking.items()}) is None:
            fetch(manifest)
