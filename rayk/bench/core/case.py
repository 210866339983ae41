"""A workload of the benchmark: how it is prepared, run and named; and the figure that comes of it, beside its limit.

What was not measured is absent from a result.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple, Protocol

import msgspec

from rayk.bench.core.clock import REFERENCE_US
from rayk.bench.core.limits import BOUNDS, Bound
from rayk.manager.manager import PagedKVCacheManager

Progress = Callable[[str], None]
"""Told what is being measured, for people who wait."""


class Sample(NamedTuple):
    """One prepared run: `work` does it and returns the figure; `manager` can be asked for a hit rate afterwards."""

    work: Callable[[], float]
    manager: PagedKVCacheManager | None = None


class Workload(Protocol):
    """Something that can be prepared again and again, each time from scratch."""

    def run(self, lap_ns: float) -> Sample:
        """Prepare a run; `lap_ns` is to be taken off for each pair of clock readings."""
        ...


class Case(NamedTuple):
    """`key` names the figure, `group` the workload that `--only` picks, `unit` what the figure counts."""

    key: str
    group: str
    title: str
    unit: str
    workload: Workload


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
