"""Where the time goes on Ray, by py-spy: `python tests/measure/ray_profile.py OUT [SECONDS]`.

Two loads, one after the other, on an embedded Ray with two replicas: *admissions* (requests of 1,024 tokens in batches
of 64 through the scheduler, released at once) and *decode* (ticks of 32 requests a replica). py-spy samples the driver,
the scheduler and replica 0 where a thread holds the interpreter's lock; what runs in C++ beside it shows in the CPU
time only. OUT gets the stacks, one file a load and process (flamegraph.pl and speedscope read them), and profile.md
with the functions that most samples were in.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import psutil

from rayk.bench.core.baseline import cpu_model, running_commit
from rayk.bench.core.cache import make_contexts, random_prompts
from rayk.bench.core.prompts import PROMPT
from rayk.bench.core.ray_path import BATCH, PAGES, REPLICAS, cpu_seconds, iterate, ray_params, start_lanes
from rayk.errors import RaykError
from rayk.kvcache.tick import Tick
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession

SECONDS, RATE = 15, 200
TOP = 14
ADMISSIONS = 64  # requests of a batch
GENERATED = 400  # tokens of a decoding request
GIVE_UP_S = 60.0


class ProfileError(RaykError):
    """Nothing could be sampled."""

    reason: str

    def __str__(self) -> str:
        return f"py-spy cannot sample: {self.reason}"


class Profile(NamedTuple):
    """Samples of one process under one load: by the function that ran, and by every function on the stack.

    `cpu` is the process's CPU time over the time that passed.
    """

    load: str
    process: str
    cpu: float
    samples: int
    inner: Counter[str]
    outer: Counter[str]


def read_stacks(load: str, process: str, cpu: float, text: str) -> Profile:
    """A file of collapsed stacks: `frame;frame;frame count` lines, outermost first."""
    inner: Counter[str] = Counter()
    outer: Counter[str] = Counter()
    samples = 0
    for line in text.splitlines():
        stack, _, times = line.rpartition(" ")
        frames = stack.split(";") if stack else ["(in C++, no Python function)"]
        count = int(times)
        samples += count
        inner[frames[-1]] += count
        outer.update(dict.fromkeys(frames, count))
    return Profile(load, process, cpu, samples, inner, outer)


def describe(profile: Profile, seconds: float) -> str:
    """The profile as a section of markdown."""
    held = profile.samples / (seconds * RATE)
    lines = [
        f"## {profile.load}: {profile.process}",
        "",
        f"{profile.cpu:.0%} of a core; the interpreter's lock was held {held:.0%} of the time.",
        "",
        "| share | in the function itself | share | in it and what it calls |",
        "|---:|---|---:|---|",
    ]
    pairs = zip(profile.inner.most_common(TOP), _ours(profile.outer), strict=False)
    for (inner, own), (outer, all_) in pairs:
        lines.append(f"| {own / profile.samples:.1%} | {inner} | {all_ / profile.samples:.1%} | {outer} |")
    return "\n".join([*lines, ""])


def _ours(outer: Counter[str]) -> list[tuple[str, int]]:
    """What is not Ray's own way into an actor, the most first."""
    skipped = ("<module>", "<frozen", "(ray/", "threading.py")
    return [(name, count) for name, count in outer.most_common() if not any(part in name for part in skipped)][:TOP]


class Sampler:
    """py-spy on some processes for the length of a load."""

    def __init__(self, out: Path, seconds: float) -> None:
        found = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
        if found is None:
            raise ProfileError("it is not installed; pip install py-spy, or make setup")
        self._command, self._out, self._seconds = found, out, seconds

    def run(self, load: str, pids: dict[str, int], work: Callable[[], object]) -> list[Profile]:
        """Do `work` over and over while all of `pids` are sampled."""
        files = {process: self._out / f"{load}-{process}.stacks" for process in pids}
        spies = [self._start(files[process], pid) for process, pid in pids.items()]
        processes = {process: psutil.Process(pid) for process, pid in pids.items()}
        before, began = {name: cpu_seconds([each.pid]) for name, each in processes.items()}, perf_counter()
        while any(spy.poll() is None for spy in spies):
            work()
            if perf_counter() > began + self._seconds + GIVE_UP_S:
                raise ProfileError(f"it is still at work {GIVE_UP_S:.0f} s after its time")
        passed = perf_counter() - began
        cpu = {name: (cpu_seconds([each.pid]) - before[name]) / passed for name, each in processes.items()}
        for spy in spies:
            _, error = spy.communicate()
            if spy.returncode:
                raise ProfileError(error.strip().splitlines()[-1] if error.strip() else f"exit code {spy.returncode}")
        return [read_stacks(load, name, cpu[name], file.read_text()) for name, file in files.items()]

    def _start(self, file: Path, pid: int) -> subprocess.Popen[str]:
        command = [self._command, "record", "--function", "--format", "raw", "--output", str(file)]
        command += ["--gil", "--rate", str(RATE), "--duration", f"{self._seconds:.0f}", "--pid", str(pid)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _actors() -> dict[str, int]:
    """The processes of the embedded Ray's actors."""
    found: dict[str, int] = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        if title.startswith("ray::SchedulerActor"):
            found["scheduler"] = process.pid
        elif title.startswith("ray::ReplicaActor"):
            found.setdefault("replica", process.pid)
    return found


def profile(out: Path, seconds: float = SECONDS) -> Path:
    """Profile both loads; the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(out, seconds)
    with InferenceSession(runtime="ray", address="local") as session:
        manager = PagedKVCacheManager(ray_params(REPLICAS), session, PAGES, max_batch_size=BATCH)
        pids = {"driver": os.getpid()} | _actors()
        found = sampler.run("admissions", pids, _admissions(manager))
        found += sampler.run("decode", pids, _decode(manager))
    head = [
        f"rayk {running_commit() or 'of no checkout'}, Python {platform.python_version()}, {cpu_model()},"
        f" {os.cpu_count()} cores; {RATE} samples/s for {seconds:.0f} s.",
        "",
    ]
    path = out / "profile.md"
    path.write_text("\n".join(head + [describe(each, seconds) for each in found]))
    return path


def _admissions(manager: PagedKVCacheManager) -> Callable[[], object]:
    prompts = random_prompts(20 * ADMISSIONS, PROMPT)  # seen again only when long evicted
    count = 0

    def work() -> None:
        nonlocal count
        first = count * ADMISSIONS % len(prompts)
        contexts = make_contexts(prompts[first : first + ADMISSIONS], f"admission{count}-")
        count += 1
        releases: list[list[str]] = [[] for _ in range(REPLICAS)]
        for ctx, admission in zip(contexts, manager.try_admit(contexts), strict=True):
            if admission.error is not None:
                raise admission.error
            releases[admission.replica].append(ctx.request_id)
        manager.tick([Tick(release=ids) for ids in releases])

    return work


def _decode(manager: PagedKVCacheManager) -> Callable[[], object]:
    def work() -> None:
        lanes = start_lanes(manager, REPLICAS, BATCH)
        for _ in range(GENERATED):
            iterate(manager, lanes)
        manager.tick([Tick(release=[ctx.request_id for ctx in lane]) for lane in lanes])

    return work


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python tests/measure/ray_profile.py OUT [SECONDS]")
    try:
        print(profile(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else SECONDS))
    except RaykError as error:
        sys.exit(f"rayk: {error}")
