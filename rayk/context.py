"""A request as the cache sees it: its tokens, the window over them, and what must not be shared.

    0 ........ processed ........ end ........ length
      KV exists |  active window  |  left out by chunk()

`processed` counts tokens whose KV is in pages, the active window is what the next forward consumes.
Tokens are append-only (placeholders of tokens still being sampled may be filled in), so that pages
made from them stay true.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from rayk.errors import TokenError
from rayk.values import (
    INT64_MAX,
    LONGEST_NAME,
    checked_integer,
    checked_optional_name,
    checked_request_id,
    checked_seconds,
)

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
PLACEHOLDER = -1
PLAIN_ROOT: tuple[str | None, str | None] = (None, None)  # of requests without a cache salt and an adapter

IntArray = npt.NDArray[np.int32]
Drafts = Sequence[int] | IntArray


def as_int32(tokens: Any, request_id: str) -> IntArray:
    """`tokens` (ints in a sequence, array or tensor) as a 1-D int32 array; TokenError names what does not fit."""
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise TokenError(request_id, "tokens must be a flat sequence of ints, got nested ones") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TokenError(
            request_id, f"tokens must be a flat sequence of ints, got {array.dtype} of shape {array.shape}"
        )
    if array.dtype != np.int32 and array.size:
        wrong = np.flatnonzero((array < INT32_MIN) | (array > INT32_MAX))
        if wrong.size:
            at = int(wrong[0])
            raise TokenError(request_id, f"token {array[at]} at position {at} is out of int32; check the tokenizer")
    return array.astype(np.int32)


class TokenWindow:
    """The token array of a request and its window. int32, grows by appending; lengths are in tokens."""

    __slots__ = ("_at", "_batch", "_request_id", "data", "end", "length", "processed")
    _at: int  # used while the window is in a ContextBatch, see rayk.kvcache.context_batch
    _batch: Any

    def __init__(self, tokens: IntArray, request_id: str = "") -> None:
        self.data = tokens
        self.length = self.end = len(tokens)
        self.processed = 0
        self._request_id = request_id

    def __len__(self) -> int:
        return self.length

    @property
    def processed_length(self) -> int:
        """Tokens whose KV exists."""
        return self.processed

    @property
    def active_length(self) -> int:
        """Tokens that the next forward consumes; at least 1."""
        return self.end - self.processed

    @property
    def all(self) -> IntArray:
        """All tokens, [length] int32, a read-only view that is valid until the next append."""
        view = self.data[: self.length]
        view.flags.writeable = False
        return view

    @property
    def active(self) -> IntArray:
        """The tokens of the active window, [active_length] int32, read-only."""
        return self.all[self.processed : self.end]

    def chunk(self, n: int) -> None:
        """Shorten the active window to its first `n` tokens, 1 <= n < active_length."""
        if not 1 <= n < self.end - self.processed:
            raise TokenError(self._request_id, f"chunk({n}) needs 1 <= n < {self.end - self.processed} active tokens")
        self.end = self.processed + n

    def skip(self, n: int) -> None:
        """Count `n` more tokens as processed; at least one active token must be left."""
        if not 0 <= n < self.end - self.processed:
            raise TokenError(self._request_id, f"skip({n}) needs 0 <= n < {self.end - self.processed} active tokens")
        self.processed += n

    def rewind(self, n: int) -> None:
        """Count the last `n` processed tokens as not processed."""
        if not 0 <= n <= self.processed:
            raise TokenError(self._request_id, f"rewind({n}) needs 0 <= n <= {self.processed} processed tokens")
        self.processed -= n

    def append(self, token: int) -> None:
        """Add one token at the end without moving the window."""
        if self.length == len(self.data):
            grown = np.empty(max(16, self.length + self.length // 2), np.int32)
            grown[: self.length] = self.data
            self.data = grown
        try:
            self.data[self.length] = token if type(token) is int else index(token)
        except (OverflowError, TypeError, ValueError, RuntimeError):
            raise TokenError(self._request_id, f"token {token!r} is not an int32; check the sampler") from None
        self.length += 1

    def replace(self, base: int, tokens: IntArray) -> None:
        """Make `tokens` the tokens from position `base` on, keeping what lies before."""
        length = base + len(tokens)
        if length > len(self.data):
            grown = np.empty(length + length // 2, np.int32)
            grown[:base] = self.data[:base]
            self.data = grown
        self.data[base:length] = tokens
        self.length = length

    def changed(self) -> None:
        """The context gained or lost drafts or placeholders. Of interest to a batch only, see
        rayk.kvcache.context_batch."""

    def snapshot(self) -> TokenWindow:
        """The same window over the same tokens, which later appends and moves do not change."""
        copy = TokenWindow.__new__(TokenWindow)
        copy.data, copy._request_id = self.all, self._request_id
        copy.length, copy.processed, copy.end = self.length, self.processed, self.end
        return copy


class TextContext:
    """One request. The caller owns it; alloc() moves its window past reused pages and sets `cached_prefix_length`.

    `cache_salt` and `adapter` keep its pages apart from those of requests with another salt or adapter.
    `cached_prefix_length` is None until the first admission with prefix caching, then the tokens reused there.
    ConfigError for an id, and TokenError for anything else that no message could carry; see rayk.values.
    """

    __slots__ = (
        "_accepted",
        "_drafts",
        "_pending",
        "cached_prefix_length",
        "deadline",
        "generation",
        "max_length",
        "plain",
        "priority",
        "request_id",
        "root_key",
        "session_id",
        "tenant",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        tokens: Any,
        max_length: int,
        cache_salt: str | None = None,
        *,
        adapter: str | None = None,
        session_id: str | None = None,
        tenant: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        pending_future_count: int = 0,
    ) -> None:
        if type(request_id) is not str or not request_id.isascii() or not 0 < len(request_id) <= LONGEST_NAME:
            request_id = checked_request_id(request_id)
        self.request_id = request_id
        array = as_int32(tokens, request_id)
        if not len(array):
            raise TokenError(request_id, "a request needs at least one token")
        if type(max_length) is not int or not len(array) <= max_length <= INT64_MAX:
            max_length = checked_integer("max_length", max_length, error=partial(TokenError, request_id))
            if len(array) > max_length:
                raise TokenError(request_id, f"{len(array)} tokens are more than max_length {max_length}")
        if type(pending_future_count) is not int or not 0 <= pending_future_count <= len(array):
            name, error = "pending_future_count", partial(TokenError, request_id)
            pending_future_count = checked_integer(name, pending_future_count, error=error)
            if not 0 <= pending_future_count <= len(array):
                raise TokenError(request_id, f"{name} {pending_future_count} of {len(array)} tokens")
        # Nearly all requests have none of these.
        if not (cache_salt is adapter is session_id is tenant is None and deadline is None):
            error = partial(TokenError, request_id)
            cache_salt = checked_optional_name("cache_salt", cache_salt, error)
            adapter = checked_optional_name("adapter", adapter, error)
            session_id = checked_optional_name("session_id", session_id, error)
            tenant = checked_optional_name("tenant", tenant, error)
            deadline = None if deadline is None else checked_seconds("deadline", deadline, error)
        if type(priority) is not int or priority:
            priority = checked_integer("priority", priority, error=partial(TokenError, request_id))
        self.tokens = TokenWindow(array, request_id)
        self.max_length = max_length
        self.session_id = session_id
        self.tenant = tenant
        self.priority = priority
        self.deadline = deadline
        self.cached_prefix_length: int | None = None
        self.root_key = (cache_salt, adapter)
        self.generation = 0  # of the claim under which it was used last, see rayk.errors.LeaseLostError
        self._pending = pending_future_count
        self._drafts: Drafts = ()
        self._accepted: Drafts = ()
        self.plain = not pending_future_count  # neither placeholders nor drafts: what nearly all requests are

    @classmethod
    def arrived(cls, request_id: str, tokens: IntArray, max_length: int) -> TextContext:
        """A plain context whose tokens were checked where it was made; `tokens` is its own to keep and to write."""
        ctx = cls.__new__(cls)
        ctx.request_id = request_id
        ctx.tokens = TokenWindow(tokens, request_id)
        ctx.max_length = max_length
        ctx.session_id = ctx.tenant = ctx.deadline = ctx.cached_prefix_length = None
        ctx.priority = ctx._pending = ctx.generation = 0
        ctx.root_key = PLAIN_ROOT
        ctx._drafts = ctx._accepted = ()
        ctx.plain = True
        return ctx

    @property
    def cache_salt(self) -> str | None:
        """Requests share pages only with requests of the same salt."""
        return self.root_key[0]

    @property
    def adapter(self) -> str | None:
        """Requests share pages only with requests of the same adapter."""
        return self.root_key[1]

    @property
    def pending_future_count(self) -> int:
        """How many of the last tokens are placeholders."""
        return self._pending

    @pending_future_count.setter
    def pending_future_count(self, count: int) -> None:
        self._pending = count
        self._classify()

    @property
    def draft_tokens_to_verify(self) -> Drafts:
        """Tokens that a draft model proposes after the last one."""
        return self._drafts

    @draft_tokens_to_verify.setter
    def draft_tokens_to_verify(self, tokens: Drafts) -> None:
        self._drafts = tokens
        self._classify()

    @property
    def maybe_accepted_draft_tokens(self) -> Drafts:
        """Drafts of the last step whose KV is in pages already, if they turn out to be right."""
        return self._accepted

    @maybe_accepted_draft_tokens.setter
    def maybe_accepted_draft_tokens(self, tokens: Drafts) -> None:
        self._accepted = tokens
        self._classify()

    def _classify(self) -> None:
        """A list may be filled in place later, so one counts as drafts even while it is empty."""
        lists = isinstance(self._drafts, list) or isinstance(self._accepted, list)
        self.plain = not (self._pending or lists or len(self._drafts) or len(self._accepted))
        self.tokens.changed()

    def __repr__(self) -> str:
        t = self.tokens
        return f"TextContext({self.request_id!r}, length={t.length}, processed={t.processed}, end={t.end})"

    def update(self, token: int) -> None:
        """The forward of the active window is done: consume the chunk, or else append the sampled `token`."""
        window = self.tokens
        if window.end < window.length:
            window.processed, window.end = window.end, window.length
            return
        if window.length >= self.max_length:
            raise TokenError(self.request_id, f"has its max_length of {self.max_length} tokens; release it")
        window.append(token)
        window.processed, window.end = window.end, window.length

    def update_with_future_token(self) -> None:
        """As update(), but the token is still being sampled: a placeholder stands in until realize_future_token()."""
        chunked = self.tokens.end < self.tokens.length
        self.update(PLACEHOLDER)
        self.pending_future_count += not chunked

    def realize_future_token(self, token: int) -> None:
        """Fill in the oldest placeholder."""
        if not self.pending_future_count:
            raise TokenError(self.request_id, "no placeholder is pending")
        self.tokens.data[self.tokens.length - self.pending_future_count] = as_int32([token], self.request_id)[0]
        self.pending_future_count -= 1

    def reset(self) -> None:
        """After preemption: all tokens become the prompt again, nothing is processed, drafts are dropped."""
        self.tokens.processed, self.tokens.end = 0, self.tokens.length
        self.draft_tokens_to_verify = ()
        self.maybe_accepted_draft_tokens = ()

    def snapshot(self) -> TextContext:
        """A copy for readers: same fields, a window that stays as it is now, tokens that cannot be written."""
        copy = TextContext.__new__(TextContext)  # field by field: a loop over them takes three times as long
        copy.request_id, copy.tokens, copy.max_length = self.request_id, self.tokens.snapshot(), self.max_length
        copy.session_id, copy.tenant, copy.root_key = self.session_id, self.tenant, self.root_key
        copy.priority, copy.deadline, copy.generation = self.priority, self.deadline, self.generation
        copy.cached_prefix_length, copy.plain = self.cached_prefix_length, self.plain
        copy._pending, copy._drafts, copy._accepted = self._pending, self._drafts, self._accepted
        return copy
