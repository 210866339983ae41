"""The command line: `rayk COMMAND`. Each command's module declares its flags, and imports what it needs when it runs,
so that `--help` is fast.

Exit codes: 0 success, 1 the work failed, 2 bad usage. Errors are one line on stderr, never a traceback.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rayk.bench import flags
from rayk.cli.describe import DESCRIBE_EPILOG, describe
from rayk.cli.down import DOWN_EPILOG, down
from rayk.cli.example_model import EXAMPLE_MODEL_EPILOG, example_model
from rayk.cli.flags import command_of
from rayk.cli.generate_flags import GENERATE_EPILOG, GenerateFlags
from rayk.cli.plan_flags import PLAN_EPILOG, PlanFlags
from rayk.cli.serve_flags import BATCH_EPILOG, SERVE_EPILOG, BatchFlags, ServeFlags
from rayk.cli.top import TOP_EPILOG, top
from rayk.errors import RaykError
from rayk.simulate.flags import SIMULATE_EPILOG, SimulateFlags

INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt

app = typer.Typer(
    name="rayk",
    help="A paged, prefix-sharing KV cache for LLM serving on Ray.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


_core = command_of(flags.CoreFlags, "rayk.bench.core.command:core")
_scheduler = command_of(flags.SchedulerFlags, "rayk.bench.scheduler_cost:scheduler")
_overload = command_of(flags.OverloadFlags, "rayk.bench.overload:overload")
_bench = command_of(flags.BenchFlags, "rayk.bench.command:bench")
_serve = command_of(flags.ServeBenchFlags, "rayk.bench.serve:serve")
bench_app = typer.Typer()
bench_app.callback(epilog=flags.BENCH_EPILOG, invoke_without_command=True)(_bench)
bench_app.command("core", epilog=flags.CORE_EPILOG)(_core)
bench_app.command("scheduler", epilog=flags.SCHEDULER_EPILOG)(_scheduler)
bench_app.command("overload", epilog=flags.OVERLOAD_EPILOG)(_overload)
bench_app.command("serve", epilog=flags.SERVE_EPILOG)(_serve)
app.add_typer(bench_app, name="bench")
app.command("report", epilog=flags.REPORT_EPILOG)(command_of(flags.ReportFlags, "rayk.bench.command:report"))
app.command("plan", epilog=PLAN_EPILOG)(command_of(PlanFlags, "rayk.cli.plan:plan"))
app.command(epilog=DESCRIBE_EPILOG)(describe)
app.command(epilog=TOP_EPILOG)(top)
app.command(epilog=DOWN_EPILOG)(down)
app.command("generate", epilog=GENERATE_EPILOG)(command_of(GenerateFlags, "rayk.cli.generate:generate"))
app.command("example-model", epilog=EXAMPLE_MODEL_EPILOG)(example_model)
app.command("serve", epilog=SERVE_EPILOG)(command_of(ServeFlags, "rayk.cli.serve:serve"))
app.command("batch", epilog=BATCH_EPILOG)(command_of(BatchFlags, "rayk.cli.serve:batch"))
app.command("simulate", epilog=SIMULATE_EPILOG)(command_of(SimulateFlags, "rayk.simulate.command:simulate"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (the process's arguments when None); the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("rayk").setLevel(logging.INFO)  # and of libraries what is a warning
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
