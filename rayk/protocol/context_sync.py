"""Contexts on their way: a driver sends each token once, a replica keeps a mirror of the contexts it serves."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import partial

import numpy as np

from rayk.context import PLAIN_ROOT, IntArray, TextContext, as_int32
from rayk.errors import MessageError, StaleContextError, TokenError
from rayk.protocol.columns import PLAIN, TOKEN_BYTES, AdmitResult, ContextRows, PackedContexts
from rayk.protocol.contexts import Contexts, ContextView, Moved, Origin, Traits
from rayk.values import checked_integer

assert sys.byteorder == "little", "raw int32 tokens travel little-endian"


_NO_TOKENS: IntArray = np.frombuffer(b"", np.int32)


def _raw(tokens: Sequence[int] | IntArray, request_id: str) -> bytes:
    """Draft tokens as bytes. A list of them may have been filled since the context got it, so they are checked here."""
    return as_int32(tokens, request_id).tobytes() if len(tokens) else b""


def _tokens(raw: bytes) -> IntArray:
    return np.frombuffer(raw, np.int32) if raw else _NO_TOKENS


def _int64(numbers: Sequence[int], ctxs: Sequence[TextContext]) -> bytes:
    """The numbers of contexts, raw; TokenError for one whose fields were set to what is no int64 after it was made."""
    try:
        return array("q", numbers).tobytes()
    except (OverflowError, TypeError):
        of_each = len(numbers) // len(ctxs)
        for at, number in enumerate(numbers):
            checked_integer("a number of its window", number, error=partial(TokenError, ctxs[at // of_each].request_id))
        raise


class ContextSender:
    """What each replica has been sent of each context. A different context under the same id starts anew."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[TextContext, int, int]] = {}  # id -> context, replica, tokens sent

    def view(self, ctx: TextContext, replica: int = -1, whole: bool = False, generation: int = 0) -> ContextView:
        """The context for `replica`; only tokens it has not seen unless `whole` or the replica is open (-1)."""
        base = 0 if whole else self._known(ctx, replica)
        window, origin = ctx.tokens, None
        pending, to_verify, accepted = 0, b"", b""
        if not ctx.plain:
            pending, to_verify = ctx.pending_future_count, _raw(ctx.draft_tokens_to_verify, ctx.request_id)
            accepted = _raw(ctx.maybe_accepted_draft_tokens, ctx.request_id)
        if not base:
            origin = Origin(ctx.max_length, ctx.cache_salt, ctx.adapter, ctx.session_id, ctx.tenant)
        return ContextView(
            ctx.request_id,
            base,
            window.data[base : window.length].tobytes(),
            window.processed,
            window.end,
            pending,
            ctx.cached_prefix_length,
            to_verify,
            accepted,
            origin,
            generation,
        )

    def pack(self, ctxs: Sequence[TextContext], replica: int = -1, whole: bool = False) -> Contexts:
        """view() of each context, as columns for one message."""
        numbers: list[int] = []
        tokens: list[memoryview] = []
        traits: dict[int, Traits] = {}
        for row, ctx in enumerate(ctxs):
            base = 0 if whole else self._known(ctx, replica)
            window, cached = ctx.tokens, ctx.cached_prefix_length
            data, length = window.data, window.length
            tokens.append(data.data if not base and len(data) == length else data[base:length].data)
            numbers += (
                base, length - base, window.processed, window.end, ctx.max_length,
                0 if ctx.plain else ctx.pending_future_count, -1 if cached is None else cached,
            )  # fmt: skip
            if not (ctx.plain and (base or _usual(ctx))) and (found := _traits(ctx, bool(base))) is not None:
                traits[row] = found
        return Contexts([c.request_id for c in ctxs], _int64(numbers, ctxs), b"".join(tokens), traits)

    def _known(self, ctx: TextContext, replica: int) -> int:
        """How many tokens of the context `replica` has been sent."""
        known = self._sent.get(ctx.request_id)
        return known[2] if known is not None and known[0] is ctx and known[1] == replica else 0

    def mark_sent(self, ctx: TextContext, replica: int) -> None:
        """`replica` keeps the context and has all its tokens; placeholders must be sent again once filled in."""
        pending = 0 if ctx.plain else ctx.pending_future_count
        self._sent[ctx.request_id] = (ctx, replica, ctx.tokens.length - pending)

    def knows_another(self, ctx: TextContext) -> bool:
        """Whether a replica has another context for its request."""
        known = self._sent.get(ctx.request_id)
        return known is not None and known[0] is not ctx

    def forget(self, request_id: str) -> None:
        """The replica may not have it any more: the next view is whole."""
        self._sent.pop(request_id, None)


def _traits(ctx: TextContext, known: bool) -> Traits | None:
    """What the context has of the rarer things; of one that is `known` only what may change."""
    to_verify = _raw(ctx.draft_tokens_to_verify, ctx.request_id)
    accepted = _raw(ctx.maybe_accepted_draft_tokens, ctx.request_id)
    if known:
        return Traits(to_verify=to_verify, accepted=accepted) if to_verify or accepted else None
    cache_salt, adapter = ctx.root_key
    found = (cache_salt, adapter, ctx.session_id, ctx.tenant, ctx.priority, ctx.deadline, to_verify, accepted)
    return Traits(*found) if found != _USUAL else None


