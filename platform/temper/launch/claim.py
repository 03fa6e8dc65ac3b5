"""Who may write a run: one command at a time, and no worker of an earlier attempt that has not yet noticed its end.

A claim is a lock on a file that the operating system drops when its holder dies, however it dies.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from temper.errors import RunError


@contextmanager
def claimed(path: Path, what: str) -> Iterator[None]:
    """Holds `path` for the block. Raises RunError where somebody else holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{what} is being run by another process; wait for it, or stop it first") from None
        yield
