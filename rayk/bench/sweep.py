"""Several runs: one for each value of a flag, or a search for how much load meets the objectives."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from rayk.bench.flags import BenchFlags
from rayk.bench.report import headline, write_comparison
from rayk.bench.result import BenchResult
from rayk.bench.stop import Stopped
from rayk.cli.flags import Format
from rayk.cli.table import make_table
from rayk.errors import ConfigError

STEPS = 8  # doublings or halvings at most
HALVINGS = 3  # of what is left between a speed that is met and one that is not
NUMBERS = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str, "str | None": str}

Measure = Callable[[BenchFlags], tuple[BenchResult, bool]]
"""One run, and whether it went well."""

log = logging.getLogger("rayk.bench")


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """`replicas=1,2,4` as the field of BenchFlags and its values; ConfigError for what cannot be swept."""
    name, equals, values = text.partition("=")
    field = name.strip().replace("-", "_")
    kinds = {each.name: str(each.type) for each in fields(BenchFlags)}
    kind = next((make for text, make in NUMBERS.items() if f"Annotated[{text}," in kinds.get(field, "")), None)
    if not equals or kind is None or field in ("out", "sweep", "saturate"):
        raise ConfigError(f"--sweep {text!r} is not FLAG=VALUE,VALUE of a flag of rayk bench, such as replicas=1,2,4")
    try:
        return field, [kind(value) for value in values.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep {text!r}: {name} takes a number") from None


def sweep(flags: BenchFlags, measure: Measure) -> int:
    """A run for each value, one after the other; 1 when one of them failed."""
    assert flags.sweep is not None
    field, values = parse_sweep(flags.sweep)
    flag, runs, failed = field.replace("_", "-"), list[tuple[str, BenchResult]](), False
    for value in values:
        text = f"{value:g}" if isinstance(value, float) else str(value)
        log.info("--%s %s", flag, text)
        result, well = measure(_one(flags, f"{flag}-{text}", {field: value}))
        runs.append((f"{flag} {text}", result))
        failed |= not well
        if _stopped(result):
            break
    _show(flags, runs, {"flag": flag, "values": values})
    return 1 if failed else 0


def saturate(flags: BenchFlags, measure: Measure) -> int:
    """Double or halve --speed until the objectives are just met, then look between; 1 when no speed was found."""
    wanted = flags.saturate or 0.0
    if not 0 < wanted <= 1:
        raise ConfigError(f"--saturate is {wanted}, a share of requests above 0 and at most 1 is needed")
    if flags.slo_ttft is None and flags.slo_itl is None:
        raise ConfigError("--saturate needs --slo-ttft or --slo-itl: what is to be met")
    tried: dict[float, BenchResult] = {}

    def meets(speed: float) -> bool:
        result, well = measure(_one(flags, f"speed-{speed:g}", {"speed": speed}))
        assert result.goodput is not None
        tried[speed] = result
        if _stopped(result):
            raise KeyboardInterrupt
        met = well and result.goodput.share >= wanted
        word = "met" if met else "not met"
        log.info("--speed %g: %.1f%% within the objectives: %s", speed, 100 * result.goodput.share, word)
        return met

    best = search(flags.speed or 1.0, meets)
    runs = [(f"speed {speed:g}", result) for speed, result in sorted(tried.items())]
    rate = tried[best].throughput.requests_per_s if best is not None else None
    _show(flags, runs, {"share": wanted, "speed": best, "requests_per_s": rate})
    return 0 if best is not None else 1


def _stopped(result: BenchResult) -> bool:
    """By a person or a signal: then nothing more is begun."""
    return any(fault.kind in ("KeyboardInterrupt", Stopped.__name__) for fault in result.faults)


def search(speed: float, meets: Callable[[float], bool]) -> float | None:
    """The highest speed that meets them, within a twelfth or so; None when even the lowest one tried does not."""
    factor, low, high = 2.0, 0.0, math.inf
    for _ in range(STEPS):
        if meets(speed):
            low = max(low, speed)
        else:
            high = min(high, speed)
        if low and high < math.inf:
            break
        speed = low * factor if low else high / factor
    for _ in range(HALVINGS if low and high < math.inf else 0):
        middle = math.sqrt(low * high)
        if meets(middle):
            low = middle
        else:
            high = middle
    return low or None


def _one(flags: BenchFlags, name: str, changes: dict[str, Any]) -> BenchFlags:
    out: Path | None = flags.out / name if flags.out is not None else None
    return replace(flags, sweep=None, saturate=None, out=out, **changes)


def _show(flags: BenchFlags, runs: list[tuple[str, BenchResult]], what: dict[str, Any]) -> None:
    if flags.out is not None:
        write_comparison(runs, flags.out)
    if flags.form is Format.json:
        print(msgspec.json.encode({"command": "bench", **what, "results": [result for _, result in runs]}).decode())
        return
    columns = [{tile.what: tile.value for tile in headline(result)} for _, result in runs]
    whats = list(dict.fromkeys(each for column in columns for each in column))
    rows = [(each, *(column.get(each, "") for column in columns)) for each in whats]
    console = Console()
    console.print(make_table("rayk bench", ("", *(label for label, _ in runs)), rows, left=("",)))
    found = [f"{name} {value}" for name, value in what.items() if name in ("speed", "requests_per_s")]
    if found:
        console.print("saturated at " + ", ".join(found), highlight=False)
    if flags.out is not None:
        console.print(f"report: {flags.out / 'comparison.html'}", soft_wrap=True, highlight=False)
