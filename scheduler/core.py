"""The scheduler's state and decisions, without Ray: who is placed where, and what to ask of which replica.

handle() returns a script: a generator that yields rounds of questions for replicas and is sent their answers
until it returns the result. Whoever runs it (the actor, a test) does the talking. Its state is soft: replicas
own the truth about claims, so a placement that surprises is checked with its replica before it is believed.

Replicas never call each other or the scheduler. A page copy is three rounds of the scheduler's (lookup,
export, admit) with the data going from replica to replica beside the messages, so copies in both directions
at once cannot block each other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from rayk import messages as m
from rayk.errors import AlreadyClaimedError, RaykError, ReplicaIndexError
from rayk.metrics import KVCacheMetrics
from rayk.peers import copy_spans
from rayk.scheduler.routing import Placements, Router


class Ask(NamedTuple):
    """One message to a replica; `attached` are references to page data, `with_data` asks for one back."""

    replica: int
    command: m.ReplicaCommand
    attached: tuple[Any, ...] = ()
    with_data: bool = False


class Told(NamedTuple):
    """The answer to an Ask; a dead or silent replica answers with a Failure."""

    result: m.Result
    data: Any = None


Script = Generator[list[Ask], list[Told], m.Result]


class _Copy(NamedTuple):
    """Exported pages on their way to a place."""

    source: int
    export: m.Exported
    data: Any


class SchedulerCore:
    """`epochs[r]` is replica r's start; `copies` says whether replicas copy prefixes from each other."""

    def __init__(
        self, epochs: Sequence[int], router: Router, copies: bool, clock: Callable[[], float], page_size: int
    ) -> None:
        self._page_size = page_size
        self.epochs = list(epochs)
        self.placements = Placements(len(self.epochs))
        self.renewed: dict[str, float] = {}  # client -> when it was heard of last
        self._leases: dict[str, float] = {}  # client -> seconds it may be silent
        self._silent: set[str] = set()  # clients that were silent for longer, and whose requests were released
        self._owners: dict[str, str] = {}  # request -> client
        self._router = router
        self._copies = copies and len(self.epochs) > 1
        self._clock = clock

    def handle(self, client: str, command: m.SchedulerCommand) -> Script:
        """The script that carries out `command` for `client`, after requests of silent drivers were released."""
        self._silent.discard(client)
        yield from self._expire()
        return (yield from self._script(client, command))

    def _script(self, client: str, command: m.SchedulerCommand) -> Script:
        match command:
            case m.PlaceMany():
                return self._place_many(client, command)
            case m.ClaimOne():
                return self._claim(client, command)
            case m.HitCountsOf(view):
                return self._hit_counts(view)
            case m.EveryReplica(every):
                return self._every(every)
            case m.Connect(lease):
                return self._connect(client, lease)
            case m.Disconnect():
                return self._leave(client)
            case m.Describe():
                return self._describe()

    # -- claims ----------------------------------------------------------------------------------

    def _claim(self, client: str, command: m.ClaimOne) -> Script:
        self._forget_own(client, command.released)
        self._check_index(command.replica)
        yield from self._verify([command.request_id])
        self._add(client, command.request_id, command.replica, 0)
        [told] = yield [Ask(command.replica, m.Claim(command.request_id, command.dummy))]
        if isinstance(told.result, m.Failure):
            self._forget([command.request_id])
        return told.result

    def _check_index(self, replica: int) -> None:
        if not 0 <= replica < len(self.epochs):
            raise ReplicaIndexError(replica, len(self.epochs))

    def _verify(self, request_ids: Sequence[str]) -> Generator[list[Ask], list[Told], None]:
        """Forget those of `request_ids` that their replica does not have any more (released there directly)."""
        known = [(i, r) for i in request_ids if (r := self.placements.holder(i)) is not None]
        if known:
            answers = yield [Ask(replica, m.Blocks(request_id)) for request_id, replica in known]
            for (request_id, _), told in zip(known, answers, strict=True):
                if isinstance(told.result, m.BlocksDone) and not told.result.claimed:
                    self._forget([request_id])

    def _add(self, client: str, request_id: str, replica: int, tokens: int) -> None:
        self.placements.add(request_id, replica, tokens)
        self._owners[request_id] = client

    def _forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.placements.remove(request_id)
            self._owners.pop(request_id, None)

    def _forget_own(self, client: str, request_ids: Sequence[str]) -> None:
        """What `client` released on replicas itself; by now another client may have claimed the id."""
        self._forget([i for i in request_ids if self._owners.get(i) == client])

    # -- placing ---------------------------------------------------------------------------------

    def _place_many(self, client: str, command: m.PlaceMany) -> Script:
        self._forget_own(client, command.released)
        places = command.places
        yield from self._verify([p.view.request_id for p in places if p.claim])
        replicas: list[int] = []
        admitted: dict[int, m.Admitted] = {}
        for i, place in enumerate(places):
            try:
                replicas.append(self._choose(client, place))
            except RaykError as error:
                replicas.append(error.replica if isinstance(error, AlreadyClaimedError) else -1)
                admitted[i] = m.Admitted(failure=m.failure(error))
                if command.stop_on_error:
                    rest = range(i + 1, len(places))
                    admitted.update((j, m.Admitted()) for j in rest)
                    replicas += [-1] * len(rest)
                    break
        todo = [i for i in range(len(places)) if i not in admitted]
        copies = yield from self._fetch(places, replicas, [i for i in todo if places[i].peers])
        try:
            # A source that receives no copy itself waits until its pages are unpinned: they may be all it can give.
            groups = {r: [i for i in todo if replicas[i] == r] for r in sorted({replicas[i] for i in todo})}
            sources = {copy.source for parts in copies.values() for copy in parts}
            late = {r: g for r, g in groups.items() if r in sources and not any(i in copies for i in g)}
            early = {r: g for r, g in groups.items() if r not in late}
            yield from self._admit(places, early, copies, command.stop_on_error, admitted)
        finally:
            exported: dict[int, list[int]] = {}
            for copy in (copy for parts in copies.values() for copy in parts):
                exported.setdefault(copy.source, []).append(copy.export.export_id)
            if exported:
                yield [Ask(source, m.Acknowledge(ids)) for source, ids in exported.items()]
        yield from self._admit(places, late, copies, command.stop_on_error, admitted)
        self._forget([places[i].view.request_id for i in todo if places[i].claim and admitted[i].moved is None])
        return m.PlaceDone(replicas, [admitted[i] for i in range(len(places))])

    def _admit(
        self,
        places: Sequence[m.Place],
        groups: dict[int, list[int]],
        copies: dict[int, list[_Copy]],
        stop_on_error: bool,
        admitted: dict[int, m.Admitted],
    ) -> Generator[list[Ask], list[Told], None]:
        """Admit groups of places, one message per replica; the outcomes go into `admitted`."""
        if groups:
            answers = yield [self._admission(r, places, group, copies, stop_on_error) for r, group in groups.items()]
            for group, told in zip(groups.values(), answers, strict=True):
                if isinstance(told.result, m.AdmitDone):
                    admitted.update(zip(group, told.result.admitted, strict=True))
                elif isinstance(told.result, m.Failure):
                    admitted.update((i, m.Admitted(failure=told.result)) for i in group)

    def _choose(self, client: str, place: m.Place) -> int:
        replica = place.replica
        if replica < 0:
            replica = self._router.choose(place.length, self.placements.loads)
        self._check_index(replica)
        if place.claim:
            self._add(client, place.view.request_id, replica, place.length)
        return replica

    def _fetch(
        self, places: Sequence[m.Place], replicas: Sequence[int], wanted: Sequence[int]
    ) -> Generator[list[Ask], list[Told], dict[int, list[_Copy]]]:
        """Have the prefixes that a chosen replica misses exported by others: place -> copies, in order."""
        copies: dict[int, list[_Copy]] = {}
        if not wanted or not self._copies:
            return copies
        views = [places[i].view for i in wanted]
        answers = yield [Ask(r, m.Lookup(views)) for r in range(len(self.epochs))]
        found = [told.result if isinstance(told.result, m.Found) else None for told in answers]
        exports: list[tuple[int, Ask]] = []
        known: set[tuple[Any, ...]] = set()
        for at, i in enumerate(wanted):
            target = found[replicas[i]]
            if target is not None:
                resident = [0 if f is None or r == replicas[i] else f.resident[at] for r, f in enumerate(found)]
                for span in copy_spans(target.resident[at], resident, target.reusable[at]):
                    coming = (replicas[i], span, self._prefix(places[i].view, span.stop))
                    if coming not in known:  # else an earlier request of this batch brings these pages
                        known.add(coming)
                        command = m.Export(places[i].view, span.start, span.stop)
                        exports.append((i, Ask(span.replica, command, with_data=True)))
        if exports:
            answers = yield [ask for _, ask in exports]
            for (i, ask), told in zip(exports, answers, strict=True):
                if isinstance(told.result, m.Exported):
                    copies.setdefault(i, []).append(_Copy(ask.replica, told.result, told.data))
        return copies

    def _prefix(self, view: m.ContextView, pages: int) -> tuple[Any, ...]:
        """What makes the first pages of a request what they are."""
        origin = view.origin
        owner = (origin.cache_salt, origin.adapter) if origin is not None else None
        return owner, view.tokens[: pages * self._page_size * 4]

    def _admission(
        self,
        replica: int,
        places: Sequence[m.Place],
        group: Sequence[int],
        copies: dict[int, list[_Copy]],
        stop_on_error: bool,
    ) -> Ask:
        """One message that admits all of `group` on `replica`."""
        wants: list[m.Want] = []
        heads: list[m.ImportHead] = []
        data: list[Any] = []
        for i in group:
            parts = copies.get(i, [])
            wants.append(m.Want(places[i].view, places[i].claim, list(range(len(heads), len(heads) + len(parts)))))
            heads += [m.ImportHead(c.export.start, c.export.hashes) for c in parts]
            data += [c.data for c in parts]
        return Ask(replica, m.Admit(wants, heads, stop_on_error), tuple(data))

    # -- all replicas ------------------------------------------------------------------------------

    def _hit_counts(self, view: m.ContextView) -> Script:
        answers = yield [Ask(r, m.Lookup([view])) for r in range(len(self.epochs))]
        for told in answers:
            if not isinstance(told.result, m.Found):
                return told.result
        return m.Counts([told.result.resident[0] for told in answers if isinstance(told.result, m.Found)])

    def _every(self, command: Any) -> Script:
        answers = yield [Ask(r, command) for r in range(len(self.epochs))]
        total = KVCacheMetrics()
        for told in answers:
            if isinstance(told.result, m.Failure):
                return told.result
            if isinstance(told.result, m.MetricsDone):
                total += told.result.metrics
        return m.MetricsDone(total) if isinstance(command, m.GetMetrics) else m.Done()

    # -- drivers -----------------------------------------------------------------------------------

    def _connect(self, client: str, lease: float | None) -> Script:
        if lease is not None:
            self._leases[client], self.renewed[client] = lease, self._clock()
        yield []
        return m.Done()

    def _expire(self) -> Generator[list[Ask], list[Told], None]:
        """Release the requests of drivers that did not renew their lease."""
        now = self._clock()
        for client, seconds in self._leases.items():
            if client not in self._silent and self.renewed[client] + seconds < now:
                self._silent.add(client)
                yield from self._release_all(client)

    def _leave(self, client: str) -> Script:
        self._leases.pop(client, None)
        self.renewed.pop(client, None)
        self._silent.discard(client)
        yield from self._release_all(client)
        return m.Done()

    def _release_all(self, client: str) -> Generator[list[Ask], list[Told], None]:
        """Release what a driver has claimed."""
        mine = [request_id for request_id, owner in self._owners.items() if owner == client]
        by_replica: dict[int, list[str]] = {}
        for request_id in mine:
            holder = self.placements.holder(request_id)
            if holder is not None:
                by_replica.setdefault(holder, []).append(request_id)
        if by_replica:
            yield [Ask(r, m.Release(ids, missing_ok=True)) for r, ids in by_replica.items()]
        self._forget(mine)

    def _describe(self) -> Script:
        loads = self.placements.loads
        yield []
        return m.Description(self.epochs, [x.requests for x in loads], [x.tokens for x in loads], len(self._leases))
