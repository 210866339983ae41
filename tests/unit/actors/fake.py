"""A cluster in this process: nodes with a given memory, and actors that are plain objects here.

FakeRuntime keeps what the stack relies on of Ray: one actor's calls run in the order they were sent, page data
arrives as read-only copies, a dead actor's calls end in ActorGoneError, and a constructor that fails is heard of
at the first call. With `lazy` a call runs only when an answer of its actor is read, so that several are in
flight at once, as on a cluster. Everything is written down in `events`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from ray import cloudpickle

from rayk import InferenceSession, MHAKVCacheParams, PagedKVCacheManager
from rayk import protocol as m
from rayk.actors.chunks import joined
from rayk.actors.engine import EngineActor
from rayk.actors.interface import ActorGoneError, ActorSpec, NameTakenError, Node, Placement
from rayk.actors.replica import ReplicaActor
from rayk.actors.runtime import RayRuntime
from rayk.actors.scheduler import SchedulerActor
from rayk.actors.secret import Secret
from rayk.errors import CallTimeoutError, PlanError
from rayk.kvcache.replica import ReplicaCore
from rayk.planning.node_plan import NodeMemory

GIB = 1 << 30
Event = tuple[Any, ...]


@dataclass(eq=False)
class FakeRef:
    """One value, there once its actor has come to it."""

    actor: FakeActor | None
    value: Any = None
    error: BaseException | None = None
    ready: bool = False
    control: bool = False

    @property
    def late(self) -> bool:
        """Whether nobody comes to it now."""
        return not self.ready and self.actor is not None and self.actor.held(self.control)


@dataclass(eq=False)
class FakeActor:
    """A started actor. `label` is replica-0, replica-1, .. or scheduler. It answers no call while it is `hung`, and
    only control calls while it is `busy`."""

    runtime: FakeRuntime
    label: str
    name: str | None
    arguments: tuple[Any, ...] = ()
    instance: Any = None
    dead: str | None = None  # why
    stopped: bool = False
    hung: bool = False
    busy: bool = False
    socket: None = None
    queue: deque[Callable[[], None]] = field(default_factory=deque)

    def call(self, method: str, *args: Any, returns: int = 1, control: bool = False, lane: str = "") -> Any:
        what = content(method, args)
        self.runtime.note("send", self.label, what)
        refs = [FakeRef(self, control=control) for _ in range(returns)]

        def run() -> None:
            try:
                error = self.runtime.note("run", self.label, what)
                if error is not None:
                    self.dead = str(error)
                if self.dead is not None:
                    raise ActorGoneError(self.dead)
                value = getattr(self.instance, method)(*(_resolve(a) for a in args))
                for ref, part in zip(refs, value if returns > 1 else [value], strict=True):
                    ref.value = _shipped(part)
            except Exception as error:
                for ref in refs:
                    ref.error = error
            for ref in refs:
                ref.ready = True

        if self.held(control) or (self.runtime.lazy and not control):
            self.queue.append(run)
        else:
            run()
        return refs[0] if returns == 1 else refs

    def held(self, control: bool) -> bool:
        """Whether a call waits, whoever waits for it."""
        return self.dead is None and (self.hung or (self.busy and not control))

    def go_on(self) -> None:
        """It is neither hung nor busy any more, and comes to what waits."""
        self.hung = self.busy = False
        while self.queue and not self.runtime.lazy:
            self.queue.popleft()()

    def work_until(self, ref: FakeRef) -> None:
        """Run this actor's calls in order until `ref` has its value."""
        while not ref.ready:
            self.queue.popleft()()

    @property
    def service(self) -> Any:
        """The ReplicaService of a replica."""
        return self.instance._service

    @property
    def core(self) -> ReplicaCore:
        """The cache of a replica."""
        core: ReplicaCore = self.service.core
        return core


