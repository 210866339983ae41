"""How the fast lanes of a manager stand; what they are: see `fast_lane` of PagedKVCacheManager."""

from __future__ import annotations

from typing import NamedTuple


class LaneState(NamedTuple):
    """The fast lane to one replica, of which `messages` went by it.

    `state`: "off" (there is none), "unused" (it opens at the first message), "opening", "open", "resting" (it opens
    again at the next message) or "closed" (for good). `reason` says why it is off or closed.
    """

    replica: int
    state: str
    reason: str = ""
    messages: int = 0
