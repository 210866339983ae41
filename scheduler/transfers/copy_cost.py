"""Which replica copies which part of a prefix to another one that misses it, and whether that pays.

A copy pays when it takes less time than computing the same tokens: latency and bytes over bandwidth of the link
between the two replicas, as measured on past copies, against tokens over the prefill rate. Without a known prefill
rate copies are always made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

SMALL = float(1 << 20)  # bytes; below that a copy's time is mostly latency


class Span(NamedTuple):
    """Pages start .. stop of a prefix, to be copied from `replica`."""

    replica: int
    start: int
    stop: int


def copy_spans(have: int, resident: Sequence[int], stop: int, order: Sequence[int] | None = None) -> list[Span]:
    """How to extend a prefix of `have` pages to at most `stop` from replicas that hold resident[i] leading pages.

    Each page comes from the first replica of `order` that holds it; by default from that of lowest index, as in MAX
    26.5. Replicas that are not in `order` are not asked.
    """
    spans = []
    for replica in range(len(resident)) if order is None else order:
        end = min(resident[replica], stop)
        if end > have:
            spans.append(Span(replica, have, end))
            have = end
    return spans


def profitable_spans(
    spans: Sequence[Span], copy_seconds: Callable[[Span], float], page_size: int, prefill_rate: float
) -> list[Span]:
    """The leading spans that are worth copying: as many as save the most time, none if each way costs time.

    `copy_seconds` says what a span's copy takes; `prefill_rate` is in tokens a second. A span is no use without those
    before it, so a slow one may be carried by a fast one behind it.
    """
    best, saved, most = 0, 0.0, 0.0
    for count, span in enumerate(spans, 1):
        saved += (span.stop - span.start) * page_size / prefill_rate - copy_seconds(span)
        if saved > most:
            best, most = count, saved
    return list(spans[:best])


class LinkEstimate:
    """A moving estimate of what copies over one link take: latency + bytes / bandwidth.

    A least-squares line through past copies, in which each new one lets the old ones count a tenth less. Errors count
    relative to a copy's size, so that small copies settle the latency and large ones the bandwidth. What was assumed
    at first stays in it with a small weight, and is all there is before the first copy.
    """

    FORGET = 0.9
    ASSUMED = 0.005  # weight of each of the two assumed copies
    LARGE = float(64 << 20)  # bytes of the larger one

    def __init__(self, latency: float, bandwidth: float) -> None:
        self.copies = 0
        self.bytes = 0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of w, w n, w t, w n n, w n t over copies of n bytes in t seconds
        self._assumed = [0.0] * 5
        for size, seconds in ((0.0, latency), (self.LARGE, latency + self.LARGE / bandwidth)):
            for i, term in enumerate(_terms(size, seconds)):
                self._assumed[i] += self.ASSUMED * term
        self.latency = latency
        """Seconds that a copy takes however small it is."""
        self.bandwidth = bandwidth
        """Bytes a second."""

    def seen(self, size: int, seconds: float) -> None:
        """A copy of `size` bytes took so long."""
        if size <= 0 or seconds <= 0:
            return
        self.copies += 1
        self.bytes += size
        new = _terms(size, seconds)
        self._sums = tuple(self.FORGET * old + term for old, term in zip(self._sums, new, strict=True))  # type: ignore[assignment]  # five, as before
        w, n, t, nn, nt = (old + term for old, term in zip(self._sums, self._assumed, strict=True))
        spread = w * nn - n * n
        slope = (w * nt - n * t) / spread if spread > 0 else 0.0
        latency = (t - slope * n) / w
        if latency < 0 or slope <= 0:  # noise: all of the time is for the bytes
            latency, slope = 0.0, nt / nn
        self.latency, self.bandwidth = latency, 1 / slope

    def seconds(self, size: int) -> float:
        """What a copy of `size` bytes will take."""
        return self.latency + size / self.bandwidth


def _terms(size: float, seconds: float) -> tuple[float, float, float, float, float]:
    weight = (size + SMALL) ** -2
    return weight, weight * size, weight * seconds, weight * size * size, weight * size * seconds
