"""What a copy of pages from one actor to another takes over each line: `python tests/measure/transport.py`.

Two actors on an embedded Ray, pages of 2 MiB in host memory. A round is a message to the source (pin, offer) and one to
the target (fetch), as the scheduler sends them; `fetch` is what the target says of it. Lines and a memcpy of the same
bytes into touched memory take turns; medians.
"""

from __future__ import annotations

import json
import statistics
import sys
from time import perf_counter
from typing import Any

import numpy as np

from rayk.params import GROUP, OBJECT_STORE, SHARED_MEMORY, MHAKVCacheParams
from rayk.transport.choice import Peer

ROUNDS = 15
SIZES = (1, 32)  # pages
POOL = 64
KINDS = (SHARED_MEMORY, GROUP, OBJECT_STORE)


class End:
    """An actor with a pool of pages and all lines that pages in host memory can have."""

    def __init__(self, replica: int) -> None:
        import torch

        from rayk.kvcache.buffers import PageBuffers
        from rayk.transport.port import open_lines

        torch.set_num_threads(1)
        params = MHAKVCacheParams(
            dtype="float16", n_kv_heads=8, head_dim=128, num_layers=4, page_size=128, devices=["cpu"]
        )
        self._buffers = PageBuffers(params, POOL, ["cpu"], shared=True)
        for raw in self._buffers.all_bytes:
            raw.fill_(replica + 1)
        self._lines: dict[str, Any] = {line.kind: line for line in open_lines(self._buffers, "127.0.0.1")}
        self._exports = 0
        self._ids = np.random.default_rng(replica).permutation(POOL).astype(np.int32)

    def offer(self, kind: str, pages: int) -> tuple[tuple[int, bytes], Any]:
        """As the source: an export and its offer; what the object store carries."""
        self._exports += 1
        offer = self._lines[kind].offer(Peer(1, 1), self._exports, self._ids[:pages])
        data = self._lines[kind].made.pop(self._exports) if kind == OBJECT_STORE else []
        return (self._exports, offer), data

    def fetch(self, kind: str, told: tuple[int, bytes], theirs: Any, data: Any) -> float:
        """As the target: the seconds of the fetch."""
        from rayk.transport.line import PageExportRef

        export = PageExportRef(Peer(0, 1), told[0], theirs, told[1], float("inf"), data)
        began = perf_counter()
        self._lines[kind].fetch(export, 0, self._ids[: len(theirs)])
        return perf_counter() - began

    def take_note(self, pages: int) -> bool:
        """Whether those pages hold what the source's do; they are wiped for the next copy."""
        right = all(bool((raw[self._ids[:pages]] == 1).all()) for raw in self._buffers.all_bytes)
        for raw in self._buffers.all_bytes:
            raw[self._ids[:pages]] = 0
        return right

    def end(self, kind: str, export_id: int) -> None:
        """Acknowledged."""
        self._lines[kind].end(export_id)

    def ids(self) -> Any:
        """The pages in the order in which they are exported."""
        return self._ids

    def memcpy(self, pages: int) -> float:
        """Seconds of a plain copy of as many bytes."""
        size = sum(raw.shape[1] for raw in self._buffers.all_bytes)
        source, target = (np.ones((pages, size), np.uint8) for _ in range(2))
        began = perf_counter()
        np.copyto(target, source)
        return perf_counter() - began

    def ping(self) -> int:
        """That it runs."""
        return 0


def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Rows: pages, line, milliseconds of the whole round and of the fetch, and both as multiples of the memcpy."""
    from rayk.actors.interface import ActorSpec
    from rayk.actors.runtime import RayRuntime

    runtime = RayRuntime.connect("local", None, num_cpus=2, object_store_memory=500_000_000, log_to_driver=False)
    try:
        source, target = (runtime.start(ActorSpec(End, (r,))) for r in range(2))
        theirs = runtime.get(source.call("ids"), "the source", 60)
        rows = []
        for pages in SIZES:
            took: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
            plain: list[float] = []
            for turn in range(rounds + 1):  # the first opens the lines
                plain.append(runtime.get(target.call("memcpy", pages), "the target", 60))
                for kind in KINDS:
                    began = perf_counter()
                    told, data = source.call("offer", kind, pages, returns=2)
                    told = runtime.get(told, "the source", 60)
                    fetched = runtime.get(target.call("fetch", kind, told, theirs[:pages], data), "the target", 60)
                    if turn:
                        took[kind].append((perf_counter() - began, fetched))
                    runtime.get(source.call("end", kind, told[0]), "the source", 60)
                    assert runtime.get(target.call("take_note", pages), "the target", 60), kind
            memcpy = statistics.median(plain)
            rows.append({"pages": pages, "line": "memcpy", "ms": memcpy * 1e3, "fetch_ms": memcpy * 1e3, "ratio": 1.0})
            for kind in KINDS:
                whole, fetch = (statistics.median(column) for column in zip(*took[kind], strict=True))
                rows.append(
                    {"pages": pages, "line": kind, "ms": whole * 1e3, "fetch_ms": fetch * 1e3, "ratio": fetch / memcpy}
                )
        return rows
    finally:
        runtime.disconnect()


def main() -> int:
    """Print a table, or with --json one object."""
    rows = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"command": "bench transport", "rows": rows}))
        return 0
    print(f"{'pages of 2 MiB':>14} {'line':>14} {'whole ms':>9} {'fetch ms':>9} {'x memcpy':>9}")
    for row in rows:
        print(f"{row['pages']:>14} {row['line']:>14} {row['ms']:>9.2f} {row['fetch_ms']:>9.2f} {row['ratio']:>9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
