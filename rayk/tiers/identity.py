"""Whose pages these are: the fingerprint of a layout, and the seed that keys a cluster's hashes."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from rayk.params import KVCacheParams

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


def read_seed(folder: Path) -> bytes | None:
    """The seed kept with a tier directory, None if there is none."""
    with suppress(OSError):
        seed = (folder / SEED_FILE).read_bytes()
        if len(seed) == SEED_BYTES:
            return seed
    return None


def find_seed(params: KVCacheParams) -> bytes:
    """The seed of a cluster that was given none: the one kept with its tier directory, else a new one, kept there."""
    config = params.kv_connector_config
    folder = config.disk_offload_dir if config is not None and params.kv_connector == "tiered" else None
    seed = os.urandom(SEED_BYTES)
    if folder is not None:
        with suppress(OSError):  # the disk tier will say what is wrong with the folder
            return keep_seed(Path(folder), seed)
    return seed


def keep_seed(folder: Path, seed: bytes) -> bytes:
    """Keep `seed` with a tier directory that has none; the one that is there in the end. OSError passes."""
    folder.mkdir(parents=True, exist_ok=True)
    target, mine = folder / SEED_FILE, folder / f".{SEED_FILE}-{os.getpid()}-{os.urandom(4).hex()}"
    if read_seed(folder) is None:
        with suppress(FileNotFoundError):
            if target.stat().st_size != SEED_BYTES:  # cut short by a crash: worth nothing
                target.unlink()
        mine.touch(mode=0o600)
        mine.write_bytes(seed)
        try:
            with suppress(FileExistsError):
                os.link(mine, target)  # unlike a rename this never replaces another's
        finally:
            mine.unlink()
    return read_seed(folder) or seed
