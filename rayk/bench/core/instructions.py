"""Instructions that a request takes, counted by valgrind: the same on a busy machine as on a quiet one.

`count_instructions()` runs this module under callgrind. There each case is prepared and warmed up uncounted (Python
specialises code after a few calls), then N and after that 2 N iterations are counted; the difference over N is free of
what is done once. The caller's update() and the benchmark's clock readings are in the counts. Hashes of str are fixed
(PYTHONHASHSEED=0); what is left between runs is where things happen to lie in memory, a few tenths of a percent.

The cases are small, and then at 10,000 and at 1,000,000 pages, all full: of what a hundred times the pages and the
running requests cost, the ratio is free of everything else.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, NamedTuple

import torch

from rayk.bench.core.cache import make_contexts, make_manager, random_prompts
from rayk.bench.core.callgrind import Callgrind
from rayk.bench.core.decode import decode_each, decode_many, start_batch
from rayk.bench.core.instruction_mix import read_shares
from rayk.bench.core.prompts import PROMPT, SharedPrefix, crowded, serve
from rayk.errors import RaykError
from rayk.kvcache.context_batch import ContextBatch
from rayk.manager.manager import PagedKVCacheManager

N_REQUESTS, N_STEPS = 20, 16
WARM_UP = 100
DECODE_BATCH = 32
SIZES = {"10k": 10_000, "1m": 1_000_000}
FEW_PAGES = 20_000
LIMIT_S = 300

INSTALL = "install it (Debian, Ubuntu: apt-get install valgrind; make bench-instructions does so where it may)"


class CountError(RaykError):
    """Instructions could not be counted."""

    reason: str
    text: ClassVar[str] = "instructions cannot be counted: {reason}"


class Total(NamedTuple):
    """Instructions of `times` iterations of the case `key`, and of what was done once; shares by kind of code."""

    key: str
    times: int
    instructions: int
    shares: dict[str, float]


class Counted(NamedTuple):
    """Instructions of one iteration, and their shares by kind."""

    instructions: float
    shares: dict[str, float]


def count_instructions() -> dict[str, Counted]:
    """Instructions of one iteration of each case by its key. CountError if they cannot be counted."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CountError(f"there is no valgrind; {INSTALL}")
    with TemporaryDirectory(prefix="rayk-callgrind-") as folder:
        out = Path(folder) / "counts"
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        command += [sys.executable, "-m", "rayk.bench.core.instructions"]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise CountError(f"valgrind took longer than {LIMIT_S} s") from None
        if done.returncode:
            raise CountError(f"the counted process failed:\n{done.stderr[-2000:]}")
        files = sorted(Path(folder).glob("counts.*"), key=lambda file: int(file.suffix[1:]))
        return per_iteration([read_total(file.read_text()) for file in files])


def read_total(text: str) -> Total:
    """One output file of callgrind: its trigger is `key times`, see _count()."""
    trigger = re.search(r"^desc: Trigger: Client Request: (\S+) (\d+)$", text, re.MULTILINE)
    total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
    if trigger is None or total is None:
        raise CountError("callgrind wrote a file of another form; valgrind 3.19 is known to work")
    return Total(trigger[1], int(trigger[2]), int(total[1]), read_shares(text))


def per_iteration(totals: Sequence[Total]) -> dict[str, Counted]:
    """Instructions of one iteration by key: the slope between the two totals of each case, which follow each other."""
    out = {}
    for few, many in zip(totals[::2], totals[1::2], strict=True):
        assert few.key == many.key and few.times < many.times
        slope = (many.instructions - few.instructions) / (many.times - few.times)
        out[few.key] = Counted(slope, many.shares)
    return out


# -- inside valgrind -------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A case: `work(n)` does n iterations, never the same one twice."""

    key: str
    times: int
    work: Callable[[int], object]


def _requests(manager: PagedKVCacheManager, prefix: bool = False) -> Callable[[int], object]:
    """Requests of 1,024 tokens of their own, or of a shared prefix."""
    count = WARM_UP + 3 * N_REQUESTS
    left = iter(make_contexts(SharedPrefix(count).prompts() if prefix else random_prompts(count, PROMPT)))
    serve(manager, list(islice(left, WARM_UP)))
    return lambda n: serve(manager, list(islice(left, n)))


def _decode(manager: PagedKVCacheManager) -> Callable[[int], object]:
    """Steps of a batch, one alloc() a request."""
    contexts = start_batch(manager, DECODE_BATCH)
    decode_each(manager, contexts, WARM_UP)
    return lambda n: decode_each(manager, contexts, n)


def _decode_many(manager: PagedKVCacheManager) -> Callable[[int], object]:
    """Steps of a batch as arrays."""
    batch = ContextBatch(start_batch(manager, DECODE_BATCH))
    decode_many(manager, batch, WARM_UP)
    return lambda n: decode_many(manager, batch, n)


def _cases() -> Iterator[tuple[str, int, Callable[[], Callable[[int], object]]]]:
    """Key, iterations and preparation of each: what that gives does n iterations, never the same one twice."""
    kinds = {
        "w1": (N_REQUESTS, _requests),
        "w2": (N_REQUESTS, partial(_requests, prefix=True)),
        "w3": (N_STEPS, _decode),
        "w3-batch": (N_STEPS, _decode_many),
    }
    for key, (times, prepare) in kinds.items():
        yield key, times, partial(lambda prepare: prepare(make_manager(FEW_PAGES)), prepare)
    for name, pages in SIZES.items():
        for key in ("w1", "w3", "w3-batch"):
            times, prepare = kinds[key]
            yield f"{key}-{name}", times, partial(lambda prepare, pages: prepare(crowded(pages)), prepare, pages)


def _main() -> None:
    torch.set_num_threads(1)
    callgrind = Callgrind()
    gc.disable()  # what makes garbage here is dropped case by case
    for key, once, prepare in _cases():
        work = prepare()
        for times in (once, 2 * once):
            with callgrind.counting(f"{key} {times}"):
                work(times)
        del work


if __name__ == "__main__":
    _main()
