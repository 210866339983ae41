"""Engines on Ray: an actor for each replica with a model, its pages and an engine's thread; it only translates.

They are started in the order in which nothing fails late: placement, processes with the model, then pages by what is
free where the model was loaded. torch is imported when a replica starts, not with this module.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rayk.actors.replica import measure
from rayk.actors.runtime import Actor, ActorGoneError, ActorSpec, Node, Placement, RayActor, Runtime
from rayk.errors import PlanError, RaykError
from rayk.planning import NodeMemory, measure_node
from rayk.tiers.identity import read_seed

if TYPE_CHECKING:
    from rayk.engine.serve import ModelSource, ReplicaFacts, ServeSettings
    from rayk.engine.settings import EngineStats
    from rayk.engine.tiers import NodeTiers
    from rayk.engine.wire import Command, Report

REPORTS_LANE = "reports"
LOAD_SECONDS = 1800.0  # to load a model
OPEN_SECONDS = 600.0  # to make pages and capture graphs
PLACE_SECONDS = 60.0
MEASURE_SECONDS = 60.0
CLOSE_SECONDS = 60.0  # to write what is on its way to disk
SILENT_SECONDS = 60.0  # an engine reports every second; one that is silent so long hangs
SLIVER = 0.001  # of a CPU, as for cache replicas


class EngineActor:
    """post() and open() run one after the other; reports() and control calls have lanes of their own."""

    def __init__(self, replica: int, source: ModelSource, settings: ServeSettings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
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
        from rayk.engine.host import EngineHost
        from rayk.engine.serve import facts_of, open_engine

        node = node or measure_node(host_name=host_name)
        engine = open_engine(
            self._model, self._source, self._settings, self._replica, self._device, sharing, node, tiers
        )
        self._host = EngineHost([engine]).start()
        return facts_of(engine, self._device, host_name)

    def post(self, wire: bytes) -> None:
        """Give the engine a command."""
        from rayk.engine.wire import decode_command

        self._host.post(0, decode_command(wire))

    def reports(self) -> Iterator[bytes]:
        """The engine's reports, as it makes them."""
        from rayk.engine.wire import encode

        for report in self._host.reports(0):
            yield encode(report)

    def stats(self) -> EngineStats:
        """The engine's counters, taken between two steps."""
        stats: EngineStats = self._host.stats(0)
        return stats

    def check(self) -> None:
        """IntegrityError unless its pages are where they should be."""
        from rayk.engine.serve import check_engine

        self._host.call(0, check_engine)

    def close(self) -> None:
        """End the engine and leave the tiers in order; the last thing that is asked of it."""
        if self._host is not None:
            self._host.stop()

    def ping(self) -> int:
        """The replica's index, once its constructor is done."""
        return self._replica


class RayReplicas:
    """Engine actors of one driver, which end with it. Implements rayk.engine.serve.Replicas."""

    def __init__(self, runtime: Runtime, source: ModelSource, settings: ServeSettings) -> None:
        self.tokenizer = None
        self.settings = settings
        self._runtime = runtime
        self._source = source
        self._actors: list[Actor] = []
        self._dropped: set[int] = set()
        self._placement: Placement | None = None
        self._tiers: dict[str, NodeTiers] = {}  # by node id
        self._pool = f"engines-{os.getpid()}-{os.urandom(8).hex()}"
        self._sent: list[Any] = [None] * settings.replicas
        try:
            self.facts: Sequence[ReplicaFacts] = self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> Sequence[ReplicaFacts]:
        settings = self.settings
        gpus = int(settings.device.startswith("cuda"))
        bundle = {"CPU": SLIVER} | ({"GPU": 1.0} if gpus else {})
        placement = self._placement = self._runtime.place([bundle] * settings.replicas, [], PLACE_SECONDS)
        if settings.reports or settings.tiers.wanted:
            settings = self.settings = replace(settings, hash_seed=self._seed(placement.node_ids))
        for replica in range(settings.replicas):
            arguments = (replica, self._source, settings)
            spec = ActorSpec(EngineActor, arguments, gpus, placement, replica, lanes=(REPORTS_LANE,))
            self._actors.append(self._runtime.start(spec))
        self._wait("ping", [()] * settings.replicas, LOAD_SECONDS)
        sharing, nodes = Counter(placement.node_ids), {node.node_id: node for node in self._runtime.nodes()}
        memory = self._make_tiers([nodes[node_id] for node_id in sharing if node_id in nodes])
        arguments_of = [
            (
                1 if gpus else sharing[node],
                nodes[node].host_name if node in nodes else node,
                memory.get(node),
                self._tiers.get(node),
            )
            for node in placement.node_ids
        ]
        return self._wait("open", arguments_of, OPEN_SECONDS)

    def _seed(self, node_ids: Sequence[str]) -> bytes:
        """The seed that the nodes' tier directories were used with before, else a new one."""
        folder = self.settings.tiers.disk_dir
        if folder is not None:
            refs = [self._runtime.run_on(node_id, read_seed, Path(folder)) for node_id in sorted(set(node_ids))]
            for seed in self._answers(refs):
                if seed is not None:
                    return bytes(seed)
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

    def _wait(self, method: str, arguments: Sequence[tuple[Any, ...]], timeout: float) -> list[Any]:
        """Call all replicas and wait for all answers."""
        refs = [actor.call(method, *given) for actor, given in zip(self._actors, arguments, strict=True)]
        try:
            return [self._runtime.get(ref, f"replica {r}", timeout) for r, ref in enumerate(refs)]
        except ActorGoneError as error:
            raise PlanError(f"a replica could not start: {error}") from None

    def post(self, replica: int, command: Command) -> None:
        """Send a command. That the replica is gone, its reports will tell."""
        from rayk.engine.wire import encode

        self._sent[replica] = self._actors[replica].call("post", encode(command))

    def reports(self, replica: int) -> Iterator[Report]:
        """The reports of one replica; ActorGoneError or CallTimeoutError when there will be no more."""
        from rayk.engine.wire import decode_report

        actor = self._actors[replica]
        assert isinstance(actor, RayActor)
        for wire in actor.stream("reports", REPORTS_LANE, f"replica {replica}", SILENT_SECONDS):
            yield decode_report(wire)

    def stats(self, replica: int) -> EngineStats:
        """One engine's counters."""
        stats = self._runtime.get(self._actors[replica].call("stats", control=True), f"replica {replica}", 30)
        return stats  # type: ignore[no-any-return]  # Runtime.get() is untyped

    def check(self, replica: int) -> None:
        """IntegrityError unless its pages are where they should be."""
        self._runtime.get(self._actors[replica].call("check", control=True), f"replica {replica}", CLOSE_SECONDS)

    def drop(self, replica: int) -> None:
        """It counts as lost: nothing of it may go on."""
        self._dropped.add(replica)
        self._runtime.stop([self._actors[replica]], None)

    def close(self) -> None:
        """End the actors and give their place back; what is on its way to a tier arrives there first."""
        if self.settings.tiers.wanted:
            live = [actor for replica, actor in enumerate(self._actors) if replica not in self._dropped]
            for ref in [actor.call("close", control=True) for actor in live]:
                with suppress(ActorGoneError, RaykError):
                    self._runtime.get(ref, "a replica that is being closed", CLOSE_SECONDS)
        self._runtime.stop(self._actors, self._placement)
