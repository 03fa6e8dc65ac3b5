"""Storages in buckets: their addresses, what is pushed and pulled, and the claims that stand for locks; on a real S3
server, and on a folder where times are to be set."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from temper import claims, storage
from temper.claims import Claim, Holder, alive_at, claimed_keys, read_holders, remotely_awaited, remotely_claimed
from temper.errors import RunError
from temper.locks import HeldError
from temper.storage import (
    Remote,
    Stored,
    absolute_storage,
    check_address,
    check_reachable,
    hide_credentials,
    remote_of,
    shared_path,
    storage_folder,
)

HOUR_NS = 3600 * 10**9


@pytest.fixture(params=["s3", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a storage on the S3 server and of one on the disk."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket/runs"
    return f"s3://{request.getfixturevalue('bucket')}/runs"


def machine(address: str, folder: Path) -> Remote:
    """The storage as a machine sees it whose working folders lie in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPER_CACHE", str(folder))
        remote = remote_of(storage_folder(address))
    assert remote is not None
    return remote


def write(remote: Remote, key: str, text: str) -> str:
    """Writes a file of a working folder and returns its SHA-256."""
    (remote.folder / key).parent.mkdir(parents=True, exist_ok=True)
    (remote.folder / key).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ addresses


def test_working_folder_tells_its_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))
    address = "s3://my_bucket/runs/of-2026?region=eu-west-1"
    folder = storage_folder(address)
    assert folder.parent == tmp_path / "storage"
    assert folder == storage_folder(f"{address}/")
    assert remote_of(folder / "phases" / "0a" / "phase.json") == Remote(address, folder)
    assert storage_folder("s3://my/bucket/runs/of-2026") != storage_folder("s3://my_bucket/runs/of-2026")


def test_folder_stays_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_folder("./runs") == Path("runs")
    assert absolute_storage("runs") == str(tmp_path / "runs")
    assert remote_of(tmp_path / "runs" / "phases") is None
    assert remote_of(tmp_path / "storage" / "phases") is None


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("abfs://container/x", "has the scheme abfs"),
        ("s3://key:hidden-secret@bucket/x", "holds credentials"),
        ("s3://", "names no bucket"),
        ("file://folder/x", "names no absolute path"),
        ("gs://bucket/x?region=eu", "has the parameter region, which gs:// has not"),
        ("s3://bucket/x?secret_key=hidden-secret", "has the parameter secret_key"),
        ("s3://bucket/" + "x" * 250, "is too long"),
        ("s3://bucket/a b", "has spaces"),
    ],
)
def test_wrong_address(address: str, rule: str) -> None:
    (problem,) = check_address(address)
    assert problem.key == "storage" and rule in problem.rule and problem.remedy
    assert "hidden-secret" not in str(problem)


@pytest.mark.parametrize(
    "address", ["s3://bucket", "gs://anonymous@bucket/x", "file:///mnt/x", "s3://b/x?region=eu-west-1"]
)
def test_right_address(address: str) -> None:
    assert check_address(address) == []


def test_credentials_are_hidden() -> None:
    assert hide_credentials("s3://key:secret@bucket/x?secret_key=y") == "s3://***@bucket/x?…"
    assert hide_credentials("gs://anonymous@bucket/x") == "gs://anonymous@bucket/x"


def test_bucket_is_reached_or_named(bucket: str) -> None:
    assert check_reachable(f"s3://{bucket}/runs") == []
    (problem,) = check_reachable("s3://no-such-bucket-here/runs")
    assert "there is no bucket no-such-bucket-here" in problem.rule


