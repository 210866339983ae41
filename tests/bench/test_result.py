"""result.json has CLI.md's fields, absent means not measured, and a report can be made from it alone."""

import json
import logging
import re
from collections.abc import Callable
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from rayk.bench.figures import COLORS, FIGURES, VARIABLES
from rayk.bench.manager_driver import ManagerDriver
from rayk.bench.measure import Fault, Latency, Measured, ReplicaCounts
from rayk.bench.progress import LoggedProgress, progress_view, state_line, summary_rows, summary_table
from rayk.bench.report import headline, swept, write_comparison, write_report
from rayk.bench.result import BenchResult, VerifyCounts, make_result, read_result
from rayk.bench.settings import BenchSettings, complete
from rayk.cli.main import main
from rayk.errors import ConfigError
from rayk.quantity import show_seconds
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
    assert written == {"report.html", "summary.md"} | {f"{name}.png" for name in FIGURES}
    html = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert html.count("<svg") == len(FIGURES) == 6 and "Hit rate over time" in html and "40/40" in html
    assert not re.search(r'(src|href)="(https?:)?//', html)  # nothing is loaded from elsewhere
    assert (tmp_path / "new" / "folder" / "pages.png").read_bytes().startswith(b"\x89PNG")
    assert "| hit rate |" in (tmp_path / "new" / "folder" / "summary.md").read_text()


def test_a_report_is_made_from_a_log(
    serve: Serve, chat: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, log = result_of(serve, chat), tmp_path / "job.log"
    log.write_bytes(b"Running entrypoint\n" + result.to_json() + b"\nthe run failed: ..\n")
    monkeypatch.setattr("rayk.bench.report.FIGURES", {})
    assert main(["report", str(log)]) == 0 and read_result(tmp_path / "result.json") == result
    assert main(["bench", "--smoke", "--scale", "0.02", "--runtime", "inline", "--out", "-"]) == 0
    shown = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(shown.encode())))
    assert main(["report", "-", "--out", str(tmp_path / "second")]) == 0
    assert read_result(tmp_path / "second" / "result.json").requests.completed == 40


def test_what_failed_is_said_in_a_line(serve: Serve, chat: Workload) -> None:
    result = result_of(serve, chat)
    assert result.ok and result.failure == ""
    faults = [Fault(kind="ReplicaLostError", message="replica 1 is gone", at=1.0, replica=1)] * 2
    bad = msgspec.structs.replace(
        result,
        requests=msgspec.structs.replace(result.requests, failed=3),
        verify=VerifyCounts(slots_checked=9, mismatches=1, first_mismatch="page 5"),
        faults=faults,
    )
    assert not bad.ok and bad.failure == (
        "3 of 40 requests failed; 1 slots held other bytes (page 5); ReplicaLostError: replica 1 is gone; and 1 more"
    )


