"""Whether a thread that is at work gets on: what tells a hang from work that takes long.

Progress is a piece of work that ends, or processor time of the thread: computing takes some, and so does waiting for a
GPU, which torch does by looking again and again. Waiting for a lock that nobody releases takes none. Waiting for a disk
or a peer takes none either, and has a limit of its own: it is no hang where waiting() is around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

LONGEST_LOOK = 1.0  # seconds that count between two looks: a process that stood still itself saw nothing


def thread_seconds(ident: int) -> float:
    """Processor seconds that a thread of this process has taken."""
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


_waiting: set[int] = set()  # threads of this process that wait for what has a limit of its own


@contextmanager
def waiting() -> Iterator[None]:
    """This thread waits for a disk or a peer, for as long as that is given."""
    thread = get_ident()
    _waiting.add(thread)
    try:
        yield
    finally:
        _waiting.discard(thread)


class Progress:
    """Of one thread, or of several that work in turn. begin() and end() are around each piece of work, and cost little;
    any thread looks."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, worked: Callable[[int], float] = thread_seconds
    ) -> None:
        self._clock = clock
        self._worked = worked
        self._thread = 0  # that is at work; 0: none
        self._begun = 0
        self._seen: tuple[int, int] = (0, 0)  # pieces of work and milliseconds, at the last progress
        self._last = clock()
        self._stalled = 0.0

    def begin(self) -> None:
        """This thread is at work."""
        self._thread = get_ident()
        self._begun += 1

    def end(self) -> None:
        """It is done."""
        self._thread = 0

    def stalled(self) -> float:
        """Seconds for which work was under way and did not get on, by the looks so far: to be called every second."""
        thread, now = self._thread, self._clock()
        seen = self._begun, int(self._worked(thread) * 1e3) if thread else 0
        if thread and seen == self._seen and thread not in _waiting:
            self._stalled += min(now - self._last, LONGEST_LOOK)
        else:
            self._stalled = 0.0
        self._seen, self._last = seen, now
        return self._stalled
