"""Engines on Ray: an actor for each replica with a model, its pages and an engine's thread; it only translates.

They are started in the order in which nothing fails late: placement, processes with the model, then pages by what is
free where the model was loaded. torch is imported when a replica starts, not with this module.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rayk.actors.interface import Actor, ActorGoneError, ActorSpec, Node, Placement, Runtime
from rayk.actors.replica import measure
from rayk.errors import PlanError, RaykError, ReplicaLostError
from rayk.planning.node_plan import NodeMemory, measure_node
from rayk.tiers.identity import read_seed, take_seed

if TYPE_CHECKING:
    from rayk.engine.replicas import ModelSource, ReplicaFacts, ServeSettings
    from rayk.engine.settings import EngineStats
    from rayk.engine.tiers import NodeTiers
    from rayk.protocol.engine import Command, Report

REPORTS_LANE = "reports"
LOAD_SECONDS = 1800.0  # to load a model
OPEN_SECONDS = 600.0  # to make pages and capture graphs
PLACE_SECONDS = 60.0
MEASURE_SECONDS = 60.0
STATS_SECONDS = 30.0
CLOSE_SECONDS = 60.0  # to write what is on its way to disk
SILENT_SECONDS = 60.0  # an engine reports every second; one that is silent so long hangs
SLIVER = 0.001  # of a CPU, as for cache replicas


class EngineActor:
    """post() and open() run one after the other; reports() and control calls have lanes of their own."""

    def __init__(self, replica: int, source: ModelSource, settings: ServeSettings) -> None:
        import torch

        torch.set_num_threads(settings.threads or 1)
        self._replica = replica
        self._source = source
        self._settings = settings
        self._device = "cuda:0" if settings.device.startswith("cuda") else settings.device
        self._model = source.load(self._device)
        self._host: Any = None

    def open(
        self, sharing: int, host_name: str, node: NodeMemory | None = None, tiers: NodeTiers | None = None
    ) -> ReplicaFacts:
        """Take pages, as one of `sharing` replicas on this node, and begin to serve. None: measure the node now."""
        from rayk.actors.runtime import RayRuntime
        from rayk.engine.engine_thread import EngineThread
        from rayk.engine.replicas import facts_of, open_engine

        node = node or measure_node(host_name=host_name)
        engine = open_engine(
            self._model,
            self._source,
            self._settings,
            self._replica,
            self._device,
            sharing,
            node,
            tiers,
            address=RayRuntime().address(),
        )
        self._host = EngineThread([engine]).start()
        return facts_of(engine, self._device, host_name, self._source)

    def post(self, wire: bytes) -> None:
        """Give the engine a command. One that cannot be read ends the replica with that reason: somebody waits."""
        from rayk.protocol.engine import decode_command

        try:
            command = decode_command(wire)
        except Exception as error:
            self._host.fail(0, error)
            raise
        self._host.post(0, command)

    def reports(self) -> Iterator[bytes]:
        """The engine's reports, as it makes them."""
        from rayk.protocol.engine import encode

        for report in self._host.reports(0):
            yield encode(report)

    def stats(self) -> EngineStats:
        """The engine's counters, taken between two steps."""
        stats: EngineStats = self._host.stats(0)
        return stats

    def check(self) -> None:
        """IntegrityError unless its pages are where they should be."""
        from rayk.engine.replicas import check_engine

        self._host.call(0, check_engine)

    def reset_prefix_cache(self, token: bytes) -> int:
        """See ReplicaCore."""
        held: int = self._host.call(0, lambda engine: engine.core.reset_prefix_cache(token))
        return held

    def close(self) -> None:
        """End the engine and leave the tiers in order; the last thing that is asked of it."""
        if self._host is not None:
            self._host.stop()

    def ping(self) -> int:
        """The replica's index, once its constructor is done."""
        return self._replica


class _Seat(NamedTuple):
    """Where a replica is: its actor, and its bundle of a placement, which the first replicas share."""

    actor: Actor
    placement: Placement
    bundle: int

    @property
    def node_id(self) -> str:
        return self.placement.node_ids[self.bundle]


