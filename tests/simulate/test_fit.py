"""The fit ranks pairs of weights on the same scenarios."""

from pathlib import Path

import pytest

from rayk.simulate.fit import fit, main, retimed
from rayk.workloads.generators import chat


def test_pairs_are_ranked() -> None:
    found = fit(
        [chat(300, seed=1, scale=0.2, rate=3.4)],
        duplications=[0.0, 2.5],
        queueings=[0.5],
        evictions=[0.3],
        page_size=128,
    )
    assert {(each.duplication, each.queueing, each.eviction) for each in found} == {(0.0, 0.5, 0.3), (2.5, 0.5, 0.3)}
    assert 1 <= found[0].loss <= found[1].loss and all(each.loss <= each.worst for each in found)
    assert all(0 < each.hit_rate <= 1.05 for each in found)


def test_retimed_requests_keep_their_prompts() -> None:
    work = chat(20, seed=1)
    again = retimed(work, [float(i) for i in range(12)])
    assert [r.arrival_s for r in again.requests] == [float(i) for i in range(12)]
    assert all(a.runs is b.runs and a.after is None for a, b in zip(again.requests, work.requests, strict=False))


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arrivals = tmp_path / "azure.csv"
    rows = "\n".join(f"2023-11-16 18:15:{i:02d}.0000000,100,10" for i in range(30))
    arrivals.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")
    flags = ["--requests", "30", "--duplication", "2.5", "--queueing", "0.5", "--eviction", "0.3", "--azure"]
    assert main([*flags, str(arrivals)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["duplication", "queueing", "eviction", "loss"]
    assert row.split()[:5] == ["2.5", "0.5", "0.3", "1.000", "1.000"]
