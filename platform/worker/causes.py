"""Why an attempt ended, told from the exception that ended it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

from kvlab import KvlabError
from kvlab.db.states import Cause
from kvlab.platform.jobs.context import Diverged, Stopped

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE}
_DISK_TEXTS = ("no space left on device", "disk quota exceeded", "input/output error")
_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory")
_MEET_TEXTS = (
    "address already in use",
    "eaddrinuse",
    "failed to listen",
    "cannot assign requested address",
    "connection refused",
    "timed out after",
)
"""Of a gang that did not come together: the next attempt meets at another address."""
_PEER_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "nccl",
    "gloo",
    "broken pipe",
)


def classify(error: BaseException, workers: int = 1) -> tuple[Cause, str]:
    """Return the cause, and one line for people.

    A library may wrap the error that matters, so the whole chain of causes is looked at. An error
    that is none of the known ones is a bug in the job or its settings: `user_error`, not retried.
    """
    chain = list(_chain(error))
    for one in chain:
        cause = _known(one, workers)
        if cause is not None:
            return cause, _line(one)
    return Cause.USER_ERROR, _line(error)


def _known(error: BaseException, workers: int) -> Cause | None:
    text = str(error).lower()
    if isinstance(error, Stopped):
        return Cause.STOPPED
    if isinstance(error, Diverged):
        return Cause.DIVERGED
    if isinstance(error, KvlabError):
        return Cause.USER_ERROR
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return Cause.OUT_OF_MEMORY
        if error.errno in _DISK:
            return Cause.INFRASTRUCTURE
    # torch's own class is matched by name: it may not be imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Cause.OUT_OF_MEMORY
    if isinstance(error, (RuntimeError, OSError)) or type(error).__name__ == "SafetensorError":
        if any(one in text for one in _DISK_TEXTS):
            return Cause.INFRASTRUCTURE
        if any(one in text for one in _MEMORY_TEXTS):
            return Cause.OUT_OF_MEMORY
        if workers > 1 and any(one in text for one in _MEET_TEXTS):
            return Cause.INFRASTRUCTURE
        if workers > 1 and any(one in text for one in _PEER_TEXTS):
            return Cause.NODE_LOST
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, (KvlabError, Stopped)):
        return (text or name)[:500]
    return (f"{name}: {text}" if text else name)[:500]


def checked_result(result: object) -> dict[str, object]:
    """Return a job's result if it is a JSON object; raise a KvlabError otherwise."""
    if not isinstance(result, dict):
        raise KvlabError(f"the job returned {type(result).__name__}, not a mapping")
    try:
        json.dumps(result)
    except (TypeError, ValueError) as error:
        raise KvlabError(f"the job's result is not JSON: {error}") from error
    return result
