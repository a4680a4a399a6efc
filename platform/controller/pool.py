"""The Ray side of the slots: making, calling and killing worker actors. Never waits for one."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from kvlab.platform.controller.inbox import Inbox, Lost, TakenBack, Told, Up
from kvlab.platform.controller.slots import Room, Slot, Slots, node_room
from kvlab.platform.home import Home
from kvlab.platform.worker.actor import GROUPS, Worker
from kvlab.platform.worker.message import Assignment, Hello, Key, Recalled, Report, fields_of

NAMESPACE = "kvlab"
GATHER_SECONDS = 0.005
"""How long a message waits for others where workers have more to do: one commit serves them all."""

LEAVE_SECONDS = 10.0
ORPHAN_SECONDS = 600.0
"""How long a worker of a cluster waits for a controller to come back, once its job has ended."""


@dataclass(slots=True)
class _Crew:
    """The actors of a slot, rank 0 first."""

    name: str
    actors: list[Any] = field(default_factory=list)
    group: Any = None
    rendezvous: str | None = None
    polling: int = 0


class Pool:
    """Worker actors by slot. Whatever they answer arrives in the inbox. Ray must be up.

    One controller at a time uses a pool; the next finds its idle workers warm.

    Args:
        detached: workers outlive their controller (a cluster); otherwise they die with it.
        label: in the names of the workers, so that a later controller finds those it has to.

    Attributes:
        slots: the books of which workers there are and what they do.
    """

    def __init__(self, home: Home, *, detached: bool = False, label: str = "") -> None:
        self.label = label
        self.inbox = Inbox()
        # An attempt that waits behind another is no adopter's to find: a cluster has none.
        self.slots = Slots(self.nodes(), depth=1) if detached else Slots(self.nodes())
        self._home = home
        self._detached = detached
        self._crews: dict[int, _Crew] = {}
        self._found: dict[str, _Crew] = {}
        self._calls: dict[Any, tuple[int, Callable[[Any], None]]] = {}
        self._class: Any = ray.remote(concurrency_groups=GROUPS)(Worker)  # type: ignore[call-overload]

    @staticmethod
    def nodes() -> dict[str, Room]:
        """What each live node has, by node id."""
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return {node["NodeID"]: node_room(node["Resources"]) for node in nodes if node["Alive"]}

    def name(self, slot: int) -> str:
        """The name under which another controller finds the slot's first worker."""
        return self._crews[slot].name

    def create(self, slot: Slot) -> None:
        """Start the slot's workers side by side; `Up` follows, or `Lost`."""
        crew = self._crews[slot.id] = _Crew(f"worker-{self.label}-{uuid.uuid4().hex[:16]}")
        if len(slot.places) > 1:
            crew.group = placement_group(
                [_bundle(room) for _, room in slot.places],
                strategy="PACK",
                name=crew.name,
                lifetime="detached" if self._detached else None,
            )
        for rank, (node, room) in enumerate(slot.places):
            options: dict[str, Any] = {
                "num_cpus": room.cpus,
                "num_gpus": room.gpus,
                "memory": slot.shape.memory,
                "name": _ranked(crew.name, rank),
                "namespace": NAMESPACE,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)
                if crew.group is None
                else PlacementGroupSchedulingStrategy(crew.group, rank),
            }
            if self._detached:
                options["lifetime"] = "detached"
            orphan = ORPHAN_SECONDS if self._detached else None
            crew.actors.append(self._class.options(**options).remote(str(self._home.root), orphan))
        self.greet(slot.id)

    def find(self, name: str, key: Key, workers: int) -> tuple[str, ...] | None:
        """The nodes of the workers to which another controller gave attempt `key`.

        None when one of them is gone or was never told of it: then none of them lives any more.
        """
        actors = []
        for rank in range(workers):
            with contextlib.suppress(ValueError):  # there is none
                actors.append(ray.get_actor(_ranked(name, rank), NAMESPACE))
        try:
            hellos: list[Hello] = ray.get([one.hello.remote() for one in actors], timeout=30.0)
        except RayError:
            hellos = []
        if len(hellos) == workers and all(hello.key == key for hello in hellos):
            group = _group(name) if workers > 1 else None
            self._found[name] = _Crew(name, actors, group)
            return tuple(hello.node for hello in hellos)
        for actor in actors:
            with contextlib.suppress(RayError):  # that it died is the answer
                ray.get(actor.leave.remote(), timeout=LEAVE_SECONDS)
            ray.kill(actor)
        return None

    def adopt(self, slot: int, name: str) -> None:
        """Take over the workers called `name`, which `find` found."""
        self._crews[slot] = self._found.pop(name)

    def sweep(self) -> None:
        """Kill what has this label and is no slot's: idle workers of a dead controller.

        The room that their gangs had reserved is given back.
        """
        kept = {
            _ranked(c.name, rank) for c in self._crews.values() for rank in range(len(c.actors))
        }
        for name in ray.util.list_named_actors():
            if name.startswith(f"worker-{self.label}-") and name not in kept:
                with contextlib.suppress(ValueError):  # it ended just now
                    ray.kill(ray.get_actor(name, NAMESPACE))
        table: dict[str, Any] = ray.util.placement_group_table()
        for row in table.values():
            name = row["name"]
            if name.startswith(f"worker-{self.label}-") and row["state"] != "REMOVED":
                group = None if name in kept else _group(name)
                if group is not None:
                    remove_placement_group(group)

    def greet(self, slot: int) -> None:
        """Ask the slot's workers whether they are up; gangs get a fresh rendezvous."""
        crew = self._crews[slot]
        hellos: dict[int, Hello] = {}

        def answered(rank: int, hello: Hello) -> None:
            hellos[rank] = hello
            if len(hellos) == len(crew.actors):
                if len(hellos) > 1:
                    crew.rendezvous = hellos[0].rendezvous
                self.inbox.put(Up(slot, tuple(hellos[one] for one in sorted(hellos))))

        for rank, actor in enumerate(crew.actors):
            self._when(slot, actor.hello.remote(), partial(answered, rank))

    def run(self, slot: int, assignments: Sequence[Assignment]) -> None:
        """Give each rank its assignment; `Told` follows when it has ended."""
        for actor, assignment in zip(self._crews[slot].actors, assignments, strict=True):
            self._when(
                slot,
                actor.run.remote(fields_of(assignment)),
                lambda fields: self.inbox.put(Told(slot, Report.from_list(fields), ran=True)),
            )

    def rendezvous(self, slot: int) -> str | None:
        return self._crews[slot].rendezvous

    def poll(self, slot: int, key: Key, acknowledged: int) -> None:
        """Acknowledge and ask for news, unless the last question is still open."""
        crew = self._crews[slot]
        if crew.polling:
            return

        def answered(report: Report) -> None:
            crew.polling -= 1
            self.inbox.put(Told(slot, report, ran=False))

        for rank, actor in enumerate(crew.actors):
            crew.polling += 1
            self._when(slot, actor.poll.remote(key, acknowledged if rank == 0 else 0), answered)

    def recall(self, slot: int, key: Key) -> None:
        """Ask an attempt back that waits for the one before it; `TakenBack` follows if it is."""

        def answered(recalled: Recalled) -> None:
            if recalled.given_back:
                self.inbox.put(TakenBack(slot, key))

        self._when(slot, self._crews[slot].actors[0].recall.remote(key), answered)

    def stop(self, slot: int, key: Key) -> None:
        """Ask the job to checkpoint and stop."""
        for actor in self._crews[slot].actors:
            actor.stop.remote(key)

    def kill(self, slot: int) -> None:
        """End the slot's processes now."""
        crew = self._crews.pop(slot, None)
        if crew is None:
            return
        for actor in crew.actors:
            ray.kill(actor)
        if crew.group is not None:
            remove_placement_group(crew.group)

    def close(self) -> None:
        """End every worker."""
        for slot in list(self._crews):
            self.kill(slot)

    def hear(self, seconds: float, gather: int) -> None:
        """Put what workers answer within `seconds` into the inbox; return at the first answer.

        Args:
            gather: how many answers are worth waiting `GATHER_SECONDS` for after the first.
        """
        open_calls = list(self._calls)
        ready, _ = ray.wait(open_calls, num_returns=1, timeout=seconds, fetch_local=False)
        if ready and len(open_calls) > 1:
            wanted = max(1, min(gather, len(open_calls)))
            ready, _ = ray.wait(
                open_calls, num_returns=wanted, timeout=GATHER_SECONDS if gather else 0.0
            )
        for reference, answer in zip(ready, _answers(ready), strict=True):
            slot, then = self._calls.pop(reference)
            if isinstance(answer, RayError):
                self.inbox.put(_lost(slot, answer))
            elif isinstance(answer, Exception):
                self.inbox.put(Lost(slot, f"worker fault: {type(answer).__name__}: {answer}"))
            else:
                then(answer)

    @property
    def expecting(self) -> bool:
        """Whether some call is open."""
        return bool(self._calls)

    def _when(self, slot: int, reference: Any, then: Callable[[Any], None]) -> None:
        self._calls[reference] = (slot, then)


