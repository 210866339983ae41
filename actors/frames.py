"""Messages on a socket: numbered, in pieces, and who may send them.

    bytes   what
    4       bytes of this piece, little-endian
    8       the message's number; its answer has the same
    1       1 when more pieces of it follow, else 0
    ..      the piece

A long message goes in pieces, so that others on the same socket pass between them. Before the first message both ends
show that they know the key of the socket (HMAC-SHA256 over two fresh numbers), without sending it. Nothing that comes
from a socket is unpickled.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from collections.abc import Iterator

HEADER = struct.Struct("<IQB")
PIECE = 1 << 18  # bytes of a message at a time
LONGEST = 1 << 31  # of a message
UNFINISHED = 64  # messages of which pieces are missing, at a time
KEY_BYTES = 32
_NONCE = 32
_LABEL = 8  # of a connection
LINK_SECONDS = 5.0  # after which a network that carries nothing any more counts as cut


class SocketError(Exception):
    """A socket that does not carry messages (any more); the argument says why."""


def watch_link(end: socket.socket) -> None:
    """Have a TCP socket fail when the network between its ends is cut: a node that is lost closes nothing, and the
    kernel's own patience is a quarter of an hour. What was sent has to be acknowledged within LINK_SECONDS, and a
    silent end is asked every second whether it is there."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, int(LINK_SECONDS)))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LINK_SECONDS * 1e3))


def pieces(number: int, wire: bytes) -> Iterator[bytes]:
    """A message as it goes over a socket."""
    if len(wire) <= PIECE:
        yield HEADER.pack(len(wire), number, 0) + wire
        return
    if len(wire) > LONGEST:
        raise SocketError(f"a message of {len(wire)} bytes is longer than {LONGEST}")
    view = memoryview(wire)
    for at in range(0, len(wire), PIECE):
        part = view[at : at + PIECE]
        yield HEADER.pack(len(part), number, at + PIECE < len(wire)) + part


class FrameReader:
    """Takes what a socket brings, and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray(HEADER.size + PIECE)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0  # of what was not taken yet
        self._parts: dict[int, list[bytes]] = {}
        self._sizes: dict[int, int] = {}

    def receive(self, end: socket.socket, flags: int = 0) -> list[tuple[int, bytes]]:
        """Read once, with those flags of recv(): the messages that are whole now. SocketError at the end of the stream,
        or when what came is no message; BlockingIOError as the socket raises it."""
        if self._end == len(self._buffer):
            self._buffer[: self._end - self._begin] = self._view[self._begin : self._end]
            self._begin, self._end = 0, self._end - self._begin
        got = end.recv_into(self._view[self._end :], 0, flags)
        if not got:
            raise SocketError("the other side closed it")
        self._end += got
        return self._messages()

    def _messages(self) -> list[tuple[int, bytes]]:
        whole: list[tuple[int, bytes]] = []
        while self._end - self._begin >= HEADER.size:
            length, number, more = HEADER.unpack_from(self._buffer, self._begin)
            if length > PIECE or more > 1:
                raise SocketError("what came is no message")
            start = self._begin + HEADER.size
            if self._end - start < length:
                break
            piece = bytes(self._view[start : start + length])
            self._begin = start + length
            if not more and number not in self._parts:
                whole.append((number, piece))
            elif (wire := self._joined(number, piece, bool(more))) is not None:
                whole.append((number, wire))
        if self._begin == self._end:
            self._begin = self._end = 0
        return whole

    def _joined(self, number: int, piece: bytes, more: bool) -> bytes | None:
        parts = self._parts.setdefault(number, [])
        parts.append(piece)
        self._sizes[number] = self._sizes.get(number, 0) + len(piece)
        if self._sizes[number] > LONGEST or len(self._parts) > UNFINISHED:
            raise SocketError("what came is longer than a message can be")
        if more:
            return None
        del self._parts[number], self._sizes[number]
        return b"".join(parts)


# -- who may connect ---------------------------------------------------------------------------------------

# accepting end: nonce. connecting end: label, nonce, proof. accepting end: proof.


def _proof(key: bytes, side: bytes, *seen: bytes) -> bytes:
    return hmac.digest(key, side + b"".join(seen), "sha256")


def admit(end: socket.socket, key: bytes) -> bytes:
    """The accepting end's part: the label of the connection. SocketError for one that does not know the key."""
    nonce = os.urandom(_NONCE)
    end.sendall(nonce)
    said = _exactly(end, _LABEL + _NONCE + 32)
    label, theirs, proof = said[:_LABEL], said[_LABEL:-32], said[-32:]
    if not hmac.compare_digest(proof, _proof(key, b"connect", nonce, theirs, label)):
        raise SocketError("the other side does not know the key")
    end.sendall(_proof(key, b"accept", nonce, theirs, label))
    return label


def introduce(end: socket.socket, key: bytes) -> bytes:
    """The connecting end's part; the label that it took."""
    label, mine = os.urandom(_LABEL), os.urandom(_NONCE)
    nonce = _exactly(end, _NONCE)
    end.sendall(label + mine + _proof(key, b"connect", nonce, mine, label))
    if not hmac.compare_digest(_exactly(end, 32), _proof(key, b"accept", nonce, mine, label)):
        raise SocketError("what answers there does not know the key")
    return label


def _exactly(end: socket.socket, length: int) -> bytes:
    got = b""
    while len(got) < length:
        part = end.recv(length - len(got))
        if not part:
            raise SocketError("the other side closed it before it showed that it knows the key")
        got += part
    return got
