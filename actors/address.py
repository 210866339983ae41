"""Where a Ray cluster is reached, and where an embedded one keeps its files: looked at before Ray is asked.

Ray itself tries for half a minute where nobody answers, and for ever where something else does.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayk.errors import ConfigError

PATIENCE = 5.0  # seconds for a connection, and for the first words
SOCKET_PATH = 107  # bytes that the path of a Unix socket may have
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # of HTTP/2, which gRPC speaks
SETTINGS = 4  # the kind of frame that answers it: byte 3 of 9


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of "host:port"; None for other forms, such as "auto" or "ray://..."."""
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host and port.isdigit() and "/" not in host else None


def same_place(one: str, other: str, own: str) -> bool:
    """Whether two addresses name the same port of the same machine; `own` is this node's."""
    here = {"localhost", "127.0.0.1", socket.gethostname(), own}
    first, second = host_and_port(one), host_and_port(other)
    if first is None or second is None:
        return one == other
    return first[1] == second[1] and (first[0] == second[0] or {first[0], second[0]} <= here)


def knock(address: str) -> None:
    """ConnectionError at once where nobody listens, and soon where it is nothing that speaks as Ray does."""
    target = host_and_port(address)
    if target is None:
        return
    try:
        with socket.create_connection(target, timeout=PATIENCE) as line:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # its first words are not for us
            line.sendall(HELLO)
            said = line.recv(9, socket.MSG_WAITALL)
    except TimeoutError as error:
        raise ConnectionError(f"something is there and says nothing for {PATIENCE:.0f} s") from error
    except OSError as error:
        raise ConnectionError(f"nobody listens there ({error})") from error
    if len(said) < 9 or said[3] != SETTINGS:
        raise ConnectionError("something else than Ray listens there")


def running_address() -> str | None:
    """The cluster that RAY_ADDRESS names, or the one that `ray start` recorded here if it still answers, or None."""
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return named
    recorded = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        address = recorded.read_text().strip()
        knock(address)
        return address or None
    except (OSError, OverflowError):  # no record, or of a cluster that is gone
        return None


def refusal(address: str) -> str:
    """Why a cluster that answers does not let this process in, and the way out; without the token."""
    mode = os.environ.get("RAY_AUTH_MODE")
    own = "it is not set here" if mode is None else f"it is {mode!r} here"
    if mode is not None and mode.lower() == "token":
        given = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
        own = f"{given[0]} here has another" if given else "RAY_AUTH_TOKEN is not set here"
    return (
        f"the Ray cluster at {address!r} asks for a token (RAY_AUTH_MODE=token), and {own}; set RAY_AUTH_MODE=token, "
        "and RAY_AUTH_TOKEN to the token that the cluster was started with"
    )


def make_temp_dir() -> str:
    """A new folder for an embedded Ray, in RAY_TMPDIR or where temporary files go. ConfigError unless it can be made
    and leaves room for the names of Ray's sockets."""
    named = os.environ.get("RAY_TMPDIR")
    where = named or tempfile.gettempdir()
    what = f"RAY_TMPDIR={where!r}" if named else f"the folder for temporary files, {where!r},"
    socket_name = f"/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    room = SOCKET_PATH - len(socket_name) - len("/rayk-01234567")
    size = len(os.fsencode(os.path.abspath(where)))
    if size > room:
        reason = f"{what} is {size} bytes long, and the names of Ray's sockets leave room for {room}"
        raise ConfigError(f"{reason}; set RAY_TMPDIR to a shorter path, such as /tmp")
    try:
        return tempfile.mkdtemp(prefix="rayk-", dir=where)
    except OSError as error:
        reason = f"{what} cannot hold Ray's files ({error.strerror})"
        raise ConfigError(f"{reason}; set RAY_TMPDIR to a folder that exists and can be written") from None


@contextmanager
def unheard() -> Iterator[None]:
    """What this process writes to stderr meanwhile, from below Python too, is shown only if nothing was raised."""
    sys.stderr.flush()
    own = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
        heard.seek(0)
        os.write(2, heard.read())
