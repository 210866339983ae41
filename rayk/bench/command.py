"""`rayk bench` and `rayk report`: an exit code, or a RaykError for bad usage."""

from __future__ import annotations

import logging
import math
import platform
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from rayk.bench.flags import CONCURRENCY, BenchFlags, ReportFlags
from rayk.bench.hf import fitted, model_shape
from rayk.bench.progress import progress_view, summary_table
from rayk.bench.report import write_comparison, write_report, write_words
from rayk.bench.result import BenchResult, read_result
from rayk.bench.run import run_bench
from rayk.bench.settings import ARRIVING_BATCH, VERIFY_BUDGET, BenchSettings, check_chaos, complete, with_tiers
from rayk.bench.sweep import saturate, sweep
from rayk.cli.flags import Format
from rayk.errors import ConfigError, RaykError
from rayk.quantity import parse_duration
from rayk.workloads.generators import GENERATORS
from rayk.workloads.request import Workload
from rayk.workloads.traces import read_trace

DEFAULT_REQUESTS = 1000
MODEL_REQUESTS = 200
SMOKE_REQUESTS = 40
MODEL_BUDGET = 512  # tokens of one forward of a real model
PER_SECOND = 2000  # requests generated for each second of a run of a fixed duration; more than can be served
MOST_GENERATED = 200_000
AS_GIVEN = (
    *("replicas", "runtime", "address", "router", "page_size", "speed", "prefill_rate", "forward"),
    *("layers", "kv_heads", "head_dim", "dtype", "tp", "seed", "chaos", "nodes"),
)
"""Flags that are settings as they stand."""
IN_LOG = Path("-")
"""`--out -`: the result is a line of the output, which `rayk report` finds in the log of a job."""

log = logging.getLogger("rayk.bench")


def bench(flags: BenchFlags) -> int:
    """Serve and report: 0, or 1 when a request was lost or a checked slot was wrong."""
    if flags.sweep is not None and flags.saturate is not None:
        raise ConfigError("--sweep and --saturate exclude each other")
    if flags.sweep is not None or flags.saturate is not None:
        if flags.out == IN_LOG:
            raise ConfigError("--out - is for one run; name a folder for those of --sweep and --saturate")
        return (sweep if flags.sweep is not None else saturate)(flags, _measured)
    result, well = _measured(flags)
    if flags.form is Format.json:
        if flags.out != IN_LOG:
            print(result.to_json().decode(), flush=True)
    else:
        console = Console()
        console.print(summary_table(result))
        if flags.out not in (None, IN_LOG):
            page = flags.out / "report.html"  # a job's reader may be on another machine
            text = str(page) if console.is_terminal else f"{page.resolve()} on {platform.node()}"
            console.print(f"report: {text}", soft_wrap=True, highlight=False)
    if not result.ok:
        log.error("the run failed: %s", result.failure)
    return 0 if well else 1


def _measured(flags: BenchFlags) -> tuple[BenchResult, bool]:
    """One run, and whether it went well; what did not is logged."""
    settings, length = _settings(flags), None
    if flags.model is not None:
        shape = model_shape(flags.model)
        settings, length = shape.applied(settings), shape.length
    settings = with_tiers(settings, flags.host_memory, flags.disk_dir, flags.disk_memory)
    check_chaos(settings)
    folder = _Folder(flags.out)
    torch.set_num_threads(1)  # the verify model works on small pieces, for which threads only wait for each other
    workload = _workload(flags, settings, length)
    source = {"name": workload.source, "kind": workload.kind, "requests": len(workload.requests)}
    settings = msgspec.structs.replace(settings, source=source | workload.parameters)
    settings = complete(settings, workload, flags.pages, flags.memory)
    counts = f"{len(workload.requests)} requests for {settings.replicas} replica(s)"
    log.info("%s: %s of %d pages of %d tokens", workload.source, counts, settings.pages, settings.page_size)
    total = None if settings.duration_s is not None else len(workload.requests)
    try:
        # Ray prints what its processes log to this process's stdout, which is for the result alone.
        with redirect_stdout(sys.stderr), progress_view(Console(stderr=True), total) as view:
            outcome = run_bench(settings, workload, view.show, folder.write)
    except BaseException:  # before there was anything to report
        folder.leave()
        raise
    if (error := outcome.error) is not None:
        text = str(error) or ("stopped by the user" if isinstance(error, KeyboardInterrupt) else "")
        if not isinstance(error, (RaykError, KeyboardInterrupt)):
            text = f"{type(error).__name__}: {text}"
            log.debug("where:", exc_info=error)
        log.error("the run stopped: %s", text)
    elif folder.unwritten:
        log.error("%s: the report is not whole", folder.unwritten)
    return outcome.result, error is None and outcome.result.ok and not folder.unwritten


