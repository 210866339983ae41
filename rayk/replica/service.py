"""A replica behind commands: answer(command), and the same for messages, handle(wire) -> wire, around a ReplicaCore.

It keeps what messages need and the core does not: mirrors of the drivers' contexts, the epoch, and the last
answer to each sender, so that a mutation that arrives twice is done once. No Ray and no threads here.
"""

from __future__ import annotations

import pickle
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from time import monotonic, perf_counter
from typing import Any, TypeVar

import torch

from rayk import protocol as m
from rayk.context import TextContext
from rayk.errors import (
    MessageError,
    NotClaimedError,
    RaykError,
    RemoteError,
    StaleEpochError,
)
from rayk.kvcache.connector import TierCount
from rayk.kvcache.iteration import Forward, run_forward, run_tick
from rayk.kvcache.page_pins import PageImport
from rayk.kvcache.poison import Poison
from rayk.kvcache.prefix_tree import PageListener
from rayk.kvcache.readings import read_core
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.request import Reused, refuse_twice
from rayk.kvcache.runtime_inputs import BatchCharacteristics, ReplicaInputs
from rayk.kvcache.tick import Tick
from rayk.metrics.histogram import Histogram
from rayk.metrics.reading import Labels, Reading, reading
from rayk.metrics.table import MICROSECONDS
from rayk.protocol.columns import RESULTS, ContextRows, rows_of
from rayk.protocol.context_sync import ContextMirrors, moved
from rayk.protocol.dedup import ReplyCache
from rayk.replica.cache_events import CacheEventLog, PrefillBacklog
from rayk.replica.page_exchange import PageExchange, reported
from rayk.transport.choice import Peer
from rayk.transport.line import Line, PageData
from rayk.transport.port import PagePort, open_lines

REFUSED = (-1,) * RESULTS
UNREAD = 4096  # times that are kept until somebody reads them
PLAIN = (bytes, str, int, float, bool, type(None))
PROTOCOL = 5  # Ray's, too
REMEMBERED = 64  # answers to each sender, whose socket may be cut with so many on their way
T = TypeVar("T")


