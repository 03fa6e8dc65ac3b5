"""What tracking costs a training that reports fifty metrics of every step: the time of a step over that of a bare one.

    python benchmarks/tracking.py [--repeats 9] [--steps 300] [--step-ms 20]

As in temper, two processes take part. The training's has one thread, which does the same work on the processor in every
step and then notes the step with temper's own reporter; every two seconds that hands its records on. The controller's
has temper's own tracking: it takes the records, writes them to the history, synced to the disk, and a thread of it
delivers them. A pipe stands in for Ray between the two. Blocks of steps are run in turns: bare, without a reporter;
tracked to SQLite; to an `mlflow server` on this machine; to a server that answers 500 to everything; and to one that
never answers. What the machine does beside hits them all, and so does what the server itself takes of it.

Printed are, by where the points go, the median step over the blocks and its median ratio to the bare block beside it,
with quartiles; the part of a step that the training's process spends in calls of the reporter; and the processor time
of the controller's process for each step, until the last point is delivered, over the time of a bare step. The last
line is JSON. That all points have arrived where there is a store to take them is checked after each block.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing as mp
import os
import platform
import socketserver
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from temper.engine.base import StepResult
from temper.files import write_json
from temper.loop import Reporter, TrainState
from temper.plan.peaks import Speed
from temper.tracking import ui

METRICS = 50
BARE = "nothing"
DRAIN_S = 120.0
PHASE = "dense"


# --------------------------------------------------------------------------------------------------- where points go


class Refusing(BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


class Hanging(BaseHTTPRequestHandler):
    """Never answers."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self.request.recv(2**16):
                pass


@contextlib.contextmanager
def served(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    from temper.tracking.mlflow_store import build_client

    uri, port = f"sqlite:///{folder}/server.db", ui.free_port("127.0.0.1", 0)
    build_client(uri)
    with ui._server(uri, "127.0.0.1", port) as process:
        address = f"http://127.0.0.1:{port}"
        ui._wait_until_healthy(address, process, threading.Event())
        yield address


# ----------------------------------------------------------------------------------------------------- the controller


def control(connection: Connection, uri: str, takes: bool, folder: str) -> None:
    """The controller's process: tracks one block after the other, each in a run of its own. `takes`: the store is one
    that takes the points."""
    from temper.tracking.callback import Tracking, TrackingTarget
    from temper.tracking.history import PhaseHistory
    from temper.tracking.mlflow_store import build_client

    logging.getLogger("temper").setLevel(logging.ERROR)  # every outage is meant
    for number in itertools.count():
        if not connection.recv():
            return
        place = Path(folder) / str(number)
        place.mkdir(parents=True)
        run_id = build_client(uri).create_run("0").info.run_id if takes else "0" * 32
        write_json(place / "run.json", {"uri": uri, "run_id": run_id, "open": True})
        histories = (PhaseHistory(PHASE, place / "history.jsonl", 2**62),)
        tracking = Tracking(TrackingTarget(str(place / "run.json"), histories, "", str(place / "system.jsonl")))
        connection.send("ready")
        began = time.process_time()
        while (report := connection.recv()) is not None:
            tracking.add([report])
        has_all = tracking.close(DRAIN_S if takes else 0.0)
        connection.send((has_all, time.process_time() - began))


@dataclass(frozen=True)
class Controller:
    """The training's end of the pipe to a controller."""

    connection: Connection
    takes: bool

    @contextlib.contextmanager
    def tracked(self) -> Iterator[list[float]]:
        """Around a block; then has the seconds of the processor that the controller took for it."""
        cpu_s: list[float] = []
        self.connection.send(True)
        self.connection.recv()
        yield cpu_s
        self.connection.send(None)
        has_all, seconds = self.connection.recv()
        if self.takes and not has_all:
            raise RuntimeError("the store did not take all points")
        cpu_s.append(seconds)

    def build_reporter(self) -> Reporter:
        def report(records: list[dict[str, Any]]) -> None:
            self.connection.send({"phase": PHASE, "records": records})

        return Reporter(
            report,
            lambda: False,
            first_step=0,
            rank=0,
            world_size=1,
            speed=Speed(64),
            record_every=1,
            device=torch.device("cpu"),
        )


# ------------------------------------------------------------------------------------------------------- the training


@dataclass
class Blocks:
    """Of one kind, by repeat: milliseconds of a step and of the reporter's calls in it, and of the controller's
    processor for it."""

    step_ms: list[float] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)
    controller_ms: list[float] = field(default_factory=list)


def build_work(step_ms: float) -> Callable[[], None]:
    """Multiplications of small matrices, as many as take so long on this machine."""
    left, right = torch.randn(192, 192), torch.randn(192, 192)
    times = []
    for _ in range(200):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(1000 * (time.perf_counter() - began))
    count = max(1, round(step_ms / statistics.median(times)))

    def work() -> None:
        for _ in range(count):
            torch.mm(left, right)

    return work


