"""What a forward pass is told: table widths, null fill, lengths, bounds, and what is refused."""

import numpy as np
import pytest
import torch

import rayk
from rayk import BatchCharacteristics, MHAKVCacheParams, MLAKVCacheParams, MultiKVCacheParams, TextContext
from rayk.errors import LeafError
from rayk.kvcache.lookup_table import table_width


@pytest.mark.parametrize(("pages", "width"), [(0, 16), (1, 24), (8, 24), (9, 32), (16, 32), (17, 40)])
def test_table_widths(pages: int, width: int) -> None:
    assert table_width(pages) == width


def test_one_batch(make) -> None:
    cache = make(20)
    a, b = cache.start("a", range(10)), cache.start("b", range(100, 103))
    (inputs,) = cache.manager.runtime_inputs([[a, b]])
    (shard,) = inputs.shards
    table = shard.lookup_table
    assert (table.shape, table.dtype, shard.cache_lengths.dtype) == ((2, 24), torch.int32, torch.int32)
    assert table[0].tolist() == cache.manager.get_req_blocks("a", 0) + [20] * 21
    assert table[1].tolist() == cache.manager.get_req_blocks("b", 0) + [20] * 23
    assert shard.cache_lengths.tolist() == [0, 0]
    assert (shard.max_prompt_length.tolist(), shard.max_cache_length.tolist()) == ([10], [10])
    assert shard.attention_dispatch_metadata.tolist() == [2, 10, 1, 10]
    assert shard.kv_blocks.data_ptr() == cache.manager.get_device_buffer(0).all_buffers[0].data_ptr()
    assert shard.kv_scales is None


def test_lengths_follow_the_window_and_a_hit(make) -> None:
    cache = make(20)
    cache.serve("old", range(9))
    ctx = cache.start("new", range(10))
    (inputs,) = cache.manager.runtime_inputs([[ctx]])
    assert inputs.shards[0].cache_lengths.tolist() == [8]
    assert (inputs.shards[0].max_prompt_length.item(), inputs.shards[0].max_cache_length.item()) == (2, 10)


def test_a_chunk_counts_its_own_end(make) -> None:
    cache = make(20)
    ctx = cache.start("a", range(10))
    ctx.tokens.chunk(4)
    shard = cache.manager.runtime_inputs([[ctx]])[0].shards[0]
    assert (shard.max_prompt_length.item(), shard.max_cache_length.item()) == (4, 4)
    assert (shard.lookup_table[0] != 20).sum() == 3  # pages for all tokens, not for the chunk


def test_an_empty_batch(make) -> None:
    cache = make(4, replicas=2)
    for inputs in cache.manager.runtime_inputs([[], []]):
        shard = inputs.shards[0]
        assert shard.lookup_table.shape == (0, 16) and shard.cache_lengths.shape == (0,)
        assert (shard.max_prompt_length.item(), shard.max_cache_length.item()) == (0, 0)


def test_drafts_are_counted(make) -> None:
    cache = make(20, speculative_method="eagle", num_draft_tokens=3)
    ctx = TextContext("a", range(10), 99)
    ctx.draft_tokens_to_verify, ctx.maybe_accepted_draft_tokens = [1, 2], [3]
    cache.manager.claim("a", 0)
    cache.manager.alloc(ctx, 0)
    assert len(cache.manager.get_req_blocks("a", 0)) == 5  # S = 10 + 1 + 6 + 1 + 0 - 1 = 17
    shard = cache.manager.runtime_inputs([[ctx]])[0].shards[0]
    assert shard.cache_lengths.tolist() == [1]
    assert (shard.max_prompt_length.item(), shard.max_cache_length.item()) == (12, 16)


@pytest.mark.parametrize(
    ("method", "drafts", "pages"),
    [(None, 0, 10), ("eagle", 1, 13), ("eagle", 2, 14), ("dflash", 2, 15), ("mtp", 3, 16)],
)
def test_slots_for_speculation(make, method: str | None, drafts: int, pages: int) -> None:
    """One token a page: S = L + 2 D + B for a request without placeholders or accepted drafts."""
    cache = make(20, page_size=1, speculative_method=method, num_draft_tokens=drafts)
    cache.start("a", range(10))
    assert len(cache.manager.get_req_blocks("a", 0)) == pages


