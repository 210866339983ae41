"""What a replica keeps of a request, and the small results that tell callers about requests and pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rayk.context import TextContext
from rayk.errors import BatchError
from rayk.kvcache.segment import Segment


class Request:
    """A claimed request. Its row holds `pages` page ids, of which the first `committed` are in the prefix tree."""

    __slots__ = (
        "bound", "client", "committed", "ctx", "dummy", "generation", "handed_over", "next_commit_at", "pages", "row",
        "slot_capacity", "tip"
    )  # fmt: skip

    def __init__(self, row: int, dummy: bool, next_commit_at: int, client: str = "", generation: int = 0) -> None:
        self.row = row
        self.client = client  # the driver whose claim it is, and which one
        self.generation = generation
        self.next_commit_at = next_commit_at  # processed tokens at which its next page is full; NEVER for a dummy
        self.bound = 0  # its number in the table's columns once it was in a ContextBatch, see rayk.kvcache.block_table
        self.dummy = dummy
        self.handed_over = False  # came from another replica; what was computed after its committed pages stayed there
        self.pages = 1 if dummy else 0
        self.slot_capacity = 0  # of its own and shared pages: pages x page size, none for a dummy
        self.committed = 0
        self.ctx: TextContext | None = None  # the context it was used with last
        self.tip: Segment | None = None  # end of the held path in the prefix tree, None before the first hit or commit


class Usage(NamedTuple):
    """Pages of one replica, the null page left out: free + used == total; cached pages without a holder are free."""

    total: int
    free: int
    cached: int

    @property
    def used(self) -> int:
        return self.total - self.free


class Reused(NamedTuple):
    """Tokens that an alloc found cached: on the replica itself, copied in from other replicas, or in a tier.

    Those from a tier may still be on their way; what fails to arrive is computed.
    """

    device_tokens: int
    peer_tokens: int
    host_tokens: int = 0
    disk_tokens: int = 0

    @property
    def total(self) -> int:
        """From all sources."""
        return sum(self)

    def plus(self, more: Reused) -> Reused:
        """Both together."""
        return Reused(*(a + b for a, b in zip(self, more, strict=True)))

    def less(self, tokens: int) -> Reused:
        """Without so many tokens, those that came last and from farthest away first."""
        left = list(self)
        for at in (3, 2, 1, 0):
            gone = min(left[at], tokens)
            left[at] -= gone
            tokens -= gone
        return Reused(*left)


NOTHING_REUSED = Reused(0, 0)
NEVER = 1 << 62
FEW = 8  # contexts that are looked up one by one


def refuse_twice(request_ids: Sequence[str], replica: int) -> None:
    """BatchError that names the first request that is in a batch twice."""
    seen: set[str] = set()
    for request_id in request_ids:
        if request_id in seen:
            raise BatchError(f"request {request_id!r} is twice in one batch for replica {replica}; name it once")
        seen.add(request_id)
