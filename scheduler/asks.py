"""How the scheduler's scripts talk: questions for replicas, and the answers to them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

from rayk import messages as m


class Ask(NamedTuple):
    """One message to a replica; `attached` are references to page data, `with_data` asks for one back."""

    replica: int
    command: m.ReplicaCommand
    attached: tuple[Any, ...] = ()
    with_data: bool = False


class Told(NamedTuple):
    """The answer to an Ask; a dead or silent replica answers with a Failure."""

    result: m.Result
    data: Any = None


Script = Generator[list[Ask], list[Told], m.Result]
Part = Generator[list[Ask], list[Told], None]
