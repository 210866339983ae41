"""The prefix tree by itself: what is held, split, grown in place and evicted in which order.

One page is one token here. tests/property compares the same with a model over long random histories.
"""

import numpy as np
import pytest

from rayk.errors import IntegrityError
from rayk.kvcache.page_hash import PageHasher
from rayk.kvcache.page_pool import PagePool
from rayk.kvcache.prefix_tree import GROW_LIMIT, PrefixTree
from rayk.kvcache.segment import Segment

KEY = (None, None)


def array(tokens) -> np.ndarray:
    return np.array(list(tokens), np.int32)


def raw(tokens) -> bytes:
    return np.array(list(tokens), np.int32).tobytes()


class Small:
    def __init__(self, pages: int) -> None:
        self.pool = PagePool(pages)
        self.tree = PrefixTree(1, self.pool)

    def commit(self, tokens, tip: Segment | None = None) -> Segment:
        """A request that caches `tokens` (below `tip`); it holds them until released."""
        tokens = list(tokens)
        self.tree.make_room(len(tokens))
        tip = tip if tip is not None else self.tree.hold_root(KEY)
        return self.tree.commit(tip, array(tokens), self.pool.take(len(tokens)).copy())[0]

    def hold(self, tokens) -> Segment:
        root = self.tree.hold_root(KEY)
        return self.tree.extend(root, array(tokens))[0]

    def cache(self, *prompts) -> None:
        for tokens in prompts:
            held = self.hold(tokens)
            known = len(held.path_pages())
            self.tree.release(self.commit(list(tokens)[known:], held) if known < len(tokens) else held)

    def cached(self, tokens) -> int:
        root = self.tree.find_root(KEY)
        return 0 if root is None else self.tree.match(root, array(tokens)).pages

    def evict(self, count: int = 1) -> None:
        self.tree.make_room(self.pool.empty + count)


@pytest.fixture
def small() -> Small:
    return Small(12)


def test_a_match_ends_within_a_segment(small: Small) -> None:
    small.cache([1, 2, 3, 4])
    match = small.tree.match(small.tree.find_root(KEY), array([1, 2, 9]))
    assert (match.pages, match.partial) == (2, 2)
    for tokens, pages in (([1, 2, 3, 4, 5], 4), ([1], 1), ([9], 0), ([], 0), ([2], 0), ([1, 2, 3], 3)):
        assert small.cached(tokens) == pages


def test_a_match_changes_nothing(small: Small) -> None:
    small.cache([1, 2, 3, 4])
    before = [(id(s), s.tick, s.refs) for s in small.tree.segments()]
    small.cached([1, 2])
    assert [(id(s), s.tick, s.refs) for s in small.tree.segments()] == before


def test_one_request_grows_one_segment_in_place_up_to_a_limit() -> None:
    small = Small(2 * GROW_LIMIT)
    tip = small.commit([0])
    for token in range(1, GROW_LIMIT):
        tip = small.commit([token], tip)
    assert len(list(small.tree.segments())) == 1
    small.commit([GROW_LIMIT], tip)
    assert sorted(len(s.pages) for s in small.tree.segments()) == [1, GROW_LIMIT]


def test_growth_in_place_is_not_seen_by_another_holder(small: Small) -> None:
    mine = small.commit([1, 2])
    theirs = small.hold([1, 2])
    small.commit([3], mine)
    assert len(theirs.path_pages()) == 2


def test_commit_uses_what_another_cached_and_gives_the_copies_back(small: Small) -> None:
    first = small.commit([1, 2, 3])
    root = small.tree.hold_root(KEY)
    copies = small.pool.take(4).copy()
    tip, instead = small.tree.commit(root, array([1, 2, 9, 9]), copies)
    assert instead.tolist() == first.path_pages()[:2].tolist()
    assert tip.path_pages().tolist() == [*instead, *copies[2:]]
    assert (small.pool.empty, small.tree.cached) == (12 - 5, 5)


# -- eviction order --------------------------------------------------------------------------------------


def test_least_recently_released_goes_first_and_of_one_release_the_deepest(small: Small) -> None:
    small.cache([1, 2, 3], [7, 8])
    order = []
    for _ in range(5):
        before = (small.cached([1, 2, 3]), small.cached([7, 8]))
        small.evict()
        after = (small.cached([1, 2, 3]), small.cached([7, 8]))
        order.append("old" if after[0] < before[0] else "new")
    assert order == ["old"] * 3 + ["new"] * 2


