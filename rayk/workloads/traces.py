"""Reading published request traces into a Workload. The format is told from the content of the first line.

mooncake      `timestamp` ms, `input_length`, `output_length`, `hash_ids` of 512-token blocks, the last one partial;
              equal ids are equal blocks
claude-code   a session a line: `block`, `requests` with `t` s, `in`, `out`, `ids` as runs `[first, count]` of full
              blocks; equal ids are equal blocks within the session
azure         `TIMESTAMP,ContextTokens,GeneratedTokens`: arrivals and lengths only, nothing is equal

Block ids become dense numbers, a token's slot is `block * block_size + position`, and a partial last block is a
prefix of its block's tokens. What no id covers (the end of a claude-code prompt, all of azure) is unique to its
request.
A request that answers nothing is served as one that answers a single token: prefill always samples one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np

from rayk.workloads.request import BenchRequest, Runs, TokenSpace, Workload, joined
from rayk.workloads.trace_file import TraceError, TraceLines

__all__ = ["TraceError", "read_trace"]

MOONCAKE_BLOCK = 512
AZURE_HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens"
FORMATS = "a Mooncake jsonl (hash_ids), Claude Code sessions (requests with ids) or Azure csv"
SESSION_LANES = 16

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Length = Annotated[int, msgspec.Meta(ge=1)]
_T = TypeVar("_T")


class _MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: _Length
    output_length: _Count
    hash_ids: list[_Count]


class _SessionRequest(msgspec.Struct, frozen=True):
    t: float
    tokens_in: _Length = msgspec.field(name="in")
    tokens_out: _Count = msgspec.field(name="out")
    ids: list[tuple[_Count, _Length]]


class _Session(msgspec.Struct, frozen=True):
    id: str
    block: _Length
    requests: list[_SessionRequest]


_mooncake = msgspec.json.Decoder(_MooncakeLine)
_session = msgspec.json.Decoder(_Session)


def read_trace(path: str | Path, requests: int | None = None, lanes: int = SESSION_LANES) -> Workload:
    """The first `requests` requests of a trace (all when None), in the order in which they are to be sent.

    `lanes` is the number of sessions that run side by side in a claude-code trace, whose sessions carry no start
    time: sessions take lanes in the file's order, each starting when a lane's last session ended, and requests are
    merged by time. Raises TraceError (file, line, what is wrong) and TokenSpaceError.
    """
    with TraceLines(path) as lines:
        each = iter(lines)
        head = next(each, None)
        if head is None:
            raise lines.error("it is empty", f"give {FORMATS}")
        if head.startswith(AZURE_HEADER):
            kind, found = "azure", _read_azure(lines, each)
        else:
            fields = _fields(lines, head)
            if "hash_ids" in fields:
                kind, found = "mooncake", _read_mooncake(lines, _chain(head, each))
            elif "requests" in fields:
                kind, found = "claude-code", iter(_read_sessions(lines, _chain(head, each), lanes))
            else:
                seen = ", ".join(sorted(fields)) or "none"
                raise lines.error(f"the format is not known (fields: {seen})", f"give {FORMATS}")
        picked: list[BenchRequest] = []
        while (requests is None or len(picked) < requests) and (request := next(found, None)) is not None:
            picked.append(request)
        if not picked:
            raise TraceError(lines.path, 0, "it holds no request", f"give {FORMATS}")
    parameters: dict[str, float | int | str] = {"lanes": lanes} if kind == "claude-code" else {}
    return Workload(str(path), kind, picked, parameters)


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


def _fields(lines: TraceLines, head: bytes) -> set[str]:
    try:
        first = msgspec.json.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise lines.error("neither a JSON object nor the Azure header", f"give {FORMATS}") from None
    return set(first) if isinstance(first, dict) else set()


def _read_mooncake(lines: TraceLines, each: Iterator[bytes]) -> Iterator[BenchRequest]:
    space = TokenSpace(lines.path)
    dense: dict[int, int] = {}
    for index, text in enumerate(each):
        line = _decoded(_mooncake, lines, text)
        blocks = -(-line.input_length // MOONCAKE_BLOCK)
        if len(line.hash_ids) != blocks:
            raise lines.error(
                f"input_length {line.input_length} is {blocks} block(s) of {MOONCAKE_BLOCK} tokens, "
                f"hash_ids has {len(line.hash_ids)}",
                "correct the line or remove it",
            )
        for block in line.hash_ids:
            if block not in dense:
                dense[block] = space.slots(MOONCAKE_BLOCK) // MOONCAKE_BLOCK
        runs = np.empty((blocks, 2), np.int64)
        runs[:, 0] = [dense[block] * MOONCAKE_BLOCK for block in line.hash_ids]
        runs[:, 1] = MOONCAKE_BLOCK
        runs[-1, 1] = line.input_length - (blocks - 1) * MOONCAKE_BLOCK
        output = max(1, line.output_length)
        first = space.generated(output)
        arrival = line.timestamp / 1000
        yield BenchRequest(index, f"r{index}", arrival, None, line.input_length, output, joined(runs), first)


def _read_azure(lines: TraceLines, each: Iterator[bytes]) -> Iterator[BenchRequest]:
    space = TokenSpace(lines.path)
    start: datetime | None = None
    for index, text in enumerate(each):
        try:
            stamp, prompt_text, output_text = text.decode().split(",")
            at = datetime.fromisoformat(stamp[:26])
            prompt, output = int(prompt_text), max(1, int(output_text))
        except ValueError as error:
            raise lines.error(f"not TIMESTAMP,ContextTokens,GeneratedTokens ({error})", "correct the line") from None
        if prompt < 1:
            raise lines.error(f"ContextTokens is {prompt}, at least 1 is needed", "correct the line or remove it")
        start = start or at
        runs = np.array([[space.slots(prompt), prompt]], np.int64)
        first = space.generated(output)
        yield BenchRequest(index, f"r{index}", (at - start).total_seconds(), None, prompt, output, runs, first)


def _read_sessions(lines: TraceLines, each: Iterator[bytes], lanes: int) -> list[BenchRequest]:
    space = TokenSpace(lines.path)
    free_at = [0.0] * lanes
    seen: set[str] = set()
    found: list[tuple[float, int, str, _SessionRequest, Runs]] = []
    for number, text in enumerate(each):
        session = _decoded(_session, lines, text)
        if session.id in seen:
            raise lines.error(f"session id {session.id!r} was used before", "give each session its own id")
        seen.add(session.id)
        begin = heapq.heappop(free_at)
        numbers = _Numbering(space, session)
        last = 0.0
        for request in session.requests:
            covered = session.block * sum(count for _, count in request.ids)
            if covered > request.tokens_in:
                raise lines.error(
                    f"session {session.id!r}: ids cover {covered} tokens of a prompt of {request.tokens_in}",
                    "ids name full blocks only; correct the line or remove it",
                )
            last = max(last, request.t)
            found.append((begin + last, number, session.id, request, numbers.runs(request, covered)))
        heapq.heappush(free_at, begin + last)
    found.sort(key=lambda item: item[:2])  # stable: requests of a session stay in their order
    out: list[BenchRequest] = []
    previous: dict[str, tuple[int, int]] = {}
    for index, (at, _, name, request, runs) in enumerate(found):
        turn, after = previous.get(name, (0, -1))
        output = max(1, request.tokens_out)
        first = space.generated(output)
        out.append(
            BenchRequest(
                index, f"{name}/{turn}", at, name, request.tokens_in, output, runs, first, after if turn else None
            )
        )
        previous[name] = turn + 1, index
    return out


class _Numbering:
    """Slots of one session's block ids: stretches of ids that it uses become contiguous slots, in the ids' order."""

    def __init__(self, space: TokenSpace, session: _Session) -> None:
        self._space, self._block = space, session.block
        used = sorted({(first, first + count) for request in session.requests for first, count in request.ids})
        merged: list[list[int]] = []
        for first, end in used:
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        stretches = np.array(merged or [[0, 0]], np.int64)
        sizes = stretches[:, 1] - stretches[:, 0]
        base = space.slots(int(sizes.sum()) * session.block)
        self._first_id = stretches[:, 0]
        self._first_slot = base + (np.cumsum(sizes) - sizes) * session.block

    def runs(self, request: _SessionRequest, covered: int) -> Runs:
        """Slot runs of a request's prompt: its blocks, then tokens of its own for what no block covers."""
        ids = np.array(request.ids, np.int64).reshape(-1, 2)
        at = np.searchsorted(self._first_id, ids[:, 0], side="right") - 1
        first = self._first_slot[at] + (ids[:, 0] - self._first_id[at]) * self._block
        runs = np.stack([first, ids[:, 1] * self._block], axis=1)
        if rest := request.tokens_in - covered:
            runs = np.concatenate([runs, [[self._space.slots(rest), rest]]])
        return joined(runs)


def _decoded(decoder: msgspec.json.Decoder[_T], lines: TraceLines, text: bytes) -> _T:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise lines.error(str(error), "correct the line or remove it") from None
