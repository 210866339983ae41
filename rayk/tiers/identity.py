"""Whose pages these are: the fingerprint of a layout, and the seed that keys a cluster's hashes."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rayk.errors import ConfigError
from rayk.params import KVCacheParams
from rayk.tiers.files import remove
from rayk.tiers.folder import folder_lock

log = logging.getLogger("rayk.tiers")

SEED_BYTES = 32
SEED_FILE = "seed"


def fingerprint(params: KVCacheParams) -> int:
    """64 bits over all that decides what a page's bytes mean: another model, dtype, shape, page size, TP degree, hash
    algorithm or seed gives another number. Parameters do not name a model: KVConnectorConfig.model_id does."""
    config = params.kv_connector_config
    seed = hashlib.sha256(b"rayk tier" + (params.kv_hash_seed or b"")).hexdigest()
    parts = [
        config.model_id if config is not None else "",
        params.kv_hash_algo,
        str(params.tensor_parallel_degree),
        str(params.page_size),
        seed,
    ]
    for name, leaf in params.leaves.items():
        parts += [name, type(leaf).__name__, repr(leaf.layout)]
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def named(params: KVCacheParams) -> KVCacheParams:
    """The parameters of a start, with a name of its own for a model that has none, and one warning: another start
    cannot know whether its weights are the same, and does not reuse its pages. ConfigError for a disk tier without a
    disk."""
    config = params.kv_connector_config
    if params.kv_connector != "tiered":
        return params
    if config is None or config.disk_offload_dir is None or not config.disk_offload_max_bytes:
        raise ConfigError(
            "kv_connector 'tiered' needs a folder and its size: kv_connector_config=KVConnectorConfig("
            "disk_offload_dir=.., disk_offload_max_bytes=..); use 'local' for a host tier alone"
        )
    if config.model_id:
        return params
    log.warning(
        "the disk tier at %s has no model_id: its pages are of use to this start alone. "
        "Set KVConnectorConfig(model_id=..) to the name and version of the weights, and the next start reuses them",
        config.disk_offload_dir,
    )
    return replace(params, kv_connector_config=replace(config, model_id=f"unnamed-{os.urandom(16).hex()}"))


def read_seed(folder: Path) -> bytes | None:
    """The seed kept with a tier directory, None if there is none."""
    with suppress(OSError):
        fd = os.open(folder / SEED_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            seed = os.read(fd, SEED_BYTES + 1)
        finally:
            os.close(fd)
        if len(seed) == SEED_BYTES:
            return seed
    return None


def find_seed(params: KVCacheParams) -> bytes:
    """The seed of a cluster that was given none: the one kept with its tier directory, else a new one, kept there."""
    config = params.kv_connector_config
    folder = config.disk_offload_dir if config is not None and params.kv_connector == "tiered" else None
    return take_seed(Path(folder)) if folder is not None else os.urandom(SEED_BYTES)


def take_seed(folder: Path) -> bytes:
    """The seed of whoever uses the folder, made now if nobody did before; all who ask at once get the same one."""
    seed = os.urandom(SEED_BYTES)
    with suppress(OSError):  # the disk tier will say what is wrong with the folder
        return keep_seed(folder, seed)
    return seed


def keep_seed(folder: Path, seed: bytes) -> bytes:
    """Keep `seed` with a tier directory that has none; the one that is there in the end. OSError passes."""
    there = read_seed(folder)
    if there is not None:
        return there
    folder.mkdir(parents=True, exist_ok=True)
    target, mine = folder / SEED_FILE, folder / f".{SEED_FILE}-{os.getpid()}-{os.urandom(4).hex()}"
    with folder_lock(folder):  # nobody else removes or makes one
        there = read_seed(folder)
        if there is not None:
            return there
        remove(target)  # cut short by a crash: worth nothing
        fd = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.write(fd, seed)
                os.fsync(fd)
            finally:
                os.close(fd)
            with suppress(FileExistsError):
                os.link(mine, target)  # unlike a rename this never replaces another's
        finally:
            remove(mine)
        _sync(folder)
    return read_seed(folder) or seed


def _sync(folder: Path) -> None:
    """Have the names in a folder survive a crash, where the file system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
