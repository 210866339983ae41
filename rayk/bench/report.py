"""The report of a run: report.html (one file, no network), PNGs and a summary in markdown; of several runs, one page
beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from rayk.bench.figures import FIGURES, overlay, render, scaling
from rayk.bench.progress import summary_rows
from rayk.bench.result import BenchResult
from rayk.quantity import show_seconds

ASSUMED_RATE = 10_000.0  # prompt tokens a second that a GPU is taken to compute where none was measured
LATENCIES = {"ttft": "to the first token", "itl": "between tokens", "e2e": "of a whole request"}


class Tile(NamedTuple):
    """A number of the first screen: what it is, and a line below it."""

    value: str
    what: str
    more: str = ""


def write_report(result: BenchResult, out: Path) -> list[Path]:
    """Write the report of `result` into the folder `out` (made if need be); the files written. OSError passes."""
    out.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, (title, draw) in FIGURES.items():
        png, svg = render(partial(draw, result))
        (out / f"{name}.png").write_bytes(png)
        figures.append((title, Markup(svg)))
    write_words(result, out, figures)
    return [out / name for name in (*(f"{name}.png" for name in FIGURES), "report.html", "summary.md")]


def write_words(result: BenchResult, out: Path, figures: Sequence[tuple[str, Markup]] = ()) -> None:
    """The report, without figures where a process may have no time left for them, into a folder that is there."""
    (out / "summary.md").write_text(markdown(result), encoding="utf-8")
    page = _page("report.html.j2", result=result, title=_title(result), tiles=headline(result), figures=figures)
    (out / "report.html").write_text(page, encoding="utf-8")


def headline(result: BenchResult) -> list[Tile]:
    """What a reader looks for first."""
    asked, hits = result.requests, result.hit_rate
    more = f"{asked.failed} failed, {asked.retried} sent again, {asked.preempted} preemptions"
    tiles = [Tile(f"{asked.completed}/{asked.submitted}", "requests completed", more)]
    if hits.measured is not None:
        others = {"one pooled cache": hits.simulated_pooled, "an infinite one": hits.infinite}
        more = ", ".join(f"{name} {value:.1%}" for name, value in others.items() if value is not None)
        tiles.append(Tile(f"{hits.measured:.1%}", "of prompt tokens reused", more))
    for name, what in LATENCIES.items():
        if (took := result.latency.get(name)) is not None:
            more = f"p90 {show_seconds(took.p90)}, p99 {show_seconds(took.p99)}"
            tiles.append(Tile(show_seconds(took.p50), f"{what} (p50)", more))
    through = result.throughput
    more = f"{through.prompt_tokens_per_s:,.0f} prompt and {through.generated_tokens_per_s:,.0f} generated tokens/s"
    tiles.append(Tile(f"{through.requests_per_s:.1f}/s", "requests", more))
    if result.goodput is not None:
        good = result.goodput
        limits = {"first token": good.ttft, "between tokens": good.itl}
        text = ", ".join(f"{what} {show_seconds(most)}" for what, most in limits.items() if most is not None)
        tiles.append(Tile(f"{good.share:.1%}", "within the objectives", f"{good.requests_per_s:.1f}/s; at most {text}"))
    if result.tokens.cached:
        tiles.append(saved(result))
    if result.imbalance is not None:
        peaks = [each.peak_used_pages / each.pages for each in result.replicas if each.peak_used_pages is not None]
        more = f"at most {max(peaks):.0%} of a replica's pages in use" if peaks else ""
        tiles.append(Tile(f"{result.imbalance:.2f}", "imbalance (most computed over mean)", more))
    if result.verify is not None:
        tiles.append(Tile(f"{result.verify.mismatches}", f"mismatches in {result.verify.slots_checked:,} slots"))
    if result.faults:
        over = [each.recovered_s for each in result.faults if each.recovered_s is not None]
        more = f"{len(over)} over, after {median(over):.1f} s (median), {max(over):.1f} s at most" if over else ""
        tiles.append(Tile(f"{len(result.faults)}", "faults", more))
    return tiles


def saved(result: BenchResult) -> Tile:
    """Tokens that were not computed, as time of a GPU."""
    rate = result.config.get("prefill_rate")
    how = "at the rate of this run" if rate else f"at an assumed {ASSUMED_RATE:,.0f} prompt tokens a second"
    seconds = result.tokens.cached / float(rate or ASSUMED_RATE)
    return Tile(show_seconds(seconds), "of GPU time saved", f"{result.tokens.cached:,} tokens not computed, {how}")


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


def _page(template: str, **values: Any) -> str:
    loader, escape = PackageLoader("rayk.bench", "."), select_autoescape(("html", "j2"))
    environment = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined)
    if "result" in values:
        values["rows"] = summary_rows(values["result"])
    return environment.get_template(template).render(**values)


# -- several runs ------------------------------------------------------------------------------------------


def differing(runs: Sequence[tuple[str, BenchResult]]) -> dict[str, list[Any]]:
    """Settings in which the runs differ, with the value of each run."""
    names = sorted({name for _, result in runs for name in result.config})
    values = {name: [result.config.get(name) for _, result in runs] for name in names if name != "source"}
    return {name: of for name, of in values.items() if any(each != of[0] for each in of)}


def swept(runs: Sequence[tuple[str, BenchResult]]) -> tuple[str, list[float]] | None:
    """The numeric setting that tells all runs apart, and its values; what follows from it, such as pages, is not
    looked at unless there is nothing else."""
    found = {
        name: [float(each) for each in values]
        for name, values in differing(runs).items()
        if all(isinstance(each, (int, float)) for each in values) and len(set(values)) == len(runs)
    }
    name = min(found, key=lambda each: each in ("pages", "host_pages", "max_batch_size"), default=None)
    return (name, found[name]) if name is not None else None


def write_comparison(runs: Sequence[tuple[str, BenchResult]], out: Path) -> list[Path]:
    """Write comparison.html of results and their labels, and its PNGs, into the folder `out`; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    axis, figures = swept(runs), []
    if axis is not None and len(runs) > 1:
        runs = [run for _, run in sorted(zip(axis[1], runs, strict=True), key=lambda each: each[0])]
        drawn: dict[str, Any] = {"scaling": ("", partial(scaling, runs, axis[0], sorted(axis[1])))}
    else:
        drawn = {}
    drawn |= {name: (f"Seconds {what}", partial(overlay, runs, name)) for name, what in LATENCIES.items()}
    written = [out / f"{name}.png" for name in drawn] + [out / "comparison.html"]
    for name, (title, draw) in drawn.items():
        png, svg = render(draw)
        (out / f"{name}.png").write_bytes(png)
        figures.append((title, Markup(svg)))
    columns = [{tile.what: tile for tile in headline(result)} for _, result in runs]
    whats = list(dict.fromkeys(what for column in columns for what in column))
    table = [(what, [column.get(what, Tile("", what)) for column in columns]) for what in whats]
    labels, ok = [label for label, _ in runs], [result.ok for _, result in runs]
    page = _page(
        "comparison.html.j2",
        title=f"rayk bench: {len(runs)} runs",
        labels=labels, verdicts=ok, table=table, settings=differing(runs),
        scaling=next((svg for title, svg in figures if not title), ""), figures=[each for each in figures if each[0]],
    )  # fmt: skip
    written[-1].write_text(page, encoding="utf-8")
    return written
