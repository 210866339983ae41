"""The end of the data plane in an actor: takes messages from sockets, and sends the answers back.

It listens on a Unix socket (0600, in a folder of this user's, 0700) and on a TCP port of the node's address, for
processes of other nodes. A connection has a thread, which answers one message after the other, in order; with more
`threads` they are answered as soon as one is free, in any order. What a process that was killed left in the folder
goes when the next one listens there.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Condition, Lock, Thread

import psutil

from rayk.actors.frames import KEY_BYTES, FrameReader, SocketError, admit, pieces, watch_link
from rayk.actors.interface import SocketAddress

log = logging.getLogger("rayk.actors")

CONNECTIONS = 1024  # at a time
HANDSHAKE_SECONDS = 5.0
SEND_SECONDS = 30.0  # for the other side to take what is sent; after that it is cut off
_TIMEVAL = struct.Struct("@ll")


class Listener:
    """`answer` takes a message and gives its answer; it must not raise. `host`: the node's address."""

    def __init__(self, answer: Callable[[bytes], bytes], host: str, threads: int = 1) -> None:
        self._answer = answer
        self._pool = ThreadPoolExecutor(threads, "rayk-answers") if threads > 1 else None
        self._lock = Condition()  # of the next three
        self._awaited = 0  # threads in handled()
        self._connections: dict[bytes, _Connection] = {}
        self._open = True
        key = os.urandom(KEY_BYTES)
        self._path = _folder() / f"{os.getpid()}-{os.urandom(6).hex()}"
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        local.bind(str(self._path))
        os.chmod(self._path, 0o600)
        self._ends, port = [local], 0
        with suppress(OSError):  # no such address here: for this machine only
            remote = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            port = remote.getsockname()[1]
            self._ends.append(remote)
        self.address = SocketAddress(machine(), str(self._path), host, port, key)
        for end in self._ends:
            end.listen(128)
            Thread(target=self._accept, args=(end,), name="rayk-accept", daemon=True).start()

    def handled(self, label: bytes, count: int, seconds: float) -> bool:
        """Wait until so many messages of that connection were answered, or it is closed; whether that was in time."""
        with self._lock:
            connection = self._connections.get(label)
            if connection is None:
                return True
            self._awaited += 1
            try:
                return self._lock.wait_for(lambda: connection.handled >= count or connection.closed, seconds)
            finally:
                self._awaited -= 1

    def close(self) -> None:
        """Listen no more, and cut what is connected."""
        with self._lock:
            self._open = False
            connections = list(self._connections.values())
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for connection in connections:
            connection.close()
        with suppress(OSError):
            self._path.unlink()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _accept(self, end: socket.socket) -> None:
        while self._open:
            try:
                accepted, _ = end.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                    time.sleep(0.05)
                    continue
                return
            Thread(target=self._serve, args=(accepted,), name="rayk-socket", daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        try:
            end.settimeout(HANDSHAKE_SECONDS)
            if end.family != socket.AF_UNIX:
                watch_link(end)
            if len(self._connections) >= CONNECTIONS:
                raise SocketError(f"there are {CONNECTIONS} connections already")
            label = admit(end, self.address.key)
            end.settimeout(None)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(SEND_SECONDS), 0))
        except (OSError, SocketError) as error:
            log.debug("a connection is refused: %s", error)
            end.close()
            return
        connection = _Connection(end)
        with self._lock:
            self._connections[label] = connection
            if not self._open:
                connection.close()
        try:
            self._read(connection)
        finally:
            connection.close()
            with self._lock:
                self._connections.pop(label, None)
                self._lock.notify_all()

    def _read(self, connection: _Connection) -> None:
        reader, end = FrameReader(), connection.end
        while not connection.closed:
            try:
                messages = reader.receive(end)
            except (OSError, SocketError):
                return
            for number, wire in messages:
                if self._pool is None:
                    self._reply(connection, number, wire)
                else:
                    self._pool.submit(self._reply, connection, number, wire)

    def _reply(self, connection: _Connection, number: int, wire: bytes) -> None:
        try:
            answer = self._answer(wire)
        except BaseException:  # the other side sends it again by a call, which says what it was
            log.exception("a message could not be answered")
            connection.close()
            return
        finally:
            connection.handled += 1
            if self._awaited:  # whoever begins to wait looks for itself
                with self._lock:
                    self._lock.notify_all()
        connection.send(number, answer)


class _Connection:
    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.closed = False
        self.handled = 0
        self._sending = Lock()

    def send(self, number: int, wire: bytes) -> None:
        try:
            for piece in pieces(number, wire):
                with self._sending:
                    self.end.sendall(piece)
        except (OSError, SocketError):  # it is gone, or takes nothing
            self.close()

    def close(self) -> None:
        self.closed = True
        with suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)
        self.end.close()


def listening(answer: Callable[[bytes], bytes], host: str, threads: int = 1) -> Listener | None:
    """A listener; None, with a warning, where there can be none."""
    try:
        return Listener(answer, host, threads)
    except OSError as error:
        log.warning("no socket can be listened on (%s): messages come by calls", error.strerror or error)
        return None


def machine() -> str:
    """A name for what has the same files and processes: this start of the kernel, and its namespaces."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/mnt').st_ino}"
    return socket.gethostname()


def socket_folder() -> Path:
    """Where this user's sockets are."""
    return Path(tempfile.gettempdir()) / f"rayk-sockets-{os.getuid()}"


def _folder() -> Path:
    """The folder of this user's sockets, made if need be, without those of processes that are gone."""
    folder = socket_folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise OSError(errno.EPERM, f"{folder} belongs to another user")
    os.chmod(folder, 0o700)
    sweep(folder=folder)
    return folder


def sweep(ended: Iterable[str] = (), folder: Path | None = None) -> None:
    """Remove sockets of processes that are gone, also those that `ended` just now."""
    folder = folder or socket_folder()
    over = {Path(path) for path in ended}
    for path in folder.glob("*-*"):
        pid = path.name.partition("-")[0]
        if path in over or (pid.isdigit() and not psutil.pid_exists(int(pid))):
            with suppress(OSError):
                path.unlink()
