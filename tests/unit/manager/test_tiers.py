"""A manager with tiers, in one process and on actors: loads that land, come late, fail, or are given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayk import InferenceSession, KVConnectorConfig, PagedKVCacheManager, TextContext, Tick
from rayk.errors import ConfigError, InsufficientBlocksError
from rayk.kvcache.connector import Found, NullConnector, Pages, Tier
from rayk.kvcache.replica import ReplicaCore
from rayk.tiers.files import HEADER_BYTES

from ..actors.fake import FakeRuntime, chain, contents, manager_on, params, session_on, stamp  # noqa: TID252  # tests/ is no package that has an absolute name

PROMPT = list(range(100, 117))  # four full pages of 4 and one token


@dataclass
class Slow:
    """A load that is over when the test says so, and of which `lands` pages land."""

    connector: Keeper
    contents: list[np.ndarray]
    pages: Pages
    wanted: bool = True
    landed: int = -1

    def poll(self) -> bool:
        if self.landed < 0 and not self.connector.slow:
            self.wait()
        return self.landed >= 0

    def wait(self) -> int:
        if self.landed < 0:
            if isinstance(self.connector.lands, Exception):
                raise self.connector.lands
            self.landed = min(self.connector.lands, len(self.contents)) if self.wanted else 0
            for content, page in zip(self.contents[: self.landed], self.pages.tolist(), strict=False):
                self.connector.raw[page] = content
        return self.landed

    def cancel(self) -> None:
        self.wanted = False


@dataclass
class Keeper(NullConnector):
    """A third party's connector: a dict of pages."""

    raw: np.ndarray
    kept: dict[bytes, np.ndarray] = field(default_factory=dict)
    touched: list[list[bytes]] = field(default_factory=list)
    slow: bool = False
    lands: int | Exception = 99

    def __post_init__(self) -> None:
        super().__init__()

    def holds(self, key: bytes) -> bool:
        return key in self.kept

    def lookup(self, hashes: Iterable[bytes]) -> Found:
        found = []
        for key in hashes:
            if key not in self.kept:
                break
            found.append(key)
        return Found(found, [Tier.DISK] * len(found))

    def offload(self, hashes: Sequence[bytes], pages: Pages) -> None:
        self.kept |= {key: self.raw[page].copy() for key, page in zip(hashes, pages.tolist(), strict=True)}

    def touch(self, hashes: Sequence[bytes]) -> None:
        self.touched.append(list(hashes))

    def load(self, hashes: Sequence[bytes], pages: Pages) -> Slow:
        return Slow(self, [self.kept[key] for key in hashes], pages)


@dataclass
class Cache:
    """A manager of one replica whose tier is a Keeper."""

    manager: PagedKVCacheManager
    core: ReplicaCore
    keeper: Keeper

    def serve(self, name: str, tokens: Sequence[int] = PROMPT) -> TextContext:
        """Prefill a new request; it stays claimed."""
        ctx = self.start(name, tokens)
        self.turn(ctx)
        return ctx

    def start(self, name: str, tokens: Sequence[int] = PROMPT) -> TextContext:
        ctx = TextContext(name, tokens, 1000)
        self.manager.claim(name, 0)
        self.manager.alloc(ctx, 0)
        return ctx

    def turn(self, ctx: TextContext) -> None:
        self.manager.execute([[ctx]], stamp)
        ctx.update(7)
        self.manager.step([[ctx]])
        self.right(ctx)

    def right(self, ctx: TextContext) -> None:
        """Every processed slot holds what the tokens say."""
        count = ctx.tokens.processed_length
        assert contents(self.manager, ctx.request_id, 0, count) == chain(ctx.tokens.all.tolist())[:count]

    def only_in_tier(self) -> None:
        """PROMPT was served once, and only the tier has it."""
        self.serve("first")
        self.manager.release("first", 0)
        self.core.tree.reset()
        assert self.core.cached_pages(TextContext("q", PROMPT, 99)) == 0


@pytest.fixture(params=["inline", "actors"])
def cache(request: pytest.FixtureRequest) -> Iterator[Cache]:
    with ExitStack() as stack:
        if request.param == "inline":
            session = stack.enter_context(InferenceSession("inline"))
            manager = PagedKVCacheManager(params(1), session, 16, 0, True, max_batch_size=8)
            core = manager._calls.cores[0]
        else:
            runtime = FakeRuntime()
            manager = stack.enter_context(manager_on(runtime, 1))
            core = runtime.actor("replica-0").core
        keeper = Keeper(core.buffers.all_bytes[0].numpy())
        core.connect(keeper)
        yield Cache(manager, core, keeper)
        manager.check_integrity()


