"""Running requests as arrays: the contexts of one replica's batch as views into one token arena.

A loop over hundreds of decoding requests should not touch each of them in Python. ContextBatch keeps their
tokens in one int32 arena and their windows in columns over the batch; alloc_many(), runtime_inputs() and step()
then work on the columns. The contexts stay what they are: each reads and writes its own part of the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from rayk.context import IntArray, TextContext, TokenWindow, as_int32
from rayk.errors import BatchError, TokenError
from rayk.kvcache.block_table import BlockTable, Column
from rayk.kvcache.request import Request

_OFFSET, _SPACE, _LIMIT, _ROW, _SERIAL, _STEPPED, _LENGTH, _PROCESSED, _END = range(9)
_FIRST_ARENA = 1 << 14  # tokens


class ContextBatch(Sequence[TextContext]):  # told apart by `type(..) is`: isinstance() is slow for an abstract base
    """Contexts of one replica, in batch order. The caller owns it; each context is in at most one batch.

    `lengths`, `processed` and `ends` are int64 `[len(batch)]`, read-only views that are valid until the next call.
    """

    def __init__(self, contexts: Iterable[TextContext] = ()) -> None:
        self._contexts: list[TextContext] = []
        self._index: dict[str, int] = {}
        self._tokens: IntArray = np.empty(_FIRST_ARENA, np.int32)
        self._used = 0  # of the arena; what lies before and is in no row is found again by _repack()
        self._columns: Column = np.zeros((9, 64), np.int64)
        self._take_views()
        # What the batch knows of its requests at a replica, see rayk.kvcache.decode.
        self.bound_to: object = None
        self.bound_epoch = -1
        self.requests: list[Request | None] = []
        self._publish: Callable[[], None] | None = None  # commits what the replica noted at the last step
        self.allocated = -1  # `moves` when all had slots for their tokens
        # Facts that hold until `stale`: whether all are plain decodes, the longest, and how far update() may go.
        self.stale = True
        self.moves = 0  # changes of any window
        self.order = 0  # changes of who is in the batch
        self.longest = 0
        self._decoding = False
        self._spare = 0
        for ctx in contexts:
            self.add(ctx)

    def _take_views(self) -> None:
        n, columns = len(self._contexts), self._columns
        self.offset, self.space, self.limit = columns[_OFFSET, :n], columns[_SPACE, :n], columns[_LIMIT, :n]
        self.row, self.serial, self.stepped = columns[_ROW, :n], columns[_SERIAL, :n], columns[_STEPPED, :n]
        self.length, self.done, self.end = columns[_LENGTH, :n], columns[_PROCESSED, :n], columns[_END, :n]
        self._window = columns[_LENGTH:, :n]
        # Scratch of rayk.kvcache.decode, kept so that a step allocates nothing of the batch's size.
        self.need, self.capacity, self.short = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)
        self._places = np.empty(n, np.int64)

    # -- who is in it ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._contexts)

    @overload
    def __getitem__(self, at: int) -> TextContext: ...
    @overload
    def __getitem__(self, at: slice) -> list[TextContext]: ...
    def __getitem__(self, at: int | slice) -> TextContext | list[TextContext]:
        return self._contexts[at]

    def __iter__(self) -> Iterator[TextContext]:
        return iter(self._contexts)

    def __contains__(self, ctx: object) -> bool:
        return isinstance(ctx, TextContext) and self._contexts[self._index.get(ctx.request_id, -1) :][:1] == [ctx]

    def position(self, request_id: str) -> int:
        """Where the request is in the batch; BatchError when it is not."""
        at = self._index.get(request_id)
        if at is None:
            raise BatchError(f"request {request_id!r} is not in this batch of {len(self)}")
        return at

    def add(self, ctx: TextContext) -> None:
        """Put a context at the end. Its tokens move into the arena."""
        window = ctx.tokens
        if isinstance(window, ArenaWindow) or ctx.request_id in self._index:
            raise BatchError(f"request {ctx.request_id!r} is in a batch already; remove it there first")
        at = len(self._contexts)
        if at == self._columns.shape[1]:
            self._columns = np.concatenate((self._columns, np.zeros_like(self._columns)), axis=1)
        column = self._columns[:, at]
        column[_LIMIT], column[_SERIAL], column[_STEPPED] = ctx.max_length, -1, 0
        column[_LENGTH], column[_PROCESSED], column[_END] = window.length, window.processed, window.end
        tokens = window.data[: window.length]
        self._contexts.append(ctx)
        self.requests.append(None)
        self._index[ctx.request_id] = at
        self._take_views()
        self._store(at, tokens, len(tokens))
        window._batch, window._at = self, at
        window.__class__ = ArenaWindow
        self.bound_epoch = -1  # this one's request is not known yet
        self.order += 1
        self.changed()

    def remove(self, request_id: str) -> TextContext:
        """Take a context out; its tokens are its own again. The last context of the batch takes its place."""
        at = self.position(request_id)
        if self._publish is not None:
            self._publish()
        ctx, last = self._contexts[at], len(self._contexts) - 1
        window = ctx.tokens
        tokens, scalars = window.data.copy(), (window.length, window.processed, window.end)
        window.__class__ = TokenWindow
        window._batch = None
        window.data, (window.length, window.processed, window.end) = tokens, scalars
        if at != last:
            self._columns[:, at] = self._columns[:, last]
            moved = self._contexts[at] = self._contexts[last]
            self.requests[at] = self.requests[last]
            self._index[moved.request_id] = moved.tokens._at = at
        self._contexts.pop()
        self.requests.pop()
        del self._index[request_id]
        self._take_views()
        self.order += 1
        self.changed()
        return ctx

    # -- at a replica ------------------------------------------------------------------------------

    def bind(self, to: object, table: BlockTable, request_of: Callable[[TextContext], Request | None]) -> bool:
        """Find each context's request and remember its row of `table`. False when `request_of` has none for one."""
        if self.bound_to is to:
            missing = np.flatnonzero(table.serial[self.row] != self.serial).tolist()
        else:
            self.bound_to, missing = to, list(range(len(self)))
            self.serial[:] = -1
        self.allocated = -1
        for at in missing:
            request = request_of(self._contexts[at])
            if request is None:
                return False
            self.row[at], self.serial[at], self.requests[at] = request.row, request.bound, request
        self.bound_epoch = table.epoch
        return True

    def note_allocated(self) -> None:
        """All contexts have slots for their tokens, until a window moves."""
        self.allocated = self.moves

    def note_stepped(self, publish: Callable[[], None] | None) -> bool:
        """Remember what is processed. Whether that is news to `publish`, which commits it before a context leaves."""
        self.stepped[:] = self.done
        news = publish is not None and self._publish is None
        if news:
            self._publish = publish
        return news

    def published(self) -> None:
        """What was noted is committed."""
        self._publish = None

    # -- the arena ---------------------------------------------------------------------------------

    def _store(self, at: int, tokens: IntArray, wanted: int) -> None:
        """Give row `at` a new place with half as much again as `wanted` tokens need, and put `tokens` there."""
        space = wanted + wanted // 2 + 16
        self.space[at] = 0
        if self._used + space > len(self._tokens):
            self._repack(space)
        self.offset[at], self.space[at] = self._used, space
        self._tokens[self._used : self._used + len(tokens)] = tokens
        self._used += space

    def _repack(self, extra: int) -> None:
        """Move all rows to the front of an arena with room for as much again and `extra`."""
        arena = np.empty(max(_FIRST_ARENA, 2 * (int(self.space.sum()) + extra)), np.int32)
        used = 0
        for i, (offset, space) in enumerate(zip(self.offset.tolist(), self.space.tolist(), strict=True)):
            arena[used : used + space] = self._tokens[offset : offset + space]
            self.offset[i] = used
            used += space
        self._tokens, self._used = arena, used

    def data(self, at: int) -> IntArray:
        """The arena's part of row `at`, [space] int32."""
        offset = int(self.offset[at])
        return self._tokens[offset : offset + int(self.space[at])]

    # -- windows ----------------------------------------------------------------------------------

    @property
    def lengths(self) -> Column:
        """Tokens of each context."""
        return _read_only(self.length)

    @property
    def processed(self) -> Column:
        """Tokens of each context whose KV exists."""
        return _read_only(self.done)

    @property
    def ends(self) -> Column:
        """End of the active window of each context."""
        return _read_only(self.end)

    def changed(self) -> None:
        """A window was moved, or a context gained or lost drafts or placeholders."""
        self.stale = True
        self.moves += 1

    @property
    def decoding(self) -> bool:
        """Whether every context is about to compute exactly its last token, without drafts or placeholders."""
        if self.stale:
            self._look()
        return self._decoding

    def _look(self) -> None:
        self.stale = False
        self._decoding = bool(
            len(self)
            and (self.done == self.length - 1).all()
            and (self.end == self.length).all()
            and all(ctx.plain for ctx in self._contexts)
        )
        if self._decoding:
            self.longest = int(self.length.max())
            self._spare = int((np.minimum(self.space, self.limit) - self.length).min())

    def update(self, tokens: Any) -> None:
        """The forward of all active windows is done: TextContext.update() for each, with tokens[i] (int32 [len]).

        TokenError (nothing is changed) when one has its max_length or `tokens` is not one int32 for each.
        """
        new = tokens if isinstance(tokens, np.ndarray) and tokens.dtype == np.int32 else as_int32(tokens, "of a batch")
        if new.shape != (len(self),):
            raise TokenError("of a batch", f"{new.shape} tokens for {len(self)} contexts; pass one for each")
        if not self.decoding:
            self._refuse_full(self.length[self.end == self.length] + 1, np.flatnonzero(self.end == self.length))
            for ctx, token in zip(self._contexts, new.tolist(), strict=True):
                ctx.update(token)
            return
        if self._spare < 1:
            self._refuse_full(self.length + 1, np.arange(len(self)))
            for at in np.flatnonzero(self.space <= self.length).tolist():
                self._store(at, self.data(at)[: int(self.length[at])].copy(), int(self.length[at]))
            self._look()
        self._tokens[np.add(self.offset, self.length, out=self._places)] = new
        self._window += 1  # length, processed and end alike
        self.moves += 1
        self.longest += 1
        self._spare -= 1

    def _refuse_full(self, wanted: Column, of: npt.NDArray[np.intp]) -> None:
        full = of[wanted > self.limit[of]]
        if full.size:
            ctx = self._contexts[int(full[0])]
            raise TokenError(ctx.request_id, f"has its max_length of {ctx.max_length} tokens; release it")


def _read_only(column: Column) -> Column:
    view = column.view()
    view.flags.writeable = False
    return view


class ArenaWindow(TokenWindow):
    """A TokenWindow while its context is in a batch: the same object, with its values in the batch's arrays."""

    __slots__ = ()
    _batch: ContextBatch

    @property
    def data(self) -> IntArray:
        return self._batch.data(self._at)

    @data.setter
    def data(self, tokens: IntArray) -> None:
        batch, at = self._batch, self._at
        batch._store(at, tokens[: int(batch.length[at])], len(tokens))
        batch.changed()

    @property
    def length(self) -> int:
        return int(self._batch.length[self._at])

    @length.setter
    def length(self, value: int) -> None:
        self._batch.length[self._at] = value
        self._batch.changed()

    @property
    def processed(self) -> int:
        return int(self._batch.done[self._at])

    @processed.setter
    def processed(self, value: int) -> None:
        self._batch.done[self._at] = value
        self._batch.changed()

    @property
    def end(self) -> int:
        return int(self._batch.end[self._at])

    @end.setter
    def end(self, value: int) -> None:
        self._batch.end[self._at] = value
        self._batch.changed()

    def changed(self) -> None:
        """The context gained or lost drafts or placeholders."""
        self._batch.changed()
