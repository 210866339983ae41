"""What `rayk top` shows: rows made of two snapshots of what runs under a name, and what happened between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rayk.actors.describe import ManagerState
    from rayk.actors.describe_cluster import ClusterState
    from rayk.protocol.admission import AdmissionState

EVENTS = 200  # kept
TIERS = ("device", "peer", "host", "disk")


class Row(NamedTuple):
    """A replica now. Pages, and since the snapshot before: tokens a second and the share of prompt tokens reused, by
    tier. None: not known."""

    of: str
    replica: int
    node: str
    state: str
    requests: int | None = None
    waiting: int | None = None
    used: int | None = None
    cached: int | None = None
    free: int | None = None
    generated: float | None = None
    prompt: float | None = None
    hits: dict[str, float] | None = None

    @property
    def hit_rate(self) -> float | None:
        """Of all tiers."""
        return None if self.hits is None else sum(self.hits.values())


class _Counts(NamedTuple):
    prompt: int
    generated: int
    reused: dict[str, int]


SORTS: dict[str, Callable[[Row], tuple[float, ...]]] = {
    "index": lambda row: (),
    "requests": lambda row: (-(row.requests or 0),),
    "used pages": lambda row: (-(row.used or 0),),
    "tokens/s": lambda row: (-(row.generated or 0.0),),
    "hit rate": lambda row: (-(row.hit_rate or 0.0),),
}
"""By what rows can be sorted."""


class ClusterView:
    """Takes snapshots, one after the other; `rows`, `admissions` (by what they are of) and `events`, the latest last,
    are as of the last one. Pure: the times are given."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.admissions: dict[str, AdmissionState] = {}
        self.events: deque[tuple[float, str]] = deque(maxlen=EVENTS)
        self.sort = "index"
        self.reverse = False
        self._seen_at: float | None = None
        self._counts: dict[tuple[str, int], _Counts] = {}
        self._states: dict[tuple[str, int], str] = {}
        self._lost_at: dict[tuple[str, int], float] = {}

    def take(self, now: float, managers: Sequence[ManagerState], cluster: ClusterState | None) -> list[str]:
        """A snapshot of `now` seconds; what happened since the one before."""
        before, passed = self._counts, now - self._seen_at if self._seen_at is not None else 0.0
        self._seen_at, self._counts, self.rows, self.admissions = now, {}, [], {}
        new, reasons = list[str](), dict[tuple[str, int], str | None]()
        for manager in managers:
            for each in manager.replicas:
                used, free, cached = each.used_pages, None, None  # of a manager's free ones nobody counts the cached
                if each.pages is not None and used is not None:
                    free = each.pages - used
                common = (manager.name, each.index, each.node, each.state, each.requests)
                self.rows.append(Row(*common, None, used, cached, free))
                reasons[manager.name, each.index] = each.reason
            if manager.admission is not None:
                self.admissions[manager.name] = manager.admission
        if cluster is not None:
            for engine in cluster.replicas:
                key = (cluster.name, engine.index)
                reasons[key] = engine.reason
                row = Row(cluster.name, engine.index, engine.node[:12], engine.state, engine.requests, engine.waiting)
                if engine.free_pages is not None and engine.pages is not None:
                    cached = engine.cached_pages or 0
                    row = row._replace(used=engine.pages - engine.free_pages, cached=cached)
                    row = row._replace(free=engine.free_pages - cached)
                if engine.prompt_tokens is not None and engine.generated_tokens is not None:
                    counts = _Counts(engine.prompt_tokens, engine.generated_tokens, engine.reused_tokens)
                    self._counts[key] = counts
                    row = _rated(row, counts, before.get(key), passed)
                self.rows.append(row)
            if cluster.admission is not None:
                self.admissions[cluster.name] = cluster.admission
        for row in self.rows:
            new += self._happened(now, row, reasons[row.of, row.replica])
        self.events.extend((now, text) for text in new)
        return new

    def note(self, now: float, text: str) -> list[str]:
        """Something else happened."""
        self.events.append((now, text))
        return [text]

    def _happened(self, now: float, row: Row, reason: str | None) -> list[str]:
        key = (row.of, row.replica)
        before, self._states[key] = self._states.get(key), row.state
        if before == row.state or before is None:
            return []
        text = f"{row.of}: replica {row.replica} is {row.state}, it was {before}"
        if row.state in ("lost", "silent"):
            self._lost_at.setdefault(key, now)
        elif row.state == "ready" and key in self._lost_at:
            text += f"; it was gone for {now - self._lost_at.pop(key):.1f} s"
        return [f"{text}: {reason}" if reason else text]

    @property
    def sorted(self) -> list[Row]:
        """Rows as they are to be shown."""
        by = SORTS[self.sort]
        return sorted(self.rows, key=lambda row: (*by(row), row.of, row.replica), reverse=self.reverse)

    def press(self, key: str) -> bool:
        """A key was pressed: s sorts by the next column, r turns the order round; False for q, which ends it."""
        if key == "s":
            names = list(SORTS)
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key == "r":
            self.reverse = not self.reverse
        return key not in ("q", "\x03")

    @property
    def line(self) -> str:
        """All of it in one line, for a log."""
        states: dict[str, int] = {}
        for row in self.rows:
            states[row.state] = states.get(row.state, 0) + 1
        parts = [" ".join(f"{count} {state}" for state, count in sorted(states.items()))]
        parts.append(f"{sum(row.requests or 0 for row in self.rows)} requests placed")
        if self.admissions:
            parts.append(f"{sum(each.waiting for each in self.admissions.values())} waiting")
        pages = {name: sum(getattr(row, name) or 0 for row in self.rows) for name in ("used", "cached", "free")}
        parts.append("pages " + " ".join(f"{count} {name}" for name, count in pages.items()))
        rated = [row for row in self.rows if row.generated is not None]
        if rated:
            parts.append(f"{sum(row.generated or 0.0 for row in rated):.1f} tokens/s")
            prompt = sum(row.prompt or 0.0 for row in rated)
            if prompt:
                hit = sum((row.hit_rate or 0.0) * (row.prompt or 0.0) for row in rated) / prompt
                parts.append(f"hit rate {hit:.3f}")
        return "  ".join(parts)


def _rated(row: Row, counts: _Counts, before: _Counts | None, passed: float) -> Row:
    if before is None or passed <= 0 or counts.generated < before.generated:  # it is a new one
        return row
    prompt = counts.prompt - before.prompt
    row = row._replace(generated=(counts.generated - before.generated) / passed, prompt=prompt / passed)
    if prompt <= 0:
        return row
    reused = {tier: counts.reused.get(tier, 0) - before.reused.get(tier, 0) for tier in TIERS}
    return row._replace(hits={tier: tokens / prompt for tier, tokens in reused.items()})
