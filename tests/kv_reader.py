"""A router of somebody else: it knows vLLM's events and nothing of rayk, and follows one replica."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from .patience import scaled

END = b"\xff" * 8
WAIT = 20.0  # seconds


class Reader:
    """What a replica caches by its events: hashes by the page before and the tokens, adapter and salt."""

    def __init__(self, zmq: Any, endpoint: str, replay: str | None = None) -> None:
        self.zmq, self.replay = zmq, replay
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.subscribe(b"")
        self.socket.connect(endpoint)
        self.next = 0
        self.time, self.publisher = 0.0, list[bytes]()  # of the last batch
        self.gaps = self.clears = 0
        self.ranks: set[Any] = set()
        self.pages: dict[Any, tuple[Any, tuple[int, ...], Any, Any]] = {}

    def close(self) -> None:
        self.socket.close()

    def until(self, condition: Callable[[], bool]) -> None:
        """Read until it holds."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < scaled(WAIT), f"batch {self.next}, {self.pages}"
            if self.socket.poll(20):
                self.take(*self.socket.recv_multipart())

    def take(self, topic: bytes, number: bytes, payload: bytes) -> None:
        """A batch, if it is the next one; else what is missing is asked for. A lower number was read already, or, with
        a later time than any so far, it is of a replica that started anew; another publisher tells that for sure."""
        at, (ts, _, _, *publisher) = int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)
        if ts > self.time and (at < self.next or publisher != self.publisher):
            self.next = 0
        if at > self.next and self.replay is not None:
            self.gaps += 1
            self.ask(self.replay)
        if at >= self.next:
            self.apply(payload)
            self.next = at + 1

    def ask(self, replay: str) -> None:
        """The batches from the next one on."""
        with self.zmq.Context.instance().socket(self.zmq.DEALER) as socket:
            socket.setsockopt(self.zmq.LINGER, 0)
            socket.connect(replay)
            socket.send_multipart([b"", self.next.to_bytes(8, "big")])
            while True:
                assert socket.poll(WAIT * 1000), "no answer"
                empty, _, number, payload = socket.recv_multipart()
                assert empty == b""
                if number == END:
                    return
                self.apply(payload)
                self.next = int.from_bytes(number, "big") + 1

    def snapshot(self, endpoint: str) -> bytes:
        """Begin with all that is cached; the publisher's id."""
        with self.zmq.Context.instance().socket(self.zmq.REQ) as socket:
            socket.setsockopt(self.zmq.LINGER, 0)
            socket.connect(endpoint)
            socket.send(b"snapshot")
            assert socket.poll(WAIT * 1000), "no answer"
            number, publisher, *payloads = socket.recv_multipart()
        self.pages.clear()
        self.publisher = [publisher]
        for payload in payloads:
            self.apply(payload)
        self.next = int.from_bytes(number, "big", signed=True) + 1
        return bytes(publisher)

    def apply(self, payload: bytes) -> None:
        self.time, events, rank, *self.publisher = msgspec.msgpack.decode(payload)
        assert [len(each) for each in self.publisher] in ([], [16])
        self.ranks.add(rank)
        for event in events:
            match event["type"]:
                case "BlockStored":
                    self.stored(event)
                case "BlockRemoved":
                    assert event["medium"] == "GPU"
                    for each in event["block_hashes"]:
                        del self.pages[each]
                case "AllBlocksCleared":
                    self.clears += 1
                    self.pages.clear()

    def stored(self, event: dict[str, Any]) -> None:
        size, parent = event["block_size"], event["parent_block_hash"]
        assert event["medium"] == "GPU" and event["lora_id"] is None
        assert parent is None or parent in self.pages
        assert len(event["token_ids"]) == size * len(event["block_hashes"])
        for at, each in enumerate(event["block_hashes"]):
            assert each not in self.pages
            keys = (event.get("extra_keys") or [None] * (at + 1))[at] or []
            salt = [key for key in keys if key != event["lora_name"]]
            tokens = tuple(event["token_ids"][at * size : (at + 1) * size])
            self.pages[each] = parent, tokens, event["lora_name"], salt[0] if salt else None
            parent = each

    def hits(self, tokens: list[int], size: int, adapter: str | None = None, salt: str | None = None) -> int:
        """How many leading pages a request of these tokens would find, its last token left to compute."""
        by_content = {content: each for each, content in self.pages.items()}
        parent: Any = None
        for at in range((len(tokens) - 1) // size):
            key = parent, tuple(tokens[at * size : (at + 1) * size]), adapter, salt if parent is None else None
            if key not in by_content:
                return at
            parent = by_content[key]
        return (len(tokens) - 1) // size
