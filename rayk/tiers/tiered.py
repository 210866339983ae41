"""The connectors "local" (a host tier) and "tiered" (host and disk): write-through in the background, verified loads.

Offload: device page -> host row -> page file. A page that is in a tier already is not copied again. A host row stays
pinned until its file is written. Load: host rows are copied to the device at once; pages that are only on disk are
read by worker threads into host rows first (so they are in the host tier from then on).

Whatever goes wrong here makes a page a miss: a busy lock, a full pool, a bad file, a dead neighbour.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

import numpy as np

from rayk.errors import IntegrityError
from rayk.kvcache.connector import Found, Landed, Pages, Tier, TierCount, TierCounters, Transfer
from rayk.kvcache.page_copies import PageCopier, Rows, Ticket
from rayk.tiers.directory import FULL, PRESENT
from rayk.tiers.disk import SLOW_SECONDS, DiskTier
from rayk.tiers.pool import HostPool
from rayk.tiers.segment import SegmentBusyError, when_free
from rayk.tiers.workers import READ, WRITE, Workers

log = logging.getLogger("rayk.tiers")
_number = struct.Struct("<Q").unpack_from
LOAD_SECONDS, LOAD_RATE = 5.0, 50e6  # for a load from disk, and bytes a second of it; what is later is computed
DRAIN_SECONDS = 20.0  # for what is on its way to disk; the rest is not written
CLOSE_SECONDS = 10.0
OVERFLOW_BYTES = 64 << 20  # pages on their way to disk that found no host row


class _Fetched(NamedTuple):
    """A page read from disk: in a pinned host row, in memory of its own, or (neither) not to be had."""

    slot: int = -1
    row: Rows | None = None  # [1, bytes per page]
    read: bool = False


class TieredConnector:
    """One replica's way to its node's tiers. Used by the replica's thread; its workers touch only tiers and rows."""

    def __init__(
        self, copier: PageCopier, host: HostPool, disk: DiskTier | None, workers: Workers | None, counters: TierCounters
    ) -> None:
        assert (disk is None) == (workers is None)
        self.counters = counters
        self._copier = copier
        self._host = host
        self._directory = host.directory
        self._disk = disk
        self._workers = workers
        self._storing: deque[tuple[Ticket | Landed, Sequence[bytes], list[int]]] = deque()  # device -> host rows
        self._loading: deque[tuple[Ticket, list[int], list[Rows]]] = deque()  # host rows -> device
        self._cancelled: list[_Load] = []
        self._late: deque[int] = deque()  # rows to unpin once the lock can be had
        self._overflow = 0  # pages in memory of their own on their way to disk
        self._written: deque[tuple[bool, int]] = deque()  # by workers: whether, overflow pages freed; see poll()
        self._loads = 0  # under way

        self._host_cells, self._host_mask = host.directory.cells
        self._disk_cells, self._disk_mask = disk.cells if disk is not None else (memoryview(bytes(1)), 0)

    @property
    def rows(self) -> Rows:
        """The host tier's memory, all pages of the node."""
        return self._host.rows

    # -- looking ---------------------------------------------------------------------------------

    def holds(self, key: bytes) -> bool:
        (number,) = _number(key)
        if self._host_cells[number & self._host_mask] and self._directory.contains(key):
            return True
        return bool(self._disk_cells[number & self._disk_mask]) and self._disk is not None and self._disk.contains(key)

    def lookup(self, hashes: Iterable[bytes]) -> Found:
        on_host, disk = self._directory.contains, self._disk
        keys: list[bytes] = []
        tiers: list[int] = []
        for key in hashes:
            if on_host(key):
                tiers.append(Tier.HOST)
            elif disk is not None and disk.contains(key):
                tiers.append(Tier.DISK)
            else:
                break
            keys.append(key)
        return Found(keys, tiers)

    # -- offloading ------------------------------------------------------------------------------

    def offload(self, hashes: Sequence[bytes], pages: Pages) -> None:
        try:
            slots = self._directory.reserve(hashes)
        except SegmentBusyError:
            self.counters.skipped += len(hashes)
            return
        if FULL in slots:
            with suppress(SegmentBusyError):  # the next one will do it
                self._host.reap()
        if min(slots, default=0) >= 0:  # all are new, as most are
            self._store(hashes, pages, slots)
            return
        new = [i for i, slot in enumerate(slots) if slot >= 0]
        if new:
            self._store([hashes[i] for i in new], pages[new], [slots[i] for i in new])
        self._write_again([key for key, slot in zip(hashes, slots, strict=True) if slot == PRESENT])
        self._overflow_to_disk([i for i, slot in enumerate(slots) if slot == FULL], hashes, pages)

    def _store(self, keys: Sequence[bytes], pages: Pages, rows: list[int]) -> None:
        ticket = self._copier.store(pages, self._host.rows, rows)
        self._storing.append((ticket or Landed(0), keys, rows))
        self._publish_stored()

    def _publish_stored(self) -> None:
        """Publish the rows that hold their pages by now, and have those written that are not on disk."""
        while self._storing and self._storing[0][0].poll():
            _, keys, rows = self._storing[0]
            wanted = [i for i, key in enumerate(keys) if self._goes_to_disk(key)] if self._writes else []
            try:
                self._directory.publish(rows, pin=[rows[i] for i in wanted])
            except SegmentBusyError:
                return  # with the next poll
            self._storing.popleft()
            self.counters.d2h += len(rows)
            for i in wanted:
                self._write(keys[i], rows[i])

    @property
    def _writes(self) -> bool:
        return self._disk is not None and self._disk.writes

    def _goes_to_disk(self, key: bytes) -> bool:
        return self._disk is not None and self._disk.writes and not self._disk.indexed(key)

    def _write_again(self, keys: Sequence[bytes]) -> None:
        """Pages that the host tier has: used now, and written if the disk tier has lost them."""
        if self._disk is not None:
            self._disk.touch(keys)
        keys = [key for key in keys if self._goes_to_disk(key)]
        if keys:
            for key, row in zip(keys, self._directory.pin(keys), strict=True):
                if row >= 0:
                    self._write(key, row)

    def _write(self, key: bytes, row: int) -> None:
        assert self._workers is not None and self._disk is not None
        disk, page = self._disk, self._host.rows[row]

        def work() -> None:
            try:
                self._written.append((disk.write(key, page), 0))
            finally:
                self._unpin([row])

        def dropped(future: Future[None]) -> None:
            if future.cancelled():
                self._written.append((False, 0))
                self._unpin([row])

        self._workers.submit(WRITE, work).add_done_callback(dropped)

    def _overflow_to_disk(self, missing: Sequence[int], hashes: Sequence[bytes], pages: Pages) -> None:
        """No host row is free: write straight from a copy, a bounded number of pages at a time."""
        for i in missing:
            if not self._goes_to_disk(hashes[i]):
                self.counters.skipped += self._disk is None or not self._disk.writes
                continue
            if (self._overflow + 1) * self._copier.page_bytes > max(OVERFLOW_BYTES, self._copier.page_bytes):
                self.counters.skipped += 1
                continue
            copy = np.empty((1, self._copier.page_bytes), np.uint8)
            ticket = self._copier.store(pages[i : i + 1], copy, [0])
            self._overflow += 1
            self.counters.d2h += 1
            self._write_copy(hashes[i], copy, ticket)

    def _write_copy(self, key: bytes, copy: Rows, ticket: Ticket | None) -> None:
        assert self._workers is not None and self._disk is not None
        disk = self._disk

        def work() -> None:
            written = False
            try:
                if ticket is not None:
                    ticket.wait()
                written = disk.write(key, copy[0])
            finally:
                self._written.append((written, 1))

        def dropped(future: Future[None]) -> None:
            if future.cancelled():
                self._written.append((False, 1))

        self._workers.submit(WRITE, work).add_done_callback(dropped)

    # -- loading -----------------------------------------------------------------------------------

    def load(self, hashes: Sequence[bytes], pages: Pages) -> Transfer:
        try:
            slots = self._directory.pin(hashes)
        except SegmentBusyError:
            self.counters.loads_failed += len(hashes)
            return Landed(0)
        if min(slots, default=0) >= 0:  # all on the host, as most loads are
            return self._load_rows(slots, pages)
        parts: list[_Fetched | Future[_Fetched]] = []
        for key, slot in zip(hashes, slots, strict=True):
            if slot >= 0:
                parts.append(_Fetched(slot))
            elif self._disk is not None and self._workers is not None and self._disk.contains(key):
                parts.append(self._workers.submit(READ, lambda key=key: self._fetch(key)))  # type: ignore[misc]
            else:
                self._unpin([later for later in slots[len(parts) :] if later >= 0])
                break
        self._loads += 1
        load = _Load(self, parts, pages, len(hashes))
        load.poll()
        return load

    def _load_rows(self, rows: list[int], pages: Pages) -> Transfer:
        self.counters.h2d += len(rows)
        ticket = self._copier.load(self._host.rows, rows, pages)
        if ticket is None:
            self._unpin(rows)
            return Landed(len(rows))
        self._loading.append((ticket, rows, []))
        return _Copying(ticket, len(rows))

    def _fetch(self, key: bytes) -> _Fetched:
        """On a worker: read a page into a host row, or into memory of its own when there is none."""
        assert self._disk is not None
        directory = self._directory
        [slot] = directory.reserve([key])
        if slot == PRESENT:
            [slot] = directory.pin([key])
            if slot >= 0:
                return _Fetched(slot)
        row = self._host.rows[slot : slot + 1] if slot >= 0 else np.empty((1, self._copier.page_bytes), np.uint8)
        good = False
        try:
            good = self._disk.read(key, row[0])
        finally:
            if slot >= 0 and not good:
                when_free(directory.abandon, [slot])
        if not good:
            return _Fetched()
        if slot < 0:
            return _Fetched(row=row, read=True)
        when_free(lambda slots: directory.publish(slots, pin=slots), [slot])
        return _Fetched(slot, read=True)

    def _land(self, parts: Sequence[_Fetched], pages: Pages) -> _Copying:
        """Start to copy the leading sound pages to the device, and let go of all rows when that is done."""
        good = next((i for i, p in enumerate(parts) if p.slot < 0 and p.row is None), len(parts))
        rows = [p.slot for p in parts if p.slot >= 0]
        self.counters.disk_read += sum(p.read for p in parts)
        self.counters.h2d += good
        at = [i for i in range(good) if parts[i].slot >= 0]
        last: Ticket | None = None  # one stream per direction: what is asked for last is done last
        copies = [(self._host.rows, [parts[i].slot for i in at], pages[at])] if at else []
        copies += [(row, [0], pages[i : i + 1]) for i in range(good) if (row := parts[i].row) is not None]
        for pool, wanted, target in copies:
            last = self._copier.load(pool, wanted, target)
        if last is not None:
            self._loading.append((last, rows, [p.row for p in parts if p.row is not None]))
        else:
            self._unpin(rows)
        return _Copying(last, good)

    def _forget(self, late: Sequence[Future[_Fetched]]) -> None:
        """Pages that were not read in time: what becomes of them is let go of when it is known."""
        if not late:
            return
        assert self._disk is not None
        self._disk.stalled(True, "a load took too long")

        def came(future: Future[_Fetched]) -> None:
            if not future.cancelled() and future.exception() is None and future.result().slot >= 0:
                self._late.append(future.result().slot)

        for future in late:
            future.cancel()
            future.add_done_callback(came)

    def _unpin(self, rows: Sequence[int]) -> None:
        if rows:
            try:
                self._directory.unpin(rows)
            except SegmentBusyError:
                self._late.extend(rows)

    def reuse(self, pages: Pages) -> None:
        self._copier.fence(pages)

    # -- the rest ----------------------------------------------------------------------------------

    def touch(self, hashes: Sequence[bytes]) -> None:
        try:
            self._directory.touch(hashes)
            if self._disk is not None:
                self._disk.touch(hashes)
        except SegmentBusyError:
            pass  # order of use is a hint

    def count(self) -> TierCount:
        self.poll()
        disk = self._disk
        return TierCount(
            self._host.pages,
            self._directory.used,
            disk.capacity if disk is not None else 0,
            disk.used if disk is not None else 0,
            disk.trouble if disk is not None else "",
        )

    def poll(self) -> None:
        if self._workers is not None and self._workers.open:
            self._watch(self._workers)
        self._publish_stored()
        while self._loading and self._loading[0][0].poll():
            self._unpin(self._loading.popleft()[1])
        self._cancelled = [load for load in self._cancelled if not load.poll()]
        while self._written:
            written, overflow = self._written.popleft()
            self.counters.disk_written += written
            self._overflow -= overflow
        if self._late:
            late = list(self._late)
            self._late.clear()
            self._unpin(late)

    def _watch(self, workers: Workers) -> None:
        """A disk that does not answer must not keep host rows, which writes hold."""
        assert self._disk is not None
        longest = workers.watch()
        if longest > SLOW_SECONDS or workers.hung:
            why = f"{workers.hung} call(s) hang" if workers.hung else f"a call takes longer than {SLOW_SECONDS:g} s"
            self._disk.stalled(False, why)
            self.counters.skipped += workers.drop(WRITE)

    def reset(self) -> None:
        self.drain()
        try:
            self._host.reset()
            self._on_disk(DiskTier.reset)
        except SegmentBusyError:
            pass  # the next one will do it

    def _on_disk(self, work: Callable[[DiskTier], None]) -> None:
        """Let a worker remove files, and wait a while for it."""
        if self._disk is None or self._workers is None:
            return
        disk = self._disk
        try:
            self._workers.submit(READ, lambda: work(disk)).result(DRAIN_SECONDS)
        except TimeoutError:
            disk.stalled(False, f"files are not removed within {DRAIN_SECONDS:g} s")

    def drain(self, seconds: float | None = None) -> None:
        for ticket in [entry[0] for entry in (*self._storing, *self._loading)]:
            ticket.wait()
        self.poll()
        if self._workers is not None and not self._workers.drain(DRAIN_SECONDS if seconds is None else seconds):
            assert self._disk is not None
            self._disk.stalled(False, "it takes too long")
            self.counters.skipped += self._workers.drop(WRITE)
            self._workers.drop(READ)
        self.poll()

    def check_integrity(self) -> None:
        self.poll()
        idle = not (self._loads or self._storing or self._loading or self._late)
        idle = idle and (self._workers is None or not (self._workers.open or self._workers.hung))
        self._host.reap()
        self._directory.check_integrity("host")
        held = self._directory.held()
        if self._disk is not None:
            self._on_disk(DiskTier.reap)
            self._disk.check_integrity()
            held += self._disk.held()
        if idle and held:
            raise IntegrityError("tiers", f"{held} pages are held by this replica, but nothing is on its way")

    def shutdown(self) -> None:
        self.drain(CLOSE_SECONDS)
        if self._workers is not None and not (self._workers.drain(SLOW_SECONDS) and self._workers.stop()):
            log.warning("calls to the disk tier's files hang; its memory is given back when this process ends")
            return  # a call that comes back may still write to a host row: nobody else may get it
        if self._disk is not None:
            self._disk.close()
        self._copier.close()
        self._host.close()


