"""The threads that read and write a tier's files, so that the replica's own thread never waits for a disk.

A thread that has been at one job for longer than HANG_SECONDS is given up: another one takes its place, and it ends
when its call comes back, if ever. With SPARE threads given up nothing more is begun until one of them comes back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from heapq import heapify, heappop, heappush
from threading import Condition, Thread, current_thread
from time import monotonic
from typing import Any, TypeVar

READ, WRITE = 0, 1  # somebody waits for a read

HANG_SECONDS = 10.0
SPARE = 8

T = TypeVar("T")
_Job = tuple[int, int, Callable[[], Any], "Future[Any]"]


class Workers:
    """`count` daemon threads, started with the first job. Reads overtake writes."""

    def __init__(self, count: int, name: str = "rayk-tier", clock: Callable[[], float] = monotonic) -> None:
        self._count = count
        self._name = name
        self._clock = clock
        self._jobs: list[_Job] = []  # a heap
        self._numbers = itertools.count()
        self._changed = Condition()
        self._busy: dict[Thread, float] = {}  # since when
        self._given_up: set[Thread] = set()
        self._threads: set[Thread] = set()
        self._stopped = False

    @property
    def open(self) -> int:
        """Jobs that are not done, those of threads that were given up left out."""
        return len(self._jobs) + len(self._busy)

    @property
    def hung(self) -> int:
        """Threads that were given up, and have not come back."""
        return len(self._given_up)

    def submit(self, priority: int, work: Callable[[], T]) -> Future[T]:
        """Run `work` on a thread. Its exception, if any, is in the future; so is a cancellation by drop()."""
        future: Future[T] = Future()
        with self._changed:
            heappush(self._jobs, (priority, next(self._numbers), work, future))
            self._staff()
            self._changed.notify()
        return future

    def watch(self) -> float:
        """Give up threads that hang. How many seconds the longest of the others has been at its job."""
        if not self._busy:
            return 0.0
        with self._changed:
            now, longest = self._clock(), 0.0
            for thread, since in list(self._busy.items()):
                if now - since < HANG_SECONDS or len(self._given_up) >= SPARE:
                    longest = max(longest, now - since)
                else:
                    del self._busy[thread]
                    self._threads.discard(thread)
                    self._given_up.add(thread)
                    self._changed.notify_all()
            self._staff()
            return longest

    def drop(self, priority: int) -> int:
        """Cancel the jobs of a kind that nobody has begun; how many."""
        with self._changed:
            gone = [job for job in self._jobs if job[0] == priority]
            self._jobs = [job for job in self._jobs if job[0] != priority]
            heapify(self._jobs)
            self._changed.notify_all()
        for *_, future in gone:
            future.cancel()
        return len(gone)

    def _staff(self) -> None:
        """Threads for what there is to do: all at once, and others for those that were given up."""
        if self._stopped or len(self._given_up) >= SPARE or not self._jobs:
            return
        while len(self._threads) < self._count:
            thread = Thread(target=self._run, name=f"{self._name}-{next(self._numbers)}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _run(self) -> None:
        me = current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopped)
                if not self._jobs:
                    self._threads.discard(me)
                    return
                self._busy[me] = self._clock()  # first: `open` looks without the lock, and must not miss a job between
                _, _, work, future = heappop(self._jobs)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del work, future
            with self._changed:
                self._busy.pop(me, None)
                self._changed.notify_all()
                if me in self._given_up:
                    self._given_up.discard(me)
                    self._staff()
                    return

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all jobs are done, so many seconds at most; whether they are. Threads that hang are given up."""
        end = None if seconds is None else self._clock() + seconds
        while self.open:
            self.watch()
            left = 0.25 if end is None else min(0.25, end - self._clock())
            if left <= 0:
                return False
            with self._changed:
                self._changed.wait_for(lambda: not self.open, left)
        return True

    def stop(self) -> bool:
        """Begin nothing more and end the threads. False when some of them hang in a call."""
        self.drop(READ)
        self.drop(WRITE)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            hung = {*self._busy, *self._given_up}
        for thread in list(self._threads):
            if thread not in hung:
                thread.join()
        return not hung