def content(method: str, args: tuple[Any, ...]) -> str:
    """The name of the command in an envelope, else of the method."""
    if method not in ("handle", "handle_with_data"):
        return method
    try:
        return type(m.decode_envelope(joined(args[0], args[1:])[0]).command).__name__
    except Exception:
        return "malformed"


def _resolve(argument: Any) -> Any:
    if not isinstance(argument, FakeRef):
        return argument
    if argument.actor is not None:
        argument.actor.work_until(argument)
    if argument.error is not None:
        raise argument.error
    return argument.value


def _shipped(value: Any) -> Any:
    """Arrays arrive as read-only copies; what an actor keeps is not what the other side sees."""
    if isinstance(value, list) and value and all(isinstance(part, np.ndarray) for part in value):
        copies = [part.copy() for part in value]
        for copy in copies:
            copy.flags.writeable = False
        return copies
    return value


class FakeRuntime:
    """`free` gives each node's memory in bytes. `fail(event)` may return an error for that event."""

    sockets = False
    secret: Secret | None = None
    restarts = False  # whether restart() succeeds

    def __init__(
        self,
        free: dict[str, int] | None = None,
        *,
        lazy: bool = False,
        fail: Callable[[Event], BaseException | None] | None = None,
    ) -> None:
        self.free = free or {"node-a": 4 * GIB, "node-b": 4 * GIB}
        self.lazy = lazy
        self.fail = fail
        self.events: list[Event] = []
        self.actors: list[FakeActor] = []
        self.placements: list[Placement] = []
        self.store: dict[str, Any] = {}
        self.disconnected = 0
        self.time = 1000.0  # of whoever was given it for a clock
        self.due: list[tuple[float, Callable[[], None]]] = []  # what happens when
        self.ticking = False

    def note(self, *event: Any) -> BaseException | None:
        self.events.append(event)
        return self.fail(event) if self.fail is not None else None

    def _note_or_raise(self, *event: Any) -> None:
        error = self.note(*event)
        if error is not None:
            raise error

    # -- what Runtime asks for -------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        self._note_or_raise("nodes")
        return [Node(node_id, f"host-of-{node_id}", {"CPU": 2.0}) for node_id in sorted(self.free)]

    def keep(self, key: str, value: Any) -> None:
        if value is None:
            self.store.pop(key, None)
        else:
            self.store[key] = value

    def kept(self, key: str) -> Any:
        return self.store.get(key)

    def forget(self, prefix: str) -> None:
        for key in [key for key in self.store if key.startswith(prefix)]:
            del self.store[key]

    def group_key(self, placement: Placement) -> str:
        return str(id(placement.group))

    def home(self, detached: bool) -> str | None:
        return sorted(self.free)[0] if self.free else None

    def actor_names(self) -> list[str]:
        return sorted(actor.name for actor in self.actors if actor.name is not None and actor.dead is None)

    def groups(self, name: str) -> list[Placement]:
        return list(self.placements)

    def draining_nodes(self) -> dict[str, float]:
        return {}

    def run_on(self, node_id: str, task: Callable[..., Any], *args: Any) -> FakeRef:
        error = self.note("measure", node_id)
        if error is not None:
            return FakeRef(None, error=error, ready=True)
        value = task(*args)
        if isinstance(value, NodeMemory):
            value = msgspec.structs.replace(value, host_free=self.free[node_id], gpus=())
        return FakeRef(None, value=value, ready=True)

    def place(
        self, bundles: list[dict[str, float]], avoid: Sequence[str], timeout: float, name: str | None = None
    ) -> Placement:
        self._note_or_raise("place", tuple(tuple(b.items()) for b in bundles), tuple(avoid))
        usable = [node_id for node_id in sorted(self.free) if node_id not in avoid]
        if not usable:
            raise PlanError("no node is left")
        placement = Placement(object(), tuple(usable[i % len(usable)] for i in range(len(bundles))))
        self.placements.append(placement)
        return placement

    def place_each(
        self, bundles: list[dict[str, float]], avoid: Sequence[str], timeout: float, name: str | None = None
    ) -> list[Placement]:
        groups: list[Placement] = []
        try:
            for bundle in bundles:
                groups.append(self.place([bundle], avoid, timeout))
        except BaseException:
            for group in groups:
                self.placements.remove(group)
            raise
        return groups

    def await_place(self, placement: Placement, timeout: float) -> Placement:
        self._note_or_raise("await_place")
        return placement

    def start(self, spec: ActorSpec) -> FakeActor:
        replica = {ReplicaActor: 1, EngineActor: 0}.get(spec.cls)  # where its arguments have the index
        label = f"replica-{spec.args[replica]}" if replica is not None else "scheduler"
        self._note_or_raise("start", label)
        if spec.name is not None and self.find(spec.name) is not None:
            raise NameTakenError(spec.name)
        actor = FakeActor(self, label, spec.name, spec.args)
        self.actors.append(actor)
        try:
            self._note_or_raise("construct", label)
            actor.instance = spec.cls(*spec.args) if replica is not None else SchedulerActor(*spec.args, runtime=self)
        except Exception as error:
            actor.dead = f"{type(error).__name__}: {error}"
        return actor

    def get(self, ref: FakeRef, target: str, timeout: float) -> Any:
        self.note("read", ref.actor.label if ref.actor is not None else target)
        if ref.late:
            self.pass_(timeout)
        if ref.late:
            raise CallTimeoutError(target, timeout)
        return _resolve(ref)

    def joins_at(self) -> str:
        return "127.0.0.1:0"

    def address(self) -> str:
        return "127.0.0.1"

    def pass_(self, seconds: float) -> None:
        """Time goes by, and the scheduler does what is due."""
        until, scheduler = self.time + seconds, next((a for a in self.actors if a.label == "scheduler"), None)
        while self.time < until:
            self.time = min(until, self.time + 0.25)
            for what in [each for each in self.due if each[0] <= self.time]:
                self.due.remove(what)
                what[1]()
            if scheduler is not None and scheduler.instance is not None and not scheduler.hung and not self.ticking:
                self.ticking = True
                try:
                    scheduler.instance.tick()
                finally:
                    self.ticking = False

    def get_all(self, refs: Sequence[FakeRef], timeout: float) -> list[Any] | None:
        return None  # get() is asked for each, so that it is seen which was read

    def future(self, ref: FakeRef) -> Future[Any]:
        future: Future[Any] = Future()
        if ref.late:
            return future
        with suppress(Exception):
            _resolve(ref)
        future.set_result(None)
        return future

    def find(self, name: str) -> FakeActor | None:
        return next((a for a in self.actors if a.name == name and not a.stopped and a.dead is None), None)

    def stop(self, actors: Sequence[Any], placement: Placement | None) -> None:
        self.note("stop", tuple(a.label for a in actors), placement is not None)
        for actor in actors:
            actor.stopped, actor.dead = True, "it was stopped"
        if placement is not None and placement in self.placements:
            self.placements.remove(placement)

    def restart(self, actor: Any) -> None:
        self.note("restart", actor.label)
        if self.restarts:
            waiting, actor.queue = actor.queue, deque()
            actor.dead, actor.hung = "it is away", False
            for run in waiting:
                run()
            actor.dead, actor.instance = None, SchedulerActor(*actor.arguments, runtime=self)

    def dumps(self, value: Any) -> bytes:
        return bytes(cloudpickle.dumps(value))

    def disconnect(self) -> None:
        self.disconnected += 1

    # -- for tests ----------------------------------------------------------------------------------

    def actor(self, label: str) -> FakeActor:
        """The last actor started with that label."""
        return [a for a in self.actors if a.label == label][-1]

    def kill(self, label: str) -> None:
        """The actor's process dies."""
        self.actor(label).dead = "its process died"

    def restart_scheduler(self) -> None:
        """Its process dies, and another one goes on with what was kept."""
        [scheduler] = [a for a in self.actors if a.label == "scheduler" and a.dead is None]
        scheduler.instance = SchedulerActor(*scheduler.arguments, runtime=self)

    @property
    def running(self) -> list[str]:
        """Actors that nobody stopped; what is left behind once a manager was shut down or failed to start."""
        return [a.label for a in self.actors if not a.stopped]

    def sent(self, since: int = 0) -> list[tuple[str, str]]:
        """(receiver, command) of all messages from event number `since` on."""
        return [(e[1], e[2]) for e in self.events[since:] if e[0] == "send"]

    @contextmanager
    def watch(self) -> Iterator[list[tuple[str, str]]]:
        """A list that holds, after the `with` block, the messages sent in it."""
        since, seen = len(self.events), list[tuple[str, str]]()
        yield seen
        seen += self.sent(since)


