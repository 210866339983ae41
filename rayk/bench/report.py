"""report.html (one file, no network needed), summary.md and PNGs, made from a result.json alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from rayk.bench.figures import FIGURES, render
from rayk.bench.progress import summary_rows
from rayk.bench.result import BenchResult
from rayk.quantity import show_seconds


def write_report(result: BenchResult, out: Path) -> list[Path]:
    """Write the report of `result` into the folder `out` (made if need be); the files written. OSError passes."""
    out.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, (title, _) in FIGURES.items():
        png, svg = render(result, name)
        (out / f"{name}.png").write_bytes(png)
        figures.append((title, Markup(svg)))
    write_words(result, out, figures)
    return [out / name for name in (*(f"{name}.png" for name in FIGURES), "report.html", "summary.md")]


def write_words(result: BenchResult, out: Path, figures: Sequence[tuple[str, Markup]] = ()) -> None:
    """The report, without figures where a process may have no time left for them, into a folder that is there."""
    (out / "summary.md").write_text(markdown(result), encoding="utf-8")
    (out / "report.html").write_text(_html(result, figures), encoding="utf-8")


def headline(result: BenchResult) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first: text and what it is."""
    asked, hits = result.requests, result.hit_rate
    tiles = [(f"{asked.completed}/{asked.submitted}", "requests completed")]
    if hits.measured is not None:
        tiles.append((f"{hits.measured:.1%}", "of prompt tokens reused"))
    if hits.simulated_pooled is not None:
        tiles.append((f"{hits.simulated_pooled:.1%}", "with one pooled cache"))
    if result.verify is not None:
        tiles.append((f"{result.verify.mismatches}", f"mismatches in {result.verify.slots_checked:,} slots"))
    if "ttft" in result.latency:
        tiles.append((show_seconds(result.latency["ttft"].p50), "to the first token (p50)"))
    tiles.append((f"{result.throughput.requests_per_s:.1f}/s", "requests"))
    return tiles


def markdown(result: BenchResult) -> str:
    """The summary as markdown."""
    lines = [f"# {_title(result)}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text.replace('|', '/')} |" for name, text in summary_rows(result)]
    lines += ["", f"rayk {result.version}; " + ", ".join(f"{k} {v}" for k, v in result.environment.items())]
    lines += ["", "## Settings", "", "```json", json.dumps(result.config, indent=2), "```", ""]
    return "\n".join(lines)


def _title(result: BenchResult) -> str:
    source = result.config.get("source", {}).get("name", "workload")
    return f"rayk bench: {source} on {len(result.replicas)} replica(s)"


def _html(result: BenchResult, figures: Sequence[tuple[str, Markup]]) -> str:
    environment = Environment(
        loader=PackageLoader("rayk.bench", "."), autoescape=select_autoescape(("html", "j2")), undefined=StrictUndefined
    )
    template = environment.get_template("report.html.j2")
    tiles, rows = headline(result), summary_rows(result)
    return template.render(result=result, title=_title(result), tiles=tiles, rows=rows, figures=figures)
