"""Reading traces: formats told apart by content, equal ids are equal tokens, errors that name the line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from rayk.workloads.traces import TraceError, read_trace

Write = Callable[..., Path]

MOONCAKE = [
    {"timestamp": 0, "input_length": 1030, "output_length": 3, "hash_ids": [70, 5, 9]},
    {"timestamp": 3000, "input_length": 600, "output_length": 0, "hash_ids": [70, 6]},
    {"timestamp": 1500, "input_length": 1024, "output_length": 2, "hash_ids": [70, 5]},
]
SESSIONS = [
    {
        "id": "a",
        "block": 4,
        "requests": [
            {"t": 0.0, "in": 9, "out": 2, "ids": [[1, 2]]},
            {"t": 20.0, "in": 18, "out": 1, "ids": [[1, 2], [7, 2]], "agent": 1},
        ],
    },
    {"id": "b", "block": 4, "requests": [{"t": 5.0, "in": 8, "out": 1, "ids": [[1, 2]]}]},
    {"id": "c", "block": 4, "requests": [{"t": 1.0, "in": 4, "out": 1, "ids": [[7, 1]]}]},
]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(lines: list[object], pack: Callable[[bytes], bytes] = bytes) -> Path:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path = tmp_path / "trace"  # no suffix: only the content tells
        path.write_bytes(pack(text.encode()))
        return path

    return _write


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_mooncake_equal_ids_are_equal_blocks(write: Write, pack: Callable[[bytes], bytes]) -> None:
    workload = read_trace(write(MOONCAKE, pack))
    first, second, third = workload.requests
    assert workload.kind == "mooncake"
    assert [r.arrival_s for r in workload.requests] == [0, 3, 1.5]  # the order of the file is kept
    assert [(r.prompt_length, r.output_length) for r in workload.requests] == [(1030, 3), (600, 1), (1024, 2)]
    a, b, c = first.prompt(), second.prompt(), third.prompt()
    assert [len(a), len(b), len(c)] == [1030, 600, 1024]
    assert np.array_equal(a[:512], b[:512]) and np.array_equal(a[:1024], c)
    assert not np.isin(b[512:], a).any() and len(np.unique(a)) == len(a)
    answers = np.concatenate([r.output() for r in workload.requests])
    assert (answers < -1).all() and len(np.unique(answers)) == len(answers)


def test_a_partial_block_is_a_prefix_of_the_block(write: Write) -> None:
    lines = [
        {"timestamp": 0, "input_length": 100, "output_length": 1, "hash_ids": [3]},
        {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [3]},
    ]
    short, full = (request.prompt() for request in read_trace(write(lines)).requests)
    assert np.array_equal(short, full[:100])


def test_only_the_requests_asked_for_are_read(write: Write) -> None:
    path = write([MOONCAKE[0], "broken"])
    assert len(read_trace(path, 1).requests) == 1
    with pytest.raises(TraceError, match="line 2"):
        read_trace(path, 2)


def test_sessions_have_their_own_ids_and_wait_for_their_turn(write: Write) -> None:
    requests = read_trace(write(SESSIONS), lanes=2).requests
    # Lane 1 plays session a, lane 2 b and then c, which starts when b has ended.
    assert [(r.request_id, r.arrival_s, r.after) for r in requests] == [
        ("a/0", 0.0, None),
        ("b/0", 5.0, None),
        ("c/0", 6.0, None),
        ("a/1", 20.0, 0),
    ]
    by_id = {r.request_id: r.prompt() for r in requests}
    assert np.array_equal(by_id["a/0"][:8], by_id["a/1"][:8])
    assert by_id["a/0"][8] not in by_id["a/1"]  # what no block covers is the request's own
    assert not np.isin(by_id["b/0"], by_id["a/1"]).any() and not np.isin(by_id["c/0"], by_id["a/1"]).any()
    assert all(len(np.unique(prompt)) == len(prompt) for prompt in by_id.values())


def test_azure_has_lengths_and_arrivals(write: Write) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens"
    rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,0"]
    first, second = read_trace(write([header, *rows])).requests
    assert (first.prompt_length, first.output_length, second.output_length) == (374, 44, 1)
    assert second.arrival_s == pytest.approx(4.314579)
    assert not np.isin(first.prompt(), second.prompt()).any()
    with pytest.raises(TraceError, match="line 2: not TIMESTAMP"):
        read_trace(write([header, "yesterday,1,2"]))
    with pytest.raises(TraceError, match="ContextTokens is 0"):
        read_trace(write([header, "2023-11-16 18:15:46.6805900,0,44"]))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "truncated"),
        ({**MOONCAKE[0], "input_length": "1030"}, r"Expected `int`, got `str` - at `\$.input_length`"),
        ({**MOONCAKE[0], "hash_ids": [70, -5, 9]}, r">= 0 - at `\$.hash_ids"),
        ({**MOONCAKE[0], "hash_ids": [70]}, r"input_length 1030 is 3 block\(s\) of 512 tokens, hash_ids has 1"),
        ({"timestamp": 0, "input_length": 5, "output_length": 1}, "missing required field `hash_ids`"),
        ({**MOONCAKE[0], "input_length": 0, "hash_ids": []}, ">= 1"),
    ],
)
def test_a_malformed_mooncake_line_is_named(write: Write, line: object, problem: str) -> None:
    path = write([MOONCAKE[0], "", line])
    with pytest.raises(TraceError, match=problem) as caught:
        read_trace(path)
    assert caught.value.line == 3 and str(path) in str(caught.value) and "line 3" in str(caught.value)
    assert "correct the line" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({**SESSIONS[1], "id": "a"}, "session id 'a' was used before"),
        ({"id": "z", "block": 4, "requests": [{"t": 0, "in": 7, "out": 1, "ids": [[1, 2]]}]}, "cover 8 tokens of a"),
        ({"id": "z", "block": 0, "requests": []}, r">= 1 - at `\$.block"),
    ],
)
def test_a_malformed_session_is_named(write: Write, line: object, problem: str) -> None:
    with pytest.raises(TraceError, match=problem) as caught:
        read_trace(write([SESSIONS[0], line]))
    assert caught.value.line == 2


def test_what_is_no_trace_at_all_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be read .*No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(TraceError, match=r"cannot be read .*directory"):
        read_trace(tmp_path)
    for lines, problem in ([], "it is empty"), (["hello"], "neither a JSON object"), ([{"x": 1}], "fields: x"):
        with pytest.raises(TraceError, match=problem):
            read_trace(write(lines))
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(write([{"id": "z", "block": 4, "requests": []}]))


def test_damaged_archives_are_refused(write: Write) -> None:
    for pack in (gzip.compress, zstandard.compress):
        path = write(MOONCAKE * 50, pack)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes(8) + whole[len(whole) // 2 + 8 :])
        with pytest.raises(TraceError, match=r"damaged|correct the line"):
            read_trace(path)


def test_facts_of_the_conversation_trace(shared_dir: Path) -> None:
    workload = read_trace(shared_dir / "traces" / "mooncake_conversation_trace.jsonl.gz")
    lengths = np.array([r.prompt_length for r in workload.requests])
    assert len(lengths) == 12_031
    assert [round(float(np.percentile(lengths, q))) for q in (50, 90, 99, 100)] == [6909, 27367, 85400, 126195]
    blocks = [(int(first) // 512, -(-int(count) // 512)) for r in workload.requests for first, count in r.runs]
    assert sum(count for _, count in blocks) == 288_500
    covered = np.zeros(300_000, bool)
    for first, count in blocks:
        covered[first : first + count] = True
    assert covered.sum() == 182_790
    assert all(r.runs[0, 0] == 0 for r in workload.requests)  # all share the first block


def test_facts_of_the_coding_agent_sessions(shared_dir: Path) -> None:
    workload = read_trace(shared_dir / "traces" / "claude_code_sessions.dev.rle.jsonl.zst")
    assert len({r.session_id for r in workload.requests}) == 480
    assert len(workload.requests) == sum(r.after is not None for r in workload.requests) + 480
    lengths = [r.prompt_length for r in workload.requests]
    assert np.percentile(lengths, 50) == pytest.approx(99_000, rel=0.02)
    arrivals = [r.arrival_s for r in workload.requests]
    assert arrivals == sorted(arrivals)
    live = [len({r.session_id for r in workload.requests[at : at + 200]}) for at in (0, 10_000, 20_000)]
    assert all(2 <= sessions <= 40 for sessions in live)  # interleaved, not one after another or all at once
