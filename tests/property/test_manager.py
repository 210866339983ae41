"""PagedKVCacheManager through its public surface against a model with one dict entry per cached page.

The model walks page by page, as MAX 26.5 does, and works on copies: a refused alloc leaves no trace in it
by construction. After every rule are compared: windows, page counts, which requests show the same leading pages,
metrics, per replica the cached leading pages of every prompt ever made (so the eviction order, which teardown
then follows to the last page), and the content of every processed slot of every live request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import rayk
from rayk.errors import (
    AlreadyClaimedError,
    BatchError,
    InsufficientBlocksError,
    NotClaimedError,
    ReplicaIndexError,
    RuntimeInputsError,
    TokenError,
)

MACHINES = settings.get_profile("rayk-machines")
SESSION = rayk.InferenceSession("inline")
MAX_CONTEXTS = 9
MAX_PENDING = 2  # placeholders at once

Chain = tuple[str | None, tuple[int, ...]]  # salt, all tokens up to the end of a page


# -- the model ---------------------------------------------------------------------------------


@dataclass
class Req:
    """What a context and its claim should look like. `tokens` has true tokens where the context has placeholders."""

    id: str
    salt: str | None
    tokens: list[int]
    end: int
    processed: int = 0
    cached_prefix: int | None = None
    pending: int = 0
    accepted: int = 0
    verify: int = 0
    replica: int | None = None
    pages: int = 0
    committed: int = 0
    computed: bool = False  # the active window was forwarded since the last alloc

    @property
    def window(self) -> tuple[int, int, int, int | None]:
        return len(self.tokens), self.processed, self.end, self.cached_prefix

    def chain(self, page: int, size: int) -> Chain:
        return self.salt, tuple(self.tokens[: (page + 1) * size])

    @property
    def hashable(self) -> int:
        return len(self.tokens) - max(1, self.pending)


@dataclass
class Entry:
    holders: frozenset[str]
    released: int = 0


@dataclass
class Replica:
    total: int
    cached: dict[Chain, Entry] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)  # pages of a request that are not cached
    now: int = 0
    evicted: int = 0

    def copy(self) -> Replica:
        return replace(self, cached={c: replace(e) for c, e in self.cached.items()}, own=dict(self.own))

    @property
    def empty(self) -> int:
        return self.total - len(self.cached) - sum(self.own.values())

    @property
    def free(self) -> int:
        return self.empty + sum(not e.holders for e in self.cached.values())

    def make_room(self, count: int) -> None:
        """Least recently released first, of one release the deepest page first."""
        order = sorted((e.released, -len(c[1]), c) for c, e in self.cached.items() if not e.holders)
        for _, _, chain in order[: max(0, count - self.empty)]:
            del self.cached[chain]
            self.evicted += 1

    def hold(self, chain: Chain, request_id: str) -> None:
        entry = self.cached.setdefault(chain, Entry(frozenset()))
        entry.holders |= {request_id}


class Refused(Exception):
    """alloc() must raise InsufficientBlocksError."""


@dataclass
class Model:
    size: int
    pages: int
    caching: bool
    copies: bool
    drafts: int
    page_bytes: int
    replicas: list[Replica]
    routed: int = 0
    metrics: dict[str, int] = field(default_factory=dict)

    def reset_metrics(self) -> None:
        self.metrics = dict.fromkeys(("input", "served", "copied"), 0)
        for r in self.replicas:
            r.evicted = 0

    def slots(self, req: Req) -> int:
        # with 1 draft token "eagle" makes all of them in one pass: B = 1
        extra = 2 * self.drafts + 1 + (self.drafts == 1)
        slots = len(req.tokens) + req.accepted + extra - max(1, req.pending)
        return max(slots, req.end)  # more only with two placeholders: what is forwarded next has a page

    def wanted(self, req: Req) -> int:
        return -(-self.slots(req) // self.size)

    def claim(self, req: Req, r: int) -> None:
        req.replica, req.pages, req.committed, req.computed = r, 0, 0, False
        self.replicas[r].own[req.id] = 0

    def try_alloc(self, req: Req, peers: bool = True) -> tuple[Req, Replica, int, int]:
        """The request and its replica after alloc(), hits and copies; Refused instead, and in both cases no change."""
        new, r = replace(req), self.replicas[req.replica].copy()
        length, size = len(req.tokens), self.size
        if length + req.accepted + req.verify > self.pages * size:
            raise Refused
        active = req.end - req.processed
        if not new.pages:
            new.processed = 0
        first, hits, copied = new.processed == 0, 0, 0
        if self.caching and new.end - new.processed != 1:
            page = req.committed
            while page < req.hashable // size:
                chain = req.chain(page, size)
                if chain in r.cached:
                    hits += 1
                elif peers and self.copies and r.free and any(chain in other.cached for other in self.replicas):
                    r.make_room(1)
                    copied += 1
                else:
                    break
                r.hold(chain, req.id)
                page += 1
            if hits + copied:
                r.own[req.id] = 0
                new.committed = new.pages = page
                new.processed = page * size
                if new.processed >= new.end:  # the chunk was covered: as many tokens, after the hits
                    new.end = min(length, new.processed + active)
            if first:
                new.cached_prefix = new.processed
        need = max(0, self.wanted(req) - new.pages)
        if need > r.free:
            raise Refused
        r.make_room(need)
        r.own[req.id] += need
        new.pages += need
        new.computed = False
        return new, r, hits, copied

    def alloc(self, req: Req, peers: bool = True) -> tuple[int, int]:
        new, r, hits, copied = self.try_alloc(req, peers)
        self.replicas[req.replica] = r
        vars(req).update(vars(new))
        self.metrics["input"] += req.end - req.processed
        self.metrics["served"] += hits
        self.metrics["copied"] += copied
        return hits, copied

    def step(self, req: Req) -> None:
        r, full = self.replicas[req.replica], min(req.processed, len(req.tokens) - req.pending) // self.size
        while self.caching and req.committed < full:
            r.hold(req.chain(req.committed, self.size), req.id)
            r.own[req.id] -= 1
            req.committed += 1

    def release(self, req: Req) -> None:
        r = self.replicas[req.replica]
        r.now += 1
        for page in range(req.committed):
            entry = r.cached[req.chain(page, self.size)]
            entry.holders -= {req.id}
            entry.released = r.now
        del r.own[req.id]
        req.replica, req.pages, req.committed, req.computed = None, 0, 0, False

    def hits(self, req: Req, r: Replica) -> int:
        pages = req.hashable // self.size if self.caching else 0
        return next((i for i in range(pages) if req.chain(i, self.size) not in r.cached), pages)

    def used_after(self, req: Req, r: int) -> float:
        there = replace(req) if req.replica == r else replace(req, replica=r, pages=0, committed=0, id=f"{req.id}?")
        added = there.id not in self.replicas[r].own
        if added:
            self.replicas[r].own[there.id] = 0
        try:
            return 1 - self.try_alloc(there)[1].free / self.pages
        except Refused:
            return 1.0
        finally:
            if added:
                del self.replicas[r].own[there.id]

    def route(self) -> int:
        """Each replica in turn: the one policy that can be foretold without what a replica has reported."""
        self.routed += 1
        return (self.routed - 1) % len(self.replicas)


def chain_values(salt: str | None, tokens: Sequence[int]) -> torch.Tensor:
    """Slot p's value depends on the salt and all tokens up to p, and is exact in float32."""
    values, value = [], 1 if salt is None else 2 + len(salt)
    for token in tokens:
        value = (31 * value + token + 7) % 1000003
        values.append(value)
    return torch.tensor(values, dtype=torch.float32)


