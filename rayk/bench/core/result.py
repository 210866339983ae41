"""The result of `rayk bench core`, also core.json: figures beside their limits. What was not measured is absent."""

from __future__ import annotations

from statistics import median
from typing import Any

import msgspec

from rayk.bench.core.clock import REFERENCE_US
from rayk.bench.core.limits import BOUNDS, Bound


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One measured number, in `unit`.

    value: as measured here, the median of `samples`. at_reference: what it comes to on the reference machine.
    limit, limit_here: the most that is allowed there and here. best, peer: what the best peer needs there.
    """

    key: str
    title: str
    unit: str
    value: float
    samples: list[float]
    at_reference: float
    limit: float | None = None
    limit_here: float | None = None
    best: float | None = None
    peer: str | None = None
    details: dict[str, Any] = {}

    @property
    def ok(self) -> bool | None:
        """Within its limit; None without one."""
        return None if self.limit is None else self.at_reference <= self.limit

    @property
    def times_faster(self) -> float | None:
        """The best peer's figure over this one."""
        return None if self.best is None else self.best / self.at_reference


class CoreResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run: `unit_us` is the machine's unit (clock.py), `smoke` a run too short to judge by."""

    command: str
    version: str
    environment: dict[str, Any]
    unit_us: float
    figures: list[Figure]
    smoke: bool = False
    commit: str | None = None
    reference_us: float = REFERENCE_US

    @property
    def exceeded(self) -> list[Figure]:
        """Figures over their limit."""
        return [figure for figure in self.figures if figure.ok is False]

    def to_json(self) -> bytes:
        """One line of JSON."""
        return msgspec.json.encode(self)


def make_figure(
    key: str,
    title: str,
    unit: str,
    samples: list[float],
    speed: float = 1.0,
    details: dict[str, Any] | None = None,
    bound: Bound | None = None,
) -> Figure:
    """The median of `samples`, held against `bound`, that of the key unless given; `speed` is this machine's unit over
    the reference's."""
    bound, value = bound or BOUNDS[key], median(samples)
    factor = speed if bound.scaled else 1.0
    return Figure(
        key=key,
        title=title,
        unit=unit,
        value=value,
        samples=samples,
        at_reference=value / factor,
        limit=bound.limit,
        limit_here=None if bound.limit is None else bound.limit * factor,
        best=bound.best,
        peer=bound.peer or None,
        details=details or {},
    )
