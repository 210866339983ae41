"""Engines on Ray: an actor for each replica with a model, its pages and an engine's thread; it only translates.

They are started in the order in which nothing fails late: placement, processes with the model, then pages by what is
free where the model was loaded. torch is imported when a replica starts, not with this module.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from rayk.actors.interface import Actor, ActorGoneError, ActorSpec, Bundle, Node, Runtime, SocketAddress
from rayk.actors.launch import (
    PLACE_SECONDS,
    PlacedActor,
    close_actors,
    ended_on_failure,
    find_sockets,
    first_answers,
    measure_nodes,
    place_actors,
    starting,
    stop_actors,
    tier_seed,
    vacate,
)
from rayk.actors.mailbox import Mailbox
from rayk.actors.post_line import PostLine
from rayk.actors.report import start_reporting
from rayk.errors import CallTimeoutError, ClosedError, PlanError, ReplicaLostError
from rayk.metrics.reading import Labels, Reading, Reporter
from rayk.planning.node_plan import NodeMemory, measure_node
from rayk.protocol.lines import PathState

if TYPE_CHECKING:
    from rayk.engine.ranks import Ranks
    from rayk.engine.replicas import ModelSource, ReplicaFacts, ServeSettings
    from rayk.engine.settings import EngineStats
    from rayk.engine.tiers import NodeTiers
    from rayk.protocol.engine import Command, Report

REPORTS_LANE = "reports"
LOAD_SECONDS = 1800.0  # to load a model
OPEN_SECONDS = 600.0  # to make pages and capture graphs
STATS_SECONDS = 30.0
CLOSE_SECONDS = 60.0  # to write what is on its way to disk
SILENT_SECONDS = 60.0  # an engine reports every second; one that is silent so long hangs
SOON_SECONDS = 5.0  # the same where others take its place
GATHER_SECONDS = 0.002  # between two reports at least: steps that take less are reported together
STALLED_SECONDS = 6.0  # the same of an engine that is in a step, in a process that reports


class EngineActor:
    """handle() and open() run one after the other; read() and control calls have lanes of their own. Messages come by
    sockets, too: see rayk.actors.mailbox. With several ranks it is rank 0, and starts the others in its bundle."""

    def __init__(
        self, replica: int, source: ModelSource, settings: ServeSettings, bundle: Bundle | None = None
    ) -> None:
        import torch

        torch.set_num_threads(settings.threads or 1)
        self._replica = replica
        self._source = source
        self._settings = settings
        self._device = "cuda:0" if settings.device.startswith("cuda") else settings.device
        self._thread: Any = None
        self._reporter: Reporter | None = None
        self._mailbox = Mailbox(self._post, self._reports, lambda error: self._thread.fail(0, error))
        self._ranks: Ranks | None = None
        if settings.tp == 1:
            self._model = source.load(self._device)
            return
        from rayk.actors.ranks import start_ranks
        from rayk.actors.runtime import RayRuntime
        from rayk.models.tensor_parallel import Rank

        assert bundle is not None
        self._ranks = start_ranks(RayRuntime(), replica, source, settings, bundle, self._device)
        try:
            self._model = source.load(self._device, Rank(0, settings.tp))
        except Exception as error:
            raise self._ranks.lost or error from error  # a rank that is lost fails what the others do

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
            ranks=self._ranks,
        )
        self._thread = EngineThread([engine], shared=self._settings.shared).start()
        if self._ranks is not None:
            self._ranks.on_loss = lambda error: self._thread.fail(0, error)
            if self._ranks.lost is not None:
                raise self._ranks.lost
        model = Path(str(self._source)).name if self._settings.vllm_metrics else None
        facts = facts_of(engine, self._device, host_name, self._source, self._settings.tp)
        self._reporter = start_reporting(RayRuntime(), partial(self._read, facts.page_bytes), model)
        return facts

    def __repr__(self) -> str:  # how Ray's dashboard and logs call it
        return f"rayk engine {self._replica}"

    def _read(self, page_bytes: int, labels: Labels) -> list[Reading]:
        from rayk.engine.readings import read_engine

        return list(read_engine(self._thread.stats(0), page_bytes, labels | {"replica_idx": str(self._replica)}))

    def handle(self, first: Any, *rest: Any) -> None:
        """Give the engine a command. One that cannot be decoded ends the replica with that reason."""
        self._mailbox.handle(first, *rest)

    def read(self, wire: bytes) -> bytes:
        """The next of the engine's reports to a driver (see rayk.engine.outbox), as it makes them, and at least one a
        second while it gets on."""
        return self._mailbox.read(wire)

    def listen(self) -> SocketAddress | None:
        """Take messages from sockets, too, from now on."""
        return self._mailbox.listen()

    def _post(self, driver: int, wire: bytes) -> None:
        from rayk.protocol.engine import Forget, decode_command

        command = decode_command(wire)
        if isinstance(command, Forget):
            self._mailbox.forget(command.driver)
        self._thread.post(0, command)

    def _reports(self, driver: int) -> Iterator[bytes]:
        from rayk.protocol.engine import encode

        for report in self._thread.reports(0, driver):
            made = time.monotonic()
            stalled = self._thread.stalled()
            if self._settings.replaced and stalled >= STALLED_SECONDS:
                raise CallTimeoutError(f"the engine of replica {self._replica}", stalled)
            yield encode(report)
            time.sleep(max(0.0, made + GATHER_SECONDS - time.monotonic()))

    def stats(self) -> EngineStats:
        """The engine's counters, taken between two steps."""
        stats: EngineStats = self._thread.stats(0)
        return stats

    def check(self) -> None:
        """IntegrityError unless its pages are where they should be."""
        from rayk.engine.replicas import check_engine

        self._thread.call(0, check_engine)

    def reset_prefix_cache(self, token: bytes) -> int:
        """See ReplicaCore."""
        held: int = self._thread.call(0, lambda engine: engine.core.reset_prefix_cache(token))
        return held

    def close(self) -> None:
        """End the engine and leave the tiers in order; the last thing that is asked of it."""
        if self._reporter is not None:
            self._reporter.stop()
        self._mailbox.close()
        if self._thread is not None:
            self._thread.stop()
        if self._ranks is not None:
            self._ranks.close()

    def pid(self) -> int:
        """This process, on its node."""
        return os.getpid()

    def ping(self) -> int:
        """The replica's index, once its constructor is done."""
        return self._replica