class RayReplicas:
    """Engine actors of one driver, which end with it. Implements rayk.engine.replicas.Replicas.

    The replicas of the start have one placement group; each later one has its own, which an autoscaler sees while it
    waits. The replacement of a lost one takes its bundle, on another node if that one died.
    """

    def __init__(self, runtime: Runtime, source: ModelSource, settings: ServeSettings) -> None:
        self.tokenizer = None
        self.settings = settings
        self.facts: list[ReplicaFacts] = []
        self._runtime = runtime
        self._source = source
        self._seats: dict[int, _Seat] = {}  # of those that were not removed
        self._dropped: set[int] = set()  # of these
        self._tiers: dict[str, NodeTiers] = {}  # by node id
        self._pool = f"engines-{os.getpid()}-{os.urandom(8).hex()}"
        self._sent: dict[int, Any] = {}
        self.add(range(settings.replicas), PLACE_SECONDS)

    @property
    def _bundle(self) -> dict[str, float]:
        return {"CPU": SLIVER} | ({"GPU": 1.0} if self._gpus else {})

    @property
    def _gpus(self) -> int:
        return int(self.settings.device.startswith("cuda"))

    def add(self, replicas: Sequence[int], timeout: float) -> None:
        new = [replica for replica in replicas if replica not in self._seats]
        placements: list[Placement] = []
        seats: dict[int, _Seat] = {}
        try:
            places = {r: self._again(r, timeout) for r in replicas if r in self._seats}
            if not self._seats:
                placements = [self._runtime.place([self._bundle] * len(new), [], timeout)]
                places |= {replica: (placements[0], bundle) for bundle, replica in enumerate(new)}
            elif new:
                placements = self._runtime.place_each([self._bundle] * len(new), [], timeout)
                places |= {replica: (placement, 0) for replica, placement in zip(new, placements, strict=True)}
            if self.settings.hash_seed is None and self.settings.names_pages:
                self.settings = replace(self.settings, hash_seed=self._seed(places))
            for replica, (placement, bundle) in places.items():
                arguments = (replica, self._source, self.settings)
                spec = ActorSpec(EngineActor, arguments, self._gpus, placement, bundle, lanes=(REPORTS_LANE,))
                seats[replica] = _Seat(self._runtime.start(spec), placement, bundle)
            facts = self._open(seats)
        except BaseException:
            self._runtime.stop([seat.actor for seat in seats.values()], None)
            for placement in placements:
                self._runtime.stop([], placement)
            raise
        self._seats |= seats
        self._dropped -= set(seats)
        for each in sorted(facts, key=lambda each: each.replica):
            self.facts[each.replica : each.replica + 1] = [each]

    def _again(self, replica: int, timeout: float) -> tuple[Placement, int]:
        """The place of a lost replica, for another one."""
        seat = self._seats[replica]
        return self._runtime.await_place(seat.placement, timeout), seat.bundle

    def _open(self, seats: dict[int, _Seat]) -> list[ReplicaFacts]:
        """Wait for models, then have pages made."""
        self._wait("ping", dict.fromkeys(seats, ()), seats, LOAD_SECONDS)
        sharing, nodes = Counter(seat.node_id for seat in seats.values()), {n.node_id: n for n in self._runtime.nodes()}
        memory = self._make_tiers([nodes[node_id] for node_id in sharing if node_id in nodes])
        arguments = {}
        for replica, seat in seats.items():
            node = seat.node_id
            name = nodes[node].host_name if node in nodes else node
            arguments[replica] = (1 if self._gpus else sharing[node], name, memory.get(node), self._tiers.get(node))
        return self._wait("open", arguments, seats, OPEN_SECONDS)

    def _seed(self, places: Mapping[int, tuple[Placement, int]]) -> bytes:
        """The seed that the nodes' tier directories were used with before, else a new one."""
        folder = self.settings.tiers.disk_dir
        if folder is not None:
            nodes = sorted({placement.node_ids[bundle] for placement, bundle in places.values()})
            for seed in self._answers([self._runtime.run_on(node_id, read_seed, folder) for node_id in nodes]):
                if seed is not None:
                    return bytes(seed)
            # Others may start on the same folder: who is first decides.
            [made] = self._answers([self._runtime.run_on(nodes[0], take_seed, folder)])
            return bytes(made)
        return os.urandom(32)

    def _make_tiers(self, nodes: Sequence[Node]) -> dict[str, NodeMemory]:
        """Decide what the tiers of new nodes take; what is left there for device pages in the same memory."""
        wish, memory = self.settings.tiers, dict[str, NodeMemory]()
        if not wish.wanted:
            return memory
        new = [node for node in nodes if node.node_id not in self._tiers]
        folder = str(wish.disk_dir) if wish.disk_dir is not None else None
        refs = []
        for node in new:
            limit = node.resources.get("memory")  # what Ray was told that it may use there
            given = (node.node_id, node.host_name, int(limit) if limit else None, folder)
            refs.append(self._runtime.run_on(node.node_id, measure, *given))
        for node, found in zip(new, self._answers(refs), strict=True):
            tiers = self._tiers[node.node_id] = wish.on(found, f"{self._pool}-{node.node_id}")
            free = max(0, found.host_free - tiers.host_bytes)
            memory[node.node_id] = msgspec.structs.replace(found, host_free=free)
        return memory

    def _answers(self, refs: Sequence[Any]) -> list[Any]:
        try:
            return [self._runtime.get(ref, "a node", MEASURE_SECONDS) for ref in refs]
        except ActorGoneError as error:
            raise PlanError(f"a node could not be asked for its memory and tiers: {error}") from None

    def _wait(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], seats: Mapping[int, _Seat], timeout: float
    ) -> list[Any]:
        """Call replicas that are being started and wait for all answers."""
        refs = {replica: seats[replica].actor.call(method, *given) for replica, given in arguments.items()}
        try:
            return [self._runtime.get(ref, f"replica {replica}", timeout) for replica, ref in refs.items()]
        except ActorGoneError as error:
            raise PlanError(f"a replica could not start: {error}") from None

    def post(self, replica: int, command: Command) -> None:
        from rayk.protocol.engine import encode

        self._sent[replica] = self._seats[replica].actor.call("post", encode(command))

    def reports(self, replica: int) -> Iterator[Report]:
        """ActorGoneError or CallTimeoutError when there will be no more."""
        from rayk.protocol.engine import decode_report

        actor = self._seats[replica].actor
        for wire in actor.stream("reports", REPORTS_LANE, f"replica {replica}", SILENT_SECONDS):
            yield decode_report(wire)

    def stats(self, replica: int) -> EngineStats:
        stats: EngineStats = self._answer(replica, self._ask(replica, "stats"), STATS_SECONDS)
        return stats

    def check(self, replica: int) -> None:
        self._answer(replica, self._ask(replica, "check"), CLOSE_SECONDS)

    def reset_prefix_cache(self, replicas: Sequence[int], token: bytes) -> dict[int, int]:
        self.settings, held = replace(self.settings, reset_token=token), dict[int, int]()
        for replica, ref in [(each, self._ask(each, "reset_prefix_cache", token)) for each in replicas]:
            with suppress(ReplicaLostError):
                held[replica] = self._answer(replica, ref, CLOSE_SECONDS)
        return held

    def _ask(self, replica: int, method: str, *arguments: Any) -> Any:
        """A question to a replica that takes no part in its work; None for one that was removed."""
        seat = self._seats.get(replica)
        return seat.actor.call(method, *arguments, control=True) if seat is not None else None

    def _answer(self, replica: int, ref: Any, seconds: float) -> Any:
        """ReplicaLostError when it is gone, CallTimeoutError when it does not answer in time."""
        try:
            if ref is not None:
                return self._runtime.get(ref, f"replica {replica}", seconds)
            reason = "it was removed"
        except ActorGoneError as error:
            reason = str(error)
        raise ReplicaLostError(replica, self.facts[replica].epoch, [], reason)

    def drop(self, replica: int) -> None:
        seat = self._seats.get(replica)
        if seat is not None:  # it may have died while it was being removed
            self._dropped.add(replica)
            self._runtime.stop([seat.actor], None)

    def remove(self, replica: int) -> None:
        """Its place goes back when no other replica has a bundle of the same placement group."""
        seat = self._seats.pop(replica)
        if replica not in self._dropped:
            self._leave([seat])
        self._dropped.discard(replica)
        shared = any(other.placement.group == seat.placement.group for other in self._seats.values())
        self._runtime.stop([seat.actor], None if shared else seat.placement)

    def _leave(self, seats: Sequence[_Seat]) -> None:
        """Have engines end by themselves, so that what is on its way to a tier arrives there."""
        for ref in [seat.actor.call("close", control=True) for seat in seats]:
            with suppress(ActorGoneError, RaykError):
                self._runtime.get(ref, "a replica that is being closed", CLOSE_SECONDS)

    def close(self) -> None:
        """End the actors and give their places back."""
        if self.settings.tiers.wanted:
            self._leave([seat for replica, seat in self._seats.items() if replica not in self._dropped])
        self._runtime.stop([seat.actor for seat in self._seats.values()], None)
        groups = {id(seat.placement.group): seat.placement for seat in self._seats.values()}
        for placement in groups.values():
            self._runtime.stop([], placement)
