"""Engines that are removed offer what they have cached to the others, by the scheduler's script
(rayk.scheduler.transfers.evacuation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rayk.scheduler.router.router import Router
from rayk.scheduler.scaling import Removed
from rayk.scheduler.serving.engine_scripts import EngineScripts
from rayk.scheduler.transfers.evacuation import Evacuation


class Evacuations:
    """The scheduler's, in its turn. `ready()` take requests, `on_end()` is called when one is over."""

    def __init__(
        self,
        scripts: EngineScripts,
        router: Router,
        ready: Callable[[], Sequence[int]],
        on_end: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._scripts = scripts
        self._router = router
        self._ready = ready
        self._on_end = on_end
        self._clock = clock
        self._done: dict[int, Removed] = {}

    def begin(self, source: int) -> None:
        """Offer what a draining replica has; nothing where there are no copies, or a tier that has it."""
        copies = self._router.fetching
        if copies is None or copies.shares_tiers or self.under_way(source):
            return
        script = Evacuation(copies.transfers, self._ready, self._clock).run(source)
        self._scripts.start(("evacuation", source), script, lambda removed: self._ended(source, removed))

    def _ended(self, source: int, removed: Removed) -> None:
        self._done[source] = removed
        self._on_end()

    def under_way(self, source: int) -> bool:
        """Whether it is not over."""
        return ("evacuation", source) in self._scripts

    def end(self, source: int) -> Removed:
        """What became of it. One that is under way is given up: its replica goes, and with it what is pinned there."""
        self._scripts.give_up(("evacuation", source))
        return self._done.pop(source, Removed())
