"""The prefix index against a plain dict of sets, under any order of changes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.scheduler.router.prefix_index import Best, PrefixIndex, Span, Step, Tier, short_keys


def chain(*pages: int) -> list[int]:
    """Keys of a request: key k of one chain is no other chain's."""
    return [hash(pages[: i + 1]) & 0xFFFFFFFFFFFF for i in range(len(pages))]


def test_the_longest_prefix_wins_and_then_the_lowest_index() -> None:
    index = PrefixIndex(70)
    keys = chain(*range(20))
    assert index.best(keys) == index.best([]) == Best(0, -1)
    index.stored(3, keys[:8])
    index.stored(69, keys[:12])
    index.stored(5, keys[:12])
    assert index.best(keys) == Best(12, 5)
    assert index.best(keys[:10]) == Best(10, 5) and index.best(keys[:3]) == Best(3, 3)
    assert index.best(chain(1, 2, 3)) == Best(0, -1)
    assert index.holding(keys) == [Step(12, [5, 69]), Step(8, [3])]
    index.removed(5, keys[6:12])
    assert index.best(keys) == Best(12, 69)
    assert index.holding(keys) == [Step(12, [69]), Step(8, [3]), Step(6, [5])]
    assert len(index) == 26 and [index.pages(r) for r in (3, 5, 69, 0)] == [8, 6, 12, 0]
    index.check_integrity()


def test_reach_is_by_tier_and_counts_holders() -> None:
    index = PrefixIndex(4)
    keys = chain(*range(10))
    index.stored(0, keys[:2])
    index.stored(0, keys[:6], Tier.host)
    index.stored(2, keys[:4], Tier.disk)
    index.stored(3, keys)
    reach = index.reach(keys)
    assert [each.tolist() for each in reach[:3]] == [[2, 0, 0, 10], [6, 0, 0, 10], [6, 0, 4, 10]]
    assert reach.spans[0] == Span(10, 1) and Span(6, 2) in reach.spans and reach.spans[-1] == Span(2, 3)
    assert index.holding(keys, Tier.disk) == [Step(4, [2])]
    assert index.reach(chain(7)).spans == []


def test_cleared_is_at_once_and_swept_up_later() -> None:
    index = PrefixIndex(2)
    requests = [chain(i, *range(50)) for i in range(300)]
    for keys in requests:
        index.stored(0, keys)
        index.stored(1, keys[:10])
    index.cleared(0)
    assert index.best(requests[5]) == Best(10, 1) and index.pages(0) == 0 and len(index) == 3000
    index.stored(0, requests[7][:20])
    assert index.best(requests[7]) == Best(20, 0)
    index.cleared(1)  # while the sweep after the first is under way
    assert index.best(requests[5]) == Best(0, -1)
    while not index.sweep(500):
        index.check_integrity()
    assert len(index._holders) == 20 and len(index._free) == 2  # nothing of it is left
    index.join(2)
    assert index.replicas == 4 and len(index._replica) == 4  # in the slots that were swept
    index.stored(3, requests[0])
    assert index.best(requests[0]) == Best(51, 3)
    index.check_integrity()


def test_promises_are_kept_or_taken_back() -> None:
    index = PrefixIndex(2)
    keys = chain(*range(10))
    index.stored(0, keys[:2])
    mine = index.promise(0, keys[:8])
    assert mine == keys[2:8] and index.best(keys) == Best(8, 0)
    other = index.promise(0, keys)
    assert other == keys[8:]
    index.stored(0, keys[:5])  # the replica reports the first of them
    index.withdraw(0, mine)
    assert index.best(keys[:8]) == Best(5, 0)
    assert index.promise(0, keys[:8], index.depth(0, keys[:8])) == mine[3:], "what was just looked up need not be again"
    index.withdraw(0, mine)
    index.withdraw(0, mine)
    index.withdraw(0, other)
    assert index.pages(0) == 5
    index.promise(1, keys)
    index.removed(1, keys[9:])
    index.cleared(1)
    assert index.best(keys) == Best(5, 0) and not index._unsure
    index.check_integrity()


def test_hashes_of_any_kind_become_keys() -> None:
    assert short_keys([b"\x01" + bytes(15), b"\x02" + bytes(31)]) == [1, 2]
    assert short_keys([2**64 + 7, b"\x03" + bytes(7)]) == [7, 3]
    assert short_keys([-1]) == [2**64 - 1] and short_keys([]) == []


CHAINS = [chain(i % 2, i % 3, *range(i)) for i in range(2, 9)]
CHANGE = st.tuples(
    st.sampled_from(["stored", "stored", "stored", "evicted", "cleared", "promise", "withdraw", "sweep", "join"]),
    st.integers(0, 3),
    st.integers(0, len(CHAINS) - 1),
    st.integers(0, 10),
    st.sampled_from(Tier),
)


