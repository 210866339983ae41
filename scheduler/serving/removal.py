"""The end of a replica of a Cluster: wait until it has nothing, have others offered what it has cached, forget it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition

from rayk.scheduler.scaling import Removed
from rayk.scheduler.serving.core import ServingCore

OFFER_SECONDS = 60.0  # after which a replica goes though somebody has not answered; no round begins after half of it


def remove_when_empty(
    core: ServingCore,
    left: Condition,
    closed: Callable[[], bool],
    replica: int,
    timeout: float | None,
    offer_seconds: float | None,
) -> Removed:
    """Remove a draining or lost replica; what became of its pages. `left` is told when a request left its replica, and
    its lock, which is the core's, is held.

    DrainError when something is still there after `timeout` seconds: it drains on. What was not taken after
    `offer_seconds` (OFFER_SECONDS when None) goes with it.
    """
    left.wait_for(lambda: closed() or not core.ids_on(replica), timeout)
    if not (closed() or core.ids_on(replica) or offer_seconds == 0):
        core.offer(replica)
        patience = OFFER_SECONDS if offer_seconds is None else offer_seconds
        left.wait_for(lambda: closed() or not core.evacuations.under_way(replica), patience)
    return core.remove(replica)
