"""The disk tier of a node: page files in its lane of a folder, one slot and one file name each.

    DIR/<fingerprint>-<lane>/<slot / 4096>/<slot>.kv   one page, see files.py; .tmp while it is being written

A slot's file is removed before the next one is written under its name, so slots x file size bounds the bytes on disk
at every moment. Which page is in which slot is in a Directory in shared memory; it is rebuilt from the files' headers
when the first process of a node opens the lane. See folder.py for lanes and budget.

Reading verifies. What goes wrong costs as little as it can: a file that cannot be read is a miss and is left alone for
a while, a slot that something else occupies is set aside, and an error that is not one file's (a full or read-only
disk, no file descriptors) pauses reading or writing until a try succeeds, for longer where a try costs more (pause.py).
Only what is known to be no page of ours is ever removed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple, TypeVar

from rayk.kvcache.connector import TierCounters
from rayk.tiers.directory import FULL, PRESENT, Directory
from rayk.tiers.files import HEADER_BYTES, Head, PageBytes, Verdict, read_head, read_page, remove, write_page
from rayk.tiers.folder import SHARED_MEMORY, TABLES, take_lane
from rayk.tiers.pause import Pause
from rayk.tiers.segment import Segment, sweep, when_free

log = logging.getLogger("rayk.tiers")

SHELF = 4096  # files in a sub-folder
OPEN_SECONDS = 120.0  # for a folder to be opened
SCAN_SECONDS = 60.0  # of these for its files to be looked at; the others cannot be hit
STALL_SECONDS = 2.0  # for one file
STALLS = 4  # files that may stall before the others are not looked at
SLOW_SECONDS = 2.0  # of one call
STALLED_SECONDS = 5.0  # of a pause after a call that did not come back
MISREAD_SECONDS = 1.0  # of a pause for one file
ROW = 3  # files in a row that cannot be read: it is not the files
_OCCUPIED = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EEXIST}
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # no fault of the file

T = TypeVar("T")


class _Opened(NamedTuple):
    folder: Path
    slots: int
    lock: int
    segment: Segment
    directory: Directory


class DiskTier:
    """One process's view of a node's disk tier. read() and write() are for worker threads, the rest for any.

    `counters` are the owner's; only scans and reads count.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: int,
        page_bytes: int,
        max_bytes: int,
        max_pages: int,
        key_bytes: int,
        counters: TierCounters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity = max_pages  # what was asked for
        self.slots = 0  # what fits
        self.off = ""  # why there is no tier at all
        self._max_bytes = max_bytes
        self._fingerprint = fingerprint
        self._page_bytes = page_bytes
        self._key_bytes = key_bytes
        self._counters = counters
        self._directory: Directory | None = None
        self._segment: Segment | None = None
        self._lock = -1
        self._resets = 0
        self._clock = clock
        self._reading, self._writing = Pause("read from", clock), Pause("written to", clock)
        self._misread: dict[bytes, Pause] = {}  # pages whose files could not be read
        self._in_a_row = 0
        self._aside: set[int] = set()  # slots that something else occupies
        self._unclean: list[int] = []  # slots whose files could not be removed yet
        self.folder = folder
        opened: list[_Opened] = []
        try:
            within(OPEN_SECONDS, lambda: self._open(folder, opened))
        except OSError as error:
            self.off = f"disk tier cannot be used: {error.strerror or error}"
            log.warning("%s at %s; going on without it", self.off, folder)
            return
        self.folder, self.slots, self._lock, self._segment, self._directory = opened[0]
        self._reap(own_seat=True)

    @property
    def trouble(self) -> str:
        """What is wrong with the tier now; "" while it works."""
        return self.off or self._writing.trouble or self._reading.trouble

    @property
    def writes(self) -> bool:
        """Whether write() would try."""
        return self._directory is not None and self._writing.over

    def stalled(self, reading: bool, why: str) -> None:
        """Calls do not come back, or too late: pause."""
        self._warn(self._reading if reading else self._writing, why, least=STALLED_SECONDS)

    # -- opening ---------------------------------------------------------------------------------

    def _open(self, folder: Path, opened: list[_Opened]) -> None:
        sweep(SHARED_MEMORY, TABLES)
        file_bytes = self._page_bytes + HEADER_BYTES
        lane = take_lane(folder, self._fingerprint, file_bytes, self._max_bytes, self.capacity)
        try:
            segment = Segment.attach(
                _segment_path(lane.folder),
                Directory.num_bytes(lane.pages),
                self._page_bytes,
                lambda segment: self._scan(lane.folder, Directory(segment, lane.pages)),
            )
        except BaseException as error:
            os.close(lane.lock)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        opened.append(_Opened(*lane, segment, Directory(segment, lane.pages)))

    def _scan(self, lane: Path, directory: Directory) -> None:
        """Index the files that are there, least recently used first; remove what is unsound or beyond the budget.

        Those that cannot be looked at now keep their slots until these are needed.
        """
        paths, heads = sorted(lane.glob("*/*")), list[tuple[Path, Head | None]]()
        end, stalls = time.monotonic() + SCAN_SECONDS, 0
        while len(heads) < len(paths):
            if stalls > STALLS or time.monotonic() > end:
                late = len(paths) - len(heads)
                log.warning("%d of %d files in %s were not looked at in time", late, len(paths), lane)
                heads += [(path, None) for path in paths[len(heads) :]]
                break
            seen: list[tuple[Path, Head | None]] = []
            rest, done, stop = paths[len(heads) :], Event(), Event()
            Thread(target=self._look, args=(rest, seen, done, stop), daemon=True, name="rayk-tier-scan").start()
            before = -1
            while not done.wait(STALL_SECONDS) and len(seen) != before and time.monotonic() < end:
                before = len(seen)
            stop.set()
            heads += seen[: len(rest)]
            if not done.is_set() and time.monotonic() < end:
                stalls += 1
                heads.append((paths[len(heads)], None))
                log.warning("%s does not answer; going on without it", heads[-1][0])
        self._restore(lane, directory, heads)

    def _look(self, paths: list[Path], seen: list[tuple[Path, Head | None]], done: Event, stop: Event) -> None:
        """On a thread that may hang: read heads, and remove what is no page of ours."""
        for path in paths:
            head = None
            try:
                if path.suffix == ".tmp":
                    remove(path)
                    head = Head(Verdict.MISSING)
                elif path.suffix == ".kv":
                    head = read_head(path, self._fingerprint, self._page_bytes, self._key_bytes)
                    if head.verdict not in (Verdict.GOOD, Verdict.MISSING):
                        self._count(head.verdict)
                        remove(path)
                else:
                    head = Head(Verdict.MISSING)
            except OSError as error:
                log.warning("%s is left alone: %s", path, error.strerror)
            if stop.is_set():
                return
            seen.append((path, head))
        done.set()

    def _restore(self, lane: Path, directory: Directory, heads: list[tuple[Path, Head | None]]) -> None:
        found, strays = list[tuple[float, int, bytes, Path]](), list[tuple[float, bytes, Path]]()
        for path, head in heads:
            slot = int(path.stem, 16) if _is_hex(path.stem) else directory.slots
            if head is None and path.suffix == ".kv":
                if slot < directory.slots and path == _path(lane, slot):
                    directory.restore(slot, os.urandom(self._key_bytes))  # nobody's page: goes when its slot is needed
            elif head is not None and head.verdict is Verdict.GOOD:
                found.append((head.modified, slot, head.key, path))
        for modified, slot, key, path in sorted(found):
            if slot >= directory.slots or path != _path(lane, slot):
                strays.append((modified, key, path))
            elif not directory.restore(slot, key):
                with suppress(OSError):
                    remove(path)
        empty = directory.empty_slots() if strays else []
        for _, key, path in reversed(strays):  # from a larger budget: the newest that still fit
            with suppress(OSError):
                if empty:
                    target = _path(lane, empty[-1])
                    target.parent.mkdir(exist_ok=True)
                    if not os.path.lexists(target) and directory.restore(empty[-1], key):
                        empty.pop()
                        os.rename(path, target)
                        continue
                remove(path)

    def _count(self, verdict: Verdict) -> None:
        if verdict is Verdict.DAMAGED:
            self._counters.damaged += 1
        elif verdict is Verdict.FOREIGN:
            self._counters.foreign += 1
        elif verdict is Verdict.OUTDATED:
            self._counters.outdated += 1

    def _path(self, slot: int) -> Path:
        return _path(self.folder, slot)

    # -- pages -----------------------------------------------------------------------------------

    def contains(self, key: bytes) -> bool:
        """Whether the page was there a moment ago and can be read; no system call."""
        directory = self._directory
        if directory is None or not self._reading.over or not directory.contains(key):
            return False
        return not self._misread or key not in self._misread or self._misread[key].over

    def indexed(self, key: bytes) -> bool:
        """Whether the page need not be written."""
        return self._directory is not None and self._directory.contains(key)

    @property
    def cells(self) -> tuple[memoryview, int]:
        """As Directory.cells; one empty cell where there is no tier."""
        return self._directory.cells if self._directory is not None else (memoryview(bytes(1)), 0)

    @property
    def used(self) -> int:
        """Pages on disk or being written."""
        return self._directory.used if self._directory is not None else 0

    def write(self, key: bytes, page: PageBytes) -> bool:
        """Keep a page, giving up the least recently used one if there is no room; whether it was written now."""
        directory, resets = self._directory, self._resets
        if directory is None or not self._writing.over:
            return False
        [slot] = directory.reserve([key])
        if slot == FULL:
            self._reap()
            [slot] = directory.reserve([key])
        if slot in (FULL, PRESENT):
            return False
        path, began = self._path(slot), self._clock()
        try:
            remove(path)
            try:
                write_page(path, self._fingerprint, key, page)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_page(path, self._fingerprint, key, page)
        except OSError as error:
            if error.errno in _OCCUPIED:
                self._set_aside(slot, error)
            else:
                when_free(directory.abandon, [slot])
                self._warn(self._writing, _why(error), self._clock() - began)
            return False
        if self._clock() - began < SLOW_SECONDS:  # else it is no sign that all is well
            self._writing.passed()
        if resets != self._resets:  # nobody may find it any more
            self._clean([slot])
            return False
        when_free(directory.publish, [slot])
        return True

    def read(self, key: bytes, into: PageBytes) -> bool:
        """Fill `into` with the page and count it as used; False if it is not there or not sound."""
        directory = self._directory
        if directory is None or not self._reading.over:
            return False
        [slot] = directory.pin([key])
        if slot < 0:
            return False
        path, verdict, began = self._path(slot), None, self._clock()
        try:
            verdict = read_page(path, self._fingerprint, key, into)
            if verdict is Verdict.GOOD:
                with suppress(OSError):
                    os.utime(path)  # the order of use survives a restart
        except OSError as error:
            self._unreadable(path, key, error, self._clock() - began)
        finally:
            when_free(directory.unpin, [slot])
        if verdict is None:
            return False
        self._in_a_row = 0
        self._misread.pop(key, None)
        if self._clock() - began < SLOW_SECONDS:
            self._reading.passed()
        if verdict is Verdict.GOOD:
            return True
        self._count(verdict)
        if directory.seize(slot, key):
            self._clean([slot])
        return False

    def _unreadable(self, path: Path, key: bytes, error: OSError, took: float) -> None:
        """A file is there, and cannot be read: leave it alone for a while, and all of them if it is not the file."""
        self._in_a_row += 1
        if error.errno in _OURS or self._in_a_row >= ROW:
            self._warn(self._reading, _why(error), took)
            return
        log.warning("page file %s cannot be read: %s", path, error.strerror)
        if len(self._misread) > 10_000:
            self._misread.clear()
        self._misread.setdefault(key, Pause("", self._clock)).failed(_why(error), least=MISREAD_SECONDS)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Pages of one prefix were used."""
        if self._directory is not None:
            self._directory.touch(keys)

    def _clean(self, slots: list[int]) -> None:
        """Remove the files of slots that are ours to write, then free them; those that cannot be removed stay taken."""
        assert self._directory is not None
        for i, slot in enumerate(slots):
            path, began = self._path(slot), self._clock()
            try:
                remove(path)
                remove(path.with_suffix(".tmp"))
            except OSError as error:
                if error.errno in _OCCUPIED:
                    self._set_aside(slot, error)
                    continue
                self._unclean += slots[i:]
                self._warn(self._writing, _why(error), self._clock() - began)
                return
            when_free(self._directory.abandon, [slot])

    def _set_aside(self, slot: int, error: OSError) -> None:
        self._aside.add(slot)
        log.warning("%s is set aside: %s", self._path(slot), error.strerror)

    def _reap(self, own_seat: bool = False) -> None:
        assert self._directory is not None
        lost = self._directory.reap(own_seat)
        again, self._unclean = self._unclean, []
        self._clean(again + lost)

    def reset(self) -> None:
        """Forget and remove all pages that nobody reads."""
        self._resets += 1
        if self._directory is not None:
            self._reap()
            self._clean(self._directory.seize_all())

    def _warn(self, pause: Pause, why: str, took: float = math.inf, least: float = 0.0) -> None:
        if not pause.trouble:
            log.warning("disk tier cannot be %s: %s at %s; trying again later", pause.what, why, self.folder)
        pause.failed(f"disk tier cannot be {pause.what}: {why}", took, least)

    def reap(self) -> None:
        """Clean up after processes of this node that died."""
        if self._directory is not None:
            self._reap()

    def held(self) -> int:
        """Pages that this process is reading or writing."""
        if self._directory is None:
            return 0
        return self._directory.held() - len(self._aside) - len(self._unclean)

    def check_integrity(self) -> None:
        """IntegrityError if the records contradict themselves."""
        if self._directory is not None:
            self._directory.check_integrity(self.folder)

    def close(self) -> None:
        """Leave the folder to others and the next start."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
            self._directory = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _is_hex(text: str) -> bool:
    return bool(text) and all(c in "0123456789abcdef" for c in text)


def _path(lane: Path, slot: int) -> Path:
    return lane / f"{slot // SHELF:04x}" / f"{slot:08x}.kv"


def _segment_path(lane: Path) -> Path:
    status = lane.stat()
    name = hashlib.sha256(f"{status.st_dev}:{status.st_ino}:{lane.resolve()}".encode()).hexdigest()
    return SHARED_MEMORY / f"{TABLES}{os.getuid()}-{name[:24]}"


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; OSError (ETIMEDOUT) when that takes longer. It is then left to itself."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True, name="rayk-tier-open")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise OSError(errno.ETIMEDOUT, f"no answer in {seconds:g} s")
    return done[0]
