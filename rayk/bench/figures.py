"""The figures of a report, drawn with matplotlib (no display needed) from results alone.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; lines differ in dashes, too. In
a page they are variables, so that they suit a dark background.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayk.bench.result import BenchResult

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#6a51a3", "#525252")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 2)))
INK, QUIET, GRID, FAULT = "#334155", "#64748b", "#e2e8f0", "#b91c1c"
VARIABLES = {color: f"--c{at}" for at, color in enumerate(COLORS)} | {
    INK: "--ink2",
    QUIET: "--quiet",
    GRID: "--grid",
    FAULT: "--bad",
}
"""Of the page, for colours of an SVG."""
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rayk",
}
MEASURES = {
    "requests": ("ttft", "itl", "e2e"),
    "inside a replica, and round trips of the driver": ("claim", "alloc", "step", "admit", "tick"),
}
WINDOWS = 60  # in which throughput is counted


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _legend(axes: Axes) -> None:
    """Beside the figure, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _time_axis(axes: Axes, result: BenchResult) -> None:
    """What was left out as a warm-up, and where faults were: a line each, and a shade until it was over."""
    named, end = set[str](), result.elapsed + (result.warmup or 0.0)
    if result.warmup is not None:
        axes.axvspan(0, result.warmup, color=QUIET, alpha=0.12, lw=0, label="warm-up")
    for fault in result.faults:
        label = None if "fault" in named else "fault, until it was over"
        named.add("fault")
        axes.axvline(fault.at, color=FAULT, lw=1, ls=":", label=label)
        if fault.recovered_s is not None:
            axes.axvspan(fault.at, min(end, fault.at + fault.recovered_s), color=FAULT, alpha=0.08, lw=0)
    axes.set(xlabel="seconds", xlim=(0, end or None), ylim=(0, None))
    _legend(axes)


def hit_rate(result: BenchResult) -> Figure:
    """Cumulative hit rate over time: measured, one pooled cache, an infinite cache."""
    figure, (axes,) = _new(8, 3)
    series = result.series.hit_rate
    if series is not None:
        axes.plot(series.t, series.infinite, color=COLORS[2], ls=":", label="infinite cache")
        axes.plot(series.t, series.pooled, color=COLORS[1], ls="--", label="one pooled cache")
        axes.plot(series.t, series.measured, color=COLORS[0], lw=2, label="measured")
    axes.set(ylabel="hit rate so far")
    _time_axis(axes, result)
    return figure


def _distributions(axes: Axes, curves: Sequence[tuple[str, Sequence[float]]]) -> None:
    for at, (label, quantiles) in enumerate(curves):
        shares = [p / (len(quantiles) - 1) for p in range(len(quantiles))]
        seconds = [max(value, 1e-7) for value in quantiles]
        axes.plot(seconds, shares, color=COLORS[at % len(COLORS)], ls=DASHES[at % len(DASHES)], label=label)
    axes.set(xlabel="seconds", ylabel="share at most so long", ylim=(0, 1.02), xscale="log")
    if curves:
        axes.legend(loc="best")


def latency(result: BenchResult) -> Figure:
    """Latency distributions: the share of calls or requests that took at most so long, on a logarithmic axis."""
    panels = {
        title: [(name, result.latency[name].quantiles) for name in names if name in result.latency]
        for title, names in MEASURES.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves} or {"requests": []}
    figure, drawn = _new(8, 3.2, columns=len(panels))
    for axes, (title, curves) in zip(drawn, panels.items(), strict=True):
        _distributions(axes, curves)
        axes.set_title(title, fontsize=10)
    return figure


def throughput(result: BenchResult) -> Figure:
    """Tokens a second over time: prompt tokens admitted, of these reused, and generated ones."""
    figure, (axes,) = _new(8, 3)
    series, t = result.series, np.array(result.series.t)
    columns = {"prompt": series.prompt, "of these reused": series.cached, "generated": series.generated}
    if len(t) > 2 and t[-1] > t[0]:
        at = np.linspace(t[0], t[-1], min(WINDOWS, len(t)))
        for color, dash, (label, counts) in zip(COLORS, DASHES, columns.items(), strict=False):
            if len(counts) == len(t):
                rates = np.diff(np.interp(at, t, counts)) / np.diff(at)
                middle = (at[1:] + at[:-1]) / 2
                axes.plot(middle, rates.clip(0), color=color, ls=dash, label=label)
    axes.set(ylabel="tokens a second")
    _time_axis(axes, result)
    return figure