class RayReplicas:
    """Engine actors of one driver, which end with it. Implements rayk.engine.replicas.Replicas."""

    def __init__(self, runtime: Runtime, source: ModelSource, settings: ServeSettings, name: str | None = None) -> None:
        self.tokenizer: Any = None
        self._name = name  # of detached ones
        self.settings = settings
        self.facts: list[ReplicaFacts] = []
        self._runtime = runtime
        self._source = source
        self._gpus = int(settings.device.startswith("cuda"))
        self._coming: list[Actor] = []  # that are being started
        self._closing = False
        self._placed: dict[int, PlacedActor] = {}  # by replica; those that were not removed
        self._dropped: set[int] = set()  # of these
        self._tiers: dict[str, NodeTiers] = {}  # by node id
        self._pool = f"engines-{os.getpid()}-{os.urandom(8).hex()}"
        self.title = f"rayk-{self._pool[-8:]}"  # of its metrics, where it has no name
        self._sent: dict[int, Any] = {}
        self._lines: dict[int, PostLine] = {}  # made when they are needed
        self._opening = Lock()  # of these

    def start(self) -> RayReplicas:
        """Start those of the settings."""
        self.add(range(self.settings.replicas), PLACE_SECONDS)
        return self

    def add(self, replicas: Sequence[int], timeout: float) -> None:
        vacate(self._runtime, self._placed, replicas)
        gpus = self._gpus * self.settings.tp
        if gpus > 1:
            most = max((int(node.resources.get("GPU", 0)) for node in self._runtime.nodes()), default=0)
            if most < gpus:
                raise PlanError(f"tp={gpus} needs nodes with {gpus} GPUs, and this cluster's have {most} at most")
        bundles, groups = place_actors(self._runtime, self._placed, replicas, gpus, {}, timeout, self._name)
        with ended_on_failure(self._runtime, (), groups), starting(self._runtime, self._specs(bundles)) as actors:
            self._coming = actors
            if self._closing:
                raise ClosedError("this Cluster")
            placed = dict(zip(bundles, map(PlacedActor, actors, bundles.values()), strict=True))
            facts = self._open(placed)
            find_sockets(self._runtime, {f"replica {replica}": each.actor for replica, each in placed.items()})
        self._coming = []
        self._enter(placed, facts)

    def _enter(self, placed: dict[int, PlacedActor], facts: Sequence[ReplicaFacts]) -> None:
        """They run."""
        for replica in placed:
            self._let_go(replica)
        self._placed |= placed
        self._dropped -= set(placed)
        for each in sorted(facts, key=lambda each: each.replica):
            self.facts[each.replica : each.replica + 1] = [each]

    def _specs(self, bundles: Mapping[int, Bundle]) -> Iterator[ActorSpec]:
        if self.settings.hash_seed is None and self.settings.names_pages:
            seed = tier_seed(self._runtime, self.settings.tiers.disk_dir, self._nodes(bundles.values()))
            self.settings = replace(self.settings, hash_seed=seed)
        for replica, bundle in bundles.items():
            yield self._spec(replica, bundle)

    def _spec(self, replica: int, bundle: Bundle) -> ActorSpec:
        arguments = (replica, self._source, self.settings, bundle if self.settings.tp > 1 else None)
        return ActorSpec(
            EngineActor, arguments, self._gpus, bundle, lanes=(REPORTS_LANE,), title=f"{self.title}/engine-{replica}"
        )

    def _nodes(self, bundles: Iterable[Bundle]) -> list[Node]:
        """Where they are, without nodes that died."""
        node_ids = {bundle.node_id for bundle in bundles}
        return [node for node in self._runtime.nodes() if node.node_id in node_ids]

    def _open(self, placed: Mapping[int, PlacedActor]) -> list[ReplicaFacts]:
        """Wait for models, then have pages made."""
        calls = {f"replica {replica}": each.actor.call("ping") for replica, each in placed.items()}
        first_answers(self._runtime, calls, LOAD_SECONDS)
        bundles = [each.bundle for each in placed.values()]
        sharing, nodes = Counter(bundle.node_id for bundle in bundles), self._nodes(bundles)
        names, memory = {node.node_id: node.host_name for node in nodes}, self._make_tiers(nodes)
        calls = {}
        for replica, each in placed.items():
            node = each.bundle.node_id
            given = 1 if self._gpus else sharing[node], names.get(node, node), memory.get(node), self._tiers.get(node)
            calls[f"replica {replica}"] = each.actor.call("open", *given)
        return first_answers(self._runtime, calls, OPEN_SECONDS)

    def _make_tiers(self, nodes: Sequence[Node]) -> dict[str, NodeMemory]:
        """Decide what the tiers of new nodes take; what is left there for device pages in the same memory."""
        config, memory = self.settings.tiers, dict[str, NodeMemory]()
        new = [node for node in nodes if node.node_id not in self._tiers] if config.wanted else []
        for node in measure_nodes(self._runtime, new, config.disk_dir):
            at = node.node_id
            self._tiers[at], memory[at] = config.reserve(node, f"{self._pool}-{at}")
        return memory

    def _line(self, replica: int) -> PostLine | None:
        """To the one that is there now, None when nobody is."""
        with self._opening:
            placed, line = self._placed.get(replica), self._lines.get(replica)
            if line is None and placed is not None and not self._closing:
                line = PostLine(self._runtime, placed.actor, f"replica {replica}", REPORTS_LANE)
                self._lines[replica] = line
            return line

    def _let_go(self, replica: int) -> None:
        with self._opening:
            line = self._lines.pop(replica, None)
        if line is not None:
            line.close()

    def post(self, replica: int, command: Command) -> None:
        from rayk.protocol.engine import encode

        line = self._line(replica)
        if line is not None:  # else it was removed, which its stream tells, too
            line.post(encode(command))

    driver = 0  # the only one

    def reports(self, replica: int) -> Iterator[Report]:
        """ActorGoneError or CallTimeoutError when there will be no more."""
        from rayk.protocol.engine import decode_report

        line, silence = self._line(replica), SOON_SECONDS if self.settings.replaced else SILENT_SECONDS
        if line is None:
            raise ActorGoneError("it was removed")
        return map(decode_report, line.stream(silence, self.driver))

    def path(self, replica: int) -> PathState:
        line = self._line(replica)
        return line.path(replica) if line is not None else PathState(replica, "calls", "it was removed")

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
        placed = self._placed.get(replica)
        return placed.actor.call(method, *arguments, control=True) if placed is not None else None

    def _answer(self, replica: int, ref: Any, seconds: float) -> Any:
        """ReplicaLostError when it is gone, CallTimeoutError when it does not answer in time."""
        try:
            if ref is not None:
                return self._runtime.get(ref, f"replica {replica}", seconds)
            reason = "it was removed"
        except ActorGoneError as error:
            reason = str(error)
        raise ReplicaLostError(replica, self.facts[replica].epoch, [], reason)

    def leaving(self) -> list[int]:
        draining = self._runtime.draining_nodes()
        return [r for r, placed in list(self._placed.items()) if placed.bundle.node_id in draining]

    def give_up(self) -> None:
        self._closing = True
        for replica in list(self._lines):
            self._let_go(replica)
        self._runtime.stop(self._coming, None)

    def drop(self, replica: int) -> None:
        if replica in self._placed:  # it may have died while it was being removed
            self._dropped.add(replica)
            self._let_go(replica)
            self._runtime.stop([self._placed[replica].actor], None)

    def remove(self, replica: int) -> None:
        """Its place goes back when no other replica has a bundle of the same placement group."""
        self._let_go(replica)
        self._let_go(replica)
        self._close_tiers([replica])
        vacate(self._runtime, self._placed, [replica])
        del self._placed[replica]
        self._dropped.discard(replica)

    def _close_tiers(self, replicas: Iterable[int]) -> None:
        """Have engines end by themselves, so that what is on its way to a tier arrives there."""
        answering = [self._placed[replica].actor for replica in replicas if replica not in self._dropped]
        close_actors(self._runtime, answering, CLOSE_SECONDS)

    def close(self) -> None:
        """End the actors and give their places back."""
        if self.settings.tiers.wanted:
            self._close_tiers(self._placed)
        stop_actors(self._runtime, self._placed.values())
