"""What test files share: their order, a real S3 server on loopback, and buckets on it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first: they take longest, and two processes share the files out."""
    longest = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in longest)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server of moto's in a thread of this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A new bucket's name, which this process and its children reach by `s3://`; working folders lie in `tmp_path`."""
    import pyarrow.fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    files, path = pyarrow.fs.FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")
    files.create_dir(path)
    return name
