"""What an actor's process sets once, after it has built what it keeps."""

from __future__ import annotations

import gc

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
