"""The last choices of the router, kept so that one of them can be explained."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import msgspec

from rayk.scheduler.choice import Candidate, Choice, Parts


class Reason(msgspec.Struct, frozen=True):
    """Why a request went where it went. `at` is when, in seconds of the scheduler's clock. `candidates` are the chosen
    replica and the cheapest others, cheapest first; there are none for routers that do not reckon in costs."""

    request_id: str
    router: str
    replica: int
    tokens: int
    at: float
    candidates: list[Candidate]


class _Kept(NamedTuple):
    replica: int
    tokens: int
    at: float
    parts: Parts | None


class Decisions:
    """The last `kept` choices of the router called `router`; keeping one costs nothing, the work is done for the few
    that are asked about. Each takes about 56 bytes per replica: 56 MB for a thousand choices among a thousand."""

    def __init__(self, router: str, kept: int = 1000) -> None:
        self._router, self._limit = router, kept
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, request_id: str, tokens: int, choice: Choice, at: float) -> None:
        """Remember the latest choice for a request; the oldest of all goes when there are too many."""
        self._kept.pop(request_id, None)
        self._kept[request_id] = _Kept(choice.replica, tokens, at, choice.parts)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def why(self, request_id: str, candidates: int = 8) -> Reason | None:
        """The reasons of a choice, or None when it is not (any more) known."""
        kept = self._kept.get(request_id)
        if kept is None:
            return None
        named = kept.parts.candidates(kept.replica, candidates) if kept.parts is not None else []
        return Reason(request_id, self._router, kept.replica, kept.tokens, kept.at, named)
