"""MLflow's server as a team runs it, for tests: PostgreSQL, artifacts through the server, users with passwords.

The settings are those of docs/mlflow_server.md; only what is for speed or for one machine differs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from temper.tracking.ui import free_port

START_TIMEOUT_S = 120.0
ROLE = "mlflow"


@dataclass(frozen=True)
class TeamServer:
    """A running server, one of its users who is no administrator, and every secret that it was given."""

    uri: str
    username: str
    password: str
    secrets: tuple[str, ...]
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the server sets."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }


def need(found: object, what: str) -> None:
    """Skips the test where a program is missing; where CI must have it, fails."""
    if not found and os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, which .ci/run installs")
    if not found:
        pytest.skip(f"needs {what}")


def postgresql_programs() -> Path | None:
    """The folder of the newest PostgreSQL of Debian's packages; its programs are not on the path."""
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(folders, key=lambda folder: int(folder.parent.name), default=None)


@contextlib.contextmanager
def running_team_server(folder: Path) -> Iterator[TeamServer]:
    """The server, with its artifacts and its log in `folder`; ends with the block."""
    programs = postgresql_programs()
    need(programs, "PostgreSQL (Debian's package postgresql)")
    assert programs is not None
    words = {name: secrets.token_urlsafe(18) for name in ("database", "key", "first", "admin", "ada")}
    log = folder / "server.log"
    with _database(programs, words["database"]) as sockets, log.open("w") as output:
        uri = f"http://127.0.0.1:{free_port('127.0.0.1', 0)}"
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "2",
             "--host", "127.0.0.1", "--port", uri.rpartition(":")[2]],
            env={**os.environ, **_settings(folder, sockets, words)},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with _ending(server):
            _wait(server, lambda: _is_healthy(uri), log)
            _make_users(uri, words)
            yield TeamServer(uri, "ada", words["ada"], tuple(words.values()), log)


def _settings(folder: Path, sockets: Path, words: dict[str, str]) -> dict[str, str]:
    """The server's environment. The passwords of the database and of MLflow's users are in no command line."""
    passwords = folder / "pgpass"
    passwords.touch(mode=0o600)
    passwords.write_text(f"*:*:*:{ROLE}:{words['database']}\n")
    users = folder / "auth.ini"
    users.write_text(
        "[mlflow]\n"
        "default_permission = EDIT\n"
        f"database_uri = {_database_uri(sockets, 'mlflow_users')}\n"
        "auth_cache_ttl_seconds = 60\n"
    )
    return {
        "PGPASSFILE": str(passwords),
        "MLFLOW_BACKEND_STORE_URI": _database_uri(sockets, "mlflow"),
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
        "MLFLOW_AUTH_CONFIG_PATH": str(users),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": words["first"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": words["key"],
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "10",
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "20",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }


def _make_users(uri: str, words: dict[str, str]) -> None:
    """Another password for the administrator than the one it was started with, and a user for the training."""
    users = f"{uri}/api/2.0/mlflow/users"
    changed = {"username": "admin", "password": words["admin"], "current_password": words["first"]}
    new = {"username": "ada", "password": words["ada"]}
    requests.patch(f"{users}/update-password", json=changed, auth=("admin", words["first"])).raise_for_status()
    requests.post(f"{users}/create", json=new, auth=("admin", words["admin"])).raise_for_status()


# -------------------------------------------------------------------------------------------------------- PostgreSQL


def _database_uri(sockets: Path, name: str) -> str:
    return f"postgresql+psycopg2://{ROLE}@/{name}?host={sockets}"


@contextlib.contextmanager
def _database(programs: Path, password: str) -> Iterator[Path]:
    """A PostgreSQL with the databases `mlflow` and `mlflow_users`, which listens on a Unix socket only; gives the
    folder of the socket."""
    # Not pytest's: a socket's path has 107 characters at most, and the user `postgres` must get there.
    with tempfile.TemporaryDirectory(prefix="temper-postgresql-") as name:
        folder = Path(name)
        (folder / "password").write_text(password)
        as_user: dict[str, Any] = {"cwd": folder}
        if os.getuid() == 0:  # as which PostgreSQL refuses to run
            as_user |= {"user": "postgres", "group": "postgres", "extra_groups": []}
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        data, log = folder / "data", folder / "log"
        with log.open("w") as output:
            create = ["--pgdata", data, "--username", ROLE, "--pwfile", folder / "password", "--auth", "scram-sha-256"]
            create += ["--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
            subprocess.run([programs / "initdb", *create], check=True, stdout=output, stderr=output, **as_user)
            settings = ("listen_addresses=", f"unix_socket_directories={folder}", "max_connections=200", "fsync=off")
            serve = [programs / "postgres", "-D", data, *(f"--{setting}" for setting in settings)]
            server = subprocess.Popen(serve, stdout=output, stderr=output, start_new_session=True, **as_user)
        with _ending(server):
            _wait(server, lambda: _create_databases(name, password), log)
            yield folder


def _create_databases(sockets: str, password: str) -> bool:
    """False where the server is not up yet."""
    import psycopg2

    try:
        connection = psycopg2.connect(host=sockets, dbname="postgres", user=ROLE, password=password)
    except psycopg2.OperationalError:
        return False
    with contextlib.closing(connection):
        connection.autocommit = True
        for database in ("mlflow", "mlflow_users"):
            connection.cursor().execute(f"CREATE DATABASE {database}")
    return True


# --------------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends a process that leads a session, and what it started."""
    try:
        yield
    finally:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)


def _wait(process: subprocess.Popen[bytes], is_up: Callable[[], bool], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not is_up():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.1)


def _is_healthy(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/health", timeout=5).ok
    except requests.RequestException:
        return False
