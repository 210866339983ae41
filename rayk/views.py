"""Contexts on their way: a driver sends each token once, a replica keeps a mirror of the contexts it serves."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from rayk.context import IntArray, TextContext, TokenWindow
from rayk.errors import MessageError, StaleContextError
from rayk.messages import ContextView, Moved, Origin

assert sys.byteorder == "little", "raw int32 tokens travel little-endian"


def _raw(tokens: Sequence[int] | IntArray) -> bytes:
    return np.asarray(tokens, np.int32).tobytes() if len(tokens) else b""


def _tokens(raw: bytes) -> IntArray:
    return np.frombuffer(raw, np.int32)


class Sender:
    """What each replica has been sent of each context. A different context under the same id starts anew."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[TextContext, int, int]] = {}  # id -> context, replica, tokens sent

    def view(self, ctx: TextContext, replica: int = -1, whole: bool = False) -> ContextView:
        """The context for `replica`; only tokens it has not seen unless `whole` or the replica is open (-1)."""
        base = 0
        if not whole:
            known = self._sent.get(ctx.request_id)
            if known is not None and known[0] is ctx and known[1] == replica:
                base = known[2]
        window = ctx.tokens
        origin = None
        if not base:
            origin = Origin(ctx.max_length, ctx.cache_salt, ctx.adapter, ctx.session_id, ctx.tenant)
        return ContextView(
            ctx.request_id,
            base,
            window.data[base : window.length].tobytes(),
            window.processed,
            window.end,
            ctx.pending_future_count,
            ctx.cached_prefix_length,
            _raw(ctx.draft_tokens_to_verify),
            _raw(ctx.maybe_accepted_draft_tokens),
            origin,
        )

    def arrived(self, ctx: TextContext, replica: int) -> None:
        """`replica` keeps the context and has all its tokens; placeholders must be sent again once filled in."""
        self._sent[ctx.request_id] = (ctx, replica, ctx.tokens.length - ctx.pending_future_count)

    def forget(self, request_id: str) -> None:
        """The replica may not have it any more: the next view is whole."""
        self._sent.pop(request_id, None)


def apply_move(ctx: TextContext, moved: Moved) -> None:
    """Move the driver's window to where the replica's alloc left it."""
    ctx.tokens.processed, ctx.tokens.end = moved.processed, moved.end
    ctx.cached_prefix_length = moved.cached_prefix


def moved(ctx: TextContext) -> Moved:
    """Where the window of a replica's mirror is."""
    return Moved(ctx.tokens.processed, ctx.tokens.end, ctx.cached_prefix_length)


class Mirrors:
    """A replica's copies of the contexts it serves, by request id."""

    def __init__(self, replica: int) -> None:
        self._replica = replica
        self._contexts: dict[str, TextContext] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    def context(self, view: ContextView, keep: bool = True) -> TextContext:
        """The context of a view, brought up to date; StaleContextError when earlier tokens are missing."""
        ctx = self._contexts.get(view.request_id)
        tokens = _tokens(view.tokens)
        if view.base == 0:
            if view.origin is None:
                raise MessageError(f"the first tokens of request {view.request_id!r} came without their origin")
            o = view.origin
            ctx = TextContext(
                view.request_id, tokens, o.max_length, o.cache_salt,
                adapter=o.adapter, session_id=o.session_id, tenant=o.tenant,
            )  # fmt: skip
            if keep:
                self._contexts[view.request_id] = ctx
        elif ctx is None or ctx.tokens.length < view.base:
            raise StaleContextError(view.request_id, self._replica)
        else:
            ctx.tokens.replace(view.base, tokens)
        self._place(ctx.tokens, view)
        ctx.pending_future_count = view.pending
        ctx.cached_prefix_length = view.cached_prefix
        ctx.draft_tokens_to_verify = _tokens(view.to_verify)
        ctx.maybe_accepted_draft_tokens = _tokens(view.accepted)
        return ctx

    def _place(self, window: TokenWindow, view: ContextView) -> None:
        if not 0 <= view.processed < view.end <= window.length:
            raise MessageError(
                f"request {view.request_id!r} has a window {view.processed}..{view.end} over {window.length} tokens"
            )
        window.processed, window.end = view.processed, view.end

    def drop(self, request_id: str) -> None:
        """Forget a context; unknown ids are ignored."""
        self._contexts.pop(request_id, None)
