"""A piece of memory that the processes of one node share, with a lock that survives whoever held it.

The memory is a file on a tmpfs (or an anonymous one for a single process). Three kinds of byte-range locks on
that file, all released by the kernel when their holder dies:

    MUTEX       held while shared state is changed; a holder that dies leaves the `dirty` mark, and the next one
                repairs before it goes on
    GATE        held while somebody attaches, detaches, makes the segment or removes it
    SEATS + i   held by participant i for as long as it is attached: who does not hold its lock is dead

So nothing needs a server, and no death leaves more behind than a file that the next attach() or sweep() removes.
The locks belong to open file descriptions: two attachments in one process exclude each other like two processes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rayk.errors import ConfigError, PlanError

HEADER_BYTES = 4096
MAX_PARTICIPANTS = 64
BUSY_SECONDS = 1.0  # a lock that is held for longer belongs to a stopped process: do without the tier
AGAIN_SECONDS = 0.02  # until the lock is tried again by who has to have it
GATE_SECONDS = 300.0  # whoever makes a segment may have a large folder to look through

_MAGIC = 0x7261796B_74696572
_MUTEX, _GATE, _SEATS = 1 << 40, (1 << 40) + 1, (1 << 40) + 2  # beyond any file's end
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_FLOCK = struct.Struct("@hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid

Words = npt.NDArray[np.uint64]
T = TypeVar("T")


class SegmentBusyError(Exception):
    """Another process has held the lock for BUSY_SECONDS: it is stopped. Internal; a tier answers it with a miss."""


def when_free(work: Callable[[Sequence[int]], T], slots: Sequence[int]) -> T:
    """Give back what nobody else can, however long a stopped neighbour holds the lock: on a thread that may wait."""
    while True:
        try:
            return work(slots)
        except SegmentBusyError:
            time.sleep(AGAIN_SECONDS)


def byte_range(kind: int, start: int, length: int = 1) -> bytes:
    """The argument of fcntl for a lock on `length` bytes (0: to the end)."""
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


class _Lock:
    """An exclusive lock on one byte, in this process and between processes.

    After a wait in vain the next ones are not waited for, until one succeeds: one stopped neighbour costs one wait.
    """

    def __init__(self, fd: int, byte: int, seconds: float = BUSY_SECONDS) -> None:
        self._fd = fd
        self._seconds = seconds
        self._patience = seconds
        self._take = byte_range(fcntl.F_WRLCK, byte)
        self._drop = byte_range(fcntl.F_UNLCK, byte)
        self._threads = threading.Lock()

    def acquire(self) -> None:
        if not self._threads.acquire(timeout=self._seconds):
            raise SegmentBusyError
        deadline = 0.0
        while True:
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._take)
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + self._patience
                if now < deadline:
                    time.sleep(20e-6)
                    continue
                self._patience = 0.0
                self._threads.release()
                raise SegmentBusyError from None
            except BaseException:
                self._threads.release()
                raise
            self._patience = self._seconds
            return

    def release(self) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._drop)
        self._threads.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class Segment:
    """`body` is the shared memory after the header. Change it only inside `with segment:`.

    `repair`, once set, is called inside the lock when the last holder died in it. `seat` is this participant's
    number, 0 .. MAX_PARTICIPANTS - 1; `fresh` says that this attachment made the segment (all zeros).
    """

    def __init__(self, path: Path | None, fd: int, size: int, seat: int, fresh: bool) -> None:
        self.path = path
        self.seat = seat
        self.fresh = fresh
        self.repair: Callable[[], None] | None = None
        self._fd = fd
        # Populated: a first touch later would cost a lookup a page fault.
        self._memory = mmap.mmap(fd, HEADER_BYTES + size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._mutex = _Lock(fd, _MUTEX)
        self._gate = _Lock(fd, _GATE, GATE_SECONDS)
        self.words: Words = np.frombuffer(self._memory, np.uint64, 64)
        self.seats: npt.NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8, MAX_PARTICIPANTS, 1024)
        self.body: npt.NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8, size, HEADER_BYTES)
        self._closed = False

    # words: 0 magic, 1 key, 2 size, 3 ready, 4 dirty; from 8 on the owner of the body may use them

    @classmethod
    def attach(
        cls, path: Path | None, size: int, key: int, init: Callable[[Segment], None], room: int | None = None
    ) -> Segment:
        """Map the segment at `path` (None: a private one), making it if nobody uses it; `init` fills a new one.

        OSError where there is a file that others may read or write, or a link. ConfigError when it is in use with
        another `key` (settings) or size; PlanError when a new one needs more than
        `room` bytes or the memory file system has less.
        """
        while True:
            fd = os.memfd_create("rayk") if path is None else os.open(path, _FLAGS, 0o600)
            try:
                os.fchmod(fd, 0o600) if path is None else _check_own(fd, path)
                with _Lock(fd, _GATE, GATE_SECONDS):
                    if path is None or _same_file(fd, path):
                        return cls._enter(path, fd, size, key, init, room)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # somebody removed it between open and lock

    @classmethod
    def _enter(
        cls, path: Path | None, fd: int, size: int, key: int, init: Callable[[Segment], None], room: int | None
    ) -> Segment:
        there = os.fstat(fd).st_size
        words = np.frombuffer(os.pread(fd, 40, 0).ljust(40, b"\0"), np.uint64)
        good = there == HEADER_BYTES + size and words.tolist()[:4] == [_MAGIC, key, size, 1]
        if not good:
            if any_alive(fd):
                raise ConfigError(
                    f"{path} is in use with other settings ({there - HEADER_BYTES} bytes, wanted {size}); "
                    "give all replicas of a node the same tiers, or stop the others first"
                )
            _reserve(fd, path, HEADER_BYTES + size, room)
        seat = _sit_down(fd)
        segment = cls(path, fd, size, seat, fresh=not good)
        if not good:
            segment.words[:4] = _MAGIC, key, size, 0
            init(segment)
            segment.words[3] = 1
        segment.seats[seat] = 1
        return segment

    def __enter__(self) -> Segment:
        self._mutex.acquire()
        try:
            if self.words[4] and self.repair is not None:
                self.repair()
            self.words[4] = 1
        except BaseException:
            self._mutex.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.words[4] = 0  # after an error the mark stays: the next holder repairs
        self._mutex.release()

    def dead_seats(self) -> list[int]:
        """Participants that died without detaching. Inside the lock only."""
        return [
            int(i) for i in np.flatnonzero(self.seats) if i != self.seat and not _is_locked(self._fd, _SEATS + int(i))
        ]

    def close(self) -> bool:
        """Detach; who is last removes the file. Whether it was removed. Views of `body` stay readable until dropped."""
        if self._closed:
            return False
        self._closed = True
        last = False
        with self._gate:
            self.seats[self.seat] = 0
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, byte_range(fcntl.F_UNLCK, _SEATS + self.seat))
            if self.path is not None and not any_alive(self._fd) and _same_file(self._fd, self.path):
                self.path.unlink()
                last = True
            # Closing would be enough; unlocking first keeps _Lock.release() valid.
        os.close(self._fd)
        return last


def _check_own(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(errno.EPERM, "it is another user's, or others may open it; remove it", str(path))


def sweep(folder: Path, prefix: str) -> int:
    """Remove segments in `folder` that nobody is attached to (their processes were killed); how many."""
    removed = 0
    for path in folder.glob(f"{prefix}*"):
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            continue  # another user's, or gone
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, byte_range(fcntl.F_WRLCK, _GATE))
            if not any_alive(fd) and _same_file(fd, path):
                path.unlink()
                removed += 1
        except OSError:
            pass  # somebody is attaching right now
        finally:
            os.close(fd)
    return removed


def any_alive(fd: int) -> bool:
    """Whether anybody else is attached to the segment that `fd` is open on."""
    return _is_locked(fd, _SEATS, MAX_PARTICIPANTS)


def _is_locked(fd: int, start: int, length: int = 1) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, byte_range(fcntl.F_WRLCK, start, length))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _sit_down(fd: int) -> int:
    for seat in range(MAX_PARTICIPANTS):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, byte_range(fcntl.F_WRLCK, _SEATS + seat))
        except BlockingIOError:
            continue
        return seat
    raise ConfigError(f"{MAX_PARTICIPANTS} processes use this node's tier already")


def _reserve(fd: int, path: Path | None, size: int, room: int | None) -> None:
    """Give the file exactly `size` zero bytes that are really there: writing to a full tmpfs would kill us later."""
    os.ftruncate(fd, 0)
    reason = f"{room} bytes of memory are free" if room is not None and size > room else ""
    if not reason:
        try:
            os.posix_fallocate(fd, 0, size)
        except (OSError, OverflowError) as error:
            os.ftruncate(fd, 0)
            reason = str(error)
    if reason:
        raise PlanError(
            f"no room for {size} bytes of shared memory ({path or 'private'}): {reason}; "
            "ask for fewer host pages, or enlarge /dev/shm"
        )


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
