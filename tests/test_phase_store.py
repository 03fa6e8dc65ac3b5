"""The phase store: what a phase is made of, whether it is whole, who uses it, and `temper phases`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from temper import checkpoint, cli
from temper.checkpoint import MASTER, Shard
from temper.config.load import build_job, job_to_yaml
from temper.errors import JobError, RunError
from temper.files import describe_file, write_json
from temper.launch import phase_store
from temper.launch.phase_store import claim_phases, discard_damaged, is_complete, keep_phase, remove_phase
from temper.launch.phases.diff import comparison_text, diff_phases
from temper.launch.phases.inventory import read_store
from temper.launch.phases.prune import PruneOptions, prune_phases
from temper.launch.phases.show import list_phases, phase_text, phases_table, show_phase
from temper.launch.phases.units import parse_age, parse_size, show_age
from temper.locks import HeldError, claimed, is_held, shared
from temper.plan import phases as recipes
from temper.plan import probe
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import ClusterShape
from temper.plan.phases import PhasePlan, fingerprint
from temper.plan.probe import ModelFacts, PrunableWeight
from temper.plan.show import plan_table
from temper.products import complete_phase, computing_run, damage, find_place, find_run, find_runs, read_phase, run_name
from temper.run_folder import HISTORY, JOB, PHASE_MANIFEST, PLAN, RUN, USED, WEIGHTS
from temper.tracking.mlflow_store import parameters

NOW_S = 4_000_000_000.0
DAY_S = 86400.0
PRUNABLE = (PrunableWeight("fc.weight", (10, 50), "linear"),)
FACTS = ModelFacts(4000, 4000, (3556, 444), 0, 64, 2000, (10,), prunable=PRUNABLE)
ROUND = {"sparsity": 0.5, "sparse_steps": 40, "redense_steps": 30}
JOB_FILE: dict[str, Any] = {
    "name": "tiny",
    "model": {"kind": "cnn"},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "budget": {"steps": 100},
    "dsd": {"rounds": [ROUND]},
}
CHAIN = ("dense", "sparse-1", "redense-1")


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of FACTS is planned for, whatever the versions of the libraries, and not built."""
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(FACTS))))
    monkeypatch.setattr(recipes, "_version", lambda name: "1")
    monkeypatch.setattr(recipes, "NUMERICS_VERSION", 4)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def planned(*overrides: str, place: str | None = None) -> Plan:
    job = build_job({**JOB_FILE, "storage": str(Path.cwd() / "runs")}, overrides)
    return replace(build_plan(job, ClusterShape(nodes=1, cpus=8.0, gpus=0.0), Path.cwd()), place=place)