def run_bare(work: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds of each step."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return times


def run_tracked(work: Callable[[], None], steps: int, reporter: Reporter) -> tuple[list[float], list[float]]:
    """Milliseconds of each step, and of the reporter's calls in it."""
    state, loss = TrainState(), torch.tensor(0.5)
    result = StepResult(loss, {"cross_entropy": loss}, 1.0, applied=True, loss_scale=None)
    values = {f"sparsity/layer_{index}": index / METRICS for index in range(METRICS - 5)}
    times, own_times = [], []
    for _ in range(steps):
        began = time.perf_counter()
        work()
        state = state.after(result, time.perf_counter() - began)
        worked = time.perf_counter()
        reporter.add(state, result, 0.1, values)
        if reporter.due(state.step):
            reporter.flush(state.step)
        ended = time.perf_counter()
        times.append(1000 * (ended - began))
        own_times.append(1000 * (ended - worked))
    reporter.flush(state.step)
    return times, own_times


def contest(connections: dict[str, tuple[Connection, bool]], repeats: int, steps: int, step_ms: float) -> Any:
    """The training's process: all blocks in turns, each round in another order; the first round is for caches."""
    torch.set_num_threads(1)
    work = build_work(step_ms)
    controllers = {name: Controller(*known) for name, known in connections.items()}
    blocks = {name: Blocks() for name in (BARE, *controllers)}
    names = list(blocks)
    for repeat in range(repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            found = blocks[name] if repeat > 0 else Blocks()
            if name == BARE:
                found.step_ms.append(statistics.median(run_bare(work, steps)))
                continue
            with controllers[name].tracked() as cpu_s:
                times, own_times = run_tracked(work, steps, controllers[name].build_reporter())
            found.step_ms.append(statistics.median(times))
            # The mean: most calls are short, and the one that hands the records on is not.
            found.own_ms.append(statistics.mean(own_times))
            found.controller_ms.append(1000 * cpu_s[0] / steps)
    return blocks


def train(answer: Connection, *arguments: Any) -> None:
    answer.send(contest(*arguments))


# ---------------------------------------------------------------------------------------------------------- the whole


def measure(uris: dict[str, tuple[str, bool]], folder: Path, repeats: int, steps: int, step_ms: float) -> Any:
    """The blocks of every kind. `uris`: by name, where the points go and whether that takes them."""
    context = mp.get_context("spawn")
    processes, connections = [], {}
    for name, (uri, takes) in uris.items():
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=control, args=(theirs, uri, takes, str(folder / name)), daemon=True))
        connections[name] = (ours, takes)
    answer, asked = context.Pipe(duplex=False)
    processes.append(context.Process(target=train, args=(asked, connections, repeats, steps, step_ms), daemon=True))
    for process in processes:
        process.start()
    asked.close()
    blocks = answer.recv()
    for connection, _ in connections.values():
        connection.send(False)
    for process in processes:
        process.join()
    return blocks


def summarize(blocks: dict[str, Blocks]) -> dict[str, dict[str, Any]]:
    """By where the points go: the median step, its ratio to the bare one with quartiles, and the shares of a bare
    step that the reporter's calls and the controller's processor take."""
    bare = blocks[BARE].step_ms
    summary: dict[str, dict[str, Any]] = {BARE: {"step_ms": statistics.median(bare)}}
    for name in blocks.keys() - {BARE}:
        found = blocks[name]
        first, ratio, third = statistics.quantiles(
            [ours / other for ours, other in zip(found.step_ms, bare, strict=True)], n=4
        )
        summary[name] = {
            "step_ms": statistics.median(found.step_ms),
            "ratio": ratio,
            "quartiles": [first, third],
            "own_share": statistics.median(found.own_ms) / statistics.median(bare),
            "controller_share": statistics.median(found.controller_ms) / statistics.median(bare),
        }
    return {name: summary[name] for name in blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=float, default=20.0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        uris = {
            "SQLite": (f"sqlite:///{folder}/mlflow.db", True),
            "mlflow server": (stack.enter_context(mlflow_server(folder)), True),
            "answers 500": (stack.enter_context(served(Refusing)), False),
            "hangs": (stack.enter_context(served(Hanging)), False),
        }
        blocks = measure(uris, folder, options.repeats, options.steps, options.step_ms)
    print(f"{platform.machine()}, {os.cpu_count()} cores; {METRICS} metrics a step, {options.steps} steps a block")
    print(f"{'':<14}  {'step':>9}  {'ratio':>6}  {'quartiles':>15}  {'own calls':>9}  {'controller':>10}")
    summary = summarize(blocks)
    for name, row in summary.items():
        line = f"{name:<14}  {row['step_ms']:6.2f} ms"
        if "ratio" in row:
            first, third = row["quartiles"]
            line += f"  {row['ratio']:6.3f}  {first:.3f} … {third:.3f}"
            line += f"  {row['own_share']:9.2%}  {row['controller_share']:10.2%}"
        print(line)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
