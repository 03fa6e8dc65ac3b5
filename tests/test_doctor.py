"""`temper doctor`: each fault is found where its cause is, with the remedy, and only there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from temper.cli import main
from temper.launch import doctor
from temper.launch.doctor import Finding, examine, show_findings

Found = Callable[..., list[Finding]]


@pytest.fixture(autouse=True)
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where nothing is wrong: an empty working folder, no cache, no tracking server."""
    for name in ("MLFLOW_TRACKING_URI", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def find(sound: Path) -> Found:
    """The findings of one check, by its name in the listing."""

    def call(check: str, storage: Path = Path("runs")) -> list[Finding]:
        return [finding for run in doctor.CHECKS for finding in run(storage) if finding.check == check]

    return call


def only(findings: list[Finding], level: str) -> Finding:
    (finding,) = findings
    assert finding.level == level, finding
    assert bool(finding.remedy) == (level != "ok")
    return finding


# --------------------------------------------------------------------------------------------------------- versions


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    real = metadata.version

    def found(asked: str) -> str:
        if asked == name and version is None:
            raise metadata.PackageNotFoundError(name)
        return version if asked == name and version else real(asked)

    monkeypatch.setattr(doctor.metadata, "version", found)


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("torch", "2.12.1", "fault"),
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.14.0", "fault"),
        ("deepspeed", "0.19.2", "fault"),
        ("deepspeed", "0.19.3", "ok"),
        ("ray", "2.61.0", "fault"),
        ("mlflow", "3.9.0", "fault"),  # as text, it would be later than 3.17
    ],
)
def test_versions(find: Found, monkeypatch: pytest.MonkeyPatch, name: str, version: str, level: str) -> None:
    pretend(monkeypatch, name, version)
    finding = only(find(name), level)
    if level == "ok":
        assert finding.text == version
    else:
        wanted = doctor.VERSIONS[name]
        assert finding.text == f"{version} is outside {wanted.lowest} … {wanted.below}: {wanted.known_bad}"
        assert finding.remedy == "pip install -c constraints.txt -e ."


def test_a_package_that_is_missing(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "mlflow", None)
    assert only(find("mlflow"), "fault").text == "not installed"


def test_ray_without_its_dashboard(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(find("ray[default]"), "ok")
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    assert "ray[default,train,tune]" in only(find("ray[default]"), "fault").remedy


@pytest.mark.parametrize(("version", "level"), [((3, 10, 9), "fault"), ((3, 11, 0), "ok"), ((3, 13, 0), "fault")])
def test_python(find: Found, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], level: str) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", version)
    assert only(find("python"), level).text.startswith(".".join(map(str, version)))


