"""Proofs of the tiers that take minutes: restarts, damaged files, processes killed at any moment, one folder for two.

    python tests/measure/tier_soak.py restart --trace FILE --dir DIR  500 requests cold, warm, restarted, over bad files
    python tests/measure/tier_soak.py kill --trace FILE --dir DIR     20 runs on one folder, a replica of each killed
    python tests/measure/tier_soak.py shared --trace FILE --dir DIR   two clusters on one folder at once

Each prints what it saw and ends with 1 when a byte was wrong, a page leaked, or a budget was exceeded. Every run
checks every slot that it relies on. DIR must be new or empty, and is left for a look.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import msgspec
import psutil

from rayk.bench.manager_driver import ManagerDriver
from rayk.bench.settings import BenchSettings
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession
from rayk.workloads.request import Workload
from rayk.workloads.traces import read_trace

# Small pages (1 KiB) of 128 tokens, so that conversations of millions of tokens fit into megabytes.
SHAPE: dict[str, Any] = {"page_size": 128, "layers": 1, "kv_heads": 1, "head_dim": 1, "concurrency": 32}
SHAPE |= {"max_batch_size": 32, "replicas": 4}
DAMAGED = 200  # files, of each kind of damage
POLL_S = 0.02


@dataclass
class Budget:
    """The largest sum of page files seen in a folder, in bytes, those being written included."""

    folder: Path
    limit: int
    peak: int = 0
    samples: int = 0
    _stop: Event = field(default_factory=Event)

    def look(self) -> None:
        """One sample. A file may go while it is counted."""
        total = 0
        for path in self.folder.glob("*/*/*"):
            if path.suffix in (".kv", ".tmp"):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    continue
        self.peak, self.samples = max(self.peak, total), self.samples + 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample all the time on a thread."""

        def run() -> None:
            while not self._stop.wait(POLL_S):
                self.look()

        self._stop.clear()
        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self.look()

    def __str__(self) -> str:
        return f"disk peak {self.peak} of {self.limit} bytes in {self.samples} samples"


