"""Routing policies: which replica a request goes to.

    round-robin    one after the other
    least-loaded   the fewest tokens waiting to be prefilled
    prefix         the longest cached prefix; of equals the least loaded
    session        where the session was last, unless that replica carries much more than its share
    cost           the least it costs everybody, see cost.py

All see the same: the request as a Wish, the loads as a ReplicaLoads, the caches as a PrefixIndex. They change none of
them; whoever places the request tells fleet and index afterwards.
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


class RoundRobin:
    """One replica after the other, whatever they carry."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, wish: RouteRequest, fleet: ReplicaLoads) -> Decision:
        """See Policy."""
        for _ in range(len(fleet)):
            replica, self._next = self._next % len(fleet), (self._next + 1) % len(fleet)
            if fleet.ready[replica]:
                return Decision(replica)
        return Decision(-1)


class LeastLoaded:
    """The replica with the fewest tokens, still to be prefilled or held by what runs there, caches ignored; of equals
    the lowest index."""

    def choose(self, wish: RouteRequest, fleet: ReplicaLoads) -> Decision:
        """See Policy."""
        return Decision(fleet.lowest(fleet.work + fleet.held, fair=False))


class LongestPrefix:
    """The replica with the longest cached prefix, of equals the least loaded. What all prompts share sends all of
    them to one replica: this is here to compare with."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index

    def choose(self, wish: RouteRequest, fleet: ReplicaLoads) -> Decision:
        """See Policy."""
        pages = self._index.reach(wish.keys).disk
        longest = pages[fleet.ready].max(initial=0)
        return Decision(fleet.lowest(np.where(pages == longest, fleet.work, np.inf), fair=False))


class Session:
    """Where the session was last, or, for a new one, where its id hashes to. When that replica would carry more than
    `bound` times its share of the waiting tokens, the least loaded, which is then where the session is."""

    REMEMBERED = 1_000_000  # sessions; beyond that the one seen longest ago is forgotten

    def __init__(self, bound: float = 1.25) -> None:
        self._bound = bound
        self._home: OrderedDict[str, int] = OrderedDict()

    def choose(self, wish: RouteRequest, fleet: ReplicaLoads) -> Decision:
        """See Policy. A request without a session goes to the least loaded."""
        if wish.session is None:
            return Decision(fleet.lowest(fleet.work))
        replica = self._home.get(wish.session)
        if replica is None:
            replica = self._hashed(wish.session, len(fleet))
        share = (float(fleet.work.sum()) + wish.tokens) / max(1, int(fleet.ready.sum()))
        if not fleet.ready[replica] or fleet.work[replica] > self._bound * share + wish.tokens:
            replica = fleet.lowest(fleet.work)
        if replica >= 0:
            self._home[wish.session] = replica
            self._home.move_to_end(wish.session)
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
    "round-robin": lambda index, page_size: RoundRobin(),
    "least-loaded": lambda index, page_size: LeastLoaded(),
    "prefix": lambda index, page_size: LongestPrefix(index),
    "session": lambda index, page_size: Session(),
}

ENTRY_POINTS = "rayk.routers"


def make_policy(name: str, index: PrefixIndex, page_size: int) -> Policy:
    """The policy of that name over `index`, whose keys stand for pages of `page_size` tokens. See find_policy()."""
    return find_policy(name)(index, page_size)


def find_policy(name: str) -> Callable[[PrefixIndex, int], Policy]:
    """What makes the policy of that name: one of POLICIES, an entry point of the group "rayk.routers" in an installed
    package, or "package.module:Name", which every process that routes has to find. ConfigError lists the names.

    A class with __init__(index, page_size) and choose(wish, fleet) will do. With `wants_keys = True` requests come with
    the keys of their pages, and `index` is kept up to date; without, nobody hashes pages for it.
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
    return name in _WANT_KEYS or bool(getattr(find_policy(name), "wants_keys", False))


_WANT_KEYS = ("cost", "prefix")


def check_router(name: str, flag: str = "") -> None:
    """ConfigError unless there is a policy of that name; `flag` stands before the message."""
    try:
        find_policy(name)
    except ConfigError as error:
        raise ConfigError(f"{flag}{error}") from error
