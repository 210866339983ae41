"""The scripts by which requests wait at the scheduler, and are placed when it is their turn.

An Enter is answered at once with what is known by then: no script waits for room, so that waiting takes none of the
actor's lanes. Every Enter also lets in whoever's turn it is, whoever's message it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rayk import protocol as m
from rayk.errors import (
    AlreadyClaimedError,
    CallTimeoutError,
    InsufficientBlocksError,
    OverloadedError,
    RaykError,
    ReplicaLostError,
)
from rayk.protocol.columns import MAX_LENGTH, AdmitResults, ContextRows, joined, rows_of
from rayk.scheduler.admission.controller import AdmissionController, AdmissionOutcome, Admitted, QueuedRequest
from rayk.scheduler.admission.queue import SOONEST
from rayk.scheduler.placer import Owner, Placer
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.script import Part, Script

MOST_AT_ONCE = 256  # requests that one script lets in


class AdmissionScripts:
    """Lets the requests of `controller` in through `placer`."""

    def __init__(self, placer: Placer, controller: AdmissionController) -> None:
        self._placer = placer
        self._controller = controller
        placer.gone = controller.on_release

    def enter(self, client: str, command: m.Enter) -> Script:
        """Take offers and news from a driver, let in who may, and say what became of the driver's requests."""
        placer, controller = self._placer, self._controller
        placer.forget_released(command.released)
        if command.contexts.ids:
            placer.prefill_rate = command.prefill_rate
        controller.watermarks.reports(command.turns, command.used)
        controller.give_up(client, command.given_up)
        batch = rows_of(command.contexts)
        keys = placer.sent_keys(batch, command.keys)
        # With a queue the replicas' answers to what is let in bring all news; without one, what the driver saw counts.
        calm = not len(controller.queue)
        if len(batch.ids):
            yield from placer.verify(batch.ids)
            if calm:
                yield from placer.catch_up(command.seen, command.unfilled, command.joined)
        if command.joined == placer.joined:  # else they may be of replicas that were there before
            placer.router.reports(command.seen, command.unfilled)
        placed: list[tuple[Admitted, Owner]] = []
        try:
            for row in range(len(batch.ids)):
                self._let_in(placed)  # only what finds no room waits, and counts as waiting for those behind it
                self._offer(client, batch, row, keys[row] if keys is not None else None)
            controller.expire()
            self._let_in(placed)
        except BaseException:  # interrupted, in the process of a driver: those wait again
            self._settle(placed, AdmitResults(len(placed)))
            raise
        if placed:
            yield from self._place(placed, command.peers)
        return self._answer(client) if command.hear else m.Done()

    def _offer(self, client: str, batch: ContextRows, row: int, keys: Sequence[int] | None) -> None:
        request_id, controller = batch.ids[row], self._controller
        holder = self._placer.holder(request_id)
        if holder is not None:
            controller.reject(
                client, AdmissionOutcome(request_id, holder, None, AlreadyClaimedError(request_id, holder))
            )
        else:  # it may wait for long: without the others of its message
            own = rows_of(batch.part([row]))
            queued = QueuedRequest(client, partial(self._wish, own, keys), own.contexts)
            length = own.lengths[0]
            controller.offer(queued, request_id, length, own.rows[0][MAX_LENGTH] - length, own.traits(0))

    def _wish(self, own: ContextRows, keys: Sequence[int] | None) -> RouteRequest:
        """`keys` as sent; whether any are wanted may change while the request waits."""
        return self._placer.wish(own, 0, keys if self._placer.router.keys is not None else None)

    def _let_in(self, placed: list[tuple[Admitted, Owner]]) -> None:
        """Choose replicas for those whose turn it is."""
        controller, placer = self._controller, self._placer
        while len(placed) < MOST_AT_ONCE and (admitted := controller.next()) is not None:
            owner = placer.owner(admitted.queued.client)
            try:
                placer.add(owner, admitted.ticket.request_id, admitted.replica, admitted.wish)
                placed.append((admitted, owner))
            except RaykError as error:  # claimed meanwhile, by another driver or past the queue
                controller.answered(admitted)
                controller.failed(admitted, error)

    def _place(self, placed: list[tuple[Admitted, Owner]], peers: bool) -> Part:
        """Claim and allocate them; what became of each is settled when the replicas have answered."""
        placer, router = self._placer, self._placer.router
        batch = rows_of(joined([admitted.queued.what for admitted, _ in placed]))
        groups: dict[int, list[int]] = {}
        for row, (admitted, _) in enumerate(placed):
            groups.setdefault(admitted.replica, []).append(row)
        unshared = {
            i
            for i, (e, _) in enumerate(placed)
            if peers and router.keys is not None and not router.held_elsewhere(e.replica, e.wish.keys)
        }
        outcomes = AdmitResults(len(batch.ids))
        command = m.PlaceMany(batch.contexts, claim=True, peers=peers, prefill_rate=placer.prefill_rate)
        try:
            claims = [owner for _, owner in placed]
            yield from placer.carry_out(batch, command, claims, dict(sorted(groups.items())), unshared, outcomes)
        except GeneratorExit:
            raise
        except BaseException:
            yield from placer.take_back({admitted.ticket.request_id: owner for admitted, owner in placed})
            raise
        finally:
            self._settle(placed, outcomes)

    def _settle(self, placed: Sequence[tuple[Admitted, Owner]], outcomes: AdmitResults) -> None:
        for row, (admitted, owner) in enumerate(placed):
            self._settle_one(admitted, owner, outcomes, row)

    def _settle_one(self, admitted: Admitted, owner: Owner, outcomes: AdmitResults, row: int) -> None:
        controller, ticket = self._controller, admitted.ticket
        controller.answered(admitted)
        if outcomes.numbers[row, 0] >= 0:
            controller.placed(admitted, (outcomes.numbers[row].tobytes(), outcomes.seconds[row].tobytes(), owner[1]))
            return
        error = m.to_error(outcomes.failures[row]) if row in outcomes.failures else None
        full = isinstance(error, InsufficientBlocksError) and error.needed <= error.total
        if error is None or full or isinstance(error, (ReplicaLostError, CallTimeoutError)):
            controller.refused(admitted, error or OverloadedError(ticket.request_id, "its driver is gone", SOONEST))
        else:
            controller.failed(admitted, error)
        self._placer.forget_of(owner, [ticket.request_id])

    def _answer(self, client: str) -> m.EnterDone:
        fates, left = self._controller.settled(client)
        nothing = AdmitResults(1)
        refused = (nothing.numbers.tobytes(), nothing.seconds.tobytes(), 0)
        rows = [fate.outcome if fate.outcome is not None else refused for fate in fates]
        failures = {i: m.failure(fate.error) for i, fate in enumerate(fates) if fate.error is not None}
        return m.EnterDone(
            [fate.request_id for fate in fates],
            [fate.replica for fate in fates],
            b"".join([numbers for numbers, _, _ in rows]),
            b"".join([seconds for _, seconds, _ in rows]),
            failures,
            left,
            [generation for _, _, generation in rows],
        )