def test_a_report_of_a_run_that_was_lost_at_once(tmp_path: Path, chat: Workload) -> None:
    measured = Measured([ReplicaCounts()])
    result = make_result(BenchSettings(runtime="inline", replicas=1, pages=5), chat, measured)
    faulty = msgspec.structs.replace(result, faults=[Fault(kind="ReplicaLostError", message="<gone>", at=0.5)])
    write_report(faulty, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not faulty.ok and "The run failed" in html and "&lt;gone&gt;" in html


def test_the_first_screen_answers_what_a_manager_asks(serve: Serve, chat: Workload) -> None:
    result = result_of(serve, chat, slo_ttft=100.0, slo_itl=1e-9)
    tiles = {tile.what: tile for tile in headline(result)}
    assert "one pooled cache" in tiles["of prompt tokens reused"].more
    assert tiles["within the objectives"].value == "0.0%", "nobody is that fast between tokens"
    assert f"{result.tokens.cached:,} tokens not computed, at an assumed 10,000" in tiles["of GPU time saved"].more
    assert tiles["of GPU time saved"].value == show_seconds(result.tokens.cached / 10_000)
    assert "p99" in tiles["to the first token (p50)"].more and "of a replica's pages" in tiles[
        "imbalance (most computed over mean)"
    ].more  # fmt: skip
    easy = result_of(serve, chat, slo_ttft=100.0).goodput
    assert easy is not None and easy.met == 40 and easy.share == 1.0 and easy.itl is None


def test_faults_are_on_the_time_axes(serve: Serve, chat: Workload, tmp_path: Path) -> None:
    result = result_of(serve, chat)
    fault = Fault(kind="kill-replica", at=result.elapsed / 2, target="replica 1", recovered_s=result.elapsed / 4)
    write_report(msgspec.structs.replace(result, faults=[fault]), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("fault, until it was over") >= 4 and "<td>replica 1</td>" in html and "var(--bad)" in html


def _luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(p * w for p, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def test_colours_can_be_seen_on_both_backgrounds(serve: Serve, chat: Workload, tmp_path: Path) -> None:
    """Lines stand out from the card by WCAG's 3:1 (the pink and the sky blue, seventh hands, by 2:1), text by 4.5:1."""
    write_report(result_of(serve, chat), tmp_path)
    html = (tmp_path / "report.html").read_text()
    light, dark = (dict(re.findall(r"(--\w+): (#[0-9a-f]+)", part)) for part in html.split("@media")[:2])
    assert set(VARIABLES.values()) <= set(light) and set(light) == set(dark) and len(COLORS) == 8
    assert not [color for color in COLORS if f"stroke: {color}" in html], "a figure has a colour of its own"
    for theme in (light, dark):
        theme = {name: "#ffffff" if color == "#fff" else color for name, color in theme.items()}
        card = _luminance(theme["--card"])
        for name, color in theme.items():
            high, low = sorted((_luminance(color), card), reverse=True)
            least = {"--ink": 4.5, "--ink2": 4.5, "--quiet": 4.5, "--good": 4.5, "--bad": 4.5, "--c3": 2, "--c5": 2}
            if (name.startswith("--c") and name != "--card") or name in least:
                assert (high + 0.05) / (low + 0.05) >= least.get(name, 3), (name, color)


def test_runs_beside_each_other(serve: Serve, chat: Workload, tmp_path: Path) -> None:
    runs = [(f"c {c}", result_of(serve, chat, max_batch_size=c)) for c in (8, 2, 4)]
    assert swept(runs) == ("max_batch_size", [8.0, 2.0, 4.0])
    written = {path.name for path in write_comparison(runs, tmp_path)}
    assert written == {"scaling.png", "ttft.png", "itl.png", "e2e.png", "comparison.html"}
    html = (tmp_path / "comparison.html").read_text()
    assert html.index("c 2") < html.index("c 4") < html.index("c 8"), "in the order of what was swept"
    assert html.count("40/40") == 3 and "Scaling" in html and not re.search(r'(src|href)="(https?:)?//', html)


def test_a_warm_up_is_left_out(serve: Serve, chat: Workload) -> None:
    whole, warm = result_of(serve, chat), result_of(serve, chat, warmup_s=0.02)
    assert warm.warmup is not None and warm.warmup >= 0.02 and whole.warmup is None
    assert 0 < warm.requests.completed < 40 and warm.requests.submitted == warm.requests.completed
    assert 0 <= warm.requests.completed - warm.latency["e2e"].count <= 8, "those that were about to be released then"
    assert warm.requests.completed < whole.latency["e2e"].count
    assert 0 < warm.tokens.prompt < whole.tokens.prompt and sum(r.requests for r in warm.replicas) < 40
    assert warm.series.hit_rate is not None and warm.series.hit_rate.t[0] >= warm.warmup
    assert warm.series.hit_rate.measured[-1] == pytest.approx(warm.hit_rate.measured)
    assert warm.series.hit_rate.pooled[-1] == pytest.approx(warm.hit_rate.simulated_pooled)
    assert warm.verify is not None and whole.verify is not None
    assert "left out" in dict(summary_rows(warm))["warm-up"]


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
