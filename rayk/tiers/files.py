"""Page files: one page each, with everything needed to know whose page it is and that it is whole.

    offset  bytes
    0       4       magic "RKPG"
    4       2       version of this format
    6       2       bytes of the header
    8       8       fingerprint: model, layout, hash algorithm and seed, see identity.py
    16      8       bytes of the page
    24      8       checksum: xxh3_64 over the page, seeded with that over the rest of the header
    32      32      page hash, padded with zeros
    64      ..      the page

A file is written under a temporary name and renamed when it is complete. Nothing in it is ever executed or unpickled.
What is no regular file (a link, a pipe, a device) is foreign, and is neither followed nor waited for.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

MAGIC = b"RKPG"
VERSION = 1
HEADER = struct.Struct("<4sHHQQQ32s")
HEADER_BYTES = HEADER.size
KEY_BYTES = 32

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

PageBytes = npt.NDArray[np.uint8]


class Verdict(Enum):
    """What is wrong with a file."""

    GOOD = "good"
    MISSING = "missing"
    DAMAGED = "damaged"  # cut short, too long, or not what its checksum says
    FOREIGN = "foreign"  # no page file, or one of another model, layout, seed or page
    OUTDATED = "outdated"  # another version of the format


class Head(NamedTuple):
    """The part of a header that a scan needs."""

    verdict: Verdict
    key: bytes = b""
    modified: float = 0.0


def _checksum(header: bytes, page: PageBytes) -> int:
    """`header` with a zero checksum; it seeds the sum over the page."""
    return xxhash.xxh3_64(page.data, seed=xxhash.xxh3_64_intdigest(header)).intdigest()


def _header(fingerprint: int, length: int, checksum: int, key: bytes) -> bytes:
    return HEADER.pack(MAGIC, VERSION, HEADER_BYTES, fingerprint, length, checksum, key)


def write_page(path: Path, fingerprint: int, key: bytes, page: PageBytes) -> None:
    """Write a page beside `path` and rename it there. OSError leaves neither file."""
    blank = _header(fingerprint, page.nbytes, 0, key)
    head = _header(fingerprint, page.nbytes, _checksum(blank, page), key)
    temporary = path.with_suffix(".tmp")
    remove(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
    try:
        try:
            parts = [memoryview(head), page.data.cast("B")]
            while parts:
                written = os.writev(fd, parts)
                while parts and written >= len(parts[0]):
                    written -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][written:]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def read_page(path: Path, fingerprint: int, key: bytes, into: PageBytes) -> Verdict:
    """Fill `into` with the page; only GOOD says that it holds what was written. OSError but a missing file passes."""
    fd = _open(path)
    if isinstance(fd, Verdict):
        return fd
    try:
        head = os.read(fd, HEADER_BYTES)
        verdict = _judge(head, fingerprint, into.nbytes, key)
        if verdict is not Verdict.GOOD:
            return verdict
        rest, view = into.nbytes, into.data.cast("B")
        while rest:
            got = os.readv(fd, [view[into.nbytes - rest :]])
            if not got:
                return Verdict.DAMAGED
            rest -= got
        if os.read(fd, 1):
            return Verdict.DAMAGED
    finally:
        os.close(fd)
    checksum = HEADER.unpack(head)[5]
    return Verdict.GOOD if _checksum(_header(fingerprint, into.nbytes, 0, key), into) == checksum else Verdict.DAMAGED


def read_head(path: Path, fingerprint: int, length: int, key_bytes: int) -> Head:
    """Whose page a file says it holds, and whether it can be: its contents are checked when they are read."""
    fd = _open(path)
    if isinstance(fd, Verdict):
        return Head(fd)
    try:
        head, status = os.read(fd, HEADER_BYTES), os.fstat(fd)
    finally:
        os.close(fd)
    verdict = _judge(head, fingerprint, length, None)
    if verdict is not Verdict.GOOD:
        return Head(verdict)
    if status.st_size != HEADER_BYTES + length:
        return Head(Verdict.DAMAGED)
    return Head(verdict, HEADER.unpack(head)[6][:key_bytes], status.st_mtime)


def _open(path: Path) -> int | Verdict:
    """A regular file, open for reading, or what is wrong; OSError for anything that may be over in a moment."""
    try:
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return Verdict.MISSING
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            return Verdict.FOREIGN
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return Verdict.FOREIGN


def _judge(head: bytes, fingerprint: int, length: int, key: bytes | None) -> Verdict:
    if len(head) < 8:
        return Verdict.DAMAGED
    if head[:4] != MAGIC:
        return Verdict.FOREIGN
    if int.from_bytes(head[4:6], "little") != VERSION:
        return Verdict.OUTDATED
    if len(head) < HEADER_BYTES:
        return Verdict.DAMAGED
    _, _, size, whose, bytes_, _, found = HEADER.unpack(head)
    if size != HEADER_BYTES:
        return Verdict.DAMAGED
    if whose != fingerprint or (key is not None and found != key.ljust(KEY_BYTES, b"\0")):
        return Verdict.FOREIGN
    return Verdict.GOOD if bytes_ == length else Verdict.DAMAGED


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)
