"""The parameter server as users run it: the command line, Ray actors, an MLflow database, killed processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from temper.checkpoint import MASK, MASTER, CheckpointReader, list_checkpoints, model_state
from temper.data.download import check_files
from temper.tracking.history import read_history
from test_train_end_to_end import finish, history_of, mlflow_points, mlflow_run, mlflow_runs, start, wait_for_step
from test_train_end_to_end import write_job as write_synchronous_job

pytestmark = pytest.mark.ray

STEPS = 90
SEED = int(os.environ.get("TEMPER_CHAOS_SEED", "0"))
SERVER = {
    "mode": "parameter_server",
    "workers": 2,
    "shards": 2,
    "max_staleness": 4,
    "warm_start_steps": 10,
    "cpus_per_worker": 0.5,
}


def write_job(folder: Path, **sections: Any) -> Path:
    """A job of a few seconds whose model has batch norm and dropout; see `test_train_end_to_end.job`."""
    optimizer = {"kind": "adagrad", "lr": 0.02, "schedule": {"kind": "linear", "warmup_steps": 5}}
    return write_synchronous_job(
        folder, **{"name": "digits_server", "optimizer": optimizer, "parallel": SERVER, **sections}
    )


def processes_of(command: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """The command's actors of class `kind`, by their process titles, oldest first."""
    found = []
    for child in psutil.Process(command.pid).children(recursive=True):
        try:
            if f"ray::{kind}" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda child: child.pid)


def kill_one(command: subprocess.Popen[str], kind: str, chance: random.Random) -> None:
    victims = processes_of(command, kind)
    assert victims, f"no {kind} among {psutil.Process(command.pid).children(recursive=True)}"
    os.kill(chance.choice(victims).pid, signal.SIGKILL)


def run_folder(folder: Path) -> Path:
    return next((folder / "runs").glob("digits_server-*"))


def check_whole(folder: Path, result: dict[str, Any]) -> None:
    """The run is complete: each step once in the history and in MLflow, and it has learnt."""
    assert result["status"] == "finished"
    assert result["metrics"]["test/accuracy"] > 0.8
    history = history_of(folder)
    assert history is not None
    assert [record["step"] for record in read_history(history)] == list(range(1, STEPS + 1))
    assert len(mlflow_runs(folder)) == 1
    assert mlflow_run(folder, result["run_id"]).info.status == "FINISHED"
    points = mlflow_points(folder, result["run_id"], "train/loss")
    assert [step for step, _ in points] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    folder = tmp_path_factory.mktemp("unbroken")
    code, result, err = finish(start(write_job(folder)))
    assert code == 0, err
    yield folder, result, err