def test_a_hit_and_release_makes_a_prefix_young_again_but_not_what_follows_it(small: Small) -> None:
    small.cache([1, 2, 3, 4], [7, 8])
    small.tree.release(small.hold([1, 2]))
    small.evict(2)
    assert (small.cached([1, 2, 3, 4]), small.cached([7, 8])) == (2, 2)
    small.evict(2)
    assert (small.cached([1, 2, 3, 4]), small.cached([7, 8])) == (2, 0)


def test_branches_leave_before_their_stem(small: Small) -> None:
    small.cache([1, 2, 3], [1, 2, 4])
    small.evict()
    assert (small.cached([1, 2, 3]), small.cached([1, 2, 4])) == (2, 3)
    small.evict()
    assert small.cached([1, 2, 4]) == 2
    small.evict()
    assert small.cached([1, 2]) == 1


def test_held_pages_are_passed_over(small: Small) -> None:
    tip = small.commit([1, 2])
    small.cache([1, 2, 3], [5])
    small.evict(2)
    assert (small.cached([1, 2, 3]), small.cached([5])) == (2, 0)
    with pytest.raises(IntegrityError, match="to evict"):
        small.evict()
    small.tree.release(tip)
    small.evict(2)
    assert small.tree.cached == 0


def test_undo_restores_the_place_in_the_order(small: Small) -> None:
    small.cache([1, 2, 3], [7, 8])
    root = small.tree.hold_root(KEY)
    small.tree.undo(small.tree.extend(root, array([1, 2]))[0], None)
    small.evict(2)
    assert (small.cached([1, 2, 3]), small.cached([7, 8])) == (1, 2)


def test_many_releases_do_not_pile_up_in_the_queue_nor_disturb_the_order(small: Small) -> None:
    small.cache([1, 2, 3], [7, 8], [5])
    for _ in range(500):
        small.tree.release(small.hold([7, 8]))
    assert len(small.tree._queue) < 100
    for left in ((2, 1, 2), (1, 1, 2), (0, 1, 2), (0, 0, 2), (0, 0, 1), (0, 0, 0)):
        small.evict()
        assert (small.cached([1, 2, 3]), small.cached([5]), small.cached([7, 8])) == left


# -- pins: exports hold pages while others come and go -----------------------------------------------------


def test_a_pinned_prefix_whose_request_ends_meanwhile_keeps_its_place(small: Small) -> None:
    """Export, release, acknowledge: the prefix is as young as its release, and leaves after what follows it."""
    small.cache([5])
    tip = small.commit([1, 2, 3, 4])
    pin = small.hold([1, 2])
    small.tree.release(tip)
    small.tree.undo(pin, None)
    for left in ((0, 4), (0, 3), (0, 2), (0, 1), (0, 0)):
        small.evict()
        assert (small.cached([5]), small.cached([1, 2, 3, 4])) == left


def test_a_pinned_path_is_as_young_as_its_last_release(small: Small) -> None:
    tip = small.commit([1, 2])
    small.cache([5])
    pin = small.hold([1, 2])
    small.tree.release(tip)
    small.cache([6])
    small.tree.undo(pin, None)
    for left in ((0, 2, 1), (0, 1, 1), (0, 0, 1), (0, 0, 0)):
        small.evict()
        assert (small.cached([5]), small.cached([1, 2]), small.cached([6])) == left


def test_an_evicted_suffix_is_never_replaced_by_its_stem(small: Small) -> None:
    """Or the suffix would be found below the wrong page: a hit with another prefix's content."""
    tip = small.commit([1, 2, 3])
    pin = small.hold([1, 2])
    small.tree.release(tip)
    small.tree.undo(pin, None)
    small.evict()
    assert small.cached([1, 3]) == 1
    assert small.cached([1, 2, 3]) == 2


def test_a_pin_outlives_pressure(small: Small) -> None:
    small.cache([1, 2, 3], [7, 8])
    pin = small.hold([1, 2])
    small.evict(small.tree.evictable)
    assert (small.cached([1, 2, 3]), small.cached([7, 8])) == (2, 0)
    small.cache([5])
    small.tree.undo(pin, None)  # still older than [5]
    small.evict(2)
    assert (small.cached([1, 2]), small.cached([5])) == (0, 1)


# -- reset --------------------------------------------------------------------------------------------------


