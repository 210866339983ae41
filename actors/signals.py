"""Signals of a process that starts or joins Ray."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def own_sigterm(ray: Any) -> Iterator[None]:
    """Where this process has a handler of SIGTERM, Ray puts none in its place meanwhile: that one exits wherever Ray is
    just then, which aborts the process."""
    utils = ray._private.utils
    theirs = utils.set_sigterm_handler
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
