"""Who runs a ready job: an idle worker of its shape, a new one, or one that takes another's room.

Pure. A slot is a worker, or the workers of a gang; it takes room on nodes for as long as it lives,
so a warm pool is the set of idle slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvlab import KvlabError
from kvlab.platform.controller.schedule import Schedule
from kvlab.platform.graph import Resources

IDLE_SECONDS = 60.0

DEPTH = 16
"""Jobs that a worker is given at once where its last one was quick: none waits for a message."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a node has, or what of it is taken."""

    cpus: float
    gpus: float = 0.0
    memory: float = 0.0

    def __add__(self, other: Room) -> Room:
        return Room(self.cpus + other.cpus, self.gpus + other.gpus, self.memory + other.memory)

    def __sub__(self, other: Room) -> Room:
        return Room(self.cpus - other.cpus, self.gpus - other.gpus, self.memory - other.memory)

    def holds(self, other: Room) -> bool:
        return self.cpus >= other.cpus and self.gpus >= other.gpus and self.memory >= other.memory


class SlotState(StrEnum):
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass(slots=True)
class Slot:
    """Workers of one shape.

    Attributes:
        places: node and room of each rank. jobs: how many it has been given and not ended.
        idle_since: when its last job ended.
    """

    id: int
    shape: Resources
    places: tuple[tuple[str, Room], ...]
    state: SlotState = SlotState.STARTING
    jobs: int = 0
    idle_since: float = 0.0

    @property
    def threads(self) -> int:
        """Torch threads of a worker: all of the node's where the job has it to itself."""
        return max(1, int(self.places[0][1].cpus))


@dataclass(slots=True)
class Decision:
    """What to do: run (job, slot); create these slots; kill those, their room is given away."""

    run: list[tuple[int, int]] = field(default_factory=list)
    create: list[Slot] = field(default_factory=list)
    kill: list[int] = field(default_factory=list)


