"""PrefixTree and PagePool alone against a dict of page chains: pages, holders and the exact eviction order.

The model knows nothing of segments: it is one entry per page, keyed by all tokens up to its end, with the
holders of that page and the time of its last release. Evicted next is the page without holders that was
released longest ago, of one release the deepest. A pin (an export's hold, given back by undo) keeps a page from
being evicted and changes nothing about its place, also when its last holder lets go while it is pinned.
"""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rayk.kvcache import prefix_tree as prefix
from rayk.kvcache.page_hash import PageHasher
from rayk.kvcache.page_pool import PagePool
from rayk.kvcache.prefix_tree import PrefixTree
from rayk.kvcache.segment import Segment

MACHINES = settings.get_profile("rayk-machines")

Chain = tuple[str, tuple[int, ...]]  # a root and the tokens of all pages from there; one token is one page here

HASHER = PageHasher("xxh3_128", b"", 1)

PICK = st.integers(0, 7)
TOKENS = st.lists(st.integers(0, 1), max_size=6)
ROOT = st.sampled_from(["plain", "plain", "plain", "salted"])


def array(tokens) -> np.ndarray:
    return np.array(list(tokens), np.int32)


def raw(tokens) -> bytes:
    return np.array(tokens, np.int32).tobytes()


@dataclass(eq=False)
class Page:
    page: int
    holders: int = 0
    released: int = 0  # time of the last release, pins left out


@dataclass(eq=False)
class Holder:
    """A request (`pin` False) or an export (True), holding the chain of `tokens`."""

    root: str
    tip: Segment
    tokens: tuple[int, ...] = ()


@dataclass
class Model:
    total: int
    pages: dict[Chain, Page] = field(default_factory=dict)
    now: int = 0

    def path(self, holder: Holder) -> list[Page]:
        return [self.pages[holder.root, holder.tokens[: i + 1]] for i in range(len(holder.tokens))]

    def cached(self, root: str, tokens) -> int:
        """How many leading pages of `tokens` are cached."""
        count = 0
        while count < len(tokens) and (root, tuple(tokens[: count + 1])) in self.pages:
            count += 1
        return count

    def eviction_order(self) -> list[Chain]:
        free = [(page.released, -len(chain[1]), chain) for chain, page in self.pages.items() if not page.holders]
        return [chain for _, _, chain in sorted(free)]

    @property
    def empty(self) -> int:
        return self.total - len(self.pages)

    @property
    def evictable(self) -> int:
        return sum(not page.holders for page in self.pages.values())