def test_result_and_tracking_of_a_run(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, err = unbroken
    check_whole(folder, result)
    metrics = result["metrics"]
    shares = {name: value for name, value in metrics.items() if name.startswith("server/staleness/")}
    assert sum(shares.values()) == pytest.approx(1.0)
    clocks = {name: value for name, value in metrics.items() if name.startswith("server/clock/")}
    assert set(clocks) == {"server/clock/0", "server/clock/1"}
    assert sum(clocks.values()) == STEPS * 2, "every mini-batch was pushed once"
    tracked = mlflow_run(folder, result["run_id"]).data.metrics
    assert {name: tracked[name] for name in (*shares, *clocks)} == {**shares, **clocks}
    leads = mlflow_points(folder, result["run_id"], "server/clock_lead")
    assert [step for step, _ in leads] == list(range(1, STEPS + 1))
    assert max(lead for _, lead in leads[10:]) <= 4
    stale = dict(mlflow_points(folder, result["run_id"], "server/staleness_mean"))
    assert {stale[step] for step in range(1, 11)} == {0.0}, "one worker trains alone at first"
    assert max(stale.values()) > 0
    assert [step for step, _ in mlflow_points(folder, result["run_id"], "eval/accuracy")] == [30, 60, 90]
    assert "Traceback" not in err
    assert "(pid=" not in err


def test_the_same_job_again_is_reused(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = unbroken
    code, again, err = finish(start(folder / "job.yaml"))
    assert code == 0, err
    assert again["status"] == "reused"
    assert again["metrics"] == result["metrics"]


def test_eval_and_export_of_the_run(unbroken: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = unbroken
    base = [sys.executable, "-m", "temper"]
    found = subprocess.run(
        [*base, "eval", result["run_id"], "--storage", "runs", "--json"], cwd=folder, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    metrics = json.loads(found.stdout.splitlines()[-1])["metrics"]
    assert metrics["test/accuracy"] == pytest.approx(result["metrics"]["test/accuracy"], abs=1e-6)
    done = subprocess.run(
        [*base, "export", result["checkpoint"], "--to", "out"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reader = CheckpointReader(Path(result["checkpoint"]))
    assert reader.moments() == ["sum"]
    assert set(model_state(reader)) == {
        "body.0.weight", "body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var",
        "body.1.num_batches_tracked", "head.weight", "head.bias",
    }  # fmt: skip


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_shard_are_replaced(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    process = start(write_job(tmp_path))
    steps = sorted(chance.sample(range(15, 60), 2))
    kinds = chance.sample(["WorkerActor", "ShardActor"], 2)
    sys.stdout.write(f"TEMPER_CHAOS_SEED={SEED}: kill {list(zip(kinds, steps, strict=True))}\n")
    for step, kind in zip(steps, kinds, strict=True):
        wait_for_step(process, tmp_path, step)
        kill_one(process, kind, chance)
    code, result, err = finish(process)
    assert code == 0, err
    assert "was lost and is replaced" in (run_folder(tmp_path) / "stages.jsonl").read_text()
    check_whole(tmp_path, result)


@pytest.mark.slow
def test_a_broken_model_fails_at_once_with_its_own_error(tmp_path: Path) -> None:
    path = write_job(tmp_path, model={"kind": "python", "target": "slow_net:build_broken"})
    code, result, err = finish(start(path))
    assert code == 1
    assert result["status"] == "failed"
    assert "this network is broken on purpose" in err
    assert "Traceback" not in err
    failures = [json.loads(line) for line in (run_folder(tmp_path) / "failures.jsonl").read_text().splitlines()]
    assert "slow_net.py" in failures[0]["traceback"]
    assert mlflow_runs(tmp_path)[0].info.status == "FAILED"


@pytest.mark.slow
def test_those_that_are_left_go_on_where_nobody_is_replaced(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    # In bf16, and less often than every mini-batch: what is accrued when a worker dies or a gate comes is not lost.
    parallel = {**SERVER, "n_fetch": 2, "n_push": 3, "max_restarts": 0}
    path = write_job(tmp_path, parallel=parallel, precision={"dtype": "bf16"})
    process = start(path)
    wait_for_step(process, tmp_path, 15)
    kill_one(process, "WorkerActor", chance)
    wait_for_step(process, tmp_path, 45)
    (last,) = processes_of(process, "WorkerActor")
    os.kill(last.pid, signal.SIGKILL)
    code, result, err = finish(process)
    assert code == 1
    assert result["status"] == "failed"
    assert "ActorDiedError" in err
    assert "Traceback" not in err
    assert mlflow_runs(tmp_path)[0].info.status == "FAILED"
    code, result, err = finish(start(path))
    assert code == 0, err
    check_whole(tmp_path, result)


@pytest.mark.slow
def test_an_interrupted_run_saves_and_goes_on_past_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = write_job(tmp_path)
    process = start(path)
    wait_for_step(process, tmp_path, 22)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    (checkpoints,) = (tmp_path / "runs" / "phases").glob("*/checkpoints")
    newest = list_checkpoints(checkpoints)[-1]
    reader = CheckpointReader(newest)
    # Every mini-batch up to this step, and none after it, is in the parameters.
    assert [shard["version"] for shard in reader.state["server"]["shards"]] == [2 * reader.step] * 2
    assert [record["step"] for record in reader.records()][-1] == reader.step
    damaged = newest / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    code, result, err = finish(start(path))
    assert code == 0, err
    assert f"refused {newest.name}" in err
    assert "training from step" in err
    check_whole(tmp_path, result)


@pytest.mark.slow
def test_a_killed_driver_is_resumed(tmp_path: Path) -> None:
    step = random.Random(SEED).randint(15, 60)
    sys.stdout.write(f"TEMPER_CHAOS_SEED={SEED}: kill the driver at step {step}\n")
    path = write_job(tmp_path)
    process = start(path)
    wait_for_step(process, tmp_path, step)
    process.kill()
    process.communicate()
    code, result, err = finish(start(path))
    assert code == 0, err
    assert "training from step" in err
    check_whole(tmp_path, result)
    assert sum(value for name, value in result["metrics"].items() if name.startswith("server/clock/")) == STEPS * 2


@pytest.mark.slow
def test_one_worker_repeats_bit_for_bit_whatever_the_shards_and_breaks(tmp_path: Path) -> None:
    """Without a second worker nothing depends on timing, so that a broken run must end where an unbroken one does."""
    states = []
    for name, shards in (("one", 1), ("three", 3)):
        path = write_job(tmp_path / name, parallel={**SERVER, "workers": 1, "shards": shards})
        process = start(path)
        if name == "three":
            wait_for_step(process, tmp_path / name, 33)
            process.send_signal(signal.SIGTERM)
            assert finish(process)[0] == 130
            process = start(path)
        code, result, err = finish(process)
        assert code == 0, err
        states.append(model_state(CheckpointReader(Path(result["checkpoint"]))))
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


# -------------------------------------------------------------------------------------------------- dense-sparse-dense

ROUND = {"sparsity": 0.6, "sparse_steps": 60, "redense_steps": 30}
LAYERS = ("body.0.weight", "head.weight")


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Those of all phases, in the order of their steps."""
    histories = (folder / "runs" / "phases").glob("*/history.jsonl")
    records: list[Any] = [record for path in histories for record in read_history(path)]
    return sorted(records, key=lambda record: int(record["step"]))


def kill_after(process: subprocess.Popen[str], folder: Path, step: int, kind: str, chance: random.Random) -> None:
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step for record in records_of(folder)):
        assert process.poll() is None, f"ended early: {finish(process)}"
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.05)
    kill_one(process, kind, chance)


def reader_of(folder: Path, result: dict[str, Any], index: int) -> CheckpointReader:
    """The last checkpoint of a phase."""
    phase = folder / "runs" / "phases" / result["phases"][index]["fingerprint"]
    return CheckpointReader(phase / json.loads((phase / "phase.json").read_text())["checkpoint"])


def smallest_pruned(weight: torch.Tensor, share: float) -> torch.Tensor:
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[weight.abs().flatten().argsort(stable=True)[: round(weight.numel() * share)]] = False
    return kept.view(weight.shape)


@pytest.mark.slow
def test_dense_sparse_dense_with_shards_and_a_worker_killed_in_the_sparse_phase(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    budget = {"steps": 30, "evaluate_every": 15, "checkpoint_every": 10}
    parallel = {**SERVER, "n_fetch": 2}
    process = start(write_job(tmp_path, budget=budget, parallel=parallel, dsd={"rounds": [ROUND]}))
    # The first shard is killed before the sparse phase has a checkpoint of its own, if all goes fast.
    kills = [(31, "ShardActor"), (chance.randint(41, 50), "WorkerActor"), (chance.randint(55, 70), "ShardActor")]
    sys.stdout.write(f"TEMPER_CHAOS_SEED={SEED}: kill {kills}\n")
    for step, kind in kills:
        kill_after(process, tmp_path, step, kind, chance)
    assert len(list((tmp_path / "runs" / "phases").glob("*/phase.json"))) == 1, "the sparse phase is not complete yet"
    code, result, err = finish(process)
    assert code == 0, err
    assert "was lost and is replaced" in (run_folder(tmp_path) / "stages.jsonl").read_text()
    assert [phase["steps"] for phase in result["phases"]] == [30, 60, 30]

    dense, sparse, redense = (reader_of(tmp_path, result, index) for index in range(3))
    assert (dense.names(MASK), sparse.names(MASK), redense.names(MASK)) == ([], list(LAYERS), [])
    for name in LAYERS:
        kept = smallest_pruned(dense.full(MASTER, name), ROUND["sparsity"])
        assert torch.equal(sparse.full(MASK, name), kept), name
        assert torch.equal(sparse.full(MASTER, name) != 0, kept), name
        assert not sparse.full("sum", name)[~kept].any(), name
        # What follows a unit that is never active stays where it was.
        assert (redense.full(MASTER, name)[~kept] != 0).float().mean() > 0.9, name

    records = records_of(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 121))
    assert [step for step, _ in mlflow_points(tmp_path, result["run_id"], "train/loss")] == list(range(1, 121))
    assert [record["metrics"]["phase"] for record in records] == [0.0] * 30 + [1.0] * 60 + [2.0] * 30
    rates = [record["metrics"]["train/lr"] for record in records]
    assert rates[30:60] != rates[:30], "the schedule is stretched over the sparse phase"
    assert [rates[30], rates[35], rates[90]] == pytest.approx([rates[0], 0.02, 0.1 * rates[0]])
    measured = {record["step"]: record["metrics"] for record in records if "sparsity" in record["metrics"]}
    assert list(measured) == [45, 60, 75, 90, 105, 120]
    sizes = [dense.full(MASTER, name).numel() for name in LAYERS]
    zeros = [round(size * ROUND["sparsity"]) for size in sizes]
    for step in (45, 60, 75, 90):
        assert measured[step]["sparsity"] == sum(zeros) / sum(sizes)
        assert [measured[step][f"sparsity/{name}"] for name in LAYERS] == [zeros[0] / sizes[0], zeros[1] / sizes[1]]
    assert measured[120]["sparsity"] < 0.1
    for index, phase in enumerate(("sparse-1", "redense-1"), 1):
        folder = tmp_path / "runs" / "phases" / result["phases"][index]["fingerprint"]
        summary = json.loads((folder / "weights.json").read_text())
        assert summary["phase"] == phase
        assert summary["total"]["pruned"] == sum(zeros)


# ----------------------------------------------------------------------------------------------------- on Fashion-MNIST


def run_fashion(folder: Path, *overrides: str, kill: bool = False) -> dict[str, Any]:
    """The shipped job for two epochs. With `kill`, a worker and a shard die at steps that TEMPER_CHAOS_SEED decides."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "temper", "train", str(root / "jobs" / "fashion_mnist_downpour.yaml"), "--json"]
    always = ["budget.epochs=2", "budget.evaluate_every=0", "budget.checkpoint_every=50", f"storage={folder / 'runs'}"]
    process = subprocess.Popen(
        [*command, *always, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    )
    if kill:
        chance = random.Random(SEED)
        steps = sorted(chance.sample(range(100, 800), 2))
        kinds = chance.sample(["WorkerActor", "ShardActor"], 2)
        sys.stdout.write(f"TEMPER_CHAOS_SEED={SEED}: kill {list(zip(kinds, steps, strict=True))}\n")
        for step, kind in zip(steps, kinds, strict=True):
            wait_for_step(process, folder, step)
            kill_one(process, kind, chance)
    code, result, err = finish(process)
    assert code == 0, err
    return result


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stale_and_broken_runs_reach_the_synchronous_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dean et al. 2012 report no loss by staleness; a point is what the noise of one seed and one test split allows."""
    beside = Path(__file__).parent.parent.parent / "shared" / "data"
    if "TEMPER_DATA" not in os.environ and beside.is_dir():
        monkeypatch.setenv("TEMPER_DATA", str(beside))
    if check_files("fashion_mnist"):
        pytest.skip("the data of fashion_mnist are not here")
    defaults = ["parallel.shards=1", "parallel.max_staleness=null", "parallel.warm_start_steps=0"]
    synchronous = run_fashion(tmp_path / "synchronous", "parallel.mode=synchronous", *defaults)
    two = run_fashion(tmp_path / "two")
    three = run_fashion(tmp_path / "three", "parallel.workers=3", "parallel.cpus_per_worker=0.6", kill=True)
    accuracy = [result["metrics"]["test/accuracy"] for result in (synchronous, two, three)]
    sys.stdout.write(f"accuracy: synchronous {accuracy[0]:.4f}, 2 workers {accuracy[1]:.4f}, 3 {accuracy[2]:.4f}\n")
    assert accuracy[1] > accuracy[0] - 0.01
    assert accuracy[2] > accuracy[0] - 0.01
    for folder in (tmp_path / "two", tmp_path / "three"):
        history = history_of(folder)
        assert history is not None
        records = [record["metrics"] for record in read_history(history)]
        assert max(metrics["server/clock_lead"] for metrics in records) <= 4
        # Not a plain loop in disguise: gradients were stale, and few by more than the bound.
        staleness = {name.rpartition("/")[2]: records[-1][name] for name in records[-1] if "/staleness/" in name}
        assert sum(share for number, share in staleness.items() if int(number) > 0) > 0.3
        assert sum(share for number, share in staleness.items() if int(number) > 4) < 0.05
