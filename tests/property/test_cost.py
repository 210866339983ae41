"""The cost policy chooses what its formula says, whichever way it reckons: number by number for a few replicas, in
arrays for many, with fewer terms for a request that nobody knows."""

from __future__ import annotations

import numpy as np
import pytest

from rayk.scheduler.router.cost import FEW, Cost, Weights
from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.prefix_index import PrefixIndex, Tier
from rayk.scheduler.router.replica_loads import ReplicaLoads

PAGE = 16


def random_loads(random: np.random.Generator) -> tuple[ReplicaLoads, PrefixIndex]:
    """Replicas of many loads, some full, some not ready, that hold leading parts of prompts 0 .. 9."""
    replicas = int(random.integers(1, 2 * FEW))
    loads, index = ReplicaLoads(replicas, None, int(random.choice([500, 5000, 1 << 40]))), PrefixIndex(replicas)
    for replica in range(replicas):
        for _ in range(int(random.integers(0, 6))):
            compute = int(random.integers(0, 400))
            loads.place(replica, compute, compute + int(random.integers(0, 300)))
        if random.random() < 0.2:
            loads.set_ready(replica, False)
        for prompt in range(10):
            if random.random() < 0.3:
                keys = keys_of(prompt, int(random.integers(1, 20)))
                index.stored(replica, keys, random.choice([Tier.device, Tier.device, Tier.host, Tier.disk]))
    if random.random() < 0.3:
        index.cleared(int(random.integers(replicas)))
    return loads, index


def keys_of(prompt: int, pages: int) -> list[int]:
    return list(range(1000 * prompt, 1000 * prompt + pages))


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_cheapest_by_the_formula(seed: int) -> None:
    random = np.random.default_rng(seed)
    loads, index = random_loads(random)
    weights = Weights(peer_price=float(random.choice([0.3, 1.0])))
    short, long = Cost(index, PAGE, weights), Cost(index, PAGE, weights)
    made = []
    for _ in range(60):
        prompt, tokens = int(random.integers(0, 20)), int(random.integers(1, 400))
        wish = RouteRequest(tokens, keys_of(prompt, (tokens - 1) // PAGE))
        chosen = short.choose(wish, loads)
        reach = index.reach(wish.keys)
        regret = long._regret(wish, reach)
        # the whole formula, whatever is known of the request
        parts = long._terms(long._see(tokens, loads, reach, regret))
        expected = loads.lowest(parts.cost)
        assert chosen.replica == expected
        made.append((chosen, parts))
        if expected < 0:
            continue
        assert chosen.cached == parts.cached[expected]
        missing = tokens - int(parts.cached[expected])
        long._learn(expected, wish, missing, loads, reach, regret)
        assert short._usual == long._usual and short._regrets == long._regrets
        loads.place(expected, missing, tokens)
        if random.random() < 0.5:
            index.promise(expected, wish.keys)
    for chosen, parts in made:  # the reasons are those of then
        assert chosen.parts is not None
        for name, mine, whole in zip(parts._fields, chosen.parts, parts, strict=True):
            assert np.array_equal(mine, whole), name
        assert np.array_equal(chosen.parts.cost, parts.cost)
