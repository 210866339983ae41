"""How commands declare their flags: an option in a group of --help, and a command that is a class of flags.

work = group("Workload")

@dataclass(frozen=True, kw_only=True)
class Count:
    '''Count requests.'''
    requests: Annotated[int, work("How many requests.")] = 10
    def run(self) -> int: ...  # the exit code

app.command()(command_of(Count))
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

import typer

from rayk.errors import ConfigError


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"


def group(panel: str) -> Callable[..., Any]:
    """Makes options of the group `panel`: of their help text, other names than the parameter's, and typer's options."""

    def option(text: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=text, rich_help_panel=panel, **more)

    return option


FORMAT = group("Output")("json: one object on stdout.", "--format")
SECRET_TEXT = "With --name, a file with the cluster's secret; RAYK_SECRET has it otherwise. Never on the command line."
SECRET_VARIABLE = "RAYK_SECRET"


def secret_of(file: Path | None) -> str | None:
    """What the file has, without space around it; else the variable, if it is set. ConfigError for a file that cannot
    be read or is empty."""
    if file is None:
        return os.environ.get(SECRET_VARIABLE)
    try:
        text = file.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--secret-file {file} cannot be read: {error}") from None
    if not text:
        raise ConfigError(f"--secret-file {file} is empty; write the secret into it")
    return text


def command_of(kind: type[Any], target: str) -> Callable[..., int]:
    """A function for typer whose parameters are the fields of the dataclass `kind`, which it hands to `target`.

    As a callback over other commands it leaves the work to these.
    """

    def command(context: typer.Context, **flags: Any) -> int:
        if context.invoked_subcommand is not None:
            _only(context)
            return 0
        module, _, name = target.partition(":")
        made = kind(**{flag: value for flag, value in flags.items() if flag in fields})
        return int(getattr(importlib.import_module(module), name)(made))

    def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    hints: dict[str, Any] = get_type_hints(kind, include_extras=True)
    fields = {each.name: each.default for each in dataclasses.fields(kind)}
    parameters = [parameter("context", typer.Context)]
    for name, default in fields.items():
        parameters.append(parameter(name, hints[name], *([] if default is dataclasses.MISSING else [default])))
    command.__doc__ = kind.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _only(context: typer.Context) -> None:
    """Flags between a command and one below it would be lost without a word."""
    for name in context.params:
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            flag, below = name.replace("_", "-"), context.invoked_subcommand
            raise typer.BadParameter(f"--{flag} stands before {below}, whose flags come after it")