# -------------------------------------------------------------------------------------------------------- jit locks


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def test_a_stale_lock_is_named_and_a_fresh_one_is_not(
    find: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    root = tmp_path / "my extensions"
    monkeypatch.setenv(variable, str(root))
    folder = root if variable == "TORCH_EXTENSIONS_DIR" else root / "torch_extensions"
    assert str(folder) in only(find("jit lock"), "ok").text
    stale, fresh = folder / "py311_cpu" / "cpu_adam" / "lock", folder / "py311_cpu" / "utils" / "lock"
    for lock in (stale, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    an_hour_ago = time.time() - 3600
    os.utime(stale, (an_hour_ago, an_hour_ago))
    finding = only(find("jit lock"), "fault")
    assert finding.text.startswith(f"{stale}: ")
    # The remedy works as it stands, in a shell.
    assert finding.remedy.startswith("rm ")
    subprocess.run(finding.remedy, shell=True, check=True)
    assert fresh.exists()
    assert only(find("jit lock"), "ok")


# ---------------------------------------------------------------------------------------------------------- storage


def test_storage_that_can_be_written(find: Found, sound: Path) -> None:
    assert only(find("storage", Path("runs/deep/er")), "ok").text.startswith(f"{sound}: written, synced, renamed; ")
    assert list(sound.iterdir()) == []


def test_storage_below_a_file(find: Found, sound: Path) -> None:
    (sound / "file").touch()
    for storage in ("file", "file/runs"):
        finding = only(find("storage", Path(storage)), "fault")
        assert finding.text.startswith(f"{sound / 'file'}: ")
        assert "Not a directory" in finding.text
        assert finding.remedy == "choose another folder with storage=…"


def test_storage_with_an_impossible_name(find: Found) -> None:
    assert "File name too long" in only(find("storage", Path("x" * 300)), "fault").text


def test_storage_that_does_not_replace_files(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "replace", lambda *_: None)
    assert "a rename did not replace its target" in only(find("storage"), "fault").text


def test_storage_that_is_nearly_full(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda *_: usage)
    assert only(find("storage"), "warning").text.endswith("1.0 GiB free")


def test_little_shared_memory(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(total=64 * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda *_: usage)
    if Path("/dev/shm").is_dir():
        assert only(find("shared memory"), "warning").remedy == "in a container: --shm-size=2g"


# --------------------------------------------------------------------------------------------------------- tracking


@pytest.fixture(params=[200, 401, 503])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, list[str]]]:
    """A server on loopback: its port, the status of every answer, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found.server_port, request.param, asked
        found.shutdown()
        thread.join()


@pytest.mark.parametrize("credentials", ["", "user:hunter2@"])
def test_a_tracking_server(
    find: Found, monkeypatch: pytest.MonkeyPatch, server: tuple[int, int, list[str]], credentials: str
) -> None:
    port, status, asked = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{credentials}127.0.0.1:{port}/mlflow/")
    shown = f"http://{credentials.replace('hunter2', '***')}127.0.0.1:{port}/mlflow/"
    if status == 503:
        finding = only(find("tracking"), "fault")
        assert finding.text == f"{shown}: HTTP Error 503: Service Unavailable"
        assert finding.remedy.startswith("start the server, or unset MLFLOW_TRACKING_URI")
    else:
        assert only(find("tracking"), "ok").text == f"{shown} answers {status}"
    assert asked == ["/mlflow/health"]


@pytest.mark.parametrize("credentials", ["", "user:hunter2@"])
def test_no_tracking_server(find: Found, monkeypatch: pytest.MonkeyPatch, credentials: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else answers there either
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{credentials}127.0.0.1:{taken.getsockname()[1]}")
        finding = only(find("tracking"), "fault")
    assert "Connection refused" in finding.text
    assert "hunter2" not in repr(finding)


@pytest.mark.parametrize(
    "uri", ["http://user:hunter2@127.0.0.1:many", "ftp://user:hunter2@host", "http://", "./mlruns", "nonsense"]
)
def test_an_address_that_is_none(find: Found, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert "hunter2" not in repr(only(find("tracking"), "fault"))


def test_a_database_server_is_not_contacted(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:hunter2@127.0.0.1:1/mlflow")
    assert only(find("tracking"), "ok").text == "postgresql://user:***@127.0.0.1:1/mlflow (not contacted)"


def build_store(path: Path, num_runs: int) -> None:
    """The one table of MLflow's that is counted."""
    with sqlite3.connect(path) as database:
        database.execute("create table runs (run_uuid text)")
        database.executemany("insert into runs values (?)", [(str(number),) for number in range(num_runs)])
    database.close()


@pytest.mark.parametrize(("num_runs", "said"), [(0, "0 runs"), (1, "1 run"), (3, "3 runs")])
@pytest.mark.parametrize("folder", ["runs", "100% of #1?"])
def test_a_sqlite_store(find: Found, sound: Path, num_runs: int, said: str, folder: str) -> None:
    store = sound / folder / "mlflow.db"
    assert only(find("tracking", Path(folder)), "ok").text == f"{store} will be made by the first run"
    store.parent.mkdir()
    build_store(store, num_runs)
    assert only(find("tracking", Path(folder)), "ok").text == f"{store}: {said}"


def test_a_store_that_is_empty_or_none(find: Found, sound: Path) -> None:
    store = sound / "runs" / "mlflow.db"
    store.parent.mkdir()
    store.touch()  # MLflow makes its tables in it
    assert only(find("tracking"), "ok").text == f"{store}: 0 runs"
    store.write_text("this is no database, whatever its name says" * 100)
    finding = only(find("tracking"), "fault")
    assert finding.text == f"{store}: file is not a database"
    assert finding.remedy.startswith("move the file away")


# --------------------------------------------------------------------------------------------------- working folder


def write_sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def test_a_large_working_folder(find: Found, sound: Path) -> None:
    write_sparse(sound / "small.bin", 10 * 2**20)
    for name in (".git", ".venv", "pkg/__pycache__"):  # Ray leaves these out by itself
        write_sparse(sound / name / "pack", 200 * 2**20)
    (sound / "link").symlink_to("/dev/zero")
    os.mkfifo(sound / "pipe")
    assert only(find("working folder"), "ok").text == "10.0 MiB; it travels with a submitted job"
    write_sparse(sound / "data" / "images" / "all.tar", 150 * 2**20)
    finding = only(find("working folder"), "warning")
    assert finding.text.startswith("160.0 MiB, and all of it travels with a submitted job; largest: data (150.0 MiB), ")
    assert finding.remedy == "move data elsewhere, or name it in .gitignore"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_remedy_for_a_large_working_folder_works(find: Found, sound: Path) -> None:
    subprocess.run(["git", "init", "-q", "."], cwd=sound, check=True)
    write_sparse(sound / "data" / "all.tar", 150 * 2**20)
    assert only(find("working folder"), "warning")
    (sound / ".gitignore").write_text("data/\n")
    assert only(find("working folder"), "ok")


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_exits_0_unless_there_is_a_fault(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [
        lambda storage: iter([Finding("a", "ok", str(storage))]),
        lambda _: iter([Finding("b", "warning", "w", "x")]),
    ]
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert main(["doctor", "--json", "--storage", "here"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "findings": [
            {"check": "a", "level": "ok", "text": "here", "remedy": ""},
            {"check": "b", "level": "warning", "text": "w", "remedy": "x"},
        ]
    }
    assert err == "ok       a: here\nwarning  b: w\n         → x\n"
    monkeypatch.setattr(doctor, "CHECKS", [lambda _: iter([Finding("c", "fault", "f", "mend")]), *checks])
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("FAULT    c: f\n         → mend\n")  # where it is read


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sound: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter3")
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "user:***@127.0.0.1:1" in out
    assert "user:***@127.0.0.1:1" in err
    assert "hunter" not in out + err


def test_every_check_has_a_line(sound: Path) -> None:
    names = {finding.check for finding in examine(Path("runs"))}
    assert {
        "python",
        *doctor.VERSIONS,
        "ray[default]",
        "gpu",
        "jit lock",
        "storage",
        "tracking",
        "working folder",
    } <= names
    assert len(show_findings(examine(Path("runs"))).splitlines()) >= len(names)
