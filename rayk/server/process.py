"""A server as a process: uvicorn, and an end without a broken stream when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from socket import socket
from typing import Any

import uvicorn

from rayk.cluster import Cluster
from rayk.server.app import application
from rayk.server.settings import ServerSettings

log = logging.getLogger("rayk.server")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 4096  # connections that the kernel holds until they are accepted
ACCEPTED = 16  # connections in one pass of the event loop: libuv accepts one by each descriptor that listens
SWITCH_SECONDS = 0.0005  # in which the event loop gets its turn beside an engine in this process
LAST = 5  # seconds for answers that were ended to reach their clients


class Process(uvicorn.Server):
    """A server in its own thread or process. stop() ends it: /ready fails, nothing new is taken, streams go on to their
    ends within the grace time, then run() returns. A second signal does not wait."""

    def __init__(
        self, cluster: Cluster, settings: ServerSettings, host: str, port: int, on_start: Callable[[int], None] | None
    ) -> None:
        app = application(cluster, settings)
        self._service = app.state.service
        self._on_start = on_start
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(
            app, host=host, port=port, lifespan="off", log_config=None, access_log=False, backlog=BACKLOG,
            timeout_graceful_shutdown=LAST, server_header=False,
        )  # fmt: skip
        super().__init__(config)

    def stop(self) -> None:
        """From any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed: it has stopped
                self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        if self._drain is None:
            log.info("stopping: %d open requests have %g s", len(self._service.streams), self._service.settings.grace)
            self._drain = asyncio.ensure_future(self._stop())
        else:
            self.should_exit = self.force_exit = True

    async def _stop(self) -> None:
        await self._service.drain()
        self.should_exit = True

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]  # sockets as they come
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]  # as above
        if not self.started:
            return
        made: Any = self.config.http_protocol_class
        state = {"server_state": self.server_state, "app_state": self.lifespan.state}
        protocol = partial(made, config=self.config, **state)
        for listening in self.servers[0].sockets:
            for _ in range(ACCEPTED - 1):
                again = socket(fileno=os.dup(listening.fileno()))
                self.servers.append(await self._loop.create_server(protocol, sock=again, backlog=BACKLOG))
        if self._on_start is not None:
            self._on_start(self.servers[0].sockets[0].getsockname()[1])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the process by the signal, after it had closed the door at once."""
        before = {}
        with suppress(ValueError):  # not in the main thread: somebody else has the signals
            for each in SIGNALS:
                before[each] = signal.signal(each, lambda number, frame: self.stop())
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


@contextmanager
def starting() -> Iterator[Callable[[], bool]]:
    """SIGTERM waits for the end of what is done here, which Ray cannot be stopped in; what is yielded says whether it
    came. A second one ends the process at once."""
    came = list[int]()

    def note(number: int, frame: object) -> None:
        if came:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        came.append(number)
        log.info("told to stop: it will, when it has started; a second signal does not wait")

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_file_limit() -> int:
    """Have as many sockets open as the system allows this process; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def run(
    cluster: Cluster,
    settings: ServerSettings,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_start: Callable[[int], None] | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT; whether it could begin to. `on_start` is told the port."""
    raise_file_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    process = Process(cluster, settings, host, port, on_start)
    process.run()
    return process.started
