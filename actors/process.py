"""What an actor's process sets once, after it has built what it keeps."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayk.actors.interface import Runtime

YOUNG, MIDDLE, OLD = 50_000, 20, 100


def freeze_startup_objects() -> None:
    """Have the garbage collector leave long-lived objects alone.

    A replica keeps a few objects for every request and cached segment, none of them in cycles, and by default each
    few hundred new ones have the collector look at all of them again: two thirds of the time of an admission.
    """
    if gc.get_threshold() != (YOUNG, MIDDLE, OLD):
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG, MIDDLE, OLD)


def spare_from_kernel() -> None:
    """Ray has the kernel's OOM killer take workers first; take this process as one of any program's, if that may be
    said. (Ray's own memory monitor cannot be told: it takes what it can start again first.)"""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")


def own_runtime(key: str) -> Runtime:
    """Ray, in the process of the scheduler for which something is kept under `key`, in its session's namespace."""
    from rayk.actors.runtime import RayRuntime  # here, so that only a scheduler's process imports Ray for it

    session = key.split("/", 1)[0]
    return RayRuntime(f"rayk-{session}" if session else None)