def make_settings(args: argparse.Namespace, folder: Path, disk_bytes: int, host_bytes: int) -> BenchSettings:
    settings = BenchSettings(**SHAPE, pages=args.pages, runtime=args.runtime, disk_dir=str(folder))
    page = settings.params().bytes_per_page
    return msgspec.structs.replace(settings, disk_bytes=disk_bytes, host_pages=host_bytes // page)


@contextmanager
def opened(settings: BenchSettings) -> Iterator[PagedKVCacheManager]:
    address = {} if settings.runtime == "inline" else {"address": "local"}
    with (
        InferenceSession(settings.runtime, **address) as session,
        PagedKVCacheManager(
            settings.params(), session, settings.pages, settings.host_pages, max_batch_size=settings.max_batch_size
        ) as manager,
    ):
        yield manager
        manager.drain()
        manager.check_integrity()
        used = [manager.get_num_used_pages(i) for i in range(settings.replicas)]
        assert not any(used), f"pages in use after the last request: {used}"


def serve(manager: PagedKVCacheManager, settings: BenchSettings, workload: Workload, name: str) -> float:
    """All of the workload, every slot checked; its hit rate."""
    before = manager.get_metrics_aggregated()
    driver = ManagerDriver(manager, workload, settings, perf_counter)
    driver.run()
    manager.drain()
    done, seen = manager.get_metrics_aggregated() - before, driver.measured
    rate = seen.cached / seen.prompt
    print(f"{name}: {seen.completed} completed, hit rate {rate:.4f}", end="; ")
    print(f"{seen.host_tokens} of {seen.prompt} tokens from host, {seen.disk_tokens} from disk", end="; ")
    print(f"{done.failed_loads} failed loads, {done.rejected_files} files rejected", end="; ")
    print(f"{seen.slots_checked} slots checked, {seen.mismatches} mismatches", flush=True)
    assert not seen.mismatches and not seen.failed, seen.first_mismatch
    return rate


def restart(args: argparse.Namespace) -> None:
    """Cold, warm, after a restart with empty devices, and after a restart over files that were tampered with."""
    workload = read_trace(args.trace, args.requests, lanes=SHAPE["concurrency"])
    settings = make_settings(args, args.dir / "kv", 600 << 20, 100 << 20)
    other = msgspec.structs.replace(settings, disk_dir=str(args.dir / "other"), head_dim=2)
    budget = Budget(args.dir / "kv", settings.disk_bytes)
    with budget.watched():
        with opened(settings) as manager:
            serve(manager, settings, workload, "cold")
            warm = serve(manager, settings, workload, "warm")
        with opened(settings) as manager:
            again = serve(manager, settings, workload, "restarted")
        assert again >= 0.95 * warm, f"{again} of {warm}"
        with opened(other) as manager:  # a model with other heads
            serve(manager, other, read_trace(args.trace, 40, lanes=SHAPE["concurrency"]), "another model")
        harmed = damage(args.dir / "kv", sorted((args.dir / "other").glob("*/*/*.kv")), random.Random(args.seed))
        with opened(settings) as manager:
            serve(manager, settings, workload, f"over {harmed} damaged files")
            assert manager.get_metrics_aggregated().rejected_files > 0
    print(budget)
    assert budget.peak <= budget.limit


def damage(folder: Path, foreign: Sequence[Path], rng: random.Random) -> int:
    """Flip a byte in some page files, cut others short, put another model's in the place of others; how many."""
    there = sorted(folder.glob("*/*/*.kv"))
    each = min(DAMAGED, len(there) // 3)
    files = rng.sample(there, 3 * each)
    for path in files[:each]:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    for path in files[each : 2 * each]:
        os.truncate(path, rng.randrange(path.stat().st_size))
    for path in files[2 * each :]:
        path.write_bytes(rng.choice(foreign).read_bytes())
    return len(files)


def command(args: argparse.Namespace, out: Path, disk_bytes: int, seed: int) -> list[str]:
    """A run of `rayk bench` on the folder, in processes of its own."""
    options = {
        "trace": args.trace, "requests": args.requests, "pages": args.pages, "concurrency": SHAPE["concurrency"],
        "replicas": SHAPE["replicas"], "page-size": 128, "layers": 1, "kv-heads": 1, "head-dim": 1, "forward": "verify",
        "host-memory": "2MiB", "disk-dir": args.dir / "kv", "disk-memory": disk_bytes, "runtime": "ray", "seed": seed,
        "out": out, "format": "json",
    }  # fmt: skip
    return [sys.executable, "-m", "rayk", "bench", *(str(p) for k, v in options.items() for p in (f"--{k}", v))]


def replicas_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if "".join(child.cmdline()[:1]).startswith("ray::ReplicaActor"):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill(args: argparse.Namespace) -> None:
    """Runs on one folder, one replica of each killed at a random moment; then a whole one, drained and checked."""
    rng, disk_bytes = random.Random(args.seed), args.disk_bytes
    budget = Budget(args.dir / "kv", disk_bytes)
    finished = failed = 0
    with budget.watched():
        for turn in range(args.runs):
            out = args.dir / f"run-{turn}"
            with out.with_suffix(".log").open("w") as log:
                process = subprocess.Popen(
                    command(args, out, disk_bytes, turn), stdout=subprocess.PIPE, stderr=log, text=True
                )
            watched = psutil.Process(process.pid)
            while process.poll() is None and len(replicas_of(watched)) < SHAPE["replicas"]:
                Event().wait(POLL_S)
            while process.poll() is None and " running " not in out.with_suffix(".log").read_text():
                Event().wait(POLL_S)
            Event().wait(rng.uniform(0, args.within))
            victims = replicas_of(watched) if process.poll() is None else []
            if victims:
                victim = rng.choice(victims)
                victim.send_signal(signal.SIGKILL)
            said, _ = process.communicate()
            report = json.loads(said) if said.strip() else {}
            said_last = [
                line
                for line in out.with_suffix(".log").read_text().splitlines()
                if line.startswith(("rayk: ", "the run stopped"))
            ]
            wrong = report.get("verify", {}).get("mismatches", 0)
            print(
                f"run {turn}: rc {process.returncode}, killed {bool(victims)}, {wrong} mismatches, {said_last[-1:]}",
                flush=True,
            )
            assert not wrong
            assert process.returncode == 0 or (victims and (report or said_last))  # else a crash
            finished, failed = finished + (process.returncode == 0), failed + (process.returncode != 0)
    print(f"{finished} finished, {failed} ended in an error; {budget}")
    settings = make_settings(args, args.dir / "kv", disk_bytes, 2 << 20)
    with budget.watched(), opened(settings) as manager:
        serve(manager, settings, read_trace(args.trace, args.requests, lanes=SHAPE["concurrency"]), "after them")
    print(f"drained: integrity holds, no page in use; {budget}")
    assert budget.peak <= budget.limit
    left = [p.name for p in Path("/dev/shm").glob("rayk-*") if p.stat().st_uid == os.getuid()]
    print(f"left in shared memory: {left}")


def shared(args: argparse.Namespace) -> None:
    """Two clusters of equal budgets on one folder at once, a few times over."""
    budget = Budget(args.dir / "kv", args.disk_bytes)
    with budget.watched():
        for turn in range(args.runs):
            runs = [
                subprocess.Popen(
                    command(args, args.dir / f"{turn}-{side}", args.disk_bytes, turn),
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )
                for side in "ab"
            ]  # fmt: skip
            for side, process in zip("ab", runs, strict=True):
                report = json.loads(process.communicate()[0])
                by_tier, verify = report["hit_rate"]["by_tier"], report["verify"]
                print(f"turn {turn}, {side}: rc {process.returncode}, hits {by_tier}, {verify}", flush=True)
                assert process.returncode == 0 and not verify["mismatches"]
    print(budget)
    assert budget.peak <= budget.limit


def main(argv: Sequence[str] | None = None) -> None:
    """Run one proof; an AssertionError says which part of it failed."""
    parser = argparse.ArgumentParser(prog="python tests/measure/tier_soak.py", description=__doc__)
    parser.add_argument("proof", choices=["restart", "kill", "shared"])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--pages", type=int, default=7032, help="device pages of each of 4 replicas")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--within", type=float, default=8.0, help="seconds in which the replica is killed")
    parser.add_argument("--disk-bytes", type=int, default=8 << 20)
    parser.add_argument("--runtime", choices=["inline", "ray"], default="inline")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.dir.mkdir(parents=True, exist_ok=True)
    {"restart": restart, "kill": kill, "shared": shared}[args.proof](args)


if __name__ == "__main__":
    main()
