"""System metrics of every node: sampled by one process of the node, kept in a spool, delivered like any record.

Their names are those of MLflow's own monitor, so that its page shows them under "System metrics": `system/<metric>`
where a run has one node, `system/<node>/<metric>` where it has several. A sample's step is its number in the run, as
with MLflow's own: what matters is its time, and a run that goes on after a crash goes on counting.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import psutil

from temper.tracking.history import History, PhaseHistory, Record

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
_FIRST_S = 1.0  # a short run has some, too
_SILENT_MS = 4 * 1000 * INTERVAL_S
_MOST_WAITING = 720  # an hour's, of a step that takes so long


class Sample(TypedDict):
    """The use of one node at one time. `node` is empty where there is no other; `source` is the process that looked."""

    node: str
    source: str
    time_ms: int
    metrics: dict[str, float]


TakeSamples = Callable[[], list[Sample]]


# ----------------------------------------------------------------------------------------------------- on the nodes


@contextlib.contextmanager
def sampled(hand_over: Callable[[Sample], object], *, is_only_node: bool) -> Iterator[None]:
    """Samples this node every five seconds while the block runs, in a thread that costs next to nothing."""
    over = threading.Event()
    node, source = "" if is_only_node else socket.gethostname(), uuid.uuid4().hex

    def sample() -> None:
        try:
            look, pause_s = _Look(), _FIRST_S
            while not over.wait(pause_s):
                hand_over(Sample(node=node, source=source, time_ms=time.time_ns() // 1_000_000, metrics=look.take()))
                pause_s = INTERVAL_S
        except Exception as error:  # no fault of this thread may be one of the training
            log.warning("there are no more system metrics of this node: %s", error)

    thread = threading.Thread(target=sample, name="temper-system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def collected(is_wanted: bool, *, is_only_node: bool) -> Iterator[TakeSamples]:
    """As :func:`sampled`, where that is wanted; yields what gives the samples since it was called last."""
    waiting: deque[Sample] = deque(maxlen=_MOST_WAITING)
    with contextlib.ExitStack() as stack:
        if is_wanted:
            stack.enter_context(sampled(waiting.append, is_only_node=is_only_node))
        yield lambda: [waiting.popleft() for _ in range(len(waiting))]


class _Look:
    """Reads the node's use; of the network, what has gone through since it was built."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # which answers for the time since it was called last
        self._received, self._sent = _network_bytes()
        self._gpus = _gpus()

    def take(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        received, sent = _network_bytes()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (received - self._received) / 1e6,
            "network_transmit_megabytes": (sent - self._sent) / 1e6,
        }
        for index, gpu in enumerate(self._gpus):
            values |= {f"gpu_{index}_{name}": value for name, value in _gpu_use(gpu).items()}
        return {name: round(value, 1) for name, value in values.items()}


def _network_bytes() -> tuple[int, int]:
    """Received and sent; zeros where the machine has no network."""
    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters is not None else (0, 0)


def _gpus() -> list[Any]:
    """The node's NVIDIA GPUs; none where there is no driver, or no nvidia-ml-py, which asks it."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # ImportError, or one of NVML's own, of which there is a class for each number
        return []


def _gpu_use(gpu: Any) -> dict[str, float]:
    """What this GPU tells of; a part of one, for example, knows no power."""
    import pynvml

    values: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        values["memory_usage_megabytes"] = memory.used / 1e6
        values["memory_usage_percentage"] = 100 * memory.used / memory.total
    with contextlib.suppress(pynvml.NVMLError):
        values["utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with contextlib.suppress(pynvml.NVMLError):
        power_mw = pynvml.nvmlDeviceGetPowerUsage(gpu)
        values["power_usage_watts"] = power_mw / 1000
        values["power_usage_percentage"] = 100 * power_mw / pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu)
    return values


# ------------------------------------------------------------------------------------------ where the run is tracked


def spool(path: Path) -> tuple[PhaseHistory, ...]:
    """The samples of a run, as what the delivery takes: one phase without an end."""
    return (PhaseHistory("system", path, sys.maxsize),)


class SystemSpool:
    """The writing end of a run's samples. Thread-safe; the file is begun with the first sample.

    Of a node that several processes look at, those of one are kept: of another only when it has been silent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._history: History | None = None
        self._sources: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    def add(self, samples: Sequence[Sample]) -> None:
        """Store samples, those of each node in the order of their times. Samples of several nodes share their steps."""
        with self._lock:
            by_node: dict[str, list[Sample]] = {}
            for sample in filter(self._is_kept, samples):
                by_node.setdefault(sample["node"], []).append(sample)
            if not by_node:
                return
            self._history = self._history or History(self.path)
            rows = itertools.zip_longest(*by_node.values())
            records = [_record(step, row) for step, row in enumerate(rows, self._history.last_step + 1)]
            self._history.append(records)

    def unwritten(self, phase: str) -> list[Record]:
        """Records that the disk has not taken yet; all later than those in the file."""
        return [] if self._history is None else self._history.unwritten()

    def _is_kept(self, sample: Sample) -> bool:
        source, heard_ms = self._sources.get(sample["node"], (sample["source"], sample["time_ms"]))
        if source != sample["source"] and sample["time_ms"] - heard_ms < _SILENT_MS:
            return False
        self._sources[sample["node"]] = sample["source"], sample["time_ms"]
        return True


def _record(step: int, row: Sequence[Sample | None]) -> Record:
    samples = [sample for sample in row if sample is not None]
    metrics = {
        "/".join(filter(None, ("system", sample["node"], name))): value
        for sample in samples
        for name, value in sample["metrics"].items()
    }
    return Record(step=step, time_ms=max(sample["time_ms"] for sample in samples), metrics=metrics)
