"""The manager around the cores: claims, batches, reservations, ticks, counters, kinds of caches, the end."""

import pytest
import torch

import rayk
from rayk import InferenceSession, InsufficientBlocksError, MLAKVCacheParams, MultiKVCacheParams, TextContext, Tick
from rayk.errors import AlreadyClaimedError, BatchError, ClosedError, ConfigError, NotClaimedError, ReplicaIndexError

from ..conftest import write_window  # noqa: TID252  # tests/ is no package that has an absolute name

# -- claims ----------------------------------------------------------------------------------------------


def test_a_request_is_claimed_once_wherever(make) -> None:
    m = make(8, replicas=2).manager
    m.claim("a", 1)
    assert (m.contains("a", 0), m.contains("a", 1)) == (False, True)
    for r in (0, 1):
        for claim in (m.claim, m.alloc_dummy):
            with pytest.raises(AlreadyClaimedError, match="'a' is already claimed on replica 1"):
                claim("a", r)
    assert m.get_req_blocks("a", 1) == []
    m.release("a", 1)
    m.claim("a", 0)


def test_release_needs_the_claim_and_its_replica(make) -> None:
    m = make(8, replicas=2).manager
    m.claim("a", 0)
    with pytest.raises(NotClaimedError, match="claimed on replica 0"):
        m.release("a", 1)
    m.release("a", 0)
    with pytest.raises(NotClaimedError, match=r"call claim\(\)"):
        m.release("a", 0)


@pytest.mark.parametrize("r", [-1, 2, 99])
def test_a_replica_index_out_of_range(make, r: int) -> None:
    m = make(8, replicas=2).manager
    ctx = TextContext("a", [1], 9)
    calls = [
        lambda: m.claim("a", r),
        lambda: m.alloc_dummy("a", r),
        lambda: m.alloc(ctx, r),
        lambda: m.release("a", r),
        lambda: m.contains("a", r),
        lambda: m.get_req_blocks("a", r),
        lambda: m.num_free_blocks(r),
        lambda: m.total_num_blocks(r),
        lambda: m.get_num_pages(r),
        lambda: m.get_num_used_pages(r),
        lambda: m.get_num_host_pages(r),
        lambda: m.get_num_used_disk_pages(r),
        lambda: m.get_pct_used_blocks_after_allocation(ctx, r),
        lambda: m.get_device_buffer(r),
        lambda: m.read_pages([0], r),
        lambda: m.try_admit([ctx], [r]),
    ]
    for call in calls:
        with pytest.raises(ReplicaIndexError, match=f"{r} is out of range.*2 replica"):
            call()
    assert issubclass(ReplicaIndexError, IndexError)
    m.claim("a", 0)  # nothing above claimed it


@pytest.mark.parametrize("batches", [[], [[]], [[], [], []]], ids=str)
def test_one_batch_per_replica(make, batches) -> None:
    m = make(8, replicas=2).manager
    for call in (
        lambda: m.step(batches),
        lambda: m.execute(batches, write_window),
        lambda: m.tick([Tick() for _ in batches]),
        lambda: m.reserve(batches).__enter__(),
    ):
        with pytest.raises(ValueError, match=f"{len(batches)} batch.*2 replica"):
            call()


def test_a_step_of_a_request_that_is_not_there(make) -> None:
    cache = make(8, replicas=2)
    ctx = cache.start("a", range(5))
    with pytest.raises(NotClaimedError):
        cache.manager.step([[], [ctx]])


# -- counters ----------------------------------------------------------------------------------------------


def test_page_counts(make) -> None:
    cache = make(8, replicas=2)
    m = cache.manager
    cache.serve("a", range(9), r=1)
    cache.start("b", range(9), r=1)
    assert [m.total_num_blocks(r) for r in (0, 1)] == [m.get_num_pages(r) for r in (0, 1)] == [8, 8]
    assert (m.num_free_blocks(0), m.num_free_blocks(1)) == (8, 5)
    assert (m.get_num_used_pages(0), m.get_num_used_pages(1)) == (0, 3)
    assert m.num_free_blocks() == m.num_free_blocks(0)
    tiers = (m.get_num_host_pages, m.get_num_used_host_pages, m.get_num_disk_pages, m.get_num_used_disk_pages)
    assert [count(1) for count in tiers] == [0, 0, 0, 0]


