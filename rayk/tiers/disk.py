"""The disk tier of a node: page files in a folder, one slot and one file name each, and a budget in bytes.

    DIR/seed                      what keys the hashes of this directory's clusters, see identity.py
    DIR/<fingerprint>-<lane>/     pages of one model, layout and seed
        lock                      held by every process that uses the folder
        <slot / 4096>/<slot>.kv   one page, see files.py; .tmp while it is being written

A slot's file is removed before the next one is written under its name, so slots x file size bounds the bytes on disk
at every moment. Which page is in which slot is in a Directory in shared memory; it is rebuilt from the files' headers
when the first process of a node opens the folder. Processes of one machine share folder and budget, whichever
cluster they belong to; another machine that sees the same folder (or a cluster with another budget) takes the next
lane. Reading verifies; an error of the file system turns the tier off for this process, with one warning.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rayk.errors import ConfigError
from rayk.tiers.connector import TierCounters
from rayk.tiers.directory import FULL, PRESENT, Directory
from rayk.tiers.files import HEADER_BYTES, PageBytes, Verdict, read_head, read_page, remove, write_page
from rayk.tiers.segment import Segment, byte_range, sweep

log = logging.getLogger("rayk.tiers")

LANES = 8
SHELF = 4096  # files in a sub-folder
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rayk-tier-"


class DiskTier:
    """One process's view of a node's disk tier. read() and write() are for worker threads, the rest for any.

    `trouble` says why the tier is off ("" while it works). `counters` are the owner's; only scans and reads count.
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
    ) -> None:
        self.capacity = max_pages  # what was asked for
        self.slots = min(max_pages, max_bytes // (page_bytes + HEADER_BYTES))  # what fits with headers
        self.trouble = ""
        self._fingerprint = fingerprint
        self._page_bytes = page_bytes
        self._key_bytes = key_bytes
        self._counters = counters
        self._directory: Directory | None = None
        self._segment: Segment | None = None
        self._lock = -1
        self.folder = folder
        try:
            if not self.slots:
                raise OSError(f"{max_bytes} bytes do not hold one page of {page_bytes} and its header")
            self._open(folder)
        except OSError as error:
            self._give_up("cannot be used", error)

    # -- opening ---------------------------------------------------------------------------------

    def _open(self, folder: Path) -> None:
        sweep(SHARED_MEMORY, PREFIX)
        for lane in range(LANES):
            self.folder = folder / f"{self._fingerprint:016x}-{lane}"
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._lock_lane():
                continue
            try:
                self._segment = Segment.attach(
                    self._segment_path(), Directory.num_bytes(self.slots), self._page_bytes, self._scan_into
                )
            except ConfigError:
                os.close(self._lock)
                self._lock = -1
                continue
            self._directory = Directory(self._segment, self.slots)
            self._reap(own_seat=True)
            return
        raise OSError(f"{LANES} other machines or budgets use this folder already")

    def _lock_lane(self) -> bool:
        """Whether no other machine uses the folder; keeps it so while this process lives."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        mine = _machine()
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, byte_range(fcntl.F_RDLCK, mine, 1))
            for start, length in ((0, mine), (mine + 1, 0)):
                answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, byte_range(fcntl.F_WRLCK, start, length))
                if answer[:2] != byte_range(fcntl.F_UNLCK, 0)[:2]:
                    os.close(fd)
                    return False
        except OSError:
            pass  # a file system without locks; files are verified when read in any case
        self._lock = fd
        return True

    def _segment_path(self) -> Path:
        status = self.folder.stat()
        name = hashlib.sha256(f"{status.st_dev}:{status.st_ino}:{self.folder.resolve()}".encode()).hexdigest()
        return SHARED_MEMORY / f"{PREFIX}{os.getuid()}-{name[:24]}"

    def _scan_into(self, segment: Segment) -> None:
        """Index the files that are there, least recently used first; remove what is unsound or beyond the budget."""
        directory = Directory(segment, self.slots)
        found: list[tuple[float, int, bytes, Path]] = []
        for path in sorted(self.folder.glob("*/*")):
            if path.suffix == ".tmp":
                remove(path)
            elif path.suffix == ".kv":
                head = read_head(path, self._fingerprint, self._page_bytes, self._key_bytes)
                if head.verdict is Verdict.GOOD:
                    slot = int(path.stem, 16) if _is_hex(path.stem) else self.slots
                    found.append((head.modified, slot, head.key, path))
                else:
                    self._count(head.verdict)
                    remove(path)
        strays: list[tuple[float, bytes, Path]] = []
        for modified, slot, key, path in sorted(found):
            if slot >= self.slots or path != self._path(slot):
                strays.append((modified, key, path))
            elif not directory.restore(slot, key):
                remove(path)
        empty = directory.empty_slots() if strays else []
        for _, key, path in reversed(strays):  # from a larger budget: the newest that still fit
            if empty and directory.restore(empty[-1], key):
                slot = empty.pop()
                self._path(slot).parent.mkdir(exist_ok=True)
                os.rename(path, self._path(slot))
            else:
                remove(path)

    def _count(self, verdict: Verdict) -> None:
        if verdict is Verdict.DAMAGED:
            self._counters.damaged += 1
        elif verdict is Verdict.FOREIGN:
            self._counters.foreign += 1
        elif verdict is Verdict.OUTDATED:
            self._counters.outdated += 1

    def _path(self, slot: int) -> Path:
        return self.folder / f"{slot // SHELF:04x}" / f"{slot:08x}.kv"

    # -- pages -----------------------------------------------------------------------------------

    def contains(self, key: bytes) -> bool:
        """Whether the page was there a moment ago; no system call."""
        return not self.trouble and self._directory is not None and self._directory.contains(key)

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
        directory = self._directory
        if self.trouble or directory is None:
            return False
        [slot] = directory.reserve([key])
        if slot == FULL:
            self._reap()
            [slot] = directory.reserve([key])
        if slot in (FULL, PRESENT):
            return False
        path = self._path(slot)
        try:
            remove(path)
            try:
                write_page(path, self._fingerprint, key, page)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_page(path, self._fingerprint, key, page)
        except OSError as error:
            directory.abandon([slot])
            self._give_up("cannot be written to", error)
            return False
        directory.publish([slot])
        return True

    def read(self, key: bytes, into: PageBytes) -> bool:
        """Fill `into` with the page and count it as used; False if it is not there or not sound."""
        directory = self._directory
        if self.trouble or directory is None:
            return False
        [slot] = directory.pin([key])
        if slot < 0:
            return False
        path, verdict = self._path(slot), Verdict.DAMAGED
        try:
            verdict = read_page(path, self._fingerprint, key, into)
            if verdict is Verdict.GOOD:
                with suppress(OSError):
                    os.utime(path)  # the order of use survives a restart
        except OSError as error:
            log.warning("page file %s cannot be read: %s", path, error.strerror)
        finally:
            directory.unpin([slot])
        if verdict is Verdict.GOOD:
            return True
        self._count(verdict)
        if directory.seize(slot, key):
            self._clean([slot])
        return False

    def touch(self, keys: Sequence[bytes]) -> None:
        """Pages of one prefix were used."""
        if not self.trouble and self._directory is not None:
            self._directory.touch(keys)

    def _clean(self, slots: list[int]) -> None:
        """Remove the files of slots that are ours to write, then free them."""
        assert self._directory is not None
        for slot in slots:
            path = self._path(slot)
            try:
                remove(path)
                remove(path.with_suffix(".tmp"))
            except OSError as error:  # the slot stays taken, so that the budget holds
                self._give_up("cannot be cleaned up", error)
                return
        self._directory.abandon(slots)

    def _reap(self, own_seat: bool = False) -> None:
        assert self._directory is not None
        self._clean(self._directory.reap(own_seat))

    def reset(self) -> None:
        """Forget and remove all pages that nobody reads."""
        if not self.trouble and self._directory is not None:
            self._reap()
            self._clean(self._directory.seize_all())

    def _give_up(self, what: str, error: OSError) -> None:
        if not self.trouble:
            self.trouble = f"disk tier {what}: {error.strerror or error}"
            log.warning("%s at %s; going on without it", self.trouble, self.folder)

    def reap(self) -> None:
        """Clean up after processes of this node that died."""
        if not self.trouble and self._directory is not None:
            self._reap()

    def held(self) -> int:
        """Pages that this process is reading or writing."""
        return self._directory.held() if self._directory is not None else 0

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


def _is_hex(text: str) -> bool:
    return bool(text) and all(c in "0123456789abcdef" for c in text)


def _machine() -> int:
    """A number for who shares memory with this process: one kernel's start and its /dev/shm."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        digest = hashlib.sha256(f"{boot}{SHARED_MEMORY.stat().st_dev}".encode()).digest()
        return 1 + int.from_bytes(digest[:4], "little")
    return 1