class Model:
    """Prefix-closed sets of pages: (replica, tier) -> keys; promises beside them."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, Tier], set[int]] = {}
        self.sure: dict[int, set[int]] = {}

    def longest(self, replica: int, tier: Tier, keys: list[int]) -> int:
        held = self.held.get((replica, tier), set())
        return next((i for i, key in enumerate(keys) if key not in held), len(keys))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(CHANGE, max_size=40))
def test_any_order_of_changes(changes: list[tuple[str, int, int, int, Tier]]) -> None:
    index, model, replicas = PrefixIndex(2), Model(), 2
    for kind, replica, which, count, tier in changes:
        replica %= replicas
        keys = CHAINS[which][:count]
        held = model.held.setdefault((replica, tier), set())
        if kind == "stored":
            index.stored(replica, keys, tier)
            held.update(keys)
            if tier is Tier.device:
                model.sure.setdefault(replica, set()).update(keys)
        elif kind == "evicted":  # from the end, as replicas do
            gone = [k for k in CHAINS[which][count:] if k in held]
            ends = [c for c in CHAINS if set(c) & set(gone)]
            gone = [k for c in ends for k in c[min(c.index(g) for g in gone if g in c) :]]
            index.removed(replica, gone, tier)
            held.difference_update(gone)
            model.sure.setdefault(replica, set()).difference_update(gone if tier is Tier.device else ())
        elif kind == "cleared":
            index.cleared(replica)
            for each in Tier:
                model.held[replica, each] = set()
            model.sure[replica] = set()
        elif kind == "promise":
            index.promise(replica, keys)
            model.held.setdefault((replica, Tier.device), set()).update(keys)
        elif kind == "withdraw":  # of all pages, so that what stays is closed again
            every = {key for each in CHAINS for key in each}
            index.withdraw(replica, every)
            model.held[replica, Tier.device] = set(model.sure.get(replica, set()))
        elif kind == "sweep":
            index.sweep(count)
        elif replicas < 4:
            index.join()
            replicas += 1
        index.check_integrity()
    for keys in CHAINS:
        by_tier = [[model.longest(r, tier, keys) for r in range(replicas)] for tier in Tier]
        assert [each.tolist() for each in index.reach(keys)[:3]] == np.maximum.accumulate(by_tier, axis=0).tolist()
        device = by_tier[Tier.device]
        assert [index.depth(r, keys) for r in range(replicas)] == device
        for r in range(replicas):
            sure = model.sure.get(r, set())
            held = next((at for at, key in enumerate(keys) if key not in sure), len(keys))
            assert index.more_elsewhere(r, keys) == any(n > held for other, n in enumerate(device) if other != r)
        longest = max(map(max, by_tier))
        holders = [r for r in range(replicas) if longest and longest in [row[r] for row in by_tier]]
        assert index.best(keys) == Best(longest, holders[0] if holders else -1)
        for tier in Tier:
            steps = index.holding(keys, tier)
            assert {r: step.pages for step in steps for r in step.replicas} == {
                r: n for r, n in enumerate(by_tier[tier]) if n
            }
    assert len(index) == sum(map(len, model.held.values()))


def test_lookups_probe_a_few_keys_only() -> None:
    class Counted(list[int]):
        probes = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.probes += 1
            return super().__getitem__(at)

        def __iter__(self) -> Iterator[int]:
            raise AssertionError("a lookup walks")

    index = PrefixIndex(64)
    keys = Counted(chain(*range(1024)))
    plain = list.copy(keys)
    for replica in range(64):
        index.stored(replica, list.__getitem__(plain, slice(0, 900)))
    assert index.best(keys) == Best(900, 0) and Counted.probes <= 12
    index.stored(7, plain)
    assert index.best(keys) == Best(1024, 7) and Counted.probes <= 24


@pytest.mark.parametrize("seed", range(6))
def test_changes_of_many_pages_at_once_are_those_of_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    whole, single = PrefixIndex(3), PrefixIndex(3)
    promised: list[tuple[int, list[int]]] = []
    for _ in range(150):
        replica, prompt = int(random.integers(3)), int(random.integers(4))
        first, count = int(random.integers(0, 6)), int(random.integers(0, 12))
        keys = [100 * prompt + page for page in range(first, first + count)]
        match int(random.integers(5)):
            case 0:
                whole.stored(replica, keys)
                for key in keys:
                    single.stored(replica, [key])
            case 1:
                whole.removed(replica, keys)
                for key in keys:
                    single.removed(replica, [key])
            case 2:
                leading = [100 * prompt + page for page in range(count)]
                fresh = whole.promise(replica, leading, 0)  # what is held has gaps here, so no depth is looked up
                assert fresh == [key for key in leading if single.promise(replica, [key])]
                promised.append((replica, fresh))
            case 3 if promised:
                replica, fresh = promised.pop(int(random.integers(len(promised))))
                whole.withdraw(replica, fresh)
                single.withdraw(replica, fresh)
            case _:
                whole.stored(replica, range(first, first + count))  # any iterable
                single.stored(replica, iter(range(first, first + count)))
        assert whole._holders == single._holders and whole._unsure == single._unsure and len(whole) == len(single)
    whole.check_integrity()
