"""Faults of the disk tier's folder, by what a kernel offers: other bytes in files, a frozen file system, a full one.

Freezing (FIFREEZE: who writes waits, who reads goes on) and filling concern a whole file system, so that the folder has
to be on a small one of its own, which check() makes sure of. Both are over when the object is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rayk.errors import ConfigError
from rayk.quantity import show_bytes

LARGEST = 2 << 30  # bytes of a file system that may be filled
SHARE = 10  # one file of so many is damaged
BALLAST = "rayk-chaos-ballast"
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW of linux/fs.h


def check_folder(folder: Path, kinds: set[str]) -> None:
    """ConfigError unless those faults can be had there, and harm nothing else."""
    whole = sorted(kinds & {"slow-disk", "fill-disk"})
    if not whole:
        return
    folder.mkdir(parents=True, exist_ok=True)
    size, own = os.statvfs(folder), folder.stat().st_dev
    total = size.f_blocks * size.f_frsize
    others = (Path("/"), Path("/tmp"), Path("/dev/shm"), Path.cwd(), Path.home())
    shared = [str(each) for each in others if each.exists() and each.stat().st_dev == own]
    if shared or total > LARGEST:
        why = f"is shared with {shared[0]}" if shared else f"has {show_bytes(total)}"
        raise ConfigError(
            f"--chaos {', '.join(whole)} is for a whole file system, and that of --disk-dir {folder} {why}; mount one "
            f"of its own there, of at most {show_bytes(LARGEST)}"
        )
    if "slow-disk" in kinds:
        try:
            freeze(folder)()
        except OSError as error:
            raise ConfigError(
                f"--chaos slow-disk freezes the file system of --disk-dir {folder}, which refuses ({error.strerror}); "
                "use an ext4 or xfs, as root"
            ) from None


def damage(folder: Path, draw: int) -> int:
    """Change some of the files of pages there; how many."""
    chance, done = random.Random(draw), 0
    files = sorted(folder.glob("*/*/*.kv"))
    for path in chance.sample(files, -(-len(files) // SHARE)):
        with suppress(FileNotFoundError), path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            at = chance.randrange(max(1, size))
            if chance.random() < 0.2:
                file.truncate(at)
            else:
                before = os.pread(file.fileno(), 16, at)
                os.pwrite(file.fileno(), bytes(byte ^ 0x5A for byte in before), at)
            done += 1
    return done


def freeze(folder: Path) -> Callable[[], None]:
    """Have all wait that write there, until the function that is returned is called. OSError where that cannot be."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _FREEZE, 0)
    except OSError:
        os.close(fd)
        raise

    def thaw() -> None:
        with suppress(OSError):  # somebody else thawed it
            fcntl.ioctl(fd, _THAW, 0)
        os.close(fd)

    return thaw


def fill(folder: Path) -> Callable[[], None]:
    """Leave no byte of the file system there, until the function that is returned is called."""
    path, piece = folder / BALLAST, 1 << 24
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        at = 0
        while piece >= 512:
            try:
                os.posix_fallocate(fd, at, piece)
                at += piece
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                piece //= 2
    finally:
        os.close(fd)
    return lambda: path.unlink(missing_ok=True)