def test_reset_forgets_what_nobody_holds(small: Small) -> None:
    tip = small.commit([1, 2])
    small.cache([1, 2, 3], [7])
    small.tree.reset()
    assert (small.cached([1, 2, 3]), small.cached([7]), small.tree.evictable) == (2, 0, 0)
    small.tree.release(tip)
    assert small.tree.evictable == 2
    small.evict(2)
    assert small.pool.empty == 12


def test_an_empty_root_is_dropped(small: Small) -> None:
    small.tree.undo(small.tree.hold_root(KEY), None)
    assert small.tree.find_root(KEY) is None
    small.cache([1])
    small.evict()
    assert small.tree.find_root(KEY) is None


# -- the pool, and the check itself ----------------------------------------------------------------------------


def test_the_pool_gives_each_page_once() -> None:
    pool = PagePool(4)
    taken = pool.take(4).copy()
    assert sorted(taken.tolist()) == [0, 1, 2, 3]
    with pytest.raises(IntegrityError, match="asked for 1 pages, 0 are empty"):
        pool.take(1)
    pool.give(taken[:2])
    with pytest.raises(IntegrityError, match="3 pages returned"):
        pool.give(taken[:3])


@pytest.mark.parametrize("what", ["refs", "tick", "tokens", "count"])
def test_the_integrity_check_notices(small: Small, what: str) -> None:
    small.cache([1, 2, 3])
    (segment,) = small.tree.segments()
    if what == "count":
        small.tree.evictable += 1
    elif what == "tokens":
        segment.tokens = segment.tokens[:-4]
    else:
        setattr(segment, what, 5)
    with pytest.raises(IntegrityError, match="bug in rayk"):
        small.tree.check_integrity([], np.zeros(12, np.int64))


class Recorder:
    """What a listener would believe to be cached: hash -> page, with the hash before it."""

    def __init__(self) -> None:
        self.pages: dict[bytes, int] = {}
        self.parents: dict[bytes, bytes] = {}

    def stored(self, root, parent, hashes, pages, tokens) -> None:
        assert len(hashes) == len(pages) and len(tokens) == 4 * len(pages)
        for page_hash, page in zip(hashes, pages.tolist(), strict=True):
            assert page_hash not in self.pages
            self.pages[page_hash], self.parents[page_hash] = page, parent
            parent = page_hash

    def removed(self, hashes) -> None:
        for page_hash in hashes:
            del self.pages[page_hash], self.parents[page_hash]


@pytest.mark.parametrize("algorithm", ["sha256", "xxh3_128"])
def test_a_listener_knows_what_is_cached(algorithm: str) -> None:
    small, recorder, hasher = Small(12), Recorder(), PageHasher(algorithm, b"seed", 1)
    small.tree.listen(recorder, hasher)
    small.cache([1, 2, 3, 4], [1, 2, 8, 9], [1, 2, 8, 9, 5])
    chain = hasher.chain(hasher.root(KEY), raw([1, 2, 8, 9, 5]))
    match = small.tree.match(small.tree.find_root(KEY), array([1, 2, 8, 9, 5]))
    assert [recorder.pages[h] for h in chain] == match.node.path_pages().tolist()
    assert small.tree.page_hash(match) == chain[-1]
    half = small.tree.match(small.tree.find_root(KEY), array([1, 7]))
    assert small.tree.page_hash(half) == chain[0]
    assert small.tree.page_hash(small.tree.match(small.tree.find_root(KEY), array([6]))) == hasher.root(KEY)
    assert set(recorder.parents.values()) <= {hasher.root(KEY), *recorder.pages}
    small.tree.check_integrity([], np.zeros(12, np.int64))
    small.evict(3)
    assert len(recorder.pages) == small.tree.cached == 4
    small.tree.reset()
    assert not recorder.pages


def test_a_late_listener_is_told_of_what_is_cached() -> None:
    small, hasher, recorder = Small(8), PageHasher("sha256", b"", 1), Recorder()
    small.cache([1, 2, 3])
    small.cache([1, 2, 4])
    small.tree.listen(recorder, hasher)
    assert sorted(recorder.pages) == sorted(small.tree.hashes()) and len(recorder.pages) == 4
    assert set(recorder.parents.values()) <= {hasher.root(KEY), *recorder.pages}
    small.cache([1, 5])
    assert len(recorder.pages) == small.tree.cached == 5
    small.tree.check_integrity([], np.zeros(8, np.int64))
