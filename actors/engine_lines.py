"""What a Cluster's scheduler and its engines say to each other: a PostLine to each engine, and a thread that reads what
comes from it until it ends."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from rayk.actors.engine import REPORTS_LANE
from rayk.actors.interface import Runtime
from rayk.actors.post_line import PostLine
from rayk.actors.serving_roster import EngineHandle
from rayk.protocol.engine import Command, Report, decode_report, encode
from rayk.protocol.lines import PathState


class EngineLines:
    """`heard` is called with each report and its number, from 1 on; `lost`, with a reason, once no more come: also when
    `silence` seconds brought nothing, or `heard` raised."""

    def __init__(
        self,
        runtime: Runtime,
        silence: float,
        heard: Callable[[int, EngineHandle, Report, int], None],
        lost: Callable[[int, EngineHandle, str], None],
    ) -> None:
        self._runtime = runtime
        self._silence = silence
        self._heard = heard
        self._lost = lost
        self._lines: dict[int, PostLine] = {}

    def follow(self, replica: int, handle: EngineHandle) -> None:
        """Talk to that engine from now on."""
        line = self._lines[replica] = PostLine(self._runtime, handle.actor, f"replica {replica}", REPORTS_LANE)
        name = f"rayk-reports-{replica}"
        Thread(target=self._read, args=(replica, handle, line), name=name, daemon=True).start()

    def _read(self, replica: int, handle: EngineHandle, line: PostLine) -> None:
        reason = "its engine was stopped"
        try:
            for count, wire in enumerate(line.stream(self._silence), 1):
                self._heard(replica, handle, decode_report(wire), count)
        except BaseException as error:  # whatever it was, nobody reads what comes from there any more
            reason = str(error) or type(error).__name__
        line.close()
        self._lost(replica, handle, reason)

    def post(self, replica: int, command: Command) -> None:
        """Tell an engine, if it is followed."""
        if (line := self._lines.get(replica)) is not None:
            line.post(encode(command))

    def path(self, replica: int) -> PathState:
        """What carries messages to an engine now."""
        return self._lines[replica].path(replica)

    def close(self, replica: int) -> None:
        """Talk to that engine no more; nothing if it was lost before the scheduler began."""
        if (line := self._lines.pop(replica, None)) is not None:
            line.close()
