"""How many threads torch uses in this process while engines serve here, and that it is the caller's number again after.

torch keeps a number for each thread, and one for threads to come. Engines compute in a thread of their own, models are
loaded and tried out in the caller's; both get the engines' number.
"""

from __future__ import annotations

import threading
from typing import ClassVar

import torch


class TorchThreads:
    """The number that one set of engines asked for, from here until release(). Of several sets that overlap, each
    keeps its own in its thread, and the caller sees that of the newest."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _held: ClassVar[list[TorchThreads]] = []  # oldest first
    _before: ClassVar[int] = 0  # the caller's

    def __init__(self, count: int) -> None:
        self.count = count
        with self._lock:
            if not self._held:
                TorchThreads._before = torch.get_num_threads()
            self._held.append(self)
            torch.set_num_threads(count)

    def apply(self) -> None:
        """Use the number in the calling thread, too."""
        torch.get_num_threads()  # a thread's first look takes the number for threads to come: now, not over the next
        torch.set_num_threads(self.count)

    def release(self) -> None:
        """Give back what was before; what the caller has set meanwhile is left. Twice is as good as once."""
        with self._lock:
            if self not in self._held:
                return
            newest = self._held[-1]
            self._held.remove(self)
            if torch.get_num_threads() == newest.count:
                torch.set_num_threads(self._held[-1].count if self._held else TorchThreads._before)
