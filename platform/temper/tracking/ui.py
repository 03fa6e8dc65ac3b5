"""`temper ui`: MLflow's own pages on the store that a run was recorded in, served on this machine only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from temper.errors import EXIT_DONE, RunError
from temper.tracking.redact import redact_text

_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 10.0


def serve_ui(uri: str, host: str = "127.0.0.1", port: int = 5000, *, open_browser: bool = False) -> int:
    """Serve the store at `uri` until Ctrl-C; return the exit code.

    Port 0, or a port that is taken, means any free one. A store behind http(s) has its pages already: its address is
    printed, and that is all. Raises RunError where the server does not come up.
    """
    if uri.startswith(("http://", "https://")):
        _show(redact_text(uri), open_browser)
        return EXIT_DONE
    port = free_port(host, port)
    address = f"http://{host}:{port}"
    with _server(uri, host, port) as process, _stopped_by_signals(process) as stopped:
        _wait_until_healthy(address, process, stopped)
        if not stopped.is_set():
            _show(address, open_browser)
            print("Ctrl-C ends it", file=sys.stderr)
        code = process.wait()
    return EXIT_DONE if stopped.is_set() else code


def free_port(host: str, port: int) -> int:
    """`port` if nothing listens on it, else one that the system chooses."""
    for candidate in (port, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, candidate))
            return int(probe.getsockname()[1])
    raise RunError(f"no port can be opened on {host}; use --host 127.0.0.1")


def server_command(host: str, port: int) -> list[str]:
    """The command line of MLflow's server: one worker, because one person looks, and no line for each request."""
    quiet = ["--uvicorn-opts", "--log-level warning"]
    return [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1", *quiet]


def server_environment(uri: str) -> dict[str, str]:
    """The server's environment. The store is named here, because a command line shows its password to everybody."""
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # serves evaluations of language models; four more processes
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),  # deprecations inside the server
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    }
    if uri.startswith("sqlite:///"):
        # Where experiments made in the browser put their files, else a folder in the working directory.
        folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
        environment["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = str(folder)
        environment["MLFLOW_ARTIFACTS_DESTINATION"] = str(folder)
    return environment


def _show(address: str, open_browser: bool) -> None:
    # Else MLflow greets with the page for language models.
    address = f"{address.rstrip('/')}/#/experiments?workflowType=machine_learning"
    print(f"MLflow: {address}", file=sys.stderr)
    if open_browser:
        webbrowser.open(address)


@contextlib.contextmanager
def _server(uri: str, host: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    # In a session of its own, so that Ctrl-C reaches it once, through this process, and nothing of it stays behind.
    process = subprocess.Popen(
        server_command(host, port),
        env=server_environment(uri),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end_session(process)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End the server and its worker, politely and then for certain."""
    for signum, timeout_s in ((signal.SIGTERM, _STOP_TIMEOUT_S), (signal.SIGKILL, _STOP_TIMEOUT_S)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)


@contextlib.contextmanager
def _stopped_by_signals(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Hand Ctrl-C and SIGTERM on to the server; the event says that one came."""
    stopped = threading.Event()

    def stop(signum: int, frame: object) -> None:
        stopped.set()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], stopped: threading.Event) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's loopback
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not stopped.is_set():
        if process.poll() is not None:
            raise RunError(f"MLflow's server ended with exit code {process.returncode}; what it said is above")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            direct.open(f"{address}/health", timeout=2),
        ):
            return
        if time.monotonic() > deadline_s:
            raise RunError(f"MLflow's server does not answer at {address} after {_START_TIMEOUT_S:.0f} s")
        stopped.wait(0.2)
