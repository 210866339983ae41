"""What a message costs on its way into an actor, whole and cut up: `python tests/measure/message_pieces.py [ROUNDS]`.

Round trips to an actor that answers with the length of what it got, whole (beyond 100 KiB through Ray's object store)
and in pieces (see rayk.actors.chunks) in turns: medians of wall time, and of CPU time of all processes of the session.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import psutil

from rayk.bench.core.ray_path import cpu_seconds

SIZES = (60_000, 140_000, 264_000, 512_000, 1_000_000, 2_000_000)
CALLS = 40  # of a round and way


class Taker:
    """An actor that says how much it got."""

    def handle(self, first: bytes | int, *rest: bytes) -> int:
        """The length of the message."""
        from rayk.actors.chunks import joined

        return len(joined(first, rest)[0])


def session_cpu() -> float:
    """CPU seconds of this process and all that it started so far."""
    return cpu_seconds([os.getpid(), *(each.pid for each in psutil.Process().children(recursive=True))])


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    from rayk.actors.chunks import PIECE
    from rayk.actors.interface import ActorSpec
    from rayk.actors.runtime import RayRuntime

    arguments = sys.argv[1:] if argv is None else argv
    rounds = int(arguments[0]) if arguments else 5
    runtime = RayRuntime.connect("local", None, num_cpus=2)
    try:
        actor = runtime.start(ActorSpec(Taker, ()))
        print(f"{'bytes':>10} {'whole ms':>9} {'cut ms':>9} {'whole cpu':>9} {'cut cpu':>9}")
        for size in SIZES:
            wire = os.urandom(size)
            parts = [wire[at : at + PIECE] for at in range(0, size, PIECE)]
            ways: dict[str, Callable[[], Any]] = {
                "whole": partial(actor.call, "handle", wire),
                "cut": partial(actor.call, "handle", len(parts), *parts),
            }
            wall: dict[str, list[float]] = {name: [] for name in ways}
            cpu: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds + 1):
                for name, call in ways.items():
                    before, start = session_cpu(), perf_counter()
                    for _ in range(CALLS):
                        assert runtime.get(call(), "the taker", 60.0) == size
                    if number:
                        wall[name].append((perf_counter() - start) / CALLS * 1e3)
                        cpu[name].append((session_cpu() - before) / CALLS * 1e3)
            found = [statistics.median(each[name]) for each in (wall, cpu) for name in ways]
            print(f"{size:>10,} " + " ".join(f"{value:9.2f}" for value in found), flush=True)
    finally:
        runtime.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
