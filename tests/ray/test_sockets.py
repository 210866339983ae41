"""The data plane on Ray: messages go by sockets, and whatever happens to these, every call is done once."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rayk import AsyncPagedKVCacheManager, InferenceSession, PagedKVCacheManager, TextContext
from rayk.actors.channel import ActorChannel
from rayk.actors.interface import SocketAddress
from rayk.manager.calls import Calls

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from .test_manager import params

WAIT = 20.0


@pytest.fixture(scope="module")
def shared(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    with PagedKVCacheManager(params(2), session, 64, max_batch_size=8) as manager:
        yield manager


@pytest.fixture
def manager(shared: PagedKVCacheManager) -> PagedKVCacheManager:
    by_sockets(shared)
    return shared


def links(manager: PagedKVCacheManager) -> list[ActorChannel]:
    calls = manager._calls
    assert isinstance(calls, Calls)
    return [calls.scheduler, *(calls.link(r) for r in range(2))]


def addresses(manager: PagedKVCacheManager) -> list[SocketAddress]:
    """Where replicas listen."""
    calls = manager._calls
    assert isinstance(calls, Calls)
    found = [handle.actor.socket for handle in calls.cluster.running.values()]
    return [address for address in found if address is not None]


def by_sockets(manager: PagedKVCacheManager) -> None:
    """Until all messages go by sockets."""

    def all_do() -> bool:
        manager.get_metrics_aggregated()
        manager.step([[], []])
        for r in range(2):
            manager.get_num_used_pages(r)
        return {state.kind for state in manager.path_states()} == {"unix"}

    until(all_do)


def test_messages_go_by_sockets_and_leave_no_files(session: InferenceSession) -> None:
    with PagedKVCacheManager(params(2), session, 64, max_batch_size=8) as manager:
        by_sockets(manager)
        paths = [Path(address.path) for address in addresses(manager)]
        assert len(paths) == 2 and all(path.exists() for path in paths)
    assert not any(path.exists() for path in paths)


def test_a_session_without_sockets(session: InferenceSession) -> None:
    with (
        InferenceSession("ray", sockets=False) as calls,
        PagedKVCacheManager(params(2), calls, 64, max_batch_size=8) as manager,
    ):
        assert manager.admit([TextContext("a", range(9), 100)]) in ([0], [1])
        assert {state.kind for state in manager.path_states()} == {"calls"}


def cut(link: ActorChannel, how: str) -> None:
    line = link._path._line
    if line is None:
        return
    with suppress(OSError):
        line._end.shutdown({"reading": socket.SHUT_RD, "writing": socket.SHUT_WR, "both": socket.SHUT_RDWR}[how])


@pytest.mark.parametrize("how", ["reading", "writing", "both"])
def test_requests_go_on_while_sockets_are_cut(manager: PagedKVCacheManager, how: str) -> None:
    draw, live = random.Random(how), dict[str, tuple[TextContext, int]]()
    for turn in range(150):
        if draw.random() < 0.2:
            cut(draw.choice(links(manager)), how)
        if len(live) < 6:
            ctx = TextContext(f"{how}-{turn}", range(turn, turn + 9), 100)
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
    by_sockets(manager)


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
                cut(draw.choice(links(manager.sync)), "both")
                await asyncio.gather(*(one(f"{round_}-{i}") for i in range(4)))
            await manager.check_integrity()

    asyncio.run(serve())


def test_a_socket_file_that_is_removed_harms_nobody(manager: PagedKVCacheManager) -> None:
    for address in addresses(manager):
        os.unlink(address.path)
    ctx = TextContext("a", range(9), 100)
    [replica] = manager.admit([ctx])
    for link in links(manager):
        cut(link, "both")
    ctx.update(1)
    manager.alloc(ctx, replica)
    deadline = time.monotonic() + WAIT
    while {state.kind for state in manager.path_states()} != {"tcp"} and time.monotonic() < deadline:
        manager.step([[], []])
        manager.get_num_used_pages(0), manager.get_num_used_pages(1)
    assert {state.kind for state in manager.path_states()} == {"tcp"}, "by the network"
    manager.release("a", replica)
