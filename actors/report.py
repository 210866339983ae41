"""What a process says of itself while it lives: metrics to its node's agent, and an actor's lines in its log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable

from rayk.actors.interface import Runtime
from rayk.metrics.reading import Labels, Reading, Reporter


def start_reporting(
    runtime: Runtime, read: Callable[[Labels], Iterable[Reading]], model: str | None = None
) -> Reporter | None:
    """Export what `read` returns, given the labels that say whose it is; under vLLM's names too, of that `model`.
    Nothing outside of Ray."""
    found = runtime.exporter()
    if found is None:
        return None
    exporter, labels = found
    if labels["cluster"] and not (log := logging.getLogger("rayk")).handlers:  # of an actor: Ray keeps its stderr
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    return Reporter(lambda: read(labels), exporter, model)
