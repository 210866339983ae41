"""A file of requests in OpenAI's batch form, answered by the routes of the server, without HTTP.

An output line bears the number and a hash of its input line. So a job that was stopped, or killed while it wrote, goes
on with what has no answer yet; a row is answered once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, NamedTuple

import msgspec
import xxhash
from starlette.types import ASGIApp, Message

from rayk.cluster import Cluster
from rayk.errors import ConfigError
from rayk.params import require_at_least
from rayk.quantity import show_seconds
from rayk.server.app import application
from rayk.server.settings import ServerSettings

log = logging.getLogger("rayk.server")

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
AGAIN = (429, 499, 500, 503)  # statuses that say nothing about the row
SAY_EVERY = 5.0  # seconds between two lines of progress
LONGEST_WAIT = 30.0


class Row(NamedTuple):
    """A line of the input; `name` is the output line's id."""

    name: str
    line: bytes


class Batch:
    """One job. ConfigError where the input cannot be read, or the output is another job's."""

    def __init__(self, given: Path, output: Path, tries: int = 3) -> None:
        require_at_least(1, tries=tries)
        self._input = given
        self._output = output
        self._tries = tries
        self._rows = sum(1 for _ in self._lines())
        self._done, self._failed = self._answered()
        self._tokens = 0

    def _lines(self) -> Iterator[Row]:
        try:
            with self._input.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield Row(f"batch_req_{number}_{xxhash.xxh3_64_hexdigest(line.strip())}", line)
        except OSError as error:
            raise ConfigError(f"{self._input} cannot be read ({error.strerror}); give a file of JSON lines") from None

    def _answered(self) -> tuple[set[str], int]:
        """Rows with an answer, and how many of these failed. What was written of a line that is not whole is cut."""
        done, failed, whole = set[str](), 0, 0
        if not self._output.exists():
            return done, 0
        with self._output.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    found = msgspec.json.decode(line)
                    done.add(found["id"])
                    failed += found["error"] is not None
                except (msgspec.DecodeError, KeyError, TypeError):
                    raise ConfigError(
                        f"{self._output} has lines that are no answers; name another file for --output"
                    ) from None
                whole += len(line)
        known = {row.name for row in self._lines()}
        if done - known:
            raise ConfigError(f"{self._output} has answers to other requests than {self._input} has; name another file")
        os.truncate(self._output, whole)
        return done, failed

    def run(self, cluster: Cluster, settings: ServerSettings, concurrency: int) -> dict[str, Any]:
        """Answer what has no answer yet; how it went."""
        began, before = monotonic(), len(self._done)
        app = application(cluster, settings)
        with self._output.open("ab") as output:
            try:
                with suppress(KeyboardInterrupt):
                    asyncio.run(self._run(app, output, concurrency, began))
            finally:
                output.flush()
                os.fsync(output.fileno())
        seconds, answered = monotonic() - began, len(self._done) - before
        left = self._rows - len(self._done)
        log.info(
            "%d rows answered in %s, %d failed of all, %d left", answered, show_seconds(seconds), self._failed, left
        )
        return {
            "rows": self._rows,
            "answered": answered,
            "before": before,
            "failed": self._failed,
            "left": left,
            "seconds": seconds,
            "generated_tokens": self._tokens,
        }

    async def _run(self, app: ASGIApp, output: BinaryIO, concurrency: int, began: float) -> None:
        rows = (row for row in self._lines() if row.name not in self._done)
        before, said = len(self._done), began

        async def work() -> None:
            nonlocal said
            for row in rows:  # all workers take from one iterator
                answer = await self._answer(app, row)
                output.write(msgspec.json.encode(answer) + b"\n")
                output.flush()
                self._done.add(row.name)
                self._failed += answer["error"] is not None
                if monotonic() - said >= SAY_EVERY:
                    said = monotonic()
                    self._say(said - began, len(self._done) - before)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, max(1, self._rows - before))):
                group.create_task(work())

    def _say(self, seconds: float, answered: int) -> None:
        rate, left = answered / seconds, self._rows - len(self._done)
        log.info(
            "%d of %d rows, %.1f rows/s, %.0f tokens/s, %s left",
            len(self._done), self._rows, rate, self._tokens / seconds, show_seconds(left / rate),
        )  # fmt: skip

    async def _answer(self, app: ASGIApp, row: Row) -> dict[str, Any]:
        """The output line of a row."""
        made: dict[str, Any] = {"id": row.name, "custom_id": None, "response": None, "error": None}
        try:
            asked = msgspec.json.decode(row.line)
            made["custom_id"] = asked.get("custom_id")
            url, body = asked.get("url"), asked.get("body")
            if asked.get("method", "POST") != "POST" or url not in URLS or not isinstance(body, dict):
                raise ValueError(f"a row has method POST, a url of {', '.join(URLS)}, and a body")
            if body.get("stream"):
                raise ValueError("stream: the answers of a batch come whole")
        except (ValueError, AttributeError, RecursionError, UnicodeDecodeError) as error:
            said = "the line is no JSON object" if isinstance(error, AttributeError) else str(error)
            return made | {"error": {"code": "invalid_row", "message": said}}
        data = msgspec.json.encode(body)
        status, headers, answer = await _post(app, url, data)
        for attempt in range(1, self._tries):
            if status not in AGAIN:
                break
            await asyncio.sleep(min(float(headers.get(b"retry-after", 2.0**attempt)), LONGEST_WAIT))
            status, headers, answer = await _post(app, url, data)
        found = msgspec.json.decode(answer or b'{"error": {"code": "no_answer", "message": "there was no answer"}}')
        made["response"] = {
            "status_code": status,
            "request_id": headers.get(b"x-request-id", b"").decode(),
            "body": found,
        }
        if status != 200:
            made["error"] = {"code": found["error"]["code"] or str(status), "message": found["error"]["message"]}
        else:
            usage = found["usage"]
            self._tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        return made


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of a POST to an application in this process."""
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers, parts = 500, dict[bytes, bytes](), list[bytes]()
    never = asyncio.Event()

    async def receive() -> Message:
        if not requests:
            await never.wait()  # nobody goes away
        return requests.pop()

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # of a route: Starlette has answered, and raises it once more for whoever serves
        log.exception("a row failed")
    return status, headers, b"".join(parts)