# -- the machine ---------------------------------------------------------------------------------

STEMS = [[0] * 16, [0, 1] * 8, [0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1]]
PICK = st.integers(0, MAX_CONTEXTS - 1)
TOKEN = st.integers(0, 1)
TURNS = st.lists(st.integers(0, 8), max_size=5)
SOME = st.lists(st.booleans(), min_size=MAX_CONTEXTS, max_size=MAX_CONTEXTS)
WHERE = st.lists(st.integers(0, 2), min_size=MAX_CONTEXTS, max_size=MAX_CONTEXTS)
SALT = st.sampled_from([None, None, None, None, None, None, "s", "other"])


class Rows(dict[str, list[int]]):
    """What a request's table row should show; looked up when the forward runs, as a tick allocates before."""

    def __init__(self, machine: ManagerMachine) -> None:
        self.machine = machine

    def __missing__(self, request_id: str) -> list[int]:
        machine = self.machine
        if request_id not in machine.req:
            return []  # a dummy
        req = machine.req[request_id]
        return machine.manager.get_req_blocks(req.id, req.replica)[: machine.model.wanted(req)]


class ManagerMachine(RuleBasedStateMachine):
    manager: rayk.PagedKVCacheManager | None = None

    @initialize(
        size=st.sampled_from([1, 2, 4]),
        pages=st.integers(2, 16),
        replicas=st.sampled_from([1, 2, 2, 3]),
        caching=st.sampled_from([True, True, True, True, False]),
        copies=st.sampled_from([True, True, False]),
        drafts=st.sampled_from([0, 0, 0, 1, 2]),
        kind=st.sampled_from(["mha", "mla tp2", "two caches"]),
    )
    def start(self, size: int, pages: int, replicas: int, caching: bool, copies: bool, drafts: int, kind: str) -> None:
        common: dict[str, Any] = {
            "dtype": "float32",
            "head_dim": 1,
            "num_layers": 1,
            "page_size": size,
            "devices": ["cpu"] * replicas * (2 if kind == "mla tp2" else 1),
            "data_parallel_degree": replicas,
            "enable_prefix_caching": caching,
            "enable_dp_cross_replica_prefix_copy": copies,
            "speculative_method": "eagle" if drafts else None,
            "num_draft_tokens": drafts,
        }
        params: rayk.params.KVCacheParams
        if kind == "mla tp2":
            params = rayk.MLAKVCacheParams(num_q_heads=2, **common)
        elif kind == "two caches":
            params = rayk.MultiKVCacheParams.from_params(
                {
                    name: rayk.MHAKVCacheParams(n_kv_heads=heads, **common)
                    for name, heads in (("target", 1), ("draft", 2))
                }
            )
        else:
            params = rayk.MHAKVCacheParams(n_kv_heads=1, **common)
        self.manager = rayk.PagedKVCacheManager(
            params, SESSION, pages, 0, True, max_batch_size=MAX_CONTEXTS, router="round-robin"
        )
        self.model = Model(
            size, pages, caching, copies, drafts, params.bytes_per_page, [Replica(pages) for _ in range(replicas)]
        )
        self.model.reset_metrics()
        self.n = replicas
        self.made = 0
        self.ctx: dict[str, rayk.TextContext] = {}
        self.req: dict[str, Req] = {}

    # -- choosing ------------------------------------------------------------------------------

    def pick(self, pick: int) -> tuple[Req, rayk.TextContext]:
        req = list(self.req.values())[pick % len(self.req)]
        return req, self.ctx[req.id]

    def claimed(self, some: Sequence[bool] | None = None) -> list[Req]:
        chosen = (
            self.req.values() if some is None else [q for q, yes in zip(self.req.values(), some, strict=False) if yes]
        )
        return [req for req in chosen if req.replica is not None]

    def unclaimed(self, some: Sequence[bool]) -> list[Req]:
        return [req for req, yes in zip(self.req.values(), some, strict=False) if yes and req.replica is None]

    def batches(self, reqs: Iterable[Req]) -> list[list[rayk.TextContext]]:
        batches: list[list[rayk.TextContext]] = [[] for _ in range(self.n)]
        for req in reqs:
            batches[req.replica].append(self.ctx[req.id])
        return batches

    # -- contexts --------------------------------------------------------------------------------

    @rule(
        stem=st.sampled_from(STEMS),
        shared=st.sampled_from([0, 3, 4, 8, 9, 12]),
        own=st.lists(TOKEN, min_size=1, max_size=5),
        salt=SALT,
        where=WHERE,
        turns=TURNS,
        then=st.sampled_from(["keep", "release", "twin"]),
    )
    def new_context(
        self,
        stem: list[int],
        shared: int,
        own: list[int],
        salt: str | None,
        where: list[int],
        turns: list[int],
        then: str,
    ) -> None:
        tokens = stem[:shared] + own
        req = self.make(tokens, salt)
        if then == "twin":  # has the same pages in the making
            twin = self.make(tokens, salt, keep=req)
            self.claim(twin, where[1] % self.n)
            self.alloc(twin)
        if turns:
            self.serve(req, where[0] % self.n, turns)
            if then == "release":
                self.release(req)

    def make(self, tokens: list[int], salt: str | None, keep: Req | None = None) -> Req:
        if len(self.req) == MAX_CONTEXTS:  # drop the oldest, preferably of those that hold nothing
            others = [q for q in self.req.values() if q is not keep]
            req = min(others, key=lambda q: q.replica is not None)
            if req.replica is not None:
                self.release(req)
            del self.req[req.id], self.ctx[req.id]
        self.made += 1
        name = f"r{self.made}"
        self.ctx[name] = rayk.TextContext(name, tokens, 1000, salt)
        self.req[name] = Req(name, salt, tokens, len(tokens))
        return self.req[name]

    @precondition(lambda self: self.req)
    @rule(pick=PICK, n=st.integers(1, 8))
    def chunk(self, pick: int, n: int) -> None:
        req, ctx = self.pick(pick)
        if n < req.end - req.processed:
            self.chunk_to(req, n)
        else:
            with pytest.raises(TokenError):
                ctx.tokens.chunk(n)

    def chunk_to(self, req: Req, n: int) -> None:
        self.ctx[req.id].tokens.chunk(n)
        req.end, req.computed = req.processed + n, False

    @precondition(lambda self: self.model.drafts and self.req)
    @rule(pick=PICK, accepted=st.integers(0, 3), verify=st.integers(0, 9))
    def draft(self, pick: int, accepted: int, verify: int) -> None:
        req, ctx = self.pick(pick)
        ctx.maybe_accepted_draft_tokens, ctx.draft_tokens_to_verify = [0] * accepted, [0] * verify
        req.accepted, req.verify = accepted, verify

    def update(self, req: Req, token: int, future: bool = False) -> None:
        chunked = req.end < len(req.tokens)
        if future:
            self.ctx[req.id].update_with_future_token()
        else:
            self.ctx[req.id].update(token)
        req.processed, req.computed = req.end, False
        if not chunked:
            req.tokens = [*req.tokens, token]
            req.pending += future
        req.end = len(req.tokens)

    @precondition(lambda self: any(req.computed for req in self.req.values()))
    @rule(pick=PICK, token=TOKEN, future=st.booleans())
    def update_one(self, pick: int, token: int, future: bool) -> None:
        req, _ = self.pick(pick)
        if req.computed:
            self.update_with(req, token, future)

    def update_with(self, req: Req, token: int, future: bool) -> None:
        if not future or req.pending == MAX_PENDING:  # a known token comes behind known tokens only
            self.realize(req)
        self.update(req, token, future)

    @precondition(lambda self: any(req.pending for req in self.req.values()))
    @rule(pick=PICK)
    def realize_one(self, pick: int) -> None:
        self.realize(self.pick(pick)[0])

    def realize(self, req: Req) -> None:
        while req.pending:
            self.ctx[req.id].realize_future_token(req.tokens[len(req.tokens) - req.pending])
            req.pending -= 1

    # -- claims and pages ---------------------------------------------------------------------------

    def claim(self, req: Req, r: int) -> None:
        self.manager.claim(req.id, r)
        self.model.claim(req, r)

    def alloc(self, req: Req) -> bool:
        try:
            self.model.alloc(req)
        except Refused:
            with pytest.raises(InsufficientBlocksError):
                self.manager.alloc(self.ctx[req.id], req.replica)
            return False
        self.manager.alloc(self.ctx[req.id], req.replica)
        return True

    @precondition(lambda self: self.req)
    @rule(pick=PICK, r=st.integers(0, 2), alloc=st.sampled_from([True, True, True, False]))
    def claim_and_alloc(self, pick: int, r: int, alloc: bool) -> None:
        req, _ = self.pick(pick)
        if req.replica is None:
            self.claim(req, r % self.n)
        if alloc:
            self.alloc(req)

    def release(self, req: Req) -> None:
        self.manager.release(req.id, req.replica)
        self.model.release(req)

    @precondition(lambda self: self.claimed())
    @rule(pick=PICK, reset=st.booleans())
    def release_one(self, pick: int, reset: bool) -> None:
        """With reset() it is a preemption; without, the window is stale when the context comes back."""
        req, ctx = self.pick(pick)
        if req.replica is not None:
            self.release(req)
        if reset:
            ctx.reset()
            req.processed, req.end, req.accepted, req.verify = 0, len(req.tokens), 0, 0

    def dummy(self, r: int) -> None:
        padding = rayk.TextContext("dummy", [0], 1)
        self.manager.alloc_dummy("dummy", r)
        assert self.manager.get_req_blocks("dummy", r) == [self.model.pages]
        self.same_as_the_model()
        batches: list[list[rayk.TextContext]] = [[] for _ in range(self.n)]
        batches[r].append(padding)
        if self.model.wanted(Req("dummy", None, [0], 1)) <= self.model.pages:
            self.manager.execute(batches, self.forward_fn())
        else:  # a table cannot be wider than the pool
            with pytest.raises(RuntimeInputsError):
                self.manager.execute(batches, self.forward_fn())
        self.manager.step(batches)
        self.manager.release("dummy", r)

    # -- forward and step ---------------------------------------------------------------------------

    def forward_fn(self) -> Any:
        """Write what the tokens say into the active window, through a table that shows exactly the pages needed."""
        values = {req.id: chain_values(req.salt, req.tokens) for req in self.req.values()}
        null, rows = self.model.pages, Rows(self)

        def write_active_window(inputs: Any, batch: Sequence[rayk.TextContext]) -> int:
            leaves = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
            for shard in (shard for leaf in leaves for shard in leaf.shards):
                size = shard.kv_blocks.shape[3]
                for row, ctx in zip(shard.lookup_table, batch, strict=True):
                    assert row.tolist() == rows[ctx.request_id] + [null] * (len(row) - len(rows[ctx.request_id]))
                    for p in range(ctx.tokens.processed_length, ctx.tokens.processed_length + ctx.tokens.active_length):
                        value = values[ctx.request_id][p] if ctx.request_id in values else -1.0
                        shard.kv_blocks[int(row[p // size]), :, :, p % size] = value
            return len(batch)

        return write_active_window

    def forward(self, reqs: list[Req]) -> None:
        batches = self.batches(reqs)
        if any(self.model.wanted(req) > req.pages for req in reqs):
            with pytest.raises(RuntimeInputsError):
                self.manager.execute(batches, self.forward_fn())
            return
        assert self.manager.execute(batches, self.forward_fn()) == [len(batch) for batch in batches]
        for req in reqs:
            req.computed = True

    @precondition(lambda self: self.claimed())
    @rule(some=SOME)
    def forward_some(self, some: list[bool]) -> None:
        self.forward(self.claimed(some))

    @precondition(lambda self: self.claimed())
    @rule(some=SOME)
    def step_some(self, some: list[bool]) -> None:
        self.step([req for req in self.claimed(some) if req.pages])

    def step(self, reqs: list[Req]) -> None:
        self.manager.step(self.batches(reqs))
        for r in range(self.n):
            for req in (q for q in reqs if q.replica == r):
                self.model.step(req)

    @precondition(lambda self: self.req)
    @rule(pick=PICK, r=st.integers(0, 2), turns=TURNS)
    def serve_one(self, pick: int, r: int, turns: list[int]) -> None:
        self.serve(self.pick(pick)[0], r % self.n, turns)

    def serve(self, req: Req, r: int, turns: list[int]) -> None:
        """Whole turns, so that deep states are not left to luck. Turn t samples t % 2. t = 2 .. 5: of a chunk of one
        or two pages; 6: of a chunk of one token, chunked before the alloc; 7, 8: a placeholder for the token."""
        if req.replica is None:
            self.claim(req, r)
        for turn in turns:
            if turn == 6 and req.end - req.processed > 1:
                self.chunk_to(req, 1)
            if not self.alloc(req):
                break
            chunk = turn // 2 * self.model.size if turn < 6 else 0
            if 0 < chunk < req.end - req.processed:
                self.chunk_to(req, chunk)
            self.forward([req])
            self.update_with(req, turn % 2, future=turn > 6)
            self.step([req])

    # -- batched forms --------------------------------------------------------------------------------

    def model_admit(self, req: Req, r: int) -> tuple[type[Exception] | None, int, int]:
        """The error that admission meets, else tokens from the cache and from other replicas."""
        if req.replica is not None:
            return AlreadyClaimedError, 0, 0
        self.model.claim(req, r)
        try:
            hits, copied = self.model.alloc(req)
        except Refused:
            self.model.release(req)
            return InsufficientBlocksError, 0, 0
        return None, hits * self.model.size, copied * self.model.size

    @precondition(lambda self: self.req)
    @rule(how=st.sampled_from(["try_admit", "routed", "admit", "reserve", "reserve twice"]), some=SOME, where=WHERE)
    def admit_some(self, how: str, some: list[bool], where: list[int]) -> None:
        if how == "admit":
            self.admit(self.unclaimed(some))
        elif how.startswith("reserve"):
            self.reserve(self.unclaimed(some), where, twice=how == "reserve twice")
        else:
            self.try_admit(some, where, how == "routed")

    def try_admit(self, some: list[bool], where: list[int], routed: bool) -> None:
        reqs = [req for req, yes in zip(self.req.values(), some, strict=False) if yes]
        replicas = [r % self.n for r in where[: len(reqs)]]
        results = self.manager.try_admit([self.ctx[q.id] for q in reqs], None if routed else replicas)
        assert len(results) == len(reqs)
        for req, r, result in zip(reqs, replicas, results, strict=True):
            r = self.model.route() if routed else r
            error, device, peer = self.model_admit(req, r)
            assert (result.replica, type(result.error)) == (r, error or type(None))
            assert (result.device_tokens, result.peer_tokens) == (device, peer)

    def admit(self, reqs: list[Req]) -> None:
        """All or none: those before the one that fails are released and their windows go back."""
        done: list[tuple[Req, tuple[int, int, int | None]]] = []
        placed, error = [], None
        for req in reqs:
            before, r = (req.processed, req.end, req.cached_prefix), self.model.route()
            error, _, _ = self.model_admit(req, r)
            if error is not None:
                break
            done.append((req, before))
            placed.append(r)
        if error is None:
            assert self.manager.admit([self.ctx[q.id] for q in reqs]) == placed
            return
        for req, before in done:
            self.model.release(req)
            req.processed, req.end, req.cached_prefix = before
        with pytest.raises(error):
            self.manager.admit([self.ctx[q.id] for q in reqs])

    def reserve(self, chosen: list[Req], where: list[int], twice: bool) -> None:
        reqs: list[list[Req]] = [[] for _ in range(self.n)]
        for req, r in zip(chosen, where, strict=False):
            reqs[r % self.n].append(req)
        if twice and reqs[0]:
            reqs[-1].append(reqs[0][0])
        batches = [[self.ctx[q.id] for q in batch] for batch in reqs]
        held, error = [], None
        for req, r in ((q, r) for r, batch in enumerate(reqs) for q in batch):
            error, _, _ = self.model_admit(req, r)
            if error is not None:
                break
            held.append(req)
        if error is None:
            with self.manager.reserve(batches):
                self.same_as_the_model()
                self.forward(held)
                for req in held:
                    self.model.release(req)
        else:
            for req in held:
                self.model.release(req)
            with pytest.raises(error), self.manager.reserve(batches):
                raise AssertionError("not reached")

    @precondition(lambda self: self.claimed())
    @rule(what=st.lists(st.integers(0, 5), min_size=MAX_CONTEXTS, max_size=MAX_CONTEXTS), token=TOKEN)
    def tick(self, what: list[int], token: int) -> None:
        """Per replica step, release, alloc and execute. Other replicas' pages are not looked for."""
        chosen = list(zip(self.claimed(), what, strict=False))
        ticks, expected, forwarded = [], [], []
        for r in range(self.n):
            here = [(req, w) for req, w in chosen if req.replica == r]
            step = [req for req, w in here if w in (1, 5) and req.pages]
            release = [req for req, w in here if w == 2]
            alloc = [req for req, w in here if w >= 3]
            execute = [req for req, w in here if w >= 4]
            ticks.append(
                rayk.Tick(
                    step=[self.ctx[q.id] for q in step],
                    release=[q.id for q in release],
                    alloc=[self.ctx[q.id] for q in alloc],
                    execute=[self.ctx[q.id] for q in execute],
                )
            )
            for req in step:
                self.model.step(req)
            for req in release:
                self.model.release(req)
            refused = set()
            for req in alloc:
                try:
                    self.model.alloc(req, peers=False)
                except Refused:
                    refused.add(req.id)
            runs = [req for req in execute if req.id not in refused]
            forwarded += runs
            free = self.model.replicas[r].free
            expected.append((refused, len(runs) or None, free, self.model.pages - free))
        results = self.manager.tick(ticks, self.forward_fn())
        assert [(set(t.refused), t.value, t.free_pages, t.used_pages) for t in results] == expected
        for req in forwarded:
            req.computed = True

    # -- what changes nothing, or only counters ---------------------------------------------------------

    @precondition(lambda self: self.req)
    @rule(pick=PICK, which=st.integers(0, 20))
    def in_vain(self, pick: int, which: int) -> None:
        req, ctx = self.pick(pick)
        if which > 10:
            self.used_fraction(req, ctx) if which > 14 else self.dummy(which % self.n)
        else:
            self.misuse(req, ctx, which)

    def misuse(self, req: Req, ctx: rayk.TextContext, which: int) -> None:
        m, idle = self.manager, [[] for _ in range(self.n)]
        other = next((r for r in range(self.n) if r != req.replica), None)
        nobody = rayk.TextContext("nobody", [0, 1], 10)
        for wrong, call in [
            (ReplicaIndexError, lambda: m.claim("nobody", self.n)),
            (ReplicaIndexError, lambda: m.alloc(ctx, -1)),
            (NotClaimedError, lambda: m.alloc(nobody, 0)),
            (NotClaimedError, lambda: m.release("nobody", self.n - 1)),
            (NotClaimedError, lambda: m.alloc(ctx, other)),
            (NotClaimedError, lambda: m.release(req.id, other)),
            (BatchError, lambda: m.step([*idle, []])),
            (NotClaimedError, lambda: m.step([*idle[1:], [nobody]])),
            (ValueError, lambda: m.execute(idle[1:], self.forward_fn())),
            (ValueError, lambda: m.runtime_inputs([*idle[1:], [nobody]])),
            (AlreadyClaimedError, lambda: m.claim(req.id, 0)),
        ][which : which + 1]:
            if (which in (4, 5) and other is None) or (which == 10 and req.replica is None):
                continue
            with pytest.raises(wrong):
                call()

    def used_fraction(self, req: Req, ctx: rayk.TextContext) -> None:
        for r in range(self.n):
            got = self.manager.get_pct_used_blocks_after_allocation(ctx, r)
            if not self.model.drafts:  # fewer accepted drafts than before leave pages that a copy would give back
                assert got == pytest.approx(self.model.used_after(req, r))

    @precondition(lambda self: self.made % 5 == 4)  # rare, or nothing would ever stay cached
    @rule(metrics=st.booleans())
    def reset(self, metrics: bool) -> None:
        if metrics:
            self.manager.reset_metrics()
            self.model.reset_metrics()
        else:
            self.manager.reset_prefix_cache()
            for r in self.model.replicas:
                r.cached = {chain: entry for chain, entry in r.cached.items() if entry.holders}

    # -- comparing ----------------------------------------------------------------------------------------

    @invariant()
    def same_as_the_model(self) -> None:
        if self.manager is None:
            return
        m, model = self.manager, self.model
        for req in self.req.values():
            ctx = self.ctx[req.id]
            assert (len(ctx.tokens), ctx.tokens.processed, ctx.tokens.end, ctx.cached_prefix_length) == req.window, req
            assert [m.contains(req.id, r) for r in range(self.n)] == [r == req.replica for r in range(self.n)]
            hits = [(model.hits(req, r), 0, 0) for r in model.replicas]
            assert m.get_prefix_cache_hit_counts(ctx) == hits, req
        for r, replica in enumerate(model.replicas):
            assert (m.num_free_blocks(r), m.get_num_used_pages(r)) == (replica.free, model.pages - replica.free)
            self.same_pages(r)
        self.same_metrics()

    def same_pages(self, r: int) -> None:
        live = [req for req in self.claimed() if req.replica == r]
        blocks = {req.id: self.manager.get_req_blocks(req.id, r) for req in live}
        for req in live:
            pages = blocks[req.id]
            assert len(pages) == req.pages, req
            known = min(req.processed, len(pages) * self.model.size)
            if known:
                want = chain_values(req.salt, req.tokens[:known])
                for buffer in self.manager.read_pages(pages, r):
                    slots = buffer.movedim(3, 1).flatten(0, 1).flatten(1)[:known]
                    assert (slots == want[:, None]).all(), (req, slots[:, 0], want)
        for a in live:
            for b in live:
                cached = zip(
                    [a.chain(i, self.model.size) for i in range(a.committed)],
                    [b.chain(i, self.model.size) for i in range(b.committed)],
                    strict=False,
                )
                shared = sum(x == y for x, y in cached)
                if a is not b:
                    assert blocks[a.id][:shared] == blocks[b.id][:shared]
                    assert not set(blocks[a.id][shared:]) & set(blocks[b.id][shared:]), (a, b)
        used = {page for pages in blocks.values() for page in pages}
        assert len(used) == self.manager.get_num_used_pages(r)

    def same_metrics(self) -> None:
        got, want, size = self.manager.get_metrics_aggregated(), self.model.metrics, self.model.size
        assert got == rayk.KVCacheMetrics(
            input_tokens=want["input"],
            cache_tokens=(want["served"] + want["copied"]) * size,
            device_blocks_served=want["served"],
            cross_replica_blocks_copied=want["copied"],
            cross_replica_bytes_copied=want["copied"] * self.model.page_bytes,
            evicted_blocks=sum(r.evicted for r in self.model.replicas),
        )

    def teardown(self) -> None:
        """Release everything, then take the cached pages away one by one."""
        if self.manager is None:
            return
        try:
            for req in self.claimed():
                self.release(req)
            self.same_as_the_model()
            for r in range(self.n):
                for pages in range(1, self.model.pages + 1):
                    eater = Req("eater", "eater", [0] * pages * self.model.size, 0)
                    eater.end = len(eater.tokens)
                    ctx = rayk.TextContext("eater", eater.tokens, 1000, "eater")
                    self.manager.claim("eater", r)
                    self.model.claim(eater, r)
                    self.req["eater"], self.ctx["eater"] = eater, ctx
                    if self.alloc(eater):
                        self.same_as_the_model()
                    self.release(eater)
                del self.req["eater"], self.ctx["eater"]
            assert [self.manager.num_free_blocks(r) for r in range(self.n)] == [self.model.pages] * self.n
        finally:
            self.manager.shutdown()


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(MACHINES, max_examples=6 * MACHINES.max_examples)
