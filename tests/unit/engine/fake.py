"""A model that really reads its pages: the next token depends on every cached token, read back through the table.

Each slot of a page holds the token and the position that were written there; a forward hashes what it reads for a
row, position by position, and fails the test when a slot holds another position than it must. So a wrong page, a
page freed too early or a window that moved wrongly gives other tokens than the reference, or an error at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from rayk.engine.engine import Engine
from rayk.engine.settings import EngineSettings
from rayk.kvcache.connector import Found, NullConnector, Tier
from rayk.kvcache.replica import ReplicaCore
from rayk.params import MHAKVCacheParams
from rayk.protocol.engine_reports import Event, Finished, PromptLogprobs, Text, Tokens
from rayk.protocol.engine_request import Request
from rayk.sampling import SamplingParams

VOCAB = 97
POISON, EOS = 95, 96  # never chosen on their own


def digest(tokens: Sequence[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 1_000_003 + int(token) + 1) & 0xFFFFFFFFFFFF
    return value


def scores(value: int) -> np.ndarray:
    """[VOCAB] float32 in [0, 6), all different, but for the two that are never chosen."""
    rng = np.random.default_rng(value)
    found = rng.random(VOCAB, dtype=np.float32) * 6
    found[[POISON, EOS]] = -20
    return found


def expected(prompt: Sequence[int], count: int, eos_after: int | None = None) -> list[int]:
    """The greedy answer."""
    tokens = [int(t) for t in prompt]
    for _ in range(count):
        tokens.append(int(scores(digest(tokens)).argmax()))
    return tokens[len(prompt) :]


class Tokenizer:
    """Token t is the letter at t mod 26; EOS is special and does not show."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + t % 26) for t in ids if t != EOS)


