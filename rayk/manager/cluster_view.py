"""A driver's view of its cluster: its channels to the replicas, and where its requests are.

Replicas come, drain, go and are lost while requests run. Every answer of the scheduler says which version of the
deployment is the latest; a script that learns of a newer one fetches it before it gives its result, and with it the
places of this driver's requests, which may have been handed over. A request that is not where the driver thought it was
is looked for before NotClaimedError says so. A channel belongs to one epoch of one replica: nothing that is meant for
one reaches another.

Calls are scripts of rounds, run by wait_for() or await_for().
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from time import monotonic, sleep
from typing import Any, Concatenate, ParamSpec, TypeVar

from rayk import protocol as m
from rayk.actors.channel import ActorChannel, Answer, Pending, hear, new_client_id
from rayk.actors.deployment import Deployment, await_roster
from rayk.actors.interface import Runtime
from rayk.actors.launch import find_sockets
from rayk.context import TextContext
from rayk.errors import (
    CallTimeoutError,
    LeaseLostError,
    NotClaimedError,
    RaykError,
    ReplicaLostError,
    ReplicaRemovedError,
    SchedulerLostError,
    StaleEpochError,
)
from rayk.protocol.context_sync import ContextSender
from rayk.protocol.lines import PathState
from rayk.scheduler.membership import State

SCHEDULER_SECONDS = 30.0  # for which one that is away is waited for
HUNG_SECONDS = 5.0  # for which its process may not answer: then it is ended, and Ray starts another one
REJOIN_LOOK = 0.02  # seconds between two looks at a call that goes on with another scheduler
UNHEARD = (SchedulerLostError, CallTimeoutError, StaleEpochError)  # what a scheduler that does not answer comes to
LOST_KNOWN = 4096  # claims that were lost and can still be told from none

log = logging.getLogger("rayk.scheduler")

Reply = Answer | RaykError  # an answer, or why there is none
Round = list[Pending] | Callable[[], Any]  # messages, or work that takes long and sends none
T = TypeVar("T")
P = ParamSpec("P")
Script = Generator[Round, Any, T]
"""A call that gives a T: it yields rounds, and is sent what they gave."""
View = TypeVar("View", bound="ClusterView")


class ClusterView(ABC):
    """The channels of one driver to one running cluster. `cluster` is the latest deployment that an answer told of.
    `allocators[r]` is the alloc() of each replica that runs; the object stays the same."""

    def __init__(self, runtime: Runtime, cluster: Deployment) -> None:
        assert cluster.scheduler is not None
        self.client = new_client_id("driver")
        self.cluster = cluster
        self.allocators: dict[int, Callable[[TextContext], object]] = {}
        self.queued = cluster.config.admission is not None
        """Whether requests wait for their turn at the scheduler."""
        self._runtime = runtime
        self._params = cluster.config.params
        self._sender = ContextSender()
        self._placed: dict[str, int] = {}
        self._claims: dict[str, int] = {}  # the generation of each claim; of one that was lost, until it is made anew
        self._lost_claims: deque[str] = deque()  # those of the latter, of which the last LOST_KNOWN are remembered
        self._links: list[ActorChannel | None] = []
        self._lease_terms: tuple[float | None, bool] = (None, False)  # seconds, and whether the cluster is its own
        self._rejoining = False
        self._ended = 0  # the epoch of a scheduler that hung, which was ended
        self._dead: set[int] = set()  # replicas that died or were removed: the roster that is known is not the latest
        self.scheduler = ActorChannel(
            runtime,
            cluster.scheduler,
            "the scheduler",
            cluster.scheduler_epoch,
            self.client,
            SchedulerLostError,
            quiet=HUNG_SECONDS,
        )
        self._connect(cluster)

    @property
    def indices(self) -> int:
        """Replica indices in use or used before."""
        return len(self._links)

    def run(self, call: Script[T]) -> T:
        """Wait for a call; the scheduler is told at once what it released, for requests that wait there."""
        result = wait_for(call)
        if self.queued:
            self.note_released()
        return result

    @abstractmethod
    def note_released(self) -> None:
        """Tell the scheduler what was released, and do not wait for its answer."""

    @abstractmethod
    def _allocator(self, replica: int) -> Callable[[TextContext], object]:
        """alloc() of that replica."""

    def _connect(self, cluster: Deployment) -> None:
        """Have a channel to each replica that runs."""
        self.cluster = cluster
        for r, handle in enumerate(cluster.handles):
            if r == len(self._links):
                self._links.append(None)
            link = self._links[r]
            if link is not None and (handle is None or link.epoch != handle.epoch):
                link.close()
            if handle is None:
                self._links[r] = None
                self.allocators.pop(r, None)
            elif link is None or link.epoch != handle.epoch:
                lost = partial(self._lost, r, handle.epoch)
                self._links[r] = link = ActorChannel(
                    self._runtime, handle.actor, f"replica {r}", handle.epoch, self.client, lost
                )
                link.pages = self.queued
                self.allocators[r] = self._allocator(r)

    def close_sockets(self) -> None:
        """What is still sent goes by calls."""
        for link in (*self._links, self.scheduler):
            if link is not None:
                link.close()

    def path_states(self) -> list[PathState]:
        """What carries messages to each replica that runs."""
        return [link.path(r) for r, link in enumerate(self._links) if link is not None]

    def link(self, replica: int) -> ActorChannel:
        """The channel to that replica; ReplicaRemovedError for a hole."""
        link = self._links[replica] if replica < len(self._links) else None
        if link is None:
            raise ReplicaRemovedError(replica, len(self._links))
        return link

    def latest(self, *what: str) -> list[list[int]]:
        """Those numbers of every channel, 0 for a hole."""
        return [[getattr(link, each) if link is not None else 0 for link in self._links] for each in what]

    def _lost(self, replica: int, epoch: int, reason: str) -> RaykError:
        self._dead.add(replica)
        return ReplicaLostError(replica, epoch, self._on(replica), reason)

    def _on(self, replica: int) -> list[str]:
        return [request_id for request_id, r in self._placed.items() if r == replica]

    @staticmethod
    def _ask(link: ActorChannel, command: Any) -> Script[Any]:
        """One message; its result, or the error it stands for."""
        [reply] = yield [link.send(command)]
        return result_of(reply)

    def holder(self, request_id: str) -> int | None:
        """Where this driver's request is, as far as it knows."""
        return self._placed.get(request_id)

    def _lose(self, request_id: str) -> None:
        """The claim has ended, though it was not released here. Messages about it name it all the same, and are refused
        for what it is."""
        if self._placed.pop(request_id, None) is not None and request_id in self._claims:
            self._lost_claims.append(request_id)
            if len(self._lost_claims) > LOST_KNOWN and (old := self._lost_claims.popleft()) not in self._placed:
                self._claims.pop(old, None)

    # -- keeping up ------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        """Whether an answer told of a later deployment."""
        return bool(self._dead) or self.scheduler.roster > self.cluster.version

    def catch_up(self) -> Script[None]:
        """Fetch the latest deployment, and find requests whose replica drains or is gone."""
        gone, self._dead = sorted(self._dead), set()
        try:
            [reply] = yield [self.scheduler.send(m.GetRoster(gone), with_data=True)]
            result_of(reply)
        except CallTimeoutError:
            self._dead.update(gone)  # what became of them is still to be learned
            raise
        cluster: Deployment = self.scheduler.fetch(reply.data)
        if cluster.version > self.cluster.version:
            before = self._epochs
            started_here = self.cluster.started_here
            self._connect(replace(cluster, scheduler=self.cluster.scheduler, started_here=started_here))
            now = self._epochs
            moving = {r for r, state in enumerate(cluster.states) if state in (State.draining, State.lost)}
            moving |= {r for r, epoch in enumerate(before) if now[r] != epoch}
            yield from self._find([request_id for request_id, r in self._placed.items() if r in moving])

    @property
    def _epochs(self) -> list[int]:
        return [link.epoch if link is not None else 0 for link in self._links]

    def _find(self, request_ids: list[str]) -> Script[None]:
        """Ask where those requests are, and remember it."""
        if request_ids:
            done: m.Located = yield from self._ask(self.scheduler, m.Locate(request_ids))
            self._located(request_ids, done.replicas)

    def _located(self, request_ids: list[str], replicas: list[int]) -> None:
        for request_id, replica in zip(request_ids, replicas, strict=True):
            if self._placed.get(request_id) not in (None, replica):
                self._sender.forget(request_id)
                if replica < 0:
                    self._lose(request_id)
                else:
                    self._placed[request_id] = replica

    def explained(self, error: RaykError) -> Script[RaykError]:
        """The error as it reads once it is known which replicas run and where requests are."""
        try:
            if isinstance(error, NotClaimedError):
                if self._placed.get(error.request_id) == error.replica:
                    yield from self._find(self._on(error.replica))
                if isinstance(error, LeaseLostError) and self._claims.get(error.request_id, 0) != error.generation:
                    return error  # it was not handed over: the call was about an earlier claim
                holder = self._placed.get(error.request_id, error.holder)
                if holder not in (error.replica, error.holder):
                    return NotClaimedError(error.request_id, error.replica, holder)
            elif isinstance(error, ReplicaLostError):
                mine = self._on(error.replica)
                if self.behind:
                    yield from self.catch_up()
                if error.replica not in self.allocators:  # it did not die: it was removed
                    moved = [(i, self._placed[i]) for i in mine if i in self._placed]
                    if moved:
                        return NotClaimedError(moved[0][0], error.replica, moved[0][1])
                    return ReplicaRemovedError(error.replica, len(self._links))
            elif self.behind:
                yield from self.catch_up()
        except UNHEARD:
            pass  # what the error says is all that can be known
        return error

    # -- a scheduler that began anew -------------------------------------------------------------

    def hangs(self, error: RaykError) -> bool:
        """Whether the scheduler's process does not answer. It is ended, once: another one begins."""
        if (
            not isinstance(error, CallTimeoutError)
            or not self.scheduler.unanswered
            or self._ended == self.scheduler.epoch
        ):
            return False
        self._ended = self.scheduler.epoch
        log.warning(
            "the scheduler did not answer for %.0f s: its process is ended, and another one begins", HUNG_SECONDS
        )
        self._runtime.restart(self.scheduler.actor)
        return True

    def rejoin(self, error: RaykError, epoch: int) -> Script[None]:
        """Go on with the scheduler that took the place of that of `epoch`; `error` when there is none, or when it is
        the same one that failed to answer. What the call had begun there is undone: it is to be made again."""
        while self._rejoining:
            yield from off_loop(partial(sleep, REJOIN_LOOK))
        if self.scheduler.epoch != epoch:
            return  # another call has done it
        self._rejoining = True
        try:
            cluster = yield from off_loop(partial(self._successor, error, epoch))
            line, ids = self.scheduler.renewed(cluster.scheduler_epoch), list(self._placed)
            claims = [self._placed[i] for i in ids], [self._claims.get(i, 0) for i in ids]
            try:
                found: m.Located = yield from self._ask(line, m.Rejoin(ids, *claims, *self._lease_terms))
            except BaseException:
                line.close()
                raise
            before, self.scheduler = self.scheduler, line
            before.close()  # whoever still waits there hears that it is gone
            self._located(ids, found.replicas)
            mine = self.cluster
            self._connect(replace(cluster, scheduler=mine.scheduler, started_here=mine.started_here))
        finally:
            self._rejoining = False

    def _successor(self, error: RaykError, epoch: int) -> Deployment:
        try:
            waited = HUNG_SECONDS if isinstance(error, CallTimeoutError) else 0.0
            cluster = await_roster(self._runtime, self.scheduler.actor, SCHEDULER_SECONDS - waited)
        except RaykError:
            raise error from None
        if cluster.scheduler_epoch == epoch:
            raise error
        with suppress(RaykError):  # then messages go by calls
            find_sockets(self._runtime, {"the scheduler": self.scheduler.actor})
        return cluster