class Refusing(http.server.BaseHTTPRequestHandler):
    """A service that knows nobody."""

    def do_HEAD(self) -> None:
        self.send_error(403)

    do_GET = do_PUT = do_POST = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_refusal_names_the_remedy(refusing_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-secret")
    (problem,) = check_reachable("s3://bucket-of-others/runs")
    assert "ACCESS_DENIED" in problem.rule and "give this machine credentials" in problem.rule
    assert "hidden-secret" not in str(problem) and "a-key" not in str(problem)


# ------------------------------------------------------------------------------------------------------- there and back


def test_files_go_there_and_back(address: str, tmp_path: Path) -> None:
    here, there = machine(address, tmp_path / "a"), machine(address, tmp_path / "b")
    digests = {key: write(here, key, key * 1000) for key in ("x/one", "x/deep/two", "three")}
    here.push(digests)
    assert {key: stored.bytes for key, stored in there.files("x").items()} == {"x/one": 5000, "x/deep/two": 10000}
    assert there.pull(digests) is None
    assert (there.folder / "x/deep/two").read_text() == "x/deep/two" * 1000
    assert sorted(path.name for path in there.folder.rglob("*") if path.is_file()) == ["one", "three", "two"]


def test_damaged_or_missing_object_is_named_and_not_taken(address: str, tmp_path: Path) -> None:
    here, there = machine(address, tmp_path / "a"), machine(address, tmp_path / "b")
    digest = write(here, "good", "good")
    here.push(["good"])
    here.write("bad", b"bbd")
    problem = there.pull({"good": digest, "bad": hashlib.sha256(b"bad").hexdigest()})
    assert problem is not None and "/bad: its SHA-256 is not the manifest's" in problem
    assert [path.name for path in there.folder.iterdir()] == ["good"]
    missing = there.pull({"none": None})
    assert missing is not None and missing.endswith("/none: missing")


def test_objects_are_read_listed_and_removed(address: str, tmp_path: Path) -> None:
    remote = machine(address, tmp_path / "a")
    assert remote.files("x") == {} and remote.read("x/one") is None and not remote.exists("x/one")
    remote.write("x/one", b'{"a": 1}')
    remote.write("x/two", b'{"a"')
    assert remote.read_json("x/one") == {"a": 1}
    assert remote.read_json("x/two") is None and remote.read_json("x/three") is None
    assert remote.exists("x/one") and not remote.exists("x")
    remote.delete(["x/one", "x/none"])
    assert list(remote.files("x")) == ["x/two"]
    remote.delete_folder("x")
    remote.delete_folder("x")
    assert remote.files("") == {}


def test_objects_are_grouped_by_folder(address: str, tmp_path: Path) -> None:
    remote = machine(address, tmp_path / "a")
    for key in ("x/one/a", "x/one/b/c", "x/two/a", "x/three"):
        remote.write(key, b"12")
    assert {name: sorted(found) for name, found in remote.folders("x").items()} == {"one": ["a", "b/c"], "two": ["a"]}


def test_folder_as_all_nodes_reach_it(tmp_path: Path) -> None:
    remote = machine("s3://bucket/runs?region=eu-west-1", tmp_path)
    assert shared_path(remote.folder / "digits" / "ray") == "s3://bucket/runs/digits/ray?region=eu-west-1"
    assert shared_path(tmp_path / "ray") == str(tmp_path / "ray")


def test_service_that_fails_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = machine(f"file://{tmp_path}/bucket", tmp_path / "a")
    delays: list[float] = []
    answers = iter([OSError("timed out"), OSError("SLOW_DOWN"), b"content"])

    def answer(files: Any, path: str) -> bytes:
        value = next(answers)
        if isinstance(value, OSError):
            raise value
        return value

    monkeypatch.setattr(storage.time, "sleep", delays.append)
    assert remote._try("key", answer) == b"content"
    assert delays == list(storage.RETRY_DELAYS_S)
    answers = iter([OSError("AWS Error NO_SUCH_BUCKET during GetObject operation")])
    with pytest.raises(RunError, match=r"NO_SUCH_BUCKET.*; make the bucket, or name another"):
        remote._try("key", answer)
    answers = iter([OSError("curlCode: 7, Could not connect to server")] * 3)
    with pytest.raises(RunError, match=r"key: curlCode: 7, .* check the network"):
        remote._try("key", answer)


# --------------------------------------------------------------------------------------------------------------- claims


def test_claim_holds_off_other_machines_until_it_ends(address: str, tmp_path: Path) -> None:
    here, there = machine(address, tmp_path / "a"), machine(address, tmp_path / "b")
    with remotely_claimed(here.folder / "phases" / "0a.lock", "dense of digits"):
        with (
            pytest.raises(HeldError, match=r"dense of digits is being run on another machine .*process"),
            remotely_claimed(there.folder / "phases" / "0a.lock", "dense of digits"),
        ):
            pass
        with remotely_claimed(there.folder / "phases" / "0b.lock", "another phase"):
            pass
    with remotely_claimed(there.folder / "phases" / "0a.lock", "dense of digits"):
        pass
    assert here.files("claims") == {}


def test_nothing_is_claimed_where_the_storage_is_a_folder(tmp_path: Path) -> None:
    with remotely_claimed(tmp_path / "0a.lock", ""), remotely_claimed(tmp_path / "0a.lock", ""):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["s3"], indirect=True)