class PageModel:
    """`broken`: a token that it cannot process. `not_a_number`: one after which its logits are none."""

    def __init__(self, max_length: int = 2000, tokenizer: Any = None) -> None:
        self.vocab_size = VOCAB
        self.max_length = max_length
        self.eos_token_ids = (EOS,)
        self.tokenizer = tokenizer
        self.backend = "fake"
        self.broken: int | None = None
        self.not_a_number: int | None = None
        self.forwards: list[list[int]] = []

    def cache_params(
        self, *, page_size: int, devices: Sequence[str], data_parallel_degree: int = 1, **more: Any
    ) -> MHAKVCacheParams:
        return params(page_size, devices, data_parallel_degree, **more)

    def logits(
        self, inputs: Any, tokens: torch.Tensor, counts: Sequence[int], *, every_token: bool = False
    ) -> torch.Tensor:
        assert tokens.dtype == torch.int64 and tokens.ndim == 1 and sum(counts) == len(tokens)
        self.forwards.append(list(counts))
        if self.broken is not None and (tokens == self.broken).any():
            raise RuntimeError(f"cannot do token {self.broken}")
        pages, size, at, out = inputs.kv_blocks, inputs.kv_blocks.shape[3], 0, []
        for row, count in enumerate(counts):
            start = int(inputs.cache_lengths[row])
            table = inputs.lookup_table[row].long()
            where = torch.arange(start, start + count)
            assert (table[where // size] < pages.shape[0] - 1).all(), "a write to the null page"
            new = torch.stack((tokens[at : at + count], where), dim=1).float()
            pages[table[where // size], :, :, where % size, 0] = new[:, None, None]
            at += count
            whole = torch.arange(start + count)
            read = pages[table[whole // size], 0, 0, whole % size, 0]
            assert torch.equal(read[:, 1].long(), whole), "a page of another place"
            whole_row = read[:, 0].long().tolist()
            out += [
                scores(digest(whole_row[: end + 1]))
                for end in range(start if every_token else len(whole) - 1, len(whole))
            ]
            if self.not_a_number is not None and self.not_a_number in tokens[at - count : at]:
                out[-1][3] = np.nan
        return torch.from_numpy(np.stack(out))


def params(page_size: int = 4, devices: Sequence[str] = ("cpu",), replicas: int = 1, **more: Any) -> MHAKVCacheParams:
    more = {"enable_prefix_caching": True} | more
    return MHAKVCacheParams(
        dtype="float32", n_kv_heads=1, head_dim=2, num_layers=1, page_size=page_size, devices=list(devices),
        data_parallel_degree=replicas, **more,
    )  # fmt: skip


class Shelf(NullConnector):
    """A tier in memory. Loads land at a look at them while `open`, but for the last `lost` pages of each."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[bytes, torch.Tensor] = {}
        self.buffers: list[torch.Tensor] = []
        self.open = True
        self.lost = 0
        self.under_way: list[ShelfLoad] = []

    def holds(self, key: bytes) -> bool:
        return key in self.pages

    def lookup(self, hashes: Iterable[bytes]) -> Found:
        found = list(takewhile(self.pages.__contains__, hashes))
        return Found(found, [Tier.HOST] * (len(found) // 2) + [Tier.DISK] * (len(found) - len(found) // 2))

    def load(self, hashes: Sequence[bytes], pages: Any) -> ShelfLoad:
        self.under_way.append(ShelfLoad(self, [self.pages[key] for key in hashes], pages))
        return self.under_way[-1]

    def offload(self, hashes: Sequence[bytes], pages: Any) -> None:
        for key, page in zip(hashes, pages.tolist(), strict=True):
            self.pages[key] = torch.cat([buffer[page] for buffer in self.buffers]).clone()


class ShelfLoad:
    def __init__(self, shelf: Shelf, content: list[torch.Tensor], pages: Any) -> None:
        self.shelf, self.content, self.pages = shelf, content, pages
        self.landed: int | None = None
        self.cancelled = False

    def poll(self) -> bool:
        return self.landed is not None or (self.shelf.open and self.wait() >= 0)

    def wait(self) -> int:
        assert not self.cancelled
        if self.landed is None:
            self.landed = max(0, len(self.content) - self.shelf.lost)
            self.shelf.counters.loads_failed += len(self.content) - self.landed
            for page, content in zip(self.pages[: self.landed].tolist(), self.content, strict=False):
                at = 0
                for buffer in self.shelf.buffers:
                    buffer[page] = content[at : at + buffer.shape[1]]
                    at += buffer.shape[1]
            self.shelf.under_way.remove(self)
        return self.landed

    def cancel(self) -> None:
        self.cancelled = True
        if self.landed is None:
            self.shelf.under_way.remove(self)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An engine with what came out of it; its core is checked after every step."""

    def __init__(
        self, pages: int = 64, page_size: int = 4, *, rows: int = 8, model: PageModel | None = None, **settings: Any
    ) -> None:
        self.clock = Clock()
        self.model = model or PageModel()
        caching = settings.pop("caching", True)
        self.shelf: Shelf | None = settings.pop("shelf", None)
        seed = settings.pop("hash_seed", None)
        made = params(page_size, enable_prefix_caching=caching, kv_hash_seed=seed, kv_hash_algo="xxh3_128")
        self.core = ReplicaCore(made, 0, pages, rows, ["cpu"], runtime_checks=True)
        if self.shelf is not None:
            self.shelf.buffers = list(self.core.buffers.all_bytes)
            self.core.connect(self.shelf)
        peers = settings.pop("peers", lambda core: None)(self.core)
        self.engine = Engine(self.core, self.model, EngineSettings(**settings), self.clock, peers=peers)
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.prompt_logprobs: dict[int, list[Any]] = {}
        self.text: dict[int, str] = {}
        self.ended: dict[int, Finished] = {}
        self.number = 0

    def submit(self, prompt: Any, count: int = 8, **more: Any) -> int:
        self.number += 1
        fields = {
            k: more.pop(k) for k in ("request_id", "timeout", "stream_text", "cache_salt", "generated") if k in more
        }
        name = fields.pop("request_id", f"r{self.number}")
        self.engine.submit(Request(self.number, name, prompt, SamplingParams(max_new_tokens=count, **more), **fields))
        self.tokens[self.number] = []
        return self.number

    def step(self) -> list[Event]:
        events = self.engine.step()
        self.core.check_integrity()
        for event in events:
            match event:
                case Tokens(numbers, tokens, logprobs):
                    for number, token in zip(numbers.tolist(), tokens.tolist(), strict=True):
                        self.tokens[number].append(token)
                    for number, found in logprobs.items():
                        self.logprobs.setdefault(number, []).append(found)
                case Text(number, piece):
                    assert number not in self.ended
                    self.text[number] = self.text.get(number, "") + piece
                case PromptLogprobs(number, start, found):
                    known = self.prompt_logprobs.setdefault(number, [])
                    assert start == len(known) + 1, "each position once, in order"
                    known += found
                case Finished():
                    assert event.number not in self.ended
                    self.ended[event.number] = event
        return events

    def run(self, limit: int = 5000) -> None:
        """Until nothing is left; everything must have been given back."""
        for _ in range(limit):
            if not self.engine.busy:
                break
            self.step()
        assert not self.engine.busy, "it does not come to an end"
        assert self.core.usage.used == 0 and not self.core.requests
