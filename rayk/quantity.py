"""Sizes and durations as people write them: 16GiB, 4096, 0.9 (a share of what is free), 30s, 2m."""

from __future__ import annotations

import re

from rayk.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {f"{p}iB": 1 << 10 * (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str, free_bytes: int) -> int:
    """Bytes of `text`: a number with a unit, plain bytes, or a fraction below 1 of `free_bytes`; else ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)", text.strip())
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match and match[2].lower() in units:
        number, factor = float(match[1]), units[match[2].lower()]
        if not match[2] and "." in match[1]:
            if 0 < number < 1:
                return int(number * free_bytes)
        elif number > 0:
            return int(match[1]) * factor if match[1].isdigit() else int(number * factor)
    raise ConfigError(f"{text!r} is not a size; write 16GiB, a number of bytes, or 0.9 for that share of what is free")


def parse_duration(text: str) -> float:
    """Seconds of `text`: 30s, 2m, 1h, 500ms, or plain seconds. ConfigError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip())
    if match and (match[2] or "s") in _SECONDS and float(match[1]) > 0:
        return float(match[1]) * _SECONDS[match[2] or "s"]
    raise ConfigError(f"{text!r} is not a duration; write 30s, 2m or 1h")


def show_bytes(size: float) -> str:
    """`size` bytes for people, with two decimals from 1 KiB on."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def show_seconds(seconds: float) -> str:
    """A latency for people, three significant digits."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
