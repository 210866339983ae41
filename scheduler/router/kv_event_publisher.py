"""Cache events over ZeroMQ, so that routers which listen to vLLM can listen to rayk.

The protocol is that of vLLM's ZmqEventPublisher. A PUB socket sends [topic, number, batch]: the number is 8 bytes, big
endian, from 0 on; the batch is as in events.py. A subscriber that misses numbers asks a ROUTER socket for them: [empty,
first number] is answered by [empty, number, batch] for each batch that is still kept, then [empty, -1, empty].

PUB never waits for a slow subscriber: it drops, the subscriber sees the gap and asks. What is kept is bounded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Final

from rayk.errors import ConfigError
from rayk.scheduler.router.kv_events import Event, EventBatch, Layout, encode

END: Final = (-1).to_bytes(8, "big", signed=True)
POLL_MS = 50  # how long close() may have to wait for the replay thread


def endpoint_of(endpoint: str, replica: int) -> str:
    """Where replica `replica` publishes when replica 0 publishes at `endpoint`: that many ports on, as with vLLM."""
    if endpoint.startswith("tcp://"):
        host, _, port = endpoint.rpartition(":")
        if not port.isdecimal():
            raise ConfigError(f"event endpoint {endpoint!r} has no port; write it like tcp://*:5557")
        return f"{host}:{int(port) + replica}"
    return endpoint if not replica else f"{endpoint}_dp{replica}"


class EventPublisher:
    """Publishes the events of one replica at `endpoint` (bound here; port * takes any) and answers for the last `kept`
    batches at `replay_endpoint`. A context manager; close() frees the ports. One thread may publish at a time."""

    def __init__(
        self,
        endpoint: str,
        replica: int = 0,
        *,
        replay_endpoint: str | None = None,
        topic: str = "kv-events",
        layout: Layout = Layout.array,
        kept: int = 10_000,
        clock: Callable[[], float] = time.time,
        context: Any = None,
    ) -> None:
        try:
            import zmq
        except ImportError:
            raise ConfigError("publishing cache events needs pyzmq; pip install 'rayk[events]'") from None
        self._zmq = zmq
        self._replica, self._topic, self._layout, self._clock = replica, topic.encode(), layout, clock
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self._lock = Lock()
        self._next = 0
        self._closing = False
        self._thread: Thread | None = None
        self._pub: Any = None
        self._router: Any = None
        context = context or zmq.Context.instance()
        try:
            self._pub, self.endpoint = self._bound(context, zmq.PUB, endpoint)
            if replay_endpoint is not None:
                self._router, self.replay_endpoint = self._bound(context, zmq.ROUTER, replay_endpoint)
        except ConfigError:
            self.close()
            raise
        if self._router is not None:
            self._thread = Thread(target=self._replay, name="rayk-events", daemon=True)
            self._thread.start()

    def _bound(self, context: Any, kind: int, endpoint: str) -> tuple[Any, str]:
        """A socket, and the endpoint that it is really bound to."""
        socket = context.socket(kind)
        socket.setsockopt(self._zmq.LINGER, 0)
        try:
            socket.bind(endpoint)
        except self._zmq.ZMQError as error:
            socket.close()
            raise ConfigError(
                f"cache events cannot be published at {endpoint}: {error}; name another endpoint"
            ) from None
        return socket, socket.getsockopt_string(self._zmq.LAST_ENDPOINT)

    def publish(self, events: Sequence[Event]) -> int:
        """Send one batch, never waiting for anybody; its number."""
        number = self._next
        self._next += 1
        payload = encode(EventBatch(self._clock(), list(events), self._replica), self._layout)
        with self._lock:
            self._kept.append((number, payload))
        self._pub.send_multipart([self._topic, number.to_bytes(8, "big"), payload])
        return number

    def _replay(self) -> None:
        while not self._closing:
            if self._router.poll(POLL_MS):
                self._answer(self._router.recv_multipart())
        self._router.close()

    def _answer(self, frames: list[bytes]) -> None:
        """Send a subscriber the batches from the number on that it asks for; what is no question gets no answer."""
        if len(frames) != 3 or len(frames[2]) != 8:
            return
        client, first = frames[0], int.from_bytes(frames[2], "big")
        with self._lock:
            missed = [(number, payload) for number, payload in self._kept if number >= first]
        for number, payload in missed:
            self._router.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
        self._router.send_multipart([client, b"", END, b""])

    def close(self) -> None:
        """Close the sockets; may be repeated."""
        self._closing = True
        if self._thread is not None:
            self._thread.join()
        elif self._router is not None:
            self._router.close()
        if self._pub is not None:
            self._pub.close()

    def __enter__(self) -> EventPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