class ReplicaService:
    """`epoch` names this start of the replica; `dumps` pickles what shipped functions return.

    With `journal` it notes which pages are cached, for a scheduler whose router goes by that. `address` is where other
    machines reach this one, by the kinds of `lines` that its memory allows or by those that are given. It owns the port
    that pages leave and enter by. Beside its driver `events` is told of pages, and there are no `mirrors`.
    """

    def __init__(
        self,
        core: ReplicaCore,
        epoch: int,
        dumps: Callable[[Any], bytes] = pickle.dumps,
        clock: Callable[[], float] = monotonic,
        journal: bool = False,
        address: str = "127.0.0.1",
        lines: Sequence[Line] | None = None,
        mirrors: ContextMirrors | None = None,
        events: PageListener | None = None,
    ) -> None:
        self.core = core
        me, bytes_per_page = Peer(core.replica, epoch), core.params.bytes_per_page
        lines = open_lines(core.buffers, address) if lines is None else lines
        self.port = PagePort(me, core.exports, bytes_per_page, address, lines, clock)
        self._journal = CacheEventLog(core.page_hashes)
        self._events = self._journal if events is None else events
        self._noted = journal
        if journal:
            core.listen(self._events)
        self._unfilled = PrefillBacklog()
        self.epoch = epoch
        self._turn = epoch  # microseconds when it started: higher than any number of the replica before it
        self._dumps = dumps
        self.poison = Poison()
        self.fenced: set[str] = set()
        """Schedulers whose messages come too late: another one took their place."""
        self._clock = clock
        self._mirrors = ContextMirrors(core.replica) if mirrors is None else mirrors
        self._sender = ""  # of the message that is being answered
        self._exchange = PageExchange(core, self.port, partial(self._mirrors.context, keep=False))
        self._answers: ReplyCache[tuple[bytes, PageData]] = ReplyCache(remembered=REMEMBERED)
        self._took: list[float] = []  # by claims and allocs, turn by turn, until somebody reads it
        self._claims, self._allocs = Histogram(MICROSECONDS), Histogram(MICROSECONDS)

    def handle(self, wire: bytes, attached: Sequence[PageData] = ()) -> tuple[bytes, PageData]:
        """Answer one envelope. `attached` holds page data for its imports; the second result goes with Exported
        and ReadPages. Never raises for what a sender did wrong: that is answered with a Failure."""
        seq, data = 0, PageData()
        result: m.Result
        try:
            envelope = m.decode_envelope(wire)
            seq = envelope.seq
            if not isinstance(envelope, m.ReplicaEnvelope):
                raise MessageError(f"a replica does not take {type(envelope.command).__name__}; the scheduler does")
            if envelope.epoch != self.epoch:
                raise StaleEpochError(self.core.replica, envelope.epoch, self.epoch)
            if envelope.client in self.fenced:
                raise MessageError(f"{envelope.client} has a successor: what it says comes too late")
            self._sender = envelope.client
            if seq and (repeated := self._answers.repeated(envelope.client, seq)) is not None:
                return repeated
            result, data = self._run(envelope.command, attached)
        except RaykError as error:
            result = m.failure(error)
            return m.encode(m.Reply(self.epoch, seq, result)), []
        seen = self._journal.close(self._unfilled.total)
        news = None
        if envelope.known not in (m.NOT_ASKED, seen):
            news = self._journal.news(envelope.known, self.core.free)
        pages = None
        if envelope.pages:
            self._turn += 1
            pages = (self._turn, self.core.usage.used)
        answer = (m.encode(m.Reply(self.epoch, seq, result, seen, self._unfilled.total, news, pages)), data)
        if seq:
            self._answers.keep(envelope.client, seq, answer, large=bool(data))
        return answer

    def _run(self, command: m.ReplicaCommand, attached: Sequence[PageData]) -> tuple[m.Result, PageData]:
        if self.port.pinned:
            self.port.unpin_late()
        try:
            answer = self.answer(command, attached)
        except Exception as error:  # a shipped function or a bug in rayk, too: report it, stay alive
            return self._failure(error), []
        if isinstance(command, m.Execute):
            self.poison.clear()
        return answer

    def answer(self, command: m.ReplicaCommand, attached: Sequence[PageData] = ()) -> tuple[m.Result, PageData]:
        """Carry out one command; `attached` and the second result as in handle(). Raises what the core raises."""
        core = self.core
        match command:
            case m.RunTick():
                return self._tick(command), []
            case m.Admit():
                return self._admit(command, attached), []
            case m.Step(views):
                batch = self._contexts(views)
                if back := core.wait_for_loads(batch):
                    return self._moved_back(back), []
                core.step(batch)
            case m.Inputs(views, max_cache_length, bounds):
                batch = self._contexts(views)
                if back := core.wait_for_loads(batch):
                    return self._moved_back(back), []
                return self._inputs(batch, max_cache_length, bounds), []
            case m.Execute(views, fn):
                batch = self._contexts(views)
                if back := core.wait_for_loads(batch):
                    return self._moved_back(back), []
                return m.Value(self._packed(run_forward(core, batch, self._shipped(fn)))), []
            case m.Claim(request_id, dummy, client, generation):
                core.claim(request_id, dummy, client, generation)
            case m.Release():
                return self._released(command), []
            case m.GetContexts(request_ids, generations):
                return self._claimed(request_ids, generations), []
            case m.Lookup() | m.Export() | m.Acknowledge() | m.DropLines() | m.GetPrefixes() | m.Keep():
                return self._exchange.answer(command, attached)
            case m.Blocks(request_id):
                request = core.requests.get(request_id)
                if request is None:
                    return m.BlocksDone(False, []), []
                return m.BlocksDone(True, core.blocks(request_id), request.generation, request.client), []
            case m.GetCacheDelta():
                pass
            case m.GetUsage():
                return m.UsageDone(*core.usage), []
            case m.UsedFraction(view):
                return m.Fraction(core.used_fraction_after(self._mirrors.context(view, keep=False))), []
            case m.GetMetrics():
                return m.MetricsDone(core.metrics), []
            case m.ResetMetrics():
                core.reset_metrics()
            case m.ResetPrefixCache():
                if command.joins and command.token is not None:
                    core.join_after_reset(command.token)
                    return m.ResetDone(), []
                return m.ResetDone(core.reset_prefix_cache(command.token)), []
            case m.ReadPages(page_ids):
                return m.Done(), [t.contiguous().view(torch.uint8).numpy() for t in core.read_pages(page_ids)]
            case m.CheckIntegrity():
                core.check_integrity()
            case m.GetTiers():
                connector = core.connector
                return m.TiersDone(*(connector.count() if connector is not None else TierCount())), []
            case m.PollTransfers():
                core.poll_transfers()
            case m.Drain():
                core.drain()
            case m.StartCacheEvents():
                if not self._noted:
                    self._noted = True
                    core.listen(self._events)
        return m.Done(), []

    def _contexts(self, views: Sequence[m.ContextView]) -> list[TextContext]:
        """Up-to-date contexts of all views, before anything is done with one; kept for claimed requests.

        Nothing changes unless each view is of the present claim, continues what is known or says the same, and is the
        only one of its request.
        """
        core, mirrors = self.core, self._mirrors
        found = [core.requests.get(view.request_id) for view in views]
        for view, request in zip(views, found, strict=True):
            if view.generation != (request.generation if request is not None else 0):
                raise core.lease_lost(view.request_id, self._sender, view.generation)
        if len({view.request_id for view in views}) < len(views):
            refuse_twice([view.request_id for view in views], core.replica)
        whole: list[TextContext | None] = []
        for view, request in zip(views, found, strict=True):
            if view.base:
                mirrors.check(view)
                whole.append(None)
            else:
                whole.append(ctx := mirrors.context(view, keep=False))
                if request is not None:
                    core.fence(request, ctx)
        ctxs = []
        for view, request, sent in zip(views, found, whole, strict=True):
            if sent is not None and request is not None:
                mirrors.keep(sent)
            ctxs.append(sent if sent is not None else mirrors.context(view))
        self._unfilled.seen(ctxs)
        return ctxs

    @staticmethod
    def _moved_back(ctxs: Sequence[TextContext]) -> m.MovedBack:
        return m.MovedBack({ctx.request_id: moved(ctx) for ctx in ctxs})

    def _claimed(self, request_ids: Sequence[str], generations: Sequence[int]) -> m.ContextsDone:
        core, ctxs, bare, dummies = self.core, list[TextContext](), list[str](), list[str]()
        for request_id, generation in of_each(request_ids, generations, 0):
            request, ctx = core.requests.get(request_id), self._mirrors.get(request_id)
            if request is not None and request.generation != generation:
                continue
            if request is not None and request.dummy:
                dummies.append(request_id)
            elif request is not None and ctx is not None and request.pages:
                ctxs.append(ctx)
            elif request is not None:
                bare.append(request_id)
        return m.ContextsDone(self._mirrors.pack(ctxs), bare, dummies)

    def _released(self, command: m.Release) -> m.Result:
        """Release all of the claims that are meant; or none, when one is not there and none may be missing."""
        core, meant, missing = self.core, list[str](), list[str]()
        for request_id, generation in of_each(command.request_ids, command.generations, 0):
            request = core.requests.get(request_id)
            if request is not None and (command.force or request.generation == generation):
                meant.append(request_id)
            elif command.missing_ok:
                missing.append(request_id)
            else:
                raise self._not_claimed(request_id, generation)
        if len(set(meant)) < len(meant):
            refuse_twice(meant, core.replica)
        generations = [core.requests[request_id].generation for request_id in meant]
        for request_id in meant:
            self._release(request_id)
        if command.force:
            return m.Released(generations)
        others = [core.requests.get(request_id) for request_id in missing]
        if not any(others):
            return m.Missing(missing)
        present = [(other.client, other.generation) if other is not None else ("", 0) for other in others]
        return m.Missing(missing, [client for client, _ in present], [generation for _, generation in present])

    def _not_claimed(self, request_id: str, generation: int) -> NotClaimedError:
        """Why a claim of that generation is not there."""
        if not generation and request_id not in self.core.requests:
            return self.core.not_claimed(request_id)
        return self.core.lease_lost(request_id, self._sender, generation)

    def _release(self, request_id: str) -> None:
        self.core.release(request_id)
        self._unfilled.drop(request_id)
        self._mirrors.drop(request_id)

    def _admit(self, command: m.Admit, attached: Sequence[PageData]) -> m.AdmitDone:
        imports, arrivals = self._exchange.imports(command.imports, attached) if command.imports else ([], [])
        uses = {row: [imports[i] for i in of] for row, of in command.uses.items()}
        batch = rows_of(command.contexts)
        claims = list(
            zip(of_each(batch.ids, command.clients, ""), of_each(batch.ids, command.generations, 0), strict=True)
        )
        numbers: list[int] = []
        seconds: list[float] = []
        failures: dict[int, m.Failure] = {}
        for row in range(len(batch.ids)):
            try:
                (_, client), (_, generation) = claims[row]
                numbers += self._admit_one(batch, row, command, uses.get(row, ()), seconds, client, generation)
            except RaykError as error:
                failures[row] = m.failure(error)
                numbers += REFUSED
                seconds += (0.0, 0.0)
                if command.stop_on_error:
                    break
        untried = len(batch.ids) - len(numbers) // RESULTS
        numbers += REFUSED * untried
        seconds += (0.0, 0.0) * untried
        self._took += seconds
        if len(self._took) > UNREAD:
            self._count_times()
        return m.AdmitDone(array("q", numbers).tobytes(), array("d", seconds).tobytes(), failures, reported(arrivals))

    def _count_times(self) -> None:
        took, self._took = self._took, []
        self._claims.add(*took[::2])
        self._allocs.add(*took[1::2])

    def read(self, labels: Labels) -> list[Reading]:
        """Its metrics. Nobody may send it anything meanwhile."""
        self._count_times()
        times = {"claim": self._claims, "alloc": self._allocs}
        found = [reading(f"rayk_{name}_seconds", each.read(), labels) for name, each in times.items()]
        return [*found, *read_core(self.core, labels)]

    def _admit_one(
        self,
        batch: ContextRows,
        row: int,
        command: m.Admit,
        imports: Sequence[PageImport],
        seconds: list[float],
        client: str,
        generation: int,
    ) -> tuple[int, ...]:
        request = None if command.claim else self.core.requests.get(batch.ids[row])
        if not command.claim and generation != (request.generation if request is not None else 0):
            raise self.core.lease_lost(batch.ids[row], client, generation)
        ctx = self._mirrors.row(batch, row, keep=False)
        if request is not None:
            self.core.fence(request, ctx)
            self._mirrors.keep(ctx)
        reused, *took = self.admit(ctx, client, generation, command.claim, imports, command.handed)
        seconds += took
        if command.claim:
            self._mirrors.keep(ctx)
        window, cached = ctx.tokens, ctx.cached_prefix_length
        self._unfilled.now(ctx.request_id, window.length - window.processed)
        return (window.processed, window.end, -1 if cached is None else cached, *reused)

    def admit(
        self,
        ctx: TextContext,
        client: str,
        generation: int,
        claim: bool = True,
        imports: Sequence[PageImport] = (),
        handed: bool = False,
    ) -> tuple[Reused, float, float]:
        """Claim a request, unless it is claimed already, and allocate its pages; neither, if that fails. What it
        reuses, and the seconds that the two took."""
        core, start = self.core, perf_counter()
        if claim:
            core.claim(ctx.request_id, False, client, generation)
        claimed = perf_counter()
        try:
            reused = core.accept_handover(ctx, imports) if handed else core.alloc(ctx, imports)
        except BaseException:
            if claim:
                core.release(ctx.request_id)
            raise
        return reused, claimed - start, perf_counter() - claimed

    def _tick(self, command: m.RunTick) -> m.TickDone | m.MovedBack:
        for request_id, generation in of_each(command.release, command.generations, 0):
            request = self.core.requests.get(request_id)
            if generation != (request.generation if request is not None else 0):
                raise self._not_claimed(request_id, generation)
        ctxs = self._contexts(command.views)
        if back := self.core.wait_for_loads([ctx for ctx in ctxs if not self.core.loading(ctx)]):
            return self._moved_back(back)
        tick = Tick(
            step=[ctxs[i] for i in command.step],
            release=command.release,
            alloc=[ctxs[i] for i in command.alloc],
            execute=[ctxs[i] for i in command.execute],
        )
        done = run_tick(self.core, tick, self._shipped(command.fn) if command.fn else None)
        for request_id in command.release[: done.released]:
            self._mirrors.drop(request_id)
            self._unfilled.drop(request_id)
        return m.TickDone(
            moved={c.request_id: moved(c) for c, v in zip(ctxs, command.views, strict=True) if _has_moved(c, v)},
            refused={request_id: m.failure(error) for request_id, error in done.refused.items()},
            value=self._packed(done.value) if done.value is not None else b"",
            free=done.free_pages,
            used=done.used_pages,
            step_seconds=done.step_seconds,
            alloc_seconds=done.alloc_seconds,
            released=done.released,
            failure=self._tick_failure(command, done.error),
            waiting=sorted(done.waiting),
        )

    def _packed(self, value: Any) -> bytes:
        """What a shipped function returned. What every pickler writes alike takes the fast one."""
        return pickle.dumps(value, PROTOCOL) if type(value) in PLAIN else self._dumps(value)

    def _shipped(self, pickled: bytes) -> Forward:
        """A driver's function, which may fail but not end this process."""
        fn: Forward = pickle.loads(pickled)

        def call(inputs: ReplicaInputs, batch: Sequence[TextContext]) -> Any:
            try:
                return fn(inputs, batch)
            except (SystemExit, KeyboardInterrupt) as error:
                trace = "".join(traceback.format_exception(error))
                raise RemoteError(self.core.replica, type(error).__name__, str(error), trace) from None

        return call

    def _tick_failure(self, command: m.RunTick, error: Exception | None) -> m.Failure | None:
        if error is not None:
            return self._failure(error)
        if command.fn:
            self.poison.clear()
        return None

    def _failure(self, error: Exception) -> m.Failure:
        """Any error as a message; what is not rayk's own (a shipped function, a bug) comes with its traceback."""
        self.poison.note(error)
        if isinstance(error, RaykError):
            return m.failure(error)
        trace = "".join(traceback.format_exception(error))
        return m.failure(RemoteError(self.core.replica, type(error).__name__, str(error), trace))

    def _inputs(
        self, batch: Sequence[TextContext], max_cache_length: int | None, bounds: tuple[int, int, int] | None
    ) -> m.InputsDone:
        characteristics = BatchCharacteristics(*bounds) if bounds is not None else None
        table, lengths, shape = self.core.batch_tables(batch, max_cache_length, characteristics)
        rows, width = table.shape
        return m.InputsDone(rows, width, table.tobytes(), lengths.tobytes(), (*shape,))


def of_each(request_ids: Sequence[str], values: Sequence[T], default: T) -> Iterator[tuple[str, T]]:
    """Each id with its value; one value is that of all. MessageError for any other number."""
    if len(values) == len(request_ids):
        return zip(request_ids, values, strict=True)
    if len(values) > 1:
        raise MessageError(f"{len(values)} value(s) came for {len(request_ids)} request(s)")
    return zip(request_ids, repeat(values[0] if values else default), strict=False)


def _has_moved(ctx: TextContext, view: m.ContextView) -> bool:
    """Whether the window is not where the driver sent it, which is where a decode step leaves it."""
    window = ctx.tokens
    return (window.processed, window.end, ctx.cached_prefix_length) != (view.processed, view.end, view.cached_prefix)
