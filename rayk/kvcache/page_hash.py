"""Page identity beyond one replica: chained hashes of tokens.

H_i = f(H_{i-1} + tokens of page i), tokens as little-endian int32. The first parent is sha256 over the
cluster's seed, the salt and the adapter, so that equal tokens under another salt have other hashes. Going on
needs the last hash only: no token is hashed twice and no hasher state is kept with a page.
sha256 resists an adversary; xxh3_128 is for clusters whose users trust each other.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NewType, overload

import numpy as np
import numpy.typing as npt
import xxhash

PageHash = NewType("PageHash", bytes)
RootKey = tuple[str | None, str | None]  # cache salt and adapter

WIDTHS = {"sha256": 32, "xxh3_128": 16}  # bytes of a hash
TOKEN_BYTES = 32  # of a mask
KEY_BYTES = 8  # of a hash, where a key will do: two pages that share them cost a miss, never a wrong answer


def tenant_salt(key: bytes, tenant: str | None, cache_salt: str | None) -> str:
    """The cache salt of a tenant's requests that ask for `cache_salt`, where tenants are kept apart. Requests without a
    tenant are one of their own. Without the cluster's key nobody names a salt that is another tenant's."""
    hasher = hmac.new(key, b"rayk tenant", "sha256")
    for part in (tenant, cache_salt):
        data = b"" if part is None else part.encode()
        hasher.update(b"-" if part is None else b"+%d:" % len(data))
        hasher.update(data)
    return hasher.hexdigest()


class PageHashes(Sequence[PageHash]):
    """Hashes that lie one after the other in `joined`, `width` bytes each; taken apart when asked for."""

    __slots__ = ("joined", "width")

    def __init__(self, joined: bytes, width: int) -> None:
        self.joined = joined
        self.width = width

    def __len__(self) -> int:
        return len(self.joined) // self.width

    @overload
    def __getitem__(self, at: int) -> PageHash: ...
    @overload
    def __getitem__(self, at: slice) -> list[PageHash]: ...
    def __getitem__(self, at: int | slice) -> PageHash | list[PageHash]:
        if isinstance(at, slice):
            return list(self)[at]
        start = range(len(self))[at] * self.width
        return PageHash(self.joined[start : start + self.width])

    def __iter__(self) -> Iterator[PageHash]:
        joined, width = self.joined, self.width
        return iter([PageHash(joined[at : at + width]) for at in range(0, len(joined), width)])


def _sha256(data: bytes, _new: Callable[[bytes], Any] = hashlib.sha256) -> bytes:
    digest: bytes = _new(data).digest()
    return digest


_DIGESTS: dict[str, Callable[[bytes], bytes]] = {"sha256": _sha256, "xxh3_128": xxhash.xxh3_128_digest}


class PageHasher:
    """Makes the hashes of one cluster: `algorithm` and `seed` decide, `page_size` is in tokens."""

    def __init__(self, algorithm: str, seed: bytes, page_size: int) -> None:
        self.algorithm = algorithm
        self.width = WIDTHS[algorithm]
        self.digest = _DIGESTS[algorithm]  # of parent + tokens of one page: its hash
        self._seed = seed
        self._page_bytes = page_size * 4
        self._cutters: dict[int, struct.Struct] = {}  # for so many pages: what takes them apart

    def root(self, key: RootKey) -> PageHash:
        """The parent of the first page of that salt and adapter, as long as a page's hash."""
        hasher = hashlib.sha256(self._seed)
        for part in key:
            data = b"" if part is None else part.encode()
            hasher.update(b"-" if part is None else b"+%d:" % len(data))
            hasher.update(data)
        return PageHash(hasher.digest()[: self.width])

    def of(self, key: RootKey, tokens: bytes) -> list[bytes]:
        """chain() from the first page of that salt and adapter on."""
        return [*self.chain(self.root(key), tokens)]

    def chain(self, parent: PageHash, tokens: bytes) -> list[PageHash]:
        """One hash per full page of `tokens` (raw int32), continuing after `parent`."""
        count = len(tokens) // self._page_bytes
        if count == 1:
            return [PageHash(self.digest(parent + tokens[: self._page_bytes]))]
        pages = self._cutter(count).unpack_from(tokens)  # at a fifth of what a slice for each page costs
        digest: bytes = parent
        hashes: list[Any] = []  # and not PageHash: calling it would cost as much as the rest
        if self.algorithm == "sha256":
            empty = hashlib.sha256()
            for page in pages:  # a copy of an empty hash is set up faster than a new one
                hashing = empty.copy()
                hashing.update(digest)
                hashing.update(page)
                digest = hashing.digest()
                hashes.append(digest)
        else:
            xxh3 = xxhash.xxh3_128_digest
            hashes = [digest := xxh3(digest + page) for page in pages]
        return hashes

    def _cutter(self, count: int) -> struct.Struct:
        cutter = self._cutters.get(count)
        if cutter is None:
            if len(self._cutters) >= 256:
                self._cutters.clear()
            cutter = self._cutters[count] = struct.Struct(f"{self._page_bytes}s" * count)
        return cutter


class Mask:
    """Tells the pages of before a reset from those of after it, wherever hashes are exchanged: every hash is XORed with
    random bytes that all replicas got with the reset, so none meets another's under another mask."""

    def __init__(self, token: bytes = b"") -> None:
        self.token = token  # b"": nothing is masked
        self._number = int.from_bytes(token, "little")

    @staticmethod
    def new() -> bytes:
        """A token for a reset."""
        return os.urandom(TOKEN_BYTES)

    def one(self, hashed: bytes) -> bytes:
        """A masked hash, as long as it was."""
        width = len(hashed)
        mask = self._number & ((1 << 8 * width) - 1)
        return (int.from_bytes(hashed, "little") ^ mask).to_bytes(width, "little")

    def all(self, hashes: Sequence[bytes]) -> Sequence[bytes]:
        """Masked hashes; the same when nothing is masked."""
        return [self.one(each) for each in hashes] if self.token else hashes


class PageKeys:
    """Keys of the pages that a request may reuse, which are all full ones before its last token (or before its
    placeholders): the first KEY_BYTES of each hash, for a prefix index."""

    ROOTS = 4096  # of salts and adapters, whose hashes are kept

    def __init__(self, hasher: PageHasher, page_size: int) -> None:
        self._hasher = hasher
        self._page_size = page_size
        self._roots: dict[RootKey, PageHash] = {}

    def joined(self, tokens: npt.NDArray[np.int32], root: RootKey, pending: int = 0) -> bytes:
        """The keys of a request, one after the other; the last `pending` tokens are placeholders."""
        pages = max(0, len(tokens) - (pending or 1)) // self._page_size
        if not pages:
            return b""
        parent = self._roots.get(root)
        if parent is None:
            if len(self._roots) >= self.ROOTS:
                self._roots.clear()
            parent = self._roots[root] = self._hasher.root(root)
        whole = tokens[: pages * self._page_size].tobytes()
        return b"".join([each[:KEY_BYTES] for each in self._hasher.chain(parent, whole)])

    def of(self, tokens: bytes, root: RootKey, pending: int = 0) -> list[int]:
        """The keys of a request (raw int32) as numbers."""
        return split_keys(self.joined(np.frombuffer(tokens, np.int32), root, pending))


def split_keys(joined: bytes) -> list[int]:
    """Keys that lie one after the other, as numbers."""
    keys: list[int] = np.frombuffer(joined, "<u8").tolist()
    return keys
