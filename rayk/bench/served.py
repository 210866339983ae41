"""A server to measure, as a process of its own: over replicas whose model does nothing, or bare Starlette that streams
bytes as they were.

    python -m rayk.bench.served inline|ray|named REPLICAS STREAMS TOKENS
    python -m rayk.bench.served bare FILE

The first line on stdout has the port and the engine's thread; SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rayk.cluster import Cluster
from rayk.kvcache.runtime_inputs import ShardInputs
from rayk.params import MHAKVCacheParams
from rayk.server.process import run
from rayk.server.settings import ServerSettings
from rayk.session import InferenceSession

PAGE_SIZE = 64
VOCABULARY = 512
WORDS = [f" w{token:03d}" for token in range(VOCABULARY)]


class Words:
    """A tokenizer of four-letter words, at no cost."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join([WORDS[token] for token in ids])


class Nothing:
    """A model that takes no time: always the same token."""

    vocab_size = VOCABULARY
    max_length = 8192
    eos_token_ids = (VOCABULARY - 1,)
    tokenizer = Words()
    backend = "none"

    def __init__(self) -> None:
        self._logits = torch.zeros(0, VOCABULARY)

    def cache_params(self, *, page_size: int, devices: Sequence[str], **more: Any) -> MHAKVCacheParams:
        shape = {"dtype": "int8", "n_kv_heads": 1, "head_dim": 1, "num_layers": 1, "page_size": page_size}
        given = {"data_parallel_degree": len(devices)} | more | shape
        return MHAKVCacheParams(devices=list(devices), **given)

    def logits(self, inputs: ShardInputs, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        if len(self._logits) != len(counts):
            self._logits = torch.zeros(len(counts), VOCABULARY)
            self._logits[:, 7] = 1.0
        return self._logits


def nothing(device: str) -> Nothing:
    """As a Cluster takes a model."""
    return Nothing()


def say(port: int) -> None:
    """Tell the parent the port, and which thread is the engine's (0: none here)."""
    engine = next((thread.native_id for thread in threading.enumerate() if thread.name == "rayk-engine"), 0)
    print(port, engine, flush=True)


def serve(runtime: str, replicas: int, streams: int, tokens: int) -> None:
    """rayk's server."""
    pages = streams * (-(-(tokens + 200) // PAGE_SIZE) + 1)
    with (
        InferenceSession(*(("ray", "local", "served") if runtime == "named" else (runtime,))) as session,
        Cluster(
            nothing, session, replicas=replicas, page_size=PAGE_SIZE, pages=pages, max_batch_size=streams,
            tokenizer=Words(), device="cpu", threads=1,
        ) as cluster,
    ):  # fmt: skip
        run(cluster, ServerSettings(models=("mock",), grace=5.0), port=0, on_start=say)


def bare(file: Path) -> None:
    """Starlette that streams what the file had when it was told to /load it: a list of chunks for each stream, in
    turns."""
    turn = count()
    streams: list[list[bytes]] = []

    async def load(request: Request) -> Response:
        streams[:] = msgspec.msgpack.decode(file.read_bytes(), type=list[list[bytes]])
        return Response()

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in streams[next(turn) % len(streams)]:
            yield chunk
            await asyncio.sleep(0)  # others take turns, as they do where each waits for its tokens

    async def answer(request: Request) -> StreamingResponse:
        msgspec.json.decode(await request.body())
        return StreamingResponse(chunks(), media_type="text/event-stream")

    class Bare(uvicorn.Server):
        async def startup(self, sockets: list[Any] | None = None) -> None:
            await super().startup(sockets)
            say(self.servers[0].sockets[0].getsockname()[1])

    app = Starlette(routes=[Route("/v1/completions", answer, methods=["POST"]), Route("/load", load)])
    Bare(uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False, server_header=False)).run()


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        bare(Path(sys.argv[2]))
    else:
        serve(sys.argv[1], *map(int, sys.argv[2:]))
