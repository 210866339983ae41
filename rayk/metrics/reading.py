"""Readings of metrics, and who carries them where they are looked at.

Nothing is pushed where work is done: objects count for themselves, and every few seconds, or when somebody asks,
functions named read_..() make readings of what they count.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from rayk.metrics.histogram import Histogram
from rayk.metrics.table import ALIASES, METRICS, Metric

log = logging.getLogger("rayk.metrics")

READ_SECONDS = 5.0  # between two readings that are exported

Value = float | Histogram


class Reading(NamedTuple):
    """One metric with values for all its labels, in their order. Counters and histograms are since the start."""

    metric: Metric
    labels: tuple[str, ...]
    value: Value


Labels = dict[str, str]  # what all readings of a source have


def reading(name: str, value: Value, common: Labels, **labels: str) -> Reading:
    """A reading of the metric of that name; those of `common` that it does not have are left out. KeyError for a label
    that it has and that was not given."""
    metric = METRICS[name]
    given = common | labels
    return Reading(metric, tuple(given[label] for label in metric.labels), value)


class Exporter(Protocol):
    """Takes readings, again and again."""

    def write(self, readings: Iterable[Reading]) -> None:
        """What there is to read now."""
        ...


class InMemory:
    """Keeps the latest of each, for one process without anybody to export to: `values[name]` by labels."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[str, ...], Value]] = {}

    def write(self, readings: Iterable[Reading]) -> None:
        for each in readings:
            self.values.setdefault(each.metric.name, {})[each.labels] = each.value

    def total(self, name: str, **labels: str) -> float:
        """All readings of a counter or gauge that have those labels, added up."""
        metric, found = METRICS[name], self.values.get(name, {})
        wanted = [(metric.labels.index(label), value) for label, value in labels.items()]
        chosen = [value for key, value in found.items() if all(key[at] == value for at, value in wanted)]
        return sum(value for value in chosen if not isinstance(value, Histogram))


def aliases(readings: Iterable[Reading], model: str) -> Iterator[Reading]:
    """The same as vLLM names it, for each replica."""
    by_name: dict[str, dict[str, list[Reading]]] = {}
    for each in readings:
        if "replica_idx" in each.metric.labels:
            replica = each.labels[each.metric.labels.index("replica_idx")]
            by_name.setdefault(each.metric.name, {}).setdefault(replica, []).append(each)
    for alias in ALIASES:
        for replica, found in by_name.get(alias.of, {}).items():
            chosen = [each.value for each in found if _has(each, alias.where)]
            value = _sum(chosen)
            if alias.share:
                whole = _sum([each.value for each in found])
                assert not isinstance(value, Histogram) and not isinstance(whole, Histogram)
                value = value / whole if whole else 0.0
            yield Reading(alias.metric, (model, replica), value)


def _has(each: Reading, where: Iterable[tuple[str, str]]) -> bool:
    labels = dict(zip(each.metric.labels, each.labels, strict=True))
    return all(labels[name] == value for name, value in where)


def _sum(values: list[Value]) -> Value:
    first, total = values[0] if values else 0.0, 0.0
    if isinstance(first, Histogram):
        for more in values[1:]:
            assert isinstance(more, Histogram)
            first = first.plus(more)
        return first
    for value in values:
        assert not isinstance(value, Histogram)
        total += value
    return total


class Reporter:
    """Exports what `read` returns every few seconds, from a thread of its own."""

    def __init__(
        self,
        read: Callable[[], Iterable[Reading]],
        exporter: Exporter,
        model: str | None = None,
        every: float = READ_SECONDS,
    ) -> None:
        self._read, self._exporter, self._model, self._every = read, exporter, model, every
        self._over = threading.Event()
        threading.Thread(target=self._run, name="rayk-metrics", daemon=True).start()

    def stop(self) -> None:
        """No more of it."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                found = list(self._read())
                if self._model is not None:
                    found += aliases(found, self._model)
                self._exporter.write(found)
            except Exception:  # metrics end nothing; the next turn tries again
                log.debug("metrics could not be read", exc_info=True)
