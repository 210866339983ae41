"""Engines with tiers: what is loaded is held out of batches, what fails is computed, and a restart finds its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.errors import ConfigError
from rayk.kvcache.request import Reused
from rayk.request_errors import RequestCancelledError

from .fake import Bench, PageModel, Shelf, Tokenizer, expected
from .test_engine import prompts

PROMPT = list(range(21))  # five full pages and a token
OTHER = [50, 51, 52]


def shelved(pages: int = 24, **settings: Any) -> tuple[Bench, Shelf]:
    """A bench whose device has forgotten PROMPT, but not its tier."""
    shelf = Shelf()
    bench = Bench(pages, 4, shelf=shelf, **settings)
    bench.submit(PROMPT, 2)
    bench.run()
    bench.core.tree.reset()
    shelf.open = False
    return bench, shelf


def test_a_prompt_that_is_being_loaded_is_left_out_and_others_go_on() -> None:
    bench, shelf = shelved(chunk_size=64)
    late, other = bench.submit(PROMPT, 4), bench.submit(OTHER, 4)
    bench.model.forwards.clear()
    for _ in range(6):
        bench.step()
    assert bench.tokens[other] == expected(OTHER, 4) and other in bench.ended
    assert not bench.tokens[late] and bench.engine.stats().loading == 1 and bench.engine.held_up
    assert bench.model.forwards == [[3], [1], [1], [1]]
    shelf.open = True
    bench.run()
    assert not bench.engine.held_up
    assert bench.tokens[late] == expected(PROMPT, 4)
    assert bench.model.forwards[4:] == [[1], [1], [1], [1]], "five pages were loaded, one token was computed"
    assert bench.ended[late].cached == Reused(0, 0, 8, 12)
    stats = bench.engine.stats()
    assert stats.reused == Reused(0, 0, 8, 12) and stats.cached_tokens == 20 and stats.loading == 0


@pytest.mark.parametrize(("lost", "cached"), [(1, Reused(0, 0, 8, 8)), (4, Reused(0, 0, 4, 0)), (5, Reused(0, 0))])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_a_failed_load_is_computed_and_counted(lost: int, cached: Reused, at_once: bool, chunk_size: int) -> None:
    bench, shelf = shelved(chunk_size=chunk_size)
    shelf.lost = lost
    shelf.open = at_once
    number = bench.submit(PROMPT, 4)
    bench.step()
    shelf.open, shelf.pages = True, {}
    bench.run()
    assert bench.tokens[number] == expected(PROMPT, 4)
    if chunk_size == 64:
        assert bench.ended[number].cached == cached == bench.engine.stats().reused
        assert bench.engine.stats().cache.failed_loads == lost


def test_a_tier_that_always_fails_only_costs_time() -> None:
    bench, shelf = shelved(chunk_size=3)
    shelf.open, shelf.lost = True, 99
    number = bench.submit(PROMPT, 4)
    bench.run(limit=40)
    assert bench.tokens[number] == expected(PROMPT, 4) and bench.ended[number].cached.total == 0


def test_equal_prompts_are_loaded_once() -> None:
    bench, shelf = shelved()
    numbers = [bench.submit(PROMPT, 4) for _ in range(3)]
    bench.step()
    assert len(shelf.under_way) == 1
    shelf.open = True
    bench.run()
    assert all(bench.tokens[n] == expected(PROMPT, 4) for n in numbers)
    assert [bench.ended[n].cached for n in numbers] == [Reused(0, 0, 8, 12), Reused(20, 0), Reused(20, 0)]


def test_cancelled_or_out_of_time_while_it_is_loaded() -> None:
    bench, shelf = shelved()
    first, second = bench.submit(PROMPT, 4), bench.submit([*PROMPT[:-1], 30], 4, timeout=5)
    bench.step()
    bench.engine.cancel(first)
    bench.step()
    assert isinstance(bench.ended[first].error, RequestCancelledError)
    assert len(shelf.under_way) == 1, "the second one's"
    bench.clock.now += 10
    bench.step()
    assert bench.ended[second].reason == "timeout" and not shelf.under_way
    assert bench.core.usage.used == 0
    shelf.open = True
    third = bench.submit(PROMPT, 4)
    bench.run()
    assert bench.tokens[third] == expected(PROMPT, 4)


def test_preempted_while_it_is_loaded() -> None:
    bench, shelf = shelved(9, watermark=0.0)
    old = bench.submit(OTHER, 30)
    bench.step()
    late = bench.submit(PROMPT, 4)
    for _ in range(12):
        bench.step()
    assert bench.engine.stats().preemptions == 1 and not shelf.under_way
    shelf.open = True
    bench.run()
    assert bench.tokens[old] == expected(OTHER, 30) and bench.tokens[late] == expected(PROMPT, 4)
    assert bench.ended[late].preemptions == 1


# -- real tiers ----------------------------------------------------------------------------------------


def model(device: str) -> PageModel:
    return PageModel(tokenizer=Tokenizer())


def serve(cluster: Cluster, asked: list[list[int]], count: int = 6) -> list[Any]:
    outputs = cluster.generate(asked, max_new_tokens=count)
    assert [output.tokens for output in outputs] == [expected(p, count) for p in asked]
    cluster.check_integrity()
    return outputs


def total(cluster: Cluster, name: str) -> int:
    return sum(getattr(cluster.stats(r).cache, name) for r in cluster.live)


def test_scarce_pages_and_a_host_tier_that_replicas_share() -> None:
    asked = prompts(30, 40, seed=3)
    settings = {"replicas": 2, "page_size": 4, "pages": 16, "max_batch_size": 4}
    with Cluster(model, router="round-robin", host_memory="1MiB", **settings) as cluster:
        cold = serve(cluster, asked)
        warm = serve(cluster, [asked[-1], *asked[:-1]])  # each on the other replica
        assert sum(output.cached_tokens for output in cold) <= 8
        whole = sum((len(prompt) - 1) // 4 * 4 for prompt in asked)
        assert sum(output.cached_tokens for output in warm) == whole
        reused = Reused(0, 0)
        for output in warm:
            reused = reused.plus(output.cached)
        assert reused.host_tokens > 0.7 * whole and reused.disk_tokens == 0
        stats = cluster.stats(0)
        assert 0 < stats.tiers.host_used <= stats.tiers.host_total == (1 << 20) // 64
        assert total(cluster, "failed_loads") == 0 and total(cluster, "h2d_blocks_copied") > 0


def test_a_restart_serves_old_prefixes(tmp_path: Path) -> None:
    asked = prompts(20, 40, seed=4)
    settings = {"page_size": 4, "pages": 32, "disk_dir": tmp_path, "disk_memory": "1MiB"}
    whole = sum((len(prompt) - 1) // 4 * 4 for prompt in asked)
    with Cluster(model, model_id="one", **settings) as cluster:
        serve(cluster, asked)
        assert cluster.stats().tiers.disk_used > 0
    with Cluster(model, model_id="one", replicas=2, router="cost", **settings) as cluster:
        outputs = serve(cluster, asked)
        assert sum(output.cached.disk_tokens for output in outputs) > 0.7 * whole
        assert sum(output.cached_tokens for output in outputs) == whole
    for file in tmp_path.rglob("*.kv"):
        file.write_bytes(b"x" * file.stat().st_size)
    with Cluster(model, model_id="one", **settings) as cluster:
        assert sum(output.cached_tokens for output in serve(cluster, asked)) < whole
    with Cluster(model, model_id="another", **settings) as cluster:
        assert sum(output.cached.disk_tokens for output in serve(cluster, asked)) == 0


def test_wrong_tiers(tmp_path: Path) -> None:
    for wrong, message in (
        ({"host_memory": "much"}, "is not a size"),
        ({"host_memory": 10}, "one page takes"),
        ({"disk_dir": tmp_path, "model_id": "m"}, "go together"),
        ({"disk_dir": tmp_path, "disk_memory": "1MiB"}, "pass model_id="),
        ({"disk_dir": tmp_path, "disk_memory": 10, "model_id": "m"}, "one page takes"),
        ({"host_memory": "1MiB", "prefix_caching": False}, "prefix_caching=True"),
    ):
        with pytest.raises(ConfigError, match=message):
            Cluster(model, page_size=4, pages=8, **wrong)
