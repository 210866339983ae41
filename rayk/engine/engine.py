"""The continuous-batching loop of one replica. No Ray, no threads, and the clock is given.

    submit -> waiting -> prefill (in chunks) -> decode batch -> finished
                 ^            |                   |
                 +-------- preempted <------------+     newest first, when pages run out; computed again later

One step():  expire; grow the decoding rows by the pages that they need, preempting where there are none; fill what is
left of the token budget with chunks of prompts, admitting requests while pages last; forward; sample; report. A prompt
of which a part is on its way from a tier is left out until it has landed.

Requests keep their place in the queue, and the newest one makes way first, so the oldest always comes to its end. A
forward that raises is repeated on halves of its batch until the request at fault is alone; only that one fails. An
error that leaves the replica unfit (rayk.kvcache.poison) is raised: it is of no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np
import torch

from rayk.context import TextContext
from rayk.engine.cache import Cache
from rayk.engine.counters import EngineCounters
from rayk.engine.forward import Model, forward
from rayk.engine.page_sharing import PageSharing
from rayk.engine.sampler import Sampler, sample, token_logprobs
from rayk.engine.sequence import SequenceState
from rayk.engine.sequence_table import SequenceTable
from rayk.engine.settings import EngineSettings, EngineStats, Times
from rayk.engine.structure import Grammars
from rayk.errors import InsufficientBlocksError, RaykError
from rayk.kvcache.poison import Poison
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.engine import Query
from rayk.protocol.engine_reports import MOVED, Event, PagesChanged, PromptLogprobs, Tokens
from rayk.protocol.engine_request import Limits, Request
from rayk.request_errors import ForwardError, QueueFullError, RequestCancelledError, RequestError, RequestTimeoutError


class Engine:
    """Serves requests from `core`'s pages with `model`. Not thread-safe."""

    def __init__(
        self,
        core: ReplicaCore,
        model: Model,
        settings: EngineSettings | None = None,
        clock: Callable[[], float] = monotonic,
        sampler: Sampler = sample,
        peers: PageSharing | None = None,
    ) -> None:
        self.peers = peers
        self._sampler = sampler
        self.settings = settings or EngineSettings()
        self.core = core
        self.model = model
        self.limits = Limits(
            model.vocab_size, model.max_length, core.num_pages, core.params.page_size, model.tokenizer is not None
        )
        self._clock = clock
        self._cache = Cache(core, self.settings.watermark)
        if self.settings.report_pages:
            self._cache.report_pages(lambda change: self._events.append(change))
        self._eos = tuple(model.eos_token_ids)
        self._grammars = Grammars(model.tokenizer, model.vocab_size, self._eos)
        self._table = SequenceTable()
        self._ended: dict[int, str | Exception] = {}  # rows that end with this step, and why
        self._events: list[Event] = []
        self.held_up = False  # the last step could do nothing but wait for the tiers
        self._orders = 0
        self._stepped_at = 0.0  # the last one with a forward
        self._counters = EngineCounters()
        self._poison = Poison()

    # -- requests --------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. RequestError or QueueFullError refuse it and change nothing."""
        if self._table.in_use(request.number, request.key):
            raise RequestError(request.request_id, "this id is in use; wait for its end or take another")
        tokens = self.limits.check(request)
        if len(self._table) >= self.settings.max_queue:
            raise QueueFullError(request.request_id, self.settings.max_queue)
        sequence = SequenceState(
            request, tokens, self.limits, self._orders, self._clock(), self._eos, self.model.tokenizer
        )
        if (shape := request.sampling.structured_outputs) is not None:
            sequence.structure = self._grammars.begin(request.request_id, shape)
            if request.generated:
                sequence.structure.add(*sequence.answer.tolist())
        self._orders += 1
        if request.imports is not None and self.peers is not None:
            sequence.coming = self.peers.incoming(request.number, request.imports)
        self._table.add(sequence)

    def cancel(self, number: int) -> bool:
        """End a request; its Finished comes with the next step's events. False for an unknown or finished one."""
        sequence = self._table.get(number)
        if sequence is not None:
            self._abort(sequence, "cancelled", RequestCancelledError(sequence.request.request_id, sequence.generated))
        return sequence is not None

    def hand_over(self, number: int) -> bool:
        """Let go of a request that goes on elsewhere: its last event says so. False for an unknown or finished one."""
        sequence = self._table.get(number)
        if sequence is None:
            return False
        self._withdraw(sequence)
        self._table.forget(sequence)
        self._events.append(sequence.finished(MOVED, self._clock()))
        return True

    @property
    def numbers(self) -> list[int]:
        """Of all requests that are not over, in their order."""
        return self._table.numbers

    def tell_pages(self) -> PagesChanged:
        """All that is cached, instead of changes that were not reported yet."""
        self._events = [event for event in self._events if not isinstance(event, PagesChanged)]
        return self._cache.all_pages()

    def query(self, query: Query) -> None:
        """Carry out a command of the page exchange; with a number, an Answered is among the next step's events."""
        assert self.peers is not None
        answered = self.peers.answer(query)
        if query.number:
            self._events.append(answered)

    def pause(self, number: int) -> None:
        """Generate no more tokens for a request until resume(); it keeps its pages until others need them."""
        self._table.pause(number)

    def resume(self, number: int) -> None:
        """Take back pause()."""
        self._table.resume(number)

    @property
    def busy(self) -> bool:
        """Whether a step could do anything."""
        return bool(self._events) or self._table.active

    @property
    def steps(self) -> int:
        """Forwards since the start; a number that stands still while the engine is busy means that it hangs."""
        return self._counters.steps

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts that are computed in a second, 0 while that is not known."""
        return self._counters.prefill.rate

    def stats(self) -> EngineStats:
        """Counters, and what there is now."""
        usage, counters, table, cache = self.core.usage, self._counters, self._table, self._cache
        return EngineStats(
            counters.steps,
            len(table.waiting),
            table.running,
            counters.finished,
            counters.failed,
            counters.preemptions,
            counters.prompt_tokens,
            cache.reused.total,
            counters.generated_tokens,
            counters.recomputed_tokens,
            usage.free,
            counters.peak_used_pages,
            usage.total,
            sum(cache.loading(each) for each in table.prefill),
            cache.reused,
            self.core.metrics,
            cache.tiers,
            usage.free - self.core.pool.empty,
            Times(*(each.read() for each in counters.times)),
        )

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward of what can run; everything that happened since the last call, in order."""
        self.expire()
        self._cache.poll()
        refused = self._grow()
        chunks = self._next_chunks(admit=not refused)
        runs = bool(self._table.batch or chunks)
        if runs:
            self._counters.steps += 1
            began, tokens = self._clock(), sum(each.ctx.tokens.active_length for each in chunks)
            decodes = bool(self._table.batch)
            self._forward(chunks)
            now = self._clock()
            self._counters.prefill.record(tokens, now - began)
            if decodes:
                self._counters.times.itl.add(now - self._stepped_at)
            self._stepped_at = now
        self.held_up = not (runs or refused or self._events) and self.core.loads_under_way
        events, self._events = self._events, []
        return events

    def rest(self) -> None:
        """Between steps: end what is late. When idle, take note of finished transfers to the tiers, and take back what
        peers do not want any more."""
        self.expire()
        if not self.busy:
            self._cache.poll()
            if self.peers is not None:
                self.peers.poll()

    def expire(self) -> None:
        """End the requests whose time is up."""
        for sequence in self._table.take_late(self._clock()) if self._table.deadlines else ():
            timeout = sequence.request.timeout or 0.0
            self._abort(sequence, "timeout", RequestTimeoutError(sequence.request.request_id, timeout))

    def _grow(self) -> bool:
        """Pages for every decoding row; whether some request had to make way."""
        batch = self._table.batch
        refused = self._cache.extend_rows(batch.contexts) if batch else []
        if not refused:
            return False
        while refused:
            if self._table.running == 1:
                self._no_room(batch.sequences[0])
                break
            gone = self._preempt()
            refused = self._cache.extend_rows([ctx for ctx in refused if ctx is not gone])
        return True

    def _preempt(self) -> TextContext:
        """Make the newest request start over; its context."""
        newest = self._table.newest
        self._withdraw(newest)
        newest.ctx.reset()
        newest.preemptions += 1
        self._counters.preemptions += 1
        self._table.wait(newest)
        return newest.ctx

    def _no_room(self, sequence: SequenceState) -> None:
        """A request that fits an empty replica was refused while nothing else ran: others hold the pages."""
        usage = self.core.usage
        pages = -(-sequence.limit // self.limits.page_size)
        error = InsufficientBlocksError(sequence.request.request_id, self.core.replica, pages, usage.free, usage.total)
        self._abort(sequence, "error", error)

    # -- prompts -------------------------------------------------------------------------------------

    def _next_chunks(self, admit: bool) -> list[SequenceState]:
        """Requests whose prompts go on in this step, windows cut to the token budget (at least one token of one)."""
        left = max(1, self.settings.chunk_size - len(self._table.batch))
        chunks: list[SequenceState] = []
        for sequence in [each for each in self._table.prefill if not each.paused]:
            if not left:
                break
            if self._cache.loading(sequence):
                continue
            # It has its pages; others may have published what it needs next.
            if self._cache.extend(sequence) and not self._cache.awaits(sequence):
                left -= sequence.cut_window(left)
                chunks.append(sequence)
        if admit and left and self._table.waiting:
            self._admit(chunks, left)
        return chunks

    def _admit(self, chunks: list[SequenceState], left: int) -> None:
        table, passed_over = self._table, list[SequenceState]()
        computing = [each for each in table.prefill if not each.paused]
        while left and table.waiting and table.running < self.core.max_batch_size:
            sequence = table.take_first()
            if sequence.paused or self._cache.will_be_reused(sequence, computing):
                passed_over.append(sequence)
                continue
            if not self._cache.admit(sequence, alone=not table.running):
                table.wait(sequence)
                if not table.running:
                    self._no_room(sequence)
                break
            if sequence.coming is not None:
                self._events.append(sequence.coming.arrivals)
                sequence.coming = None
            if sequence.admitted_at is None:
                sequence.admitted_at = self._clock()
                self._counters.times.queue.add(sequence.admitted_at - sequence.submitted_at)
                self._counters.prompt_tokens += sequence.prompt_length
            else:
                self._counters.recomputed_tokens += sequence.ctx.tokens.active_length
            table.prefill_next(sequence)
            computing.append(sequence)
            self._counters.record_use(self.core.usage.used)
            if not self._cache.awaits(sequence):
                left -= sequence.cut_window(left)
                chunks.append(sequence)
        for sequence in passed_over:
            table.wait(sequence)

    # -- the forward -----------------------------------------------------------------------------------

    def _forward(self, chunks: list[SequenceState]) -> None:
        """Forward the rows and the chunks, and give each its token."""
        batch = self._table.batch
        if chunks:
            active = [each.ctx.tokens.active for each in chunks]
            tokens = np.concatenate((batch.last, *active))
            counts = batch.ones + [len(part) for part in active]
            contexts: Sequence[TextContext] = [*batch.contexts, *(each.ctx for each in chunks)]
        else:
            tokens, counts, contexts = batch.last, batch.ones, batch.contexts
        for each in (*(batch.sequences[row] for row in batch.special), *chunks):
            if each.structure is not None:
                each.structure.prepare()
        scored = frozenset(at for at, each in enumerate(chunks, len(batch)) if each.unscored)
        done = forward(self.model, self._cache, contexts, tokens, counts, scored)
        for at, logits in done.whole.items():
            self._score(chunks[at - len(batch)], logits)
        if done.failed:
            for error in done.failed.values():
                if self._poison.note(error):
                    raise error  # of no request: all of them go on elsewhere
            forwarded = [*batch.sequences, *chunks]
            failed = {forwarded[at]: error for at, error in done.failed.items()}
            logits_of = {each: at for at, each in enumerate(each for each in forwarded if each not in failed)}
            for sequence, error in failed.items():
                self._fail(sequence, error)
            chunks = [each for each in chunks if each in logits_of]
            if done.logits is None:
                return
            order = [logits_of[each] for each in (*batch.sequences, *chunks)]  # rows have moved up
            self._take(chunks, done.logits[order])
        elif done.logits is not None:
            self._poison.clear()
            self._take(chunks, done.logits)

    def _score(self, sequence: SequenceState, logits: torch.Tensor) -> None:
        """Report the log probabilities of the prompt's tokens that follow those in the window."""
        window = sequence.ctx.tokens
        start, stop = max(sequence.scored, window.processed + 1), min(window.end + 1, sequence.prompt_length)
        if start < stop:
            rows = logits[start - window.processed - 1 : stop - window.processed - 1]
            tokens, count = window.all[start:stop].astype(np.int64), sequence.sampling.prompt_logprobs or 0
            self._events.append(PromptLogprobs(sequence.number, start, token_logprobs(rows, tokens, count)))
            sequence.scored = stop

    def _fail(self, sequence: SequenceState, error: Exception) -> None:
        self._abort(sequence, "error", self._forward_error(sequence, error))

    def _forward_error(self, sequence: SequenceState, error: Exception) -> ForwardError:
        return ForwardError(sequence.request.request_id, self.core.replica, type(error).__name__, str(error))

    def _take(self, chunks: list[SequenceState], logits: torch.Tensor) -> None:
        """Sample where a prompt or a row is complete, and move everything on."""
        batch, started = self._table.batch, [each for each in chunks if each.ctx.tokens.end == each.ctx.tokens.length]
        before = len(batch)
        if len(started) < len(chunks):
            index = [before + i for i, each in enumerate(chunks) if each.ctx.tokens.end == each.ctx.tokens.length]
            logits = logits[[*range(before), *index]] if index else logits[:before]
            for each in chunks:
                if each.ctx.tokens.end < each.ctx.tokens.length:
                    each.ctx.update(0)  # a chunk has no token yet
        if started:
            now = self._clock()
            for each in started:
                if each.first_token_at is None:
                    each.first_token_at = now
                    self._counters.times.ttft.add(now - each.submitted_at)
            self._table.decode_next(started)
            chunks = [each for each in chunks if each not in started]
        if batch:
            self._advance(logits)
        self._cache.publish([each.ctx for each in chunks])
        self._cache.publish(batch.contexts)
        self._end_rows()

    def _advance(self, logits: torch.Tensor) -> None:
        """Give every row its token."""
        batch = self._table.batch
        sampled = self._sampler(logits, batch.sequences, batch.plain)
        tokens = sampled.tokens
        logprobs = {batch.sequences[row].number: found for row, found in sampled.logprobs.items()}
        if sampled.failed:
            chosen = {sequence: tokens[row] for row, sequence in enumerate(batch.sequences)}
            for sequence, error in [(batch.sequences[row], why) for row, why in sampled.failed.items()]:
                self._fail(sequence, error)
            tokens = np.array([chosen[sequence] for sequence in batch.sequences], np.int64)
            if not batch:
                return
        finished, stopped = batch.advance(tokens)
        self._events.append(Tokens(batch.numbers, tokens, logprobs))
        self._counters.generated_tokens += len(tokens)
        if len(finished):
            self._ended = {row: "stop" if stopped[row] else "length" for row in finished.tolist()}
        for row in batch.special:
            sequence, token, ended = batch.sequences[row], int(tokens[row]), self._ended.get(row)
            try:
                if sequence.show(token, ended == "stop") or sequence.complete(token, ended):
                    self._ended[row] = "stop"
                elif row not in self._ended:
                    self._events += sequence.new_text()
            except Exception as error:  # of the tokenizer: a matter of this request alone
                self._ended[row] = error

    # -- the end of a request ----------------------------------------------------------------------------

    def _end_rows(self) -> None:
        ended, self._ended = self._ended, {}
        if ended:
            self._counters.record_use(self.core.usage.used)
        batch = self._table.batch
        sequences = [(batch.sequences[row], reason) for row, reason in ended.items()]
        batch.drop(ended)
        for sequence, reason in sequences:
            self._cache.release(sequence)
            if isinstance(reason, Exception):
                self._finish(sequence, "error", self._forward_error(sequence, reason))
            else:
                self._finish(sequence, reason, None)

    def _abort(self, sequence: SequenceState, reason: str, error: RaykError) -> None:
        self._withdraw(sequence)
        self._finish(sequence, reason, error)

    def _withdraw(self, sequence: SequenceState) -> None:
        """Take a request from where it is, with its pages."""
        if self._table.withdraw(sequence):
            self._cache.release(sequence)

    def _finish(self, sequence: SequenceState, reason: str, error: RaykError | None) -> None:
        self._table.forget(sequence)
        text = None
        try:
            text = sequence.whole_text(self.model.tokenizer, reason)
            self._events += sequence.new_text()
        except Exception as raised:
            if error is None:
                reason, error = "error", self._forward_error(sequence, raised)
        self._counters.finished += error is None
        self._counters.failed += error is not None
        now = self._clock()
        if error is None:
            self._counters.times.e2e.add(now - sequence.submitted_at)
        self._events.append(sequence.finished(reason, now, text, error))