def test_evictions_are_counted_and_reset(make) -> None:
    cache = make(4)
    cache.serve("a", range(9))
    cache.serve("b", range(100, 109))
    assert cache.manager.get_metrics_aggregated().evicted_blocks == 1
    cache.manager.reset_metrics()
    assert cache.manager.get_metrics_aggregated() == rayk.KVCacheMetrics()


def test_reset_prefix_cache_keeps_what_is_held(make) -> None:
    cache = make(8)
    cache.serve("held", range(9), keep=True)
    cache.serve("free", range(100, 109))
    cache.manager.reset_prefix_cache()
    assert (cache.hits(range(8)), cache.hits(range(100, 108))) == ([2], [0])
    assert cache.start("again", range(9)).tokens.processed == 8


def test_reading_nothing_and_queries_that_do_nothing(make) -> None:
    m = make(8).manager
    assert [len(part) for part in m.read_pages([], 0)] == [0]
    assert m.get_req_blocks("nobody", 0) == []
    m.poll_transfers()
    m.drain()
    with pytest.raises(ConfigError, match=r"0\.\.8"):
        m.read_pages([9], 0)


# -- eviction seen from outside --------------------------------------------------------------------------------


def test_eviction_takes_tails_first_then_the_oldest(make) -> None:
    cache = make(8)
    cache.serve("old", range(17))  # 4 cached pages
    cache.serve("new", range(100, 113))  # 3 cached pages
    seen = []
    for pages in range(2, 9):
        cache.start("eater", [7] * 4 * pages)
        seen.append((cache.hits(range(16))[0], cache.hits(range(100, 112))[0]))
        cache.manager.release("eater", 0)
    assert seen == [(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]


def test_pages_without_content_go_out_before_cached_ones(make) -> None:
    cache = make(8)
    cache.serve("old", range(9))
    for i in range(20):
        cache.manager.release(cache.start(f"r{i}", [7] * 24).request_id, 0)
    assert cache.hits(range(8)) == [2]


# -- other replicas --------------------------------------------------------------------------------------------


def test_pages_are_copied_from_another_replica(make) -> None:
    cache = make(8, replicas=3)
    cache.serve("old", range(13), r=2)
    ctx = cache.start("new", range(13), r=0)
    assert (ctx.tokens.processed, cache.wrong_slots(ctx)) == (12, 0)
    metrics = cache.manager.get_metrics_aggregated()
    assert (metrics.cross_replica_blocks_copied, metrics.device_blocks_served, metrics.cache_tokens) == (3, 0, 12)
    assert metrics.cross_replica_bytes_copied == 3 * cache.manager.params.bytes_per_page
    assert cache.hits(range(12)) == [3, 0, 3]
    assert [cache.manager.num_free_blocks(r) for r in range(3)] == [4, 8, 8]


def test_copies_can_be_switched_off(make) -> None:
    cache = make(8, replicas=2, enable_dp_cross_replica_prefix_copy=False)
    cache.serve("old", range(13), r=1)
    assert cache.start("new", range(13), r=0).tokens.processed == 0


def test_copies_evict_but_never_what_is_held(make) -> None:
    cache = make(5, replicas=2)
    cache.serve("old", range(13), r=1)
    cache.serve("mine", range(100, 109), r=0)
    cache.serve("held", [9], r=0, keep=True)
    ctx = cache.start("new", range(13), r=0)
    assert (ctx.tokens.processed, cache.wrong_slots(ctx)) == (12, 0)
    assert cache.hits(range(100, 108)) == [0, 0]
    assert cache.wrong_slots(cache.start("back", range(13), r=1), 1) == 0


# -- reserve -----------------------------------------------------------------------------------------------------


def test_reserve_holds_pages_for_its_body_only(make) -> None:
    cache = make(8, replicas=2)
    a, b = TextContext("a", range(9), 99), TextContext("b", range(5), 99)
    with cache.manager.reserve([[a], [b]]):
        assert [cache.manager.num_free_blocks(r) for r in (0, 1)] == [5, 6]
        cache.manager.execute([[a], [b]], write_window)
    assert [cache.manager.num_free_blocks(r) for r in (0, 1)] == [8, 8]
    assert not cache.manager.contains("a", 0)


def test_reserve_releases_when_its_body_raises(make) -> None:
    cache = make(8)
    with pytest.raises(KeyError), cache.manager.reserve([[TextContext("a", range(9), 99)]]):
        raise KeyError
    assert cache.manager.num_free_blocks() == 8


def test_reserve_that_does_not_fit_releases_what_it_got(make) -> None:
    cache = make(8)
    small, big = TextContext("small", range(9), 99), TextContext("big", range(24), 99)
    with pytest.raises(InsufficientBlocksError, match="'big'"), cache.manager.reserve([[small, big]]):
        pass
    assert (cache.manager.num_free_blocks(), cache.manager.contains("small", 0)) == (8, False)
    assert cache.manager.get_metrics_aggregated().input_tokens == 9  # what it allocated stays counted


def test_reserve_refuses_claimed_requests_and_leaves_them_alone(make) -> None:
    cache = make(8)
    mine = cache.start("mine", range(5))
    with pytest.raises(AlreadyClaimedError), cache.manager.reserve([[TextContext("other", [1], 9), mine]]):
        pass
    assert (cache.manager.contains("mine", 0), cache.manager.contains("other", 0)) == (True, False)


def test_reserve_does_not_mind_a_body_that_released(make) -> None:
    cache = make(8)
    ctxs = [TextContext(name, range(5), 99) for name in "abc"]
    with cache.manager.reserve([ctxs]):
        cache.manager.release("b", 0)
    assert cache.manager.num_free_blocks() == 8


def test_reserve_does_not_mind_a_body_that_shut_down(make) -> None:
    cache = make(8)
    with cache.manager.reserve([[TextContext("a", range(5), 99)]]):
        cache.manager.shutdown()


# -- admission ---------------------------------------------------------------------------------------------------


def test_admit_routes_claims_and_allocates(make) -> None:
    cache = make(8, replicas=2)
    ctxs = [TextContext(f"r{i}", range(i, i + 4), 99) for i in range(3)]
    assert cache.manager.admit(ctxs) == [0, 1, 0]
    assert [cache.manager.num_free_blocks(r) for r in (0, 1)] == [6, 7]


def test_admit_in_turn(make) -> None:
    cache = make(8, replicas=3, router="round-robin")
    assert cache.manager.admit([TextContext(f"r{i}", [i], 99) for i in range(5)]) == [0, 1, 2, 0, 1]


def test_admit_is_all_or_none(make) -> None:
    cache = make(8)
    cache.serve("old", range(9))
    fits, does_not = TextContext("fits", range(9), 99), TextContext("no", range(40), 99)
    with pytest.raises(InsufficientBlocksError, match="'no'"):
        cache.manager.admit([fits, does_not, TextContext("never tried", [1], 9)])
    assert [cache.manager.contains(name, 0) for name in ("fits", "no", "never tried")] == [False] * 3
    assert (fits.tokens.processed, fits.tokens.end, fits.cached_prefix_length) == (0, 9, None)
    assert cache.manager.num_free_blocks() == 8
    assert cache.manager.admit([fits]) == [0]


def test_try_admit_goes_on_after_a_refusal(make) -> None:
    cache = make(8, replicas=2)
    cache.serve("old", range(9), r=1)
    ctxs = [TextContext("big", range(40), 99), TextContext("a", range(9), 99), TextContext("a", range(9), 99)]
    big, a, twice = cache.manager.try_admit(ctxs, [0, 0, 1])
    assert isinstance(big.error, InsufficientBlocksError) and isinstance(twice.error, AlreadyClaimedError)
    assert (a.error, a.replica, a.device_tokens, a.peer_tokens) == (None, 0, 0, 8)
    assert cache.manager.contains("a", 0) and not cache.manager.contains("big", 0)
    with pytest.raises(BatchError, match="1 replica indices for 2 requests"):
        cache.manager.try_admit(ctxs[:2], [0])


# -- ticks ---------------------------------------------------------------------------------------------------------


def test_a_tick_steps_releases_allocates_and_executes(make) -> None:
    cache = make(4)
    first = cache.start("first", range(9))
    cache.manager.execute([[first]], write_window)
    first.update(9)
    waiting = TextContext("waiting", [*range(8), 50], 99)
    cache.manager.claim("waiting", 0)
    (result,) = cache.manager.tick(
        [Tick(step=[first], release=["first"], alloc=[waiting], execute=[waiting])], write_window
    )
    assert (result.value, result.refused, result.free_pages, result.used_pages) == (1, {}, 1, 3)
    assert (waiting.tokens.processed, cache.wrong_slots(waiting)) == (8, 0)
    cache.manager.claim("first", 0)  # its place is free again


def test_a_tick_leaves_out_what_was_refused(make) -> None:
    cache = make(4)
    fits, does_not = TextContext("fits", range(4), 99), TextContext("no", range(16), 99)
    for ctx in (fits, does_not):
        cache.manager.claim(ctx.request_id, 0)
    tick = Tick(alloc=[fits, does_not], execute=[does_not, fits])
    (result,) = cache.manager.tick([tick], lambda inputs, batch: [c.request_id for c in batch])
    assert (result.value, list(result.refused)) == (["fits"], ["no"])
    assert isinstance(result.refused["no"], InsufficientBlocksError)
    assert cache.manager.get_req_blocks("no", 0) == []
    (result,) = cache.manager.tick([Tick(alloc=[does_not], execute=[does_not])], write_window)
    assert result.value is None


def test_an_empty_tick_reports_pages(make) -> None:
    cache = make(4, replicas=2)
    cache.start("a", range(4), r=1)
    assert Tick().empty and not Tick(release=["a"]).empty
    assert [r.free_pages for r in cache.manager.tick([Tick(), Tick()])] == [4, 3]


@pytest.mark.parametrize("part", ["release", "step", "alloc"])
def test_a_tick_with_an_unknown_request_changes_nothing(make, part: str) -> None:
    cache = make(4)
    cache.start("a", range(5))
    unknown = TextContext("unknown", range(5), 99)
    parts = {"release": ["a"]}
    parts[part] = [*parts.get(part, []), "unknown" if part == "release" else unknown]
    with pytest.raises(NotClaimedError, match="'unknown'"):
        cache.manager.tick([Tick(**parts)])
    assert (cache.manager.contains("a", 0), cache.manager.num_free_blocks()) == (True, 2)
    cache.manager.release("a", 0)
    cache.manager.claim("a", 0)


def test_a_request_released_by_a_tick_whose_forward_fails_can_come_back(make) -> None:
    cache = make(4)
    cache.start("a", range(5))
    ctx = cache.start("b", range(5))

    def fail(inputs, batch) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.manager.tick([Tick(release=["a"], execute=[ctx])], fail)
    assert not cache.manager.contains("a", 0)
    cache.manager.claim("a", 0)


# -- kinds of caches: every slot of every buffer ---------------------------------------------------------------------


COMMON = {"page_size": 4, "enable_prefix_caching": True, "num_layers": 2}
KINDS = {
    "float16": {"dtype": "float16"},
    "tp2": {"tp": 2},
    "mla tp2": {
        "params": MLAKVCacheParams(
            dtype="float32", num_q_heads=4, head_dim=3, devices=["cpu"] * 4, data_parallel_degree=2, **COMMON
        )
    },
    "two caches": {
        "params": MultiKVCacheParams.from_params(
            {
                "target": rayk.MHAKVCacheParams(
                    dtype="float32", n_kv_heads=2, head_dim=2, devices=["cpu"] * 2, data_parallel_degree=2, **COMMON
                ),
                "draft": MLAKVCacheParams(
                    dtype="float32", num_q_heads=2, head_dim=5, devices=["cpu"] * 2, data_parallel_degree=2, **COMMON
                ),
            }
        )
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_content_is_right_in_every_kind_of_cache(make, kind: str) -> None:
    cache = make(8, replicas=2, **KINDS[kind])
    cache.serve("a", range(9))
    for r, known in ((0, 8), (1, 12)):  # local pages, then copies of them and of one more
        ctx = cache.start(f"b{r}", range(13), r)
        assert ctx.tokens.processed == known
        cache.turn(ctx, r=r)
        assert cache.wrong_slots(ctx, r) == 0


def test_quantised_pages_travel_with_their_scales(make) -> None:
    quant = rayk.KVCacheQuantizationConfig(scale_dtype="float32", quantization_granularity=4)
    cache = make(8, replicas=2, dtype="float8_e4m3fn", head_dim=8, kvcache_quant_config=quant)

    def write(inputs, batch) -> None:
        for shard in inputs.shards:
            for row in shard.lookup_table:
                pages = row[row < 8].long()
                shard.kv_blocks.view(torch.uint8)[pages] = 0x3A
                shard.kv_scales[pages] = 0.125

    ctx = cache.start("a", range(9))
    cache.manager.execute([[ctx], []], write)
    ctx.update(9)
    cache.manager.step([[ctx], []])
    assert cache.start("b", range(9), r=1).tokens.processed == 8
    values, scales = cache.manager.read_pages(cache.manager.get_req_blocks("b", 1)[:2], 1)
    assert (values.view(torch.uint8) == 0x3A).all() and (scales == 0.125).all()


# -- the end ---------------------------------------------------------------------------------------------------------


def test_every_call_after_shutdown_says_so(session: InferenceSession, make) -> None:
    m = make(8).manager
    ctx = TextContext("a", [1], 9)
    m.shutdown()
    m.shutdown()
    calls = [
        lambda: m.claim("a", 0),
        lambda: m.contains("a", 0),
        lambda: m.alloc(ctx, 0),
        lambda: m.alloc_dummy("a", 0),
        lambda: m.get_req_blocks("a", 0),
        lambda: m.release("a", 0),
        lambda: m.reserve([[ctx]]).__enter__(),
        lambda: m.admit([ctx]),
        lambda: m.try_admit([ctx]),
        lambda: m.tick([Tick()]),
        lambda: m.runtime_inputs([[]]),
        lambda: m.runtime_inputs_for_leaf([[]]),
        lambda: m.execute([[]], write_window),
        lambda: m.step([[]]),
        lambda: m.num_free_blocks(),
        lambda: m.total_num_blocks(),
        lambda: m.get_num_pages(0),
        lambda: m.get_num_used_pages(0),
        lambda: m.get_num_host_pages(0),
        lambda: m.get_num_used_host_pages(0),
        lambda: m.get_num_disk_pages(0),
        lambda: m.get_num_used_disk_pages(0),
        lambda: m.get_pct_used_blocks_after_allocation(ctx, 0),
        lambda: m.get_prefix_cache_hit_counts(ctx),
        lambda: m.get_metrics_aggregated(),
        lambda: m.reset_metrics(),
        lambda: m.reset_prefix_cache(),
        lambda: m.get_device_buffer(0),
        lambda: m.read_pages([], 0),
        lambda: m.poll_transfers(),
        lambda: m.drain(),
        lambda: m.check_integrity(),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="shut down"):
            call()


def test_a_session_shuts_its_managers_down() -> None:
    with InferenceSession() as session:
        params = rayk.MHAKVCacheParams(dtype="float32", n_kv_heads=1, head_dim=1, num_layers=1, devices=["cpu"])
        with rayk.PagedKVCacheManager(params, session, 4, max_batch_size=1) as one:
            two = rayk.PagedKVCacheManager(params, session, 4, max_batch_size=1)
        with pytest.raises(ClosedError):
            one.claim("a", 0)
        two.claim("a", 0)
    with pytest.raises(ClosedError):
        two.claim("b", 0)
    with pytest.raises(ClosedError, match="session"):
        rayk.PagedKVCacheManager(params, session, 4, max_batch_size=1)
    session.close()


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [({"runtime": "threads"}, "'threads'"), ({"address": "local"}, "runtime='ray'"), ({"name": "n"}, "runtime='ray'")],
    ids=str,
)
def test_a_session_refuses_what_it_cannot_be(kwargs, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        InferenceSession(**kwargs)