def _answers(references: list[Any]) -> list[Any]:
    """The values of finished calls; where one failed, its error."""
    try:
        found: list[Any] = ray.get(references)
        return found
    except Exception:
        if len(references) > 1:
            return [answer for one in references for answer in _answers([one])]
        return [_error(references[0])]


def _error(reference: Any) -> Exception:
    try:
        ray.get(reference)
    except Exception as error:  # whatever the call raised
        return error
    raise AssertionError("the call did not fail")


def _lost(slot: int, error: RayError) -> Lost:
    text = " ".join(str(error).split())
    memory = isinstance(error, OutOfMemoryError) or "memory on the node" in text
    if isinstance(error, RayActorError) and not memory:
        text = "the worker process died" + (f": {text}" if "killed" not in text else "")
    return Lost(slot, text[:400], memory)


def _group(name: str) -> Any:
    """The placement group of that name, None when there is none."""
    try:
        return get_placement_group(name)
    except ValueError:
        return None


def _ranked(name: str, rank: int) -> str:
    return f"{name}-rank{rank}" if rank else name


def _bundle(room: Room) -> dict[str, float]:
    wanted = {"CPU": room.cpus, "GPU": room.gpus, "memory": room.memory}
    return {name: amount for name, amount in wanted.items() if amount}
