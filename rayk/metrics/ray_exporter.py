"""Metrics by an agent that counts for itself, as Ray's on each node does, which shows them to Prometheus as ray_NAME.

It is told what came since the last time. Of a histogram it gets the sums that Prometheus would read, as gauges: Ray's
own would have to be told of each observation by a call, which takes longer than the claim that was timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from rayk.metrics.histogram import Histogram
from rayk.metrics.reading import Reading
from rayk.metrics.table import Metric


class CountingExporter:
    """`make` makes one of Ray's: of its kind, name, help and labels."""

    def __init__(self, make: Callable[[str, str, str, tuple[str, ...]], Any]) -> None:
        self._make = make
        self._metrics: dict[str, Any] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}

    def write(self, readings: Iterable[Reading]) -> None:
        """What there is to read now."""
        for metric, labels, value in readings:
            tags = dict(zip(metric.labels, labels, strict=True))
            if isinstance(value, Histogram):
                below = 0
                for bound, count in zip((*value.bounds, math.inf), value.counts, strict=True):
                    below += count
                    self._of(metric, "gauge", "_bucket").set(below, tags | {"le": f"{bound:g}".replace("inf", "+Inf")})
                self._of(metric, "gauge", "_count").set(below, tags)
                self._of(metric, "gauge", "_sum").set(value.total, tags)
            elif metric.kind == "gauge":
                self._of(metric, "gauge").set(value, tags)
            else:
                before, self._told[metric.name, labels] = self._told.get((metric.name, labels), 0), value
                new = value - before if value >= before else value  # it began anew
                if new > 0:
                    self._of(metric, "counter").inc(new, tags)

    def _of(self, metric: Metric, kind: str, suffix: str = "") -> Any:
        name = metric.name.removesuffix("_total").replace(":", "_") + suffix  # Ray adds the one and takes no other
        if name not in self._metrics:
            tag_keys = (*metric.labels, "le") if suffix == "_bucket" else metric.labels
            self._metrics[name] = self._make(kind, name, metric.help, tag_keys)
        return self._metrics[name]
