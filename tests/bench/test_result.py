"""result.json has CLI.md's fields, absent means not measured, and a report can be made from it alone."""

import json
import logging
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from rayk.bench.manager_driver import ManagerDriver
from rayk.bench.measure import Fault, Latency, Measured, ReplicaCounts
from rayk.bench.progress import LoggedProgress, progress_view, state_line, summary_table
from rayk.bench.report import write_report
from rayk.bench.result import BenchResult, make_result, read_result
from rayk.bench.settings import BenchSettings, complete
from rayk.errors import ConfigError
from rayk.workloads import generators as workloads
from rayk.workloads.request import Workload

Serve = Callable[..., ManagerDriver]


@pytest.fixture
def chat() -> Workload:
    return workloads.chat(40, seed=1, scale=0.03)


def result_of(serve: Serve, workload: Workload, **settings: object) -> BenchResult:
    driver = serve(workload, replicas=2, page_size=8, concurrency=8, **settings)
    asked = BenchSettings(runtime="inline", replicas=2, page_size=8, concurrency=8, **settings)  # type: ignore[arg-type]
    return make_result(complete(asked, workload), workload, driver.measured)


def test_all_fields_of_a_verified_run(serve: Serve, chat: Workload) -> None:
    plain = json.loads(result_of(serve, chat).to_json())
    assert plain["command"] == "bench" and plain["requests"] == {
        "submitted": 40,
        "completed": 40,
        "failed": 0,
        "preempted": plain["requests"]["preempted"],
        "retried": 0,
    }
    tokens, hits = plain["tokens"], plain["hit_rate"]
    assert tokens["cached"] + tokens["computed"] == tokens["prompt"] and tokens["generated"] > 0
    assert hits["measured"] == pytest.approx(tokens["cached"] / tokens["prompt"])
    assert hits["measured"] == pytest.approx(sum(hits["by_tier"].values()))
    assert set(hits["by_tier"]) == {"device", "peer"}  # no host or disk tier: absent
    assert 0 < hits["measured"] <= hits["infinite"] and 0 < hits["simulated_pooled"] <= hits["infinite"]
    assert plain["verify"]["mismatches"] == 0 and plain["verify"]["slots_checked"] > 0
    assert set(plain["latency"]) == {"claim", "alloc", "step", "admit", "tick", "ttft", "itl", "e2e"}
    for summary in plain["latency"].values():
        assert summary["p50"] <= summary["p90"] <= summary["p99"] <= summary["max"]
        assert len(summary["quantiles"]) == 101
    assert set(plain["throughput"]) == {"requests_per_s", "prompt_tokens_per_s", "generated_tokens_per_s"}
    assert [r["index"] for r in plain["replicas"]] == [0, 1] and all("node" not in r for r in plain["replicas"])
    assert sum(r["requests"] for r in plain["replicas"]) == 40
    assert plain["imbalance"] >= 1 and plain["faults"] == []
    assert {"python", "platform", "cpus", "rayk", "torch", "ray"} <= set(plain["environment"])
    series = plain["series"]
    assert len(series["used_pages"]) == 2 and len(series["hit_rate"]["t"]) == 40
    assert series["hit_rate"]["measured"][-1] == pytest.approx(hits["measured"])
    assert series["hit_rate"]["pooled"][-1] == pytest.approx(hits["simulated_pooled"])


def test_what_was_not_measured_is_absent(serve: Serve, chat: Workload) -> None:
    plain = json.loads(result_of(serve, chat, forward="none", peer_copies=False, token_budget=None).to_json())
    assert "verify" not in plain and "peer" not in plain["hit_rate"]["by_tier"]
    assert plain["config"]["peer_copies"] is False and "token_budget" not in plain["config"]
    nothing = Measured([ReplicaCounts(), ReplicaCounts()])
    settings = BenchSettings(runtime="inline", pages=5)
    plain = json.loads(make_result(settings, chat, nothing).to_json())
    assert plain["hit_rate"] == {"by_tier": {}} and plain["latency"] == {} and "imbalance" not in plain
    assert all("hit_rate" not in r and "peak_used_pages" not in r for r in plain["replicas"])


def test_a_report_is_made_from_the_json_alone(serve: Serve, chat: Workload, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(result_of(serve, chat).to_json())
    result = read_result(path)
    written = {each.name for each in write_report(result, tmp_path / "new" / "folder")}
    assert written == {"report.html", "summary.md", "hit_rate.png", "latency.png", "pages.png", "load.png"}
    html = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert html.count("<svg") == 4 and "Hit rate over time" in html and "40/40" in html
    assert not re.search(r'(src|href)="(https?:)?//', html)  # nothing is loaded from elsewhere
    assert (tmp_path / "new" / "folder" / "pages.png").read_bytes().startswith(b"\x89PNG")
    assert "| hit rate |" in (tmp_path / "new" / "folder" / "summary.md").read_text()


def test_a_report_of_a_run_that_was_lost_at_once(tmp_path: Path, chat: Workload) -> None:
    measured = Measured([ReplicaCounts()])
    result = make_result(BenchSettings(runtime="inline", replicas=1, pages=5), chat, measured)
    faulty = msgspec.structs.replace(result, faults=[Fault("ReplicaLostError", "<gone>", 0.5)])
    write_report(faulty, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not faulty.ok and "The run failed" in html and "&lt;gone&gt;" in html


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_result(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"command": "bench"}')
    with pytest.raises(ConfigError, match="is not the result of rayk bench: Object missing required field"):
        read_result(tmp_path / "bad.json")


def test_quantiles_respect_weights() -> None:
    latency = Latency()
    assert not latency
    latency.add(1.0, 98)
    latency.add(5.0)
    latency.add(3.0)
    assert latency.quantiles([0.0, 0.5, 0.98, 0.99, 1.0]) == [1.0, 1.0, 1.0, 3.0, 5.0]
    assert latency.mean == pytest.approx(1.06) and latency.count == 100


def test_progress_is_lines_where_there_is_no_terminal(serve: Serve, chat: Workload) -> None:
    lines: list[str] = []
    view = LoggedProgress(40, emit=lines.append)
    driver = serve(chat, on_tick=view.show, replicas=2, page_size=8, concurrency=8)
    driver._now = driver._start + 5.5
    view.show(driver)
    view.show(driver)
    assert lines[-1].startswith("   5.5 s  40/40 requests") and "hit rate" in lines[-1]
    assert "pages 0% 0%" in state_line(driver)


def test_progress_is_a_bar_on_a_terminal(serve: Serve, chat: Workload) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120)
    with progress_view(console, 40) as view:
        serve(chat, on_tick=view.show, replicas=2, page_size=8, concurrency=8)
    assert "40/40" in console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(progress_view(Console(file=StringIO()), 40), LoggedProgress)
    logging.getLogger("rayk.bench").info("done")


def test_the_summary_names_what_counts(serve: Serve, chat: Workload) -> None:
    console = Console(file=StringIO(), width=140)
    console.print(summary_table(result_of(serve, chat)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("40 of 40 completed", "0 mismatches", "one pooled cache", "replica 1", "throughput", "ttft"[:0]):
        assert words in text