def begin(plan: Plan, *names: str) -> None:
    """The run's folder, and folders of phases as a command that runs them makes them."""
    for folder in (plan.run_folder, *(plan.phase_folder(phase) for phase in plan.phases if phase.name in names)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(job_to_yaml(plan.job))
        write_json(folder / PLAN, plan.to_dict())


def finish(plan: Plan, *names: str, used_s: float = NOW_S - 60, size: int = 1000) -> None:
    """Phases with a checkpoint of `size` bytes in a single file, all last touched at `used_s`."""
    begin(plan, *names)
    for phase in (phase for phase in plan.phases if phase.name in names):
        folder = plan.phase_folder(phase)
        end = folder / "checkpoints" / f"step-{phase.last_step:08}"
        end.mkdir(parents=True, exist_ok=True)
        (end / "rank-00000.safetensors").write_bytes(phase.name.encode() * (size // len(phase.name)))
        files = {file.name: describe_file(file) for file in end.iterdir() if file.name != "manifest.json"}
        write_json(end / "manifest.json", {"format": 1, "step": phase.last_step, "files": files})
        if phase.kind != "dense":
            write_json(folder / WEIGHTS, {"phase": phase.name})
        complete_phase(folder, manifest_of(folder, phase))
        age(folder, used_s)


def manifest_of(folder: Path, phase: PhasePlan) -> dict[str, Any]:
    return {
        "name": phase.name,
        "fingerprint": phase.fingerprint,
        "checkpoint": f"checkpoints/step-{phase.last_step:08}",
        "steps": phase.steps,
        "skipped_steps": 0,
        "seconds": 2.5,
        "metrics": {"train/loss": 1.5, "eval/accuracy": 0.25, "test/accuracy": 0.5},
    }


def age(folder: Path, used_s: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (used_s, used_s))


def folder_of(plan: Plan, name: str) -> Path:
    return next(plan.phase_folder(phase) for phase in plan.phases if phase.name == name)


def shard_of(plan: Plan, name: str) -> Path:
    return next((folder_of(plan, name) / "checkpoints").glob("*/rank-00000.safetensors"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def spoil(path: Path) -> None:
    """One byte of the file is another; its size and times are as they were."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def short(plan: Plan) -> list[str]:
    return [phase.fingerprint[:10] for phase in plan.phases]


def claim(plan: Plan) -> tuple[list[str], list[str]]:
    """Names of the phases that a command would run now, and what it says."""
    said: list[str] = []
    with ExitStack() as stack:
        return [phase.name for phase in claim_phases(plan, stack, said.append)], said


def stored(storage: Path) -> set[str]:
    return {phase.fingerprint for phase in read_store(storage)}


@contextmanager
def elsewhere(call: str) -> Iterator[int]:
    """Another process that holds the lock `call` for the block; its id."""
    code = f"from pathlib import Path\nfrom temper.locks import *\nwith {call}: print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process.pid
        finally:
            process.stdin.close()


# --------------------------------------------------------------------------------------------------- what is it made of


def test_fingerprints_are_those_of_a_store_that_was_made_before() -> None:
    rounds = [*JOB_FILE["dsd"]["rounds"], {**ROUND, "redense_steps": 0, "criterion": "random"}]
    plan = planned(f"dsd.rounds={json.dumps(rounds)}", "name=other")
    assert [phase.fingerprint for phase in plan.phases] == [
        "dcd50ac2b19af248d828be6b5f9f015dd6934ec2c506aaeee19a5539ca41bc4d",
        "84e633d0272575293955c9445618987ffa5e9b26292152a591b3f91418b8ecc1",
        "4444d6ac3441c42c1d731a088c34b5ade6476744661adcc6b72eba91158da941",
        "5487dac5c871c5fe0952baea071c558b503f1565667385fec0764c39eb49b056",
    ]


def test_a_fingerprint_is_over_the_ingredients_that_are_kept() -> None:
    plan = planned()
    for phase, before in zip(plan.phases, ("", *(phase.fingerprint for phase in plan.phases)), strict=False):
        assert phase.before == before
        kept = json.loads(json.dumps(asdict(phase)))
        assert fingerprint(kept["ingredients"], kept["before"]) == phase.fingerprint
    dense, sparse, redense = plan.to_dict()["phases"]
    assert dense["ingredients"]["optimizer"]["lr"] == 0.1
    assert sparse["ingredients"]["pruning"]["layers"] == {"fc.weight": 0.5}
    assert (redense["ingredients"]["kind"], redense["before"]) == ("redense", sparse["fingerprint"])


def test_ingredients_are_neither_in_the_table_of_a_plan_nor_in_mlflows_parameters() -> None:
    plan = planned()
    bare = replace(plan, phases=tuple(replace(phase, ingredients={}, before="") for phase in plan.phases))
    assert plan_table(plan) == plan_table(bare)
    assert parameters(plan) == parameters(bare)


# ---------------------------------------------------------------------------------------------------------- is it whole


def test_a_manifest_describes_what_later_phases_and_users_need(tmp_path: Path) -> None:
    """Of a checkpoint as it is written in training, on two ranks."""
    plan = planned()
    sparse = plan.phases[1]
    begin(plan, "sparse-1")
    folder = plan.phase_folder(sparse)
    for step in (120, 140):
        end = checkpoint.checkpoint_folder(folder / "checkpoints", step)
        for rank in (0, 1):
            checkpoint.write_shards(end, rank, [Shard("fc.weight", 4 * rank, {MASTER: torch.arange(4.0)})])
        checkpoint.write_manifest(end, 2, {"step": step}, {"fc.weight": (8,)}, [])
    write_json(folder / WEIGHTS, {"phase": "sparse-1"})
    (folder / HISTORY).write_text("{}\n")
    complete_phase(folder, manifest_of(folder, sparse))
    names = ("rank-00000.safetensors", "rank-00001.safetensors", "state.json", "records.jsonl", "manifest.json")
    expected = {f"checkpoints/step-00000140/{name}": describe_file(end / name) for name in names}
    manifest = read_phase(folder)
    assert manifest is not None
    assert manifest["files"] == {**expected, WEIGHTS: describe_file(folder / WEIGHTS)}
    assert manifest["files"][WEIGHTS]["bytes"] == len(json.dumps({"phase": "sparse-1"}))
    assert {key: value for key, value in manifest.items() if key != "files"} == manifest_of(folder, sparse)
    assert is_complete(plan, sparse) and damage(folder) is None
    (folder / HISTORY).write_text("{}\n{}\n")
    (folder / "checkpoints" / "step-00000120" / "state.json").unlink()
    assert is_complete(plan, sparse) and damage(folder) is None


@pytest.mark.parametrize(
    ("harm", "is_seen_at_once", "said"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), True, "weights.json: missing"),
        (lambda folder: (folder / WEIGHTS).write_text("{}"), True, "weights.json: 2 bytes, the manifest says 22"),
        (lambda folder: (folder / PHASE_MANIFEST).write_text('{"na'), True, "phase.json: missing, or not a manifest"),
        (lambda folder: spoil(folder / WEIGHTS), False, "weights.json: its SHA-256 is not the manifest's"),
        (lambda folder: spoil(next(folder.glob("*/*/manifest.json"))), False, "manifest.json: its SHA-256 is not"),
        (lambda folder: spoil(next(folder.glob("*/*/rank-00000.safetensors"))), False, "rank-00000.safetensors: its"),
    ],
)
def test_a_phase_that_does_not_match_its_manifest_does_not_exist(
    harm: Callable[[Path], None], is_seen_at_once: bool, said: str
) -> None:
    plan = planned()
    finish(plan, *CHAIN)
    folder = folder_of(plan, "redense-1")
    assert damage(folder) is None
    harm(folder)
    assert (read_phase(folder) is None) == is_seen_at_once
    assert is_complete(plan, plan.phases[2]) != is_seen_at_once
    assert said in str(damage(folder))
    pending, (line,) = claim(plan)
    assert pending == ["redense-1"] and said in line
    assert not (folder / PHASE_MANIFEST).exists()
    assert claim(plan) == (["redense-1"], []), "it is said once"


def test_a_manifest_of_another_phase_is_none() -> None:
    plan, other = planned(), planned("seed=1")
    finish(plan, "dense")
    folder_of(plan, "dense").rename(folder_of(other, "dense"))
    pending, said = claim(other)
    assert pending == list(CHAIN)
    manifest = folder_of(other, "dense") / PHASE_MANIFEST
    assert said == [f"dense of tiny, {short(other)[0]}, is computed anew: {manifest}: that of another phase"]


def test_a_store_without_checksums_is_complete_as_before() -> None:
    plan = planned()
    for phase in plan.phases:
        begin(plan, phase.name)
        write_json(plan.phase_folder(phase) / PHASE_MANIFEST, manifest_of(plan.phase_folder(phase), phase))
    assert claim(plan) == ([], [])
    assert all(damage(plan.phase_folder(phase)) is None for phase in plan.phases)


def test_the_end_that_a_pending_phase_begins_with_is_read() -> None:
    plan = planned()
    finish(plan, "dense", "sparse-1")
    spoil(shard_of(plan, "sparse-1"))
    message = f"{shard_of(plan, 'sparse-1')}: its SHA-256 is not the manifest's; the file was damaged"
    assert claim(plan) == (
        ["sparse-1", "redense-1"],
        [f"sparse-1 of tiny, {short(plan)[1]}, is computed anew: {message}"],
    )
    finish(plan, "sparse-1")
    assert claim(plan) == (["redense-1"], [])


def test_damage_is_followed_back_to_a_sound_phase() -> None:
    plan = planned()
    finish(plan, *CHAIN)
    spoil(shard_of(plan, "sparse-1"))
    assert claim(plan) == ([], []), "nothing needs the end of it"
    spoil(shard_of(plan, "redense-1"))
    pending, said = claim(plan)
    assert pending == ["sparse-1", "redense-1"]
    assert [line.split(" ", 1)[0] for line in said] == ["redense-1", "sparse-1"]


def test_each_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    finish(plan, "dense", "sparse-1")
    read: list[Path] = []
    monkeypatch.setattr(phase_store, "damage", lambda folder: read.append(folder))
    assert claim(plan)[0] == ["redense-1"]
    assert read == [folder_of(plan, "sparse-1")]


def test_what_is_claimed_is_what_is_run() -> None:
    plan = planned()
    finish(plan, *CHAIN)
    spoil(shard_of(plan, "redense-1"))
    with ExitStack() as stack:
        claim_phases(plan, stack, lambda text: None)
        assert [is_held(plan.lock(phase)) for phase in plan.phases] == [False, False, True]
    assert not any(is_held(plan.lock(phase)) for phase in plan.phases)


def test_a_damaged_teacher_is_no_longer_trained(caplog: pytest.LogCaptureFixture) -> None:
    plan = planned()
    finish(plan, "dense")
    folder = folder_of(plan, "dense")
    discard_damaged(folder)
    assert read_phase(folder) is not None and caplog.messages == []
    spoil(shard_of(plan, "dense"))
    with claimed(plan.lock(plan.phases[0]), "it"):
        discard_damaged(folder)
    assert read_phase(folder) is not None
    discard_damaged(folder)
    assert not (folder / PHASE_MANIFEST).exists()
    assert [message.rpartition("/")[2] for message in caplog.messages] == [
        "rank-00000.safetensors: its SHA-256 is not the manifest's; the file was damaged"
    ]


# ---------------------------------------------------------------------------------------------------------- who uses it


def test_a_lock_is_looked_at_without_keeping_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path) and not path.exists()
    for call in (f"claimed(Path({str(path)!r}), 'it')", f"shared(Path({str(path)!r}), 'it')"):
        with elsewhere(call):
            assert is_held(path)
        assert not is_held(path)
    with elsewhere(f"claimed(Path({str(path)!r}), 'it')") as process:
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        assert not is_held(path), "it dies with its holder"


def test_reuse_is_noted(storage: Path) -> None:
    plan = planned()
    finish(plan, "dense", "sparse-1", used_s=1000.0)
    assert {phase.used_s for phase in read_store(storage)} == {1000.0}
    claim(plan)
    assert all((folder_of(plan, name) / USED).stat().st_mtime > 1e9 for name in ("dense", "sparse-1"))
    assert not (folder_of(plan, "redense-1") / USED).exists()
    age(storage / "phases", 1000.0)
    with ExitStack() as stack:
        keep_phase(folder_of(plan, "sparse-1"), stack)
    assert [phase.used_s > 1e9 for phase in read_store(storage)] == [True, True], "dense is used through it"
    assert (folder_of(plan, "dense") / USED).stat().st_mtime == 1000.0


def test_a_storage_that_cannot_be_written_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    finish(plan, *CHAIN)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "read-only", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    assert claim(plan) == ([], [])


# ------------------------------------------------------------------------------------------------------- where runs lie


@pytest.mark.parametrize("place", [None, "sweeps/heat-0123456789/trials/0007", "sweeps/heat-0123456789/shared"])
def test_a_run_is_found_at_any_depth_and_after_its_storage_was_moved(
    storage: Path, tmp_path: Path, place: str | None
) -> None:
    plan = planned(place=place)
    finish(plan, *CHAIN)
    write_json(plan.run_folder / RUN, {"run_id": "abc"})
    storage.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    folder = moved / plan.run_folder.relative_to(storage)
    assert find_runs(moved) == [folder]
    assert find_run("abc", moved) == folder and find_run("abd", moved) is None
    for phase in plan.phases:
        stays = moved / "phases" / phase.fingerprint
        assert computing_run(stays) == {"run_id": "abc"}
        assert [find_place(reference, moved, phase.name).folder for reference in ("abc", str(folder))] == [stays, stays]
        assert find_place(str(stays), moved).run == {"run_id": "abc"}


@pytest.mark.parametrize(
    ("folder", "job_storage", "name"),
    [
        ("/runs/tiny-0123456789", "/runs", "tiny-0123456789"),
        ("/runs/sweeps/heat-1/trials/7", "/runs", "sweeps/heat-1/trials/7"),
        ("/runs/sweeps/heat-1/alone/7/run", "/runs/sweeps/heat-1/alone/7", "run"),
        ("/cache/s3%3A%2F%2Fb/sweeps/heat-1/trials/7", "s3://b", "sweeps/heat-1/trials/7"),
        ("/cache/s3%3A%2F%2Fb/sweeps/heat-1/shared", "s3://b", "sweeps/heat-1/shared"),
        ("/cache/s3%3A%2F%2Fb/tiny-0123456789", "s3://b", "tiny-0123456789"),
    ],
)
def test_a_run_is_named_by_its_path_in_its_storage(folder: str, job_storage: str, name: str) -> None:
    assert run_name({"run_folder": folder, "job": {"storage": job_storage}}) == name
    assert run_name({}) == ""


# ----------------------------------------------------------------------------------------------------------------- list


def fill(storage: Path) -> tuple[Plan, Plan]:
    """Two runs that share their first phase, the second a trial that has not come to its end."""
    first, second = planned(), planned("dsd.rounds.0.sparsity=0.25", place="sweeps/heat-0123456789/trials/0001")
    finish(first, *CHAIN, used_s=NOW_S - 3 * DAY_S)
    begin(second, "sparse-1")
    age(folder_of(second, "sparse-1"), NOW_S - 60)
    cache = storage / "teachers" / ("c" * 64)
    (cache / "train").mkdir(parents=True)
    (cache / "manifest.json").write_text("{}")
    (cache / "train" / "part").write_bytes(bytes(2046))
    age(cache, NOW_S - DAY_S)
    (storage / "teachers" / "models").mkdir()
    return first, second


def test_the_store_is_listed_in_chains(storage: Path) -> None:
    first, second = fill(storage)
    listed = list_phases(storage)
    assert [phase["fingerprint"] for phase in listed["phases"]] == [
        *(phase.fingerprint for phase in first.phases),
        second.phases[1].fingerprint,
    ]
    sizes = [size_of(storage / "phases" / phase["fingerprint"]) for phase in listed["phases"]]
    assert listed["phases"][1] == {
        "fingerprint": first.phases[1].fingerprint,
        "name": "sparse-1",
        "job": "tiny",
        "kind": "sparse",
        "steps": 40,
        "before": first.phases[0].fingerprint,
        "bytes": sizes[1],
        "used_s": NOW_S - 3 * DAY_S,
        "computed_s": NOW_S - 3 * DAY_S,
        "seconds": 2.5,
        "metric": {"test/accuracy": 0.5},
        "state": "complete",
        "is_complete": True,
        "run": first.run_folder.name,
    }
    dense, begun = listed["phases"][0], listed["phases"][3]
    assert (dense["used_s"], dense["computed_s"]) == (NOW_S - 60, NOW_S - 3 * DAY_S)
    assert (begun["state"], begun["seconds"], begun["metric"]) == ("unfinished", None, {})
    assert begun["run"] == "sweeps/heat-0123456789/trials/0001"
    (cache,) = listed["caches"]
    assert (cache["key"], cache["bytes"], cache["kind"]) == ("c" * 64, 2048, "teacher cache")
    assert (cache["state"], cache["used_s"]) == ("complete", NOW_S - DAY_S)
    assert listed["bytes"] == sum(sizes) + 2048
    with elsewhere(f"claimed(Path({str(second.lock(second.phases[1]))!r}), 'it')"):
        assert [phase["state"] for phase in list_phases(storage)["phases"]] == ["complete"] * 3 + ["in use"]


def test_the_table_shows_what_goes_on_from_what(storage: Path) -> None:
    first, second = fill(storage)
    shown = phases_table(list_phases(storage), NOW_S).splitlines()
    a, b = short(first), short(second)
    assert [line.split("  tiny")[0].rstrip() for line in shown[1:5]] == [
        f"{a[0]}      dense",
        f"└ {a[1]}    sparse-1",
        f"  └ {a[2]}  redense-1",
        f"└ {b[1]}    sparse-1",
    ]
    cells = re.split(r"  +", shown[2].replace("└ ", ""))
    assert cells[1:5] == ["sparse-1", "tiny", "sparse", "40"]
    assert cells[6:] == ["3d", "3d", "2.5 s", "test/accuracy 0.5000", "complete", first.run_folder.name]
    assert re.split(r"  +", shown[4])[6:] == ["1m", "unfinished", "sweeps/heat-0123456789/trials/0001"]
    assert re.split(r"  +", shown[5]) == ["cccccccccc", "teacher cache", "2.0 KiB", "1d", "complete"]
    assert shown[6].startswith("4 phases, 1 teacher cache: ")
    assert phases_table(list_phases(storage / "none"), NOW_S) == f"no phases in {storage}/none"


# ----------------------------------------------------------------------------------------------------------------- show


def test_a_phase_is_shown_with_what_it_is_made_of_and_who_needs_it(storage: Path) -> None:
    first, second = fill(storage)
    dense, sparse = first.phases[:2]
    shown = show_phase(dense.fingerprint[:6], storage)
    assert shown["ingredients"] == json.loads(json.dumps(dense.ingredients))
    assert shown["runs"] == [first.run_folder.name, "sweeps/heat-0123456789/trials/0001"]
    assert sorted(shown["phases"]) == sorted([sparse.fingerprint, second.phases[1].fingerprint])
    assert shown["before"] == ""
    assert shown["metrics"]["train/loss"] == 1.5
    shard = "checkpoints/step-00000100/rank-00000.safetensors"
    assert shown["files"][shard] == 1000
    text = yaml.safe_load(phase_text(show_phase(sparse.fingerprint[:6], storage)))
    assert text["ingredients"]["pruning"]["layers"] == {"fc.weight": 0.5}
    assert (text["name"], text["before"], text["state"]) == ("sparse-1", dense.fingerprint, "complete")
    assert text["files"]["checkpoints/step-00000140/rank-00000.safetensors"] == "1000 B"
    assert text["phases"] == [first.phases[2].fingerprint]


def test_a_reference_is_the_beginning_of_one_fingerprint(storage: Path) -> None:
    for name in ("ab" * 32, "ac" * 32):
        (storage / "phases" / name).mkdir(parents=True)
    assert show_phase("ab", storage)["name"] == "unknown"
    with pytest.raises(JobError, match="is the beginning of 2 phases' fingerprints; give more of it") as caught:
        show_phase("a", storage)
    assert caught.value.problems[0].remedy == "give more of it, e.g. ababa or acaca"
    for wrong in ("b", ""):
        with pytest.raises(JobError, match=f"is the beginning of no phase's fingerprint in {storage}; see temper"):
            show_phase(wrong, storage)


# ----------------------------------------------------------------------------------------------------------------- diff


def compare(storage: Path, a: PhasePlan, b: PhasePlan | str, *overrides: str) -> tuple[dict[str, Any], str]:
    other = b if isinstance(b, str) else b.fingerprint[:10]
    comparison = diff_phases(a.fingerprint[:10], other, overrides, storage)
    return comparison.to_dict(), comparison_text(comparison)


def test_a_difference_is_told_down_to_the_key(storage: Path) -> None:
    first, second = planned(), planned("optimizer.lr=0.05", "loss={kind: cross_entropy, label_smoothing: 0.1}")
    finish(first, *CHAIN)
    finish(second, *CHAIN)
    (a, a_sparse, _), (b, b_sparse, _) = first.phases, second.phases
    found, text = compare(storage, a, b)
    keys = {"loss.label_smoothing": {"a": 0.0, "b": 0.1}, "optimizer.lr": {"a": 0.1, "b": 0.05}}
    assert found == {
        "same": False,
        "a": a.fingerprint,
        "b": b.fingerprint,
        "phases": ({"name": "dense", "a": a.fingerprint, "b": b.fingerprint, "keys": keys},),
        "beyond": (),
        "longer": "",
    }
    assert text.splitlines() == [
        f"dense: {short(first)[0]} and {short(second)[0]} differ in",
        "  loss.label_smoothing: 0.0 → 0.1",
        "  optimizer.lr: 0.1 → 0.05",
    ]
    assert compare(storage, a_sparse, b_sparse)[1].splitlines() == [
        *text.splitlines(),
        f"sparse-1: {short(first)[1]} and {short(second)[1]} differ in",
        "  lr: 0.1 → 0.05",
    ]
    same = compare(storage, a, a)
    assert same == (
        {**found, "same": True, "b": a.fingerprint, "phases": ()},
        f"{short(first)[0]} and {short(first)[0]} are the same phase: nothing is computed again",
    )


def test_the_first_phase_that_differs_is_found(storage: Path) -> None:
    first, second = planned(), planned("seed=1")
    finish(first, *CHAIN)
    finish(second, *CHAIN)
    assert compare(storage, first.phases[2], second.phases[2])[1].splitlines() == [
        f"dense: {short(first)[0]} and {short(second)[0]} differ in",
        "  seed: 0 → 1",
        f"sparse-1: {short(first)[1]} and {short(second)[1]} differ in the phase before only",
        f"redense-1: {short(first)[2]} and {short(second)[2]} differ in the phase before only",
    ]
    longer, text = compare(storage, first.phases[0], first.phases[2])
    assert (longer["phases"], longer["beyond"], longer["longer"]) == ((), ("sparse-1", "redense-1"), "b")
    assert text == f"{short(first)[2]} goes on where {short(first)[0]} ends: sparse-1, redense-1"


def test_what_is_there_on_one_side_only(storage: Path) -> None:
    first, second = planned(), planned("data.labels=0.5", "data.augment=[{kind: random_horizontal_flip}]")
    finish(first, "dense")
    finish(second, "dense")
    keys = compare(storage, first.phases[0], second.phases[0])[0]["phases"][0]["keys"]
    assert keys["data.labels"] == {"b": 0.5}
    assert keys["data.augment"] == {"a": []}
    assert keys["data.augment.0.kind"] == {"b": "random_horizontal_flip"}
    assert "  data.labels: nothing → 0.5" in compare(storage, first.phases[0], second.phases[0])[1]
    assert "  data.augment: [] → nothing" in compare(storage, first.phases[0], second.phases[0])[1]


def test_numbers_that_are_equal_and_hashed_differently_differ(storage: Path) -> None:
    plan = planned()
    dense = plan.phases[0]
    recipe = {**dense.ingredients, "steps": 100.0}
    other = replace(dense, ingredients=recipe, fingerprint=fingerprint(recipe))
    finish(plan, "dense")
    finish(replace(plan, phases=(other,), fingerprint=other.fingerprint), "dense")
    assert compare(storage, dense, other)[0]["phases"][0]["keys"] == {"steps": {"a": 100, "b": 100.0}}


def test_a_phase_is_compared_with_a_job_as_it_is_planned_now(storage: Path, tmp_path: Path) -> None:
    plan = planned()
    finish(plan, *CHAIN)
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**JOB_FILE, "parallel": {"device": "cpu"}}))
    assert compare(storage, plan.phases[1], str(job))[0]["same"]
    found = compare(storage, plan.phases[1], str(job), "dsd.rounds.0.sparsity=0.25", "dsd.rounds.0.sparse_steps=41")[0]
    assert [phase["keys"] for phase in found["phases"]] == [
        {"steps": {"a": 40, "b": 41}, "pruning.layers.fc.weight": {"a": 0.5, "b": 0.25}}
    ]
    alone = compare(storage, plan.phases[1], str(job), "dsd=null")[0]
    assert (alone["phases"], alone["beyond"], alone["longer"]) == ((), ("sparse-1",), "a")
    with pytest.raises(JobError, match=r"seed=1: changes a job, and [0-9a-f]+ is the fingerprint of a phase; give a"):
        compare(storage, plan.phases[1], plan.phases[0], "seed=1")


def test_a_phase_that_was_removed_is_compared_by_the_plan_of_its_run(storage: Path) -> None:
    first, second = planned(), planned("seed=1")
    finish(first, *CHAIN)
    finish(second, *CHAIN)
    remove_phase(folder_of(first, "redense-1"))
    assert compare(storage, first.phases[2], second.phases[2])[0]["phases"][0]["keys"] == {"seed": {"a": 0, "b": 1}}


def test_phases_of_a_store_without_ingredients_cannot_be_compared(storage: Path) -> None:
    first, second = planned(), planned("seed=1")
    old = replace(first, phases=tuple(replace(phase, ingredients={}) for phase in first.phases))
    finish(old, "dense")
    finish(second, "dense")
    with pytest.raises(RunError, match=f"^dense {short(old)[0]} was computed by a temper that did not keep"):
        compare(storage, old.phases[0], second.phases[0])
    assert compare(storage, old.phases[0], old.phases[0])[0]["same"]
    assert "not kept by the temper that computed it" in phase_text(show_phase(short(old)[0], storage))


# ---------------------------------------------------------------------------------------------------------------- prune


def prune(storage: Path, **options: Any) -> dict[str, Any]:
    return prune_phases(storage, PruneOptions(**options), NOW_S).to_dict()


def told(phases: Sequence[dict[str, Any]]) -> list[str]:
    return [phase["fingerprint"] for phase in phases]


def prints(plan: Plan, *names: str) -> list[str]:
    return [phase.fingerprint for phase in plan.phases if phase.name in names]


def test_what_was_not_used_for_long_is_removed_from_the_end_of_its_chain(storage: Path) -> None:
    old, young = planned(), planned("dsd.rounds.0.sparsity=0.25")
    finish(old, *CHAIN, used_s=NOW_S - 8 * DAY_S)
    finish(young, "sparse-1", used_s=NOW_S - 6 * DAY_S)
    assert prune(storage, older_than_s=9 * DAY_S)["removed"] == []
    expected = prints(old, "sparse-1", "redense-1")[::-1]
    before = {phase.fingerprint: phase.bytes for phase in read_store(storage)}
    trial = prune(storage, older_than_s=7 * DAY_S, dry_run=True)
    assert (told(trial["removed"]), stored(storage)) == (expected, set(before))
    done = prune(storage, older_than_s=7 * DAY_S)
    assert told(done["removed"]) == expected
    assert done["freed_bytes"] == trial["freed_bytes"] == sum(before[item] for item in expected) > 2000
    assert done["left_bytes"] == sum(before.values()) - done["freed_bytes"]
    assert stored(storage) == {*prints(old, "dense"), *prints(young, "sparse-1")}, "dense is used through sparse-1"
    assert claim(young)[0] == ["redense-1"]


def test_the_store_is_brought_to_a_size_by_removing_what_was_used_longest_ago(storage: Path) -> None:
    first, second = planned(), planned("seed=1")
    finish(first, *CHAIN, used_s=NOW_S - 2 * DAY_S, size=40_000)
    finish(second, *CHAIN, used_s=NOW_S - DAY_S, size=40_000)
    sizes = {phase.fingerprint: phase.bytes for phase in read_store(storage)}
    total = sum(sizes.values())
    assert prune(storage, keep=total)["removed"] == []
    assert told(prune(storage, keep=total - 1)["removed"]) == prints(first, "redense-1")
    assert told(prune(storage, keep=sum(sizes[item] for item in prints(second, *CHAIN)))["removed"]) == [
        *prints(first, "sparse-1"),
        *prints(first, "dense"),
    ]
    assert stored(storage) == set(prints(second, *CHAIN))
    assert told(prune(storage, keep=0)["removed"]) == prints(second, *CHAIN)[::-1]


def test_large_phases_are_removed_unless_one_that_stays_builds_on_them(storage: Path) -> None:
    plan, other = planned(), planned("seed=1")
    finish(plan, "sparse-1", size=500)
    finish(plan, "dense", "redense-1", size=50_000)
    finish(other, "dense", size=50_000)
    done = prune(storage, larger_than=40_000)
    assert sorted(told(done["removed"])) == sorted([*prints(plan, "redense-1"), *prints(other, "dense")])
    (kept,) = done["kept"]
    assert (kept["fingerprint"], kept["reason"]) == (*prints(plan, "dense"), f"sparse-1 {short(plan)[1]} builds on it")
    assert stored(storage) == set(prints(plan, "dense", "sparse-1"))


def test_what_no_run_or_trial_needs_is_removed(storage: Path) -> None:
    kept = planned(place="sweeps/heat-0123456789/trials/0001")
    shared_ = planned("seed=3", place="sweeps/heat-0123456789/shared")
    gone, begun = planned("dsd.rounds.0.sparsity=0.25"), planned("seed=1")
    teacher, student = planned("seed=4"), planned("seed=5")
    finish(kept, *CHAIN)
    finish(shared_, "dense")
    finish(gone, "sparse-1", "redense-1")
    begin(begun, "dense")
    finish(teacher, *CHAIN)
    finish(student, "dense")
    for plan in (gone, teacher):
        for file in plan.run_folder.iterdir():
            file.unlink()
    place = str(folder_of(teacher, "sparse-1") / "checkpoints" / "step-00000140")
    taught = {**student.to_dict(), "distill": {"teachers": [{"place": place}], "cache": None}}
    write_json(student.run_folder / PLAN, taught)
    done = prune(storage, unreachable=True)
    assert set(told(done["removed"])) == {
        *prints(gone, "sparse-1", "redense-1"),
        *prints(begun, "dense"),
        *prints(teacher, "redense-1"),
    }
    assert stored(storage) == {
        *prints(kept, *CHAIN),
        *prints(shared_, "dense"),
        *prints(teacher, "dense", "sparse-1"),
        *prints(student, "dense"),
    }


@pytest.mark.parametrize("holder", ["claimed('{}.lock')", "shared('{}.users.lock')", "claimed('{}.rank-1.lock')"])
def test_what_a_process_runs_or_uses_stays(storage: Path, holder: str) -> None:
    plan = planned()
    finish(plan, *CHAIN)
    lock = holder.format(folder_of(plan, "sparse-1")).replace("('", "(Path('").replace("')", "'), 'it')")
    with elsewhere(lock) as process:
        done = prune(storage, keep=0)
        assert told(done["removed"]) == prints(plan, "redense-1")
        assert [(phase["fingerprint"], phase["reason"]) for phase in done["kept"]] == [
            (*prints(plan, "sparse-1"), "in use"),
            (*prints(plan, "dense"), f"sparse-1 {short(plan)[1]} builds on it"),
        ]
        with pytest.raises(HeldError):
            remove_phase(folder_of(plan, "sparse-1"))
        assert damage(folder_of(plan, "sparse-1")) is None
        os.kill(process, signal.SIGKILL)
    assert told(prune(storage, keep=0)["removed"]) == prints(plan, "sparse-1", "dense")[::-1]


def test_a_phase_that_is_claimed_after_the_look_stays(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    finish(plan, "dense")
    monkeypatch.setattr("temper.launch.phases.inventory.is_in_use", lambda folder: False)
    with shared(folder_of(plan, "dense").with_name(f"{plan.phases[0].fingerprint}.users.lock"), "it"):
        done = prune(storage, keep=0)
    assert ([phase["reason"] for phase in done["kept"]], done["removed"]) == (["in use"], [])


def test_a_removal_that_is_broken_off_leaves_an_unfinished_phase(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned()
    finish(plan, "dense")

    def die(folder: Path) -> None:
        raise OSError(5, "no more")

    monkeypatch.setattr(phase_store.shutil, "rmtree", die)
    assert [phase["reason"] for phase in prune(storage, keep=0)["kept"]] == ["[Errno 5] no more"]
    (left,) = read_store(storage)
    assert left.state == "unfinished"


# ----------------------------------------------------------------------------------------------------- the command line


def temper(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, list[str]]:
    """Exit code, the JSON line, and the lines for people."""
    code = cli.main(["phases", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err.splitlines()


def test_the_commands(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned()
    finish(plan, *CHAIN)
    code, listed, said = temper(capsys, "list")
    assert (code, told(listed["phases"]), len(said)) == (0, prints(plan, *CHAIN), 5)
    code, shown, said = temper(capsys, "show", short(plan)[1], "--storage", storage)
    assert (code, shown["name"], said[1]) == (0, "sparse-1", "name: sparse-1")
    code, found, said = temper(capsys, "diff", short(plan)[1], short(plan)[1])
    assert (code, found["same"], len(said)) == (0, True, 1)
    code, done, said = temper(capsys, "prune", "--keep", "0K", "--dry-run")
    assert (code, told(done["removed"])) == (0, prints(plan, *CHAIN)[::-1])
    assert said[0].startswith(f"would remove {short(plan)[2]} redense-1 of tiny, ")
    assert said[-1].startswith("would free ") and said[-1].endswith(" in 3 phases; 0 phases of 0 B stay")
    code, done, said = temper(capsys, "prune", "--older-than", "1s", "--larger-than", "1T")
    assert (code, done["removed"]) == (0, []), "times are of the year 2096"
    code, done, said = temper(capsys, "prune", "--keep", "0K")
    assert re.fullmatch(rf"removed {short(plan)[2]} redense-1 of tiny, [\d.]+ KiB, used 0s ago", said[0])
    assert said[-1].endswith(" in 3 phases; 0 phases of 0 B stay")
    assert stored(storage) == set()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ("prune",),
            "prune: is not told which phases to remove; give --older-than 7d, --larger-than 10G, --keep 20G or "
            "--unreachable; --dry-run only shows them",
        ),
        (("prune", "--keep", "20"), "--keep: 20 is no size; write a number with K, M, G or T, e.g. 1.5G"),
        (
            ("prune", "--older-than", "week"),
            "--older-than: week is no age; write a number with s, m, h, d or w (seconds to weeks), e.g. 7d or 12h",
        ),
        (("show", "abc"), "PHASE: abc is the beginning of no phase's fingerprint in runs; see temper phases list"),
    ],
)
def test_a_wrong_command_line_exits_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    code, answer, said = temper(capsys, *arguments)
    assert (code, answer, said) == (
        2,
        {"status": "refused", "problems": [problem]},
        ["temper phases: 1 problem", f"  {problem}"],
    )


@pytest.mark.parametrize("text", ["", "G", "1,5G", "1.5GB", "1.5g", "-1G", "1e3G", " 1G", "1.G", "0x1G", "١G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(JobError, match=r"--keep: .* ?is no size"):
        parse_size("--keep", text)


def test_sizes_and_ages() -> None:
    sizes = {"0K": 0, "1K": 1024, "1.5G": 3 * 2**29, "2T": 2**41, "0.5M": 2**19}
    assert {text: parse_size("--keep", text) for text in sizes} == sizes
    ages = {"30s": 30, "1.5m": 90, "12h": 12 * 3600, "7d": 7 * 86400, "2w": 14 * 86400}
    assert {text: parse_age("--older-than", text) for text in ages} == ages
    for text in ("7", "d", "7 d", "7D", "-7d", "7days"):
        with pytest.raises(JobError, match=r"--older-than: .*is no age"):
            parse_age("--older-than", text)
    assert [show_age(age_s) for age_s in (-5, 0, 59.9, 60, 3599, 3600, 86400 * 2.9)] == [
        "0s", "0s", "59s", "1m", "59m", "1h", "2d",
    ]  # fmt: skip