def test_pages_kept_from_more_accepted_drafts_are_not_shown(make) -> None:
    cache = make(20, speculative_method="eagle", num_draft_tokens=2)
    ctx = TextContext("a", range(10), 99)
    ctx.maybe_accepted_draft_tokens = [1] * 4
    cache.manager.claim("a", 0)
    cache.manager.alloc(ctx, 0)
    ctx.maybe_accepted_draft_tokens = []
    pages = cache.manager.get_req_blocks("a", 0)
    row = cache.manager.runtime_inputs([[ctx]])[0].shards[0].lookup_table[0].tolist()
    assert len(pages) == 5 and row[:5] == [*pages[:4], 20]


def test_a_dummy_is_a_row_of_null_pages(make) -> None:
    cache = make(20)
    cache.manager.alloc_dummy("pad", 0)
    ctx = cache.start("a", range(10))
    shard = cache.manager.runtime_inputs([[TextContext("pad", [0], 9), ctx]])[0].shards[0]
    assert (shard.lookup_table[0] == 20).all()
    assert shard.lookup_table[1, :3].tolist() == cache.manager.get_req_blocks("a", 0)
    assert cache.manager.num_free_blocks() == 17


def test_a_table_wider_than_what_requests_needed_so_far(make) -> None:
    cache = make(200, page_size=1)
    ctx = cache.start("a", range(10))
    shard = cache.manager.runtime_inputs([[ctx]], max_cache_length=150)[0].shards[0]
    assert shard.lookup_table.shape == (1, 8 * 19 + 16)
    assert shard.lookup_table[0].tolist() == cache.manager.get_req_blocks("a", 0) + [200] * 158
    assert shard.max_cache_length.item() == 10


def test_long_rows(make) -> None:
    cache = make(300, page_size=1)
    ctx = cache.start("a", range(250))
    row = cache.manager.runtime_inputs([[ctx]])[0].shards[0].lookup_table[0].tolist()
    assert row == cache.manager.get_req_blocks("a", 0) + [300] * (8 * 32 + 16 - 250)


def test_bounds_of_a_captured_graph_replace_the_real_maxima(make) -> None:
    cache = make(20)
    ctx = cache.start("a", range(10))
    bounds = BatchCharacteristics(4, 16, 64)
    shard = cache.manager.runtime_inputs([[ctx]], batch_characteristics=bounds)[0].shards[0]
    assert shard.lookup_table.shape[0] == 1
    assert (shard.max_prompt_length.item(), shard.max_cache_length.item()) == (16, 64)
    assert shard.attention_dispatch_metadata.tolist() == [4, 16, 1, 64]


def test_the_largest_bounds_that_still_hold(make) -> None:
    cache = make(20)
    ctx = cache.start("a", range(10))
    cache.manager.runtime_inputs([[ctx]], max_cache_length=9)  # compared in pages: 3 of 4 tokens each
    cache.manager.runtime_inputs([[ctx]], max_cache_length=80, batch_characteristics=BatchCharacteristics(1, 10, 10))


class TestRefusals:
    """One class that is a ValueError and a RuntimeError; windows, pages and metrics stay as they were."""

    @pytest.mark.parametrize(
        ("kwargs", "says"),
        [
            ({"max_cache_length": 0}, "at least 1, got 0"),
            ({"max_cache_length": -5}, "at least 1, got -5"),
            ({"max_cache_length": 8}, "max_cache_length 8 is less than the 3 page"),
            ({"max_cache_length": 81}, "21 pages in a row, the replica has 20"),
            ({"batch_characteristics": BatchCharacteristics(0, 99, 99)}, "bounds"),
            ({"batch_characteristics": BatchCharacteristics(9, 9, 99)}, "bounds"),
            ({"batch_characteristics": BatchCharacteristics(9, 99, 9)}, "bounds"),
        ],
        ids=str,
    )
    def test_bounds(self, make, kwargs, says: str) -> None:
        cache = make(20)
        ctx = cache.start("a", range(10))
        self.refused(cache, [[ctx]], says, **kwargs)

    def test_too_few_pages(self, make) -> None:
        cache = make(20)
        ctx = cache.start("a", range(4))
        cache.turn(ctx)
        self.refused(cache, [[ctx]], "'a' needs 2 page.* has 1; call alloc")

    def test_claimed_and_not_allocated(self, make) -> None:
        cache = make(20)
        cache.manager.claim("a", 0)
        self.refused(cache, [[TextContext("a", [1], 9)]], "call alloc")

    def test_not_claimed(self, make) -> None:
        cache = make(20, replicas=2)
        ctx = cache.start("a", range(4), r=1)
        self.refused(cache, [[ctx], []], "'a'")

    def test_more_rows_than_max_batch_size(self, make) -> None:
        cache = make(20, max_batch_size=2)
        ctxs = [cache.start(f"r{i}", [i]) for i in range(3)]
        self.refused(cache, [ctxs], "max_batch_size is 2")

    @pytest.mark.parametrize("batches", [[], [[]], [[], [], []]], ids=str)
    def test_not_one_batch_per_replica(self, make, batches) -> None:
        self.refused(make(20, replicas=2), batches, "2 replica")

    def refused(self, cache, batches, says: str, **kwargs) -> None:
        def state():
            m = cache.manager
            windows = [
                (c.tokens.processed, c.tokens.end, m.get_req_blocks(c.request_id, 0)) for b in batches for c in b
            ]
            return windows, m.num_free_blocks(), m.get_metrics_aggregated()

        before = state()
        with pytest.raises(ValueError, match=says) as caught:
            cache.manager.runtime_inputs(batches, **kwargs)
        assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, rayk.RaykError)
        assert state() == before