class PrefixTreeMachine(RuleBasedStateMachine):
    @initialize(total=st.integers(3, 14), grow=st.sampled_from([1, 2, 64]))
    def start(self, total: int, grow: int) -> None:
        prefix.GROW_LIMIT = grow
        self.model = Model(total)
        self.pool = PagePool(total)
        self.tree = PrefixTree(1, self.pool)
        self.heard: dict[bytes, int] = {}
        self.tree.listen(self, HASHER)
        self.requests: list[Holder] = []
        self.pins: list[Holder] = []

    def stored(self, root, parent, hashes, pages, tokens) -> None:
        assert not self.heard.keys() & set(hashes)
        self.heard.update(zip(hashes, pages.tolist(), strict=True))

    @staticmethod
    def hash_of(chain: Chain) -> bytes:
        return HASHER.chain(HASHER.root((chain[0], None)), raw(chain[1]))[-1]

    def removed(self, hashes) -> None:
        for page_hash in hashes:
            del self.heard[page_hash]

    # -- holding -------------------------------------------------------------------------------

    def hold(self, holder: Holder, tokens) -> None:
        """Extend a hold by what is cached of `tokens`, in the tree and in the model."""
        match = self.tree.match(holder.tip, array(tokens))
        full = (*holder.tokens, *tokens)
        assert match.pages == self.model.cached(holder.root, full) - len(holder.tokens)
        end, known = self.tree.extend(holder.tip, array(tokens))
        assert known == match.pages
        start = len(holder.tokens)
        want = [self.model.pages[holder.root, full[: i + 1]] for i in range(start, start + match.pages)]
        assert end.path_pages(holder.tip).tolist() == [page.page for page in want]
        for page in want:
            page.holders += 1
        holder.tip, holder.tokens = end, full[: len(holder.tokens) + match.pages]

    @precondition(lambda self: len(self.requests) < 5)
    @rule(root=ROOT, tokens=TOKENS, commit=st.booleans())
    def new_request(self, root: str, tokens: list[int], commit: bool) -> None:
        holder = Holder(root, self.tree.hold_root((root, None)))
        self.hold(holder, tokens)
        self.requests.append(holder)
        if commit:
            self.commit(len(self.requests) - 1, tokens[len(holder.tokens) :])

    @precondition(lambda self: self.requests)
    @rule(pick=PICK, tokens=TOKENS)
    def extend_a_hold(self, pick: int, tokens: list[int]) -> None:
        self.hold(self.requests[pick % len(self.requests)], tokens)

    @rule(pick=PICK, root=ROOT, tokens=TOKENS)
    def hold_in_vain(self, pick: int, root: str, tokens: list[int]) -> None:
        """What a refused alloc does, of a request that holds something or of a new one."""
        if pick < len(self.requests):
            tip = self.requests[pick].tip
            self.tree.undo(self.tree.extend(tip, array(tokens))[0], tip)
        else:
            base = self.tree.hold_root((root, None))
            self.tree.undo(self.tree.extend(base, array(tokens))[0], None)

    @precondition(lambda self: len(self.pins) < 4 and self.model.pages)
    @rule(root=ROOT, tokens=TOKENS)
    def pin(self, root: str, tokens: list[int]) -> None:
        holder = Holder(root, self.tree.hold_root((root, None)))
        self.hold(holder, tokens)
        self.pins.append(holder)

    @precondition(lambda self: len(self.pins) < 4 and self.requests)
    @rule(pick=PICK, pages=st.integers(1, 6))
    def pin_part_of_a_request(self, pick: int, pages: int) -> None:
        request = self.requests[pick % len(self.requests)]
        self.pin(request.root, list(request.tokens[:pages]))

    @precondition(lambda self: self.pins)
    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        holder = self.pins.pop(pick % len(self.pins))
        for page in self.model.path(holder):
            page.holders -= 1
        self.tree.undo(holder.tip, None)

    @precondition(lambda self: self.requests)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        holder = self.requests.pop(pick % len(self.requests))
        self.model.now += 1
        for page in self.model.path(holder):
            page.holders -= 1
            page.released = self.model.now
        self.tree.release(holder.tip)

    # -- content ---------------------------------------------------------------------------------

    @precondition(lambda self: self.requests and self.model.empty + self.model.evictable)
    @rule(pick=PICK, tokens=TOKENS)
    def commit(self, pick: int, tokens: list[int]) -> None:
        holder = self.requests[pick % len(self.requests)]
        tokens = tokens[: self.model.empty + self.model.evictable]
        self.evict(len(tokens))
        pages = self.pool.take(len(tokens)).copy()
        start, full = len(holder.tokens), (*holder.tokens, *tokens)
        known = self.model.cached(holder.root, full) - start
        tip, instead = self.tree.commit(holder.tip, array(tokens), pages)
        assert (0 if instead is None else len(instead)) == known
        for i, page in enumerate(pages.tolist()):
            entry = self.model.pages.setdefault((holder.root, full[: start + i + 1]), Page(page))
            assert i >= known or instead[i] == entry.page
            entry.holders += 1
        holder.tip, holder.tokens = tip, full

    def evict(self, count: int) -> None:
        for chain in self.model.eviction_order()[: max(0, count - self.model.empty)]:
            del self.model.pages[chain]
        self.tree.make_room(count)

    @precondition(lambda self: self.model.evictable)
    @rule(count=st.integers(1, 6))
    def make_room(self, count: int) -> None:
        self.evict(min(self.model.empty + count, self.model.empty + self.model.evictable))

    @precondition(lambda self: self.model.now % 4 == 3)  # rare, or nothing would ever stay cached
    @rule()
    def reset(self) -> None:
        for chain in self.model.eviction_order():
            del self.model.pages[chain]
        self.tree.reset()

    # -- comparing -------------------------------------------------------------------------------

    def contents(self) -> dict[Chain, int]:
        """What is cached where, read off the segments themselves."""
        found: dict[Chain, int] = {}
        below: list[tuple[str, tuple[int, ...], Segment]] = [
            (name, (), root) for name in ("plain", "salted") if (root := self.tree.find_root((name, None)))
        ]
        while below:
            name, before, segment = below.pop()
            tokens = np.frombuffer(segment.tokens, np.int32).tolist()
            for i, page in enumerate(segment.pages.tolist()):
                found[name, (*before, *tokens[: i + 1])] = page
            below += [(name, (*before, *tokens), child) for child in segment.children.values()]
        return found

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        model = self.model
        assert self.contents() == {chain: entry.page for chain, entry in model.pages.items()}
        assert self.heard == {self.hash_of(chain): entry.page for chain, entry in model.pages.items()}
        assert (self.pool.empty, self.tree.cached, self.tree.evictable) == (
            model.empty,
            len(model.pages),
            model.evictable,
        )
        seen = np.zeros(model.total, np.int64)
        self.pool.count_into(seen)
        self.tree.check_integrity([holder.tip for holder in self.requests + self.pins], seen)
        assert (seen == 1).all()
        for holder in self.requests + self.pins:
            assert holder.tip.path_pages().tolist() == [page.page for page in model.path(holder)]

    def teardown(self) -> None:
        prefix.GROW_LIMIT = 64
        if not hasattr(self, "model"):
            return
        while self.pins:
            self.unpin(0)
        while self.requests:
            self.release(0)
        while self.model.pages:  # one by one: the whole order
            self.evict(self.model.empty + 1)
            self.same_as_the_model()


TestPrefixTree = PrefixTreeMachine.TestCase
TestPrefixTree.settings = settings(MACHINES, max_examples=4 * MACHINES.max_examples, stateful_step_count=50)
