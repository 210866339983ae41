"""The scheduler's state and decisions, without Ray: who is placed where, and what to ask of which replica.

handle() returns a script: a generator that yields rounds of questions for replicas and is sent their answers
until it returns the result. Whoever runs it (the actor, a test) does the talking. Several scripts may be under
way at once, as long as each goes from one round to the next, messages sent, without another in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rayk import protocol as m
from rayk.errors import CallTimeoutError, ConfigError, RaykError, ReplicaLostError
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.scheduler.admission.controller import AdmissionController
from rayk.scheduler.admission.script import AdmissionScripts
from rayk.scheduler.leases import Leases
from rayk.scheduler.lifecycle import ReplicaLifecycle
from rayk.scheduler.membership import Membership
from rayk.scheduler.placer import Placer
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.scaling import Removed
from rayk.scheduler.script import Part, ReplicaCall, ReplicaReply, Script
from rayk.scheduler.supervisor import Supervisor
from rayk.scheduler.transfers.evacuation import Evacuation
from rayk.scheduler.transfers.handover import Handover
from rayk.scheduler.transfers.links import LinkTable


class SchedulerCore:
    """`epochs[r]` is replica r's start; `copies` says whether replicas copy prefixes from each other, `replace` whether
    lost ones are wanted back."""

    def __init__(
        self,
        epochs: Sequence[int],
        settings: RouterSettings,
        copies: bool,
        clock: Callable[[], float],
        replace: bool = False,
    ) -> None:
        self.members = Membership(epochs)
        self.router = settings.make(clock)
        self.links = LinkTable(clock, settings.page_transport)
        self.placer = Placer(self.members, self.router, copies, settings.page_size, self.links, clock)
        self.lifecycle = ReplicaLifecycle(self.members, self.router, self.placer.on, self.placer.forget, settings)
        self._offering: Evacuation | None = None
        if copies and settings.offers:
            self._offering = Evacuation(self.placer.transfers, lambda: self.members.ready, clock)
        self.left = KVCacheMetrics()  # what removed replicas had counted
        self.reset: bytes | None = None  # token of the last one that replicas which join later must know of
        self._removed: dict[int, m.RemoveDone] = {}  # what became of their pages
        self.controller: AdmissionController | None = None
        """Where requests wait, if there is an admission policy."""
        if settings.admission is not None:
            self.controller = AdmissionController(settings.admission, self.router, settings.page_size, clock)
            self.lifecycle.on_replica_gone = self.controller.on_replica_lost
            self._entry = AdmissionScripts(self.placer, self.controller)
        self.supervisor = Supervisor(self.lifecycle, clock, replace)
        self.leases = Leases(clock)
        self.born = 0
        """The first number of claims that this scheduler gave out, where another was before it."""
        self.unheard: dict[int, int] = {}
        """The epochs of replicas that did not say what is claimed there when it began."""
        self.unfinished = False
        """Whether a driver went in the middle of a start: what it had started then is of no use to anybody."""
        self.owner = ""
        """The driver that started the cluster, until it leaves or its lease ends; '' for nobody."""
        self._linked = self.members.version  # when it was last looked whose links are of no use any more

    def handle(self, client: str, command: m.SchedulerCommand) -> Script:
        """The script that carries out `command` for `client`; its first step follows before anything else is done."""
        if client in self.leases.drivers:
            self.leases.heard(client)
        script = self._script(client, command)
        if self._linked != self.members.version or self.links.gone:
            return self._after(self._disconnect(), script)
        return script

    @staticmethod
    def _after(first: Part, then: Script) -> Script:
        yield from first
        return (yield from then)

    def _disconnect(self) -> Part:
        """Have links to replicas that left closed, or the memory of these would be kept for nothing."""
        self._linked, epochs = self.members.version, self.members.epochs
        self.links.keep({r: epochs[r] for r in self.members.here})
        gone = self.links.peers_to_disconnect()
        if gone:
            yield [ReplicaCall(replica, m.DropLines(peers)) for replica, peers in gone.items()]

    def _script(self, client: str, command: m.SchedulerCommand) -> Script:
        match command:
            case m.PlaceMany():
                return self.placer.place_many(client, command)
            case m.Enter():
                if self.controller is None:
                    raise ConfigError("this cluster has no admission policy: requests cannot wait; use admit()")
                return self._entry.enter(client, command)
            case m.ClaimOne():
                return self.placer.claim(client, command)
            case m.HitCountsOf(view):
                return self._hit_counts(view)
            case m.EveryReplica(every):
                return self._every(every)
            case m.Connect(lease, owner):
                if owner:
                    self.owner = client
                return self._connect(client, lease)
            case m.Disconnect():
                return self._leave(client)
            case m.Describe(released):
                self.placer.forget_released(released)
                return self._describe()
            case m.Explain(request_id):
                return self._at_once(self.router.explain(request_id))
            case m.Locate(request_ids):
                return self._at_once(m.Located(self.placer.located(client, request_ids)))
            case m.GetRoster(gone):
                return self._look_at(gone)
            case m.RemoveReplica(replica):
                return self._remove(replica)
            case m.DrainReplica(replica, released, handover, leaving):
                self.placer.forget_released(released)
                self.supervisor.drain(replica, leaving)
                return self._drain(replica, handover)
            case _:
                return self._change(client, command)

    def _look_at(self, gone: Sequence[int]) -> Script:
        """Ask replicas that did not answer somebody: of those that are gone, all hear when the answer comes."""
        yield [ReplicaCall(r, m.GetUsage()) for r in gone if r in self.members.here]
        return m.Done()

    @staticmethod
    def _at_once(result: m.Result) -> Script:
        yield []
        return result

    # -- all replicas ------------------------------------------------------------------------------

    # A lost replica has nothing that could be counted, checked or forgotten; a silent one has, and nobody knows what.
    # Neither keeps the others from answering.

    def _hit_counts(self, view: m.ContextView) -> Script:
        """Of a replica that is lost or silent nothing can be hit now: 0."""
        asked = list(self.members.here)
        answers = yield [ReplicaCall(r, m.Lookup([view]), wanted=True) for r in asked]
        found = [m.Found([0], [0])] * len(self.members)
        for r, told in zip(asked, answers, strict=True):
            if isinstance(told.result, m.Found):
                found[r] = told.result
            elif _unreached(told) is None:
                return told.result
        if not any(f.host for f in found):
            return m.Counts([f.resident[0] for f in found])
        return m.Counts([f.resident[0] for f in found], [sum(f.host) for f in found], [sum(f.disk) for f in found])

    def _every(self, command: Any) -> Script:
        """Ask all that are here. The first error of one that answered is the answer.

        GetMetrics adds up the others; ResetMetrics and PollTransfers are done by the others, and an order waits at a
        silent one. CheckIntegrity names the lost and the silent, which could not be asked. ResetPrefixCache and Drain
        are done by the others, too, but CallTimeoutError names the silent ones: what they promise does not hold there
        yet. The order to forget its pages waits at a silent replica before anything that is asked of it later.
        """
        if isinstance(command, m.ResetPrefixCache) and command.token is not None:
            self.reset = command.token
        asked = list(self.members.here)
        answers = yield [ReplicaCall(r, command, wanted=True) for r in asked]
        total, silent, held = self.left, dict[int, float](), dict[int, int]()
        gone = [r for r in self.members.known if r not in asked]
        for r, told in zip(asked, answers, strict=True):
            unreached = _unreached(told)
            if isinstance(unreached, CallTimeoutError):
                silent[r] = unreached.seconds
            elif unreached is not None:
                gone.append(r)
            elif isinstance(told.result, m.Failure):
                return told.result
            elif isinstance(told.result, m.MetricsDone):
                total += told.result.metrics
            elif isinstance(told.result, m.ResetDone):
                held[r] = told.result.held
        match command:
            case m.GetMetrics():
                return m.MetricsDone(total)
            case m.ResetMetrics():
                self.left = KVCacheMetrics()
            case m.CheckIntegrity():
                return m.Unasked(sorted([*gone, *silent]))
            case m.ResetPrefixCache() | m.Drain() if silent:
                raise CallTimeoutError(", ".join(f"replica {r}" for r in silent), max(silent.values()))
            case m.ResetPrefixCache():
                return m.ResetDone(sum(held.values()), held)
        return m.Done()

    # -- who is there --------------------------------------------------------------------------------

    def _change(self, client: str, command: m.SchedulerCommand) -> Script:
        """An event of membership; all that has to know of it does when the script has begun."""
        supervisor, follow, reset = self.supervisor, list[int](), list[ReplicaCall]()
        result: m.Result = m.Done()
        match command:
            case m.Enlist(count, driver):
                result = m.Enlisted(supervisor.enlist(count, driver or client))
            case m.Replace(driver):
                result = m.Enlisted(supervisor.take(driver or client))
            case m.Starting(replica):
                self.lifecycle.start(replica)
            case m.GiveUp(replica, reason, placeless):
                supervisor.give_up(replica, reason, placeless)
            case m.Join(replica, epoch, pages):
                follow = supervisor.join(replica, epoch, pages)
                reset = (
                    [ReplicaCall(replica, m.ResetPrefixCache(self.reset, joins=True))] if self.reset is not None else []
                )
            case m.ResumeReplica(replica):
                supervisor.resume(replica)
        yield reset + [ReplicaCall(r, m.StartCacheEvents()) for r in follow]
        return result

    def _drain(self, replica: int, handover: bool) -> Script:
        """Hand over what is there, if that is wanted; say what is left."""
        before, moved = self.placer.on(replica), dict[str, int]()
        yield from self.placer.verify(before)  # some may have been released there directly
        if replica in self.members.here and handover:
            moved, left = yield from Handover(self.placer, self.members).run(replica)
        else:
            left = dict.fromkeys(self.placer.on(replica), "it still runs")
        if replica not in self.members.here:
            lost = [i for i in before if i not in moved]
            raise ReplicaLostError(replica, self.members.epochs[replica], lost, "it died while it drained")
        yield []
        return m.Drained(left, moved)

    def _remove(self, replica: int) -> Script:
        """Offer what the replica has cached to others, keep what it has counted, so that no total goes down, and forget
        it."""
        removed, counted = Removed(), None
        if replica in self.members.here:
            yield [ReplicaCall(replica, m.GetUsage(), wanted=True)]  # whether it answers decides what is lost with it
            yield from self.placer.verify(self.placer.on(replica))  # some may have been released there directly
        if self.lifecycle.begin_removal(replica):
            if self._offering is not None:
                removed = yield from self._offering.run(replica)
            [told] = yield [ReplicaCall(replica, m.GetMetrics())]
            counted = told.result
        self.supervisor.remove(replica)
        if isinstance(counted, m.MetricsDone):
            self.left += counted.metrics
        self._removed[replica] = m.RemoveDone(*removed)
        yield []
        return self._removed[replica]

    # -- drivers -----------------------------------------------------------------------------------

    def _connect(self, client: str, lease: float | None) -> Script:
        if lease is not None:
            self.leases.connect(client, lease)
        yield []
        return m.Done()

    def expire(self) -> Part:
        """Release the requests of drivers whose leases have ended. To be run every LONGEST_TICK seconds at least; its
        rounds are orders, whose answers need not be waited for."""
        for client in self.leases.tick():
            self._disowned(client)
            if self.controller is not None:
                self.controller.drop(client)
            yield from self.placer.release_all(client)

    def _leave(self, client: str) -> Script:
        self.leases.leave(client)
        self._disowned(client)
        if self.controller is not None:
            self.controller.drop(client)
        yield from self.placer.release_all(client)
        return m.Done()

    def _disowned(self, client: str) -> None:
        self.unfinished |= bool(self.supervisor.forget(client))
        if self.owner == client:
            self.owner = ""

    def _describe(self) -> Script:
        loads, controller = self.router.loads, self.controller
        yield []
        return m.Description(
            self.members.epochs,
            *self.placer.counts(),
            self.leases.living,
            [str(state) for state in self.members.states],
            loads.prefill_backlog.astype(int).tolist(),
            loads.held.tolist(),
            loads.capacity.tolist(),
            admission=controller.state() if controller is not None else None,
            levels=controller.watermarks.pages_committed if controller is not None else [],
            transport=self.links.wanted,
            lines=self.links.table(),
            removed=self._removed,
            replacements=[m.Replacement(*each) for each in self.supervisor.replacements()],
            target=self.lifecycle.target,
        )


def _unreached(told: ReplicaReply) -> RaykError | None:
    """Why a replica did not answer; None when it did, an error of its own included."""
    if isinstance(told.result, m.Failure):
        error = m.to_error(told.result)
        if isinstance(error, (ReplicaLostError, CallTimeoutError)):
            return error
    return None
