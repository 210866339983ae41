"""What `rayk bench` and `rayk report` do once their flags are read: an exit code, or a RaykError for bad usage."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console

from rayk.bench.hf import fitted, longest, model_shape, with_room
from rayk.bench.progress import ProgressView, progress_view, summary_table
from rayk.bench.report import write_report, write_words
from rayk.bench.request import Workload
from rayk.bench.result import BenchResult, read_result
from rayk.bench.run import Outcome, run_bench
from rayk.bench.settings import ARRIVING_BATCH, VERIFY_BUDGET, BenchSettings, complete, with_tiers
from rayk.bench.traces import read_trace
from rayk.bench.workloads import GENERATORS
from rayk.errors import ConfigError, RaykError
from rayk.quantity import parse_duration

DEFAULT_REQUESTS = 1000
MODEL_REQUESTS = 200
SMOKE_REQUESTS = 40
MODEL_BUDGET = 512  # tokens of one forward of a real model
PER_SECOND = 2000  # requests generated for each second of a run of a fixed duration; more than can be served
MOST_GENERATED = 200_000

log = logging.getLogger("rayk.bench")


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """`rayk bench` as it was typed; None is a flag that was not given."""

    trace: Path | None = None
    workload: str | None = None
    scale: float | None = None
    requests: int | None = None
    duration: str | None = None
    pages: int | None = None
    memory: str | None = None
    host_memory: str | None = None
    disk_dir: Path | None = None
    disk_memory: str | None = None
    concurrency: int | None = None
    speed: float | None = None
    prefill_rate: float | None = None
    max_batch_size: int | None = None
    token_budget: int | None = None
    forward: str = "verify"
    model: Path | None = None
    peer_copies: bool = True
    smoke: bool = False
    out: Path | None = None
    as_json: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    unwritten: list[str] = field(default_factory=list, init=False)  # why there is no report, or not all of it

    def run(self) -> int:
        """Serve and report: 0, or 1 when a request was lost or a checked slot was wrong."""
        duration_s = None if self.duration is None else parse_duration(self.duration)
        if self.requests is not None and self.requests < 1:
            raise ConfigError(f"--requests is {self.requests}, at least 1 is needed")
        if self.requests is not None and duration_s is not None:
            raise ConfigError("--requests and --duration exclude each other")
        settings, shape = self._settings(duration_s), None
        if self.model is not None:
            shape = model_shape(self.model)
            settings = shape.applied(settings)
        settings = with_tiers(settings, self.host_memory, self.disk_dir, self.disk_memory)
        made = self._make_out()
        torch.set_num_threads(1)  # the verify model works on small pieces, for which threads only wait for each other
        workload = self._workload(settings, duration_s, None if shape is None else shape.length)
        source = {"name": workload.source, "kind": workload.kind, "requests": len(workload.requests)}
        settings = complete(
            msgspec.structs.replace(settings, source=source | workload.parameters), workload, self.pages, self.memory
        )
        if shape is not None and self.pages is None and self.memory is None:
            settings = with_room(settings, workload)
        log.info(
            "%s: %d requests for %d replica(s) of %d pages of %d tokens",
            workload.source,
            len(workload.requests),
            settings.replicas,
            settings.pages,
            settings.page_size,
        )
        total = None if duration_s is not None else len(workload.requests)
        # Ray prints what its processes log to this process's stdout, which is for the result alone.
        with redirect_stdout(sys.stderr), progress_view(Console(stderr=True), total) as view:
            outcome = self._served(settings, workload, view, made)
        self._print(outcome.result)
        if outcome.error is not None:
            error = outcome.error
            text = str(error) or ("stopped by the user" if isinstance(error, KeyboardInterrupt) else "")
            if not isinstance(error, (RaykError, KeyboardInterrupt)):
                text = f"{type(error).__name__}: {text}"
                log.debug("where:", exc_info=error)
            log.error("the run stopped: %s", text)
            return 1
        if self.unwritten:
            log.error("%s: the report is not whole", self.unwritten[-1])
        return 0 if outcome.result.ok and not self.unwritten else 1

    def _settings(self, duration_s: float | None) -> BenchSettings:
        if self.concurrency is not None and self.speed is not None:
            raise ConfigError("--concurrency and --speed exclude each other: so many in flight, or as they arrive")
        concurrency = 16 if self.concurrency is None else self.concurrency
        rows = concurrency if self.speed is None else ARRIVING_BATCH
        budget = self.token_budget
        if budget is None and (self.forward != "none" or self.prefill_rate is not None):
            budget = MODEL_BUDGET if self.forward == "hf" else VERIFY_BUDGET
        return BenchSettings(
            concurrency=concurrency,
            max_batch_size=rows if self.max_batch_size is None else self.max_batch_size,
            speed=self.speed,
            prefill_rate=self.prefill_rate,
            forward=self.forward,
            peer_copies=self.peer_copies and self.forward != "none",  # it saves computing, of which there is none then
            model=None if self.model is None else str(self.model),
            token_budget=budget,
            duration_s=duration_s,
            **self.settings,
        )

    def _workload(self, settings: BenchSettings, duration_s: float | None, length: int | None) -> Workload:
        """What is to be served; `length` is the model's, if there is one."""
        if self.trace is not None and self.workload is not None:
            raise ConfigError("--trace and --workload exclude each other")
        requests = self.requests
        if self.smoke and requests is None and duration_s is None:
            requests = SMOKE_REQUESTS
        if self.trace is not None:
            if self.scale is not None:
                raise ConfigError("--scale is for --workload; a trace is served as it is")
            workload = read_trace(self.trace, requests, lanes=settings.concurrency)
            if length is not None and longest(workload) > length:
                raise ConfigError(
                    f"{self.trace} has a request of {longest(workload)} tokens, the model has {length}; use a model of "
                    "that length, or a generated workload, which is scaled to the model"
                )
            return workload
        name = self.workload or "chat"
        if name not in GENERATORS:
            raise ConfigError(f"--workload {name!r} is not one of {', '.join(GENERATORS)}")
        if requests is None:
            requests = DEFAULT_REQUESTS if length is None else MODEL_REQUESTS
            if duration_s is not None:
                requests = min(MOST_GENERATED, math.ceil(PER_SECOND * duration_s))
        scale: dict[str, float] = {}
        if self.scale is not None:
            if not 0 < self.scale <= 100:
                raise ConfigError(f"--scale is {self.scale}, more than 0 and at most 100 is needed")
            scale = {"scale": self.scale}
        if length is not None and not scale:
            return fitted(lambda part: GENERATORS[name](requests, seed=settings.seed, scale=part), length)
        return GENERATORS[name](requests, seed=settings.seed, **scale)

    def _make_out(self) -> bool:
        """Whether the folder was not there before."""
        if self.out is None:
            return False
        made = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {self.out} cannot be made ({error.strerror}); name another folder") from None
        return made

    def _served(self, settings: BenchSettings, workload: Workload, view: ProgressView, made: bool) -> Outcome:
        try:
            return run_bench(settings, workload, view.show, self._write)
        except BaseException:  # before there was anything to report
            if made and self.out is not None:
                with suppress(OSError):  # it is not empty when the report went wrong half-way
                    self.out.rmdir()
            raise

    def _write(self, result: BenchResult, final: bool) -> None:
        """Figures take seconds, so a result that is not final has none. What cannot be written is still printed."""
        if self.out is None:
            return
        try:
            (self.out / "result.json").write_bytes(result.to_json() + b"\n")
            write_words(result, self.out)
            if final:
                write_report(result, self.out)
        except OSError as error:
            self.unwritten.append(f"--out {self.out} cannot be written ({error.strerror})")

    def _print(self, result: BenchResult) -> None:
        if self.as_json:
            sys.stdout.write(result.to_json().decode() + "\n")
        else:
            console = Console()
            console.print(summary_table(result))
            if self.out is not None:
                console.print(f"report: {self.out / 'report.html'}", soft_wrap=True, highlight=False)
        sys.stdout.flush()


def report(path: Path, out: Path | None, as_json: bool) -> int:
    """Write the report of a result.json beside it, or into `out`; 0, or 2 by way of ConfigError."""
    result = read_result(path)
    try:
        written: Sequence[Path] = write_report(result, out or path.parent)
    except OSError as error:
        raise ConfigError(f"{out or path.parent} cannot be written ({error.strerror}); use --out DIR") from None
    if as_json:
        print(msgspec.json.encode({"command": "report", "files": [str(each) for each in written]}).decode())
    else:
        console = Console()
        console.print(summary_table(result))
        for each in written:
            console.print(str(each), soft_wrap=True, highlight=False)
    return 0
