"""Locks for who shares only a bucket, which has none: claims that die with their holder because nobody renews them.

A claim on `<key>.lock` is two objects, `claims/<key>/<name>.born`, which is written once, and `….seen`, which its
holder writes anew every few seconds. Times are those of the objects, so that only the clock of the service counts. The
oldest claim that has been renewed lately is the one that holds. Should two hold at once all the same, because one could
not renew its own in time, both compute the same, and write the same.

Who claims has the lock of its working folder already. So another claim that was made from there is dead at once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from temper.errors import RunError
from temper.locks import HeldError
from temper.storage import Remote, Stored, remote_of

log = logging.getLogger(__name__)

RENEWED_S = 7.0
DEAD_S = 30.0
"""Not renewed for so long, a claim is dead; four renewals may be lost before that."""

_TICK_S = 0.25
_POLL_S = 2.0
_BORN, _SEEN = ".born", ".seen"
_CLAIMS = "claims"
_CLOCK = f"{_CLAIMS}/clock"  # written to learn what time it is there


@contextmanager
def remotely_claimed(path: Path, what: str) -> Iterator[None]:
    """Holds the claim that belongs to the lock `path` for the block; does nothing where the storage of `path` is a
    folder, in which locks do it all. Raises HeldError where another process holds it."""
    remote = remote_of(path)
    if remote is None:
        yield
        return
    claim = Claim(remote, f"{_CLAIMS}/{remote.key(path.with_suffix(''))}")
    with claim.held(what):
        yield


@contextmanager
def remotely_awaited(path: Path, say: Callable[[], None]) -> Iterator[None]:
    """As :func:`remotely_claimed`; where another process holds it, calls `say` and waits for that to end."""
    is_told = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(remotely_claimed(path, path.stem))
                break
            except HeldError:
                if not is_told:
                    say()
                is_told = True
                time.sleep(_POLL_S)
        yield


@dataclass(frozen=True)
class Holder:
    """A claim as the bucket has it, with the times of the service in nanoseconds."""

    name: str
    born_ns: int
    seen_ns: int


class Claim:
    """One process's claim on what `prefix` stands for."""

    def __init__(self, remote: Remote, prefix: str) -> None:
        self._remote, self._prefix = remote, prefix
        self._origin = working_folder_id(remote)
        self._name = f"{self._origin}-{uuid.uuid4().hex}"
        self._ended = threading.Event()

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Raises HeldError, which calls the thing by the word `what`, where an older claim is alive."""
        try:
            self._take(what)
            thread = threading.Thread(target=self._renew, name="temper-claim", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._ended.set()
                thread.join()
        finally:
            # One that stays dies by itself.
            with suppress(RunError):
                self._remove(self._name)

    def _take(self, what: str) -> None:
        self._remote.write(self._key(_BORN), f"{socket.gethostname()}, process {os.getpid()}".encode())
        self._check(self._look(), what)
        # A claim that is made from now on must not seem to be as old as this one: services count whole seconds.
        while (holders := self._look())[self._name].seen_ns <= holders[self._name].born_ns:
            time.sleep(_TICK_S)
        for name in self._check(holders, what):
            self._remove(name)

    def _check(self, holders: Mapping[str, Holder], what: str) -> list[str]:
        """The names of claims that are dead. Raises HeldError where one that is alive is older than this one."""
        mine = holders[self._name]
        others = {name: holder for name, holder in holders.items() if not name.startswith(self._origin)}
        alive = alive_at(mine.seen_ns, [*others.values(), mine])
        first = min(alive, key=lambda holder: (holder.born_ns, holder.name))
        if first != mine:
            holder = (self._remote.read(self._key(_BORN, first.name)) or b"somebody").decode(errors="replace")
            until = f"wait for it, or stop it; what was killed lets go of it after {DEAD_S:.0f} s"
            raise HeldError(f"{what} is being run on another machine ({holder}); {until}")
        return [name for name, holder in holders.items() if holder not in alive]

    def _look(self) -> dict[str, Holder]:
        """All claims, this one just renewed."""
        self._remote.write(self._key(_SEEN), b"")
        return read_holders(self._remote.files(self._prefix))

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            try:
                self._remote.write(self._key(_SEEN), b"")
            except RunError as error:
                log.warning("a claim could not be renewed: %s", error)

    def _remove(self, name: str) -> None:
        self._remote.delete([self._key(_BORN, name), self._key(_SEEN, name)])

    def _key(self, suffix: str, name: str | None = None) -> str:
        return f"{self._prefix}/{name or self._name}{suffix}"


def read_holders(objects: Mapping[str, Stored]) -> dict[str, Holder]:
    """The claims that these objects make; one that is being made has not been seen, one that is being removed is not
    born."""
    born = {Path(key).stem: stored for key, stored in objects.items() if key.endswith(_BORN)}
    seen = {Path(key).stem: stored for key, stored in objects.items() if key.endswith(_SEEN)}
    return {
        name: Holder(name, stored.time_ns, max(stored.time_ns, seen.get(name, stored).time_ns))
        for name, stored in born.items()
    }


def claimed_keys(remote: Remote) -> frozenset[str]:
    """The keys, without `.lock`, on which there is a claim that is alive."""
    remote.write(_CLOCK, b"")
    objects = remote.files(_CLAIMS)
    prefixes = {key.rpartition("/")[0] for key in objects if key.endswith(_BORN)}
    holders = {
        prefix: read_holders({key: stored for key, stored in objects.items() if key.startswith(f"{prefix}/")})
        for prefix in prefixes
    }
    now_ns = objects[_CLOCK].time_ns
    return frozenset(
        prefix.removeprefix(f"{_CLAIMS}/") for prefix, known in holders.items() if alive_at(now_ns, known.values())
    )


def alive_at(now_ns: int, holders: Iterable[Holder]) -> list[Holder]:
    return [holder for holder in holders if now_ns - holder.seen_ns <= DEAD_S * 1e9]


def working_folder_id(remote: Remote) -> str:
    """A name that no other working folder has, on no machine."""
    return folder_id(remote.folder)


def folder_id(folder: Path) -> str:
    """A name that no other folder has, on no machine; it is kept in the folder."""
    file, made = folder / "id", folder / f".id.{uuid.uuid4().hex}"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made.write_text(uuid.uuid4().hex)
        with suppress(FileExistsError):
            os.link(made, file)
        made.unlink()
    return file.read_text()