def pages(result: BenchResult) -> Figure:
    """Pages in use on each replica over time; cached pages that no request holds are not in use."""
    figure, (axes,) = _new(8, 3)
    series = result.series
    for replica, used in zip(result.replicas, series.used_pages, strict=True):
        known = [(t, value) for t, value in zip(series.t, used, strict=True) if value is not None]
        at = replica.index % len(COLORS)
        if known:
            axes.plot(*zip(*known, strict=True), color=COLORS[at], ls=DASHES[at], label=f"replica {replica.index}")
    if result.replicas:
        axes.axhline(result.replicas[0].pages, color=QUIET, ls="--", lw=1, label="pages of a replica")
    axes.set(ylabel="pages in use")
    _time_axis(axes, result)
    return figure


def load(result: BenchResult) -> Figure:
    """Running and waiting requests over time."""
    figure, (axes,) = _new(8, 2.6)
    for color, dash, name in zip(COLORS, DASHES, ("running", "waiting"), strict=False):
        axes.plot(result.series.t, getattr(result.series, name), color=color, ls=dash, label=name)
    axes.set(ylabel="requests")
    _time_axis(axes, result)
    return figure


def balance(result: BenchResult) -> Figure:
    """Requests and hit rate of each replica."""
    figure, (requests, hits) = _new(8, 2.6, columns=2)
    at = [each.index for each in result.replicas]
    requests.bar(at, [each.requests for each in result.replicas], color=COLORS[0])
    hits.bar(at, [each.hit_rate or 0.0 for each in result.replicas], color=COLORS[2])
    for axes, label in ((requests, "requests"), (hits, "hit rate")):
        axes.set(xlabel="replica", ylabel=label, xticks=at[:: 1 + len(at) // 16])
    return figure


FIGURES: dict[str, tuple[str, Callable[[BenchResult], Figure]]] = {
    "hit_rate": ("Hit rate over time", hit_rate),
    "latency": ("Latency distributions", latency),
    "throughput": ("Throughput over time", throughput),
    "pages": ("Pages used per replica", pages),
    "load": ("Requests running and waiting", load),
    "balance": ("Requests and hit rate by replica", balance),
}
"""The figures by name, with their titles."""


def scaling(runs: Sequence[tuple[str, BenchResult]], axis: str, values: Sequence[float]) -> Figure:
    """What a setting does that the runs differ in: throughput, hit rates, time to the first token."""
    figure, (rates, hits, first) = _new(10, 3.2, columns=3)
    results = [result for _, result in runs]
    rates.plot(
        values, [each.throughput.requests_per_s for each in results], color=COLORS[0], marker="o", label="served"
    )
    if all(each.goodput is not None for each in results):
        good = [each.goodput.requests_per_s for each in results if each.goodput is not None]
        rates.plot(values, good, color=COLORS[2], ls="--", marker="s", label="within objectives")
    for color, dash, mark, name in zip(
        COLORS, DASHES, "os^", ("measured", "simulated_pooled", "infinite"), strict=False
    ):
        label = name.replace("simulated_", "")
        found = [getattr(each.hit_rate, name) for each in results]
        hits.plot(values, [np.nan if f is None else f for f in found], color=color, ls=dash, marker=mark, label=label)
    for color, dash, name in zip(COLORS, DASHES, ("p50", "p99"), strict=False):
        took = [getattr(each.latency["ttft"], name) if "ttft" in each.latency else np.nan for each in results]
        first.plot(values, took, color=color, ls=dash, marker="o", label=name)
    for axes, title in ((rates, "requests a second"), (hits, "hit rate"), (first, "seconds to the first token")):
        axes.set(xlabel=axis.replace("_", " "), ylim=(0, None))
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_title(title, fontsize=10)
        axes.legend(loc="best")
    return figure


def overlay(runs: Sequence[tuple[str, BenchResult]], name: str) -> Figure:
    """One latency of all runs."""
    figure, (axes,) = _new(8, 3)
    _distributions(axes, [(label, each.latency[name].quantiles) for label, each in runs if name in each.latency])
    return figure


def render(draw: Callable[[], Figure]) -> tuple[bytes, str]:
    """A figure as PNG bytes on white, and as an SVG element in the page's colours."""
    with rc_context(STYLE):
        figure = draw()
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=130, facecolor="white")
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return png.getvalue(), text[text.index("<svg") :]
