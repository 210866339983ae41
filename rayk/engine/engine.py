"""The continuous-batching loop of one replica. No Ray, no threads, and the clock is given.

    submit -> waiting -> prefill (in chunks) -> rows (decoding) -> finished
                 ^            |                   |
                 +-------- preempted <------------+     newest first, when pages run out; computed again later

One step():  expire; grow the decoding rows by the pages that they need, preempting where there are none; fill what is
left of the token budget with chunks of prompts, admitting requests while pages last; forward; sample; report. A prompt
of which a part is on its way from a tier is left out until it has landed.

Requests keep their place in the queue, and the newest one makes way first, so the oldest always comes to its end. A
forward that raises is repeated on halves of its batch until the request at fault is alone; only that one fails.
"""

from __future__ import annotations

import heapq
import secrets
from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np
import torch

from rayk.context import TextContext
from rayk.engine.cache import Cache
from rayk.engine.decode_batch import DecodeBatch
from rayk.engine.detokenizer import Detokenizer, text_of
from rayk.engine.forward import Model, forward
from rayk.engine.page_sharing import PageSharing
from rayk.engine.sampler import Sampler, sample
from rayk.engine.sequence import SequenceState
from rayk.engine.settings import EngineSettings, EngineStats
from rayk.errors import InsufficientBlocksError, RaykError
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.engine import Query
from rayk.protocol.engine_reports import MOVED, Event, Finished, Text, Tokens
from rayk.protocol.engine_request import Limits, Request
from rayk.request_errors import ForwardError, QueueFullError, RequestCancelledError, RequestError, RequestTimeoutError


class Pace:
    """How fast prompts are computed: what the last forwards took, each counting a tenth less than the next one."""

    FORGET = 0.9

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def took(self, tokens: int, seconds: float) -> None:
        """A forward of so many tokens of prompts."""
        if tokens and seconds > 0:
            self._tokens = self.FORGET * self._tokens + tokens
            self._seconds = self.FORGET * self._seconds + seconds

    @property
    def rate(self) -> float:
        """Tokens a second, 0 before the first forward."""
        return self._tokens / self._seconds if self._seconds else 0.0


