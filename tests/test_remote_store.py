"""Phases, checkpoints, runs and caches that machines share through a bucket: each machine has a working folder of its
own, and a real S3 server stands between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from temper import remote_store
from temper.checkpoint import (
    MANIFEST,
    CheckpointReader,
    Shard,
    check_checkpoint,
    checkpoint_folder,
    list_checkpoints,
    prune_checkpoints,
    write_manifest,
    write_shards,
)
from temper.claims import remotely_claimed
from temper.files import read_json, read_lines, write_json
from temper.launch.phases.prune import PruneOptions, prune_phases
from temper.launch.phases.show import list_phases
from temper.products import complete_phase, damage, read_phase
from temper.run_folder import CHECKPOINTS, HISTORY, JOB, PHASE_MANIFEST, PLAN, RUN
from temper.storage import Remote, remote_of, storage_folder

FINGERPRINT = "0a" * 32


@pytest.fixture
def address(bucket: str) -> str:
    return f"s3://{bucket}/runs"


def machine(address: str, folder: Path) -> Path:
    """The working folder of a machine whose cache is `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPER_CACHE", str(folder))
        return storage_folder(address)


def bucket_of(storage: Path) -> Remote:
    remote = remote_of(storage)
    assert remote is not None
    return remote


def save(folders: list[Path], step: int, records: list[dict[str, Any]], keep: int = 2) -> None:
    """What the ranks of a job, one on each machine, do to save: each machine's `checkpoints` folder is given."""
    places = [checkpoint_folder(folder, step) for folder in folders]
    for rank, place in enumerate(places):
        half = torch.full((2,), float(10 * step + rank))
        write_shards(place, rank, [Shard("weight", 2 * rank, {"master": half})])
        remote_store.publish_shards(place, rank)
    remote_store.fetch_digests(places[0], len(places))
    write_manifest(places[0], len(places), {"step": step}, {"weight": [2 * len(places)]}, records)
    prune_checkpoints(folders[0], keep)
    remote_store.publish_checkpoint(places[0], keep)


def records(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": step, "time_ms": step, "metrics": {"train/loss": 1 / step}} for step in range(first, last + 1)]


def train_phase(storage: Path, steps: int = 4) -> Path:
    """A complete phase as one rank leaves it on a machine."""
    folder = storage / "phases" / FINGERPRINT
    folder.mkdir(parents=True)
    (folder / JOB).write_text("name: digits\n")
    write_json(folder / PLAN, {"phases": []})
    save([folder / CHECKPOINTS], 2, records(1, 2))
    save([folder / CHECKPOINTS], steps, records(3, steps))
    values = {"fingerprint": FINGERPRINT, "seconds": 1.0, "metrics": {"test/accuracy": 0.5}}
    complete_phase(folder, {**values, "checkpoint": f"{CHECKPOINTS}/step-{steps:08d}"})
    return folder


# --------------------------------------------------------------------------------------------------------------- phases


def test_phase_of_one_machine_is_complete_on_another(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) / "phases" / FINGERPRINT for name in "ab")
    train_phase(here.parent.parent)
    assert remote_store.has_phase(there) and read_phase(there) is None
    remote_store.fetch_phase(there)
    assert read_phase(there) == read_phase(here) and damage(there) is None
    assert (there / JOB).read_text() == "name: digits\n" and (there / PLAN).exists()
    assert read_lines(there / HISTORY) == records(1, 4)
    assert CheckpointReader(there / CHECKPOINTS / "step-00000004").full("master", "weight").tolist() == [40.0, 40.0]


@pytest.mark.parametrize("change", ["damaged", "missing", "without manifest"])
def test_phase_that_is_not_whole_in_the_bucket_does_not_exist(change: str, address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) for name in "ab")
    folder = train_phase(here)
    bucket = bucket_of(here)
    shard = bucket.key(folder / CHECKPOINTS / "step-00000004" / "rank-00000.safetensors")
    if change == "damaged":
        content = bucket.read(shard)
        assert content is not None
        bucket.write(shard, content[:-1] + bytes([content[-1] ^ 1]))
    else:
        bucket.delete([shard if change == "missing" else bucket.key(folder / PHASE_MANIFEST)])
    remote_store.fetch_phase(there / "phases" / FINGERPRINT)
    assert read_phase(there / "phases" / FINGERPRINT) is None


def test_damaged_file_is_mended_from_the_bucket(address: str, tmp_path: Path) -> None:
    folder = train_phase(machine(address, tmp_path / "a"))
    shard = folder / CHECKPOINTS / "step-00000004" / "rank-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert damage(folder) is not None
    remote_store.mend_phase(folder)
    assert damage(folder) is None and shard.read_bytes() == content


def test_phase_that_the_bucket_has_lost_is_published_again(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) for name in "ab")
    folder = train_phase(here)
    remote_store.fetch_history(folder)
    bucket_of(here).delete_folder("phases")
    remote_store.publish_phase(folder)
    remote_store.fetch_phase(there / "phases" / FINGERPRINT)
    assert damage(there / "phases" / FINGERPRINT) is None
    assert read_lines(there / "phases" / FINGERPRINT / HISTORY) == records(1, 4)


def test_phase_that_is_damaged_in_the_bucket_is_replaced(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) for name in "ab")
    folder = train_phase(here)
    bucket_of(here).write(bucket_of(here).key(folder / CHECKPOINTS / "step-00000004" / "state.json"), b"{}")
    remote_store.discard_phase(there / "phases" / FINGERPRINT)
    assert not remote_store.has_phase(there / "phases" / FINGERPRINT)
    train_phase(there)
    third = machine(address, tmp_path / "c") / "phases" / FINGERPRINT
    remote_store.fetch_phase(third)
    assert damage(third) is None


def test_forgotten_phase_is_gone_for_all(address: str, tmp_path: Path) -> None:
    folder = train_phase(machine(address, tmp_path / "a"))
    remote_store.forget_phase(folder)
    assert bucket_of(folder).files("phases") == {}


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_of_ranks_on_two_machines(address: str, tmp_path: Path) -> None:
    """Each machine ends with all that it needs to go on, also one that has had no part in it."""
    first, second, third = (machine(address, tmp_path / name) / "phases" / FINGERPRINT / CHECKPOINTS for name in "abc")
    for step in (1, 2, 3):
        save([first, second], step, records(step, step))
    shards = sorted(path.relative_to(second).as_posix() for path in second.rglob("*.safetensors"))
    assert shards == ["step-00000003/rank-00001.safetensors"]
    remote_store.fetch_newest_checkpoint(third)
    for root in (first, second, third):
        assert check_checkpoint(root / "step-00000003") is None
        assert CheckpointReader(root / "step-00000003").full("master", "weight").tolist() == [30.0, 30.0, 31.0, 31.0]
    assert [folder.name for folder in list_checkpoints(third)] == ["step-00000003"]
    remote_store.fetch_history(third.parent)
    assert read_lines(third.parent / HISTORY) == records(1, 3)


def test_as_many_checkpoints_stay_in_the_bucket_as_are_kept(address: str, tmp_path: Path) -> None:
    root = machine(address, tmp_path / "a") / "phases" / FINGERPRINT / CHECKPOINTS
    bucket = bucket_of(root)
    bucket.write(f"{bucket.key(root)}/step-00000001/rank-00007.safetensors", b"of an attempt that broke off")
    for step in (2, 3, 4):
        save([root], step, records(step, step))
    kept = {key.split("/")[3] for key in bucket.files(bucket.key(root))}
    assert kept == {"step-00000003", "step-00000004"}
    assert not any(key.endswith(".digest.json") for key in bucket.files("phases"))


def test_older_checkpoint_is_used_where_the_newest_is_damaged(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) / "phases" / FINGERPRINT / CHECKPOINTS for name in "ab")
    for step in (1, 2):
        save([here], step, records(step, step))
    bucket = bucket_of(here)
    bucket.write(bucket.key(here / "step-00000002" / "state.json"), b"{}")
    remote_store.fetch_newest_checkpoint(there)
    assert [folder.name for folder in list_checkpoints(there)] == ["step-00000001"]


def test_checkpoint_of_this_machine_that_is_newer_is_not_fetched(address: str, tmp_path: Path) -> None:
    root = machine(address, tmp_path / "a") / "phases" / FINGERPRINT / CHECKPOINTS
    save([root], 1, records(1, 1))
    for file in (root / "step-00000001").iterdir():
        file.unlink()
    (root / "step-00000002").mkdir()
    write_json(root / "step-00000002" / MANIFEST, {"files": {}})
    remote_store.fetch_newest_checkpoint(root)
    assert [folder.name for folder in list_checkpoints(root)] == ["step-00000002"]


def test_histories_of_machines_are_joined(address: str, tmp_path: Path) -> None:
    """One machine has taken steps 1 to 3, of which two were saved, another has gone on to 5."""
    here, there = (machine(address, tmp_path / name) / "phases" / FINGERPRINT for name in "ab")
    save([here / CHECKPOINTS], 2, records(1, 2))
    own = [{**record, "time_ms": 0} for record in records(1, 3)]
    (here / HISTORY).write_text("".join(json.dumps(record) + "\n" for record in own))
    save([there / CHECKPOINTS], 5, records(3, 5))
    remote_store.fetch_history(here)
    assert read_lines(here / HISTORY) == [*own, *records(4, 5)]


# ----------------------------------------------------------------------------------------------------------------- runs


def make_run(storage: Path, run_id: str, uri: str) -> Path:
    folder = storage / "digits-0a"
    folder.mkdir(parents=True)
    (folder / JOB).write_text("name: digits\n")
    write_json(folder / PLAN, {"phases": []})
    write_json(folder / RUN, {"run_id": run_id, "uri": uri})
    remote_store.publish_run(folder, storage)
    return folder


def test_run_is_found_by_its_id(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) for name in "ab")
    make_run(here, "0123", "sqlite:////here/mlflow.db")
    assert remote_store.fetch_run("0123", there) == there / "digits-0a"
    assert sorted(path.name for path in (there / "digits-0a").iterdir()) == [JOB, PLAN, RUN]
    assert remote_store.fetch_run("4567", there) is None
    assert remote_store.fetch_run("0123", tmp_path) is None


@pytest.mark.parametrize(("uri", "is_shared"), [("http://mlflow:5000", True), ("sqlite:////here/mlflow.db", False)])
def test_run_is_gone_on_with_where_its_store_is_shared(uri: str, is_shared: bool, address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) for name in "ab")
    make_run(here, "0123", uri)
    remote_store.fetch_run_record(there / "digits-0a")
    assert (read_json(there / "digits-0a" / RUN) is not None) == is_shared


# ----------------------------------------------------------------------------------------------------- parts of a whole


def test_parts_come_with_their_manifest(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) / "teachers" / "0a" for name in "ab")
    (here / "train").mkdir(parents=True)
    (here / "train" / "one").write_text("one")
    write_json(here / "manifest.json", {"parts": ["train/one"]})

    def digests(manifest: Any) -> dict[str, str | None]:
        return dict.fromkeys(manifest["parts"], None)

    remote_store.fetch_parts(there / "manifest.json", digests)
    assert not there.exists()
    remote_store.publish_parts(here / "manifest.json", {"train/one": None})
    remote_store.fetch_parts(there / "manifest.json", digests)
    assert (there / "train" / "one").read_text() == "one"
    assert read_json(there / "manifest.json") == {"parts": ["train/one"]}


def test_parts_that_are_damaged_are_no_whole(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) / "data" / "0a" for name in "ab")
    here.mkdir(parents=True)
    (here / "one").write_text("one")
    write_json(here / "manifest.json", {})
    remote_store.publish_parts(here / "manifest.json", {"one": None})
    remote_store.fetch_parts(there / "manifest.json", lambda manifest: {"one": "0" * 64})
    assert not (there / "manifest.json").exists()


def test_flag_is_seen_on_other_nodes(address: str, tmp_path: Path) -> None:
    here, there, alone = (machine(address, tmp_path / name) / "digits-0a" / "stop" for name in "abc")
    here.parent.mkdir(parents=True)
    flag = remote_store.Flag(here, nodes=2)
    flag.set()
    assert flag.is_set() and remote_store.Flag(there, nodes=2).is_set()
    assert not remote_store.Flag(alone, nodes=1).is_set()
    flag.clear()
    assert not flag.is_set() and not remote_store.Flag(there, nodes=2).is_set()


# -------------------------------------------------------------------------------------------------------- temper phases


def test_phases_of_a_bucket_are_listed_and_removed_from_anywhere(address: str, tmp_path: Path) -> None:
    here, there = (machine(address, tmp_path / name) for name in "ab")
    folder = train_phase(here)
    (listed,) = list_phases(there)["phases"]
    assert (listed["fingerprint"], listed["state"]) == (FINGERPRINT, "complete")
    everything = bucket_of(here).files("phases").values()
    assert listed["bytes"] == sum(stored.bytes for stored in everything)
    with remotely_claimed(folder.with_name(f"{FINGERPRINT}.lock"), ""):
        assert prune_phases(there, PruneOptions(keep=0), 0.0).kept[0][1] == "in use"
    assert len(prune_phases(there, PruneOptions(keep=0), 0.0).removed) == 1
    assert bucket_of(here).files("phases") == {} and list_phases(there)["phases"] == []


def test_nothing_is_done_where_the_storage_is_a_folder(tmp_path: Path) -> None:
    folder = train_phase(tmp_path)
    for do in (remote_store.fetch_phase, remote_store.publish_phase, remote_store.fetch_place):
        do(folder)
    remote_store.forget_phase(folder)
    assert damage(folder) is None and not remote_store.has_phase(folder)
    assert not (folder.parent / f"{folder.name}.fetch.lock").exists()
