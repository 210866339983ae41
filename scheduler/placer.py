"""Placing requests: who has which, and the rounds that route, claim, copy prefixes and allocate a batch.

The books are soft: replicas own the truth about claims, so a placement that surprises is checked with its
replica before it is believed.

Replicas never call each other or the scheduler. A page copy is three rounds of the scheduler's (lookup, export, admit),
see rayk.scheduler.transfers.transfer; in none of them does a replica wait for another's thread, so copies in both
directions at once cannot block each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from msgspec import structs

from rayk import protocol as m
from rayk.errors import (
    AlreadyClaimedError,
    CallTimeoutError,
    LeaseLostError,
    MessageError,
    NoReplicaError,
    NotClaimedError,
    RaykError,
    ReplicaLostError,
)
from rayk.kvcache.page_hash import KEY_BYTES, split_keys
from rayk.protocol.columns import BASE, PENDING, SENT, AdmitResults, ContextRows, PackedContexts, rows_of
from rayk.scheduler.membership import Membership
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import Router
from rayk.scheduler.script import Part, ReplicaCall, Script
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import Copies, ExportedSpan, Groups, PageTransfers, distinct

Owner = tuple[str, int]  # a client, and the generation of its claim: which script of all that made it


NOBODY: Owner = ("", 0)


def released(claims: Mapping[str, int]) -> m.Release:
    """The order to release those claims, by id and generation, as far as they are there."""
    return m.Release(list(claims), True, list(claims.values()))


class Placer:
    """The placements of all drivers on the `members`. `copies`: prefixes are copied between them, over `links`."""

    def __init__(
        self,
        members: Membership,
        router: Router,
        copies: bool,
        page_size: int,
        links: LinkTable,
        clock: Callable[[], float],
    ) -> None:
        self.router = router
        self._placed: dict[str, tuple[int, int]] = {}  # request -> replica and tokens, from the moment it is chosen
        self._owners: dict[str, Owner] = {}  # request -> who placed it
        self.generations = itertools.count(1)  # of claims
        self.gone: Callable[[Sequence[str]], None] | None = None
        """Told of requests that have no place any more."""
        self._members = members
        self._copies = copies
        self._page_size = page_size
        self.transfers = PageTransfers(links, page_size)
        self.prefill_rate: float | None = None
        """Tokens a second of a replica, as the last driver that had something placed knew it."""
        self._clock = clock

    # -- the books -------------------------------------------------------------------------------

    @property
    def joined(self) -> int:
        """The version of the members in which the last one came."""
        return self._members.joined

    def owner(self, client: str) -> Owner:
        """A new script's name for what it places for that client."""
        return client, next(self.generations)

    def holder(self, request_id: str) -> int | None:
        """The replica that has the request, or None."""
        placed = self._placed.get(request_id)
        return placed[0] if placed is not None else None

    def on(self, replica: int) -> list[str]:
        """The requests placed on a replica."""
        return [request_id for request_id, (r, _) in self._placed.items() if r == replica]

    def counts(self) -> tuple[list[int], list[int]]:
        """Requests placed on each replica, and their tokens."""
        requests, tokens = [0] * len(self._members), [0] * len(self._members)
        for replica, length in self._placed.values():
            requests[replica] += 1
            tokens[replica] += length
        return requests, tokens

    def put(self, request_id: str, replica: int, tokens: int = 0) -> None:
        """Give a request its place, of which the router is not told; AlreadyClaimedError when it has one."""
        placed = self._placed.get(request_id)
        if placed is not None:
            raise AlreadyClaimedError(request_id, placed[0])
        self._placed[request_id] = (replica, tokens)

    def move(self, request_id: str, replica: int, tokens: int) -> None:
        """A request that has a place has it there now; the router knows."""
        self._placed[request_id] = (replica, tokens)

    def add(self, owner: Owner, request_id: str, replica: int, wish: RouteRequest) -> None:
        """Place a request; AlreadyClaimedError when it has a place."""
        self.put(request_id, replica, wish.tokens)
        self.router.place(request_id, replica, wish)
        self._owners[request_id] = owner

    def adopt(self, owner: Owner, request_id: str, replica: int) -> None:
        """Know whose a claim is that was made on its replica directly, and count it there."""
        if request_id not in self._owners:
            self.router.place(request_id, replica, RouteRequest(0))
            self._owners[request_id] = owner

    def forget(self, request_ids: Sequence[str]) -> None:
        """Those requests have no place any more; unknown ones are ignored."""
        if self.gone is not None:
            self.gone(request_ids)
        for request_id in request_ids:
            self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """forget() of one request, of which nobody has to be told."""
        self._placed.pop(request_id, None)
        self.router.remove(request_id)
        self._owners.pop(request_id, None)

    def forget_of(self, owner: Owner, request_ids: Iterable[str]) -> None:
        """What one script placed; another may have found the id free and placed it meanwhile."""
        self.forget([i for i in request_ids if self._owners.get(i) is owner])

    def forget_released(self, released: Mapping[str, int]) -> None:
        """Claims that a driver released on replicas itself; by now the id may be claimed again, by it or another."""
        owners = self._owners
        self.forget([i for i, generation in released.items() if i in owners and owners[i][1] == generation])

    def owners_of(self, request_ids: Iterable[str]) -> list[Owner]:
        """Whose claims those are, in the books; of ids that have no place, nobody's."""
        return [self._owners.get(i, NOBODY) for i in request_ids]

    def verify(self, request_ids: Sequence[str]) -> Part:
        """Forget those of `request_ids` that their replica does not have any more: released there directly, or lost
        with it."""
        owners = self._owners
        known = [(i, owners[i], self.holder(i)) for i in request_ids if i in owners]
        if known:
            answers = yield [ReplicaCall(r, m.Blocks(request_id)) for request_id, _, r in known if r is not None]
            for (request_id, owner, _), told in zip(known, answers, strict=True):
                result = told.result
                if isinstance(result, m.BlocksDone):
                    gone = not result.claimed or result.generation not in (0, owner[1])
                else:
                    gone = isinstance(result, m.Failure) and isinstance(m.to_error(result), ReplicaLostError)
                if gone:
                    self.forget_of(owner, [request_id])

    def located(self, client: str, request_ids: Sequence[str]) -> list[int]:
        """Where requests of `client` are, -1 for those that are not its."""
        owners, holder = self._owners, self.holder
        found = [holder(i) if i in owners and owners[i][0] == client else None for i in request_ids]
        return [-1 if replica is None else replica for replica in found]

    def owned_by(self, client: str) -> dict[str, Owner]:
        """The claims of a driver, in the books."""
        return {i: owner for i, owner in self._owners.items() if owner[0] == client}

    def release_all(self, client: str) -> Part:
        """Release what a driver has claimed."""
        yield from self.take_back({i: owner for i, owner in self._owners.items() if owner[0] == client})

    def take_back(self, claims: Mapping[str, Owner]) -> Part:
        """Release those claims, as far as they are still there: of a driver that left, or of a call that was
        interrupted."""
        by_replica: dict[int, dict[str, int]] = {}
        for request_id, owner in claims.items():
            holder = self.holder(request_id) if self._owners.get(request_id) is owner else None
            if holder is not None:
                by_replica.setdefault(holder, {})[request_id] = owner[1]
        if by_replica:
            yield [ReplicaCall(r, released(generations)) for r, generations in by_replica.items()]
        self.forget([i for i, owner in claims.items() if self._owners.get(i) is owner])

    # -- placing ---------------------------------------------------------------------------------

    def choose(self, request_id: str, wish: RouteRequest) -> int:
        """The replica of a new request, by the router."""
        replica = self.router.choose(request_id, wish)
        if replica < 0:
            raise NoReplicaError(request_id)
        return replica

    def wish(self, batch: ContextRows, row: int, keys: Sequence[int] | None = None) -> RouteRequest:
        """What the router goes by; `keys` where they were sent, and are not to be made here."""
        return RouteRequest(
            batch.lengths[row], self.keys(batch, row) if keys is None else keys, batch.traits(row).session_id
        )

    def claim(self, client: str, command: m.ClaimOne) -> Script:
        """Claim one request where the driver says."""
        self.forget_released(command.released)
        self._members.check_takes(command.replica)
        yield from self.verify([command.request_id])
        owner = self.owner(client)
        self.add(owner, command.request_id, command.replica, RouteRequest(0))
        [told] = yield [ReplicaCall(command.replica, m.Claim(command.request_id, command.dummy, *owner))]
        if isinstance(told.result, m.Failure):
            self.forget_of(owner, [command.request_id])
            return told.result
        return m.Claimed(owner[1])

    def place_many(self, client: str, command: m.PlaceMany, again: bool = False) -> Script:
        """Route, claim and allocate a batch: one message to each replica that gets something. What went to one that did
        not answer goes to another, once, unless its driver named the replica."""
        self.forget_released(command.released)
        self.prefill_rate = command.prefill_rate
        batch = rows_of(command.contexts)
        if command.replicas and len(command.replicas) != len(batch.ids):
            raise MessageError(f"{len(command.replicas)} replica(s) were named for {len(batch.ids)} request(s)")
        if len(command.generations) not in (0, len(batch.ids)):
            raise MessageError(f"{len(command.generations)} generation(s) came for {len(batch.ids)} request(s)")
        if command.claim:
            yield from self.verify(batch.ids)
        yield from self.catch_up(command.seen, command.unfilled, command.joined)
        outcomes, owner = AdmitResults(len(batch.ids)), self.owner(client)
        claims = [owner] * len(batch.ids)
        if not command.claim:
            claims = [(client, generation) for generation in command.generations or [0] * len(batch.ids)]
        replicas, groups, unshared = self._choose(claims, batch, command, outcomes)
        yield from self.carry_out(batch, command, claims, groups, unshared, outcomes)
        if command.claim and (refused := set(outcomes.refused)):
            self.forget_of(owner, [batch.ids[i] for rows in groups.values() for i in rows if i in refused])
            rows = [] if again or command.replicas else self._unanswered(command, outcomes)
            if rows:
                rest = structs.replace(command, contexts=batch.part(rows), released={}, seen=[], unfilled=[], keys=b"")
                done = yield from self.place_many(client, rest, again=True)
                assert isinstance(done, m.PlaceDone)
                for at, i in enumerate(rows):
                    outcomes.failures.pop(i, None)
                    replicas[i], claims[i] = done.replicas[at], (client, done.generations[at])
                outcomes.put(rows, m.AdmitDone(done.numbers, done.seconds, done.failures))
        return m.PlaceDone(replicas, *outcomes.columns, [g for _, g in claims] if command.claim else [])

    def _unanswered(self, command: m.PlaceMany, outcomes: AdmitResults) -> list[int]:
        """Rows whose replica did not answer, with those that were not tried because of that."""
        late = {i for i, failed in outcomes.failures.items() if failed.kind == CallTimeoutError.__name__}
        if not late or not self._members.ready or (command.stop_on_error and len(late) < len(outcomes.failures)):
            return []
        return [i for i in outcomes.refused if i in late or i not in outcomes.failures]

    def carry_out(
        self,
        batch: ContextRows,
        command: m.PlaceMany,
        claims: Sequence[Owner],
        groups: Groups,
        unshared: set[int],
        outcomes: AdmitResults,
        found: Mapping[int, m.Found] | None = None,
    ) -> Part:
        """Copy, claim and allocate what was placed; what became of each row goes into `outcomes`. The claim of row i is
        `claims[i]`. No other replica has more of the prefixes of the `unshared` rows; `found` as in
        PageTransfers.fetch()."""
        copies: Copies = {}
        if command.peers and self._copies and len(self._members.here) > 1:
            here, rate = self._members.here, command.prefill_rate
            copies = yield from self.transfers.fetch(batch, groups, unshared, here, rate, found)
        broken: list[ExportedSpan] = []
        try:
            # A source that receives no copy itself waits until its pages are unpinned: they may be all it can give.
            sources = {copy.source.replica for parts in copies.values() for copy in parts}
            late = {r: rows for r, rows in groups.items() if r in sources and not any(i in copies for i in rows)}
            early = {r: rows for r, rows in groups.items() if r not in late}
            yield from self._admit(batch, command, claims, early, copies, outcomes, broken)
        finally:
            if copies:
                yield from self.transfers.acknowledge(copies, broken)
        yield from self._admit(batch, command, claims, late, copies, outcomes, broken)

    def catch_up(self, seen: Sequence[int], unfilled: Sequence[int], joined: int) -> Part:
        """What a driver was told is done counts in the choice, so it has to be known here: which pages are cached is
        asked for, and only where the router goes by it."""
        router = self.router
        if joined != self._members.joined:
            return  # numbers of replicas that were there before
        behind = router.stale_replicas(seen)
        if behind and router.keys is not None:
            yield [ReplicaCall(r, m.GetCacheDelta()) for r in behind]
        elif len(unfilled) == len(seen):
            for r in behind:
                router.report(r, unfilled[r], seen[r])

    def _choose(
        self, claims: Sequence[Owner], batch: ContextRows, command: m.PlaceMany, outcomes: AdmitResults
    ) -> tuple[list[int], Groups, set[int]]:
        """The replica of each request, which counts there from now on; -1 for what is refused. The set holds the rows
        of whose prefix no other replica has more."""
        replicas, groups, unshared = [-1] * len(batch.ids), Groups(), set[int]()
        router, wanted = self.router, command.replicas
        copies = command.peers and self._copies
        keyed = router.keys is not None and (command.claim or copies or not wanted)
        all_keys = self.sent_keys(batch, command.keys) if keyed else [()] * len(batch.ids)
        lengths, traits = batch.lengths, batch.traits
        for i, request_id in enumerate(batch.ids):
            keys = all_keys[i] if all_keys is not None else self.keys(batch, i)
            wish = RouteRequest(lengths[i], keys, traits(i).session_id)
            try:
                replica = replicas[i] = wanted[i] if wanted else self.choose(request_id, wish)
                if not command.claim:
                    self._check(request_id, replica, claims[i])
                else:
                    self._members.check_takes(replica)
                    self.add(claims[i], request_id, replica, wish)
                if copies and keyed and not router.held_elsewhere(replica, keys):
                    unshared.add(i)
                groups.setdefault(replica, []).append(i)
            except RaykError as error:
                outcomes.failures[i] = m.failure(error)
                if command.stop_on_error:
                    break
        return replicas, dict(sorted(groups.items())), unshared

    def _check(self, request_id: str, replica: int, claim: Owner) -> None:
        """Whether the `claim` of a request is on the replica that its driver names."""
        self._members.check(replica)
        holder, owner = self.holder(request_id), self._owners.get(request_id)
        if owner is not None and owner != claim:
            raise LeaseLostError(request_id, replica, -1 if holder is None else holder, *claim, *owner)
        if holder is not None and holder != replica:
            raise NotClaimedError(request_id, replica, holder)

    def sent_keys(self, batch: ContextRows, joined: bytes) -> Sequence[Sequence[int]] | None:
        """What the router knows the pages of each request by, as its driver sent it; None if it sent nothing."""
        if not joined or not isinstance(batch, PackedContexts):
            return None
        base, sent, pending = (batch.numbers[:, column] for column in (BASE, SENT, PENDING))
        pages = np.where(base > 0, 0, np.maximum(sent - np.maximum(pending, 1), 0) // self._page_size)
        stops: list[int] = np.cumsum(pages).tolist()
        total = stops[-1] if stops else 0
        if len(joined) != KEY_BYTES * total:
            raise MessageError(
                f"{len(joined)} bytes are not the keys of the {total} pages of {len(batch.ids)} request(s)"
            )
        keys = split_keys(joined)
        return [keys[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]

    def keys(self, batch: ContextRows, row: int) -> Sequence[int]:
        """The same of one request for which nothing was sent, made here: its driver did not know yet that there is a
        choice, or a replica hands it over."""
        make, traits = self.router.keys, batch.traits(row)
        if make is None or batch.rows[row][BASE]:  # there is no choice, or it was made: only its replica has the start
            return []
        return make.of(batch.tokens(row), (traits.cache_salt, traits.adapter), batch.rows[row][PENDING])

    def _admit(
        self,
        batch: ContextRows,
        command: m.PlaceMany,
        claims: Sequence[Owner],
        groups: Groups,
        copies: Copies,
        outcomes: AdmitResults,
        broken: list[ExportedSpan],
    ) -> Part:
        """Admit groups of rows, one message per replica; what became of them goes into `outcomes`, and copies whose
        link did not carry them into `broken`."""
        if groups:
            began = self._clock() if copies else 0.0
            answers = yield [self._admission(r, batch, command, claims, rows, copies) for r, rows in groups.items()]
            took = self._clock() - began if copies else 0.0
            for (replica, rows), told in zip(groups.items(), answers, strict=True):
                self.router.answered(replica, [batch.ids[i] for i in rows])
                if isinstance(told.result, m.AdmitDone):
                    outcomes.put(rows, told.result)
                    if told.result.arrivals:
                        parts = distinct(copies.get(i, ()) for i in rows)
                        busy = float(np.frombuffer(told.result.seconds).sum())  # claiming and allocating
                        broken += self.transfers.arrived(parts, told.result.arrivals, took - busy)
                elif isinstance(told.result, m.Failure):
                    outcomes.failures.update((i, told.result) for i in rows)

    def _admission(
        self,
        replica: int,
        batch: ContextRows,
        command: m.PlaceMany,
        claims: Sequence[Owner],
        rows: Sequence[int],
        copies: Copies,
    ) -> ReplicaCall:
        imports, uses, data = self.transfers.import_descriptors([copies.get(i, []) for i in rows] if copies else ())
        part = batch.part(rows)
        mine = dict.fromkeys(claims[i] for i in rows)
        whose = zip(*(mine if len(mine) == 1 else [claims[i] for i in rows]), strict=True)
        how = (command.claim, imports, uses, command.stop_on_error, command.handed)
        admit = m.Admit(part, *how, *map(list, whose))
        return ReplicaCall(replica, admit, tuple(data))
