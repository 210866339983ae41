"""Tasks of an event loop whose clients go away at any moment: the others get what they would have got alone.

Clients admit, generate some tokens and release, all at once; some are cancelled after a random number of turns of the
loop. The tokens depend on every position of the pages, as a model's do. Afterwards nothing is claimed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import AdmissionPolicy, AsyncPagedKVCacheManager, InferenceSession, TextContext

from ..unit.actors.fake import FakeRuntime, params, session_on  # noqa: TID252  # tests/ is no package

PROMPTS = [[1] * 9, [1] * 4 + [2] * 9, [1] * 13, [3] * 5, [4]]
M = 65521


class Client(NamedTuple):
    """`after` turns of the loop it goes away; None stays."""

    name: int
    prompt: int
    new: int
    after: int | None
    chunked: bool


clients = st.lists(
    st.builds(
        Client,
        name=st.integers(0, 5),
        prompt=st.integers(0, len(PROMPTS) - 1),
        new=st.integers(1, 6),
        after=st.one_of(st.none(), st.integers(0, 60)),
        chunked=st.booleans(),
    ),
    min_size=2,
    max_size=8,
)


def value_after(value: int, token: int) -> int:
    return (value * 31 + token + 7) % M


def alone(prompt: list[int], new: int) -> list[int]:
    """The tokens of a request without a cache."""
    tokens = list(prompt)
    for _ in range(new):
        value = 0
        for token in tokens:
            value = value_after(value, token)
        tokens.append(value % 100)
    return tokens


def forward(inputs: Any, batch: Any) -> dict[str, int]:
    """Reads the slot before the window through the table, writes the window; the next token of each request."""
    [shard] = inputs.shards
    size, made = shard.kv_blocks.shape[3], {}
    for row, ctx in enumerate(batch):
        at = ctx.tokens.processed_length
        table = shard.lookup_table[row]
        value = int(shard.kv_blocks[int(table[(at - 1) // size]), 0, 0, (at - 1) % size, 0, 0]) if at else 0
        for position, token in enumerate(ctx.tokens.active.tolist(), at):
            value = value_after(value, token)
            shard.kv_blocks[int(table[position // size]), :, :, position % size] = value
        made[ctx.request_id] = value % 100
    return made


async def serve(m: AsyncPagedKVCacheManager, client: Client) -> list[int]:
    ctx = TextContext(f"r{client.name}", PROMPTS[client.prompt], 100)
    [replica] = await m.admit([ctx])
    try:
        batches: list[list[TextContext]] = [[], []]
        batches[replica] = [ctx]
        while len(ctx.tokens) < len(PROMPTS[client.prompt]) + client.new:
            await m.alloc(ctx, replica)
            if client.chunked and ctx.tokens.active_length > 3:
                ctx.tokens.chunk(3)
            made = (await m.execute(batches, forward))[replica]
            ctx.update(made[ctx.request_id])
            await m.step(batches)
        return ctx.tokens.all.tolist()
    finally:
        await m.release(ctx.request_id, replica)


async def play(m: AsyncPagedKVCacheManager, all_clients: list[Client]) -> None:
    loop = asyncio.get_running_loop()
    names = asyncio.Condition()
    busy: set[int] = set()

    async def in_turn(client: Client) -> list[int]:
        """One id at a time, as soon as the client before has gone, cancelled or not."""
        async with names:
            await names.wait_for(lambda: client.name not in busy)
            busy.add(client.name)
        try:
            return await serve(m, client)
        finally:
            busy.discard(client.name)
            loop.call_soon(lambda: notices.append(loop.create_task(notify())))

    async def notify() -> None:
        async with names:
            names.notify_all()

    notices: list[asyncio.Task[None]] = []
    tasks = [loop.create_task(in_turn(client)) for client in all_clients]
    for turn in range(61):
        for client, task in zip(all_clients, tasks, strict=True):
            if client.after == turn:
                task.cancel()
        await asyncio.sleep(0)
    for client, task in zip(all_clients, tasks, strict=True):
        if client.after is None:
            assert await task == alone(PROMPTS[client.prompt], client.new)
        else:
            with suppress(asyncio.CancelledError):
                assert await task == alone(PROMPTS[client.prompt], client.new), "it was done before"
    while m._undoing or m._under_way or any(not notice.done() for notice in notices):
        await asyncio.sleep(0)
    assert [await m.get_num_used_pages(r) for r in range(2)] == [0, 0]
    assert [m.sync._calls.holder(f"r{i}") for i in range(6)] == [None] * 6
    await m.check_integrity()


@pytest.mark.parametrize("policy", [None, AdmissionPolicy()], ids=["", "policy"])
@pytest.mark.parametrize("kind", ["inline", "ray"])
@given(all_clients=clients)
@settings(max_examples=40, deadline=None)
def test_clients_that_go_away_disturb_nobody(
    kind: str, policy: AdmissionPolicy | None, all_clients: list[Client]
) -> None:
    with session_on(FakeRuntime(lazy=True)) if kind == "ray" else InferenceSession() as session:
        m = AsyncPagedKVCacheManager(
            params(2), session, 40, enable_runtime_checks=True, max_batch_size=8, admission=policy
        )
        asyncio.run(play(m, all_clients))
