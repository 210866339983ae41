"""Work that gets on, however long it takes, and work that hangs."""

from __future__ import annotations

import threading

from rayk.kvcache.progress import Progress, thread_seconds, waiting

from ...patience import until  # noqa: TID252  # tests/ is no package that has an absolute name


class Watched:
    def __init__(self) -> None:
        self.now, self.worked = 50.0, 1.0
        self.progress = Progress(lambda: self.now, lambda thread: self.worked)

    def look(self, seconds: float = 0.5) -> float:
        self.now += seconds
        return self.progress.stalled()


def test_only_work_that_does_not_get_on_is_stalled() -> None:
    watched = Watched()
    assert [watched.look() for _ in range(9)] == [0.0] * 9, "nothing to do is no hang"
    watched.progress.begin()
    watched.look()
    assert [watched.look() for _ in range(3)] == [0.5, 1.0, 1.5]
    watched.worked += 0.002
    assert watched.look() == 0.0, "it computes"
    assert watched.look() == 0.5
    watched.progress.end()
    watched.progress.begin()
    assert watched.look() == 0.0, "another piece of work"
    assert watched.look() == 0.5
    watched.progress.end()
    assert watched.look() == 0.0


def test_waiting_for_a_disk_or_a_peer_is_no_hang() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.look()
    with waiting():
        assert [watched.look() for _ in range(9)] == [0.0] * 9
    assert [watched.look() for _ in range(2)] == [0.5, 1.0], "what comes after it may be one"


def test_a_process_that_stood_still_itself_counts_a_second() -> None:
    watched = Watched()
    watched.progress.begin()
    watched.look()
    assert watched.look(3600.0) == 1.0


def test_real_threads() -> None:
    """One that waits for a lock takes no processor time, one that computes does."""
    over, locked = threading.Event(), threading.Lock()

    def compute() -> None:
        while not over.is_set():
            sum(range(10_000))

    def hang() -> None:
        locked.acquire()
        locked.release()

    with locked:
        threads = [threading.Thread(target=what) for what in (compute, hang)]
        for thread in threads:
            thread.start()
        before = [thread_seconds(thread.ident or 0) for thread in threads]
        until(lambda: thread_seconds(threads[0].ident or 0) - before[0] >= 0.02)
        assert thread_seconds(threads[1].ident or 0) - before[1] < 0.001
        over.set()
    for thread in threads:
        thread.join()
