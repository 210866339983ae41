"""Token streams of a Cluster on Ray, beside another checkout's: `python tests/measure/token_streams.py OTHER [ROUNDS]`.

64 streams of 200 tokens at once, from replicas whose model does nothing (rayk.bench.served), without text unless it
says so, in turns from this checkout and from the one in the folder OTHER: tokens a second, and tokens a second of CPU
time of the driver and its replicas together, at the median. Then the cores in use while nothing is asked. Printed as a
table of docs/measurements/data-plane.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import psutil

STREAMS, TOKENS, IDLE_SECONDS = 64, 200, 5.0
WAYS = (("unnamed", 1), ("unnamed", 2), ("named", 2), ("with text", 1))
Taken = tuple[float, float]  # seconds, and of CPU


def main() -> int:
    """The command; see the module."""
    other, rounds = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    here, tokens = Path(__file__).resolve().parents[2], STREAMS * TOKENS
    print(f"{rounds} rounds, {STREAMS} streams of {TOKENS} tokens, load {psutil.getloadavg()[0]:.1f} at the start\n")
    print("| Cluster | tokens/s, before / now | | tokens a CPU second, before / now | | idle cores, before / now |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for name, replicas in WAYS:
        with ExitStack() as stack:
            driven = [stack.enter_context(_Driven(root, name, replicas)) for root in (other, here)]
            taken: list[list[Taken]] = [[], []]
            for _ in range(rounds):
                for driver, each in zip(driven, taken, strict=True):
                    each.append(driver.round())
            (old, old_cpu), (new, new_cpu) = (
                (tokens / median(s for s, _ in each), tokens / median(cpu for _, cpu in each)) for each in taken
            )
            idle = " / ".join(f"{driver.idle():.3f}" for driver in driven)
            wall, cpu = f"{old:,.0f} / {new:,.0f} | {new / old:.2f}x", f"{old_cpu:,.0f} / {new_cpu:,.0f}"
            print(f"| {name}, {replicas} replicas | {wall} | {cpu} | {new_cpu / old_cpu:.2f}x | {idle} |", flush=True)
    print(f"\nload {psutil.getloadavg()[0]:.1f} at the end")
    return 0


class _Driven:
    """A driver in a process of its own, with the code of that checkout."""

    def __init__(self, root: Path, *arguments: object) -> None:
        command, environment = [sys.executable, __file__, "--drive", *map(str, arguments)], dict(os.environ)
        environment["PYTHONPATH"] = str(root)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)  # type: ignore[call-overload]  # mypy joins the types
        self._said()

    def _said(self) -> list[str]:
        for line in self._process.stdout:
            if line.startswith("said"):
                return list(line.split()[1:])
        raise RuntimeError("a driver ended")

    def _ask(self, what: str) -> list[float]:
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return [float(each) for each in self._said()]

    def round(self) -> Taken:
        """All streams once."""
        seconds, cpu = self._ask("round")
        return seconds, cpu

    def idle(self) -> float:
        """Cores."""
        return self._ask("idle")[0]

    def __enter__(self) -> _Driven:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)


def _drive(name: str, replicas: int) -> None:
    """Do what stdin asks for, and say what it took."""
    from rayk import Cluster, InferenceSession
    from rayk.bench.served import nothing

    def silent(device: str) -> object:
        model = nothing(device)
        if name != "with text":
            model.tokenizer = None  # type: ignore[assignment]  # engines report no text then
        return model

    pages = 2 * STREAMS * (TOKENS // 64 + 3)
    more = {"page_size": 64, "pages": pages, "max_batch_size": STREAMS, "device": "cpu"}
    with (
        InferenceSession("ray", "local", *(["streams"] if name == "named" else [])) as session,
        Cluster(silent, session, replicas=replicas, **more) as cluster,  # type: ignore[arg-type]  # as above
    ):
        prompts = [[i % 500, 3, 5, 8] for i in range(STREAMS)]

        def stream() -> None:
            tokens = [len(u.tokens) for u in cluster.stream(prompts, max_new_tokens=TOKENS, ignore_eos=True)]
            assert sum(tokens) == STREAMS * TOKENS, sum(tokens)

        for _ in range(3):
            stream()
        print("said", flush=True)
        for line in sys.stdin:
            processes = [psutil.Process(), *_actors()]
            before, began = _cpu(processes), time.monotonic()
            if line.strip() == "round":
                stream()
                print("said", time.monotonic() - began, _cpu(processes) - before, flush=True)
            else:
                time.sleep(IDLE_SECONDS)
                print("said", (_cpu(processes) - before) / (time.monotonic() - began), flush=True)


def _actors() -> list[psutil.Process]:
    """Ray's processes of this driver that are rayk's actors."""
    return [each for each in psutil.Process().children(recursive=True) if "Actor" in each.name() + str(each.cmdline())]


def _cpu(processes: list[psutil.Process]) -> float:
    """Seconds so far, to the nanosecond: Linux counts what each thread ran."""
    from data_plane import cpu_seconds

    return cpu_seconds([each.pid for each in processes])


if __name__ == "__main__":
    if sys.argv[1] == "--drive":
        _drive(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())
