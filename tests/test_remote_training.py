"""Training with a bucket as the storage, on machines of which each has only its own disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml

from distributed import start_server
from temper import remote_store, worker
from temper.checkpoint import CheckpointReader
from temper.claims import DEAD_S
from temper.config.schema import JobConfig
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import ClusterShape
from temper.products import read_phase
from temper.run_folder import HISTORY, WorkerSpec
from temper.tracking.history import read_history

STEPS = 4
JOB = {
    "name": "remote",
    "model": {"kind": "cnn", "channels": [4, 6], "hidden": 12},
    "data": {"kind": "digits", "global_batch": 32},
    "optimizer": {"kind": "adamw", "lr": 3.0e-3},
    "parallel": {"workers": 2, "zero": 2, "cpus_per_worker": 0.5},
    "budget": {"steps": STEPS, "checkpoint_every": 2, "keep_checkpoints": 1},
    "dsd": {"rounds": [{"sparsity": 0.5, "sparse_steps": STEPS, "redense_steps": STEPS}]},
}


def planned(storage: str) -> Plan:
    job = JobConfig.model_validate({**JOB, "storage": storage})
    return build_plan(job, ClusterShape(nodes=2, cpus=4.0, gpus=0.0), Path.cwd())


def attempt(plan: Plan, nodes: list[Path], saves: int | None = None) -> list[int]:
    """Exit codes of two ranks, each on a node whose cache is the folder; rank 0 dies after so many `saves`."""
    start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The server from which they are forked may be older than this test's environment.
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    arguments = (port, WorkerSpec(plan, plan.phases, ()), nodes, saves, aws)
    context = mp.start_processes(_rank, args=arguments, nprocs=len(nodes), join=False, start_method="forkserver")
    for process in context.processes:
        process.join()
    return [process.exitcode for process in context.processes]


def _rank(
    rank: int, port: int, spec: WorkerSpec, nodes: list[Path], saves: int | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(len(nodes)))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TEMPER_CACHE=str(nodes[rank]))
    torch.set_num_threads(1)
    publish, left = remote_store.publish_checkpoint, saves

    def publish_and_die(folder: Path, keep: int) -> None:
        nonlocal left
        publish(folder, keep)
        left = None if left is None else left - 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    remote_store.publish_checkpoint = publish_and_die
    worker.work(spec, lambda phase, records: None)


def last_states(plan: Plan) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint of each phase, as this process's machine has them."""
    states = {}
    for phase in plan.phases:
        manifest = read_phase(plan.phase_folder(phase))
        assert manifest is not None, f"{phase.name} is not complete"
        reader = CheckpointReader(plan.phase_folder(phase) / manifest["checkpoint"])
        kinds = {"master", "buffer", "mask", *reader.moments()}
        states |= {
            f"{phase.name} {kind} {name}": reader.full(kind, name) for kind in kinds for name in reader.names(kind)
        }
    return states


def test_other_nodes_go_on_from_the_bucket_to_the_same_bits(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes lose rank 0 in the midst of the sparse phase; two others, with empty disks, end the job."""
    plan = planned(f"s3://{bucket}/runs")
    assert attempt(plan, [tmp_path / "a", tmp_path / "b"], saves=3)[0] == -signal.SIGKILL
    assert attempt(plan, [tmp_path / "c", tmp_path / "d"]) == [0, 0]
    assert "loading step-00000006" in next((tmp_path / "c").rglob("rank-0.log")).read_text()

    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path / "e"))
    for phase in plan.phases:
        remote_store.fetch_phase(plan.phase_folder(phase))
        steps = [record["step"] for record in read_history(plan.phase_folder(phase) / HISTORY)]
        assert steps == list(range(phase.first_step + 1, phase.last_step + 1))
    found = last_states(plan)

    whole = replace(plan, job=plan.job.model_copy(update={"storage": str(tmp_path / "whole")}))
    assert attempt(whole, [tmp_path / "c", tmp_path / "d"]) == [0, 0]
    expected = last_states(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------------- the command line


def write_job(folder: Path, storage: str, steps: int) -> Path:
    """A job of one worker whose steps take a while, beside the module that its model comes from."""
    (folder / "slow_net.py").write_text((Path(__file__).parent / "targets" / "slow_net.py").read_text())
    job = {
        "name": "remote",
        "model": {"kind": "python", "target": "slow_net:build", "args": {"delay_s": 0.05}},
        "data": {"kind": "digits", "global_batch": 32},
        "optimizer": {"kind": "adamw", "lr": 3.0e-3},
        "budget": {"steps": steps, "checkpoint_every": 10},
        "storage": storage,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def start(machine: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """A command on the machine whose cache is the folder."""
    command = [sys.executable, "-m", "temper", *map(str, arguments), "--json"]
    environment = {**os.environ, "TEMPER_CACHE": str(machine)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, cwd=machine.parent, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, json.loads(out.splitlines()[-1]) if out else {}, err


@pytest.mark.ray
@pytest.mark.slow
def test_machines_share_what_they_compute(bucket: str, tmp_path: Path) -> None:
    """One is killed with -9 in the midst; another goes on, once the claim is dead; a third reuses what that has done,
    and a fourth evaluates the run."""
    address, steps = f"s3://{bucket}/runs", 80
    path = write_job(tmp_path, address, steps)
    first, second, third, fourth = (tmp_path / name for name in ("first", "second", "third", "fourth"))
    killed = start(first, "train", path)
    while not list(first.rglob("step-00000020/manifest.json")):
        assert killed.poll() is None, finish(killed)
        time.sleep(0.1)
    killed.kill()
    killed.communicate()

    code, result, err = finish(start(second, "train", path))
    assert code == 1 and f"lets go of it after {DEAD_S:.0f} s" in result["error"], err
    deadline = time.monotonic() + 2 * DEAD_S
    while code != 0 and time.monotonic() < deadline:
        code, done, err = finish(start(second, "train", path))
    assert done["status"] == "finished", err
    assert "training from step 20" in err or "training from step 30" in err

    code, reused, err = finish(start(third, "train", path))
    assert (code, reused["status"], reused["metrics"]) == (0, "reused", done["metrics"]), err
    histories = [read_history(next(machine.rglob(HISTORY))) for machine in (second, third)]
    assert histories[0] == histories[1] and [record["step"] for record in histories[0]] == list(range(1, steps + 1))

    code, evaluated, err = finish(start(fourth, "eval", done["run_id"], "--storage", address))
    assert code == 0 and evaluated["metrics"] == {
        name: pytest.approx(value) for name, value in done["metrics"].items() if name.startswith("test/")
    }, err
    told = [file.read_text(errors="replace") for machine in tmp_path.iterdir() for file in machine.rglob("*.json*")]
    assert not any("a-secret" in text for text in told)
