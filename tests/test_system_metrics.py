"""System metrics: what a node tells of itself, one series a node, and their way to MLflow beside the records."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from temper.tracking import system_metrics
from temper.tracking.delivery import system_queue
from temper.tracking.history import read_history
from temper.tracking.mlflow_store import RunMetrics, build_client, is_system_progress
from temper.tracking.system_metrics import Sample, SystemSpool, collected, sampled

CPU = "cpu_utilization_percentage"
NAMES = {
    CPU,
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_usage_megabytes",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
}


def sample(node: str, time_ms: int, value: float = 1.0, source: str = "a process") -> Sample:
    return Sample(node=node, source=source, time_ms=time_ms, metrics={CPU: value})


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "_FIRST_S", 0.001)
    monkeypatch.setattr(system_metrics, "INTERVAL_S", 0.001)


def take(count: int, **options: Any) -> list[Sample]:
    """The first samples of this node."""
    samples: list[Sample] = []
    enough = threading.Event()

    def hand_over(found: Sample) -> None:
        samples.append(found)
        if len(samples) >= count:
            enough.set()

    with sampled(hand_over, **options):
        assert enough.wait(60.0)
    return samples[:count]


# ----------------------------------------------------------------------------------------------------- on the nodes


@pytest.mark.usefixtures("_hasty")
def test_a_node_tells_what_mlflows_own_monitor_would() -> None:
    first, second = take(2, is_only_node=True)
    assert {name for name in first["metrics"] if not name.startswith("gpu_")} == NAMES
    assert first["node"] == ""
    assert first["source"] == second["source"]
    assert first["time_ms"] <= second["time_ms"]
    for name, value in second["metrics"].items():
        assert 0 <= value <= (100 if name.endswith("percentage") else 1e9), name
    assert take(1, is_only_node=False)[0]["node"] == system_metrics.socket.gethostname()


@pytest.mark.usefixtures("_hasty")
def test_gpus_are_told_of_one_by_one_as_far_as_they_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def power(gpu: int) -> int:
        if gpu == 1:
            raise NVMLError("not supported")
        return 250_000

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=90 + gpu),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 500_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (found,) = take(1, is_only_node=True)
    assert {name: value for name, value in found["metrics"].items() if name.startswith("gpu_")} == {
        "gpu_0_memory_usage_megabytes": 20000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 90.0,
        "gpu_0_power_usage_watts": 250.0,
        "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 20000.0,
        "gpu_1_memory_usage_percentage": 25.0,
        "gpu_1_utilization_percentage": 91.0,
    }


@pytest.mark.usefixtures("_hasty")
def test_what_was_collected_is_given_once_and_only_where_it_is_wanted() -> None:
    with collected(True, is_only_node=True) as take_samples:
        taken: list[Sample] = []
        while len(taken) < 3:
            taken += take_samples()
    assert len({id(found) for found in taken}) == len(taken)
    assert taken == sorted(taken, key=lambda found: found["time_ms"])
    before = threading.active_count()
    with collected(False, is_only_node=True) as take_samples:
        assert threading.active_count() == before
        assert take_samples() == []


@pytest.mark.usefixtures("_hasty")
def test_a_node_that_cannot_be_read_hurts_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise PermissionError("/proc/meminfo")

    monkeypatch.setattr(system_metrics.psutil, "virtual_memory", fail)
    with collected(True, is_only_node=True) as take_samples:
        while "no more system metrics of this node: /proc/meminfo" not in caplog.text:
            threading.Event().wait(0.001)
        assert take_samples() == []


# ------------------------------------------------------------------------------------------ where the run is tracked


def test_samples_are_numbered_over_all_attempts_and_share_steps_between_nodes(tmp_path: Path) -> None:
    first = SystemSpool(tmp_path / "system.jsonl")
    first.add([])
    assert not (tmp_path / "system.jsonl").exists()
    first.add([sample("a", 5000), sample("b", 5100), sample("a", 10_000)])
    again = SystemSpool(tmp_path / "system.jsonl")
    again.add([sample("b", 90_000, source="another one")])
    assert read_history(tmp_path / "system.jsonl") == [
        {"step": 1, "time_ms": 5100, "metrics": {f"system/a/{CPU}": 1.0, f"system/b/{CPU}": 1.0}},
        {"step": 2, "time_ms": 10_000, "metrics": {f"system/a/{CPU}": 1.0}},
        {"step": 3, "time_ms": 90_000, "metrics": {f"system/b/{CPU}": 1.0}},
    ]


def test_of_several_groups_on_a_node_one_is_listened_to(tmp_path: Path) -> None:
    spool = SystemSpool(tmp_path / "system.jsonl")
    for second in (0, 5, 10):
        spool.add([sample("a", 1000 * second, 1.0, "group 1")])
        spool.add([sample("a", 1000 * second + 500, 2.0, "group 2")])
    # Group 1 has ended.
    for second in (15, 20, 25, 30, 35):
        spool.add([sample("a", 1000 * second + 500, 2.0, "group 2")])
    found = [(record["time_ms"], record["metrics"][f"system/a/{CPU}"]) for record in read_history(spool.path)]
    assert found == [(0, 1.0), (5000, 1.0), (10_000, 1.0), (30_500, 2.0), (35_500, 2.0)]


def test_samples_reach_mlflow_beside_the_records_each_once(tmp_path: Path) -> None:
    """A real store, a crash, and another process that goes on."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = build_client(uri)
    run_id = client.create_run("0").info.run_id
    RunMetrics(uri, run_id).send([{"step": 700, "time_ms": 1, "metrics": {"train/loss": 0.5}}])

    def deliver(samples: SystemSpool | Path) -> None:
        system_queue(samples).delivery(uri, run_id).deliver()

    spool = SystemSpool(tmp_path / "system.jsonl")
    deliver(spool)
    spool.add([sample("", 1000), sample("", 6000)])
    deliver(spool)
    spool = SystemSpool(tmp_path / "system.jsonl")
    spool.add([sample("", 11_000)])
    deliver(spool)
    deliver(spool.path)
    points = client.get_metric_history(run_id, f"system/{CPU}")
    assert [(point.step, point.timestamp, point.value) for point in points] == [
        (1, 1000, 1.0), (2, 6000, 1.0), (3, 11_000, 1.0),
    ]  # fmt: skip
    assert RunMetrics(uri, run_id).last_step() == 700
    assert RunMetrics(uri, run_id, is_system_progress).last_step() == 3


@pytest.mark.parametrize(
    ("name", "is_it"),
    [(f"system/{CPU}", True), (f"system/a.b/{CPU}", True), (f"eval/{CPU}", False), ("system/a/gpu_0", False)],
)
def test_what_tells_how_far_the_samples_are(name: str, is_it: bool) -> None:
    check: Callable[[str], bool] = is_system_progress
    assert check(name) is is_it
