"""What the routes of one server share: its Cluster, what is open, and whether it is being stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rayk.cluster import Cluster
from rayk.server.answers import Answers, Mailbox
from rayk.server.errors import HttpError
from rayk.server.metrics import ServerMetrics
from rayk.server.parsing import parsers
from rayk.server.settings import ServerSettings

T = TypeVar("T")


class Service:
    """One server over `cluster`, which it does not close."""

    def __init__(self, cluster: Cluster, settings: ServerSettings) -> None:
        self.cluster = cluster
        self.settings = settings
        self.metrics = ServerMetrics(settings.models[0] if settings.vllm_metrics else None)
        self.streams: set[Answers] = set()
        self.draining = False
        self.parser = parsers(settings.tool_parser, settings.reasoning_parser)
        self.plain_parser = parsers(None, settings.reasoning_parser)
        self.tokenizer = cluster.tokenizer if cluster.facts[0].has_tokenizer else None
        self._threads = ThreadPoolExecutor(1, "rayk-submit")  # one: requests are placed in the order of their arrival
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}

    def mailbox(self) -> Mailbox:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._mailboxes:
            self._mailboxes = {known: box for known, box in self._mailboxes.items() if not known.is_closed()}
            self._mailboxes[loop] = Mailbox()
            self.cluster.deliver_in(loop.call_soon_threadsafe)
        return self._mailboxes[loop]

    async def submit(self, call: Callable[[], T]) -> T:
        """Have the Cluster take requests. Not in the event loop where that may wait for another process."""
        if self.cluster.inline:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    @property
    def ready(self) -> bool:
        """Whether a request would be taken and placed."""
        return not self.draining and "ready" in self.cluster.replica_states()

    def check_model(self, name: str | None) -> str:
        """The name that the answer has; HttpError 404 for another model."""
        if name and name not in self.settings.models:
            known = ", ".join(self.settings.models)
            message = f"the model {name!r:.200} is not served here; there is {known}"
            raise HttpError(404, message, "model", "model_not_found")
        return name or self.settings.models[0]

    def check_open(self) -> None:
        """HttpError while no more requests are taken."""
        if self.draining:
            raise self.unavailable()
        limit = self.settings.limits.requests
        if len(self.streams) >= limit:
            message = f"{limit} requests are open here; try again later"
            raise HttpError(429, message, code="too_many_requests", retry_after=1.0)

    def unavailable(self) -> HttpError:
        """What is said while the server is being stopped."""
        return HttpError(503, "this server is being stopped; send it elsewhere", None, "draining", self.settings.grace)

    def timeout(self, asked: float | None) -> float | None:
        """Seconds that a request may take."""
        return min(filter(None, (asked, self.settings.request_timeout)), default=None)

    async def drain(self) -> None:
        """Take no more requests, and wait until those that are open are over: after `grace` seconds they are ended."""
        self.draining = True
        try:
            async with asyncio.timeout(self.settings.grace):
                while self.streams:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            for answers in list(self.streams):
                answers.stop(self.unavailable())
        finally:
            self.cluster.deliver_in(None)  # this loop may end
