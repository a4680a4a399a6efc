"""What can go wrong with the store, as a person is told it."""

from __future__ import annotations

from kvlab import KvlabError


def who(owner: str) -> str:
    """Say whose lease it is: "host H, pid P" of an owner "H/place:P:start"; any other as it is."""
    place, _, pid = owner.rpartition(":")[0].rpartition(":")
    return f"host {place.partition('/')[0]}, pid {pid}" if pid.isdigit() else owner


class StoreError(KvlabError):
    """The store cannot be used: wrong address, unreachable, damaged, full, locked."""


class NoStore(StoreError):
    """There is no store at this address yet; readers may take it for an empty one."""


class WrongVersion(StoreError):
    """The store's tables are older or newer than this kvlab."""


class NotFound(StoreError):
    """No workflow or job of that number or name."""


class Held(StoreError):
    """Another controller holds the workflow's lease.

    Attributes:
        owner: who. until: when its lease ends unless renewed (epoch seconds).
    """

    def __init__(self, workflow_id: int, owner: str, until: float, now: float) -> None:
        super().__init__(
            f"workflow {workflow_id} is being run by {who(owner)}, whose lease ends in "
            f"{max(0.0, until - now):.0f} s unless it is renewed: stop that controller, or wait"
        )
        self.owner = owner
        self.until = until


class LeaseLost(StoreError):
    """The workflow's lease was released or taken over since: nothing was written."""

    def __init__(self, workflow_id: int, token: int) -> None:
        super().__init__(
            f"workflow {workflow_id}: this controller's lease (token {token}) is over and another "
            "may be running the workflow: see `kvlab status`"
        )


class IllegalMove(RuntimeError):
    """A change of state that db/states.py does not allow: a bug of the caller, not of a person."""
