"""How far one scheduler carries: the real policy, loads, index and event intake under a simulated load.

    python -m rayk.simulate.scale --replicas 1000 --rate 10000

Replicas are queues of cached conversations, filled to the brim before the clock starts, and hold no pages. Requests
arrive at random; each continues a conversation that some replica holds, or starts one after a system prompt that all
share. A decision is all that a scheduler does for one: the clock moves on, the policy chooses, index and loads are
told. What the replica then stores and evicts comes back as an encoded batch of events, which is decoded and taken in.

Times are CPU time of this thread, so that they mean something on a busy machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from time import thread_time_ns

import numpy as np

SYSTEM = 16  # pages that all requests share
TURN = (8, 56)  # pages that a turn adds, uniform
LONGEST = 256  # pages after which a conversation ends
PAGE = 16  # tokens
PREFILL_RATE = 20_000.0  # tokens a second and replica


@dataclass(frozen=True)
class Load:
    """What to simulate: requests, `rate` a second; each replica caches `pages` pages."""

    replicas: int = 1000
    rate: float = 10_000.0
    requests: int = 20_000
    pages: int = 5_000
    router: str = "cost"
    seed: int = 0


@dataclass(frozen=True)
class Carried:
    """What it took. Microseconds of CPU time a decision, pages a second of CPU time taken in, bytes.

    `busy` is the CPU time of decisions and intake per second of simulated time: below 1, one core keeps up.
    `hit_rate` and `imbalance` (the busiest replica's requests over the mean) show that the choices were real ones.
    """

    decision_p50_us: float
    decision_p99_us: float
    decision_max_us: float
    ingest_pages_per_s: float
    busy: float
    entries: int
    resident_bytes: int
    bytes_per_entry: float
    hit_rate: float
    imbalance: float


class Replica:
    """A cache of whole conversations, least recently used first; `held` pages, the shared ones included."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self.cached: OrderedDict[int, list[int]] = OrderedDict()

    def serve(self, conversation: int, keys: list[int]) -> tuple[list[int], list[int]]:
        """Cache `keys`; what was stored and what was evicted for it."""
        before = self.cached.pop(conversation, None)
        known = len(before) if before is not None else (SYSTEM if self.held else 0)
        self.cached[conversation] = keys
        self.held += len(keys) - known
        gone: list[int] = []
        while self.held > self.capacity and len(self.cached) > 1:
            pages = self.cached.popitem(last=False)[1][SYSTEM:]
            self.held -= len(pages)
            gone += pages
        return keys[known:], gone


class Conversations:
    """Requests: (conversation, keys of its pages). Half continue one of the last few thousand conversations."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._system = self._random.integers(1, 1 << 62, SYSTEM).tolist()
        self._live: list[tuple[int, list[int]]] = []
        self._started = 0

    def next(self) -> tuple[int, list[int]]:
        """The next request."""
        random = self._random
        fresh: list[int] = random.integers(1, 1 << 62, int(random.integers(*TURN))).tolist()
        at = int(random.integers(max(1, 2 * len(self._live))))
        if at < len(self._live):
            number, before = self._live[at]
            keys = before + fresh
            self._live[at] = number, keys
            if len(keys) > LONGEST:
                self._live[at] = self._live[-1]
                self._live.pop()
        else:
            self._started += 1
            number, keys = self._started, self._system + fresh
            if len(self._live) < 20_000:
                self._live.append((number, keys))
            else:
                self._live[int(random.integers(len(self._live)))] = number, keys
        return number, keys


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident


def carry(load: Load) -> Carried:
    """Fill the caches, then serve the load."""
    from rayk.protocol.kv_events import Event, EventBatch, decode, encode, removed, stored
    from rayk.scheduler.router.event_intake import Intake
    from rayk.scheduler.router.policies import make_policy
    from rayk.scheduler.router.policy import RouteRequest
    from rayk.scheduler.router.prefix_index import PrefixIndex
    from rayk.scheduler.router.replica_loads import ReplicaLoads

    requests = Conversations(load.seed)
    replicas = [Replica(load.pages) for _ in range(load.replicas)]
    before = resident_bytes()
    index = PrefixIndex(load.replicas)
    fill = np.random.default_rng(load.seed + 1)
    numbers = [1] * load.replicas
    intake = Intake(index)
    for r, replica in enumerate(replicas):
        events: list[Event] = []
        for number in range((load.pages - SYSTEM) // 100):
            keys = requests._system + fill.integers(1, 1 << 62, 100).tolist()
            replica.serve(-1 - number, keys)
            events.append(stored(keys, None, PAGE))
        intake.take(r, 1, 0, events)
    loads = ReplicaLoads(load.replicas, PREFILL_RATE)
    policy = make_policy(load.router, index, PAGE)
    arrivals = np.cumsum(np.random.default_rng(load.seed + 2).exponential(1 / load.rate, load.requests)).tolist()
    gc.collect()
    gc.freeze()
    spent: list[int] = []
    ingested = ingest = cached = asked = 0
    served = np.zeros(load.replicas)
    for now in arrivals:
        conversation, keys = requests.next()
        tokens = len(keys) * PAGE + 1
        began = thread_time_ns()
        loads.advance(now)
        choice = policy.choose(RouteRequest(tokens, keys, str(conversation)), loads)
        promised = index.promise(choice.replica, keys)
        loads.place(choice.replica, tokens - PAGE * (len(keys) - len(promised)), tokens)
        spent.append(thread_time_ns() - began)
        chosen = choice.replica
        served[chosen] += 1
        new, gone = replicas[chosen].serve(conversation, keys)
        cached += len(keys) - len(new)
        asked += len(keys)
        batch: list[Event] = [stored(new, None, PAGE), *([removed(gone)] if gone else [])]
        wire = encode(EventBatch(now, batch, chosen))
        began = thread_time_ns()
        intake.take(chosen, 1, numbers[chosen], decode(wire).events)
        ingest += thread_time_ns() - began
        ingested += len(new) + len(gone)
        numbers[chosen] += 1
        index.withdraw(chosen, promised)  # the pages are there: nothing is left to take back
        loads.release(chosen, tokens)
    resident = resident_bytes()
    index.check_integrity()
    micros = np.array(spent) / 1000
    return Carried(
        decision_p50_us=float(np.quantile(micros, 0.5)),
        decision_p99_us=float(np.quantile(micros, 0.99)),
        decision_max_us=float(micros.max()),
        ingest_pages_per_s=ingested / (ingest / 1e9),
        busy=(sum(spent) + ingest) / 1e9 / arrivals[-1],
        entries=len(index),
        resident_bytes=resident,
        bytes_per_entry=(resident - before) / len(index),
        hit_rate=cached / asked,
        imbalance=float(served.max() / served.mean()),
    )


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m rayk.simulate.scale", description=__doc__.splitlines()[0])
    for name, default in asdict(Load()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    asked = vars(parser.parse_args(argv))
    as_json = asked.pop("format") == "json"
    carried = asdict(carry(Load(**asked)))
    if as_json:
        print(json.dumps({"load": asked, "carried": carried}))
    else:
        for name, value in (asked | carried).items():
            print(f"{name:20} {value:,.6g}" if isinstance(value, float) else f"{name:20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
