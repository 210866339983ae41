"""The figures of a report, drawn with matplotlib (no display needed) from a result alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayk.bench.result import BenchResult

COLORS = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#0891b2", "#65a30d", "#475569")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rayk",
}
MEASURES = {
    "inside a replica and round trips of the driver": ("claim", "alloc", "step", "admit", "tick"),
    "requests": ("ttft", "itl", "e2e"),
}


def _new(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def hit_rate(result: BenchResult) -> Figure:
    """Cumulative hit rate over time: measured, one pooled cache, an infinite cache."""
    figure, (axes,) = _new(8, 3.2)
    series = result.series.hit_rate
    if series is not None:
        axes.plot(series.t, series.infinite, color=COLORS[2], ls=":", label="infinite cache")
        axes.plot(series.t, series.pooled, color=COLORS[1], ls="--", label="one pooled cache")
        axes.plot(series.t, series.measured, color=COLORS[0], lw=2, label="measured")
        axes.legend(loc="best")
    axes.set(xlabel="seconds", ylabel="hit rate so far", ylim=(0, None))
    return figure


def latency(result: BenchResult) -> Figure:
    """Latency distributions: the share of calls or requests that took at most so long, on a logarithmic axis."""
    figure, panels = _new(8, 3.4, columns=2)
    for axes, (title, names) in zip(panels, MEASURES.items(), strict=True):
        for color, name in zip(COLORS, names, strict=False):
            if name in result.latency:
                quantiles = [max(value, 1e-7) for value in result.latency[name].quantiles]
                axes.plot(quantiles, [p / 100 for p in range(len(quantiles))], color=color, label=name)
        axes.set(xlabel="seconds", ylabel="share at most so long", ylim=(0, 1.02), xscale="log")
        axes.set_title(title, fontsize=10, color="#334155")
        if axes.get_lines():
            axes.legend(loc="lower right")
    return figure


def pages(result: BenchResult) -> Figure:
    """Pages in use on each replica over time; cached pages that no request holds are not in use."""
    figure, (axes,) = _new(8, 3.2)
    series = result.series
    for replica, used in zip(result.replicas, series.used_pages, strict=True):
        known = [(t, value) for t, value in zip(series.t, used, strict=True) if value is not None]
        color = COLORS[replica.index % len(COLORS)]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, label=f"replica {replica.index}")
    if result.replicas:
        axes.axhline(result.replicas[0].pages, color="#94a3b8", ls="--", lw=1, label="pages of a replica")
    axes.set(xlabel="seconds", ylabel="pages in use", ylim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def load(result: BenchResult) -> Figure:
    """Running and waiting requests over time."""
    figure, (axes,) = _new(8, 2.6)
    for color, name in zip(COLORS, ("running", "waiting"), strict=False):
        axes.plot(result.series.t, getattr(result.series, name), color=color, label=name)
    axes.set(xlabel="seconds", ylabel="requests", ylim=(0, None))
    axes.legend(loc="best")
    return figure


FIGURES: dict[str, tuple[str, Callable[[BenchResult], Figure]]] = {
    "hit_rate": ("Hit rate over time", hit_rate),
    "latency": ("Latency distributions", latency),
    "pages": ("Pages used per replica", pages),
    "load": ("Requests running and waiting", load),
}
"""The figures by name, with their titles."""


def render(result: BenchResult, name: str) -> tuple[bytes, str]:
    """Figure `name` as PNG bytes and as an SVG element."""
    with rc_context(STYLE):
        figure = FIGURES[name][1](result)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=130)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    return png.getvalue(), text[text.index("<svg") :]
