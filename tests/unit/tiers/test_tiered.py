"""The connectors: what was offloaded comes back, and whatever goes wrong is a miss."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayk.errors import IntegrityError
from rayk.kvcache.connector import Found, Landed, NullConnector, Tier, TierCounters
from rayk.kvcache.page_copies import make_copier, stretches
from rayk.tiers import disk as disk_module
from rayk.tiers import tiered as tiered_module
from rayk.tiers.disk import DiskTier
from rayk.tiers.files import HEADER_BYTES
from rayk.tiers.pool import HostPool
from rayk.tiers.segment import SegmentBusyError
from rayk.tiers.tiered import TieredConnector
from rayk.tiers.workers import READ, WRITE, Workers

WIDTHS = (96, 32)  # two buffers, as of two TP shards
BYTES = sum(WIDTHS)
PAGES = 32


def key(n: int) -> bytes:
    """The hash of page n."""
    return hashlib.sha256(b"%d" % n).digest()


def keys(*numbers: int) -> list[bytes]:
    return [key(n) for n in numbers]


class Replica:
    """Device pages and a connector below them."""

    def __init__(self, folder: Path | None, host: int, disk: int, pool: str | None) -> None:
        self.buffers = [torch.zeros((PAGES, width), dtype=torch.uint8) for width in WIDTHS]
        counters = TierCounters()
        tier = DiskTier(folder, 1, BYTES, disk * (BYTES + HEADER_BYTES), disk, 32, counters) if folder else None
        workers = Workers(2) if folder else None
        self.tiers = TieredConnector(make_copier(self.buffers), HostPool(pool, host, BYTES), tier, workers, counters)

    def write(self, *numbers: int) -> np.ndarray:
        """Pages of their own with the contents of pages n, n, ..: in device page n."""
        for n in numbers:
            for i, buffer in enumerate(self.buffers):
                buffer[n] = 10 * n + i + 1
        return np.array(numbers, np.int32)

    def offload(self, *numbers: int) -> None:
        self.tiers.offload(keys(*numbers), self.write(*numbers))

    def load(self, *numbers: int) -> int:
        """Load pages into device pages that hold nothing; how many landed, and they are right."""
        pages = np.arange(PAGES - len(numbers), PAGES, dtype=np.int32)
        for buffer in self.buffers:
            buffer[pages] = 0
        landed = self.tiers.load(keys(*numbers), pages).wait()
        for at, n in enumerate(numbers):
            for i, buffer in enumerate(self.buffers):
                want = 10 * n + i + 1 if at < landed else 0
                assert (buffer[pages[at]] == want).all()
        return landed

    def found(self, *numbers: int) -> list[int]:
        return self.tiers.lookup(iter(keys(*numbers))).tiers


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(host: int = 8, disk: int = 0, pool: str | None = None) -> Replica:
        made.append(Replica(tmp_path if disk else None, host, disk, pool))
        return made[-1]

    yield make
    for one in made:
        one.tiers.shutdown()


def test_the_null_connector_finds_and_keeps_nothing() -> None:
    null = NullConnector()
    null.offload(keys(1), np.array([1], np.int32))
    null.touch(keys(1)), null.poll(), null.drain(), null.reset(), null.check_integrity()
    assert null.lookup(keys(1)) == Found([], [])
    assert null.load(keys(1), np.array([1], np.int32)).wait() == 0
    assert null.count().host_total == 0
    null.shutdown()


def test_stretches_join_what_lies_side_by_side() -> None:
    pages = np.array([4, 5, 6, 9, 10, 3], np.int32)
    found = stretches(pages, [0, 1, 2, 3, 5, 6])
    assert list(zip(*(part.tolist() for part in found), strict=True)) == [(4, 0, 3), (9, 3, 1), (10, 5, 1), (3, 6, 1)]
    assert stretches(pages, [0, 1, 2, 3, 5, 6], coalesce=False).counts.tolist() == [1] * 6
    assert stretches(pages[:1], [7]).rows.tolist() == [7]


def test_local_gives_back_what_was_offloaded(replica: Callable[..., Replica]) -> None:
    r = replica()
    r.offload(1, 2, 3)
    r.offload(2, 3, 4)  # only 4 is new
    assert r.tiers.counters.d2h == 4
    assert r.found(1, 2, 3, 4, 5) == [Tier.HOST] * 4
    assert r.load(1, 2, 3, 4) == 4
    assert r.tiers.counters.h2d == 4
    assert r.tiers.count()[:4] == (8, 4, 0, 0)
    r.tiers.check_integrity()


def test_lookup_reads_no_hash_beyond_the_first_miss(replica: Callable[..., Replica]) -> None:
    r = replica()
    r.offload(1)
    asked = []
    assert r.tiers.lookup(asked.append(n) or key(n) for n in (1, 2, 3)).hashes == keys(1)
    assert asked == [1, 2]


def test_a_page_that_went_meanwhile_ends_the_load(replica: Callable[..., Replica]) -> None:
    r = replica(host=2)
    r.offload(1, 2)
    r.tiers.touch(keys(1))
    r.offload(3)
    assert r.load(1, 2) == 1
    assert r.tiers.counters.loads_failed == 1
    r.tiers.check_integrity()


def test_replicas_share_one_pool(replica: Callable[..., Replica]) -> None:
    name = f"test-{os.getpid()}-{os.urandom(4).hex()}"
    one, two = replica(pool=name), replica(pool=name)
    one.offload(1, 2)
    assert two.load(1, 2) == 2
    two.offload(1, 2, 3)
    assert two.tiers.counters.d2h == 1  # no second copy of the same page
    assert one.tiers.count().host_used == two.tiers.count().host_used == 3


def test_tiered_reads_from_disk_what_the_host_lost(replica: Callable[..., Replica]) -> None:
    r = replica(host=2, disk=8)
    for n in range(1, 6):
        r.offload(n)
        r.tiers.drain()
    assert r.tiers.counters.disk_written == 5
    assert r.found(1, 2, 3, 4, 5, 6) == [Tier.DISK] * 3 + [Tier.HOST] * 2
    assert r.load(1, 2, 3, 4, 5) == 5  # more than the host tier can hold at once
    assert r.tiers.counters.disk_read >= 3
    r.tiers.drain()
    r.tiers.check_integrity()
    assert r.tiers.count()[:4] == (2, 2, 8, 5)


def test_more_than_the_host_holds_goes_straight_to_disk(replica: Callable[..., Replica]) -> None:
    r = replica(host=2, disk=16)
    r.offload(*range(1, 11))
    r.tiers.drain()
    assert r.tiers.counters.disk_written == 10
    assert r.load(*range(1, 11)) == 10
    r.tiers.check_integrity()


def test_a_bad_file_ends_the_load_and_is_written_again(replica: Callable[..., Replica], tmp_path: Path) -> None:
    r = replica(host=1, disk=8)
    for n in (1, 2, 3):
        r.offload(n)
        r.tiers.drain()
    [path] = [p for p in tmp_path.rglob("*.kv") if key(2) in p.read_bytes()]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert r.load(1, 2, 3) == 1
    assert (r.tiers.counters.damaged, r.tiers.counters.loads_failed) == (1, 2)
    r.offload(2)
    r.tiers.drain()
    assert r.load(1, 2, 3) == 3


def test_a_restart_serves_old_pages(replica: Callable[..., Replica]) -> None:
    r = replica(host=4, disk=8)
    r.offload(1, 2, 3)
    r.tiers.shutdown()
    again = replica(host=4, disk=8)
    assert again.found(1, 2, 3) == [Tier.DISK] * 3
    assert again.load(1, 2, 3) == 3
    assert again.found(1, 2, 3) == [Tier.HOST] * 3


def test_a_load_on_its_way_can_be_cancelled(replica: Callable[..., Replica]) -> None:
    r = replica(host=4, disk=8)
    r.offload(1, 2)
    r.tiers.drain()
    r.tiers._host.reset()
    gate = threading.Event()
    for _ in range(2):
        r.tiers._workers.submit(READ, gate.wait)
    pages = np.array([20, 21], np.int32)
    load = r.tiers.load(keys(1, 2), pages)
    assert not load.poll()
    load.cancel()
    gate.set()
    r.tiers.drain()
    assert load.wait() == 0
    assert not r.buffers[0][20:22].any()
    r.tiers.check_integrity()
    assert r.found(1, 2) == [Tier.HOST] * 2  # what was read is kept


def test_pages_stay_pinned_until_they_are_written(replica: Callable[..., Replica]) -> None:
    r = replica(host=2, disk=8)
    gate = threading.Event()
    for _ in range(2):
        r.tiers._workers.submit(READ, gate.wait)
    r.offload(1, 2)
    assert r.tiers._directory.held() == 2
    r.offload(3)  # no row for it: kept aside
    assert r.found(1, 2, 3) == [Tier.HOST] * 2
    gate.set()
    r.tiers.drain()
    assert r.tiers._directory.held() == 0
    assert r.load(1, 2, 3) == 3


def test_reset_forgets_everything(replica: Callable[..., Replica], tmp_path: Path) -> None:
    r = replica(host=4, disk=8)
    r.offload(1, 2, 3)
    r.tiers.reset()
    assert r.tiers.count()[1] == r.tiers.count()[3] == 0
    assert not list(tmp_path.rglob("*.kv"))
    assert r.load(1) == 0


def test_a_busy_tier_is_a_miss_and_what_was_copied_is_published_later(replica: Callable[..., Replica]) -> None:
    r = replica()
    r.offload(1)
    lock = r.tiers._host._segment._mutex

    def busy() -> None:
        raise SegmentBusyError

    acquire, lock.acquire = lock.acquire, busy
    assert r.load(1) == 0
    r.offload(2)
    assert r.tiers.counters.skipped == 1
    lock.acquire = acquire
    r.offload(3)
    lock.acquire = busy
    r.tiers.poll()
    lock.acquire = acquire
    assert r.load(1) == 1
    r.tiers.check_integrity()


@pytest.mark.parametrize("method", ["publish", "abandon", "unpin"])
def test_what_a_worker_holds_is_given_back_however_busy_a_tier_is(
    replica: Callable[..., Replica], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = replica(host=2, disk=8)
    r.offload(1, 2, 3, 4)  # 3 and 4 straight to disk
    r.tiers.drain()
    disk = r.tiers._disk
    assert disk is not None and disk._directory is not None
    if method == "abandon":  # one file is gone, one is broken
        disk._path(2).unlink()
        disk._path(3).write_bytes(b"no page")
    refused: list[str] = []
    for directory in (r.tiers._directory, disk._directory):
        work = getattr(directory, method)

        def busy(*args: Any, work: Any = work, **more: Any) -> Any:
            if threading.current_thread().name.startswith("rayk-tier") and len(refused) < 3:
                refused.append(method)
                raise SegmentBusyError
            return work(*args, **more)

        monkeypatch.setattr(directory, method, busy)
    r.offload(5, 6)
    r.load(3, 4)
    r.tiers.drain()
    assert refused
    r.tiers.check_integrity()


def test_integrity_sees_a_page_that_nobody_lets_go(replica: Callable[..., Replica]) -> None:
    r = replica()
    r.offload(1)
    r.tiers._directory.pin(keys(1))
    with pytest.raises(IntegrityError, match="1 pages are held"):
        r.tiers.check_integrity()


def test_a_transfer_that_is_over() -> None:
    done = Landed(3)
    done.cancel()
    assert done.poll() and done.wait() == 3


def test_reads_overtake_writes_and_errors_stay_in_their_future() -> None:
    workers, gate, order = Workers(1), threading.Event(), []
    workers.submit(READ, gate.wait)
    writes = [workers.submit(WRITE, lambda n=n: order.append(n)) for n in (1, 2)]
    failed = workers.submit(READ, lambda: order.append(3) or 1 // 0)
    gate.set()
    workers.drain()
    assert order == [3, 1, 2]
    assert isinstance(failed.exception(), ZeroDivisionError)
    assert all(w.done() for w in writes)
    workers.stop()


def test_shards_that_hold_the_same_are_kept_once() -> None:
    buffers = [torch.arange(8, dtype=torch.uint8).reshape(4, 2) + 10 * (i // 2) for i in range(4)]
    copier, pool = make_copier(buffers, copies=[2, 2]), np.zeros((2, 4), np.uint8)
    assert copier.page_bytes == 4
    copier.store(np.array([1], np.int32), pool, [0])
    assert pool.tolist() == [[2, 3, 12, 13], [0, 0, 0, 0]]
    copier.load(pool, [0], np.array([3], np.int32))
    assert [b[3].tolist() for b in buffers] == [[2, 3], [2, 3], [12, 13], [12, 13]]


def test_a_load_that_does_not_come_in_time_is_computed_and_what_comes_is_kept(
    replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    r = replica(host=2, disk=8)
    r.offload(1)
    r.tiers.drain()
    r.offload(2), r.offload(3)
    r.tiers.drain()
    assert r.found(1) == [Tier.DISK]
    gate, real = threading.Event(), disk_module.read_page
    monkeypatch.setattr(disk_module, "read_page", lambda *a: gate.wait(60) and real(*a))
    monkeypatch.setattr(tiered_module, "LOAD_SECONDS", 0.02)
    assert r.load(1) == 0
    assert "too long" in r.tiers.count().trouble and r.found(1) == [], "nobody else waits for it"
    gate.set()
    r.tiers.drain()
    r.tiers.check_integrity()
    assert r.found(1) == [Tier.HOST]


def test_writes_that_hang_do_not_keep_the_host_tier(
    replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    r = replica(host=4, disk=8)
    gate, begun, real = threading.Event(), threading.Semaphore(0), disk_module.write_page

    def hangs(*arguments: object) -> None:
        begun.release()
        gate.wait(60)
        real(*arguments)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(disk_module, "write_page", hangs)
    monkeypatch.setattr(tiered_module, "SLOW_SECONDS", 0.0)
    r.offload(1, 2, 3, 4)
    assert begun.acquire(timeout=60) and begun.acquire(timeout=60)  # two threads hang with a row each
    r.tiers.poll()
    assert r.tiers.count().trouble
    r.offload(5, 6)
    assert r.found(5) == [Tier.HOST] and r.found(6) == [Tier.HOST]
    r.tiers.drain(0)
    gate.set()
    r.tiers.drain()
    r.tiers.check_integrity()