@contextmanager
def session_on(runtime: FakeRuntime, name: str | None = None, secret: str | None = None) -> Iterator[InferenceSession]:
    """A Ray session whose cluster is `runtime`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayRuntime, "connect", classmethod(lambda cls, address, namespace, sockets, **options: runtime))
        session = InferenceSession(runtime="ray", name=name, secret=secret)
    try:
        yield session
    finally:
        session.close()


def params(replicas: int = 2, **changes: Any) -> MHAKVCacheParams:
    """Small float32 pages on the CPU, prefix caching on."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "head_dim": 2,
        "num_layers": 1,
        "n_kv_heads": 1,
        "page_size": 4,
        "enable_prefix_caching": True,
        "data_parallel_degree": replicas,
        "devices": ["cpu"] * replicas,
    }
    return MHAKVCacheParams(**settings | changes)


@contextmanager
def manager_on(
    runtime: FakeRuntime, replicas: int = 2, pages: int | None = 16, name: str | None = None,
    secret: str | None = None, **changes: Any,
) -> Iterator[PagedKVCacheManager]:  # fmt: skip
    """A manager whose actors live in `runtime`, with runtime checks on."""
    names = ("router", "max_batch_size", "total_num_host_pages", "admission", "replace")
    options = {"router": "least-loaded"} | {k: changes.pop(k) for k in names if k in changes}
    with session_on(runtime, name, secret) as session:
        manager = PagedKVCacheManager(
            params(replicas, **changes), session, pages, enable_runtime_checks=True, **{"max_batch_size": 8} | options
        )
        try:
            yield manager
        finally:
            manager.shutdown()


