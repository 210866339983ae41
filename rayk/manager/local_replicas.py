"""The replicas of a manager in this process: started and ended here, and told what to do by the scheduler's scripts."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from socket import gethostname
from time import monotonic
from typing import Any, TypeVar

from rayk import protocol as m
from rayk.context import TextContext
from rayk.errors import DrainError, RaykError, ReplicaRemovedError
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.tick import Settled
from rayk.params import KVCacheParams
from rayk.planning.node_plan import measure_node, plan_replica
from rayk.protocol.admission import AdmissionPolicy
from rayk.protocol.kv_events import KVEventsConfig
from rayk.protocol.lines import PathState
from rayk.replica.kv_event_publisher import publish_events
from rayk.replica.local import LocalReplica
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.router.prefix_index import IndexFeed
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad
from rayk.scheduler.script import ReplicaCall, ReplicaReply
from rayk.scheduler.supervisor import Replacement
from rayk.tiers.identity import find_seed, named
from rayk.tiers.opening import open_connector
from rayk.transport.choice import Peer

R = TypeVar("R")
ME = ""  # the one driver of the inline runtime
WEIGHS_LOADS = (m.Enter, m.DrainReplica, m.Describe)  # commands that go by how busy replicas are, or say it


class InlineReplicas(ABC):
    """`cores[r]` is replica r, None where nobody is any more. `allocators[r]` is the alloc() of those that are there;
    the object stays the same. `scheduler` is the same as on Ray."""

    def __init__(
        self,
        params: KVCacheParams,
        num_pages: int,
        max_batch_size: int,
        runtime_checks: bool,
        router: str,
        host_pages: int = 0,
        admission: AdmissionPolicy | None = None,
        kv_events: KVEventsConfig | None = None,
    ) -> None:
        params = named(params)
        if params.kv_hash_seed is None:
            params = replace(params, kv_hash_seed=find_seed(params))
        self._params = params
        self._num_pages = num_pages
        self._max_batch_size = max_batch_size
        self._runtime_checks = runtime_checks
        self._host_pages = host_pages
        self._kv_events = kv_events
        self._tiers = f"inline-{os.getpid()}-{os.urandom(8).hex()}"
        self._epochs = count(1)  # of replicas
        self._pools: dict[Peer, PageBuffers] = {}
        self._filling: dict[str, tuple[TextContext, int]] = {}  # requests that may still have tokens to prefill
        self._offered: dict[str, TextContext] = {}  # requests that wait
        self._became: Settled = []  # of those that a call offered which was interrupted
        self.prefill_rate: float | None = None
        self.allocators: dict[int, Callable[[TextContext], Any]] = {}
        self.cores: list[ReplicaCore | None] = []
        self._replicas: list[LocalReplica | None] = []  # the same behind commands
        settings = RouterSettings(
            router,
            (num_pages,) * params.data_parallel_degree,
            params.page_size,
            params.page_hash_algo,
            params.kv_hash_seed or b"",
            params.enable_prefix_caching,
            admission,
            offers=params.offers_pages,
        )
        epochs = [next(self._epochs) for _ in settings.pages]
        self.scheduler = SchedulerCore(epochs, settings, params.copies_prefixes, monotonic)
        self._router, self._placer, self._controller = (
            self.scheduler.router,
            self.scheduler.placer,
            self.scheduler.controller,
        )
        self._generations = self._placer.generations
        self._turn = 0  # looks at the replicas
        self._there: list[ReplicaCore] = []
        try:
            for r, epoch in enumerate(epochs):
                self._put(r, self._start(r, epoch))
                self._introduce(r)
        except BaseException:
            self.close()
            raise
        for r in range(len(epochs)) if settings.keyed else ():
            self.local(r).answer(m.StartCacheEvents())
        self._derive()

    # -- start and end -------------------------------------------------------------------------------

    def _start(self, replica: int, epoch: int) -> LocalReplica:
        params, pages = self._params, self._num_pages
        core = ReplicaCore(params, replica, pages, self._max_batch_size, None, self._runtime_checks, self._holder)
        try:
            if params.kv_connector != "null":
                core.connect(open_connector(params, core.buffers.all_bytes, self._host_pages, self._tiers))
            publish_events(core, self._kv_events)
        except BaseException:
            core.shutdown()
            raise
        return LocalReplica(core, epoch, self._pools, IndexFeed(self._router.index, replica))

    def _put(self, replica: int, local: LocalReplica | None) -> None:
        while len(self.cores) <= replica:
            self.cores.append(None)
            self._replicas.append(None)
        self._replicas[replica], self.cores[replica] = local, local.core if local is not None else None

    def _introduce(self, replica: int) -> None:
        """Let the scheduler know by what lines its pages can be had."""
        port = self.local(replica).port
        self.scheduler.links.joined(replica, port.me.epoch, port.endpoint)

    def _derive(self) -> None:
        """Derive what depends on who is there."""
        there = self._there = [core for core in self.cores if core is not None]
        self._copies = self._params.copies_prefixes and len(there) > 1
        self._only = there[0] if len(self.cores) == 1 and there else None
        self.allocators.clear()
        self.allocators.update((core.replica, self._allocator(core)) for core in there)

    @abstractmethod
    def _allocator(self, core: ReplicaCore) -> Callable[[TextContext], Any]:
        """alloc() of that replica."""

    @property
    def indices(self) -> int:
        """Indices at which somebody is or was."""
        return len(self.cores)

    def core(self, replica: int) -> ReplicaCore:
        """That replica; ReplicaRemovedError when nobody is there."""
        core = self.cores[replica]
        if core is None:
            raise ReplicaRemovedError(replica, len(self.cores))
        return core

    def local(self, replica: int) -> LocalReplica:
        """The same behind commands."""
        local = self._replicas[replica]
        if local is None:
            raise ReplicaRemovedError(replica, len(self.cores))
        return local

    def _check_holes(self, batches: Sequence[Any]) -> None:
        """ReplicaRemovedError when a batch is for nobody."""
        for core, batch in zip(self.cores, batches, strict=False):
            if core is None and batch:
                self.core(self.cores.index(core))

    def close(self) -> None:
        """Let go of everything."""
        for local in self._replicas:
            if local is not None:
                local.shutdown()
        self.cores.clear()
        self._replicas.clear()

    def leave(self) -> None:
        """Nobody else uses what is here."""
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # a manager that was dropped: its tiers' threads and shared memory must go, too
            self.close()

    # -- the scheduler -------------------------------------------------------------------------------

    def _ask(self, command: m.SchedulerCommand) -> Any:
        """What the scheduler makes of a command; an error that it answers with is raised."""
        if isinstance(command, WEIGHS_LOADS):
            self._report()
        result = self._run(self.scheduler.handle(ME, command))
        if isinstance(result, m.Failure):
            raise m.to_error(result)
        return result

    def _run(self, script: Generator[list[ReplicaCall], list[ReplicaReply], R]) -> R:
        """Carry a script out: its rounds are answered here, one call after the other. One that is interrupted undoes
        what it has begun."""
        try:
            calls = next(script)
            while True:
                try:
                    replies = [self._reply(call) for call in calls]
                except BaseException as error:
                    calls = script.throw(error)
                else:
                    if self._controller is not None:
                        self._report()
                    calls = script.send(replies)
        except StopIteration as end:
            result: R = end.value
            return result

    def _reply(self, call: ReplicaCall) -> ReplicaReply:
        try:
            return ReplicaReply(*self.local(call.replica).answer(call.command, call.attached))
        except RaykError as error:
            return ReplicaReply(m.failure(error))

    def _report(self) -> None:
        """Tell the router what the replicas still have to prefill, which contexts say themselves, and the watermarks
        which pages are in use."""
        waiting = [0] * len(self.cores)
        for request_id, (ctx, replica) in list(self._filling.items()):
            left = ctx.tokens.length - ctx.tokens.processed
            if left > 1:
                waiting[replica] += left
            else:
                del self._filling[request_id]
        self._turn += 1
        for core in self._there:
            self._router.report(core.replica, waiting[core.replica], 0)
            if self._controller is not None:
                self._controller.watermarks.report(core.replica, self._turn, core.usage.used)

    # -- requests --------------------------------------------------------------------------------

    def holder(self, request_id: str) -> int | None:
        """The replica that has the request, or None."""
        return self._placer.holder(request_id)

    def _holder(self, request_id: str) -> int:
        holder = self._placer.holder(request_id)
        return -1 if holder is None else holder

    def _gone(self, request_id: str) -> None:
        self._placer.drop(request_id)
        self._filling.pop(request_id, None)
        if self._controller is not None:
            self._controller.on_release((request_id,))

    # -- who is there --------------------------------------------------------------------------------

    def look(self) -> None:  # noqa: B027  # nobody else changes who is there: there is nothing to see
        """Take note of who came and left by other drivers."""

    def add_replicas(self, count: int, timeout: float) -> list[int]:
        """See PagedKVCacheManager.add_replicas(); PlanError when this machine has no room for their pages."""
        plan_replica(measure_node(host_name=gethostname()), self._params, self._num_pages, count)
        replicas: list[int] = self._ask(m.Enlist(count)).replicas
        made: list[LocalReplica] = []
        try:
            for r in replicas:
                self._ask(m.Starting(r))
                made.append(self._start(r, next(self._epochs)))
        except BaseException:
            for local in made:
                local.shutdown()
            for r in replicas:
                self._ask(m.GiveUp(r))
            raise
        for r, local in zip(replicas, made, strict=True):
            self._put(r, local)
            self._ask(m.Join(r, local.epoch, self._num_pages))
            self._introduce(r)
            if self._router.keys is not None:
                local.answer(m.StartCacheEvents())
        self._derive()
        return replicas

    def drain_replica(self, replica: int, deadline: float | None, handover: bool) -> Drained:
        """See PagedKVCacheManager.drain_replica(). Nobody else could release a request meanwhile, so it never waits."""
        for request_id in self._placer.on(replica):
            request = self.core(replica).requests[request_id]
            self._placer.adopt((request.client, request.generation), request_id, replica)
        done: m.Drained = self._ask(m.DrainReplica(replica, {}, handover and deadline is not None))
        for request_id, target in done.moved.items():
            if request_id in self._filling:
                self._filling[request_id] = (self._filling[request_id][0], target)
        if done.left and deadline is not None:
            raise DrainError(replica, done.left)
        return Drained(sorted(done.left), done.moved)

    def resume_replica(self, replica: int) -> None:
        """See PagedKVCacheManager.resume_replica()."""
        self._ask(m.ResumeReplica(replica))

    def remove_replica(self, replica: int) -> Removed:
        """See PagedKVCacheManager.remove_replica()."""
        done: m.RemoveDone = self._ask(m.RemoveReplica(replica))
        self.local(replica).shutdown()
        self._put(replica, None)
        self._derive()
        return Removed(done.cached, done.known, done.taken)

    def replacements(self) -> list[Replacement]:
        """There are no processes that could be lost."""
        return []

    def path_states(self) -> list[PathState]:
        """See PagedKVCacheManager.path_states()."""
        return [PathState(core.replica, "direct", "in this process") for core in self._there]

    def replica_loads(self) -> list[ReplicaLoad]:
        """See PagedKVCacheManager.replica_loads()."""
        known: m.Description = self._ask(m.Describe())
        columns = (known.states, known.requests, known.waiting, known.held, known.capacity)
        return [ReplicaLoad(r, *load) for r, load in enumerate(zip(*columns, strict=True))]

    def check_owned(self) -> None:  # noqa: B027  # there is one driver: nobody else can have started it
        """Nobody else uses what is here."""
