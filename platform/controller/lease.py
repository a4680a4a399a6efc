"""Holding a workflow: taking its lease, and renewing it from a thread."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

from kvlab import KvlabError
from kvlab.db.errors import Held, LeaseLost, StoreError, who
from kvlab.db.rows import Lease, WorkflowRow
from kvlab.db.store import Store
from kvlab.platform.controller.inbox import Asked, Inbox, LeaseOver

TTL_SECONDS = 15.0
BEAT_SECONDS = 1.0


def owner() -> str:
    """Name this process: "place:pid:start", never used again."""
    return f"{_place()}:{os.getpid()}:{_started(os.getpid())}"


def claim(store: Store, workflow: int) -> Lease:
    """Take the lease; wait for that of an owner who cannot be asked, 15 s at most.

    Raises:
        Held: its owner lives.
    """
    me = owner()
    until: float | None = None
    while True:
        try:
            return store.claim(workflow, me, TTL_SECONDS, store.clock())
        except Held as held:
            alive = _alive(held.owner)
            if alive or (until is not None and held.until > until):
                raise
            if alive is False:
                # Its process is gone, so nobody renews: the lease counts as ended. Should it not be
                # gone after all, the token refuses what it writes.
                return store.claim(workflow, me, TTL_SECONDS, held.until)
            until = held.until
            time.sleep(min(1.0, max(0.05, until - store.clock())))


def refuse_running(store: Store, name: str) -> None:
    """Raise a KvlabError when a live process runs a workflow of that name.

    A second one would do the same jobs again: nothing is reused before it is finished.
    """
    for row in store.workflows():
        if row.name == name and _lives(store, row):
            raise KvlabError(
                f"{described(row)}: follow it with `kvlab status {row.id}`, "
                f"or end it with `kvlab cancel {row.id}`"
            )


def running_here(store: Store) -> list[WorkflowRow]:
    """The workflows that live processes of this machine run."""
    return [row for row in store.workflows() if row.owner is not None and _alive(row.owner)]


def described(row: WorkflowRow) -> str:
    """Say that a workflow is running, and where."""
    return f"workflow {row.id} '{row.name}' is running ({who(row.owner or 'unknown')})"


def _lives(store: Store, row: WorkflowRow) -> bool:
    """Whether somebody holds the workflow. Whom nobody here can see has to renew its lease."""
    alive = None if row.owner is None else _alive(row.owner)
    before = row
    while row.owner is not None and row.expires_at is not None and alive is None:
        if row.token != before.token or row.expires_at != before.expires_at:
            return True
        left = row.expires_at - store.clock()
        if left <= 0:
            return False
        time.sleep(min(1.0, max(0.05, left)))
        row = store.status(row.id).row
    return bool(alive)


class Heartbeat:
    """Renews a lease until closed, and hears what others request of its holder.

    A store that cannot be reached is asked again, however long: how much of that a controller bears
    is for its ledger to say, and nobody may go on under a lease that another one took anyway.
    """

    def __init__(self, store: Store, lease: Lease, inbox: Inbox) -> None:
        self._store = store
        self._lease = lease
        self._inbox = inbox
        self._closed = threading.Event()
        self._heard: str | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                request = self._store.renew(self._lease, TTL_SECONDS, self._store.clock())
            except LeaseLost as error:
                self._inbox.put(LeaseOver(error))
                return
            except StoreError:
                continue
            except Exception as error:  # a bug: without a heartbeat nothing may go on
                self._inbox.put(LeaseOver(error))
                return
            if request is not None and request != self._heard:
                self._heard = request
                self._inbox.put(Asked(request))


def _alive(name: str) -> bool | None:
    """Whether the owner's process lives; None when it cannot be seen from here."""
    place, _, rest = name.rpartition(":")[0].rpartition(":")
    try:
        pid = int(rest)
    except ValueError:
        return None
    if place != _place():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return name.rpartition(":")[2] == _started(pid)


def _place() -> str:
    """Where this process's pid means something: a host's boot and the pid namespace.

    Containers may have one hostname and pids that are other containers' too.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}/{boot}-{namespace}"


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks, so that a pid used again is told apart."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "0"
    fields = text.rpartition(")")[2].split()
    # A zombie holds its pid but runs nothing.
    return "gone" if fields[0] == "Z" else fields[19]
