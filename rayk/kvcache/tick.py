"""Batched work for the replicas and what comes back: the forms beside the one-by-one calls of the manager.

A Tick is one iteration of a continuous-batching loop on one replica, sent as one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayk.context import TextContext
from rayk.errors import InsufficientBlocksError, RaykError


class Admission(NamedTuple):
    """What try_admit() did with one request. With an `error` nothing of it is claimed or changed."""

    replica: int
    error: RaykError | None = None
    device_tokens: int = 0  # reused from the replica's own cache
    peer_tokens: int = 0  # copied from other replicas
    host_tokens: int = 0  # loaded from the host tier, or on their way
    disk_tokens: int = 0  # the same from the disk tier
    claim_seconds: float = 0.0  # inside the replica
    alloc_seconds: float = 0.0

    @property
    def reused_tokens(self) -> int:
        """Tokens from all sources."""
        return self.device_tokens + self.peer_tokens + self.host_tokens + self.disk_tokens


Settled = list[tuple[TextContext, Admission]]
"""Requests that are settled, and what became of each."""


def placed(ctxs: Sequence[TextContext], admissions: Sequence[Admission]) -> list[str]:
    """Ids of those that were placed; the last ones may not have been tried."""
    return [ctx.request_id for ctx, each in zip(ctxs, admissions, strict=False) if each.error is None]


def first_error(admissions: Sequence[Admission]) -> RaykError | None:
    """Why not all of them were placed."""
    return next((each.error for each in admissions if each.error is not None), None)


def windows(ctxs: Sequence[TextContext]) -> list[tuple[int, int, int | None]]:
    """What rewind() moves them back to."""
    return [(ctx.tokens.processed, ctx.tokens.end, ctx.cached_prefix_length) for ctx in ctxs]


def rewind(
    ctxs: Sequence[TextContext], admissions: Sequence[Admission], before: list[tuple[int, int, int | None]]
) -> None:
    """Move the windows of those that were placed back, which their releases do not."""
    for ctx, admission, (processed, end, cached) in zip(ctxs, admissions, before, strict=False):
        if admission.error is None:
            ctx.tokens.processed, ctx.tokens.end, ctx.cached_prefix_length = processed, end, cached


@dataclass(frozen=True)
class Tick:
    """Work for one replica, done in this order: step, release, alloc, execute.

    `execute` is run without the requests whose alloc was refused and those that wait for a load from a tier (unless
    all of them wait), and not at all when none is left.
    """

    step: Sequence[TextContext] = ()
    release: Sequence[str] = ()
    alloc: Sequence[TextContext] = ()
    execute: Sequence[TextContext] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.step or self.release or self.alloc or self.execute)


@dataclass(frozen=True)
class TickResult:
    """What a replica did in a tick. `refused` requests keep what they had; preempt something and try again."""

    value: Any = None  # what fn returned, None when it did not run
    refused: dict[str, InsufficientBlocksError] = field(default_factory=dict)
    free_pages: int = 0
    used_pages: int = 0
    step_seconds: float = 0.0  # inside the replica
    alloc_seconds: float = 0.0
    waiting: frozenset[str] = frozenset()  # left out of this forward: their loads are still on their way
    released: int = 0  # so many of the tick's `release` are done, in order
    error: Exception | None = None  # what ended it early; tick() raises the first of all replicas


def unless_failed(results: list[TickResult]) -> list[TickResult]:
    """Those results; the first error in them is raised."""
    for result in results:
        if result.error is not None:
            raise result.error
    return results


class HitCounts(NamedTuple):
    """Leading pages of a request that one replica could reuse, by where they are; tiers count what follows."""

    device_blocks: int
    host_blocks: int = 0
    disk_blocks: int = 0


class PrefixCacheReset(NamedTuple):
    """What a reset of the prefix cache could not drop: pages that running requests, or copies under way, hold at each
    replica. `hits`: others can still hit the cached ones of them; else they are empty when their holders end.
    """

    held: dict[int, int]
    hits: bool

    @property
    def complete(self) -> bool:
        """Whether nothing of what was computed before is left."""
        return not any(self.held.values())
