"""`rayk down`: the end of a named cluster, whoever started it and however far that came."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

DOWN_EPILOG = "Example: rayk down prod"


def down(
    name: Annotated[str, typer.Argument(help="The name of the session: InferenceSession(runtime='ray', name=..).")],
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster; the one that runs here or that RAY_ADDRESS names otherwise.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="json: one object on stdout.")] = "table",
) -> int:
    """End a named cluster for all of its drivers: replicas, scheduler, places; also after a start that was never
    finished."""
    from rayk.actors.removal import remove_session
    from rayk.errors import ConfigError
    from rayk.session import InferenceSession

    if form not in ("table", "json"):
        raise ConfigError(f"--format is {form!r}; it is table or json")
    with InferenceSession("ray", address or "auto", name, log_to_driver=False, logging_level="error") as session:
        ended = remove_session(session.ray, name)
    if form == "json":
        typer.echo(msgspec.json.encode({"command": "down", "name": name, **ended._asdict()}).decode())
    else:
        typer.echo(f"{name}: {ended.actors} actor(s) ended, {ended.groups} placement group(s) given back")
    return 0
