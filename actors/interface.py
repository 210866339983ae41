"""What rayk asks of a cluster of processes: actors, their placement, and calls to them. No Ray here.

`rayk.actors.runtime` has it on Ray; unit tests use a fake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rayk.actors.secret import Secret
from rayk.metrics.reading import Exporter, Labels

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


class SocketAddress(NamedTuple):
    """Where an actor listens: `path` on the machine `machine`, `port` at `host` for others (0: not for them). Whoever
    has it may connect: it travels by Ray only, and is not to be logged."""

    machine: str
    path: str
    host: str
    port: int
    key: bytes

    def __repr__(self) -> str:
        return f"SocketAddress(path={self.path!r}, host={self.host!r}, port={self.port})"


class Actor(Protocol):
    """A started actor; can be sent to other actors. `socket`: where it takes messages, too, if that is known."""

    socket: SocketAddress | None

    @property
    def name(self) -> str | None:
        """Of a detached one."""
        ...

    def call(self, method: str, *args: Any, returns: int = 1, control: bool = False, lane: str = "") -> Any:
        """Start a method, in a lane of that name or in the data lane; a reference to its result, or a list of `returns`
        references."""
        ...


class Runtime(Protocol):
    """What rayk needs of a cluster. `sockets`: whether messages go by sockets where they can; `secret`: of the named
    cluster that this driver starts or attaches to."""

    sockets: bool
    secret: Secret | None

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
    def get(self, ref: Any, target: str, timeout: float) -> Any: ...
    def get_all(self, refs: Sequence[Any], timeout: float) -> list[Any] | None: ...
    def future(self, ref: Any) -> Future[Any]: ...
    def find(self, name: str) -> Actor | None: ...
    def actor_names(self) -> list[str]: ...
    def groups(self, name: str) -> list[Placement]: ...
    def group_key(self, placement: Placement) -> str: ...
    def stop(self, actors: Sequence[Actor], placement: Placement | None) -> None: ...
    def restart(self, actor: Actor) -> None: ...
    def dumps(self, value: Any) -> bytes: ...
    def keep(self, key: str, value: Any) -> None: ...
    def kept(self, key: str) -> Any: ...
    def forget(self, prefix: str) -> None: ...
    def home(self, detached: bool) -> str | None: ...
    def exporter(self) -> tuple[Exporter, Labels] | None: ...
    def disconnect(self) -> None: ...
    def address(self) -> str: ...
    def joins_at(self) -> str: ...


@dataclass(frozen=True)
class ActorSpec:
    """How to start an actor of a plain class. With a `name` it is detached: it outlives its driver; its `title`
    (of nobody else in the cluster, but for a number that follows) is for those who look where it is not."""

    cls: type
    args: tuple[Any, ...]
    gpus: int = 0
    bundle: Bundle | None = None
    name: str | None = None
    lanes: tuple[str, ...] = ()  # more lanes, each with `lane_threads` of its own, for calls that last
    lane_threads: int = 1
    threads: int = 1  # so many calls at once in the data lane
    restarts: bool = False  # when its process dies, its constructor is called in another one
    title: str = ""
    home: str | None = None  # the node that it starts on, if that is there