def test_cached_pages_are_offloaded_at_once_and_loaded_when_the_device_lost_them(cache: Cache) -> None:
    cache.only_in_tier()
    assert len(cache.keeper.kept) == 4
    again = cache.start("again")
    assert (again.tokens.processed_length, again.cached_prefix_length) == (16, 16)
    cache.turn(again)
    assert cache.manager.get_metrics_aggregated().cache_tokens == 16
    other = cache.start("other")  # what landed is shared
    assert cache.manager.get_metrics_aggregated().device_blocks_served == 4
    cache.turn(other)


def test_hit_counts_say_where_pages_are(cache: Cache) -> None:
    cache.serve("first")
    question = TextContext("q", [*PROMPT, 1, 2, 3, 4], 99)
    assert cache.manager.get_prefix_cache_hit_counts(question) == [(4, 0, 0)]
    cache.manager.release("first", 0)
    cache.core.tree.reset()
    assert cache.manager.get_prefix_cache_hit_counts(question) == [(0, 0, 4)]
    cache.serve("short", PROMPT[:9])
    assert cache.manager.get_prefix_cache_hit_counts(question) == [(2, 0, 2)]


def test_a_late_load_is_waited_for_by_whoever_needs_it(cache: Cache) -> None:
    cache.only_in_tier()
    cache.keeper.slow = True
    ctx = cache.start("late")
    assert ctx.tokens.processed_length == 16
    assert cache.manager.get_prefix_cache_hit_counts(ctx) == [(0, 0, 4)]  # nobody can hit it before it landed
    cache.manager.poll_transfers()
    assert cache.core.loads_under_way
    cache.turn(ctx)
    assert cache.manager.get_prefix_cache_hit_counts(ctx)[0].device_blocks == 4


@pytest.mark.parametrize("lands", [0, 1, 3])
@pytest.mark.parametrize("slow", [False, True])
def test_what_does_not_land_is_computed(cache: Cache, lands: int, slow: bool) -> None:
    cache.only_in_tier()
    cache.manager.reset_metrics()
    cache.keeper.slow, cache.keeper.lands = slow, lands
    ctx = cache.start("poor")
    pages = cache.manager.get_req_blocks("poor", 0)
    if slow:
        assert ctx.tokens.processed_length == 16
    cache.manager.runtime_inputs([[ctx]])  # the next call with it moves its window back
    assert (ctx.tokens.processed_length, ctx.tokens.active_length) == (4 * lands, 17 - 4 * lands)
    assert ctx.cached_prefix_length == 4 * lands
    assert cache.manager.get_req_blocks("poor", 0) == pages
    metrics = cache.manager.get_metrics_aggregated()
    assert (metrics.cache_tokens, metrics.input_tokens) == (4 * lands, 17 - 4 * lands)
    cache.turn(ctx)


@pytest.mark.parametrize("call", ["step", "execute", "alloc", "tick", "drain"])
def test_any_next_call_moves_the_window_back(cache: Cache, call: str) -> None:
    cache.only_in_tier()
    cache.keeper.slow, cache.keeper.lands = True, 1
    ctx = cache.start("poor")
    if call == "step":
        cache.manager.step([[ctx]])
    elif call == "alloc":
        cache.keeper.kept.clear()
        cache.manager.alloc(ctx, 0)
    elif call == "tick":
        [result] = cache.manager.tick([Tick(execute=[ctx])], stamp)
        assert result.value == 13
    elif call == "drain":
        cache.manager.drain()
        cache.manager.runtime_inputs([[ctx]])
    else:
        assert cache.manager.execute([[ctx]], stamp) == [13]
    assert (ctx.tokens.processed_length, ctx.tokens.active_length) == (4, 13)
    cache.turn(ctx)


def test_a_chunk_keeps_its_size_when_the_window_moves_back(cache: Cache) -> None:
    cache.only_in_tier()
    cache.keeper.slow, cache.keeper.lands = True, 2
    ctx = cache.start("chunky", [*PROMPT, *range(20)])
    ctx.tokens.chunk(3)
    cache.manager.runtime_inputs([[ctx]])
    assert (ctx.tokens.processed_length, ctx.tokens.active_length) == (8, 3)
    while ctx.tokens.length == 37:
        cache.turn(ctx)


def test_a_released_request_gives_its_load_up(cache: Cache) -> None:
    cache.only_in_tier()
    cache.keeper.slow = True
    cache.start("fickle")
    cache.manager.release("fickle", 0)
    assert cache.manager.num_free_blocks(0) == 16
    cache.keeper.slow = False
    cache.turn(cache.start("steady"))


def test_a_request_that_waits_is_left_out_of_a_tick(cache: Cache) -> None:
    cache.only_in_tier()
    ready = cache.start("ready", [1, 2, 3])
    cache.keeper.slow = True
    late = cache.start("late")
    [result] = cache.manager.tick([Tick(execute=[late, ready])], stamp)
    assert (result.waiting, result.value) == ({"late"}, 3)
    ready.update(5)
    cache.keeper.slow = False
    [result] = cache.manager.tick([Tick(step=[ready], execute=[late])], stamp)
    assert (result.waiting, result.value) == (frozenset(), 1)
    late.update(5)
    cache.right(late)


