"""The scheduler actor: runs the core's scripts by talking to the replicas. It only translates."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace as replace_fields
from functools import partial
from threading import Condition, Thread
from time import monotonic, sleep
from typing import Any

from rayk import protocol as m
from rayk.actors.channel import new_client_id
from rayk.actors.chunks import joined
from rayk.actors.interface import Actor, ActorGoneError, Runtime, SocketAddress
from rayk.actors.listener import Listener, listening
from rayk.actors.process import freeze_startup_objects, own_runtime, spare_from_kernel
from rayk.actors.removal import end_strays
from rayk.actors.replica_calls import ReplicaCalls, ReplicaChannel
from rayk.actors.report import start_reporting
from rayk.actors.secret import Authenticator, Challenge, Proof
from rayk.errors import CallTimeoutError, MessageError, RaykError, ReplicaLostError, StaleEpochError
from rayk.metrics.reading import Labels, Reading
from rayk.protocol.dedup import ReplyCache
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.leases import TICK_SECONDS
from rayk.scheduler.readings import read_scheduler
from rayk.scheduler.recovery import ClaimSeen, Kept, born_after, claim_again, keep, rejoin, restore
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.script import ReplicaCall, ReplicaReply, Script

log = logging.getLogger("rayk.scheduler")

LANES = 16  # batches that are under way at once; the driver that waits for each of its batches uses one
CLAIMS_SECONDS = 2.0  # for which a scheduler that begins anew waits for what replicas say
REMEMBERED = 8  # schedulers before it whose messages may still be on their way
KEEP_AT_ONCE = (  # before they are answered
    m.Join,
    m.DrainReplica,
    m.ResumeReplica,
    m.RemoveReplica,
    m.EveryReplica,
    m.Connect,
    m.Rejoin,
    m.Disconnect,
)
DRAIN_TICKS = 4  # of TICK_SECONDS, between two looks at which nodes go
HANDOVER_SECONDS = 1.0  # between two attempts to move what is on such a node
WATCH_TICKS = 2  # of TICK_SECONDS, between two looks at a replica that nobody asks anything
ROSTER_SECONDS = 1.0  # that a driver which attaches waits for the latest roster
ANSWERS = 8 * LANES  # remembered for each driver; more than its messages can overtake each other by


class SchedulerActor:
    """Started by rayk.actors.startup. What it begins with lies in Ray's store under `key` (rayk.scheduler.recovery), so
    that Ray can start it again whoever is there; without a key, which is for tests, with these replicas."""

    def __init__(
        self,
        epoch: int,
        replicas: Sequence[Actor],
        epochs: Sequence[int],
        settings: RouterSettings,
        copies: bool,
        key: str = "",
        runtime: Runtime | None = None,
    ) -> None:
        self._client, self._runtime = new_client_id("scheduler"), runtime or own_runtime(key)
        self._schedulers = [self._client]  # this one, and those before it
        self._key = key
        roster: Any = None
        self._saved: tuple[Any, ...] = ()
        kept: Kept | None = self._runtime.kept(key) if key else None
        if key and kept is None:
            raise RuntimeError(f"nothing is kept of the cluster {key!r}: it was shut down")
        if kept is not None:
            if kept.schedulers:
                epoch = born_after(kept.roster.scheduler_epoch, time.time_ns() // 1_000)
            roster = replace_fields(kept.roster, scheduler_epoch=epoch)
            replicas, epochs = [handle.actor for handle in roster.running.values()], kept.epochs
            settings = roster.config.router_settings(roster.pages)
        self._epoch = epoch
        self._roster = self._shown = roster
        self._authenticator = (
            Authenticator(roster.name, roster.lock) if roster is not None else Authenticator(None, None)
        )
        self._listener: Listener | None = None
        replace = roster is not None and roster.config.replace
        self._core = SchedulerCore(epochs, settings, copies, monotonic, replace)
        self._core_lock = Condition()  # a script's step and the sending of what it asks are one
        self._questions = ReplicaCalls(self._core_lock, self._stands, monotonic)
        self._links: list[ReplicaChannel | None] = []
        if kept is None or not kept.schedulers:
            self._links = [self._link(r, actor, epochs[r]) for r, actor in enumerate(replicas)]
        else:
            self._go_on(kept)
        self._answers: ReplyCache[bytes] = ReplyCache(ANSWERS)
        self._working: set[tuple[str, int]] = set()  # mutations that a lane is at
        self._ticks = 0
        self._save()
        freeze_startup_objects()
        if runtime is None:
            spare_from_kernel()
            Thread(target=self._keep_time, name="rayk-timer", daemon=True).start()
            start_reporting(self._runtime, self._read)

    def __repr__(self) -> str:  # how Ray's dashboard and logs call it
        return "rayk scheduler"

    def _read(self, labels: Labels) -> list[Reading]:
        with self._core_lock:
            return list(read_scheduler(self._core, labels))

    def _go_on(self, kept: Kept) -> None:
        """Take the place of a scheduler that died: the books are made of what was kept and of what replicas say."""
        self._schedulers = [*kept.schedulers[-REMEMBERED:], self._client]
        handles = self._roster.running
        restore(self._core, kept, self._epoch)
        self._links = [None] * len(self._core.members)
        for r, handle in handles.items():
            self._links[r] = self._link(r, handle.actor, handle.epoch)
        here, before = self._core.members.here, self._schedulers[:-1]
        asked = {r: handles[r].actor.call("take_over", before, control=True) for r in here}
        claims: dict[int, list[ClaimSeen] | None] = {}
        until = monotonic() + CLAIMS_SECONDS
        for r, ref in asked.items():
            try:
                claims[r] = self._runtime.get(ref, f"replica {r}", max(0.0, until - monotonic()))
            except CallTimeoutError:
                claims[r] = None
            except ActorGoneError as error:
                self._core.supervisor.lose(r, handles[r].epoch, str(error))
        claim_again(self._core, claims)
        known = sum(len(seen or ()) for seen in claims.values())
        log.warning("the scheduler began anew: %d replica(s), %d claim(s)", len(claims), known)

    def _save(self) -> None:
        """Write down what a successor could not ask anybody for, if it changed. With the lock held, or alone."""
        core = self._core
        leases = tuple(sorted(core.leases.drivers.items()))
        now = core.members.version, core.lifecycle.target, core.owner, leases, core.reset, core.left
        if self._key and now != self._saved:
            kept = keep(core, self._standing(), self._schedulers)
            try:
                self._runtime.keep(self._key, kept)
            except Exception:  # Ray's head does not answer: the next tick tries again
                log.exception("a successor could not be told of what changed")
                return
            self._saved = now

    def _link(self, replica: int, actor: Actor, epoch: int) -> ReplicaChannel:
        lost = partial(self._lost, replica, epoch)
        link = ReplicaChannel(self._runtime, actor, replica, epoch, self._client, lost)
        link.news, link.known = partial(self._hear, replica, epoch), -1
        link.pages = self._core.controller is not None
        return link

    def handle_with_data(self, first: Any, *rest: Any) -> tuple[bytes, Any]:
        """Answer a message that asks for the roster, which comes beside the answer."""
        answer = self.handle(first, *rest)
        with self._core_lock:
            return answer, self._standing()

    def handle(self, first: Any, *rest: Any) -> bytes:
        """Answer a message (see rayk.actors.chunks); the handle of a replica that joins is attached. Never raises for
        what a sender did wrong or a replica failed to do.

        Several lanes call this at once: while one waits for replicas, others take the next batches.
        """
        seq = 0
        if isinstance(first, tuple):  # what went by a socket before; the lanes keep no order either
            first, *rest = rest  # type: ignore[assignment]  # a list or a tuple
        try:
            wire, attached = joined(first, rest) if isinstance(first, int) else (first, rest)
            envelope = m.decode_envelope(wire)
            seq = envelope.seq
            if not isinstance(envelope, m.SchedulerEnvelope):
                raise MessageError(f"the scheduler does not take {type(envelope.command).__name__}; a replica does")
            if envelope.epoch != self._epoch:
                raise StaleEpochError(-1, envelope.epoch, self._epoch)
            return self._once(envelope, attached)
        except RaykError as error:
            return m.encode(m.Reply(self._epoch, seq, m.failure(error)))

    def _once(self, envelope: m.SchedulerEnvelope, attached: Sequence[Any]) -> bytes:
        """Carry a command out unless that was done before, or is being done."""
        client, seq = this = envelope.client, envelope.seq
        if not seq:
            return self._reply(envelope, attached)
        with self._core_lock:
            self._core_lock.wait_for(lambda: this not in self._working)
            repeated = self._answers.repeated(client, seq)
            if repeated is not None:
                return repeated
            self._working.add(this)
        reply = b""
        try:
            reply = self._reply(envelope, attached)
        finally:
            with self._core_lock:
                self._working.discard(this)
                if reply:
                    self._answers.keep(client, seq, reply)
                if isinstance(envelope.command, m.Disconnect):
                    self._answers.forget(client)
                self._core_lock.notify_all()
        return reply

    def _reply(self, envelope: m.SchedulerEnvelope, attached: Sequence[Any]) -> bytes:
        try:
            result = self._run(envelope.client, envelope.command, attached)
        except RaykError as error:
            result = m.failure(error)
        return m.encode(m.Reply(self._epoch, envelope.seq, result, roster=self._core.members.version))

    def _run(self, client: str, command: m.SchedulerCommand, attached: Sequence[Any]) -> m.Result:
        script, told = None, list[ReplicaReply]()
        try:
            while True:
                with self._core_lock:
                    if self._core.controller is not None:
                        turns = [link.turn if link is not None else 0 for link in self._links]
                        used = [link.used if link is not None else 0 for link in self._links]
                        self._core.controller.watermarks.reports(turns, used)
                    if script is None:
                        script = self._begin(client, command)
                        asks = next(script)
                        if isinstance(command, m.Join):
                            self._relink(command.replica, attached)
                    else:
                        asks = script.send(told)
                    sent = self._questions.send(self._links, asks)
                told = self._questions.hear(asks, sent)
        except StopIteration as end:
            result: m.Result = end.value
            if isinstance(command, KEEP_AT_ONCE):
                with self._core_lock:
                    if isinstance(command, m.RemoveReplica):
                        self._relink(command.replica, ())
                    self._save()
            return result

    def _begin(self, client: str, command: m.SchedulerCommand) -> Script:
        if isinstance(command, m.Rejoin):
            return rejoin(self._core, client, command)
        return self._core.handle(client, command)

    def _relink(self, replica: int, attached: Sequence[Any]) -> None:
        """A replica joined at that index, with the handle (and the nodes) that were attached, or left it."""
        handle, nodes = attached or (None, ())
        while len(self._links) <= replica:
            self._links.append(None)
        self._links[replica] = self._link(replica, handle.actor, handle.epoch) if handle is not None else None
        self._roster = self._roster.with_replica(replica, handle, nodes)

    def _order(self, ask: ReplicaCall) -> ReplicaReply:
        link = self._links[ask.replica] if ask.replica < len(self._links) else None
        if link is not None:
            self._questions.order(link, ask)
        return ReplicaReply(m.Done())

    def _stands(self, link: ReplicaChannel) -> None:
        self._core.lifecycle.answers(link.replica, link.epoch, link.aside, link.silent)

    def _hear(self, replica: int, epoch: int, news: m.CacheDelta) -> None:
        with self._core_lock:
            link = self._links[replica]
            if link is not None and link.epoch == epoch:
                self._core.router.apply_cache_delta(replica, news)
                link.known = self._core.router.known[replica]

    def _lost(self, replica: int, epoch: int, reason: str) -> RaykError:
        with self._core_lock:
            placed = self._core.supervisor.lose(replica, epoch, reason)
        return ReplicaLostError(replica, epoch, placed, reason)

    def listen(self) -> SocketAddress | None:
        """Take messages from a socket, too, from now on."""
        if self._listener is None:
            self._listener = listening(self.handle, self._runtime.address(), LANES)
        return self._listener.address if self._listener is not None else None

    def ping(self) -> int:
        """The epoch, at once, also while the data lane is busy."""
        return self._epoch

    def owner(self) -> str:
        """The driver that started the cluster and still uses it; '' when that has left, or its lease has ended."""
        return self._core.owner

    def pid(self) -> int:
        """This process, on its node."""
        return os.getpid()

    def renew(self, client: str) -> bool:
        """The driver is alive; keeps its lease. False when that has ended."""
        return self._core.leases.renew(client)

    def tick(self) -> None:
        """Do what is due though nobody sends a message. Waits for nobody: a replica carries out what it is told when it
        comes to it."""
        with self._core_lock:
            orders = self._core.expire()
            try:
                asks = next(orders)
                while True:
                    asks = orders.send([self._order(ask) for ask in asks])
            except StopIteration:
                pass
            self._save()
            here = self._core.members.here
            links = [link if r in here else None for r, link in enumerate(self._links)]
            if self._core.unfinished and not self._core.supervisor.granted and self._roster.name is not None:
                self._core.unfinished = False
                end_strays(self._runtime, self._roster.name, "replica", self._roster.running.values())
        self._ticks += 1
        if self._ticks % DRAIN_TICKS == 0:
            self._move_off()
        self._questions.tick(links, watch=self._ticks % WATCH_TICKS == 0)
        for link in links:
            if link is not None:
                self._take_out(link)

    def _take_out(self, link: ReplicaChannel) -> None:
        """End a replica that hangs or is unfit: it counts as lost."""
        silence = link.silence if not link.answers else link.stalled
        with self._core_lock:
            members, supervisor = self._core.members, self._core.supervisor
            reason = supervisor.sick(silence, link.answers, link.poison)
            if reason is None or members.epochs[link.replica] != link.epoch or link.replica not in members.here:
                return
            supervisor.lose(link.replica, link.epoch, reason)
        Thread(target=self._runtime.stop, args=([link.actor], None), name="rayk-end", daemon=True).start()

    def _move_off(self) -> None:
        """Have the requests of replicas move whose nodes are about to go, and others started in their place."""
        if not self._core.supervisor.replaces:
            return
        nodes = self._runtime.draining_nodes()
        with self._core_lock:
            handles, ready = self._roster.running, list(self._core.members.ready)
            going = [r for r in ready if handles[r].bundle.node_id in nodes]
            for r in going:
                self._core.supervisor.drain(r, leaving=False)
        for r in going:
            log.warning("node %s is about to go: replica %d hands over what it has", handles[r].bundle.node_id, r)
            Thread(target=self._hand_over, args=(r, handles[r].epoch), name="rayk-drain", daemon=True).start()

    def _hand_over(self, replica: int, epoch: int) -> None:
        """Move what is there to the others, as far as they have room, until nothing is left."""
        members = self._core.members
        while replica in members.here and members.epochs[replica] == epoch:
            with suppress(RaykError):  # it may be lost, or be ready again
                done = self._run(self._client, m.DrainReplica(replica, {}, handover=True, leaving=False), ())
                if isinstance(done, m.Drained) and not done.left:
                    return
            sleep(HANDOVER_SECONDS)

    def due(self) -> tuple[int, int]:
        """How many replacements wait for a driver that starts them, and how many drivers ask so."""
        if not self._core_lock.acquire(timeout=ROSTER_SECONDS):
            return 0, 1
        try:
            return len(self._core.supervisor.due()), self._core.leases.living
        finally:
            self._core_lock.release()

    def _keep_time(self) -> None:
        while True:
            sleep(TICK_SECONDS)
            try:
                self.tick()
            except Exception:  # the next tick tries again
                log.exception("the scheduler's timer failed")

    def challenge(self) -> Challenge:
        """What a driver with a secret has to answer."""
        return self._authenticator.challenge()

    def roster(self, proof: Proof | None = None) -> Any:
        """What a driver needs to attach: a Deployment, a moment old if a data lane is at work for long. Renewals
        and ping() come by the same lane as this call, and wait for it."""
        self._authenticator.check(proof)
        if self._core_lock.acquire(timeout=ROSTER_SECONDS):
            try:
                return self._standing()
            finally:
                self._core_lock.release()
        return self._shown

    def _standing(self) -> Any:
        members = self._core.members
        self._shown = self._roster.with_states(members.version, members.joined, tuple(map(str, members.states)))
        return self._shown
