"""Routing policies: which replica a request goes to.

    round-robin    one after the other
    least-loaded   the fewest tokens waiting to be prefilled
    prefix         the longest cached prefix; of equals the least loaded
    session        where the session was last, unless that replica carries much more than its share
    cost           the least it costs everybody, see cost.py

All see the same: a RouteRequest, the ReplicaLoads, and the caches as a PrefixIndex. They change none of them: the
Router counts a request that is placed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import xxhash

from rayk.errors import ConfigError
from rayk.scheduler.router.cost import Cost
from rayk.scheduler.router.policy import Decision, Policy, RouteRequest
from rayk.scheduler.router.prefix_index import PrefixIndex
from rayk.scheduler.router.replica_loads import ReplicaLoads


class _Policy:
    wants_keys = False

    def __init__(self, index: PrefixIndex, page_size: int) -> None:
        self._index = index


class RoundRobin(_Policy):
    """One replica after the other, whatever they carry."""

    _next = 0

    def choose(self, request: RouteRequest, loads: ReplicaLoads) -> Decision:
        """See Policy."""
        for _ in range(len(loads)):
            replica, self._next = self._next % len(loads), (self._next + 1) % len(loads)
            if loads.ready[replica]:
                return Decision(replica)
        return Decision(-1)


class LeastLoaded(_Policy):
    """The replica with the fewest tokens, still to be prefilled or held by what runs there, caches ignored; of equals
    the lowest index."""

    def choose(self, request: RouteRequest, loads: ReplicaLoads) -> Decision:
        """See Policy."""
        return Decision(loads.lowest(loads.prefill_backlog + loads.held, fair=False))


class LongestPrefix(_Policy):
    """The replica with the longest cached prefix, of equals the least loaded. What all prompts share sends all of
    them to one replica: this is here to compare with."""

    wants_keys = True

    def choose(self, request: RouteRequest, loads: ReplicaLoads) -> Decision:
        """See Policy."""
        pages = self._index.reach(request.keys).disk
        longest = pages[loads.ready].max(initial=0)
        return Decision(loads.lowest(np.where(pages == longest, loads.prefill_backlog, np.inf), fair=False))


class Session(_Policy):
    """Where the session was last, or, for a new one, where its id hashes to. When that replica would carry more than
    `bound` times its share of the waiting tokens, the least loaded, which is then where the session is."""

    REMEMBERED = 1_000_000  # sessions; beyond that the one seen longest ago is forgotten

    def __init__(self, index: PrefixIndex, page_size: int, bound: float = 1.25) -> None:
        super().__init__(index, page_size)
        self._bound = bound
        self._home: OrderedDict[str, int] = OrderedDict()

    def choose(self, request: RouteRequest, loads: ReplicaLoads) -> Decision:
        """See Policy. A request without a session goes to the least loaded."""
        if request.session is None:
            return Decision(loads.lowest(loads.prefill_backlog))
        replica = self._home.get(request.session)
        if replica is None:
            replica = self._hashed(request.session, len(loads))
        share = (float(loads.prefill_backlog.sum()) + request.tokens) / max(1, int(loads.ready.sum()))
        if not loads.ready[replica] or loads.prefill_backlog[replica] > self._bound * share + request.tokens:
            replica = loads.lowest(loads.prefill_backlog)
        if replica >= 0:
            self._home[request.session] = replica
            self._home.move_to_end(request.session)
            if len(self._home) > self.REMEMBERED:
                self._home.popitem(last=False)
        return Decision(replica)

    @staticmethod
    def _hashed(session: str, replicas: int) -> int:
        """The replica that hashes highest with the session: the same in every process, and one more replica moves only
        the sessions that it gets."""
        name = session.encode()
        return max(range(replicas), key=lambda r: xxhash.xxh3_64_intdigest(name, seed=r))


POLICIES: dict[str, Callable[[PrefixIndex, int], Policy]] = {
    "cost": Cost,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix": LongestPrefix,
    "session": Session,
}

ENTRY_POINTS = "rayk.routers"


def make_policy(name: str, index: PrefixIndex, page_size: int) -> Policy:
    """The policy of that name over `index`, whose keys stand for pages of `page_size` tokens. See find_policy()."""
    return find_policy(name)(index, page_size)


def find_policy(name: str) -> Callable[[PrefixIndex, int], Policy]:
    """What makes the policy of that name: one of POLICIES, an entry point of the group "rayk.routers" in an installed
    package, or "package.module:Name", which every process that routes has to find. ConfigError lists the names.

    A class with __init__(index, page_size) and choose(request, loads) will do. With `wants_keys = True` requests come
    with the keys of their pages, and `index` is kept up to date; without, nobody hashes pages for it. With
    `weighs_running = True` a prompt is load of a Cluster's replica until its first token; without, until its end.
    """
    if name in POLICIES:
        return POLICIES[name]
    found: Any = None
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            found = getattr(import_module(module), attribute)
        else:
            found = next((point.load() for point in entry_points(group=ENTRY_POINTS, name=name)), None)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"router {name!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise ConfigError(f"router {name!r} is not one of {', '.join(POLICIES)}, and names no class in a module")
    make: Callable[[PrefixIndex, int], Policy] = found
    return make


def wants_keys(name: str) -> bool:
    """Whether the policy of that name looks into the index: else nobody needs to hash pages or to feed it."""
    return bool(getattr(find_policy(name), "wants_keys", False))


def check_router(name: str, flag: str = "") -> None:
    """ConfigError unless there is a policy of that name; `flag` stands before the message."""
    try:
        find_policy(name)
    except ConfigError as error:
        raise ConfigError(f"{flag}{error}") from error
