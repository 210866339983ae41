"""The threads that read and write a tier's files, so that the replica's own thread never waits for a disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from queue import PriorityQueue
from threading import Condition, Thread
from typing import Any, TypeVar

READ, WRITE = 0, 1  # somebody waits for a read
_STOP = 2

T = TypeVar("T")


class Workers:
    """`count` daemon threads, started with the first job. Reads overtake writes."""

    def __init__(self, count: int, name: str = "rayk-tier") -> None:
        self._count = count
        self._name = name
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], Any], Future[Any]]] = PriorityQueue()
        self._numbers = itertools.count()
        self._threads: list[Thread] = []
        self._idle = Condition()
        self._open = 0

    @property
    def open(self) -> int:
        """Jobs that are not done."""
        return self._open

    def submit(self, priority: int, work: Callable[[], T]) -> Future[T]:
        """Run `work` on a thread. Its exception, if any, is in the future."""
        if not self._threads:
            for i in range(self._count):
                thread = Thread(target=self._run, name=f"{self._name}-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        future: Future[T] = Future()
        with self._idle:
            self._open += 1
        self._jobs.put((priority, next(self._numbers), work, future))
        return future

    def _run(self) -> None:
        while True:
            priority, _, work, future = self._jobs.get()
            if priority == _STOP:
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del work, future
            with self._idle:
                self._open -= 1
                self._idle.notify_all()

    def drain(self) -> None:
        """Return when all jobs are done."""
        with self._idle:
            self._idle.wait_for(lambda: not self._open)

    def stop(self) -> None:
        """Finish all jobs and end the threads."""
        self.drain()
        for _ in self._threads:
            self._jobs.put((_STOP, next(self._numbers), lambda: None, Future()))
        for thread in self._threads:
            thread.join()
        self._threads = []
