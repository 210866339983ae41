"""A workload of the benchmark: how it is prepared, run and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

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
