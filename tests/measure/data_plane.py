"""What the data plane gains and costs: `python tests/measure/data_plane.py [ROUNDS]`.

Decode iterations (one tick over all replicas, see rayk.bench.core.ray_path) of two managers on one embedded Ray, by
calls and by sockets, in turns: iterations a second of CPU time of driver and replicas together, milliseconds at the
median, and how many times as good sockets were. Then the cores in use while nothing is said. Then one message of 300
bytes and its answer between two processes: by rayk.actors.connection and by pyzmq (DEALER and ROUTER over ipc).
Printed as the tables of docs/measurements/data-plane.md.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from rayk.actors.connection import Connection
from rayk.actors.listener import Listener
from rayk.bench.core.ray_path import iterate, ray_params, start_lanes
from rayk.context import TextContext
from rayk.kvcache.tick import Tick
from rayk.manager.calls import Calls
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession

SIZES = ((1, 8), (1, 64), (1, 256), (2, 8), (2, 64), (4, 8), (4, 64))  # replicas, requests on each
ITERATIONS = 150  # of a round and way; the first few are not counted
WARM_UP = 5
IDLE_SECONDS = 5.0
OPEN_SECONDS = 30.0
PAGES = 60_000
MESSAGES = 3_000
Taken = list[tuple[float, float]]  # milliseconds and CPU seconds of an iteration


def main(argv: list[str] | None = None) -> int:
    """The command; see the module."""
    arguments = sys.argv[1:] if argv is None else argv
    rounds = int(arguments[0]) if arguments else 5
    what = f"Python {platform.python_version()}, Ray {version('ray')}, {psutil.cpu_count()} cores"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {what}, {rounds} rounds, load {_load()} at the start\n")
    print("| replicas x requests | iterations a CPU second: calls / sockets | | ms at the median | |")
    print("|---|---:|---:|---:|---:|", flush=True)
    idle = []
    with (
        InferenceSession("ray", "local", sockets=False) as calls,
        InferenceSession("ray", sockets=True) as sockets,
    ):
        for replicas in sorted({r for r, _ in SIZES}):
            managers = {
                name: PagedKVCacheManager(ray_params(replicas), session, PAGES, max_batch_size=256)
                for name, session in (("calls", calls), ("sockets", sockets))
            }
            for batch in [b for r, b in SIZES if r == replicas]:
                taken = _compare(managers, replicas, batch, rounds)
                print(f"| {replicas} x {batch} | {_row(taken['calls'], taken['sockets'])} |", flush=True)
            idle.append(f"| {replicas} | {_idle(managers['calls'])} | {_idle(managers['sockets'])} |")
            for manager in managers.values():
                manager.shutdown()
    print("\n| replicas, idle | cores of driver and replicas by calls | by sockets |")
    print("|---|---:|---:|", *idle, sep="\n")
    print("\n| one message | us at the median | CPU us of both ends |")
    print("|---|---:|---:|")
    for name, measure in (("sockets", _by_socket), ("pyzmq", _by_zmq)):
        rows = [measure() for _ in range(3)]
        print(f"| {name} | {statistics.median(r[0] for r in rows):.0f} | {statistics.median(r[1] for r in rows):.0f} |")
    print(f"\nload {_load()} at the end")
    return 0


def _compare(managers: dict[str, PagedKVCacheManager], replicas: int, batch: int, rounds: int) -> dict[str, Taken]:
    requests = {name: start_lanes(manager, replicas, batch) for name, manager in managers.items()}
    until = time.monotonic() + OPEN_SECONDS
    while {state.kind for state in managers["sockets"].path_states()} != {"unix"}:
        if time.monotonic() > until:
            raise RuntimeError(f"not all sockets are open: {managers['sockets'].path_states()}")
        iterate(managers["sockets"], requests["sockets"])
    taken: dict[str, Taken] = {name: [] for name in managers}
    for _ in range(rounds):
        for name, manager in managers.items():
            taken[name].append(_time(manager, requests[name]))
    for name, manager in managers.items():
        manager.tick([Tick(release=[ctx.request_id for ctx in each]) for each in requests[name]])
    return taken


def _time(manager: PagedKVCacheManager, requests: Sequence[Sequence[TextContext]]) -> tuple[float, float]:
    """Milliseconds at the median, and CPU seconds of an iteration."""
    for _ in range(WARM_UP):
        iterate(manager, requests)
    times, pids = [], [os.getpid(), *_pids(manager)]
    before = cpu_seconds(pids)
    for _ in range(ITERATIONS):
        start = time.perf_counter()
        iterate(manager, requests)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), (cpu_seconds(pids) - before) / ITERATIONS


def _pids(manager: PagedKVCacheManager) -> list[int]:
    assert isinstance(manager._calls, Calls)
    return manager._calls.replica_pids()


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds of those processes so far, to the nanosecond: Linux counts what each thread ran."""
    ran = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # it has ended
                ran += int((thread / "schedstat").read_text().split()[0])
    return ran / 1e9


