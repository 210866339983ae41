"""Explore the protocol further than CI does:

    python tests/model/run.py [--depth 8] [--pairs]

A line for each kind of fault, with the states and events that were seen; it fails with a history when one is wrong.
Then, with --pairs, claims of a manager with each pair of faults.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.model.cluster_world import ClusterWorld, without_processes
from tests.model.explore import explore
from tests.model.test_claims import FAULTS, messages, play
from tests.model.test_protocol import FAULTS as SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8, help="events of a history, before it is played to its end")
    parser.add_argument("--pairs", action="store_true", help="claims with each pair of faults, too")
    given = parser.parse_args()
    depth = given.depth
    with without_processes():
        for name, shape in SHAPES.items():
            print(f"{name}, {depth} events: {explore(lambda shape=shape: ClusterWorld(shape), depth)}", flush=True)
        if not given.pairs:
            return
        began, last = perf_counter(), messages()
        plans = [{a: one, b: two} for a, b in combinations(range(1, last + 1), 2) for one in FAULTS for two in FAULTS]
        for plan in plans:
            play(plan)
        print(f"claims: {len(plans)} pairs of faults at {last} messages, {perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
