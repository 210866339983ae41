"""What a driver says to place its requests and to end them: claim, alloc, admissions, offers, and releases.

What places a request goes through the scheduler; releases go straight to the replicas, and the scheduler is told of
them with the next message. A caller that is interrupted, or waits for too long, leaves nothing placed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from rayk import protocol as m
from rayk.actors.channel import Pending
from rayk.actors.deployment import Deployment
from rayk.actors.interface import Runtime
from rayk.context import TextContext
from rayk.errors import (
    AlreadyClaimedError,
    CallTimeoutError,
    LeaseLostError,
    NotClaimedError,
    OverloadedError,
    RaykError,
    StaleContextError,
    TokenError,
    UnsendableError,
    cannot_be_sent,
)
from rayk.kvcache.tick import Admission, Settled, placed
from rayk.manager.cluster_view import ClusterView, Script, current, result_of, wait_for
from rayk.protocol.columns import AdmitResults
from rayk.scheduler.admission.queue import SOONEST
from rayk.values import checked_request_id

UNSENT = (TokenError, UnsendableError)  # of rayk's errors, those of what cannot be written as a message
FORGOTTEN = "its driver was silent for longer than its lease"
MOST_TOGETHER = 1024  # requests of one message: about 30 ms of the scheduler's time, which others wait for
TOKENS_TOGETHER = 4 << 20  # tokens of one message, unless one request has more


class _Abandoned(NamedTuple):
    """A message that places requests and whose answer was not waited for: the call was interrupted, or timed out."""

    pending: Pending
    request_ids: list[str]
    replica: int = -1  # of a claim


class PlacingCalls(ClusterView):
    """Calls about requests. `prefill_rate`: tokens a second of a replica; what is quicker to compute is not copied."""

    def __init__(self, runtime: Runtime, cluster: Deployment) -> None:
        super().__init__(runtime, cluster)
        self._copies = self._params.copies_prefixes
        self.prefill_rate: float | None = None
        settings = cluster.config.router_settings(cluster.pages)
        self._keys = settings.keys() if settings.wants_keys else None
        self._released: dict[str, int] = {}  # straight on replicas; the scheduler hears of it with the next message
        self._waiting: dict[str, TextContext] = {}  # offered, and not known yet what became of it
        self._note: Pending | None = None  # tells the scheduler what was released; its answer was not read yet
        self._abandoned: list[_Abandoned] = []
        self._became: Settled = []  # settled by an answer whose caller was interrupted

    def rejoin(self, error: RaykError, epoch: int) -> Script[None]:
        """See ClusterView. What waited for its turn is offered again, in its order."""
        before = self.scheduler
        yield from super().rejoin(error, epoch)
        waiting = list(self._waiting.values())
        if self.scheduler is before or not waiting:
            return
        for _, sent in self._sendable(waiting, lambda part: self._send_offers(waiting[part], [], hear=False)):
            if isinstance(sent, Pending):
                [reply] = yield [sent]
                result_of(reply)

    # -- one request -------------------------------------------------------------------------------

    @current
    def claim(self, request_id: str, replica: int, dummy: bool = False) -> Script[None]:
        request_id = checked_request_id(request_id)
        yield from self._noted()
        command = m.ClaimOne(request_id, replica, dummy, self._take_released())
        done = yield from self._placed_by(self.scheduler.send(command), [request_id], replica)
        assert isinstance(done, m.Claimed)
        self._sender.forget(request_id)
        self._claimed(request_id, replica, done.generation)

    @current
    def contains(self, request_id: str, replica: int) -> Script[bool]:
        request_id = checked_request_id(request_id)
        done: m.BlocksDone = yield from self._ask(self.link(replica), m.Blocks(request_id))
        return done.claimed

    @current
    def blocks(self, request_id: str, replica: int) -> Script[list[int]]:
        request_id = checked_request_id(request_id)
        done: m.BlocksDone = yield from self._ask(self.link(replica), m.Blocks(request_id))
        mine = self._claims.get(request_id, done.generation)
        if done.generation not in (0, mine):
            raise LeaseLostError(request_id, replica, replica, self.client, mine, done.client, done.generation)
        return done.page_ids

    @current
    def release(self, request_id: str, replica: int, force: bool = False) -> Script[None]:
        request_id = checked_request_id(request_id)
        holder, generation = self._placed.get(request_id, -1), self._claims.get(request_id, 0)
        if holder not in (-1, replica) and not force:
            raise NotClaimedError(request_id, replica, holder)
        done = yield from self._ask(self.link(replica), m.Release([request_id], False, [generation], force))
        if not force or done.generations == [generation]:
            self._gone(request_id)
        else:  # another driver's, or this driver's that it does not know of
            self._released[request_id] = done.generations[0]

    @current
    def alloc(self, ctx: TextContext, replica: int) -> Script[None]:
        [admission] = yield from self._place([ctx], [replica], claim=False, stop_on_error=True)
        if admission.error is not None:
            raise admission.error

    def _allocator(self, replica: int) -> Callable[[TextContext], object]:
        return lambda ctx: wait_for(self.alloc(ctx, replica))

    # -- batches -----------------------------------------------------------------------------------

    @current
    def try_admit(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, stop_on_error: bool
    ) -> Script[list[Admission]]:
        """Claim and allocate each; with `stop_on_error` those after the first that is refused are not tried."""
        return (yield from self._place(ctxs, replicas, claim=True, stop_on_error=stop_on_error))

    def _place(
        self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None, claim: bool, stop_on_error: bool
    ) -> Script[list[Admission]]:
        """In messages of a bounded size, one after the other: other drivers' come in between."""
        if not ctxs:
            return []
        peers = self._copies and len(self.allocators) > 1 and (claim or any(map(self._may_copy, ctxs)))
        yield from self._noted()
        generations = [] if claim else [self._generation(ctx) for ctx in ctxs]

        def send(part: slice) -> Pending:
            at = replicas[0] if replicas is not None and not claim else -1
            contexts = self._sender.pack(ctxs[part], at, whole=claim or peers)
            targets = list(replicas[part]) if replicas is not None else []
            seen, unfilled = self.latest("seen", "unfilled")
            keys = self._page_keys(ctxs[part]) if claim or peers else b""
            how = (stop_on_error, seen, unfilled, self.cluster.joined, False, self.prefill_rate, keys, generations)
            return self.scheduler.send(m.PlaceMany(contexts, targets, claim, peers, self._take_released(), *how))

        admissions: list[Admission] = []
        try:
            for part, sent in self._sendable(ctxs, send):
                if isinstance(sent, RaykError):
                    admissions.append(Admission(-1 if replicas is None else replicas[part.start], sent))
                else:
                    done = yield from self._placed_by(sent, [ctx.request_id for ctx in ctxs[part]] if claim else [])
                    assert isinstance(done, m.PlaceDone)
                    failures = map(m.to_error, done.failures.values())
                    if not claim and any(isinstance(failure, StaleContextError) for failure in failures):
                        self._sender.forget(ctxs[0].request_id)
                        done = result_of((yield [send(part)])[0])
                    admissions += self._landed(ctxs[part], done)
                if stop_on_error and admissions[-1].error is not None:
                    break
                yield from self._noted()
        except GeneratorExit:
            raise
        except BaseException:
            if claim:
                yield from self.give_back(placed(ctxs, admissions))
            raise
        return admissions + [Admission(-1, admissions[-1].error)] * (len(ctxs) - len(admissions))

    @current
    def enter(self, ctxs: Sequence[TextContext], given_up: Sequence[str]) -> Script[Settled]:
        """Offer requests, and learn what became of those and of earlier ones: context and Admission of each."""
        yield from self._noted()
        fresh: dict[str, TextContext] = {}
        again: Settled = []
        for ctx in ctxs:
            if ctx.request_id in self._waiting or fresh.setdefault(ctx.request_id, ctx) is not ctx:
                again.append((ctx, Admission(-1, AlreadyClaimedError(ctx.request_id, -1))))
        offers, unwanted = list(fresh.values()), list(given_up)
        for part, sent in self._sendable(offers, lambda part: self._send_offers(offers[part], unwanted, hear=True)):
            if isinstance(sent, RaykError):
                self._became.append((offers[part.start], Admission(-1, sent)))
                continue
            unwanted.clear()
            self._waiting.update((ctx.request_id, ctx) for ctx in offers[part])
            try:
                done = yield from self._placed_by(sent, [])
            except CallTimeoutError:
                raise  # they may wait there
            except RaykError:
                for ctx in offers[part]:
                    del self._waiting[ctx.request_id]
                raise
            assert isinstance(done, m.EnterDone)
            self._became += self._entered(done)
        became, self._became = self._became, []
        return became + again

    def _entered(self, done: m.EnterDone) -> Settled:
        """What became of each request that is settled."""
        known = self._waiting
        settled = [known.pop(request_id) for request_id in done.ids]
        became = list(zip(settled, self._landed(settled, done), strict=True))
        if len(known) > done.open:  # those were forgotten there
            for ctx in list(known.values()):
                became.append((ctx, Admission(-1, OverloadedError(ctx.request_id, FORGOTTEN, SOONEST))))
            known.clear()
        return became

    def _send_offers(self, ctxs: Sequence[TextContext], given_up: Sequence[str], hear: bool) -> Pending:
        seen, unfilled, turns, used = self.latest("seen", "unfilled", "turn", "used")
        offer = m.Enter(
            self._sender.pack(ctxs, whole=True),
            self._copies,
            self._take_released(),
            list(given_up),
            seen,
            unfilled,
            turns,
            used,
            hear,
            self.cluster.joined,
            self._page_keys(ctxs),
            self.prefill_rate,
        )
        return self.scheduler.send(offer)

    def _sendable(
        self, ctxs: Sequence[TextContext], send: Callable[[slice], Pending]
    ) -> Iterator[tuple[slice, Pending | RaykError]]:
        """Send a batch in messages of a bounded size, each when it is asked for. One that cannot be written is halved,
        until the request that is the reason stands alone: it fails, and the others do not."""
        due = list(parts(ctxs)) or [slice(0, 0)]
        while due:
            part, released = due.pop(0), self._released
            try:
                sent = send(part)
            except (TypeError, ValueError, OverflowError) as error:
                if part.start == part.stop or (isinstance(error, RaykError) and not isinstance(error, UNSENT)):
                    raise
                self._released = released
                middle = (part.start + part.stop) // 2
                if middle > part.start:
                    due[:0] = [slice(part.start, middle), slice(middle, part.stop)]
                else:
                    yield part, cannot_be_sent(ctxs[middle].request_id, error)
            else:
                yield part, sent

    # -- callers that give up, and what was released -------------------------------------------------

    def _placed_by(
        self, sent: Pending, request_ids: list[str], replica: int = -1
    ) -> Script[m.Claimed | m.PlaceDone | m.EnterDone]:
        """The answer to a message that places requests. A caller that is interrupted, or waits for too long, leaves
        nothing placed: that is given back at once, or before this driver places anything else."""
        abandoned = _Abandoned(sent, request_ids, replica)
        try:
            [reply] = yield [sent]
        except GeneratorExit:
            raise
        except BaseException:
            self._abandoned.append(abandoned)
            yield from self._undo(abandoned)
            raise
        if isinstance(reply, CallTimeoutError):
            self._abandoned.append(abandoned)
        done: m.Claimed | m.PlaceDone | m.EnterDone = result_of(reply)
        return done

    def _undo(self, abandoned: _Abandoned) -> Script[None]:
        """Release what a message placed whose caller was interrupted; of an offer, keep what became of it."""
        [reply] = yield [abandoned.pending]
        if isinstance(reply, CallTimeoutError):
            raise reply
        self._abandoned.remove(abandoned)
        if isinstance(reply, RaykError) or isinstance(reply.result, m.Failure):
            return  # nothing was placed, or it is lost
        done, ids, where = reply.result, abandoned.request_ids, dict[str, int]()
        made: dict[str, int] = {}
        if isinstance(done, m.EnterDone):
            self._became += self._entered(done)
        elif isinstance(done, m.PlaceDone):
            refused = set(AdmitResults.received(done.numbers, done.seconds, done.failures, len(ids)).refused)
            where = {i: r for at, (i, r) in enumerate(zip(ids, done.replicas, strict=True)) if at not in refused}
            made = dict(zip(ids, done.generations, strict=True))
        else:
            where, made = dict.fromkeys(ids, abandoned.replica), dict.fromkeys(ids, done.generation)
        for request_id, replica in where.items():
            self._claimed(request_id, replica, made[request_id])
        yield from self.give_back(list(where))

    def give_back(self, request_ids: Sequence[str]) -> Script[None]:
        """Release what was placed for a caller that does not want it any more; where that fails, it is gone, too."""
        known = [request_id for request_id in request_ids if request_id in self._placed]
        with suppress(RaykError):
            if known:
                yield from self.release_many(known)

    @current
    def release_many(self, request_ids: Sequence[str]) -> Script[dict[str, RaykError]]:
        """Release requests that this driver placed, one message per replica; the errors of those that are gone."""
        by_replica: dict[int, dict[str, int]] = {}
        for request_id in request_ids:
            by_replica.setdefault(self._placed[request_id], {})[request_id] = self._claims.get(request_id, 0)
        sent: list[tuple[int, Pending]] = []
        errors: list[RaykError] = []
        for replica, claims in by_replica.items():
            try:
                release = m.Release(list(claims), True, list(claims.values()))
                sent.append((replica, self.link(replica).send(release)))
            except RaykError as error:
                errors.append(error)
        answers = yield [pending for _, pending in sent]
        lost: dict[str, RaykError] = {}
        for (replica, _), reply in zip(sent, answers, strict=True):
            if isinstance(reply, RaykError):
                errors.append(reply)
                continue
            claims, missing = by_replica[replica], reply.result
            if isinstance(missing, m.Missing):
                for request_id, owner, now in zip(*missing.columns, strict=True):
                    holder = replica if now else -1
                    whose = (self.client, claims.pop(request_id), owner, now)
                    lost[request_id] = LeaseLostError(request_id, replica, holder, *whose)
            for request_id, claim in claims.items():
                if self._claims.get(request_id, 0) == claim:
                    self._gone(request_id)
        for request_id, reason in lost.items():
            lost[request_id] = yield from self.explained(reason)
        if errors:
            raise errors[0]
        for reply in answers:
            result_of(reply)
        return lost

    def note_released(self) -> None:
        """See ClusterView."""
        if self._released and self._note is None:
            with suppress(RaykError):  # the next call of the driver will say so
                self._note = self._send_offers([], [], hear=False)

    def _noted(self) -> Script[None]:
        """Wait for the answer to a note, lest it arrives after an id in it was claimed again."""
        note, self._note = self._note, None
        if note is not None:
            [reply] = yield [note]
            result_of(reply)
        while self._abandoned:
            yield from self._undo(self._abandoned[0])

    def _take_released(self) -> dict[str, int]:
        released, self._released = self._released, {}
        return released

    def _claimed(self, request_id: str, replica: int, generation: int) -> None:
        """The request has a new claim on that replica."""
        self._placed[request_id], self._claims[request_id] = replica, generation

    def _gone(self, request_id: str) -> None:
        self._sender.forget(request_id)
        self._placed.pop(request_id, None)
        self._released[request_id] = self._claims.pop(request_id, 0)

    # -- contexts ----------------------------------------------------------------------------------

    def _page_keys(self, ctxs: Sequence[TextContext]) -> bytes:
        """The keys that a router goes by, made here and not by the scheduler, which all drivers share."""
        keys = self._keys
        if keys is None or len(self._links) < 2:  # else there is no choice
            return b""
        return b"".join(
            [
                keys.joined(c.tokens.data[: c.tokens.length], c.root_key, 0 if c.plain else c.pending_future_count)
                for c in ctxs
            ]
        )

    def _generation(self, ctx: TextContext) -> int:
        """The claim that a call with this context means: this driver's present one, unless that goes on with another
        context and this one is of an earlier claim."""
        generation = self._claims.get(ctx.request_id, 0)
        if ctx.generation not in (generation, 0) and self._sender.knows_another(ctx):
            return ctx.generation
        return generation

    def _may_copy(self, ctx: TextContext) -> bool:
        """Whether the next alloc of a claimed request looks for a cached prefix."""
        window = ctx.tokens
        first = ctx.request_id not in self._placed
        return first or window.processed == 0 or window.end - window.processed != 1

    def _landed(self, ctxs: Sequence[TextContext], done: m.PlaceDone | m.EnterDone) -> list[Admission]:
        """Move windows to where the replicas' alloc left them, and remember who has what."""
        outcomes = AdmitResults.received(done.numbers, done.seconds, done.failures, len(ctxs))
        admissions, generations = outcomes.admissions(done.replicas), done.generations or [0] * len(ctxs)
        for ctx, admission, (processed, end, cached, *_), generation in zip(
            ctxs, admissions, outcomes.rows, generations, strict=True
        ):
            if admission.error is None:
                window = ctx.tokens
                window.processed, window.end = processed, end
                ctx.cached_prefix_length = None if cached < 0 else cached
                self._sender.mark_sent(ctx, admission.replica)
                if generation:
                    self._claimed(ctx.request_id, admission.replica, generation)
                ctx.generation = self._claims.get(ctx.request_id, 0)
        return admissions


def parts(ctxs: Sequence[TextContext]) -> Iterator[slice]:
    """Cut a batch so that a message has at most MOST_TOGETHER requests and TOKENS_TOGETHER tokens, or one request."""
    start = tokens = 0
    for at, ctx in enumerate(ctxs):
        tokens += ctx.tokens.length
        if at > start and (at - start == MOST_TOGETHER or tokens > TOKENS_TOGETHER):
            yield slice(start, at)
            start, tokens = at, ctx.tokens.length
    if ctxs:
        yield slice(start, len(ctxs))
