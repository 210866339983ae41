"""The secret of a named cluster: drivers that do not know it cannot attach.

    scheduler -> driver    Challenge: the salt of its lock, and a number that is good for one answer
    driver -> scheduler    Proof: the key that secret and salt give, covered by what the lock makes of the number

The scheduler keeps a Lock, a digest of that key. Neither the lock nor a proof that was overheard opens it again.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayk.errors import ConfigError, SecretError
from rayk.values import checked_text

LEAST, MOST = 8, 1024  # bytes of a secret
ASKED = 256  # challenges that may be open at a time; more make the oldest worthless
_BYTES = 32


class Challenge(NamedTuple):
    """What a scheduler asks."""

    salt: bytes
    number: bytes


class Proof(NamedTuple):
    """The answer to the challenge of that number."""

    number: bytes
    covered: bytes


@dataclass(frozen=True)
class Lock:
    """What a cluster was locked with: `digest` of the key that its secret gives with `salt`."""

    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)


class Secret:
    """What drivers of one cluster share. It is neither shown nor pickled. ConfigError for what is none."""

    __slots__ = ("_keys", "_value")

    def __init__(self, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else _text(value).encode()
        if not LEAST <= len(data) <= MOST:
            raise ConfigError(f"a secret has {LEAST} to {MOST} bytes, this one has {len(data)}")
        self._value = data
        self._keys: dict[bytes, bytes] = {}  # by salt: making one takes some hundredths of a second, on purpose

    def __repr__(self) -> str:
        return "Secret(..)"

    def __reduce__(self) -> Any:
        raise TypeError("a secret stays in its process")

    def lock(self) -> Lock:
        """A lock that it opens."""
        salt = os.urandom(_BYTES)
        return Lock(salt, hashlib.sha256(self._key(salt)).digest())

    def prove(self, challenge: Challenge) -> Proof:
        """The answer to a challenge."""
        key = self._key(challenge.salt)
        digest = hashlib.sha256(key).digest()
        return Proof(challenge.number, _covered(key, digest, challenge.number))

    def _key(self, salt: bytes) -> bytes:
        if salt not in self._keys:
            self._keys = {salt: hashlib.scrypt(self._value, salt=salt, n=1 << 14, r=8, p=1, dklen=_BYTES)}
        return self._keys[salt]


class Authenticator:
    """In the scheduler of the cluster `name`; open to anybody without a lock."""

    def __init__(self, name: str | None, lock: Lock | None) -> None:
        self._name = name or ""
        self._lock = lock
        self._open: deque[bytes] = deque(maxlen=ASKED)

    def challenge(self) -> Challenge:
        """What who has a secret has to answer. SecretError where none is wanted: it would be thought to protect
        something."""
        if self._lock is None:
            raise SecretError(self._name, "it was started without a secret, and one was given")
        self._open.append(os.urandom(_BYTES))
        return Challenge(self._lock.salt, self._open[-1])

    def check(self, proof: Proof | None) -> None:
        """SecretError unless the secret was proved to be known."""
        if self._lock is None:
            return
        if proof is None:
            raise SecretError(self._name, "it was started with a secret, and none was given")
        if proof.number not in self._open:
            raise SecretError(self._name, "the answer came too late, or twice")
        self._open.remove(proof.number)
        key = _covered(proof.covered, self._lock.digest, proof.number)
        if not hmac.compare_digest(hashlib.sha256(key).digest(), self._lock.digest):
            raise SecretError(self._name, "it was started with another secret")


def _covered(key: bytes, digest: bytes, number: bytes) -> bytes:
    """The key, made unreadable for whoever does not have the digest; the same again uncovers it."""
    cover = hmac.digest(digest, number, "sha256")
    return bytes(a ^ b for a, b in zip(key, cover, strict=False))


def _text(value: Any) -> str:
    if not isinstance(value, str):  # which says nothing of what was given
        raise ConfigError(f"a secret must be str or bytes, got {type(value).__name__}")
    return checked_text("a secret", value, lambda _: ConfigError("a secret must be text that UTF-8 can carry"))