class _Copying(NamedTuple):
    """Host rows that are being copied into `pages` device pages; no ticket: they were."""

    ticket: Ticket | None
    pages: int

    def poll(self) -> bool:
        return self.ticket is None or self.ticket.poll()

    def wait(self) -> int:
        if self.ticket is not None:
            self.ticket.order()
        return self.pages

    def cancel(self) -> None:
        self.wait()  # whoever gets the device pages next writes to them after this copy


class _Load:
    """A load under way; `parts` are pages at hand or being read, `asked` how many were wanted."""

    def __init__(
        self, owner: TieredConnector, parts: list[_Fetched | Future[_Fetched]], pages: Pages, asked: int
    ) -> None:
        self._owner = owner
        self._parts = parts
        self._pages = pages
        self._asked = asked
        self._copying: _Copying | None = None  # once all parts are there
        self._wanted = True
        self._end = monotonic() + LOAD_SECONDS + asked * owner._copier.page_bytes / LOAD_RATE

    def poll(self) -> bool:
        if self._copying is None and (
            all(not isinstance(p, Future) or p.done() for p in self._parts)
            or (self._wanted and monotonic() > self._end)
        ):
            self._finish()
        return self._copying is not None and self._copying.poll()

    def wait(self) -> int:
        return (self._copying or self._finish()).wait()

    def _finish(self) -> _Copying:
        """All parts are there, or are waited for as long as it may take: copy them to the device."""
        late: list[Future[_Fetched]] = []
        parts = [p if isinstance(p, _Fetched) else _result(p, self._end, late) for p in self._parts]
        self._owner._forget(late)
        self._parts = []
        self._owner._loads -= 1
        if self._wanted:
            self._copying = self._owner._land(parts, self._pages)
            self._owner.counters.loads_failed += self._asked - self._copying.pages
        else:
            self._owner._unpin([p.slot for p in parts if p.slot >= 0])
            self._copying = _Copying(None, 0)
        return self._copying

    def cancel(self) -> None:
        self._wanted = False
        if self._copying is not None:
            self._copying.cancel()
        elif not self.poll():
            self._owner._cancelled.append(self)


def _result(future: Future[_Fetched], end: float, late: list[Future[_Fetched]]) -> _Fetched:
    try:
        return future.result(max(0.0, end - monotonic()))
    except TimeoutError:
        late.append(future)
    except (Exception, CancelledError):  # a busy lock, or a bug in reading: either way the page is not to be had
        pass
    return _Fetched()
