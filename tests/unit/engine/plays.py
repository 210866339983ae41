"""Plays on a Cluster: good requests among hostile, cancelled, late and abandoned ones, with prefixes that are copied
between its replicas. Whatever happens to the others, a good request gets its own tokens, and nothing stays behind.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from rayk.cluster import Cluster
from rayk.dispatch.output import Handle, Output
from rayk.request_errors import RequestError
from rayk.sampling import SamplingParams

from .fake import EOS, VOCAB, expected

HEADS = (tuple(range(20)), tuple(range(10)), tuple(range(40, 60)), (1, 2), ())
HUGE = 10**5000

Let = Callable[[int], None]  # so many forwards go on


class Good(NamedTuple):
    """Requests that are to get their tokens."""

    head: int
    tails: list[list[int]]
    count: int
    salt: str | None = None


class Hostile(NamedTuple):
    """Requests that no replica may ever see, or that it refuses; beside a good one in the same call."""

    which: int
    good: list[int]


class Cancelled(NamedTuple):
    """The handle at that place is cancelled."""

    place: int


class Late(NamedTuple):
    """Requests whose time is up soon."""

    prompts: list[list[int]]
    seconds: float


class Left(NamedTuple):
    """Calls that are left: a stream after some updates, or a task of asyncio."""

    prompts: list[list[int]]
    updates: int
    coroutine: bool


class Moves(NamedTuple):
    """Only one replica takes new requests, or all do: so prefixes are wanted where they are not, and are pinned."""

    replica: int


class Steps(NamedTuple):
    """The replicas go on."""

    forwards: int


Act = Good | Hostile | Cancelled | Late | Left | Moves | Steps

PROMPTS: list[Any] = [
    {"tokens": [5], "id": "\ud800"},
    {"tokens": [5], "cache_salt": "\udfff"},
    {"tokens": [5], "session": "a\ud800"},
    {"tokens": [5], "id": HUGE},
    {"tokens": [5], "max_tokens": 1},
    {"tokens": [2**70]},
    {"tokens": [VOCAB + 3]},
    {"tokens": [-1]},
    {"tokens": list(range(20)) * 9},
    b"abc",
    None,
    [],
    {},
]
SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 2**63 - 1},
    {"max_new_tokens": HUGE},
    {"max_new_tokens": 0},
    {"temperature": HUGE},
    {"temperature": float("nan")},
    {"top_k": 2**64},
    {"seed": -1},
    {"stop_token_ids": (2**64,)},
    {"stop_token_ids": (VOCAB,)},
    {"stop": ("\ud800",)},
    {"logprobs": 10**9},
]
HOSTILE = len(PROMPTS) + len(SETTINGS)


class Play:
    """`let` has the replicas compute; a cluster that computes by itself has none."""

    def __init__(self, cluster: Cluster, let: Let = lambda forwards: None) -> None:
        self.cluster = cluster
        self.let = let
        self.handles: list[tuple[Handle, list[int], int]] = []
        self.cancelled: set[int] = set()
        self.bad: list[Handle] = []
        self.begun = 0  # requests of streams that were left: some may have come to their end

    def act(self, act: Act) -> None:
        match act:
            case Good(head, tails, count, salt):
                asked = [[*HEADS[head], *tail] for tail in tails]
                prompts: list[Any] = [{"tokens": prompt, "cache_salt": salt} for prompt in asked]
                handles = self.cluster.submit_all(prompts, max_new_tokens=count)
                self.handles += [(handle, prompt, count) for handle, prompt in zip(handles, asked, strict=True)]
            case Hostile(which, good):
                setting = SamplingParams(**SETTINGS[which - len(PROMPTS)]) if which >= len(PROMPTS) else None
                prompt = PROMPTS[which] if which < len(PROMPTS) else [5, 6]
                both = [SamplingParams(max_new_tokens=4), setting or SamplingParams(max_new_tokens=4)]
                first, bad = self.cluster.submit_all([good, prompt], both)
                self.handles.append((first, good, 4))
                self.bad.append(bad)
            case Cancelled(place) if self.handles:
                handle, _, _ = self.handles[place % len(self.handles)]
                self.cancelled.add(handle.number)
                handle.cancel()
            case Late(prompts_, seconds):
                handles = self.cluster.submit_all(prompts_, max_new_tokens=9, timeout=seconds)
                self.handles += [(handle, prompt, 9) for handle, prompt in zip(handles, prompts_, strict=True)]
                self.cancelled |= {handle.number for handle in handles}
            case Left(prompts_, updates, coroutine):
                if coroutine:
                    asyncio.run(self._task(prompts_))
                else:
                    self._stream(prompts_, updates)
            case Moves(replica):
                for each in (0, 1):
                    self.cluster.resume_replica(each)
                if replica < 2:
                    self.cluster.drain_replica(1 - replica)
            case Steps(forwards):
                self.let(forwards)

    def _stream(self, prompts: list[list[int]], updates: int) -> None:
        told = threading.Event()
        stream = self.cluster.stream(prompts, max_new_tokens=20)
        if updates:
            self.begun += len(prompts)
            reader = threading.Thread(target=lambda: (list(islice(stream, updates)), told.set()))
            reader.start()
            while not told.is_set():
                self.let(1)
            reader.join()

    async def _task(self, prompts: list[list[int]]) -> None:
        task = asyncio.create_task(self.cluster.agenerate(prompts, max_new_tokens=20))  # with no forward meanwhile
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def end(self) -> None:
        """All are over, and good ones were undisturbed."""
        self.act(Moves(2))
        for handle, prompt, count in self.handles:
            output: Output = handle.result(60)
            whole = expected(prompt, count)
            if handle.number in self.cancelled and output.error is not None:
                assert output.finish_reason in ("cancelled", "timeout") and output.tokens == whole[: len(output.tokens)]
            else:
                assert output.error is None, output.error
                assert output.tokens == whole
        for handle in self.bad:
            assert isinstance(handle.result(60).error, RequestError)
        assert self.cluster.replica_states() == ["ready", "ready"]


def some_play(seed: int, acts: int) -> list[Act]:
    """A play by chance, for where no hypothesis is to shrink it."""
    draw = random.Random(seed)

    def prompt() -> list[int]:
        return [draw.randrange(EOS - 1) for _ in range(draw.randint(1, 12))]

    def one() -> Act:
        kind = draw.randrange(8)
        if kind < 2:
            tails = [prompt() for _ in range(draw.randint(1, 4))]
            return Good(draw.randrange(5), tails, draw.randint(1, 16), draw.choice([None, "x"]))
        if kind == 2:
            return Cancelled(draw.randrange(99))
        if kind == 3:
            return Late([prompt()], draw.choice([1e-3, 0.02]))
        if kind == 4:
            return Left([prompt() for _ in range(3)], draw.randint(0, 2), draw.random() < 0.5)
        if kind == 5:
            return Moves(draw.randrange(3))
        return Hostile(draw.randrange(HOSTILE), prompt())

    return [one() for _ in range(acts)]
