"""The folder of a node's disk tier: who has which part of it, and one budget for all that is in it.

    DIR/.lock                     held while somebody looks for a lane
    DIR/seed                      what keys the hashes of this directory's clusters, see identity.py
    DIR/<fingerprint>-<lane>/     pages of one model, layout and seed
        lock                      held by every process that uses the lane; holds its budget (_CLAIM)

Locks are byte ranges that the kernel releases when their holder dies. A lane that somebody holds is never touched by
others and its claim counts against the budget of who comes later; one that nobody holds is removed by the next who
opens another. Processes of one machine with equal budgets share a lane of their model.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rayk.tiers.segment import byte_range, sweep

log = logging.getLogger("rayk.tiers")

LANES = 8
LOCK_SECONDS = 20.0
REMOVE_SECONDS = 20.0  # for lanes that nobody uses; what is left counts against the budget
SHARED_MEMORY = Path("/dev/shm")
POOLS, TABLES = "rayk-pool-", "rayk-tier-"  # names there: of host tiers, and of the tables of lanes
_LANE = re.compile(r"([0-9a-f]{16})-(\d)")
_CLAIM = struct.Struct("<QQ")  # bytes that were asked for, pages that it may hold
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def sweep_memory() -> None:
    """Give back the shared memory of processes that were killed, on this node."""
    for prefix in (POOLS, TABLES):
        sweep(SHARED_MEMORY, prefix)


class Lane(NamedTuple):
    """A part of the folder, for `pages` pages; its lock is held while `lock` is open."""

    folder: Path
    pages: int
    lock: int


def take_lane(folder: Path, fingerprint: int, file_bytes: int, max_bytes: int, max_pages: int) -> Lane:
    """The lane for those pages within what is left of the folder's budget. OSError says why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        mine, shared = _choose(folder, fingerprint, max_bytes)
        taken = 0
        deadline = time.monotonic() + REMOVE_SECONDS
        for lane in _lanes(folder):
            if lane != mine:
                taken += _held(lane) or _remove(lane, deadline)
        pages = shared or min(max_pages, max(0, max_bytes - taken) // file_bytes)
        if not pages:
            rest = f", of which {taken} are taken by what else is in it" if taken else ""
            raise OSError(
                f"{max_bytes} bytes{rest} do not hold one page of {file_bytes} with its header; raise the budget, or "
                "take another folder"
            )
        if not shared:
            pages = _fit(folder, mine, pages, file_bytes)
        mine.mkdir(exist_ok=True)
        return Lane(mine, pages, _hold(mine, _CLAIM.pack(max_bytes, pages), pages * file_bytes, bool(shared)))


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Alone in looking for a lane or making a seed; OSError (ETIMEDOUT) when another does that for too long."""
    try:
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        yield  # nothing can be made or removed there anyway
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _lock_or_do_without(fd):
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"another process has held {folder / '.lock'} for {LOCK_SECONDS:g} s")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _lanes(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if _LANE.fullmatch(each.name) and each.is_dir())


def _choose(folder: Path, fingerprint: int, max_bytes: int) -> tuple[Path, int]:
    """The first lane of that fingerprint that is free, or that others of this machine use with the same budget; in
    that case how many pages it may hold."""
    for number in range(LANES):
        lane = folder / f"{fingerprint:016x}-{number}"
        fd = _open(lane)
        if fd is None:
            return lane, 0
        try:
            if not _locked(fd, 0, 0):
                return lane, 0
            me = machine()
            asked, pages = _read_claim(fd)
            if asked == max_bytes and not _locked(fd, 0, me) and not _locked(fd, me + 1, 0):
                return lane, pages
        finally:
            os.close(fd)
    raise OSError(f"{LANES} other machines or budgets use this folder already")


def _open(lane: Path) -> int | None:
    try:
        return os.open(lane / "lock", os.O_RDWR | _FLAGS)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return os.open(lane / "lock", os.O_RDONLY | _FLAGS)


def _held(lane: Path) -> int:
    """Bytes that those who hold a lane may write; 0 when nobody does."""
    fd = _open(lane)
    if fd is None:
        return 0
    try:
        if not _locked(fd, 0, 0):
            return 0
        asked, _ = _read_claim(fd)
        claim = os.pread(fd, 8, _CLAIM.size)
        return int.from_bytes(claim, "little") if len(claim) == 8 else max(asked, _size(lane))
    finally:
        os.close(fd)


def _remove(lane: Path, deadline: float) -> int:
    """Remove a lane that nobody holds; bytes of it that are left."""
    left = 0
    try:
        fd = _open(lane)
        try:
            if fd is not None and not _lock(fd, fcntl.F_WRLCK, 0, 0):
                return _size(lane)
            for root, _, names in os.walk(lane, topdown=False):
                for name in names:
                    if name != "lock":
                        left += _unlink(os.path.join(root, name), deadline)
                if root != str(lane):
                    with suppress(OSError):
                        os.rmdir(root)
            if not left:
                with suppress(OSError):
                    os.unlink(lane / "lock")
                with suppress(OSError):
                    os.rmdir(lane)
        finally:
            if fd is not None:
                os.close(fd)
    except OSError as error:
        log.warning("%s, which nobody uses, cannot be removed: %s", lane, error)
        return _size(lane)
    return left


def _unlink(path: str, deadline: float) -> int:
    try:
        if time.monotonic() < deadline:
            os.unlink(path)
            return 0
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0
    except OSError:
        return os.lstat(path).st_size


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def _fit(folder: Path, mine: Path, pages: int, file_bytes: int) -> int:
    """Fewer pages where the file system has no room for so many, with one warning."""
    free = shutil.disk_usage(folder).free
    if pages * file_bytes <= free:
        return pages
    room = free + (_size(mine) if mine.exists() else 0)
    if pages * file_bytes <= room:
        return pages
    log.warning(
        "the disk tier at %s may hold %d bytes, but the file system has %d for it; it will hold no more than these. "
        "Lower the budget, or take another folder",
        folder, pages * file_bytes, room,
    )  # fmt: skip
    return max(1, room // file_bytes)


def _hold(lane: Path, claim: bytes, size: int, shared: bool) -> int:
    """Lock a lane for this machine; the open lock file."""
    me = machine()
    fd = -1
    try:
        fd = os.open(lane / "lock", os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        fd = os.open(lane / "lock", os.O_RDONLY | _FLAGS)
    with suppress(OSError):  # a file system without locks; files are verified when read in any case
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, byte_range(fcntl.F_RDLCK, me, 1))
    if not shared:
        with suppress(OSError):
            os.pwrite(fd, claim + size.to_bytes(8, "little"), 0)
    return fd


def _read_claim(fd: int) -> tuple[int, int]:
    data = os.pread(fd, _CLAIM.size, 0)
    return _CLAIM.unpack(data) if len(data) == _CLAIM.size else (0, 0)


def _lock(fd: int, kind: int, start: int, length: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, byte_range(kind, start, length))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _lock_or_do_without(fd: int) -> bool:
    try:
        return _lock(fd, fcntl.F_WRLCK, 0, 0)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return True  # a file system without locks
        raise


def _locked(fd: int, start: int, length: int) -> bool:
    """Whether anybody else holds a lock there; a file system without locks is held by others."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, byte_range(fcntl.F_WRLCK, start, length))
    except OSError:
        return True
    return bool(answer[:2] != byte_range(fcntl.F_UNLCK, 0)[:2])


def machine() -> int:
    """A number for who shares memory with this process: one kernel's start and its /dev/shm."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        digest = hashlib.sha256(f"{boot}{SHARED_MEMORY.stat().st_dev}".encode()).digest()
        return 1 + int.from_bytes(digest[:4], "little")
    return 1
