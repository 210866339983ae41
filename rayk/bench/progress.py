"""What a person sees: progress while a run lasts, and the summary table when it is over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rayk.bench.chaos.run import ChaosResult
from rayk.bench.chaos.schedule import KINDS
from rayk.bench.loop import ClosedLoop
from rayk.bench.measure import Fault
from rayk.bench.result import BenchResult
from rayk.cli.table import make_table
from rayk.quantity import show_seconds

LOG_EVERY_S = 5.0
LABELS = {"ttft": "time to first token", "itl": "between tokens", "e2e": "whole request"} | {
    name: name for name in ("claim", "alloc", "step", "admit", "tick")
}
"""Latencies by what a summary calls them, in its order."""

log = logging.getLogger("rayk.bench")


def progress_view(console: Console, total: int | None) -> LiveProgress | LoggedProgress:
    """A live bar on a terminal, log lines elsewhere, around a run whose driver is shown after every tick. `total`
    requests, None when only the duration is fixed."""
    return LiveProgress(console, total) if console.is_terminal else LoggedProgress(total)


def state_line(driver: ClosedLoop) -> str:
    """One line about the run so far."""
    measured, pages = driver.measured, driver.settings.pages
    rate = measured.hit_rate
    used = [counts.used_pages for counts in measured.replicas]
    parts = [
        f"running {driver.running}",
        f"waiting {driver.waiting}",
        f"hit rate {rate:.3f}" if rate is not None else "",
        "pages " + " ".join("-" if u is None else f"{u / pages:.0%}" for u in used),
        f"preempted {measured.preempted}" if measured.preempted else "",
        f"MISMATCHES {measured.mismatches}" if measured.mismatches else "",
    ]
    return "  ".join(part for part in parts if part)


class LiveProgress(Progress):
    """A rich progress bar with the state of the run beside it; redrawn a few times a second."""

    def __init__(self, console: Console, total: int | None) -> None:
        state = TextColumn("{task.fields[state]}", style="dim")
        columns = (TextColumn("[bold]bench"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), state)
        super().__init__(*columns, console=console, refresh_per_second=4)
        self._run = self.add_task("bench", total=total, state="")
        self._shown_at = -1.0
        self._driver: ClosedLoop | None = None

    def __exit__(self, *exc: Any) -> None:
        if self._driver is not None:
            self._shown_at = -1.0
            self.show(self._driver)
        super().__exit__(*exc)

    def show(self, driver: ClosedLoop) -> None:
        """Update the bar, at most ten times a second."""
        self._driver = driver
        if driver.elapsed - self._shown_at >= 0.1:
            self._shown_at = driver.elapsed
            self.update(self._run, completed=driver.measured.completed, state=state_line(driver))


class LoggedProgress(nullcontext["LoggedProgress"]):
    """A log line every few seconds."""

    def __init__(self, total: int | None, emit: Callable[[str], None] = log.info) -> None:
        super().__init__(self)
        self._total = "" if total is None else f"/{total}"
        self._emit = emit
        self._next_at = LOG_EVERY_S

    def show(self, driver: ClosedLoop) -> None:
        """Log the state when it is time."""
        if driver.elapsed >= self._next_at:
            self._next_at = driver.elapsed + LOG_EVERY_S
            done = f"{driver.measured.completed}{self._total} requests"
            self._emit(f"{driver.elapsed:6.1f} s  {done}  {state_line(driver)}")


def summary_table(result: BenchResult) -> Table:
    """The key numbers of a run."""
    rows = summary_rows(result)
    table = make_table("rayk bench", ("", " "), rows, left=("", " "), show_header=False, pad_edge=False)
    for column, style in zip(table.columns, ("bold", ""), strict=True):
        column.no_wrap, column.style = False, style
    return table


def summary_rows(result: BenchResult) -> list[tuple[str, str]]:
    """The key numbers of a run as names and texts; what was not measured is left out."""
    asked, tokens, hits = result.requests, result.tokens, result.hit_rate
    done = f"{asked.completed} of {asked.submitted} completed, {asked.failed} failed, {asked.preempted} preemptions"
    done += f", {asked.retried} sent again" if asked.retried else ""
    text = f"{tokens.prompt:,} prompt = {tokens.cached:,} reused + {tokens.computed:,} computed; "
    rows = [("requests", done), ("tokens", text + f"{tokens.generated:,} generated")]
    if hits.measured is not None and hits.simulated_pooled is not None and hits.infinite is not None:
        others = f"one pooled cache {hits.simulated_pooled:.4f}, an infinite one {hits.infinite:.4f}"
        text = f"{hits.measured:.4f}  ({others})"
        if hits.by_tier.peer:
            text += f"; {hits.by_tier.peer:.4f} copied from peers"
        if hits.by_tier.host is not None:
            text += f"; {hits.by_tier.host:.4f} from the host tier"
        if hits.by_tier.disk is not None:
            text += f"; {hits.by_tier.disk:.4f} from disk"
        rows.append(("hit rate", text))
    if result.tiers is not None:
        t = result.tiers
        text = f"{t.offloaded:,} pages out, {t.loaded:,} in; host {t.host_used:,} of {t.host_pages:,} pages"
        if t.disk_pages:
            text += f"; disk {t.disk_used:,} of {t.disk_pages:,}, {t.disk_written:,} written, {t.disk_read:,} read"
        if t.failed_loads or t.rejected_files:
            text += f"; {t.failed_loads:,} loads failed, {t.rejected_files:,} files rejected"
        rows.append(("tiers", text))
    if (verify := result.verify) is not None:
        rows.append(("verify", f"{verify.slots_checked:,} slots checked, {verify.mismatches:,} mismatches"))
    for name, label in LABELS.items():
        if (took := result.latency.get(name)) is not None:
            points = (("p50", took.p50), ("p90", took.p90), ("p99", took.p99))
            rows.append((label, "  ".join(f"{point} {show_seconds(value)}" for point, value in points)))
    if result.goodput is not None:
        good = result.goodput
        text = f"{good.met} requests within the objectives, {good.share:.1%}, {good.requests_per_s:.1f} a second"
        rows.append(("goodput", text))
    if result.warmup is not None:
        rows.append(("warm-up", f"what ended in the first {result.warmup:.1f} s is left out"))
    through = result.throughput
    text = f"{through.requests_per_s:.1f} requests/s, {through.prompt_tokens_per_s:,.0f} prompt and "
    text += f"{through.generated_tokens_per_s:,.0f} generated tokens/s over {result.elapsed:.1f} s"
    rows.append(("throughput", text))
    for replica in result.replicas:
        parts = [f"{replica.requests} requests"]
        if replica.hit_rate is not None:
            parts.append(f"hit rate {replica.hit_rate:.4f}")
        if replica.peak_used_pages is not None:
            parts.append(f"at most {replica.peak_used_pages} of {replica.pages} pages in use")
        rows.append((f"replica {replica.index}", ", ".join(parts)))
    if result.imbalance is not None:
        rows.append(("imbalance", f"{result.imbalance:.3f} (largest replica's computed tokens over the mean)"))
    if result.chaos is not None:
        rows += chaos_rows(result.faults, result.chaos)
    return rows + [("fault", f"{fault.kind}: {fault.message}") for fault in result.faults if fault.message]


def chaos_rows(faults: Sequence[Fault], left: ChaosResult) -> list[tuple[str, str]]:
    """A row for each kind of fault that was injected, and what they left."""
    rows = []
    for kind in KINDS:
        took = [fault.recovered_s for fault in faults if fault.kind == kind]
        over = [seconds for seconds in took if seconds is not None]
        if took:
            text = f"{len(took)} times, over {len(over)} times"
            text += f", after {median(over):.1f} s (median), {max(over):.1f} s at most" if over else ""
            rows.append((kind, text))
    if left.undisturbed is not None:
        same = left.undisturbed
        text = (
            f"{same.requests} requests asked again without faults, {same.differing} with other tokens, {same.ties} ties"
        )
        rows.append(("compared", text + (f": {same.first}" if same.first else "")))
    pages, claims = (sum(map(abs, column)) for column in zip((0, 0), *left.left, strict=True))
    return [*rows, ("left behind", f"{pages} pages, {claims} claims")]
