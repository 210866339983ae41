"""What kind of code instructions were spent in, read from a file of callgrind.

interpreter   Python's evaluation loop and the frames of its calls
objects       what the loop calls in CPython: numbers, dicts, attributes, tuples, memory
numpy         making views, checking shapes and types, the loops over elements
work          copying, comparing and hashing memory: what would be left in any language
other         everything else
"""

from __future__ import annotations

import re
from collections import Counter

_COST = re.compile(r"^[+\-*\d]\S* (\d+)$")
_NAME = re.compile(r"^\((\d+)\)(?: (.*))?$")
_FRAMES = ("_PyEval_", "_PyFrame_", "_PyThreadState_PopFrame", "initialize_locals")
_MEMORY = re.compile(r"^(__)?(mem(cpy|cmp|set|move|chr)|siphash)|^(sha256|XXH3)")
KINDS = ("interpreter", "objects", "numpy", "work", "other")


def read_shares(text: str) -> dict[str, float]:
    """The share of each kind in the instructions of one file, adding up to 1."""
    names: dict[str, dict[str, str]] = {"ob": {}, "fn": {}}
    at = {"ob": "", "fn": ""}
    spent: Counter[str] = Counter()
    called = False  # the next cost is that of a call, and counted where it arises
    for line in text.splitlines():
        key, found, value = line.partition("=")
        if found and key in at:
            at[key] = _named(names[key], value)
        elif found and key == "cob":
            _named(names["ob"], value)
        elif found and key == "cfn":
            _named(names["fn"], value)
        elif found and key == "calls":
            called = True
        elif cost := _COST.match(line):
            if not called:
                spent[kind_of(at["ob"], at["fn"])] += int(cost[1])
            called = False
    total = sum(spent.values())
    return {kind: spent[kind] / total for kind in KINDS} if total else {}


def _named(names: dict[str, str], value: str) -> str:
    """The name behind `(12) name`, or behind `(12)` once it was given."""
    found = _NAME.match(value)
    if found is None:
        return value
    if found[2] is not None:
        names[found[1]] = found[2]
    return names.get(found[1], "")


def kind_of(library: str, function: str) -> str:
    """The kind of a function of a shared library or program."""
    library = library.rpartition("/")[2]
    if _MEMORY.match(function):
        return "work"
    if "umath" in library:
        return "numpy"
    if function.startswith(_FRAMES):
        return "interpreter"
    return "objects" if library.startswith(("python", "libpython", "libc.", "libc-")) else "other"
