"""Moving the requests of a replica that drains to others, as rounds of questions. Nothing acknowledged is lost.

The source goes on serving a request until another replica has it: contexts are read, targets are chosen by the router,
prefixes are copied and pages allocated there as for any admission, and only then the source is told to release. A
driver that says a release to the source meanwhile has it said to the target, too. What was computed at the source after
the last full page is not copied: the next alloc of the request moves its window back to what was.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial

import numpy as np

from rayk import protocol as m
from rayk.protocol.columns import AdmitResults, ContextRows, rows_of
from rayk.scheduler.membership import Membership
from rayk.scheduler.placer import Owner, Placer, released
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.script import ReplicaCall, ReplicaReply

ATTEMPTS = 4  # replicas that are tried for a request
Claims = Mapping[str, Owner]  # request -> whose claim is moved
Left = dict[str, str]  # request -> why it is still there


class Handover:
    """Hands over what `placer` has placed on one of the `members`."""

    def __init__(self, placer: Placer, members: Membership) -> None:
        self._placer = placer
        self._members = members

    def run(self, replica: int) -> Generator[list[ReplicaCall], list[ReplicaReply], tuple[dict[str, int], Left]]:
        """Where each request of the replica went, and why the others could not go."""
        placer = self._placer
        ids = placer.on(replica)
        moved: dict[str, int] = {}
        if not ids:
            return moved, {}
        claims = dict(zip(ids, placer.owners_of(ids), strict=True))
        generations = [generation for _, generation in claims.values()]
        [told] = yield [ReplicaCall(replica, m.GetContexts(ids, generations))]
        if not isinstance(told.result, m.ContextsDone):
            why = str(m.to_error(told.result)) if isinstance(told.result, m.Failure) else "it cannot be read"
            return moved, dict.fromkeys(ids, why)
        found = told.result
        left: Left = {}
        for request_ids, dummy in ((found.bare, False), (found.dummies, True)):
            yield from self._move_claims(replica, {i: claims[i] for i in request_ids}, dummy, moved, left)
        yield from self._move(replica, rows_of(found.contexts), claims, moved, left)
        if moved:
            self._members.touch()
        return moved, left

    def _choose(self, request_id: str, wish: RouteRequest, tried: set[int]) -> int:
        """Count the request at another ready replica that was not tried; -1 when there is none."""
        placer, ready = self._placer, [r for r in self._members.ready if r not in tried]
        if not ready:
            return -1
        open_ = np.zeros(len(self._members), np.bool_)
        open_[ready] = True
        placer.router.remove(request_id)
        target = placer.router.choose(request_id, wish, open_)
        placer.router.place(request_id, target, wish)
        tried.add(target)
        return target

    def _restore(self, replica: int, request_id: str, wish: RouteRequest) -> None:
        """Count it where it is again."""
        router = self._placer.router
        router.remove(request_id)
        if self._placer.holder(request_id) == replica:
            router.place(request_id, replica, wish)
            router.answered(replica, (request_id,))

    def _move_claims(
        self, replica: int, claims: Claims, dummy: bool, moved: dict[str, int], left: Left
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], None]:
        """Requests that have no pages."""
        wish = RouteRequest(0)
        targets = {i: self._choose(i, wish, set()) for i in claims}
        going = {i: target for i, target in targets.items() if target >= 0}
        answers = yield [ReplicaCall(target, m.Claim(i, dummy, *claims[i])) for i, target in going.items()]
        gone = {}
        for (request_id, target), told in zip(going.items(), answers, strict=True):
            self._placer.router.answered(target, (request_id,))
            if isinstance(told.result, m.Failure):
                left[request_id] = str(m.to_error(told.result))
                self._restore(replica, request_id, wish)
            else:
                gone[request_id] = (target, 0)
        left.update((i, "no other replica takes requests") for i, target in targets.items() if target < 0)
        yield from self._release_at_source(replica, gone, claims, moved)

    def _move(
        self, replica: int, batch: ContextRows, claims: Claims, moved: dict[str, int], left: Left
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], None]:
        """Requests that have pages: other replicas are tried until one has room."""
        placer, due = self._placer, list(range(len(batch.ids)))
        tried: dict[int, set[int]] = {row: set() for row in due}
        rate, owners = placer.prefill_rate, [claims[i] for i in batch.ids]
        command = m.PlaceMany(batch.contexts, claim=True, peers=True, handed=True, prefill_rate=rate)
        for _ in range(ATTEMPTS):
            groups: dict[int, list[int]] = {}
            again: list[int] = []
            for row in due:
                target = self._choose(batch.ids[row], self._placer.wish(batch, row), tried[row])
                if target >= 0:
                    groups.setdefault(target, []).append(row)
                else:
                    left.setdefault(batch.ids[row], "no other replica takes requests")
            outcomes = AdmitResults(len(batch.ids))
            if groups:
                yield from placer.carry_out(batch, command, owners, dict(sorted(groups.items())), set(), outcomes)
            gone: dict[str, tuple[int, int]] = {}
            for target, rows in groups.items():
                for row in rows:
                    request_id = batch.ids[row]
                    if outcomes.numbers[row, 0] >= 0:
                        gone[request_id] = (target, batch.lengths[row])
                        left.pop(request_id, None)
                    else:
                        failure = outcomes.failures.get(row)
                        left[request_id] = str(m.to_error(failure)) if failure is not None else "it was not tried"
                        again.append(row)
            yield from self._release_at_source(replica, gone, claims, moved)
            due = again
            if not due:
                break
        for request_id in left:
            if request_id in batch.ids:
                self._restore(replica, request_id, self._placer.wish(batch, batch.ids.index(request_id)))

    def _release_at_source(
        self, replica: int, gone: dict[str, tuple[int, int]], claims: Claims, moved: dict[str, int]
    ) -> Generator[list[ReplicaCall], list[ReplicaReply], None]:
        """Those are at other replicas now: from here on they are there, unless they were released meanwhile. Only the
        claims that were moved are let go of: by now an id may be claimed again."""
        if not gone:
            return
        placer = self._placer
        same = [i for i, owner in zip(gone, placer.owners_of(gone), strict=True) if owner is claims[i]]
        known = [i for i in same if placer.holder(i) == replica]
        for request_id in known:
            target, tokens = gone[request_id]
            placer.move(request_id, target, tokens)
        orders = released({i: claims[i][1] for i in gone})
        targets = {i: target for i, (target, _) in gone.items()}
        [told] = yield [ReplicaCall(replica, orders, late=partial(self._orphaned, targets, claims))]
        missing = set(told.result.request_ids) if isinstance(told.result, m.Missing) else set()
        missing |= set(gone) - set(known)
        orphans: dict[int, dict[str, int]] = {}
        for request_id in missing:
            orphans.setdefault(gone[request_id][0], {})[request_id] = claims[request_id][1]
        if orphans:
            yield [ReplicaCall(target, released(lost)) for target, lost in orphans.items()]
            for request_id in missing:
                if placer.holder(request_id) in (None, gone[request_id][0]):
                    placer.forget_of(claims[request_id], [request_id])
        moved.update((i, target) for i, (target, _) in gone.items() if i not in missing)

    def _orphaned(self, targets: dict[str, int], claims: Claims, result: m.Result) -> list[ReplicaCall]:
        """A silent source answers at last: what its drivers had released there is at others."""
        orphans: dict[int, dict[str, int]] = {}
        for request_id in result.request_ids if isinstance(result, m.Missing) else ():
            if self._placer.holder(request_id) in (None, targets[request_id]):
                self._placer.forget_of(claims[request_id], [request_id])
                orphans.setdefault(targets[request_id], {})[request_id] = claims[request_id][1]
        return [ReplicaCall(target, released(lost)) for target, lost in orphans.items()]
