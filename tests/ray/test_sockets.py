"""The data plane on Ray: messages go by sockets, and whatever happens to these, all is done once and in order: what a
manager asks, and what a Cluster's requests bring, with a name and without."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pytest
from ray import cloudpickle

from rayk import AsyncPagedKVCacheManager, Cluster, InferenceSession, PagedKVCacheManager, TextContext
from rayk.actors import connection
from rayk.actors.describe_cluster import describe_cluster
from rayk.actors.engine import RayReplicas
from rayk.actors.interface import SocketAddress
from rayk.actors.path import MessagePath
from rayk.dispatch.named import NamedDispatcher
from rayk.manager.calls import Calls

from ..patience import until  # noqa: TID252  # as above
from ..unit.engine import fake  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine.fake import PageModel, expected  # noqa: TID252  # as above
from .test_manager import params

cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ENGINES = {"replicas": 2, "page_size": 4, "pages": 200, "max_batch_size": 8, "chunk_size": 32}
Disturb = Callable[[int], None]


def model(device: str) -> PageModel:
    return PageModel()


class Subject(Protocol):
    """Who says something to two replicas. `paths` are how; what goes wrong in work() is raised."""

    def paths(self) -> list[MessagePath]: ...
    def addresses(self) -> list[SocketAddress]: ...
    def say(self) -> None:
        """Something to everybody, so that paths are looked at."""

    def kinds(self) -> set[str]: ...
    def work(self, seed: str, disturb: Disturb) -> None:
        """Things of which it would be seen if one were done twice, or not, or out of order."""


class Manager:
    def __init__(self, manager: PagedKVCacheManager) -> None:
        self.manager = manager
        assert isinstance(manager._calls, Calls)
        self._calls = manager._calls

    def paths(self) -> list[MessagePath]:
        return [link._path for link in (self._calls.scheduler, *(self._calls.link(r) for r in range(2)))]

    def addresses(self) -> list[SocketAddress]:
        return [handle.actor.socket for handle in self._calls.cluster.running.values() if handle.actor.socket]

    def say(self) -> None:
        self.manager.get_metrics_aggregated()
        self.manager.step([[], []])
        for r in range(2):
            self.manager.get_num_used_pages(r)

    def kinds(self) -> set[str]:
        return {state.kind for state in self.manager.path_states()}

    def work(self, seed: str, disturb: Disturb) -> None:
        draw, live, manager = random.Random(seed), dict[str, tuple[TextContext, int]](), self.manager
        for turn in range(150):
            disturb(turn)
            if len(live) < 6:
                ctx = TextContext(f"{seed}-{turn}", range(turn, turn + 9), 100)
                [replica] = manager.admit([ctx])
                live[ctx.request_id] = ctx, replica
            else:
                gone = draw.choice(sorted(live))
                manager.release(gone, live.pop(gone)[1])
            for ctx, replica in live.values():
                ctx.update(turn)
                manager.alloc(ctx, replica)
            manager.step([[ctx for ctx, r in live.values() if r == replica] for replica in range(2)])
        for name, (_, replica) in live.items():
            assert manager.contains(name, replica)
            manager.release(name, replica)
        manager.check_integrity()
        manager.reset_prefix_cache()
        assert [manager.get_num_used_pages(r) for r in range(2)] == [0, 0]


class Engines:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        assert isinstance(cluster._replicas, RayReplicas)
        self._replicas = cluster._replicas

    def paths(self) -> list[MessagePath]:
        lines = [self._replicas._lines[r] for r in range(2)]
        dispatcher = self.cluster._dispatcher
        if isinstance(dispatcher, NamedDispatcher):
            lines.append(dispatcher._link._open())
        return [path for line in lines for path in (line._posts, line._reads)]

    def addresses(self) -> list[SocketAddress]:
        return [placed.actor.socket for placed in self._replicas._placed.values() if placed.actor.socket]

    def say(self) -> None:
        self.cluster.generate([[1]] * 4, max_new_tokens=1)

    def kinds(self) -> set[str]:
        return {state.kind for state in self.cluster.path_states()}

    def work(self, seed: str, disturb: Disturb) -> None:
        for wave in range(6):
            prompts = [[wave, i, len(seed)] for i in range(12)]
            handles = self.cluster.submit_all(prompts, max_new_tokens=80)
            for turn in range(25):
                disturb(wave * 25 + turn)
                handles[turn % 12].cancel() if wave == 5 and turn < 3 else time.sleep(0.002)
            for prompt, handle in zip(prompts, handles, strict=True):
                output = handle.result(30)
                assert output.tokens == expected(prompt, 80)[: len(output.tokens)] and output.retries == 0
                assert output.finish_reason == "cancelled" or len(output.tokens) == 80
        self.cluster.check_integrity()
        assert self.cluster.replica_states() == ["ready", "ready"]
        assert [self.cluster.stats(r).running for r in range(2)] == [0, 0]


@pytest.fixture(scope="module", params=["manager", "cluster", "named cluster"])
def shared(session: InferenceSession, request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "manager":
        with PagedKVCacheManager(params(2), session, 64, max_batch_size=8) as manager:
            yield Manager(manager)
        return
    name = "sockets" if request.param == "named cluster" else None
    with (
        InferenceSession("ray", name=name) as own,
        Cluster(model, own, router="round-robin", replace=False, **ENGINES) as cluster,  # type: ignore[arg-type]  # mypy joins the types
    ):
        yield Engines(cluster)


@pytest.fixture
def subject(shared: Subject) -> Subject:
    by(shared, "unix")
    return shared


def by(subject: Subject, kind: str) -> None:
    """Until all goes that way."""

    def all_does() -> bool:
        subject.say()
        return subject.kinds() == {kind}

    until(all_does)


def cut(path: MessagePath, how: str) -> None:
    line = path._line
    if line is None:
        return
    with suppress(OSError):
        line._end.shutdown({"reading": socket.SHUT_RD, "writing": socket.SHUT_WR, "both": socket.SHUT_RDWR}[how])


@pytest.mark.parametrize("how", ["reading", "writing", "both"])
def test_all_goes_on_while_sockets_are_cut(subject: Subject, how: str) -> None:
    draw = random.Random(how)
    subject.work(how, lambda turn: cut(draw.choice(subject.paths()), how) if draw.random() < 0.2 else None)
    by(subject, "unix")


def test_without_file_descriptors_calls_are_made(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(address: SocketAddress) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "_connect", full)
        subject.work("full", lambda turn: [cut(path, "both") for path in subject.paths()] if turn == 1 else None)
        assert subject.kinds() == {"calls"}
    by(subject, "unix")


def test_a_socket_file_that_is_removed_harms_nobody(subject: Subject) -> None:
    for address in subject.addresses():
        os.unlink(address.path)
    subject.work("files", lambda turn: [cut(path, "both") for path in subject.paths()] if turn == 1 else None)
    by(subject, "tcp")


def test_messages_go_by_sockets_and_leave_no_files(session: InferenceSession) -> None:
    with (
        PagedKVCacheManager(params(2), session, 64, max_batch_size=8) as manager,
        InferenceSession("ray", name="files") as named,
        Cluster(model, named, **ENGINES) as cluster,  # type: ignore[arg-type]  # as above
    ):
        subjects = [Manager(manager), Engines(cluster)]
        for subject in subjects:
            by(subject, "unix")
        state = describe_cluster(named.ray, "files")
        assert state is not None and [each.path and each.path.kind for each in state.replicas] == ["unix", "unix"]
        paths = [Path(address.path) for subject in subjects for address in subject.addresses()]
        assert len(paths) == 4 and all(path.exists() for path in paths)
    assert not any(path.exists() for path in paths)


def test_a_session_without_sockets(session: InferenceSession) -> None:
    with (
        InferenceSession("ray", sockets=False) as calls,
        PagedKVCacheManager(params(2), calls, 64, max_batch_size=8) as manager,
        Cluster(model, calls, **ENGINES) as cluster,  # type: ignore[arg-type]  # as above
    ):
        assert manager.admit([TextContext("a", range(9), 100)]) in ([0], [1])
        assert cluster.generate([[1, 2]], max_new_tokens=30)[0].tokens == expected([1, 2], 30)
        assert {state.kind for state in [*manager.path_states(), *cluster.path_states()]} == {"calls"}


def test_an_event_loop_goes_on_while_sockets_are_cut(session: InferenceSession) -> None:
    async def serve() -> None:
        async with AsyncPagedKVCacheManager(params(2), session, 64, max_batch_size=8) as manager:
            draw = random.Random(1)

            async def one(name: str) -> None:
                ctx = TextContext(name, range(draw.randrange(100), 120), 200)
                [replica] = await manager.admit([ctx])
                for _ in range(5):
                    ctx.update(7)
                    await manager.alloc(ctx, replica)
                await manager.release(name, replica)

            for round_ in range(20):
                cut(draw.choice(Manager(manager.sync).paths()), "both")
                await asyncio.gather(*(one(f"{round_}-{i}") for i in range(4)))
            await manager.check_integrity()

    asyncio.run(serve())
