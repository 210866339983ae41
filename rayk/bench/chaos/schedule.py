"""Which fault comes when: a function of a specification and a seed. No clock, no process.

    kill-replica:2/min,hang-replica:1/min,slow-disk:6/h

Each kind has a rate. Its n-th fault comes at a random moment of the n-th of its periods (with 2/min: of 30 s), so that
a run of some minutes has as many as were asked for, and two kinds are not in step.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Mapping
from itertools import count
from typing import NamedTuple

from rayk.errors import ConfigError

KINDS = {
    "kill-replica": "a replica's process is killed",
    "hang-replica": "a replica's process is stopped, and stays so",
    "kill-scheduler": "the scheduler's process is killed",
    "kill-driver": "another driver of the same cluster is killed",
    "kill-node": "all processes of a simulated node are killed; another node comes a moment later",
    "cut-socket": "this driver's sockets to an actor are shut down, in one direction or both",
    "corrupt-disk": "files of the disk tier get other bytes, or end early",
    "slow-disk": "what writes to the disk tier's file system waits for some seconds",
    "fill-disk": "the disk tier's file system is full for some seconds",
}
"""The faults, each with what it does."""

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
MOST = 1.0  # faults of one kind a second
EXAMPLE = "kill-replica:2/min,slow-disk:6/h"


class Planned(NamedTuple):
    """`at`: seconds from the start. `draw`: a number that picks who is hit, 0 .. 2^32 - 1."""

    at: float
    kind: str
    draw: int


def parse_chaos(text: str) -> dict[str, float]:
    """Faults a second of each kind that a specification names; ConfigError says what is wrong with it."""
    rates: dict[str, float] = {}
    for part in text.split(","):
        kind, colon, rate = part.strip().partition(":")
        if kind not in KINDS:
            raise ConfigError(f"--chaos {kind!r} is no fault; there are {', '.join(KINDS)}, as in {EXAMPLE}")
        if kind in rates:
            raise ConfigError(f"--chaos names {kind} twice; give it one rate")
        number, slash, unit = rate.partition("/")
        try:
            times = float(number)
        except ValueError:
            times = math.nan
        if not (colon and slash) or unit not in UNITS or not 0 < times < math.inf:
            raise ConfigError(f"--chaos {kind} has the rate {rate!r}; give it one such as 2/min, 6/h or 0.2/s")
        rates[kind] = times / UNITS[unit]
        if rates[kind] > MOST:
            raise ConfigError(f"--chaos {kind}:{rate} is more than one fault a second; nothing can recover from that")
    return rates


def schedule(rates: Mapping[str, float], seed: int) -> Iterator[Planned]:
    """All faults, in their order, without end. Kinds do not depend on each other: one more changes none of the rest."""
    return heapq.merge(*(_of_kind(kind, 1 / rate, seed) for kind, rate in sorted(rates.items())))


def _of_kind(kind: str, period: float, seed: int) -> Iterator[Planned]:
    draw = random.Random(f"{kind}/{seed}")
    for turn in count():
        yield Planned((turn + draw.random()) * period, kind, draw.getrandbits(32))
