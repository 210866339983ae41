"""A router of somebody else follows the caches of a manager's replicas by their events alone."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayk import AsyncPagedKVCacheManager, InferenceSession, KVEventsConfig, PagedKVCacheManager, TextContext
from rayk.errors import ConfigError
from rayk.replica import kv_event_publisher

from ...kv_reader import Reader  # noqa: TID252  # tests/ is no package that has an absolute name
from ..actors.fake import params  # noqa: TID252  # as above
from ..conftest import Cache  # noqa: TID252  # as above

zmq = pytest.importorskip("zmq", reason="pyzmq is not installed (extra `events`)")

PAGE = 4


def make(session: InferenceSession, kv_events: Any, pages: int = 24, **changes: Any) -> PagedKVCacheManager:
    return PagedKVCacheManager(params(**changes), session, pages, 0, True, max_batch_size=8, kv_events=kv_events)


@pytest.fixture
def followed(
    session: InferenceSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Cache, list[Reader]]]:
    """Two replicas and a reader of each, which knows what was cached before it came."""
    monkeypatch.setattr(kv_event_publisher, "HEARTBEAT_MS", 20)
    config = KVEventsConfig(*(f"ipc://{tmp_path}/{name}" for name in ("live", "replay", "all")))
    manager = make(session, config)
    readers = [Reader(zmq, f"ipc://{tmp_path}/live{r}", f"ipc://{tmp_path}/replay{r}") for r in ("", "_dp1")]
    for reader in readers:
        reader.until(lambda at=reader: at.next > 0)  # idle publishers send batches, too
    yield Cache(manager), readers
    for reader in readers:
        reader.close()
    manager.check_integrity()
    manager.shutdown()


def agree(cache: Cache, readers: list[Reader], prompts: list[list[int]], **root: Any) -> None:
    """The readers foresee what each prompt finds at each replica."""
    names = {"salt": root.get("cache_salt"), "adapter": root.get("adapter")}
    for r, reader in enumerate(readers):
        found = [cache.hits(prompt, **root)[r] for prompt in prompts]
        reader.until(lambda at=reader, want=found: [at.hits([*p, 0], PAGE, **names) for p in prompts] == want)
        assert reader.ranks == {r}


def test_hits_are_foreseen_through_stores_and_evictions(followed: tuple[Cache, list[Reader]]) -> None:
    cache, readers = followed
    dice = random.Random(0)
    stems = [[dice.randrange(9) for _ in range(dice.randrange(3, 30))] for _ in range(6)]
    prompts = [*stems, *([*dice.choice(stems), *dice.choices(range(9), k=12)] for _ in range(30))]
    for turn, prompt in enumerate(prompts):
        cache.serve(f"r{turn}", prompt, turn % 2)
        if not turn % 4:
            agree(cache, readers, prompts)
    agree(cache, readers, prompts)
    assert cache.manager.get_metrics_aggregated().evicted_blocks > 50
    assert all(0 < len(reader.pages) <= 24 and reader.clears == 1 for reader in readers)
    running = cache.serve("long", [7] * 9, 0, keep=True)
    for _ in range(8):  # pages of the answer are announced as they are full
        cache.manager.alloc(running, 0)
        cache.turn(running, 8)
        agree(cache, readers, [[7] * 9 + [99] + [8] * 8])
    cache.manager.release("long", 0)


def test_salts_and_adapters_tell_equal_tokens_apart(followed: tuple[Cache, list[Reader]]) -> None:
    cache, readers = followed
    prompt = list(range(13))
    for pages, root in enumerate([{}, {"cache_salt": "s"}, {"adapter": "a"}, {"cache_salt": "s", "adapter": "a"}]):
        cache.serve(f"r{pages}", prompt[: 4 * pages + 1], **root)
        agree(cache, readers, [prompt], **root)
    seen = [readers[0].hits([*prompt, 0], PAGE, adapter, salt) for adapter in (None, "a") for salt in (None, "s")]
    assert seen == [0, 1, 2, 3]


def test_a_reset_clears_what_it_drops(followed: tuple[Cache, list[Reader]]) -> None:
    cache, readers = followed
    prompts = [[i] * 9 for i in range(3)]
    for i, prompt in enumerate(prompts):
        cache.serve(f"r{i}", prompt, keep=not i)
    cache.manager.reset_prefix_cache()
    agree(cache, readers, prompts)
    assert len(readers[0].pages) == 2 and readers[0].clears == 1  # a request holds them
    cache.manager.reset_prefix_cache(weights_changed=True)
    agree(cache, readers, prompts)
    assert not readers[0].pages and readers[0].clears == 2
    cache.serve("again", prompts[0])
    agree(cache, readers, prompts)
    assert len(readers[0].pages) == 2
    cache.manager.release("r0", 0)


def test_what_a_reader_missed_is_replayed(followed: tuple[Cache, list[Reader]]) -> None:
    cache, readers = followed
    prompts = [[i, *range(20)] for i in range(8)]
    for i, prompt in enumerate(prompts):
        cache.serve(f"r{i}", prompt)
        if i in (1, 2, 5):
            assert readers[0].socket.poll(5000)
            readers[0].socket.recv_multipart()  # and it is lost
    before = readers[0].gaps
    cache.serve("one more", [9] * 9)
    agree(cache, readers, prompts)
    assert readers[0].gaps > before


def test_one_that_comes_late_begins_with_a_snapshot(followed: tuple[Cache, list[Reader]], tmp_path: Path) -> None:
    cache, readers = followed
    prompts = [[i, *range(20)] for i in range(8)]
    for i, prompt in enumerate(prompts):
        cache.serve(f"r{i}", prompt)
    agree(cache, readers, prompts)
    late = Reader(zmq, f"ipc://{tmp_path}/live", f"ipc://{tmp_path}/replay")
    late.snapshot(f"ipc://{tmp_path}/all")
    assert late.pages == readers[0].pages
    cache.serve("one more", [9] * 9)
    agree(cache, [late], prompts)
    late.close()


def test_a_replica_that_joins_publishes_until_it_leaves(followed: tuple[Cache, list[Reader]], tmp_path: Path) -> None:
    cache, _ = followed
    assert cache.manager.add_replicas() == [2]
    reader = Reader(zmq, f"ipc://{tmp_path}/live_dp2")
    reader.until(lambda: reader.next > 0)
    assert reader.ranks == {2}
    cache.manager.remove_replica(2)
    while reader.socket.poll(500):
        reader.take(*reader.socket.recv_multipart())
    reader.close()


def test_for_an_event_loop_it_is_the_same(session: InferenceSession, tmp_path: Path) -> None:
    async def serve() -> None:
        events = KVEventsConfig(f"ipc://{tmp_path}/live", f"ipc://{tmp_path}/replay")
        manager = AsyncPagedKVCacheManager(params(), session, 24, max_batch_size=8, kv_events=events)
        reader = Reader(zmq, f"ipc://{tmp_path}/live")
        ctx = TextContext("r", [1] * 9, 100)
        assert (await manager.try_admit([ctx], [0]))[0].error is None
        ctx.update(2)
        await manager.step([[ctx], []])
        while reader.hits([1] * 9, PAGE) != 2:
            reader.ask(f"ipc://{tmp_path}/replay")
        await manager.release("r", 0)
        reader.close()
        await manager.shutdown()

    asyncio.run(serve())


def test_what_cannot_be_published_is_refused(session: InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no address to bind"):
        make(session, "somewhere")
    with pytest.raises(ConfigError, match="without prefix caching"):
        make(session, "tcp://127.0.0.1:5557", enable_prefix_caching=False)
    with pytest.raises(ConfigError, match=r"5558 would be the endpoint of one replica and the replay_endpoint"):
        make(session, KVEventsConfig("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"replica 1 cannot publish cache events at tcp://127\.0\.0\.1:"):
            make(session, f"tcp://127.0.0.1:{taken.getsockname()[1] - 1}")
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"pip install 'rayk\[events\]'"):
        make(session, "tcp://127.0.0.1:5557")