class Slots:
    """The pool's books. Killing and creating is for the caller to do.

    Args:
        nodes: node -> what it has. depth: see `DEPTH`; 1 gives every worker one job at a time.
    """

    def __init__(self, nodes: Mapping[str, Room], depth: int = DEPTH) -> None:
        self._depth = depth
        self._total = dict(nodes)
        self._free = dict(nodes)
        self._slots: dict[int, Slot] = {}
        self._idle: dict[Resources, list[int]] = defaultdict(list)
        self._quick: dict[Resources, set[int]] = defaultdict(set)
        self._starting: defaultdict[Resources, int] = defaultdict(int)
        self._next = 1
        self.ahead = 0  # jobs given to workers that still have one

    def __getitem__(self, slot: int) -> Slot:
        return self._slots[slot]

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def could_fit(self, shape: Resources) -> bool:
        """Whether all nodes, empty, hold the shape."""
        return self._place(shape, dict(self._total)) is not None

    def lacking(self, shape: Resources) -> str:
        """Which key of `resources` no node can give even one worker, ".cpus"; "" for their sum."""
        wanted = Room(shape.cpus, shape.gpus, shape.memory or 0.0)
        for key in ("cpus", "gpus", "memory"):
            if all(getattr(wanted, key) > getattr(room, key) for room in self._total.values()):
                return f".{key}"
        return ".workers" if shape.workers > 1 else ""

    def describe(self) -> str:
        """Say what the nodes have."""
        rooms = sorted(self._total.values(), key=lambda room: (room.gpus, room.cpus))
        if not rooms:
            return "no node"
        each = f"{rooms[-1].cpus:g} CPUs, {rooms[-1].gpus:g} GPUs"
        return f"a node of {each}" if len(rooms) == 1 else f"{len(rooms)} nodes, at best of {each}"

    def set_nodes(self, nodes: Mapping[str, Room]) -> None:
        """Nodes came or went. Workers on one that went are reported lost by themselves."""
        nothing = Room(0)
        for node in {*self._total, *nodes}:
            change = nodes.get(node, nothing) - self._total.get(node, nothing)
            self._total[node] = self._total.get(node, nothing) + change
            self._free[node] = self._free.get(node, nothing) + change

    def decide(self, schedule: Schedule) -> Decision:
        """Match ready jobs with slots. A job that does not fit yet never holds up one that does."""
        decision = Decision()
        shapes = schedule.shapes()
        for shape in shapes:
            idle = self._idle[shape]
            while idle and schedule.ready(shape):
                slot = idle.pop()
                self._slots[slot].state = SlotState.BUSY
                self._give(slot, schedule, decision)
        for shape in shapes:
            while schedule.ready(shape) > self._starting[shape]:
                places = self._place(shape, dict(self._free))
                if places is None:
                    victims = self._victims(shape)
                    if victims is None:
                        break
                    for slot in victims:
                        self.remove(slot)
                    decision.kill += victims
                    continue
                decision.create.append(self._add(shape, places))
        for shape in shapes:
            for depth in range(1, self._depth):
                for slot in self._quick[shape]:
                    if schedule.ready(shape) and self._slots[slot].jobs == depth:
                        self._give(slot, schedule, decision)
        return decision

    def has_idle(self, shape: Resources) -> bool:
        """Whether a worker of the shape waits for a job."""
        return bool(self._idle[shape])

    def add_busy(self, shape: Resources, nodes: tuple[str, ...]) -> Slot:
        """Enter a worker that was found running, whatever else its node holds."""
        slot = self._add(shape, tuple((node, self._room(shape, node)) for node in nodes))
        self._starting[shape] -= 1
        slot.state = SlotState.BUSY
        slot.jobs = 1
        return slot

    def idle(self, slot: int, now: float, *, quick: bool = False) -> None:
        """The slot is up, or a job of it ended: it can take another one.

        Args:
            quick: the job took so little that the next may be given before it is asked for.
        """
        one = self._slots[slot]
        if one.state is SlotState.STARTING:
            self._starting[one.shape] -= 1
        self.ahead -= one.jobs > 1
        one.jobs = max(0, one.jobs - 1)
        one.idle_since = now
        if quick and one.shape.workers == 1 and not one.shape.exclusive:
            self._quick[one.shape].add(slot)
        else:
            self._quick[one.shape].discard(slot)
        if one.jobs == 0:
            one.state = SlotState.IDLE
            self._idle[one.shape].append(slot)

    def starting(self, slot: int) -> None:
        """The slot's job ended, but it has to say hello again before the next."""
        one = self._slots[slot]
        one.state = SlotState.STARTING
        one.jobs = 0
        self._starting[one.shape] += 1

    def remove(self, slot: int) -> None:
        """The slot is dead or about to be: its room is free."""
        one = self._slots.pop(slot)
        self._quick[one.shape].discard(slot)
        self.ahead -= max(0, one.jobs - 1)
        if one.state is SlotState.STARTING:
            self._starting[one.shape] -= 1
        elif one.state is SlotState.IDLE:
            self._idle[one.shape].remove(slot)
        for node, room in one.places:
            self._free[node] += room

    def expire(self, now: float) -> list[int]:
        """Remove and return the slots that were idle for too long."""
        old = [
            slot
            for idle in self._idle.values()
            for slot in idle
            if now - self._slots[slot].idle_since >= IDLE_SECONDS
        ]
        for slot in old:
            self.remove(slot)
        return old

    def _give(self, slot: int, schedule: Schedule, decision: Decision) -> None:
        one = self._slots[slot]
        one.jobs += 1
        self.ahead += one.jobs > 1
        decision.run.append((schedule.take(one.shape), slot))

    def _add(self, shape: Resources, places: tuple[tuple[str, Room], ...]) -> Slot:
        slot = self._slots[self._next] = Slot(self._next, shape, places)
        self._next += 1
        self._starting[shape] += 1
        for node, room in places:
            self._free[node] -= room
        return slot

    def _room(self, shape: Resources, node: str) -> Room:
        if shape.exclusive:
            return self._total[node]
        return Room(shape.cpus, shape.gpus, shape.memory or 0)

    def _place(
        self, shape: Resources, free: dict[str, Room]
    ) -> tuple[tuple[str, Room], ...] | None:
        """Find a node for every worker of the shape, the fullest that still holds it first."""
        wanted = Room(shape.cpus, shape.gpus, shape.memory or 0)
        places = []
        for _ in range(shape.workers):
            nodes = [
                node
                for node, room in free.items()
                if self._total[node].holds(wanted) and room.holds(self._room(shape, node))
            ]
            if not nodes:
                return None
            node = min(nodes, key=lambda one: (free[one].gpus, free[one].cpus))
            room = self._room(shape, node)
            free[node] -= room
            places.append((node, room))
        return tuple(places)

    def _victims(self, shape: Resources) -> list[int] | None:
        """The idle slots to kill so that the shape fits, longest idle first; None: never."""
        free = dict(self._free)
        idle = sorted(
            (slot for slots in self._idle.values() for slot in slots),
            key=lambda slot: self._slots[slot].idle_since,
        )
        victims: list[int] = []
        for slot in idle:
            victims.append(slot)
            for node, room in self._slots[slot].places:
                free[node] += room
            if self._place(shape, dict(free)) is not None:
                return victims
        return None


def check_fit(wanted: Iterable[tuple[str, Resources]], slots: Slots) -> None:
    """Raise a KvlabError for the first job (name, shape) that all nodes, empty, do not hold."""
    known: set[Resources] = set()
    for name, shape in wanted:
        if shape not in known and not slots.could_fit(shape):
            # A cell's name begins with that of its job, which holds no bracket.
            where = f"jobs.{name.partition('[')[0]}.resources{slots.lacking(shape)}"
            raise KvlabError(
                f"{where}: job '{name}' asks for {_asked(shape)}, and there is "
                f"{slots.describe()}: lower it, or take a larger machine or cluster"
            )
        known.add(shape)


def _asked(shape: Resources) -> str:
    each = f"{shape.cpus} CPUs"
    if shape.gpus:
        each += f", {shape.gpus} GPUs"
    if shape.memory:
        each += f", {shape.memory / 2**30:.1f} GiB of memory"
    return f"{shape.workers} workers of {each} each" if shape.workers > 1 else each


def node_room(resources: Mapping[str, float]) -> Room:
    """Read a node's room from what Ray says of it."""
    return Room(
        float(int(resources.get("CPU", 0))),
        float(int(resources.get("GPU", 0))),
        resources.get("memory", 0.0),
    )
