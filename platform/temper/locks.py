"""Locks that die with their holder: the operating system drops them when a process ends, however it ends.

A phase is written by one command at a time, and by no worker of an earlier attempt that has not yet noticed its end.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from temper.errors import RunError

_LOOK_S = 0.01  # longer than it takes to look at a lock


class HeldError(RunError):
    """Another process holds the lock."""


@contextmanager
def claimed(path: Path, what: str) -> Iterator[None]:
    """Holds `path` for the block, alone. Raises HeldError where another process holds it."""
    with _held_at_once(path, fcntl.LOCK_EX, f"{what} is being run by another process; wait for it, or stop it first"):
        yield


@contextmanager
def shared(path: Path, what: str) -> Iterator[None]:
    """Holds `path` for the block, beside others who share it. Raises HeldError where somebody has it alone."""
    with _held_at_once(path, fcntl.LOCK_SH, f"{what} is being removed by another process; start again"):
        yield


@contextmanager
def _held_at_once(path: Path, how: int, refusal: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not _take(file, how):
            # It may only have been looked at: see `is_held`.
            time.sleep(_LOOK_S)
            if not _take(file, how):
                raise HeldError(refusal)
        yield


def _take(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path: Path) -> bool:
    """Whether a process holds `path`, alone or beside others. It is taken for that, but for an instant only."""
    try:
        with path.open("r+") as file:
            return not _take(file, fcntl.LOCK_EX)
    except OSError:  # there is none, or it is on a disk that nobody can write
        return False


@contextmanager
def awaited(path: Path, say: Callable[[], None]) -> Iterator[None]:
    """Holds `path` for the block; where another process holds it, calls `say` and waits for that to end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
