"""The flags of `rayk bench`, of the commands below it, and of `rayk report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rayk.cli.flags import FORMAT, Format, group

BENCH_EPILOG = "Example: rayk bench --workload chat --replicas 2 --forward verify --out demo-out"
REPORT_EPILOG = "Example: rayk report demo-out/result.json --out report"
CORE_EPILOG = "Example: rayk bench core --only w1,w3 --repeat 5"
OVERLOAD_EPILOG = "Example: rayk bench overload --duration 60s --factor 5"
SERVE_EPILOG = "Example: rayk bench serve --runtime ray --replicas 2 --check"
SCHEDULER_EPILOG = "Example: rayk bench scheduler --rounds 5 --check"
CONCURRENCY = 16
REPEAT = 5
LEAST_OF_STARLETTE = 0.7
LEAST_OF_STARLETTE_RAY = 0.5
MOST_LATER = 0.003  # seconds to the first byte, beyond bare Starlette's
LEAST_SPEEDUP, LEAST_OF_BARE = 25.0, 0.6

work, cluster, load, cache = group("Workload"), group("Cluster"), group("Load"), group("Cache")
faults = group("Faults")
what, judge, output = group("What to measure"), group("Judgement"), group("Output")


@dataclass(frozen=True, kw_only=True)
class BenchFlags:
    """Serve a workload or a trace from N replicas, and report."""

    trace: Annotated[Path | None, work("Mooncake jsonl, Claude Code sessions or Azure csv; plain, .gz or .zst.")] = None
    workload: Annotated[str | None, work("A generator: chat (the default), agent, documents or random.")] = None
    scale: Annotated[float | None, work("Factor on all lengths of a generator.")] = None
    requests: Annotated[int | None, work("How many requests to serve: 1000, or all of a trace.")] = None
    duration: Annotated[str | None, work("Send requests for so long, then finish those in flight: 60s, 2m.")] = None
    seed: Annotated[int, work("Seed of the generator, and of faults.")] = 0
    smoke: Annotated[bool, work("A run of a few seconds: 40 requests.", "--smoke")] = False
    replicas: Annotated[int, cluster("Data-parallel replicas.")] = 2
    runtime: Annotated[str, cluster("ray, or inline: everything in this process.")] = "ray"
    address: Annotated[str | None, cluster("Ray cluster to join; otherwise one that runs, or a new one.")] = None
    router: Annotated[str, cluster("cost, round-robin, least-loaded, prefix, session, or module:Class.")] = "cost"
    peer_copies: Annotated[
        bool,
        cluster(
            "Do not copy prefixes between replicas (never done with --forward none).",
            " /--no-peer-copies",
            show_default=False,
        ),
    ] = True
    concurrency: Annotated[int | None, load(f"Requests in flight over all replicas: {CONCURRENCY}.")] = None
    speed: Annotated[
        float | None, load("Instead: send requests as they arrive, so many times as fast as recorded.")
    ] = None
    think_time: Annotated[
        str | None,
        load(
            "Or so many users (--concurrency) who ask one session after the other, and think between turns: recorded, "
            "none, or a factor on what was recorded."
        ),
    ] = None
    warmup: Annotated[str | None, load("Leave out what ends in the first 10s, 1m of the run.")] = None
    slo_ttft: Annotated[str | None, load("Goodput: most time to the first token: 500ms, 2s.")] = None
    slo_itl: Annotated[str | None, load("Goodput: most time between tokens, in the mean of a request.")] = None
    sweep: Annotated[
        str | None, load("A run for each value of a flag, and a report of all: replicas=1,2,4 or speed=1,2,4.")
    ] = None
    saturate: Annotated[
        float | None,
        load("Search for the highest --speed at which that share of requests meets the objectives (--slo-..): 0.9."),
    ] = None
    prefill_rate: Annotated[
        float | None,
        load("With --forward none: tokens a second that each replica prefills, one request after the other."),
    ] = None
    max_batch_size: Annotated[
        int | None, load("Rows of one forward on a replica: the concurrency; 256 with --speed.")
    ] = None
    token_budget: Annotated[
        int | None, load("Tokens of one forward on a replica: 2048 with verify or a prefill rate, else none.")
    ] = None
    forward: Annotated[
        str, load("verify: write and check every slot. none: tokens just advance. hf: a model answers (--model).")
    ] = "verify"
    model: Annotated[Path | None, load("With --forward hf: folder of a Hugging Face checkpoint.")] = None
    page_size: Annotated[int, cache("Tokens of a page.")] = 128
    pages: Annotated[int | None, cache("Pages of a replica; suits the workload if not given.")] = None
    memory: Annotated[
        str | None, cache("Or the memory of a replica: 2GiB, bytes, or 0.9 of what the planner would give it.")
    ] = None
    host_memory: Annotated[
        str | None, cache("A host tier for the replicas of each node: 16GiB, bytes, or 0.5 of what is free.")
    ] = None
    disk_dir: Annotated[Path | None, cache("A disk tier in this folder of each node, kept for the next run.")] = None
    disk_memory: Annotated[str | None, cache("What --disk-dir may hold on each node.")] = None
    layers: Annotated[int, cache("Layers.")] = 2
    kv_heads: Annotated[int, cache("KV heads.")] = 2
    head_dim: Annotated[int, cache("Elements of a head.")] = 8
    dtype: Annotated[str, cache("float32, bfloat16, float16, float8_e4m3fn or int8.")] = "float32"
    tp: Annotated[int, cache("Tensor-parallel shards of a replica.")] = 1
    chaos: Annotated[
        str | None,
        faults("Faults on purpose, and how often: kill-replica:2/min,cut-socket:6/h. docs/chaos.md has the kinds."),
    ] = None
    nodes: Annotated[int, faults("Simulated nodes of this machine, for kill-node.")] = 1
    out: Annotated[Path | None, output("Folder for result.json, report.html and PNGs; - for a line of the output.")] = (
        None
    )
    form: Annotated[Format, FORMAT] = Format.table


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Write report.html, PNGs and a markdown summary again from a result.json; of several, one report beside each
    other."""

    result: Annotated[
        list[Path], typer.Argument(help="The result.json of a run, or a log with it (- for stdin); several to compare.")
    ]
    out: Annotated[Path | None, output("Folder to write to; beside the result otherwise, of stdin here.")] = None
    form: Annotated[Format, FORMAT] = Format.table