class Engine:
    """Serves requests from `core`'s pages with `model`. Not thread-safe; submit, cancel and step are its doors."""

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
        self._all: dict[int, SequenceState] = {}
        self._ids: set[str] = set()
        self._waiting: list[tuple[int, SequenceState]] = []  # a heap by order
        self._prefill: list[SequenceState] = []  # by order
        self._rows = DecodeBatch()
        self._parked: list[SequenceState] = []  # paused while they decoded; they keep their pages
        self._paused: set[int] = set()
        self._ended: dict[int, str | Exception] = {}  # rows that end with this step, and why
        self._deadlines: list[tuple[float, int]] = []  # a heap; may hold finished ones
        self._events: list[Event] = []
        self.held_up = False  # the last step could do nothing but wait for the tiers
        self._pace = Pace()
        self._orders = 0
        self._steps = self._finished = self._failed = self._preemptions = 0
        self._peak_used = 0
        self._prompt_tokens = self._generated_tokens = self._recomputed_tokens = 0

    # -- requests --------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. RequestError or QueueFullError refuse it and change nothing."""
        if request.number in self._all or request.request_id in self._ids:
            raise RequestError(request.request_id, "this id is in use; wait for its end or take another")
        tokens = self.limits.check(request)
        if len(self._all) >= self.settings.max_queue:
            raise QueueFullError(request.request_id, self.settings.max_queue)
        seed = request.sampling.seed
        generation = SequenceState(
            request, tokens, self.limits, self._orders, secrets.randbits(63) if seed is None else seed, self._clock()
        )
        self._orders += 1
        sampling = request.sampling
        generation.stop_ids = (*(() if sampling.ignore_eos else self._eos), *sampling.stop_token_ids)
        if sampling.stop or request.stream_text:
            generation.detokenizer = Detokenizer(self.model.tokenizer, sampling.stop)
            for token in generation.answer.tolist():
                generation.detokenizer.add(token)
            generation.detokenizer.piece()  # who continues an answer has seen it
        if request.imports is not None and self.peers is not None:
            generation.coming = self.peers.incoming(request.number, request.imports)
        self._all[request.number] = generation
        self._ids.add(request.request_id)
        heapq.heappush(self._waiting, (generation.order, generation))
        if generation.deadline is not None:
            heapq.heappush(self._deadlines, (generation.deadline, request.number))

    def cancel(self, number: int) -> bool:
        """End a request; its Finished comes with the next step's events. False for an unknown or finished one."""
        generation = self._all.get(number)
        if generation is not None:
            self._abort(generation, "cancelled", RequestCancelledError(generation.request_id, generation.generated))
        return generation is not None

    def hand_over(self, number: int) -> bool:
        """Let go of a request that goes on elsewhere: its last event says so. False for an unknown or finished one."""
        generation = self._all.get(number)
        if generation is None:
            return False
        self._withdraw(generation)
        self._forget(generation)
        cached, preemptions, times = generation.cached, generation.preemptions, self._times(generation)
        self._events.append(Finished(number, MOVED, cached, None, None, preemptions, *times))
        return True

    def query(self, query: Query) -> None:
        """Carry out a command of the page exchange; with a number, an Answered is among the next step's events."""
        assert self.peers is not None
        answered = self.peers.answer(query)
        if query.number:
            self._events.append(answered)

    def pause(self, number: int) -> None:
        """Generate no more tokens for a request until resume(); it keeps its pages while nobody else needs them."""
        generation = self._all.get(number)
        if generation is None or generation.paused:
            return
        generation.paused = True
        self._paused.add(number)
        if generation in self._rows.generations:
            self._rows.drop([self._rows.generations.index(generation)])
            self._parked.append(generation)

    def resume(self, number: int) -> None:
        """Take back pause()."""
        generation = self._all.get(number)
        if generation is None or not generation.paused:
            return
        generation.paused = False
        self._paused.discard(number)
        if generation in self._parked:
            self._parked.remove(generation)
            self._rows.add([generation])

    @property
    def busy(self) -> bool:
        """Whether a step could do anything."""
        return bool(self._events or self._rows or len(self._all) > len(self._paused))

    @property
    def steps(self) -> int:
        """Forwards since the start: whoever watches it sees whether it moves."""
        return self._steps

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts that are computed in a second, 0 while that is not known."""
        return self._pace.rate

    def stats(self) -> EngineStats:
        """Counters, and what there is now."""
        usage = self.core.usage
        return EngineStats(
            self._steps,
            len(self._waiting),
            self._running,
            self._finished,
            self._failed,
            self._preemptions,
            self._prompt_tokens,
            self._cache.reused.total,
            self._generated_tokens,
            self._recomputed_tokens,
            usage.free,
            self._peak_used,
            usage.total,
            sum(self._cache.loading(each) for each in self._prefill),
            self._cache.reused,
            self.core.metrics,
            self._cache.tiers,
        )

    def _note_use(self) -> None:
        """Pages in use are at their most after an admission, or when a request ends."""
        self._peak_used = max(self._peak_used, self.core.usage.used)

    @property
    def _running(self) -> int:
        return len(self._rows) + len(self._prefill) + len(self._parked)

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward of what can run; everything that happened since the last call, in order."""
        self.expire()
        self._cache.poll()
        refused = self._grow()
        chunks = self._next_chunks(admit=not refused)
        runs = bool(self._rows or chunks)
        if runs:
            self._steps += 1
            began, tokens = self._clock(), sum(each.ctx.tokens.active_length for each in chunks)
            self._forward(chunks)
            self._pace.took(tokens, self._clock() - began)
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
        if not self._deadlines or self._deadlines[0][0] > (now := self._clock()):
            return
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            generation = self._all.get(number)
            if generation is not None and generation.deadline is not None and generation.deadline <= now:
                timeout = generation.request.timeout or 0.0
                self._abort(generation, "timeout", RequestTimeoutError(generation.request_id, timeout))

    def _grow(self) -> bool:
        """Pages for every decoding row; whether some request had to make way."""
        if not self._rows:
            return False
        refused = self._cache.extend_rows(self._rows.contexts)
        if not refused:
            return False
        while refused:
            if self._running == 1:
                self._no_room(self._rows.generations[0])
                break
            gone = self._preempt()
            refused = self._cache.extend_rows([ctx for ctx in refused if ctx is not gone])
        return True

    def _preempt(self) -> TextContext:
        """Make the newest request start over; its context."""
        newest = max((*self._rows.generations, *self._prefill, *self._parked), key=lambda each: each.order)
        self._withdraw(newest)
        newest.ctx.reset()
        newest.preemptions += 1
        self._preemptions += 1
        heapq.heappush(self._waiting, (newest.order, newest))
        return newest.ctx

    def _no_room(self, generation: SequenceState) -> None:
        """A request that fits an empty replica was refused while nothing else ran: others hold the pages."""
        usage = self.core.usage
        pages = -(-generation.limit // self.limits.page_size)
        error = InsufficientBlocksError(generation.request_id, self.core.replica, pages, usage.free, usage.total)
        self._abort(generation, "error", error)

    # -- prompts -------------------------------------------------------------------------------------

    def _next_chunks(self, admit: bool) -> list[SequenceState]:
        """Requests whose prompts go on in this step, windows cut to the token budget (at least one token of one)."""
        left = max(1, self.settings.chunk_size - len(self._rows))
        chunks: list[SequenceState] = []
        for generation in [each for each in self._prefill if not each.paused]:
            if not left:
                break
            if self._cache.loading(generation):
                continue
            # It has its pages; others may have published what it needs next.
            if self._cache.extend(generation) and not self._cache.awaits(generation):
                left -= self._cut(generation, left)
                chunks.append(generation)
        if admit and left and self._waiting:
            self._admit(chunks, left)
        return chunks

    def _admit(self, chunks: list[SequenceState], left: int) -> None:
        passed_over: list[tuple[int, SequenceState]] = []
        computing = [each for each in self._prefill if not each.paused]
        while left and self._waiting and self._running < self.core.max_batch_size:
            order, generation = heapq.heappop(self._waiting)
            if generation.paused or self._cache.will_be_reused(generation, computing):
                passed_over.append((order, generation))
                continue
            if not self._cache.admit(generation, alone=not self._running):
                heapq.heappush(self._waiting, (order, generation))
                if not self._running:
                    self._no_room(generation)
                break
            if generation.coming is not None:
                self._events.append(generation.coming.arrivals)
                generation.coming = None
            if generation.admitted_at is None:
                generation.admitted_at = self._clock()
                self._prompt_tokens += generation.prompt_length
            else:
                self._recomputed_tokens += generation.ctx.tokens.active_length
            self._prefill.append(generation)
            computing.append(generation)
            self._note_use()
            if not self._cache.awaits(generation):
                left -= self._cut(generation, left)
                chunks.append(generation)
        self._prefill.sort(key=lambda each: each.order)
        for entry in passed_over:
            heapq.heappush(self._waiting, entry)

    @staticmethod
    def _cut(generation: SequenceState, left: int) -> int:
        window = generation.ctx.tokens
        if window.end - window.processed > left:
            window.chunk(left)
        return window.end - window.processed

    # -- the forward -----------------------------------------------------------------------------------

    def _forward(self, chunks: list[SequenceState]) -> None:
        """Forward the rows and the chunks, and give each its token."""
        rows = self._rows
        if chunks:
            active = [each.ctx.tokens.active for each in chunks]
            tokens = np.concatenate((rows.last, *active))
            counts = rows.ones + [len(part) for part in active]
            contexts: Sequence[TextContext] = [*rows.contexts, *(each.ctx for each in chunks)]
        else:
            tokens, counts, contexts = rows.last, rows.ones, rows.contexts
        done = forward(self.model, self._cache, contexts, tokens, counts)
        if done.failed:
            batch = [*rows.generations, *chunks]
            failed = [(batch[at], error) for at, error in done.failed.items()]
            logits_of = {id(each): at for at, each in enumerate(each for each in batch if each not in dict(failed))}
            for generation, error in failed:
                self._broken(generation, error)
            chunks = [each for each in chunks if id(each) in logits_of]
            if done.logits is None:
                return
            order = [logits_of[id(each)] for each in (*rows.generations, *chunks)]  # rows have moved up
            self._take(chunks, done.logits[order])
        elif done.logits is not None:
            self._take(chunks, done.logits)

    def _broken(self, generation: SequenceState, error: Exception) -> None:
        self._abort(generation, "error", self._forward_error(generation, error))

    def _forward_error(self, generation: SequenceState, error: Exception) -> ForwardError:
        return ForwardError(generation.request_id, self.core.replica, type(error).__name__, str(error))

    def _take(self, chunks: list[SequenceState], logits: torch.Tensor) -> None:
        """Sample where a prompt or a row is complete, and move everything on."""
        rows, started = self._rows, [each for each in chunks if each.ctx.tokens.end == each.ctx.tokens.length]
        before = len(rows)
        if len(started) < len(chunks):
            index = [before + i for i, each in enumerate(chunks) if each.ctx.tokens.end == each.ctx.tokens.length]
            logits = logits[[*range(before), *index]] if index else logits[:before]
            for each in chunks:
                if each.ctx.tokens.end < each.ctx.tokens.length:
                    each.ctx.update(0)  # a chunk has no token yet
        if started:
            now = self._clock()
            for each in started:
                each.first_token_at = each.first_token_at or now
            self._prefill = [each for each in self._prefill if each not in started]
            rows.add(started)
            chunks = [each for each in chunks if each not in started]
        if rows:
            self._advance(logits)
        self._cache.publish([each.ctx for each in chunks])
        self._cache.publish(rows.contexts)
        self._end_rows()

    def _advance(self, logits: torch.Tensor) -> None:
        """Give every row its token."""
        rows = self._rows
        sampled = self._sampler(logits, rows.generations, rows.plain)
        tokens = sampled.tokens
        logprobs = {rows.generations[row].number: found for row, found in sampled.logprobs.items()}
        if sampled.failed:
            chosen = {generation: tokens[row] for row, generation in enumerate(rows.generations)}
            for generation, error in [(rows.generations[row], why) for row, why in sampled.failed.items()]:
                self._broken(generation, error)
            tokens = np.array([chosen[generation] for generation in rows.generations], np.int64)
            if not rows:
                return
        finished, stopped = rows.advance(tokens)
        self._events.append(Tokens(rows.numbers, tokens, logprobs))
        self._generated_tokens += len(tokens)
        if len(finished):
            self._ended = {row: "stop" if stopped[row] else "length" for row in finished.tolist()}
        for row in rows.special:
            try:
                self._show(row, int(tokens[row]))
            except Exception as error:  # of the tokenizer: a matter of this request alone
                self._ended[row] = error

    def _show(self, row: int, token: int) -> None:
        """The text of a row that needs it grows by a token; a stop string may end it."""
        generation = self._rows.generations[row]
        detokenizer = generation.detokenizer
        if detokenizer is None:
            return
        if self._ended.get(row) != "stop":  # a stop token is not shown
            detokenizer.add(token)
        if detokenizer.stopped:
            self._ended[row] = "stop"
        if row not in self._ended:
            self._send_text(generation, detokenizer)

    def _send_text(self, generation: SequenceState, detokenizer: Detokenizer) -> None:
        if generation.request.stream_text and (piece := detokenizer.piece()):
            self._events.append(Text(generation.number, piece))

    # -- the end of a request ----------------------------------------------------------------------------

    def _end_rows(self) -> None:
        ended, self._ended = self._ended, {}
        if ended:
            self._note_use()
        generations = [(self._rows.generations[row], reason) for row, reason in ended.items()]
        self._rows.drop(ended)
        for generation, reason in generations:
            self._cache.release(generation)
            if isinstance(reason, Exception):
                self._finish(generation, "error", self._forward_error(generation, reason))
            else:
                self._finish(generation, reason, None)

    def _abort(self, generation: SequenceState, reason: str, error: RaykError) -> None:
        self._withdraw(generation)
        self._finish(generation, reason, error)

    def _withdraw(self, generation: SequenceState) -> None:
        """Take a request from where it is, with its pages."""
        for place in (self._prefill, self._parked):
            if generation in place:
                place.remove(generation)
                self._cache.release(generation)
                return
        if generation in self._rows.generations:
            self._rows.drop([self._rows.generations.index(generation)])
            self._cache.release(generation)
            return
        self._waiting = [entry for entry in self._waiting if entry[1] is not generation]
        heapq.heapify(self._waiting)

    def _finish(self, generation: SequenceState, reason: str, error: RaykError | None) -> None:
        self._forget(generation)
        text = None
        try:
            text = self._whole_text(generation, reason)
        except Exception as raised:
            if error is None:
                reason, error = "error", self._forward_error(generation, raised)
        self._finished += error is None
        self._failed += error is not None
        cached, preemptions, times = generation.cached, generation.preemptions, self._times(generation)
        self._events.append(Finished(generation.number, reason, cached, text, error, preemptions, *times))

    def _whole_text(self, generation: SequenceState, reason: str) -> str | None:
        """The answer's text, None without a tokenizer; what was not streamed of it is. Raises what that one does."""
        detokenizer = generation.detokenizer
        if detokenizer is not None:
            detokenizer.finish()
            self._send_text(generation, detokenizer)
            return detokenizer.text
        if self.model.tokenizer is None:
            return None
        answer = generation.answer.tolist()
        return text_of(self.model.tokenizer, answer[:-1] if reason == "stop" else answer)

    def _forget(self, generation: SequenceState) -> None:
        del self._all[generation.number]
        self._ids.discard(generation.request_id)
        self._paused.discard(generation.number)

    def _times(self, generation: SequenceState) -> tuple[float | None, float | None, float]:
        """Seconds from its submission to its admission, its first token and now."""

        def after(moment: float | None) -> float | None:
            return None if moment is None else moment - generation.submitted_at

        now = self._clock() - generation.submitted_at
        return after(generation.admitted_at), after(generation.first_token_at), now
