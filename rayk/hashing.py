"""Page identity beyond one replica: chained hashes of tokens.

H_i = f(H_{i-1} + tokens of page i), tokens as little-endian int32. The first parent is sha256 over the
cluster's seed, the salt and the adapter, so that equal tokens under another salt have other hashes.
sha256 resists an adversary; xxh3_128 is for clusters whose users trust each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NewType

import xxhash

from rayk.prefix import RootKey

PageHash = NewType("PageHash", bytes)

_DIGESTS: dict[str, Callable[[bytes], bytes]] = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "xxh3_128": lambda data: xxhash.xxh3_128(data).digest(),
}


def root_hash(seed: bytes, key: RootKey) -> PageHash:
    """The parent of the first page of that salt and adapter, 32 bytes."""
    hasher = hashlib.sha256(seed)
    for part in key:
        data = b"" if part is None else part.encode()
        hasher.update(b"-" if part is None else b"+%d:" % len(data))
        hasher.update(data)
    return PageHash(hasher.digest())


def page_hashes(algorithm: str, parent: PageHash, tokens: bytes, page_bytes: int) -> list[PageHash]:
    """One hash per full page of `tokens` (raw int32), continuing after `parent`."""
    digest, hashes = _DIGESTS[algorithm], []
    for at in range(0, len(tokens) - page_bytes + 1, page_bytes):
        parent = PageHash(digest(parent + tokens[at : at + page_bytes]))
        hashes.append(parent)
    return hashes
