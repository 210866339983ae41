"""The CUDA copier over a driver made of host memory: which bytes go where, and what waits for what.

The driver keeps what it is given until somebody waits for it, as a busy GPU does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from rayk.kvcache.connector import TierCounters
from rayk.kvcache.page_copies import CudaCopier
from rayk.tiers.pool import HostPool
from rayk.tiers.tiered import TieredConnector

PAGES = 12
Batch = list[tuple[int, int, int]]  # target, source, bytes


class Stream:
    """Queued batches; run() executes them up to a mark."""

    made: list[Stream] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = len(self.made) + 1
        self.made.append(self)
        self.queue: list[Batch] = []
        self.done = 0
        self.waited: list[Event] = []

    def wait_stream(self, other: Stream) -> None:
        for event in other.waited:
            event.synchronize()

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def run(self, mark: int) -> None:
        for batch in self.queue[self.done : mark]:
            for target, source, count in batch:
                ctypes.memmove(target, source, count)
        self.done = max(self.done, mark)


class Event:
    def record(self, stream: Stream) -> None:
        self.stream, self.mark = stream, len(stream.queue)

    def query(self) -> bool:
        return self.stream.done >= self.mark

    def synchronize(self) -> None:
        self.stream.run(self.mark)


class Driver:
    """What was asked of it. `answer` is the code of the next batch, `locked` the page-locked addresses."""

    def __init__(self) -> None:
        self.answer = 0
        self.calls: list[Batch] = []
        self.locked: dict[int, int] = {}
        self.refuse = 0

    def batch(
        self, targets: int, sources: int, sizes: int, count: int, attrs: Any, firsts: Any, kinds: int, s: int
    ) -> int:
        assert (kinds, firsts._obj.value, attrs._obj.source_access_order) == (1, 0, 1)
        columns = [
            np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(a)).tolist() for a in (targets, sources, sizes)
        ]
        if self.answer:
            return self.answer
        self.calls.append(list(zip(*columns, strict=True)))
        Stream.made[s - 1].queue.append(self.calls[-1])
        return 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # CUDA's name
        if not self.refuse:
            self.locked[address] = size
        return self.refuse

    def cudaHostUnregister(self, address: int) -> int:  # CUDA's name
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver, compute = Driver(), None
    Stream.made.clear()
    compute = Stream()

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: [s.run(len(s.queue)) for s in Stream.made])
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr("rayk.kvcache.page_copies._driver_batch", lambda: driver.batch)
    return driver


def compute() -> Stream:
    return Stream.made[0]


def random_pages(*widths: int) -> list[torch.Tensor]:
    return [torch.randint(0, 255, (PAGES, width), dtype=torch.uint8) for width in widths]


def row_of(buffers: list[torch.Tensor], page: int) -> np.ndarray:
    return torch.cat([b[page] for b in buffers]).numpy()


def test_neighbours_are_one_copy(driver: Driver) -> None:
    [buffer] = random_pages(64)
    copier, pool = CudaCopier([[buffer]]), np.zeros((8, 64), np.uint8)
    assert copier.attach(pool) == "" and driver.locked == {pool.ctypes.data: pool.nbytes}
    pages, rows = np.array([3, 4, 5, 1, 2, 9], np.int32), [0, 1, 2, 4, 6, 7]
    ticket = copier.store(pages, pool, rows)
    assert ticket is not None and not ticket.poll() and not pool.any()
    ticket.wait()
    assert ticket.poll() and len(driver.calls) == 1
    assert [size for _, _, size in driver.calls[0]] == [3 * 64, 64, 64, 64]
    for page, row in zip(pages, rows, strict=True):
        assert (pool[row] == row_of([buffer], page)).all()
    copier.close()
    assert driver.locked == {}


@pytest.mark.parametrize("batch", [True, False])
def test_parts_of_a_row_go_to_their_buffers(driver: Driver, batch: bool) -> None:
    """Two buffers that hold the same bytes, of which a row has one, and one of its own."""
    a, b = random_pages(48, 16)
    copier, pool = CudaCopier([[a, a.clone()], [b]]), np.zeros((8, 64), np.uint8)
    if batch:
        copier.attach(pool)
    pages, rows = np.array([7, 8, 2], np.int32), [3, 4, 0]
    ticket = copier.store(pages, pool, rows)
    assert ticket is not None
    ticket.wait()
    for page, row in zip(pages, rows, strict=True):
        assert (pool[row] == row_of([a, b], page)).all()
    copies = [torch.zeros_like(t) for t in (a, a, b)]
    other = CudaCopier([copies[:2], copies[2:]])
    if batch:
        other.attach(pool)
    back = other.load(pool, rows, pages)
    assert back is not None
    back.wait()
    for page in pages:
        assert [(c[page] == o[page]).all() for c, o in zip(copies, (a, a, b), strict=True)] == [True] * 3
    assert bool(driver.calls) == batch


def test_a_refused_batch_is_copied_by_torch(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    [buffer] = random_pages(64)
    copier, pool = CudaCopier([[buffer]]), np.zeros((8, 64), np.uint8)
    copier.attach(pool)
    driver.answer = 801
    copier.store(np.array([1, 5], np.int32), pool, [0, 1])
    assert (pool[0] == row_of([buffer], 1)).all() and (pool[1] == row_of([buffer], 5)).all()
    driver.answer = 0
    copier.store(np.array([2], np.int32), pool, [2])
    assert (pool[2] == row_of([buffer], 2)).all()
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "801" in caplog.text and not driver.calls


def test_a_pool_that_cannot_be_locked_is_used_without_batches(driver: Driver) -> None:
    [buffer] = random_pages(64)
    copier, pool = CudaCopier([[buffer]]), np.zeros((8, 64), np.uint8)
    driver.refuse = 2
    assert "answered 2 for 512 bytes" in copier.attach(pool)
    copier.store(np.array([1], np.int32), pool, [0])
    assert (pool[0] == row_of([buffer], 1)).all() and not driver.calls
    copier.close()


def test_compute_waits_for_the_stores_of_the_pages_that_it_gets(driver: Driver) -> None:
    copier, pool = CudaCopier([random_pages(64)]), np.zeros((12, 64), np.uint8)
    copier.attach(pool)
    tickets = [copier.store(np.array([2 * i, 2 * i + 1], np.int32), pool, [2 * i, 2 * i + 1]) for i in range(4)]
    copier.fence(np.array([9, 10], np.int32))
    assert compute().waited == []
    copier.fence(np.array([4, 0, 9], np.int32))  # of the first and third store: the third is after the first
    [event] = compute().waited
    event.synchronize()
    assert [bool(t and t.poll()) for t in tickets] == [True, True, True, False]
    copier.fence(np.array([0, 4], np.int32))
    assert len(compute().waited) == 1
    copier.fence(np.array([7], np.int32))
    assert len(compute().waited) == 2


@pytest.fixture
def tiers(driver: Driver) -> Iterator[Callable[[], tuple[TieredConnector, torch.Tensor]]]:
    opened = []

    def make() -> tuple[TieredConnector, torch.Tensor]:
        [buffer] = random_pages(64)
        copier, host = CudaCopier([[buffer]]), HostPool(None, 8, 64)
        copier.attach(host.rows)
        opened.append(TieredConnector(copier, host, None, None, TierCounters()))
        return opened[-1], buffer

    yield make
    for each in opened:
        each.check_integrity()
        each.shutdown()


def test_a_load_is_over_when_the_copy_is(tiers: Callable[[], tuple[TieredConnector, torch.Tensor]]) -> None:
    connector, buffer = tiers()
    keys = [bytes([n]) * 32 for n in range(3)]
    connector.offload(keys, np.arange(3, dtype=np.int32))
    assert not connector.lookup(keys).hashes  # not before its bytes are there
    connector.drain()
    assert len(connector.lookup(keys).hashes) == 3
    transfer = connector.load(keys, np.arange(6, 9, dtype=np.int32))
    assert not transfer.poll() and compute().waited == []  # neither the host nor the compute stream waits
    Stream.made[2].run(len(Stream.made[2].queue))
    assert transfer.poll() and transfer.wait() == 3
    assert torch.equal(buffer[6:9], buffer[:3])


@pytest.mark.parametrize("end", ["wait", "cancel"])
def test_who_does_not_wait_for_a_load_comes_after_it_on_the_device(
    tiers: Callable[[], tuple[TieredConnector, torch.Tensor]], end: str
) -> None:
    connector, buffer = tiers()
    keys = [bytes([n]) * 32 for n in range(3)]
    connector.offload(keys, np.arange(3, dtype=np.int32))
    connector.drain()
    transfer = connector.load(keys, np.arange(6, 9, dtype=np.int32))
    getattr(transfer, end)()
    [event] = compute().waited
    assert not event.query()
    event.synchronize()
    assert transfer.poll() and torch.equal(buffer[6:9], buffer[:3])