def test_shards_of_one_replica_share_one_table(make) -> None:
    cache = make(8, replicas=2, tp=2)
    ctx = cache.start("a", range(5), r=1)
    inputs = cache.manager.runtime_inputs([[], [ctx]])
    assert [len(entry.shards) for entry in inputs] == [2, 2]
    one, two = inputs[1].shards
    assert one.lookup_table.tolist() == two.lookup_table.tolist()
    assert one.kv_blocks.data_ptr() != two.kv_blocks.data_ptr()
    flat = cache.manager.runtime_inputs_for_leaf([[], [ctx]]).inputs
    assert [shard.lookup_table.shape[0] for shard in flat] == [0, 0, 1, 1]


def test_several_caches_are_a_mapping_over_one_table(make) -> None:
    common = {"page_size": 4, "devices": ["cpu"], "enable_prefix_caching": True}
    params = MultiKVCacheParams.from_params(
        {
            "target": MHAKVCacheParams(dtype="bfloat16", n_kv_heads=2, head_dim=4, num_layers=3, **common),
            "draft": MLAKVCacheParams(dtype="float32", num_q_heads=2, head_dim=6, num_layers=1, **common),
        }
    )
    cache = make(8, params=params)
    ctx = cache.start("a", range(5))
    (inputs,) = cache.manager.runtime_inputs([[ctx]])
    assert list(inputs) == ["target", "draft"]
    tables = [leaf.shards[0].lookup_table.tolist() for leaf in inputs.values()]
    assert tables[0] == tables[1]
    assert [tuple(leaf.shards[0].kv_blocks.shape) for leaf in inputs.values()] == [
        (9, 2, 3, 4, 2, 4),
        (9, 1, 1, 4, 1, 6),
    ]
    with pytest.raises(LeafError, match="target, draft"):
        cache.manager.runtime_inputs_for_leaf([[ctx]])


def test_scales_come_with_quantised_pages(make) -> None:
    quant = rayk.KVCacheQuantizationConfig(scale_dtype="float32", quantization_granularity=4)
    cache = make(4, dtype="float8_e4m3fn", head_dim=8, kvcache_quant_config=quant)
    shard = cache.manager.runtime_inputs([[cache.start("a", [1])]])[0].shards[0]
    assert shard.kv_blocks.dtype == torch.float8_e4m3fn
    assert (shard.kv_scales.dtype, tuple(shard.kv_scales.shape)) == (torch.float32, (5, 2, 1, 4, 1, 2))


def test_execute_runs_on_every_replica_and_sees_read_only_copies(make) -> None:
    cache = make(8, replicas=2)
    ctx = cache.start("a", range(5), r=1)
    seen = []

    def look(inputs, batch) -> int:
        seen.append((len(inputs.shards), [c.request_id for c in batch]))
        for copy in batch:
            assert copy is not ctx
            with pytest.raises(ValueError, match="read-only"):
                copy.tokens.all[0] = 9
            copy.tokens.processed = 3  # its own window, not the caller's
        return len(batch)

    assert cache.manager.execute([[], [ctx]], look) == [0, 1]
    assert seen == [(1, []), (1, ["a"])]
    assert ctx.tokens.processed == 0


def test_two_placeholders_do_not_hide_the_page_that_is_written_next(make) -> None:
    """The active window always lies in pages of the request, never in the null page."""
    cache = make(8)
    ctx = cache.start("a", range(7))
    for _ in range(2):
        ctx.update_with_future_token()
        cache.manager.alloc(ctx, 0)
    assert (len(ctx.tokens), ctx.tokens.processed, ctx.pending_future_count) == (9, 8, 2)
    row = cache.manager.runtime_inputs([[ctx]])[0].shards[0].lookup_table[0]
    assert row[ctx.tokens.processed // 4] != 8
    assert np.count_nonzero(row != 8) == 3
