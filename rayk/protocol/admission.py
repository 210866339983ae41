"""An admission policy, and the state of the queue that it makes: what drivers configure and the scheduler reports."""

from __future__ import annotations

import msgspec

from rayk.errors import ConfigError


class TenantQuota(msgspec.Struct, frozen=True):
    """`weight` is a tenant's share against others'; `max_pages` what it may hold at once (None: no limit)."""

    weight: float = 1.0
    max_pages: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0 or (self.max_pages is not None and self.max_pages < 1):
            raise ConfigError(f"a tenant needs a weight above 0 and at least 1 page, got {self}")


class AdmissionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How many may wait, for how long, and when a replica is full. Seconds; `tenants` without an entry each have
    `others`.

    `high` and `low` are parts of a replica's pages, in use or promised: above `high` it is given nothing until no more
    than `low` are. Nor is it while it has `max_running` requests, or `max_unfilled` tokens that wait to be prefilled
    (None: no such limit): what waits here is served in order, what waits there is not.
    """

    max_waiting: int = 1024
    patience: float = 30.0
    boost: float = 5.0
    high: float = 0.95
    low: float = 0.9
    max_running: int | None = None
    max_unfilled: int | None = None
    tenants: dict[str, TenantQuota] = {}
    others: TenantQuota = TenantQuota()

    def __post_init__(self) -> None:
        if self.max_waiting < 0 or self.patience <= 0 or self.boost < 0:
            raise ConfigError(f"max_waiting and boost are at least 0 and patience is above 0, got {self}")
        if not 0 < self.low <= self.high <= 1:
            raise ConfigError(f"0 < low <= high <= 1 is needed, got low {self.low} and high {self.high}")
        for limit in (self.max_running, self.max_unfilled):
            if limit is not None and limit < 1:
                raise ConfigError(f"max_running and max_unfilled are at least 1 or None, got {self}")

    def quota(self, tenant: str) -> TenantQuota:
        """That tenant's; ones that are not named each have `others`."""
        return self.tenants.get(tenant, self.others)


class TenantState(msgspec.Struct, frozen=True):
    """What a tenant has: requests that wait, pages held; and how many were let in and turned away so far."""

    waiting: int = 0
    held_pages: int = 0
    admitted: int = 0
    refused: int = 0
    longest_wait: float = 0.0


class AdmissionState(msgspec.Struct, frozen=True):
    """A queue as it is now, and its counters. Seconds; `usual` is what nearly all requests stay at most."""

    waiting: int
    waiting_pages: int
    held_pages: int
    admitted: int
    refused: int
    usual: float
    retry_after: float
    tenants: dict[str, TenantState]