@pytest.mark.parametrize("lands", [2, RuntimeError("out of order")])
def test_a_tick_that_has_nothing_else_waits(cache: Cache, lands: Any) -> None:
    cache.only_in_tier()
    cache.keeper.slow, cache.keeper.lands = True, lands
    late = cache.start("late")
    landed = lands if lands == 2 else 0
    [result] = cache.manager.tick([Tick(execute=[late])], stamp)
    assert (result.waiting, result.value) == (frozenset(), 17 - 4 * landed)
    assert late.tokens.processed_length == 4 * landed
    late.update(5)
    cache.right(late)


def test_a_refused_alloc_leaves_the_tier_alone(cache: Cache) -> None:
    cache.only_in_tier()
    cache.serve("big", list(range(1000, 1050)))
    before = cache.manager.get_metrics_aggregated(), cache.manager.num_free_blocks(0)
    ctx = TextContext("refused", PROMPT, 1000)
    cache.manager.claim("refused", 0)
    with pytest.raises(InsufficientBlocksError):
        cache.manager.alloc(ctx, 0)
    assert (ctx.tokens.processed_length, ctx.cached_prefix_length) == (0, None)
    assert (cache.manager.get_metrics_aggregated(), cache.manager.num_free_blocks(0)) == before


def test_a_connector_that_raises_is_a_miss(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache.only_in_tier()

    def broken(*_: object) -> Any:
        raise RuntimeError("third parties make mistakes")

    for method in ("holds", "lookup", "load", "offload"):
        setattr(cache.keeper, method, broken)
        ctx = cache.serve(f"after {method}")
        cache.manager.release(ctx.request_id, 0)
        cache.core.tree.reset()
    assert len(caplog.records) == 1


def test_salts_do_not_share_pages(cache: Cache) -> None:
    cache.only_in_tier()
    salted = TextContext("salted", PROMPT, 1000, cache_salt="x")
    cache.manager.claim("salted", 0)
    cache.manager.alloc(salted, 0)
    assert salted.cached_prefix_length == 0


def test_what_is_used_is_touched(cache: Cache) -> None:
    cache.serve("first")
    cache.manager.release("first", 0)
    cache.serve("other", [1, 2])
    assert cache.keeper.touched == [list(cache.keeper.kept)[:4]]


def keeper(params: object, buffers: Sequence[Any], host_pages: int, pool: str | None) -> Keeper:
    """A third party's factory."""
    return Keeper(buffers[0].numpy())


def test_a_connector_of_ones_own_is_named_by_module_and_function() -> None:
    with InferenceSession("inline") as session:
        mine = PagedKVCacheManager(params(1, kv_connector=f"{__name__}:keeper"), session, 16, max_batch_size=8)
        assert isinstance(mine._calls.cores[0].connector, Keeper)
        assert serve(mine, PROMPT) == 0
        mine._calls.cores[0].tree.reset()
        assert serve(mine, PROMPT) == 16
        with pytest.raises(ConfigError, match="cannot be imported"):
            PagedKVCacheManager(params(1, kv_connector="no.such:thing"), session, 16, max_batch_size=8)
        with pytest.raises(ConfigError, match=r"'package\.module:factory'"):
            params(1, kv_connector="locl")


def test_reading_pages_waits_for_what_is_loaded_into_them(cache: Cache) -> None:
    cache.only_in_tier()
    cache.keeper.slow = True
    ctx = cache.start("late")
    cache.right(ctx)


# -- the built-in connectors --------------------------------------------------------------------------------


@pytest.fixture(params=["inline", "actors"])
def tiered(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., PagedKVCacheManager]]:
    """Makes managers with a host tier of some pages, and a disk tier if `disk`."""
    with ExitStack() as stack:

        def make(host: int = 8, disk: int = 0, replicas: int = 1, **changes: Any) -> PagedKVCacheManager:
            page_bytes = params(1, **changes).bytes_per_page
            config = KVConnectorConfig(
                model_id="m", disk_offload_dir=tmp_path, disk_offload_max_bytes=disk * (page_bytes + HEADER_BYTES)
            )
            changes |= {"kv_connector": "tiered" if disk else "local", "kv_connector_config": config}
            if request.param == "actors":
                runtime = FakeRuntime({"node-a": 1 << 32})
                return stack.enter_context(manager_on(runtime, replicas, 16, total_num_host_pages=host, **changes))
            session = stack.enter_context(InferenceSession("inline"))
            manager = PagedKVCacheManager(params(replicas, **changes), session, 16, host, True, max_batch_size=8)
            return stack.enter_context(manager)

        yield make


