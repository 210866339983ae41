"""`rayk simulate`: the JSON that others read, the table, and what it refuses."""

import json
from pathlib import Path

import pytest

from rayk.cli.main import main
from rayk.errors import ConfigError
from rayk.simulate.command import parse_tokens


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["simulate", *argv])
    return (code, *capsys.readouterr())


def test_json_has_a_row_for_every_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 3000 * (i // 4), "input_length": 1100, "output_length": 9, "hash_ids": [0, i // 2, 1000 + i]}
        for i in range(40)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = run(
        capsys,
        *("--trace", str(trace), "--requests", "30", "--replicas", "1,2", "--capacity", "4k,0.02M"),
        *("--policy", "lru,belady", "--router", "cost,round-robin", "--utilization", "0.5", "--format", "json"),
    )
    rows = json.loads(out)["rows"]
    assert code == 0 and len(rows) == 16
    assert [(r["replicas"], r["capacity"], r["policy"], r["router"]) for r in rows[:3]] == [
        (1, 4000, "lru", "cost"),
        (1, 4000, "lru", "round-robin"),
        (1, 4000, "belady", "cost"),
    ]
    shape = {"replicas", "capacity", "policy", "router", "hit_rate", "pooled", "infinite", "imbalance", "utilization"}
    for row in rows:
        assert set(row) == shape | {"ttft", "prefill_rate"} and set(row["ttft"]) == {"mean", "p50", "p90", "p99"}
        assert row["router"] != "round-robin" or row["utilization"] == pytest.approx(0.5)
    # of 1,100 tokens each, the first page is every request's, the second every other one's: 29 and 15 times cached
    assert rows[0]["infinite"] == pytest.approx((29 + 15) * 512 / (30 * 1100))


def test_a_rate_is_taken_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--workload", "documents", "--requests", "50", "--scale", "0.1", "--prefill-rate", "5000", "--seed", "7")
    code, out, _ = run(capsys, *argv, "--format", "json")
    assert code == 0 and {row["prefill_rate"] for row in json.loads(out)["rows"]} == {5000.0}
    assert run(capsys, *argv, "--format", "json")[1] == out


@pytest.mark.parametrize("name", ["chat", "agent", "documents", "random"])
def test_table(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, "--workload", name, "--requests", "40", "--arrival-rate", "2", "--replicas", "2")
    assert code == 0 and "least-loaded" in out and "900,000" in out and "40 requests" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "give a --trace FILE or a --workload"),
        (("--trace", "x", "--workload", "chat"), "exclude each other"),
        (("--trace", "/does/not/exist"), "cannot be read"),
        (("--trace", "x", "--scale", "2"), "are for --workload"),
        (("--workload", "poetry"), "'poetry' is not one of chat, agent, documents, random"),
        (("--workload", "chat", "--router", "magic"), "--router 'magic' is not one of cost"),
        (("--workload", "chat", "--policy", "fifo"), "--policy 'fifo' is not one of lru, belady"),
        (("--workload", "chat", "--replicas", "1,,2"), "empty entry"),
        (("--workload", "chat", "--replicas", "0"), "--replicas '0'"),
        (("--workload", "chat", "--capacity", "much"), "--capacity 'much'"),
        (("--workload", "chat", "--requests", "5", "--capacity", "100"), "less than a page of 512"),
        (("--workload", "chat", "--utilization", "1", "--prefill-rate", "9"), "exclude each other"),
        (("--workload", "chat", "--utilization", "0"), "--utilization is 0"),
        (("--workload", "chat", "--prefill-rate", "-1"), "--prefill-rate is -1"),
        (("--workload", "chat", "--page-size", "0"), "--page-size is 0"),
        (("--workload", "chat", "--requests", "0"), "--requests is 0"),
        (("--workload", "chat", "--scale", "0"), "--scale is 0"),
        (("--workload", "chat", "--arrival-rate", "0"), "--arrival-rate is 0"),
        (("--workload", "chat", "--seed", "-1"), "--seed is -1"),
        (("--workload", "chat", "--format", "xml"), "'xml' is not one of"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "tokens"), [("900000", 900_000), ("900k", 900_000), ("0.9M", 900_000), ("1.5G", 1_500_000_000)]
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens
    with pytest.raises(ConfigError, match="not a number of tokens"):
        parse_tokens(text + "x")
