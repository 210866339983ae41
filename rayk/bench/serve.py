"""`rayk bench serve`: what the front door costs, beside bare Starlette that streams the same bytes in the same run, an
event for each token.

Streams are read by this process, and a server is a process of its own, over a model that does nothing. What is measured
is the CPU time of that process, less that of the engine's thread where it has one: the mock engine is not the door's.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple
from urllib.request import urlopen

import msgspec
import psutil
from rich.console import Console

from rayk.bench.flags import LEAST_OF_STARLETTE, LEAST_OF_STARLETTE_RAY, MOST_LATER, ServeBenchFlags
from rayk.cli.flags import Format
from rayk.cli.serve import check_installed
from rayk.cli.table import make_table

START_SECONDS = 120


class ServeRates(msgspec.Struct, frozen=True):
    """Medians over rounds. Rates are tokens per second of a core of the server's process; ttfb in seconds."""

    tokens_per_core_s: float
    bare_tokens_per_core_s: float
    of_bare: float
    of_bare_by_writes: float  # of one that writes what rayk wrote at once, so several tokens where these were ready
    tokens_per_s: float
    chunks: float  # of a stream; the bare one has one for each event
    ttfb_p50: float
    bare_ttfb_p50: float
    rss_bytes: int


class Stream(NamedTuple):
    """What came of one request: seconds to the first byte of its body, and the chunks."""

    first: float
    chunks: list[bytes]


class Round(NamedTuple):
    """All streams of one measurement."""

    streams: list[Stream]
    cpu: float
    seconds: float


def serve(flags: ServeBenchFlags) -> int:
    """Measure and print; with --check, 1 below what is asked."""
    check_installed("rayk bench serve")
    rates = measure(flags)
    least = LEAST_OF_STARLETTE if flags.runtime == "inline" else LEAST_OF_STARLETTE_RAY
    later = rates.ttfb_p50 - rates.bare_ttfb_p50
    good = rates.of_bare >= least and later <= MOST_LATER
    if flags.form == Format.json:
        print(msgspec.json.encode({"command": "bench serve", "rates": rates, "least": least, "good": good}).decode())
    else:
        rows = (
            ("tokens/s of a core", f"{rates.tokens_per_core_s:,.0f}", f"{rates.bare_tokens_per_core_s:,.0f}"),
            ("first byte, p50", f"{rates.ttfb_p50 * 1e3:.1f} ms", f"{rates.bare_ttfb_p50 * 1e3:.1f} ms"),
            ("writes of a stream", f"{rates.chunks:.0f}", f"{flags.tokens + 1}"),
            ("memory", f"{rates.rss_bytes / 2**20:,.0f} MiB", ""),
        )
        title = f"{flags.streams} streams of {flags.tokens} tokens"
        Console().print(make_table(title, ("", "rayk", "bare Starlette"), rows, left=("",)))
        print(f"{rates.of_bare:.2f} of bare Starlette (at least {least}), first byte {later * 1e3:+.1f} ms")
        print(f"{rates.of_bare_by_writes:.2f} of one that writes several events at once, just as rayk did")
    return 0 if good or not flags.check else 1


def measure(flags: ServeBenchFlags) -> ServeRates:
    """Rounds of both, in turns."""
    ours, theirs, by_writes = list[Round](), list[Round](), list[Round]()
    settings = (flags.runtime, str(flags.replicas), str(flags.streams), str(flags.tokens))
    with tempfile.TemporaryDirectory() as folder, _process(*settings) as server:
        file = Path(folder) / "chunks"
        with _process("bare", str(file)) as other:

            def repeat(streams: list[list[bytes]]) -> Round:
                file.write_bytes(msgspec.msgpack.encode(streams))
                urlopen(f"http://127.0.0.1:{other.port}/load").close()
                return asyncio.run(_round(other, flags))

            for _ in range(1 + flags.rounds):
                ours.append(asyncio.run(_round(server, flags)))
                writes = [stream.chunks for stream in ours[-1].streams]
                theirs.append(repeat([_events(b"".join(each)) for each in writes]))
                by_writes.append(repeat(writes))
        rss = server.process.memory_info().rss
    del ours[0], theirs[0], by_writes[0]  # first calls of everything
    tokens = flags.streams * flags.tokens
    rate, bare = (median(tokens / each.cpu for each in rounds) for rounds in (ours, theirs))
    first, bare_first = (median(s.first for each in rounds for s in each.streams) for rounds in (ours, theirs))
    chunks = sum(len(stream.chunks) for each in ours for stream in each.streams) / flags.streams / flags.rounds
    of_bare, of_writes = (
        median(b.cpu / a.cpu for a, b in zip(ours, each, strict=True)) for each in (theirs, by_writes)
    )
    each_s = median(tokens / each.seconds for each in ours)
    return ServeRates(rate, bare, of_bare, of_writes, each_s, chunks, first, bare_first, rss)


def _events(body: bytes) -> list[bytes]:
    """What an application yields that is bare."""
    return [each + b"\n\n" for each in body.split(b"\n\n")[:-1]]


class Server(NamedTuple):
    """A running one. `engine`: the thread of its engine, or 0."""

    process: psutil.Process
    port: int
    engine: int

    def cpu(self) -> float:
        """Seconds so far, to the nanosecond: Linux counts what each thread ran."""
        ran = 0
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            if int(thread.name) != self.engine:
                ran += int((thread / "schedstat").read_text().split()[0])
        return ran / 1e9


@contextmanager
def _process(*arguments: str) -> Iterator[Server]:
    """A server of rayk.bench.served."""
    command = [sys.executable, "-m", "rayk.bench.served", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as started:
        try:
            assert started.stdout is not None
            for line in started.stdout:  # Ray says this and that
                if line.replace(" ", "").strip().isdecimal():
                    yield Server(psutil.Process(started.pid), *map(int, line.split()))
                    break
            else:
                raise RuntimeError(f"{' '.join(command)} did not start")
        finally:
            started.terminate()
            started.wait(START_SECONDS)


async def _round(server: Server, flags: ServeBenchFlags) -> Round:
    """All streams at once, read to their ends."""
    prompt = list(range(10, 10 + flags.prompt))
    body = msgspec.json.encode(
        {
            "model": "mock",
            "prompt": prompt,
            "max_tokens": flags.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
    )
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    before, began = server.cpu(), perf_counter()
    streams = await asyncio.gather(*(_read(server.port, head % len(body) + body) for _ in range(flags.streams)))
    seconds = perf_counter() - began
    return Round(streams, server.cpu() - before, seconds)


async def _read(port: int, request: bytes) -> Stream:
    """One stream, in HTTP's chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        began, first, chunks = perf_counter(), 0.0, list[bytes]()
        writer.write(request)
        status = await reader.readuntil(b"\r\n\r\n")
        if not status.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"a stream was refused: {status[:200]!r}")
        while size := int(await reader.readuntil(b"\r\n"), 16):
            first = first or perf_counter() - began
            chunks.append(await reader.readexactly(size))
            await reader.readexactly(2)
        return Stream(first, chunks)
    finally:
        writer.close()
