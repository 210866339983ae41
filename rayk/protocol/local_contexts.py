"""Contexts in commands within one process: handed on as they are, so that nothing is packed, copied or hashed again.

rows_of() reads either form: scripts and replicas do not know which one they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from rayk.context import TextContext
from rayk.protocol.columns import PackedContexts
from rayk.protocol.contexts import Contexts, ContextView, Traits


class LocalContexts(Contexts, frozen=True):
    """Contexts of this process. It is never encoded: of the columns there are only the ids."""

    held: Sequence[TextContext] = ()


class LocalView(ContextView, frozen=True):
    """One of them."""

    held: TextContext = None  # type: ignore[assignment]  # always given; what is before it has defaults


def local_contexts(ctxs: Sequence[TextContext]) -> LocalContexts:
    """Those contexts as part of a command."""
    return LocalContexts([ctx.request_id for ctx in ctxs], b"", b"", {}, ctxs)


class LocalRows:
    """LocalContexts as PackedContexts are read."""

    def __init__(self, held: Sequence[TextContext]) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    @property
    def contexts(self) -> Contexts:
        """As part of a command."""
        return local_contexts(self.held)

    @cached_property
    def ids(self) -> list[str]:
        """Their requests."""
        return [ctx.request_id for ctx in self.held]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each context."""
        return [ctx.tokens.length for ctx in self.held]

    @cached_property
    def rows(self) -> list[list[int]]:
        """Their numbers; none of their tokens was sent before."""
        return [
            [0, ctx.tokens.length, ctx.tokens.processed, ctx.tokens.end, ctx.max_length, ctx.pending_future_count, -1]
            for ctx in self.held
        ]

    def traits(self, row: int) -> Traits:
        """The rarer fields of a context."""
        ctx = self.held[row]
        return Traits(*ctx.root_key, ctx.session_id, ctx.tenant, ctx.priority, ctx.deadline)

    def tokens(self, row: int) -> bytes:
        """The tokens of a context, raw int32."""
        window = self.held[row].tokens
        return window.data[: window.length].tobytes()

    def view(self, row: int) -> ContextView:
        """One context as a message of its own."""
        ctx = self.held[row]
        return LocalView(ctx.request_id, 0, b"", ctx.tokens.processed, ctx.tokens.end, held=ctx)

    def part(self, rows: Sequence[int]) -> Contexts:
        """The contexts of those rows, in that order."""
        return local_contexts([self.held[i] for i in rows])


ContextRows = PackedContexts | LocalRows


def rows_of(contexts: Contexts) -> ContextRows:
    """Contexts of a command, readable by row."""
    return LocalRows(contexts.held) if isinstance(contexts, LocalContexts) else PackedContexts(contexts)


def joined(parts: Sequence[Contexts]) -> Contexts:
    """The contexts of all parts, in that order; parts of one form."""
    local = [part.held for part in parts if isinstance(part, LocalContexts)]
    if local:
        return local_contexts([ctx for held in local for ctx in held])
    ids: list[str] = []
    traits: dict[int, Traits] = {}
    for part in parts:
        traits.update((len(ids) + row, found) for row, found in part.traits.items())
        ids += part.ids
    return Contexts(ids, b"".join([p.numbers for p in parts]), b"".join([p.tokens for p in parts]), traits)
