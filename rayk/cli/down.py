"""`rayk down`: the end of a named cluster, whoever started it and however far that came."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from rayk.cli.flags import SECRET_TEXT, secret_of

DOWN_EPILOG = "Example: rayk down prod"


def down(
    name: Annotated[str, typer.Argument(help="The name of the session: InferenceSession(runtime='ray', name=..).")],
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster; the one that runs here or that RAY_ADDRESS names otherwise.")
    ] = None,
    secret_file: Annotated[Path | None, typer.Option(help=SECRET_TEXT)] = None,
    force: Annotated[bool, typer.Option("--force", help="Also without its secret.")] = False,
    form: Annotated[str, typer.Option("--format", help="json: one object on stdout.")] = "table",
) -> int:
    """End a named cluster for all of its drivers: replicas, scheduler, places; also after a start that was never
    finished."""
    from rayk.actors.removal import remove_session
    from rayk.errors import ConfigError
    from rayk.session import InferenceSession

    if form not in ("table", "json"):
        raise ConfigError(f"--format is {form!r}; it is table or json")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "secret": secret_of(secret_file)}
    with InferenceSession("ray", address or "auto", name, **quiet) as session:
        ended = remove_session(session.ray, name, force)
    if form == "json":
        typer.echo(msgspec.json.encode({"command": "down", "name": name, **ended._asdict()}).decode())
    else:
        typer.echo(f"{name}: {ended.actors} actor(s) ended, {ended.groups} placement group(s) given back")
    return 0
