"""Which package may import which: a module imports what stands below it or beside it, and no imports form a circle.

    python tests/layers.py    # part of `make lint`

Imports inside functions and under TYPE_CHECKING count: postponing an import does not turn the order round. `rayk`
itself, whose names are loaded on first use, is a list of addresses and imports nothing that would count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (  # highest first
    ("__main__", "cli", "bench", "simulate"),
    ("workloads",),
    ("server",),
    ("",),  # rayk, the public names
    ("manager", "cluster", "dispatch", "session"),
    ("actors",),
    ("engine", "replica"),
    ("scheduler",),
    ("protocol",),
    ("models", "planning", "transport", "tiers", "attention"),
    ("kvcache",),
    ("metrics",),
    ("context", "params", "sampling", "structured", "values", "quantity", "request_errors", "errors"),
)
HEIGHT = {package: -i for i, layer in enumerate(LAYERS) for package in layer}


def modules() -> dict[str, Path]:
    """Path of each module, by its name without `rayk.`; the links of rayk/ lead to the folders beside it."""
    found = {}
    for folder, prefix in ((ROOT / "rayk", ""), (ROOT / "actors", "actors."), (ROOT / "scheduler", "scheduler.")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix or parts[0] not in ("actors", "scheduler"):
                found[(prefix + ".".join(parts)).removesuffix("__init__").strip(".")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Lines and modules that the file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "rayk":
                module = name[5:]
                yield node.lineno, module if module in known else module.rpartition(".")[0]


def problems() -> Iterator[str]:
    """A line for each import upwards, and one for a circle."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        if not module:
            continue
        for line, target in imports(path, known):
            if HEIGHT[target.partition(".")[0]] > HEIGHT[module.partition(".")[0]]:
                yield f"{path.relative_to(ROOT)}:{line}: rayk.{module} stands below rayk.{target}, which it imports"
            if target:
                graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "a circle of imports: " + " -> ".join(f"rayk.{module}" for module in reversed(error.args[1]))


if __name__ == "__main__":
    found = list(problems())
    print("\n".join(found) or f"layers: {len(modules())} modules, none imports upwards, no circle")
    sys.exit(bool(found))