def _usual(ctx: TextContext) -> bool:
    """Whether a plain context has none of the rarer things, as nearly all: quicker to see than what it has."""
    return (
        ctx.root_key == PLAIN_ROOT
        and ctx.session_id is None
        and ctx.tenant is None
        and not ctx.priority
        and ctx.deadline is None
    )


_USUAL = (None, None, None, None, 0, None, b"", b"")


def apply_move(ctx: TextContext, moved: Moved | AdmitResult) -> None:
    """Move the driver's window to where the replica's alloc left it."""
    ctx.tokens.processed, ctx.tokens.end = moved.processed, moved.end
    ctx.cached_prefix_length = moved.cached_prefix


def moved(ctx: TextContext) -> Moved:
    """Where the window of a replica's mirror is."""
    return Moved(ctx.tokens.processed, ctx.tokens.end, ctx.cached_prefix_length)


class ContextMirrors:
    """A replica's copies of the contexts it serves, by request id."""

    def __init__(self, replica: int) -> None:
        self._replica = replica
        self._contexts: dict[str, TextContext] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    def context(self, view: ContextView, keep: bool = True) -> TextContext:
        """The context of a view, brought up to date; StaleContextError when earlier tokens are missing."""
        tokens, o = _tokens(view.tokens), view.origin
        if view.base:
            ctx = self._longer(view.request_id, view.base, tokens)
        elif o is None:
            raise MessageError(f"the first tokens of request {view.request_id!r} came without their origin")
        else:
            ctx = TextContext(
                view.request_id, tokens, o.max_length, o.cache_salt,
                adapter=o.adapter, session_id=o.session_id, tenant=o.tenant,
            )  # fmt: skip
            if keep:
                self._contexts[view.request_id] = ctx
        if not 0 <= view.processed < view.end <= ctx.tokens.length:
            raise _wrong_window(ctx, view.processed, view.end)
        ctx.tokens.processed, ctx.tokens.end = view.processed, view.end
        ctx.cached_prefix_length = view.cached_prefix
        if view.pending or view.to_verify or view.accepted or not ctx.plain:
            ctx.pending_future_count = view.pending
            ctx.draft_tokens_to_verify = _tokens(view.to_verify)
            ctx.maybe_accepted_draft_tokens = _tokens(view.accepted)
        return ctx

    def row(self, batch: ContextRows, row: int, keep: bool = True) -> TextContext:
        """The same for one row of a batch."""
        assert isinstance(batch, PackedContexts)
        request_id, tokens = batch.ids[row], batch.int32[row]
        base, sent, processed, end, max_length, pending, cached = batch.rows[row]
        traits = batch.traits(row)
        if base:
            ctx = self._longer(request_id, base, tokens)
        elif traits is PLAIN and sent and not pending:
            ctx = TextContext.arrived(request_id, tokens.copy(), max_length)
        else:
            ctx = TextContext(
                request_id, tokens, max_length, traits.cache_salt,
                adapter=traits.adapter, session_id=traits.session_id, tenant=traits.tenant,
                priority=traits.priority, deadline=traits.deadline,
            )  # fmt: skip
        if not base and keep:
            self._contexts[request_id] = ctx
        window = ctx.tokens
        if not 0 <= processed < end <= window.length:
            raise _wrong_window(ctx, processed, end)
        window.processed, window.end = processed, end
        ctx.cached_prefix_length = None if cached < 0 else cached
        if pending or traits is not PLAIN or not ctx.plain:
            ctx.pending_future_count = pending
            ctx.draft_tokens_to_verify = _tokens(traits.to_verify)
            ctx.maybe_accepted_draft_tokens = _tokens(traits.accepted)
        return ctx

    def _longer(self, request_id: str, base: int, tokens: IntArray) -> TextContext:
        """The mirror with `tokens` from position `base` on."""
        ctx = self._contexts.get(request_id)
        if ctx is None or ctx.tokens.length < base:
            raise StaleContextError(request_id, self._replica)
        ctx.tokens.replace(base, tokens)
        return ctx

    def check(self, view: ContextView) -> None:
        """Whether the view continues the mirror of its context: StaleContextError, and what is malformed."""
        ctx = self._contexts.get(view.request_id)
        if ctx is None or ctx.tokens.length < view.base:
            raise StaleContextError(view.request_id, self._replica)
        tokens, rest = divmod(len(view.tokens), TOKEN_BYTES)
        if rest:
            raise MessageError(f"{len(view.tokens)} bytes of request {view.request_id!r} are not int32 tokens")
        if not 0 <= view.processed < view.end <= view.base + tokens:
            raise _wrong_window(ctx, view.processed, view.end)

    def keep(self, ctx: TextContext) -> None:
        """This is the request's context from now on."""
        self._contexts[ctx.request_id] = ctx

    def get(self, request_id: str) -> TextContext | None:
        """The mirror of a context, or None."""
        return self._contexts.get(request_id)

    def pack(self, ctxs: Sequence[TextContext]) -> Contexts:
        """Contexts as part of an answer."""
        return ContextSender().pack(ctxs, whole=True)

    def drop(self, request_id: str) -> None:
        """Forget a context; unknown ids are ignored."""
        self._contexts.pop(request_id, None)


def _wrong_window(ctx: TextContext, processed: int, end: int) -> MessageError:
    return MessageError(f"request {ctx.request_id!r} has a window {processed}..{end} over {ctx.tokens.length} tokens")