# -- a model that shows whether a page is right --------------------------------------------------------


def chain(tokens: Sequence[int]) -> list[float]:
    """What stamp() writes for each position: it depends on every token up to there, exactly in float32."""
    values, value = [], 1
    for token in tokens:
        value = (31 * value + token + 7) % 1_000_003
        values.append(float(value))
    return values


def stamp(inputs: Any, batch: Sequence[Any]) -> int:
    """A forward that fills the active window of each request; how many tokens."""
    [shard] = inputs.shards
    written, size = 0, shard.kv_blocks.shape[3]
    for row, ctx in enumerate(batch):
        start = ctx.tokens.processed_length
        for at, value in enumerate(chain(ctx.tokens.all.tolist())[start : start + ctx.tokens.active_length], start):
            shard.kv_blocks[int(shard.lookup_table[row, at // size]), :, :, at % size] = value
        written += ctx.tokens.active_length
    return written


def contents(manager: PagedKVCacheManager, request_id: str, replica: int, tokens: int) -> list[float]:
    """The value at each of the first `tokens` positions of a request, read back from its pages."""
    [pages] = manager.read_pages(manager.get_req_blocks(request_id, replica), replica)
    rows: list[float] = pages[:, 0, 0, :, 0, 0].flatten()[:tokens].tolist()
    return rows