def _row(calls: Taken, sockets: Taken) -> str:
    (old_ms, old_cpu), (new_ms, new_cpu) = (
        (statistics.median(ms for ms, _ in each), statistics.median(cpu for _, cpu in each))
        for each in (calls, sockets)
    )
    cpu = f"{1 / old_cpu:.0f} / {1 / new_cpu:.0f} | {old_cpu / new_cpu:.2f}x"
    return f"{cpu} | {old_ms:.2f} / {new_ms:.2f} | {new_ms / old_ms:.2f} of it"


def _load() -> str:
    return f"{psutil.getloadavg()[0]:.1f}"


def _idle(manager: PagedKVCacheManager) -> str:
    """Cores in use by this process and the replicas while nothing is said."""
    time.sleep(1.0)  # what came before has settled
    pids = [os.getpid(), *_pids(manager)]
    before, start = cpu_seconds(pids), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return f"{(cpu_seconds(pids) - before) / (time.monotonic() - start):.3f}"


# -- one message -----------------------------------------------------------------------------------------


def _answer(wire: bytes) -> bytes:
    return wire[:100]


def _listen(pipe: Any) -> None:
    listener = Listener(_answer, "127.0.0.1")
    pipe.send(listener.address)
    pipe.recv()
    listener.close()


def _listen_zmq(pipe: Any) -> None:
    import zmq

    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(pipe.recv())
    pipe.send("ready")
    while True:
        who, number, wire = router.recv_multipart()
        if not wire:
            return
        router.send_multipart([who, number, _answer(wire)])


def _ask(process: Any, ask: Callable[[bytes], object]) -> tuple[float, float]:
    """Microseconds at the median, and of CPU of both processes."""
    wire, times, pids = b"x" * 300, [], [os.getpid(), process.pid]
    for _ in range(200):
        ask(wire)
    before = cpu_seconds(pids)
    for _ in range(MESSAGES):
        start = time.perf_counter()
        ask(wire)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6, (cpu_seconds(pids) - before) / MESSAGES * 1e6


def _by_socket() -> tuple[float, float]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_listen, args=(theirs,))
    process.start()
    line = Connection(ours.recv())
    taken = _ask(process, lambda wire: line.wait(line.send(wire), 10))
    line.close()
    ours.send("over")
    process.join()
    return taken


def _by_zmq() -> tuple[float, float]:
    import zmq

    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_listen_zmq, args=(theirs,))
    process.start()
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{Path(folder) / 'socket'}"
        ours.send(address)
        ours.recv()
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.connect(address)
        numbers = iter(range(1 << 30))

        def ask(wire: bytes) -> bytes:
            dealer.send_multipart([b"%d" % next(numbers), wire])
            return dealer.recv_multipart()[1]

        taken = _ask(process, ask)
        dealer.send_multipart([b"", b""])
        process.join()
        dealer.close(0)
    return taken


if __name__ == "__main__":
    sys.exit(main())
