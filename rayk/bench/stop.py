"""SIGTERM and SIGHUP stop a run as Ctrl-C does: what was done until then is reported.

`ray job stop` sends SIGTERM and kills three seconds later: the first ends the run, later ones change nothing.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """The process was asked to end by a signal, which the argument names."""


class StopSignals:
    """What those signals do while a run is set up, lasts, and is reported. Of the main thread; nothing elsewhere."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            found = {each: signal.getsignal(each) for each in SIGNALS}
            # None was not set from Python and cannot be set again; what is ignored (nohup) stays so.
            self._before = {each: now for each, now in found.items() if now not in (None, signal.SIG_IGN)}
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def listen(self) -> None:
        """From here on they raise Stopped. Libraries that came up meanwhile may have taken them for themselves."""
        for each in self._before:
            signal.signal(each, self._stop)

    def ignore(self) -> None:
        """From here on they do nothing: what is left takes a moment."""
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        raise Stopped(f"stopped by {signal.Signals(number).name}")
