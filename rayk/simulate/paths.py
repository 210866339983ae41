"""The pages of a workload as one tree, so that a cache of them costs a step per branch and not one per page.

All prompts and answers are known before a simulation starts. Their pages are numbered, equal prefixes getting equal
numbers, and the tree of these prefixes is cut into *segments*: runs of consecutive page numbers that every request
uses either whole or not at all. A request is then a short path of segments, a cache a count of pages per segment.

Pages are compared by 64-bit chain values over the runs that describe the tokens (workloads/request.py), never over the
tokens: a trace of billions of tokens is read in seconds. Two different prefixes agree with a chance of 2**-64.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayk.workloads.chain import UInt64Array, mix64
from rayk.workloads.request import BenchRequest, Runs

Int64Array = npt.NDArray[np.int64]


def merged(runs: Runs) -> Runs:
    """The same tokens in the fewest runs, [k, 2]: what continues in its direction is one run, so equal tokens are
    equal rows."""
    if len(runs) < 2:
        return runs
    first, count = runs[:, 0], runs[:, 1]
    end = np.where(first >= 0, first + count, first - count)
    starts = np.flatnonzero(np.concatenate([[True], (first[1:] != end[:-1]) | ((first[1:] < 0) != (first[:-1] < 0))]))
    return np.stack([first[starts], np.add.reduceat(count, starts)], axis=1)


def page_values(runs: Runs, page_size: int, pages: int) -> UInt64Array:
    """The chain value at the end of each of the first `pages` full pages of the tokens of `runs`: [pages] uint64."""
    runs = merged(runs)
    first, starts = runs[:, 0], np.cumsum(runs[:, 1]) - runs[:, 1]
    heads = np.arange(pages, dtype=np.int64) * page_size
    inner = starts[(starts % page_size != 0) & (starts < pages * page_size)]
    at = np.concatenate([heads, inner])
    at.sort()
    run = np.searchsorted(starts, at, side="right") - 1
    value = first[run]
    value += np.where(value >= 0, at - starts[run], starts[run] - at)
    sizes = np.diff(at, append=pages * page_size)
    where = ((at % page_size) << 32) | sizes
    pieces = mix64(mix64(value.view(np.uint64)) ^ where.view(np.uint64))
    content = pieces if len(at) == pages else np.add.reduceat(pieces, np.searchsorted(at, heads))
    return np.cumsum(mix64(content ^ mix64(heads.view(np.uint64))), dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Paths:
    """The page tree of a workload. Segment s is pages first[s] .. first[s] + size[s] - 1 and continues parent[s] (-1:
    it begins a prompt). Parents have smaller numbers than their children.

    Request i walks the segments path[i], of which the first prompt_segments[i] are what its prompt may reuse: full
    pages without the last token, which is always computed. The rest are pages that its answer fills.
    """

    page_size: int
    pages: int
    first: list[int]
    size: list[int]
    parent: list[int]
    path: list[list[int]]
    prompt_segments: list[int]
    length: list[int]
    """Pages of each request's path."""

    def keys(self, request: int) -> list[int]:
        """The page numbers that the prompt of `request` may reuse, in order: what routers and index go by."""
        keys: list[int] = []
        for s in self.path[request][: self.prompt_segments[request]]:
            keys += range(self.first[s], self.first[s] + self.size[s])
        return keys


def build_paths(requests: Sequence[BenchRequest], page_size: int) -> Paths:
    """The page tree of `requests` for pages of `page_size` tokens. Time and memory go with the number of pages."""
    number: dict[int, int] = {}  # chain value -> page
    range_first: list[int] = []  # pages are numbered in ranges, each the new pages of one request
    range_parent: list[int] = []  # the page that the range continues, -1 for none
    ends: list[tuple[int, int]] = []  # of each request: last page of its prompt, last page of all; -1 for none
    cuts: list[int] = []
    for request in requests:
        answer = np.array([[request.output_first, request.output_length]], np.int64)
        pages = (request.prompt_length + request.output_length - 1) // page_size
        if not pages:
            ends.append((-1, -1))
            continue
        values = page_values(np.concatenate([request.runs, answer]), page_size, pages).tolist()
        known = _known(values, number)
        parent = number[values[known - 1]] if known else -1
        if known < pages:
            base = len(number)
            range_first.append(base)
            range_parent.append(parent)
            number.update(zip(values[known:], range(base, base + pages - known), strict=True))
        prompt = (request.prompt_length - 1) // page_size
        ends.append((number[values[prompt - 1]] if prompt else -1, number[values[-1]]))
        cuts += (parent, *ends[-1])
    return _segments(page_size, len(number), range_first, range_parent, ends, cuts)


def _known(values: Sequence[int], number: dict[int, int]) -> int:
    """How many leading `values` have a number; those that have one come first."""
    low, high = 0, len(values)
    while low < high:
        mid = (low + high) // 2
        if values[mid] in number:
            low = mid + 1
        else:
            high = mid
    return low


def _segments(
    page_size: int,
    pages: int,
    range_first: list[int],
    range_parent: list[int],
    ends: list[tuple[int, int]],
    cuts: list[int],
) -> Paths:
    """Cut the ranges after every page where a request ends or another one branches off."""
    last = np.unique(np.array([*cuts, *(first - 1 for first in range_first), pages - 1], np.int64))
    last = last[last >= 0]
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    starts, parents = np.array(range_first, np.int64), np.array(range_parent, np.int64)
    parent = np.arange(len(last), dtype=np.int64) - 1
    opens = np.searchsorted(first, starts)
    parent[opens] = np.where(parents < 0, -1, np.searchsorted(last, parents))
    up = parent.tolist()
    seek = last.tolist()
    path: list[list[int]] = []
    prompt_segments: list[int] = []
    for prompt_end, whole_end in ends:
        walk: list[int] = []
        s = bisect_right(seek, whole_end - 1) if whole_end >= 0 else -1
        while s >= 0:
            walk.append(s)
            s = up[s]
        walk.reverse()
        path.append(walk)
        prompt_segments.append(walk.index(bisect_right(seek, prompt_end - 1)) + 1 if prompt_end >= 0 else 0)
    size = (last - first + 1).tolist()
    length = [sum(size[s] for s in walk) for walk in path]
    return Paths(page_size, pages, first.tolist(), size, up, path, prompt_segments, length)
