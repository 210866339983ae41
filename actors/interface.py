"""What rayk asks of a cluster of processes: actors, their placement, and calls to them. No Ray here.

`rayk.actors.runtime` has it on Ray; unit tests use a fake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

CONTROL_GROUP = "ctl"  # answers while the data lane is busy


class NameTakenError(Exception):
    """A detached actor of that name exists."""


class ActorGoneError(Exception):
    """The actor's process died or is unreachable; the argument says what Ray knows."""


class ActorAwayError(ActorGoneError):
    """.. and is started again: it may have carried the call out, and answers later ones."""


class Node(NamedTuple):
    """A live node of the cluster."""

    node_id: str
    host_name: str
    resources: dict[str, float]


@dataclass(frozen=True)
class Placement:
    """A ready placement group: bundle i is on node_ids[i]."""

    group: Any
    node_ids: tuple[str, ...]


class Bundle(NamedTuple):
    """The place of one actor: bundle `number` of a placement group."""

    placement: Placement
    number: int = 0

    @property
    def node_id(self) -> str:
        """Where it is."""
        return self.placement.node_ids[self.number]


class Actor(Protocol):
    """A started actor; can be sent to other actors."""

    def call(self, method: str, *args: Any, returns: int = 1, control: bool = False) -> Any:
        """Start a method; a reference to its result, or a list of `returns` references."""
        ...

    def stream(self, method: str, lane: str, target: str, silence: float, *args: Any) -> Iterator[Any]:
        """What a generator of the actor yields. ActorGoneError when the actor is gone, CallTimeoutError when nothing
        came for `silence` seconds."""
        ...


class Lane(Protocol):
    """A faster way into an actor's handle_by_lane() than a call, for one message at a time; nobody else can use it."""

    @property
    def open(self) -> bool:
        """Whether it carries messages now."""
        ...

    @property
    def rested(self) -> bool:
        """Whether it was taken down because nothing was said: another one may be opened."""
        ...

    def send(self, wire: bytes) -> Any:
        """Send a message; what get() takes, or None while it is not open: then nothing was sent. LaneError when it did
        not open, or when the message may have arrived or not."""
        ...

    def get(self, ref: Any, timeout: float) -> bytes:
        """The answer, which can be had once. LaneError when it did not come."""
        ...

    def close(self) -> None:
        """Have it taken down, and do not wait for that."""
        ...


class Runtime(Protocol):
    """What rayk needs of a cluster."""

    def nodes(self) -> list[Node]: ...
    def draining_nodes(self) -> dict[str, float]: ...
    def run_on(self, node_id: str, task: Callable[..., Any], *args: Any) -> Any: ...
    def place(
        self, bundles: list[dict[str, float]], avoid: Sequence[str], timeout: float, name: str | None = None
    ) -> Placement: ...
    def place_each(
        self, bundles: list[dict[str, float]], avoid: Sequence[str], timeout: float, name: str | None = None
    ) -> list[Placement]: ...
    def await_place(self, placement: Placement, timeout: float) -> Placement: ...
    def start(self, spec: ActorSpec) -> Actor: ...
    def open_lane(self, actor: Actor, node_id: str) -> Lane: ...
    def get(self, ref: Any, target: str, timeout: float) -> Any: ...
    def get_all(self, refs: Sequence[Any], timeout: float) -> list[Any] | None: ...
    def future(self, ref: Any) -> Future[Any]: ...
    def find(self, name: str) -> Actor | None: ...
    def actor_names(self) -> list[str]: ...
    def groups(self, name: str) -> list[Placement]: ...
    def group_key(self, placement: Placement) -> str: ...
    def stop(self, actors: Sequence[Actor], placement: Placement | None) -> None: ...
    def dumps(self, value: Any) -> bytes: ...
    def keep(self, key: str, value: Any) -> None: ...
    def kept(self, key: str) -> Any: ...
    def forget(self, prefix: str) -> None: ...
    def home(self, detached: bool) -> str | None: ...
    def disconnect(self) -> None: ...


@dataclass(frozen=True)
class ActorSpec:
    """How to start an actor of a plain class. With a `name` it is detached: it outlives its driver."""

    cls: type
    args: tuple[Any, ...]
    gpus: int = 0
    bundle: Bundle | None = None
    name: str | None = None
    lanes: tuple[str, ...] = ()  # more lanes, each with `lane_threads` of its own, for calls that last
    lane_threads: int = 1
    threads: int = 1  # so many calls at once in the data lane
    restarts: bool = False  # when its process dies, its constructor is called in another one
    home: str | None = None  # the node that it starts on, if that is there


class LaneState(NamedTuple):
    """The fast lane to one replica, of which `messages` went by it.

    `state`: "off" (there is none), "unused" (it opens at the first message), "opening", "open", "resting" (it opens
    again at the next message) or "closed" (for good). `reason` says why it is off or closed.
    """

    replica: int
    state: str
    reason: str = ""
    messages: int = 0