def began_anew(error: RaykError) -> bool:
    """Whether the scheduler that was asked is gone, so that another one may have to be."""
    return isinstance(error, SchedulerLostError) or (isinstance(error, StaleEpochError) and error.replica < 0)


def current(script: Callable[Concatenate[View, P], Script[T]]) -> Callable[Concatenate[View, P], Script[T]]:
    """Have a script of a ClusterView begin and end with the latest one."""

    @wraps(script)
    def run(self: View, /, *arguments: P.args, **named: P.kwargs) -> Script[T]:
        if self.behind:
            with suppress(*UNHEARD):  # what needs no scheduler goes on
                yield from self.catch_up()
        while True:
            epoch = self.scheduler.epoch
            try:
                result = yield from script(self, *arguments, **named)
            except RaykError as error:
                if not began_anew(error) and not self.hangs(error):
                    raise (yield from self.explained(error)) from None
                yield from self.rejoin(error, epoch)
                continue
            if self.behind:
                with suppress(*UNHEARD):
                    yield from self.catch_up()
            return result

    return run


def result_of(reply: Reply) -> Any:
    """The result of an answer; a Failure is raised as the error it stands for."""
    if isinstance(reply, RaykError):
        raise reply
    if isinstance(reply.result, m.Failure):
        raise m.to_error(reply.result)
    return reply.result


def off_loop(work: Callable[[], T]) -> Script[T]:
    """Within a script: do what takes long and sends no message, off the event loop if there is one."""
    value: T
    value, error = yield work
    if error is not None:
        raise error
    return value


def _attempt(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:  # raised again in the script, which cleans up
        return None, error


def wait_for(call: Script[T]) -> T:
    """Run a call to its end, waiting for each round."""
    try:
        round_ = next(call)
        while True:
            try:
                reply = _attempt(round_) if callable(round_) else hear(round_)
            except BaseException as error:  # the script cleans up
                round_ = call.throw(error)
            else:
                round_ = call.send(reply)
    except StopIteration as end:
        result: T = end.value
        return result


async def await_for(call: Script[T]) -> T:
    """Run a call to its end without blocking the event loop."""
    try:
        round_ = next(call)
        while True:
            try:
                reply = await _awaited(round_)
            except BaseException as error:  # the script cleans up
                round_ = call.throw(error)
            else:
                round_ = call.send(reply)
    except StopIteration as end:
        result: T = end.value
        return result


async def _awaited(round_: Round) -> Any:
    if callable(round_):
        return await asyncio.to_thread(_attempt, round_)
    since = monotonic()
    return hear(round_, since, [await pending.arrival() for pending in round_])