@dataclass(frozen=True, kw_only=True)
class CoreFlags:
    """Measure the control plane: CPU time of each workload beside its limit and the best peer's."""

    only: Annotated[
        str | None,
        what(
            "Groups, as in w1,w3: w1 cold prompts, w2 shared prefix, hash both with hashed pages, w3 decode, w4 a "
            "trace, w5 the prefix index, tiers, start, memory, engine; these if not given. And ray, which starts a "
            "cluster, and instructions, which needs valgrind."
        ),
    ] = None
    trace: Annotated[Path | None, what("The trace of w4; generated chats otherwise.")] = None
    repeat: Annotated[int | None, what(f"Measured runs of each workload: {REPEAT}.")] = None
    smoke: Annotated[bool, what("A tenth of the work, once: does it run?", "--smoke")] = False
    check: Annotated[
        bool, judge("Exit with 1 when a limit is exceeded, or a figure is worse than the baseline's.", "--check")
    ] = False
    baseline: Annotated[Path | None, judge("Compare with the figures saved in this file.")] = None
    tolerance: Annotated[float, judge("How much worse than the baseline is a regression: 0.1.")] = 0.1
    save: Annotated[Path | None, judge("Add the figures to this file, under the commit that runs.")] = None
    out: Annotated[Path | None, output("Folder for core.json.")] = None
    form: Annotated[Format, FORMAT] = Format.table


@dataclass(frozen=True, kw_only=True)
class SchedulerFlags:
    """Measure batches of claims and allocs through one scheduler actor on 4 replicas.

    Beside them, in turns: the same requests one by one, and the same bytes through an actor that only forwards them to
    4 actors that only echo them.
    """

    batch: Annotated[int, what("Requests of a batch.", min=1)] = 256
    prompt: Annotated[int, what("Tokens of a prompt.", min=1)] = 256
    page_size: Annotated[int, what("Tokens of a page.", min=1)] = 128
    in_flight: Annotated[int, what("Batches at once.", min=1)] = 4
    batches: Annotated[int, what("Batches of one measurement.", min=1)] = 40
    rounds: Annotated[int, what("Measurements, the first left out.", min=1)] = 5
    router: Annotated[str | None, what("Who places the batches; the driver if not given, as one by one.")] = None
    address: Annotated[str, what("Ray cluster to join; an embedded one otherwise.")] = "local"
    check: Annotated[
        bool, judge(f"Exit with 1 below {LEAST_SPEEDUP:.0f} x one by one or {LEAST_OF_BARE} x bare Ray.", "--check")
    ] = False
    form: Annotated[Format, FORMAT] = Format.table


@dataclass(frozen=True, kw_only=True)
class ServeBenchFlags:
    """Stream answers of a model that does nothing through the HTTP server, and the same bytes through bare Starlette.

    Tokens per second of a core of the server's process, and the time to the first byte.
    """

    runtime: Annotated[
        str, what("inline; ray: replicas in processes of their own; named: the same behind a scheduler's.")
    ] = "inline"
    replicas: Annotated[int, what("Replicas.", min=1)] = 1
    streams: Annotated[int, what("Streams at once.", min=1)] = 64
    prompt: Annotated[int, what("Tokens of a prompt.", min=1)] = 32
    tokens: Annotated[int, what("Tokens of an answer.", min=1)] = 512
    rounds: Annotated[int, what("Measurements of each.", min=1)] = 3
    check: Annotated[
        bool,
        judge(f"Exit with 1 below {LEAST_OF_STARLETTE} (ray: {LEAST_OF_STARLETTE_RAY}) of bare Starlette.", "--check"),
    ] = False
    form: Annotated[Format, FORMAT] = Format.table


@dataclass(frozen=True, kw_only=True)
class OverloadFlags:
    """Ask a cluster of real replicas for several times what it can do, from two drivers; 1 when it takes that badly.

    Measures the unloaded latency and the capacity first. Forwards take their time on the replicas, as on a GPU.
    """

    duration: Annotated[str, what("How long the overload lasts.")] = "60s"
    factor: Annotated[float, what("Arrivals over what the cluster can do.", min=1.0)] = 5.0
    deadline: Annotated[float, what("Deadline over the unloaded median.", min=1.0)] = 5.0
    replicas: Annotated[int, what("Data-parallel replicas.", min=1)] = 2
    max_waiting: Annotated[int, what("Requests that may wait.", min=1)] = 64
    seed: Annotated[int, what("Seed of arrivals and lengths.")] = 0
    address: Annotated[str, what("Ray cluster to join; an embedded one otherwise.")] = "local"
    smoke: Annotated[bool, what("A run of some 15 seconds, for tests.", "--smoke")] = False
    form: Annotated[Format, FORMAT] = Format.table
