"""The command line: `rayk COMMAND`. Flags are declared here; what a command does is in its own module, imported late
so that `--help` is fast.

Exit codes: 0 success, 1 the work failed, 2 bad usage. Errors are one line on stderr, never a traceback.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rayk.bench.core.command import CORE_EPILOG, core
from rayk.bench.overload_command import OVERLOAD_EPILOG, overload
from rayk.bench.scheduler_command import SCHEDULER_EPILOG, scheduler
from rayk.cli.describe import DESCRIBE_EPILOG, describe
from rayk.cli.generate import GENERATE_EPILOG, generate
from rayk.cli.plan import PLAN_EPILOG, plan
from rayk.errors import NotBuiltError, RaykError
from rayk.simulate.command import SIMULATE_EPILOG, simulate

INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt
NOT_BUILT_COMMANDS = ("top",)
NOT_BUILT_FLAGS = (
    "--warmup",
    "--think-time",
    "--slo-ttft",
    "--slo-itl",
    "--chaos",
    "--sweep",
    "--nodes",
)

app = typer.Typer(
    name="rayk",
    help="A paged, prefix-sharing KV cache for LLM serving on Ray.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rayk {version('rayk')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _refuse(parameter: typer.CallbackParam, value: Any) -> Any:
    if value is not None:
        raise NotBuiltError(parameter.opts[0])
    return value


def _only_core(context: typer.Context) -> None:
    """Flags between `bench` and `core` would be lost without a word."""
    for name in context.params:
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} stands before core, whose flags come after it")


def _refused(flag: str) -> Any:
    return typer.Option(flag, help="Not built yet.", hidden=True, callback=_refuse)


_WORK, _CLUSTER, _LOAD, _CACHE, _OUTPUT = "Workload", "Cluster", "Load", "Cache", "Output"

BENCH_EPILOG = "Example: rayk bench --workload chat --replicas 2 --forward verify --out demo-out"


bench_app = typer.Typer()


@bench_app.callback(epilog=BENCH_EPILOG, invoke_without_command=True)
def bench(
    context: typer.Context,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Mooncake jsonl, Claude Code sessions or Azure csv; plain, .gz or .zst.", rich_help_panel=_WORK
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="A generator: chat (the default), agent, documents or random.", rich_help_panel=_WORK),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor on all lengths of a generator.", rich_help_panel=_WORK)
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="How many requests to serve: 1000, or all of a trace.", rich_help_panel=_WORK)
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(help="Send requests for so long, then finish those in flight: 60s, 2m.", rich_help_panel=_WORK),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generator.", rich_help_panel=_WORK)] = 0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A run of a few seconds: 40 requests.", rich_help_panel=_WORK)
    ] = False,
    replicas: Annotated[int, typer.Option(help="Data-parallel replicas.", rich_help_panel=_CLUSTER)] = 2,
    runtime: Annotated[
        str, typer.Option(help="ray, or inline: everything in this process.", rich_help_panel=_CLUSTER)
    ] = "ray",
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join; otherwise one that runs, or a new one.", rich_help_panel=_CLUSTER),
    ] = None,
    router: Annotated[
        str,
        typer.Option(
            help="cost, round-robin, least-loaded, prefix, session, or module:Class.", rich_help_panel=_CLUSTER
        ),
    ] = "cost",
    peer_copies: Annotated[
        bool,
        typer.Option(
            " /--no-peer-copies",
            show_default=False,
            help="Do not copy prefixes between replicas (never done with --forward none).",
            rich_help_panel=_CLUSTER,
        ),
    ] = True,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests in flight over all replicas: 16.", rich_help_panel=_LOAD)
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            help="Instead: send requests as they arrive, so many times as fast as recorded.", rich_help_panel=_LOAD
        ),
    ] = None,
    prefill_rate: Annotated[
        float | None,
        typer.Option(
            help="With --forward none: tokens a second that each replica prefills, one request after the other.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows of one forward on a replica: the concurrency; 256 with --speed.", rich_help_panel=_LOAD
        ),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one forward on a replica: 2048 with verify or a prefill rate, else none.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    forward: Annotated[
        str,
        typer.Option(
            help="verify: write and check every slot. none: tokens just advance. hf: a model answers (--model).",
            rich_help_panel=_LOAD,
        ),
    ] = "verify",
    model: Annotated[
        Path | None,
        typer.Option(help="With --forward hf: folder of a Hugging Face checkpoint.", rich_help_panel=_LOAD),
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.", rich_help_panel=_CACHE)] = 128,
    pages: Annotated[
        int | None, typer.Option(help="Pages of a replica; suits the workload if not given.", rich_help_panel=_CACHE)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Or the memory of a replica: 2GiB, bytes, or 0.9 of what the planner would give it.",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="A host tier for the replicas of each node: 16GiB, bytes, or 0.5 of what is free.",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    disk_dir: Annotated[
        Path | None,
        typer.Option(help="A disk tier in this folder of each node, kept for the next run.", rich_help_panel=_CACHE),
    ] = None,
    disk_memory: Annotated[
        str | None, typer.Option(help="What --disk-dir may hold on each node.", rich_help_panel=_CACHE)
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers.", rich_help_panel=_CACHE)] = 2,
    kv_heads: Annotated[int, typer.Option(help="KV heads.", rich_help_panel=_CACHE)] = 2,
    head_dim: Annotated[int, typer.Option(help="Elements of a head.", rich_help_panel=_CACHE)] = 8,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float8_e4m3fn or int8.", rich_help_panel=_CACHE)
    ] = "float32",
    tp: Annotated[int, typer.Option(help="Tensor-parallel shards of a replica.", rich_help_panel=_CACHE)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for result.json, report.html and PNGs.", rich_help_panel=_OUTPUT)
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = Format.table,
    warmup: Annotated[str | None, _refused("--warmup")] = None,
    think_time: Annotated[str | None, _refused("--think-time")] = None,
    slo_ttft: Annotated[str | None, _refused("--slo-ttft")] = None,
    slo_itl: Annotated[str | None, _refused("--slo-itl")] = None,
    chaos: Annotated[str | None, _refused("--chaos")] = None,
    sweep: Annotated[str | None, _refused("--sweep")] = None,
    nodes: Annotated[str | None, _refused("--nodes")] = None,
) -> int:
    """Serve a workload or a trace from N replicas, and report."""
    if context.invoked_subcommand is not None:
        _only_core(context)
        return 0
    from rayk.bench.command import BenchCommand

    return BenchCommand(
        trace=trace,
        workload=workload,
        scale=scale,
        requests=requests,
        duration=duration,
        pages=pages,
        memory=memory,
        host_memory=host_memory,
        disk_dir=disk_dir,
        disk_memory=disk_memory,
        concurrency=concurrency,
        speed=speed,
        prefill_rate=prefill_rate,
        max_batch_size=max_batch_size,
        token_budget=token_budget,
        forward=forward,
        model=model,
        peer_copies=peer_copies,
        smoke=smoke,
        out=out,
        as_json=form is Format.json,
        settings={
            "replicas": replicas,
            "runtime": runtime,
            "address": address,
            "router": router,
            "page_size": page_size,
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": dtype,
            "tp": tp,
            "seed": seed,
        },
    ).run()


@app.command(epilog="Example: rayk report demo-out/result.json --out report")
def report(
    result: Annotated[Path, typer.Argument(help="The result.json of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; beside the result otherwise.", rich_help_panel=_OUTPUT)
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = Format.table,
) -> int:
    """Write report.html, PNGs and a markdown summary again from a result.json."""
    from rayk.bench import command

    return command.report(result, out, form is Format.json)


def _add_refused(name: str) -> None:
    @app.command(
        name,
        hidden=True,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def refused() -> None:
        raise NotBuiltError(f"rayk {name}")


bench_app.command("core", epilog=CORE_EPILOG)(core)
bench_app.command("scheduler", epilog=SCHEDULER_EPILOG)(scheduler)
bench_app.command("overload", epilog=OVERLOAD_EPILOG)(overload)
app.add_typer(bench_app, name="bench")
app.command(epilog=PLAN_EPILOG)(plan)
app.command(epilog=DESCRIBE_EPILOG)(describe)
app.command(epilog=GENERATE_EPILOG)(generate)
app.command(epilog=SIMULATE_EPILOG)(simulate)
for _name in NOT_BUILT_COMMANDS:
    _add_refused(_name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (the process's arguments when None); the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        code = app(args=None if argv is None else list(argv), prog_name="rayk", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        print("rayk: stopped by the user", file=sys.stderr)
        return 1
    except RaykError as error:
        print(f"rayk: {error}", file=sys.stderr)
        return _code(error)
    except Exception as error:
        # typer carries its own copy of click and does not export the base of its usage errors.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "rayk"
        if message := error.format_message():  # empty when the help was shown instead
            print(f"{where}: {message} (see {where} --help)", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _code(error: RaykError) -> int:
    """2 for what the user asked wrongly, 1 for what failed while being done."""
    return 2 if isinstance(error, (ValueError, NotImplementedError, TypeError)) or _is_plan(error) else 1


def _is_plan(error: RaykError) -> bool:
    from rayk.errors import PlanError

    return isinstance(error, PlanError)