def _settings(flags: BenchFlags) -> BenchSettings:
    duration_s = None if flags.duration is None else parse_duration(flags.duration)
    if flags.requests is not None and flags.requests < 1:
        raise ConfigError(f"--requests is {flags.requests}, at least 1 is needed")
    if flags.requests is not None and duration_s is not None:
        raise ConfigError("--requests and --duration exclude each other")
    if flags.concurrency is not None and flags.speed is not None:
        raise ConfigError("--concurrency and --speed exclude each other: so many in flight, or as they arrive")
    concurrency = CONCURRENCY if flags.concurrency is None else flags.concurrency
    rows = concurrency if flags.speed is None else ARRIVING_BATCH
    think = flags.think_time
    if think is not None and think not in ("recorded", "none"):
        try:
            think_time: float | None = float(think)
        except ValueError:
            raise ConfigError(f"--think-time {think!r} is not recorded, none or a factor such as 0.5") from None
    else:
        think_time = {None: None, "none": 0.0, "recorded": 1.0}[think]
    if think_time is not None and not 0 <= think_time < math.inf:
        raise ConfigError(f"--think-time is {think_time}, at least 0 is needed")
    seconds = {name: getattr(flags, name) for name in ("warmup", "slo_ttft", "slo_itl")}
    times = {name: None if text is None else parse_duration(text) for name, text in seconds.items()}
    budget = flags.token_budget
    if budget is None and (flags.forward != "none" or flags.prefill_rate is not None):
        budget = MODEL_BUDGET if flags.forward == "hf" else VERIFY_BUDGET
    return BenchSettings(
        concurrency=concurrency,
        max_batch_size=rows if flags.max_batch_size is None else flags.max_batch_size,
        peer_copies=flags.peer_copies and flags.forward != "none",  # it saves computing, of which there is none then
        model=None if flags.model is None else str(flags.model),
        token_budget=budget,
        duration_s=duration_s,
        think_time=think_time,
        warmup_s=times["warmup"],
        slo_ttft=times["slo_ttft"],
        slo_itl=times["slo_itl"],
        **{name: getattr(flags, name) for name in AS_GIVEN},
    )


def _workload(flags: BenchFlags, settings: BenchSettings, length: int | None) -> Workload:
    """What is to be served; `length` is the model's, if there is one."""
    if flags.trace is not None and flags.workload is not None:
        raise ConfigError("--trace and --workload exclude each other")
    requests, duration_s = flags.requests, settings.duration_s
    if flags.smoke and requests is None and duration_s is None:
        requests = SMOKE_REQUESTS
    if flags.trace is not None:
        if flags.scale is not None:
            raise ConfigError("--scale is for --workload; a trace is served as it is")
        workload = read_trace(flags.trace, requests, lanes=settings.concurrency)
        if length is not None and workload.longest > length:
            raise ConfigError(
                f"{flags.trace} has a request of {workload.longest} tokens, the model has {length}; use a model of "
                "that length, or a generated workload, which is scaled to the model"
            )
        return workload
    name = flags.workload or "chat"
    if name not in GENERATORS:
        raise ConfigError(f"--workload {name!r} is not one of {', '.join(GENERATORS)}")
    if flags.scale is not None and not 0 < flags.scale <= 100:
        raise ConfigError(f"--scale is {flags.scale}, more than 0 and at most 100 is needed")
    if requests is None:
        requests = DEFAULT_REQUESTS if length is None else MODEL_REQUESTS
        if duration_s is not None:
            requests = min(MOST_GENERATED, math.ceil(PER_SECOND * duration_s))
    if length is not None and flags.scale is None:
        return fitted(lambda part: GENERATORS[name](requests, seed=settings.seed, scale=part), length)
    scale = {} if flags.scale is None else {"scale": flags.scale}
    return GENERATORS[name](requests, seed=settings.seed, **scale)


class _Folder:
    """`--out DIR`, if given; `unwritten` says why there is no report, or not all of it. `--out -` is no folder but what
    is stdout now."""

    def __init__(self, path: Path | None) -> None:
        self._log = sys.stdout if path == IN_LOG else None
        self._path = None if self._log is not None else path
        self.unwritten = ""
        self._made = self._path is not None and not self._path.exists()
        if self._path is not None:
            make_folder(self._path)

    def write(self, result: BenchResult, final: bool) -> None:
        """Figures take seconds, so a result that is not final has none. What cannot be written is still printed."""
        if self._log is not None:
            print(result.to_json().decode(), file=self._log, flush=True)
        if self._path is None:
            return
        try:
            (self._path / "result.json").write_bytes(result.to_json() + b"\n")
            write_words(result, self._path)
            if final:
                write_report(result, self._path)
        except OSError as error:
            self.unwritten = f"--out {self._path} cannot be written ({error.strerror})"

    def leave(self) -> None:
        """Remove it if it was made for nothing."""
        if self._made and self._path is not None:
            with suppress(OSError):  # it is not empty when the report went wrong half-way
                self._path.rmdir()


def make_folder(path: Path) -> None:
    """The folder of an --out, made if need be; ConfigError when it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made ({error.strerror}); name another folder") from None


def report(flags: ReportFlags) -> int:
    """Write the report of a result.json beside it, or into --out, of several that of all into --out or here; 0, or 2
    by way of ConfigError."""
    results = [read_result(path) for path in flags.result]
    several = len(results) > 1
    folder = flags.out or (Path() if several else flags.result[0].parent)
    try:
        if several:
            names = [path.parent.name or path.stem for path in flags.result]
            labels = names if len(set(names)) == len(names) else [str(path) for path in flags.result]
            paths = write_comparison(list(zip(labels, results, strict=True)), folder)
        else:
            paths = write_report(results[0], folder)
        written = [str(each) for each in paths]
        if not several and flags.result[0].suffix != ".json":  # it came in a log
            (folder / "result.json").write_bytes(results[0].to_json() + b"\n")
            written.append(str(folder / "result.json"))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); use --out DIR") from None
    if flags.form is Format.json:
        print(msgspec.json.encode({"command": "report", "files": written}).decode())
        return 0
    console = Console()
    if not several:
        console.print(summary_table(results[0]))
    for each in written:
        console.print(each, soft_wrap=True, highlight=False)
    return 0
