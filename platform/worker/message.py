"""What a controller and a worker say to each other: plain values, small.

Named tuples, because thousands a second are pickled, and a dataclass with slots takes several times
as long. A job's call and its answer travel as lists, which Ray need not pickle at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Key = tuple[int, int]
"""(job id, attempt): every message carries it, and an older attempt's is refused."""


class Assignment(NamedTuple):
    """One attempt at one job, for one rank of it.

    Attributes:
        cell: the job's name in its workflow. inputs: role -> published folder of that parent.
        restore: (step, folder) of the checkpoint to continue from.
        rendezvous: "tcp://host:port" of rank 0, for gangs.
    """

    workflow: int
    job: int
    attempt: int
    cell: str
    kind: str
    spec: Mapping[str, Any]
    identity: str
    inputs: Mapping[str, str]
    restore: tuple[int, str] | None = None
    threads: int = 1
    gpus: int = 0
    rank: int = 0
    workers: int = 1
    rendezvous: str | None = None

    @property
    def key(self) -> Key:
        return (self.job, self.attempt)

    @classmethod
    def from_list(cls, fields: list[Any]) -> Assignment:
        """The inverse of `fields_of`."""
        found = cls(*fields)
        return found._replace(restore=found.restore and (found.restore[0], found.restore[1]))


class Report(NamedTuple):
    """What a worker answers: a piece of the spool of the attempt it has.

    Attributes:
        key: the attempt, or None when the worker never had one.
        data: the spool's bytes from `offset`. size: bytes the spool has so far.
        progress: (done, total, note) for the live view.
        hungry: a checkpoint waits for its points to be acknowledged.
        running: the job's code has not returned.
    """

    key: Key | None
    rank: int = 0
    offset: int = 0
    data: bytes = b""
    size: int = 0
    progress: tuple[float, float, str] | None = None
    hungry: bool = False
    running: bool = False

    @classmethod
    def from_list(cls, fields: list[Any]) -> Report:
        """The inverse of `fields_of`."""
        found = cls(*fields)
        progress = found.progress
        return found._replace(
            key=found.key and (found.key[0], found.key[1]),
            progress=progress and (progress[0], progress[1], progress[2]),
        )


class Recalled(NamedTuple):
    """The answer to a recall: whether the attempt had not begun, and now never will."""

    key: Key
    given_back: bool


class Hello(NamedTuple):
    """What a worker says once it is up.

    Attributes:
        rendezvous: a free address on its node. key: the attempt it has or had last.
    """

    pid: int
    host: str
    node: str
    rendezvous: str
    key: Key | None = None


def fields_of(message: Assignment | Report) -> list[Any]:
    """Return what travels: no tuple, which Ray would pickle."""
    return [list(field) if isinstance(field, tuple) else field for field in message]
