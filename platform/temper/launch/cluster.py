"""Ray as temper uses it: an embedded one that dies with the command, or a cluster that is already running."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from temper.errors import JobError, Problem, RunError
from temper.plan.mesh import ClusterShape, local_cluster
from temper.plan.room import NodeRoom

# Read by Ray when it is imported, in the driver and in what it starts.
RAY_ENVIRONMENT = {
    # Ray otherwise hides all GPUs from processes that asked for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The controller looks for reports and dead workers this often; a report waits for the look before it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Paths in a job are relative to where the command was typed.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # What a worker prints goes to its own log, once.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # What a call raised that nobody waits for any more, as after a second Ctrl-C, is told to nobody.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
# An embedded Ray has no nodes that could be taken away.
EMBEDDED_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray would start a process for each CPU in advance, and then others, since Ray Train's have an environment of
    # their own.
    "RAY_prestart_worker_first_driver": "0",
}


def check_address(address: str) -> None:
    """Raises JobError for an address that no Ray understands."""
    if address in ("local", "auto") or address.startswith("ray://") or _is_host_port(address):
        return
    raise JobError([Problem("--address", address, "is not an address of Ray", "use local, auto, HOST:PORT or ray://…")])


def _is_host_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdigit()


def prepare_environment(address: str) -> None:
    """Settings that Ray reads when it is imported; what the user has set stays. Call it before any import of ray."""
    chosen = {**RAY_ENVIRONMENT, **(EMBEDDED_ENVIRONMENT if address == "local" else {})}
    for name, value in chosen.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(address: str, logs: Path) -> Iterator[None]:
    """Connects to `address`, or starts an embedded Ray for `local`; disconnects, or stops it, at the end.

    Raises:
        RunError: there is no Ray at the address.
    """
    import ray

    if _is_host_port(address):
        _check_reachable(address)
    try:
        _connect(ray, address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        remedy = "is its token in ~/.ray/auth_token or RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token set?"
        raise RunError(f"the Ray at {address} does not take this client: {error}; {remedy}") from error
    try:
        _link_logs(ray, logs)
        yield
    finally:
        ray.shutdown()


class RaySession:
    """The command's one session with Ray, which lasts until `stack` is closed. An embedded Ray is started when the
    first run needs it, and serves those after it, too."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        self.address = address
        self.is_started = False
        self._stack = stack

    @property
    def is_embedded(self) -> bool:
        return self.address == "local"

    def start(self, logs: Path) -> None:
        """Connects to Ray or starts it, and points `logs/ray` at the session's own logs; what has been done before is
        not done again. Raises RunError where there is no Ray at the address."""
        if self.is_started:
            import ray

            _link_logs(ray, logs)
            return
        self._stack.enter_context(ray_session(self.address, logs))
        self.is_started = True


def _check_reachable(address: str) -> None:
    """Ray itself waits for more than a minute for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        remedy = "start one with `ray start --head`, or use --address local"
        raise RunError(f"no Ray at {address}: {error}; {remedy}") from error


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address == "local":
        # `address="local"`: a plain init would join any Ray that happens to run on this machine.
        ray.init(address="local", num_cpus=os.cpu_count() or 1, include_dashboard=False, **quiet)
    else:
        ray.init(address=address, **quiet)


def _link_logs(ray: Any, logs: Path) -> None:
    """Points `logs/ray` at the session's own logs, which Ray keeps outside the run's folder."""
    node = ray._private.worker._global_node
    if node is None:
        return
    logs.mkdir(parents=True, exist_ok=True)
    link = logs / "ray"
    link.unlink(missing_ok=True)
    link.symlink_to(node.get_logs_dir_path())


def cluster_shape(address: str) -> ClusterShape:
    """CPUs and GPUs of this machine for `local`, of the running cluster otherwise. Needs a session for the latter."""
    if address == "local":
        return local_cluster()
    import ray

    resources = ray.cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return ClusterShape(nodes=nodes, cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))


def node_rooms(address: str) -> list[NodeRoom]:
    """CPUs and GPUs of each node, whoever uses them now; of this machine for `local`. Needs a session otherwise."""
    if address == "local":
        machine = local_cluster()
        return [NodeRoom(machine.cpus, machine.gpus)]
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeRoom(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in resources]