def serve(manager: PagedKVCacheManager, tokens: Sequence[int], replica: int = 0) -> int:
    """One request from start to end, checked; how many tokens it reused."""
    ctx, batches = TextContext("r", tokens, 1000), [[] for _ in range(manager.params.data_parallel_degree)]
    batches[replica] = [ctx]
    manager.claim("r", replica)
    manager.alloc(ctx, replica)
    manager.execute(batches, stamp)
    cached = ctx.cached_prefix_length
    ctx.update(7)
    manager.step(batches)
    count = ctx.tokens.processed_length
    assert contents(manager, "r", replica, count) == chain(ctx.tokens.all.tolist())[:count]
    manager.release("r", replica)
    assert cached is not None
    return cached


def prompt(n: int) -> list[int]:
    return list(range(100 * n, 100 * n + 17))


def test_replicas_of_a_node_share_the_host_tier(tiered: Callable[..., PagedKVCacheManager]) -> None:
    manager = tiered(host=8, replicas=2, enable_dp_cross_replica_prefix_copy=False)
    assert serve(manager, prompt(1), 0) == 0
    assert serve(manager, prompt(1), 1) == 16
    assert [manager.get_num_used_host_pages(r) for r in (0, 1)] == [4, 4]
    metrics = manager.get_metrics_aggregated()
    assert (metrics.d2h_blocks_copied, metrics.h2d_blocks_copied) == (4, 4)
    manager.drain()
    manager.check_integrity()


def test_what_a_tier_gave_up_goes_there_again_when_it_was_used(tiered: Callable[..., PagedKVCacheManager]) -> None:
    manager = tiered(host=4)
    assert [serve(manager, prompt(n)) for n in (1, 2, 1)] == [0, 0, 16]  # 2 took the place of 1, which the device has
    assert manager.get_metrics_aggregated().d2h_blocks_copied == 3 * 4
    assert [serve(manager, prompt(1)), serve(manager, prompt(1))] == [16, 16]
    assert manager.get_metrics_aggregated().d2h_blocks_copied == 3 * 4  # it is there


def test_what_the_host_tier_has_is_not_copied_from_a_peer(tiered: Callable[..., PagedKVCacheManager]) -> None:
    manager = tiered(host=8, replicas=2)
    serve(manager, prompt(1), 0)
    assert serve(manager, prompt(1), 1) == 16
    assert manager.get_metrics_aggregated().cross_replica_blocks_copied == 0


def test_pages_survive_on_disk_until_the_next_start(tiered: Callable[..., PagedKVCacheManager]) -> None:
    first = tiered(host=4, disk=20)
    for n in range(1, 6):
        serve(first, prompt(n))
    first.drain()
    assert first.get_num_used_disk_pages(0) == 20
    assert first.get_num_used_host_pages(0) <= 4
    first.shutdown()
    second = tiered(host=4, disk=20)
    assert [serve(second, prompt(n)) for n in range(1, 6)] == [16] * 5
    metrics = second.get_metrics_aggregated()
    assert (metrics.disk_blocks_read, metrics.failed_loads) == (20, 0)
    second.drain()
    second.check_integrity()


def test_reset_prefix_cache_empties_the_tiers(tiered: Callable[..., PagedKVCacheManager], tmp_path: Path) -> None:
    manager = tiered(host=4, disk=8)
    serve(manager, prompt(1))
    manager.reset_prefix_cache()
    assert (manager.get_num_used_host_pages(0), manager.get_num_used_disk_pages(0)) == (0, 0)
    assert not list(tmp_path.rglob("*.kv"))
    assert serve(manager, prompt(1)) == 0


def test_damaged_files_cost_a_recompute(tiered: Callable[..., PagedKVCacheManager], tmp_path: Path) -> None:
    first = tiered(host=4, disk=20)
    for n in range(1, 4):
        serve(first, prompt(n))
    first.shutdown()
    for path in tmp_path.rglob("*.kv"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    second = tiered(host=4, disk=20)
    assert [serve(second, prompt(n)) for n in range(1, 4)] == [0] * 3
    metrics = second.get_metrics_aggregated()
    assert metrics.rejected_files >= 3 and metrics.failed_loads >= 3
    assert serve(second, prompt(1)) == 16  # it was computed and kept again


def test_host_pages_of_a_running_cluster_must_agree() -> None:
    runtime = FakeRuntime({"node-a": 1 << 32})
    tier = {"kv_connector": "local"}
    with (
        manager_on(runtime, 1, 16, "shared", total_num_host_pages=4, **tier),
        session_on(runtime, "shared") as session,
        pytest.raises(ConfigError, match="total_num_host_pages"),
    ):
        PagedKVCacheManager(params(1, **tier), session, 16, 5, True, max_batch_size=8)
