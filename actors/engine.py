"""Engines on Ray: an actor for each replica with a model, its pages and an engine's thread; it only translates.

They are started in the order in which nothing fails late: placement, processes with the model, then pages by what is
free where the model was loaded. torch is imported when a replica starts, not with this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rayk.actors.runtime import Actor, ActorGoneError, ActorSpec, Placement, RayActor, Runtime
from rayk.errors import PlanError
from rayk.planning import measure_node

if TYPE_CHECKING:
    from rayk.engine.serve import ModelSource, ReplicaFacts, ServeSettings
    from rayk.engine.settings import EngineStats
    from rayk.engine.wire import Command, Report

REPORTS_LANE = "reports"
LOAD_SECONDS = 1800.0  # to load a model
OPEN_SECONDS = 600.0  # to make pages and capture graphs
PLACE_SECONDS = 60.0
SILENT_SECONDS = 60.0  # an engine reports every second; one that is silent so long hangs
SLIVER = 0.001  # of a CPU, as for cache replicas


class EngineActor:
    """post() and open() run one after the other; reports() and control calls have lanes of their own."""

    def __init__(self, replica: int, source: ModelSource, settings: ServeSettings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self._replica = replica
        self._settings = settings
        self._device = "cuda:0" if settings.device.startswith("cuda") else settings.device
        self._model = source.load(self._device)
        self._host: Any = None

    def open(self, sharing: int, host_name: str) -> ReplicaFacts:
        """Take pages, as one of `sharing` replicas on this node, and begin to serve."""
        from rayk.engine.host import EngineHost
        from rayk.engine.serve import cache_params, facts_of, make_engine, plan_pages

        params = cache_params(self._model, self._settings, self._device)
        plan = plan_pages(self._model, params, self._settings, sharing, measure_node(host_name=host_name))
        engine = make_engine(self._model, params, self._settings, self._replica, plan.pages, self._device)
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

    def ping(self) -> int:
        """The replica's index, once its constructor is done."""
        return self._replica


class RayReplicas:
    """Engine actors of one driver, which end with it. `facts[r]` tells what replica r is."""

    def __init__(self, runtime: Runtime, source: ModelSource, settings: ServeSettings) -> None:
        self.tokenizer = None
        self._runtime = runtime
        self._actors: list[Actor] = []
        self._placement: Placement | None = None
        self._sent: list[Any] = [None] * settings.replicas
        try:
            self.facts: Sequence[ReplicaFacts] = self._start(source, settings)
        except BaseException:
            self.close()
            raise

    def _start(self, source: ModelSource, settings: ServeSettings) -> Sequence[ReplicaFacts]:
        gpus = int(settings.device.startswith("cuda"))
        bundle = {"CPU": SLIVER} | ({"GPU": 1.0} if gpus else {})
        placement = self._placement = self._runtime.place([bundle] * settings.replicas, [], PLACE_SECONDS)
        for replica in range(settings.replicas):
            arguments = (replica, source, settings)
            spec = ActorSpec(EngineActor, arguments, gpus, placement, replica, lanes=(REPORTS_LANE,))
            self._actors.append(self._runtime.start(spec))
        self._wait("ping", [()] * settings.replicas, LOAD_SECONDS)
        sharing, names = Counter(placement.node_ids), {n.node_id: n.host_name for n in self._runtime.nodes()}
        arguments_of = [(1 if gpus else sharing[node], names.get(node, node)) for node in placement.node_ids]
        return self._wait("open", arguments_of, OPEN_SECONDS)

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

    def drop(self, replica: int) -> None:
        """It counts as lost: nothing of it may go on."""
        self._runtime.stop([self._actors[replica]], None)

    def close(self) -> None:
        """Kill the actors and give their place back."""
        self._runtime.stop(self._actors, self._placement)
