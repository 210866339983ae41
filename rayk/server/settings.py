"""What a server may be told: names, keys, limits, times."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from rayk.errors import ConfigError
from rayk.params import require_at_least


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one request, beyond which it is refused. `requests` are generations at a time; more get 429."""

    body_bytes: int = 16 << 20
    prompts: int = 1024
    choices: int = 128
    schema_depth: int = 32
    requests: int = 4096

    def __post_init__(self) -> None:
        names = ("body_bytes", "prompts", "choices", "schema_depth", "requests")
        require_at_least(1, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """`models`: names that clients may use, the first one is what answers say. Seconds: `request_timeout` for each
    request (None: none), `heartbeat` between comments in a stream that has nothing to say, `grace` for streams when
    the server is told to stop. `keys`: of which a client has to have one; none: no key is asked for. `isolate_keys`:
    clients with different keys share no cached prefix. `vllm_metrics`: /metrics has vLLM's names, too."""

    models: tuple[str, ...]
    keys: tuple[str, ...] = field(default=(), repr=False)
    isolate_keys: bool = False
    request_timeout: float | None = None
    heartbeat: float = 15.0
    grace: float = 30.0
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    vllm_metrics: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.models or not all(self.models):
            raise ConfigError("a server needs a name for its model; pass models=('name',)")
        for name in ("heartbeat", "grace"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be a number of seconds above 0")
        object.__setattr__(self, "_digests", [_digest(key) for key in self.keys])

    def knows(self, key: str) -> bool:
        """Whether that is one of the keys; takes as long for one as for another."""
        given, found = _digest(key), False
        for digest in self._digests:  # type: ignore[attr-defined]  # set above, of a frozen class
            found |= hmac.compare_digest(given, digest)
        return found

    def salt_of(self, authorization: str, cache_salt: str | None) -> str | None:
        """The cache salt of a request that came with that header and asks for `cache_salt`."""
        if not self.isolate_keys:
            return cache_salt
        client = _digest(authorization.partition(" ")[2].strip()).hex()
        return client if cache_salt is None else f"{client}/{cache_salt}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; lines that begin with # are comments. ConfigError without any."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path} has no key; write one a line")
    return keys
