"""How long tests wait: seconds of a quiet machine, times one scale that grows on a busy one."""

import os
import time
from collections.abc import Callable
from typing import Any


def scaled(seconds: float) -> float:
    """What takes so many seconds on a quiet machine may take this many now: more where processes queue for cores."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `condition` returns once that is true; AssertionError after so many seconds of a quiet machine."""
    began = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - began < scaled(seconds), f"still false after {scaled(seconds):.0f} s: {condition}"
        time.sleep(0.01)
    return value