def test_one_of_many_gets_the_claim(address: str, tmp_path: Path) -> None:
    number = 5
    start, tried = threading.Barrier(number), threading.Barrier(number)

    def claim(index: int) -> bool:
        lock = machine(address, tmp_path / str(index)).folder / "phases" / "0a.lock"
        start.wait()
        try:
            with remotely_claimed(lock, "dense"):
                tried.wait()
                return True
        except HeldError:
            tried.wait()
            return False

    with ThreadPoolExecutor(number) as pool:
        assert sorted(pool.map(claim, range(number))) == [False] * (number - 1) + [True]


def abandoned_claim(remote: Remote, seconds: float) -> Claim:
    """A claim in a storage on the disk, whose holder was last seen so long ago."""
    claim = Claim(remote, "claims/phases/0a")
    for suffix in (".born", ".seen"):
        remote.write(claim._key(suffix), b"gone, process 1")
        file = remote.address.removeprefix("file://") + "/" + claim._key(suffix)
        os.utime(file, (time.time() - seconds, time.time() - seconds))
    return claim


def test_claim_that_nobody_renews_is_dead(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/bucket"
    here, there = machine(address, tmp_path / "a"), machine(address, tmp_path / "b")
    abandoned_claim(there, claims.DEAD_S - 10)
    with (
        pytest.raises(HeldError, match=r"gone, process 1.*lets go of it after 30 s"),
        remotely_claimed(here.folder / "phases" / "0a.lock", ""),
    ):
        pass
    here.delete_folder("claims")
    abandoned_claim(there, claims.DEAD_S + 10)
    with remotely_claimed(here.folder / "phases" / "0a.lock", ""):
        assert len(here.files("claims")) == 2  # the dead one is removed


def test_claim_of_a_killed_command_on_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    here = machine(f"file://{tmp_path}/bucket", tmp_path / "a")
    abandoned_claim(here, 5)
    with remotely_claimed(here.folder / "phases" / "0a.lock", ""):
        assert len(here.files("claims")) == 2


def test_claim_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEWED_S", 0.01)
    here = machine(f"file://{tmp_path}/bucket", tmp_path / "a")

    def seen() -> int:
        return max(stored.time_ns for stored in here.files("claims").values())

    with remotely_claimed(here.folder / "phases" / "0a.lock", ""):
        first = seen()
        while seen() == first:
            pass


def test_claim_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"file://{tmp_path}/bucket"
    here, there = machine(address, tmp_path / "a"), machine(address, tmp_path / "b")
    said: list[str] = []
    other = remotely_claimed(there.folder / "data.lock", "data")
    other.__enter__()
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: other.__exit__(None, None, None))
    with remotely_awaited(here.folder / "data.lock", lambda: said.append("waiting")):
        assert said == ["waiting"]


def test_keys_that_are_claimed(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/bucket"
    here, there = machine(address, tmp_path / "a"), machine(address, tmp_path / "b")
    abandoned_claim(there, claims.DEAD_S + 10)
    with remotely_claimed(here.folder / "phases" / "0b.lock", ""):
        assert claimed_keys(there) == {"phases/0b"}
    assert claimed_keys(there) == frozenset()


def test_oldest_claim_that_is_alive(tmp_path: Path) -> None:
    objects = {
        "claims/p/a.born": Stored(1, 10),
        "claims/p/a.seen": Stored(0, HOUR_NS),
        "claims/p/b.born": Stored(1, 5),
        "claims/p/c.seen": Stored(0, HOUR_NS),
    }
    holders = read_holders(objects)
    assert holders == {"a": Holder("a", 10, HOUR_NS), "b": Holder("b", 5, 5)}
    assert alive_at(HOUR_NS, holders.values()) == [holders["a"]]
