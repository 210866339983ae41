"""Prefixes that other engines hold: copied where that pays, whatever happens to either side."""

from __future__ import annotations

from typing import Any

import pytest

from rayk.cluster import Cluster
from rayk.dispatch.pending_copies import WAIT
from rayk.errors import LineError
from rayk.kvcache.request import Reused
from rayk.params import GROUP, SHARED_MEMORY
from rayk.scheduler.router.prefix_index import PrefixIndex
from rayk.scheduler.transfers.copy_cost import Span
from rayk.scheduler.transfers.indexed_copies import CopyPlanner
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.transport.choice import Endpoint
from rayk.transport.direct import DirectLine

from .fake import PageModel, Tokenizer, expected
from .test_engine import prompts

SETTINGS: dict[str, Any] = {"replicas": 2, "page_size": 4, "pages": 64, "max_batch_size": 8, "router": "round-robin"}


def model(device: str) -> PageModel:
    return PageModel(tokenizer=Tokenizer())


def twice(cluster: Cluster, asked: list[list[int]]) -> tuple[Reused, int]:
    """Serve each prompt on one replica and then on the other; what was reused then, and what could be."""
    reused = Reused(0, 0)
    for prompt in asked:
        for _ in range(2):
            [output] = cluster.generate([prompt], max_new_tokens=3)
            assert output.tokens == expected(prompt, 3)
        reused = reused.plus(output.cached)
    cluster.check_integrity()
    return reused, sum((len(prompt) - 1) // 4 * 4 for prompt in asked)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of these tests is quick; as if nobody knew that, all is copied."""
    monkeypatch.setattr(CopyPlanner, "prefills", lambda self, replica, rate: False)


def test_what_the_other_one_holds_is_copied(always: None) -> None:
    with Cluster(model, **SETTINGS) as cluster:
        reused, whole = twice(cluster, prompts(8, 30))
        assert reused == Reused(0, whole)
        assert sum(cluster.stats(r).cache.cross_replica_blocks_copied for r in (0, 1)) == whole // 4


def test_copies_can_be_turned_off() -> None:
    with Cluster(model, peer_copies=False, **SETTINGS) as cluster:
        reused, _ = twice(cluster, prompts(8, 30))
        assert reused == Reused(0, 0)
        assert cluster.facts[0].endpoint is None


def test_a_host_tier_in_common_makes_copies_needless(always: None) -> None:
    with Cluster(model, host_memory="64KiB", **SETTINGS) as cluster:
        reused, whole = twice(cluster, prompts(8, 30))
        assert reused == Reused(0, 0, whole)


def test_a_line_that_breaks_costs_a_recompute(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DirectLine, export: Any, first: int, pages: Any) -> None:
        raise LineError(SHARED_MEMORY, export.source.replica, "a fault")

    with Cluster(model, **SETTINGS) as cluster, monkeypatch.context() as patch:
        patch.setattr(DirectLine, "fetch", broken)
        reused, _ = twice(cluster, prompts(8, 30))
        assert reused == Reused(0, 0)


def test_a_source_that_ships_nothing_costs_a_recompute(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DirectLine, to: Any, export_id: int, pages: Any) -> bytes:
        raise LineError(SHARED_MEMORY, to.replica, "a fault")

    with Cluster(model, **SETTINGS) as cluster, monkeypatch.context() as patch:
        patch.setattr(DirectLine, "offer", broken)
        assert twice(cluster, prompts(8, 30))[0] == Reused(0, 0)


def test_a_source_that_does_not_answer_is_not_waited_for(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayk.dispatch.pending_copies.WAIT", 0.05)
    monkeypatch.setattr("rayk.engine.engine_thread.HEARTBEAT", 0.02)
    monkeypatch.setattr("rayk.engine.engine.Engine.query", lambda self, query: None)
    assert WAIT == 5.0
    with Cluster(model, **SETTINGS) as cluster:
        cluster.generate([list(range(30))], max_new_tokens=2)
        [output] = cluster.generate([list(range(30))], max_new_tokens=2)
        assert output.tokens == expected(list(range(30)), 2) and output.cached_tokens == 0


# -- what pays ---------------------------------------------------------------------------------------------

PAGE, BYTES = 128, 2 << 20


def fetching(shares_tiers: bool = False, lines: list[str] | None = None) -> CopyPlanner:
    index = PrefixIndex(3)
    found = CopyPlanner(index, PageTransfers(LinkTable(lambda: 0.0), PAGE), shares_tiers)
    for replica in range(3):
        host = "a" if replica < 2 else "b"
        found.joined(replica, 7, Endpoint(host, "here", lines or [SHARED_MEMORY, GROUP], BYTES))
    index.stored(0, range(100, 140))
    index.stored(2, range(100, 150))
    return found


def test_all_is_copied_while_no_rate_is_known() -> None:
    assert fetching().plan(1, range(100, 160)) == [Span(0, 0, 40), Span(2, 40, 50)], "all that there is"
    assert fetching().plan(2, range(100, 160)) == [], "nobody has more"
    assert fetching().plan(1, range(10)) == [] and fetching().plan(1, []) == []
    assert fetching().price == 1.0


def test_a_copy_is_weighed_against_computing() -> None:
    slow, quick = fetching(), fetching()
    assert slow.prefills(1, 10_000.0) and not slow.prefills(1, 10_100.0)
    assert slow.plan(1, range(100, 160)) == [Span(0, 0, 40), Span(2, 40, 50)]
    assert quick.prefills(1, 10_000_000.0)
    assert quick.plan(1, range(100, 160)) == [], "5,120 tokens take half a millisecond"
    assert 0 < slow.price < 0.5 < quick.price == 1.0
    between = fetching()  # the 10 more that replica 2 has come over the network, and take longer than computing
    between.prefills(1, 100_000.0)
    assert between.plan(1, range(100, 160)) == [Span(0, 0, 40)]
    for _ in range(20):
        slow.links.carried(0, 1, SHARED_MEMORY, 40, 1.0)
    assert slow.plan(1, range(100, 160)) == [Span(2, 0, 50)], "over the link that is measured quicker"


def test_replicas_that_share_a_tier_do_not_copy() -> None:
    shared = fetching(shares_tiers=True)
    assert shared.plan(1, range(100, 160)) == [Span(2, 0, 50)]
    shared.left(2)
    assert shared.plan(1, range(100, 160)) == []


def test_who_left_is_not_asked() -> None:
    found = fetching()
    found.left(2)
    assert found.plan(1, range(100, 160)) == [Span(0, 0, 40)]
    found.links.use(0, 1)
    found.left(1)
    assert found.plan(1, range(100, 160)) == []
    assert found.links.peers_to_disconnect() == {0: [1]}
