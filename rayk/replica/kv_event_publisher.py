"""What a replica caches and drops, published over ZeroMQ for routers that listen to vLLM.

The protocol is that of vLLM's ZmqEventPublisher. A PUB socket sends [topic, number, batch]: the number is 8 bytes, big
endian, from 0 on, and the batch is as in rayk.protocol.kv_events. A subscriber that misses numbers asks a ROUTER socket
for them: [empty, first number] is answered by [empty, topic, number, batch] for each batch that is still kept, then
[empty, empty, -1, empty]. One that comes late asks another ROUTER socket with [empty, b"snapshot"]: the answer is
[empty, last number, publisher id, batch ..], and with snapshots an empty batch is sent in each idle second.

A listener of the prefix tree notes changes, and a thread of its own encodes and sends them: the replica never waits,
for subscribers least of all. PUB drops what a slow one does not take: it sees the gap and asks. Batch 0 begins with
AllBlocksCleared; so does what follows when the thread itself is too far behind and changes were dropped.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock, Thread, current_thread
from typing import Any, Final, NamedTuple
from uuid import uuid4

import numpy as np

from rayk.errors import ConfigError
from rayk.kvcache.page_hash import KEY_BYTES, PageHash, PageHasher, RootKey
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.replica import ReplicaCore
from rayk.params import require
from rayk.protocol import kv_events as wire
from rayk.protocol.kv_events import Event, EventBatch, KVEventsConfig, endpoint_of

log = logging.getLogger("rayk.replica")

END: Final = (-1).to_bytes(8, "big", signed=True)
MOST_WAITING = 1 << 18  # pages whose changes are noted and not yet sent
MOST_KEPT = 256 << 20  # bytes of batches for subscribers that missed them
TOGETHER = 1024  # events in a batch of a snapshot
HEARTBEAT_MS = 1000
REBIND_SECONDS = 1.0  # a socket that was closed gives its port back a little later


class _Stored(NamedTuple):
    """What the tree said of pages that it cached."""

    root: RootKey
    parent: PageHash
    hashes: Sequence[PageHash]
    tokens: bytes


Change = _Stored | Sequence[PageHash] | None  # stored, removed, or all cleared


def checked(config: str | KVEventsConfig | None, caches: bool, replicas: int) -> KVEventsConfig | None:
    """What a user asked for, of so many replicas; ConfigError where it cannot be done."""
    if config is None:
        return None
    config = KVEventsConfig(config) if not isinstance(config, KVEventsConfig) else config
    require(caches, "kv_events tell what is cached, which is nothing without prefix caching; turn it on, or leave them")
    config.check_replicas(replicas)
    _zmq()
    return config


def publish_events(core: ReplicaCore, config: KVEventsConfig | None) -> None:
    """Publish what a replica caches until it is shut down. Before any request."""
    if config is not None:
        publisher = KVEventPublisher(config, core.replica, core.page_size, core.exports.hasher)
        core.listen(publisher, publisher.close)


def _zmq() -> Any:
    try:
        import zmq
    except ImportError:
        raise ConfigError("publishing cache events needs pyzmq; pip install 'rayk[events]'") from None
    return zmq


class KVEventPublisher:
    """A PageListener. Its changes may come from any thread, one at a time. close() frees the ports."""

    def __init__(
        self,
        config: KVEventsConfig,
        replica: int,
        page_size: int,
        hasher: PageHasher,
        clock: Callable[[], float] = time.time,
    ) -> None:
        zmq = _zmq()
        self._config, self._replica, self._page_size, self._clock = config, replica, page_size, clock
        self._root_hash = lru_cache(4096)(hasher.root)
        self._topic = config.topic.encode()
        self._id = uuid4().bytes if config.snapshot_endpoint is not None else None
        self._lock = Lock()
        self._changes: list[Change] = [None]
        self._waiting = 0  # pages in `_changes`
        self._cached = 0  # pages
        self._closing = False
        self._number = 0  # of the next batch
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._mirror: dict[int, tuple[RootKey, int | None, bytes]] = {}  # for snapshots; parents before children
        self._sockets: list[Any] = []
        self._poller = zmq.Poller()
        try:
            self._pub = self._bound(zmq.PUB, config.endpoint, config.buffer_steps // 2)  # of it, the rest can be asked
            self._replay = self._bound(zmq.ROUTER, config.replay_endpoint, config.buffer_steps + 1)
            self._snapshots = self._bound(zmq.ROUTER, config.snapshot_endpoint, 2)
            name = f"inproc://rayk-{uuid4().hex}"
            self._bound(zmq.PULL, name)
            self._wake = self._socket(zmq.PUSH)
            self._wake.connect(endpoint_of(name, replica))
        except BaseException:
            self._end()
            raise
        self._thread = Thread(target=self._run, name=f"rayk-kv-events-{replica}", daemon=True)
        self._thread.start()

    def _socket(self, kind: int) -> Any:
        zmq = _zmq()
        socket = zmq.Context.instance().socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        self._sockets.append(socket)
        return socket

    def _bound(self, kind: int, endpoint: str | None, most: int = 0) -> Any:
        """A socket where at most so many messages wait for each reader; None without an endpoint."""
        if endpoint is None:
            return None
        zmq, socket = _zmq(), self._socket(kind)
        socket.setsockopt(zmq.SNDHWM, most)
        endpoint, deadline = endpoint_of(endpoint, self._replica), time.monotonic() + REBIND_SECONDS
        while True:
            try:
                socket.bind(endpoint)
                break
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                    raise ConfigError(
                        f"replica {self._replica} cannot publish cache events at {endpoint}: {error}; name another one"
                    ) from None
                time.sleep(0.02)
        if kind != zmq.PUB:
            self._poller.register(socket, zmq.POLLIN)
        return socket

    # -- what the tree tells -----------------------------------------------------------------------

    def stored(self, root: RootKey, parent: PageHash, hashes: Sequence[PageHash], pages: Pages, tokens: bytes) -> None:
        """See PageListener."""
        self._cached += len(hashes)
        self._note(_Stored(root, parent, hashes, tokens), len(hashes))

    def removed(self, hashes: Sequence[PageHash]) -> None:
        """See PageListener."""
        self._cached -= len(hashes)
        self._note(hashes, len(hashes))

    def _note(self, change: Change, pages: int) -> None:
        with self._lock:
            if self._closing:
                return
            idle = not self._changes
            self._waiting += pages
            if not self._cached or self._waiting > MOST_WAITING:
                self._changes, self._waiting = [None], 0
            else:
                self._changes.append(change)
            if idle:
                self._wake.send(b"")

    def close(self) -> None:
        """Send what was noted and close the sockets; may be repeated."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._wake.send(b"")
        if self._thread is not current_thread():
            self._thread.join()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            idle = False
            while self._turn(idle):
                idle = not self._answer()
        except Exception:
            log.exception("replica %d publishes no more cache events", self._replica)
        with self._lock:
            self._closing, self._changes = True, []
            self._end()

    def _end(self) -> None:
        for socket in self._sockets:
            socket.close()

    def _turn(self, idle: bool) -> bool:
        """Send what was noted; False when that was the last."""
        with self._lock:
            closing, changes = self._closing, self._changes
            self._changes, self._waiting = [], 0
        if changes or (idle and self._id is not None):
            self._publish([self._event(change) for change in changes])
        return not closing

    def _answer(self) -> bool:
        """Wait for changes and questions, and answer these; False when nothing came for a second."""
        ready = self._poller.poll(None if self._id is None else HEARTBEAT_MS)
        for socket, _ in ready:
            frames = socket.recv_multipart()
            if socket is self._replay and len(frames) == 3 and len(frames[2]) == 8:
                first = int.from_bytes(frames[2], "big")
                for number, batch in self._kept:
                    if number >= first:
                        socket.send_multipart([frames[0], b"", self._topic, number.to_bytes(8, "big"), batch])
                socket.send_multipart([frames[0], b"", b"", END, b""])
            elif socket is self._snapshots and frames[1:] == [b"", b"snapshot"]:
                last = (self._number - 1).to_bytes(8, "big", signed=True)
                socket.send_multipart([frames[0], b"", last, self._id, *self._snapshot()])
        return bool(ready)

    def _publish(self, events: list[Event]) -> None:
        number, self._number = self._number, self._number + 1
        batch = self._encoded(events)
        if self._replay is not None:
            self._kept.append((number, batch))
            self._kept_bytes += len(batch)
            while len(self._kept) > self._config.buffer_steps or self._kept_bytes > MOST_KEPT:
                self._kept_bytes -= len(self._kept.popleft()[1])
        self._pub.send_multipart([self._topic, number.to_bytes(8, "big"), batch])

    def _encoded(self, events: list[Event]) -> bytes:
        return wire.encode(EventBatch(self._clock(), events, self._replica, self._id), self._config.arrays)

    def _event(self, change: Change) -> Event:
        if change is None:
            self._mirror.clear()
            return wire.AllBlocksCleared()
        if not isinstance(change, _Stored):
            keys = [_key(each) for each in change]
            if self._id is not None:
                for key in keys:
                    self._mirror.pop(key, None)
            return wire.removed(keys)
        root, keys = change.root, [_key(each) for each in change.hashes]
        parent = None if change.parent == self._root_hash(root) else _key(change.parent)
        if self._id is not None:
            size = self._page_size * 4
            for at, key in enumerate(keys):
                page = change.tokens[at * size : (at + 1) * size]
                self._mirror[key] = root, keys[at - 1] if at else parent, page
        return self._stored(root, parent, keys, change.tokens)

    def _stored(self, root: RootKey, parent: int | None, keys: list[int], tokens: bytes) -> Event:
        salt, adapter = root
        numbers = np.frombuffer(tokens, "<i4").tolist()
        return wire.stored(keys, parent, self._page_size, numbers, adapter, salt)

    def _snapshot(self) -> list[bytes]:
        """Batches of all that is cached, each run of pages an event."""
        runs: list[tuple[RootKey, int | None, list[int], list[bytes]]] = []
        for key, (root, parent, page) in self._mirror.items():
            if parent is None or not runs or parent != runs[-1][2][-1]:
                runs.append((root, parent, [], []))
            runs[-1][2].append(key)
            runs[-1][3].append(page)
        events = [self._stored(root, parent, keys, b"".join(pages)) for root, parent, keys, pages in runs]
        return [self._encoded(events[at : at + TOGETHER]) for at in range(0, len(events), TOGETHER)]


def _key(page_hash: bytes) -> int:
    """Consumers may know numbers of 64 bits only; the same that rayk's own index goes by."""
    return int.from_bytes(page_hash[:KEY_BYTES], "little")
