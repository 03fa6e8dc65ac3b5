"""What the workers' exceptions mean: a peer was lost and the group can be restarted, or the code itself fails.

Pure functions of the exceptions; no process is touched. Exceptions arrive here from other processes, without their
traceback and without what caused them, so only type and message can tell.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

_TRACEBACK_CHARACTERS = 4000

# By name, because torch need not be imported in the process that asks.
_LOST_PEER_TYPES = {"DistNetworkError", "DistStoreError", "CollectiveTimeoutError", "ConnectionError"}
_COLLECTIVE_TYPES = {"RuntimeError", "DistBackendError", "DistError"}

# What gloo, NCCL and torch's TCPStore say on the ranks that remain when another one is gone.
_LOST_PEER_MESSAGE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket (closed|timeout)|timed? ?out"
    r"|gloo[/\\]transport|connectFullMesh|monitoredBarrier|recvValue failed|failed to (recv|send)|got 0 bytes"
    r"|nccl(RemoteError|SystemError|InProgress|CommAbort)|nccl communicator was aborted|watchdog|no route to host"
    r"|unexpected eof|network is unreachable",
    re.IGNORECASE,
)
_MISUSE_MESSAGE = re.compile(r"nccl(InvalidUsage|InvalidArgument)|duplicate gpu", re.IGNORECASE)


def failed_ranks(errors: Mapping[int, BaseException]) -> dict[int, BaseException]:
    """The ranks whose error would come again in every attempt; empty where only peers were lost.

    Also empty as soon as one worker has died: what the others raise then may be a consequence of it in any disguise,
    and an error that is real shows itself again in the next attempt.
    """
    if any(is_death(error) for error in errors.values()):
        return {}
    return {rank: error for rank, error in errors.items() if not is_lost_peer(error)}


def is_death(error: BaseException) -> bool:
    """Whether the worker's process or node is gone, or does not answer any more."""
    from ray.exceptions import (
        LocalRayletDiedError,
        NodeDiedError,
        OutOfMemoryError,
        RayActorError,
        WorkerCrashedError,
    )
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    deaths = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError)
    health = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    return isinstance(unwrap(error), (*deaths, *health))


def is_lost_peer(error: BaseException) -> bool:
    """Whether the worker failed because another one was lost: by its type, or by what a collective said."""
    error = unwrap(error)
    if is_death(error):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _LOST_PEER_TYPES:
        return True
    if type(error).__name__ not in _COLLECTIVE_TYPES or _MISUSE_MESSAGE.search(str(error)):
        return False
    return _LOST_PEER_MESSAGE.search(str(error)) is not None


def unwrap(error: BaseException) -> BaseException:
    """The exception that was raised, out of what Ray Train and Ray put around it."""
    from ray.exceptions import RayTaskError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    if isinstance(error, UserExceptionWithTraceback):
        return unwrap(error._base_exc)
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
        return unwrap(error.cause)
    return error


def describe_failure(rank: int, error: BaseException, time_ms: int) -> dict[str, Any]:
    """One line of failures.jsonl: time_ms, rank, kind (`lost peer` or `error`), type, message, traceback.

    The traceback is what travelled with the exception: Ray Train strips it, notes added on the worker remain.
    """
    origin = unwrap(error)
    shown = str(error) if error is not origin else "".join(traceback.format_exception(origin))
    return {
        "time_ms": time_ms,
        "rank": rank,
        "kind": "lost peer" if is_lost_peer(error) else "error",
        "type": f"{type(origin).__module__}.{type(origin).__qualname__}",
        "message": str(origin)[:_TRACEBACK_CHARACTERS],
        "traceback": shown[-_TRACEBACK_CHARACTERS:],
    }
