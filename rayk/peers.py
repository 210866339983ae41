"""Which replica copies which part of a prefix to another one that misses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Pages start .. stop of a prefix, to be copied from `replica`."""

    replica: int
    start: int
    stop: int


def copy_spans(have: int, resident: Sequence[int], stop: int) -> list[Span]:
    """How to extend a prefix of `have` pages to at most `stop` from replicas that hold resident[i] leading pages.

    Each page comes from the replica of lowest index that holds it, as in MAX 26.5.
    """
    spans = []
    for replica, pages in enumerate(resident):
        end = min(pages, stop)
        if end > have:
            spans.append(Span(replica, have, end))
            have = end
    return spans
