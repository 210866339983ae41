"""The faults of one run: from settings to what they came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rayk.bench.chaos.injector import Injector
from rayk.bench.chaos.neighbour import Neighbour
from rayk.bench.chaos.nodes import SimulatedNodes, simulated_nodes
from rayk.bench.chaos.schedule import schedule
from rayk.bench.chaos.targets import ClusterTarget, Left, LocalTarget, ManagerTarget, Target
from rayk.bench.chaos.undisturbed import Comparison
from rayk.bench.measure import Fault
from rayk.bench.settings import BenchSettings
from rayk.errors import IntegrityError, PlanError
from rayk.session import InferenceSession

if TYPE_CHECKING:
    from rayk.bench.cluster_driver import ClusterDriver
    from rayk.bench.manager_driver import ManagerDriver

NODE_SECONDS = 120.0  # for simulated nodes to join
SETTLE_SECONDS = 60.0  # for pages to come back when nothing is asked for any more
LOOK_SECONDS = 0.2


class ChaosResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was left of a run with faults, on each replica, when nothing was asked for any more. `undisturbed`: of a
    Cluster, its answers beside those of one that nothing befell."""

    left: list[Left]
    undisturbed: Comparison | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was: no page, no claim, no other token."""
        return not any(map(any, self.left)) and not (self.undisturbed and self.undisturbed.differing)


class Chaos:
    """Of the run with these settings. Nothing happens before start(); end() also after an error."""

    def __init__(self, settings: BenchSettings, session: InferenceSession, nodes: SimulatedNodes | None) -> None:
        self._settings, self._session, self._nodes = settings, session, nodes
        self._injector: Injector | None = None
        self._target: Target = LocalTarget()

    def start(self, driver: ManagerDriver | ClusterDriver, clock: Callable[[], float]) -> None:
        """Begin, with the run."""
        from rayk.bench.cluster_driver import ClusterDriver

        settings, session = self._settings, self._session
        if not settings.faults:
            return
        if session.runtime == "ray":
            if isinstance(driver, ClusterDriver):
                self._target = ClusterTarget(driver.cluster)
            else:
                self._target = ManagerTarget(driver.manager)
        neighbour: Callable[[], Neighbour] | None = None
        if settings.shared:
            address = session.ray.joins_at()
            neighbour = lambda: Neighbour(settings, address, str(session.name))  # noqa: E731  # it is an argument
        folder, began = settings.disk_dir, clock()
        self._injector = Injector(
            self._target,
            schedule(settings.faults, settings.seed),
            lambda: clock() - began,
            Path(folder) if folder is not None else None,
            self._nodes,
            neighbour,
        )
        self._injector.start()

    def end(self) -> list[Fault]:
        """No more faults; waits for what is not over."""
        injector, self._injector = self._injector, None
        return injector.stop() if injector is not None else []

    def left(self) -> list[Left]:
        """What is in use when nothing is asked for any more, and all replicas are there; leases have to end."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while any(map(any, left := self._target.left())) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return left


def check_removed(session: InferenceSession) -> None:
    """IntegrityError when Ray still has actors or placement groups of a session whose managers were shut down."""
    actors, groups = session.ray.actor_names(), session.ray.groups(str(session.name))
    if actors or groups:
        raise IntegrityError("bench", f"{', '.join(actors) or 'no actors'} and {len(groups)} placement groups are left")


@contextmanager
def prepared(settings: BenchSettings, session: InferenceSession) -> Iterator[Chaos]:
    """The nodes that are asked for; they end with the block."""
    with ExitStack() as stack:
        nodes = None
        if settings.nodes > 1:
            nodes = stack.enter_context(simulated_nodes(settings.nodes - 1, session.ray.joins_at()))
            deadline = time.monotonic() + NODE_SECONDS
            while len(session.ray.nodes()) < settings.nodes:
                nodes.mend()
                if time.monotonic() > deadline:
                    here = len(session.ray.nodes())
                    raise PlanError(f"{here} of {settings.nodes} simulated nodes are there after {NODE_SECONDS:.0f} s")
                time.sleep(LOOK_SECONDS)
        yield Chaos(settings, session, nodes)
