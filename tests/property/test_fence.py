"""Two owners of one id, in every order: no owner changes or reads pages of the other's claim.

The scheduler's core and a replica's service are real; messages are encoded. Each driver has a short script; the lease
of the first ends at some moment, and one of its messages to the replica arrives once more, later. All orders are
played.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from ray import cloudpickle

from rayk import MHAKVCacheParams, TextContext
from rayk import protocol as m
from rayk.errors import AlreadyClaimedError, LeaseLostError, RaykError
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.context_sync import ContextSender
from rayk.replica.service import ReplicaService
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.script import ReplicaReply

PAGE, LEASE = 2, 3.0
PARAMS = MHAKVCacheParams(
    dtype="float32", head_dim=1, num_layers=1, n_kv_heads=1, page_size=PAGE, devices=["cpu"],
    data_parallel_degree=1, enable_prefix_caching=True,
)  # fmt: skip
TOKENS = {"A": [1, 2, 3, 4, 5], "B": [6, 7, 8, 9, 10]}
WINDOWS = {"admit": (0, 5), "alloc": (0, 5), "execute": (0, 5), "step": (4, 5), "tick": (4, 5)}


def mark(inputs: Any, batch: Any) -> Any:
    """Write each token into its slot; what the slots before hold."""
    [shard] = inputs.shards
    read = []
    for row, ctx in enumerate(batch):
        w, table, size = ctx.tokens, shard.lookup_table[row].tolist(), shard.kv_blocks.shape[3]
        read += [float(shard.kv_blocks[table[i // size], 0, 0, i % size]) for i in range(w.processed_length)]
        for i in range(w.processed_length, w.processed_length + w.active_length):
            shard.kv_blocks[table[i // size], :, :, i % size] = float(w.all[i])
    return read


class World:
    """One scheduler, one replica, and what each driver sent and heard."""

    def __init__(self) -> None:
        self.now = 0.0
        self.scheduler = SchedulerCore([1], RouterSettings("round-robin", (8,), PAGE), False, lambda: self.now)
        self.core = ReplicaCore(PARAMS, 0, 8, 4)
        self.service = ReplicaService(self.core, 1, cloudpickle.dumps)
        self.numbers = itertools.count(1)
        self.generation = dict.fromkeys("AB", 0)
        self.wires: dict[str, bytes] = {}
        for client in "AB":
            self.run(client, m.Connect(LEASE))

    def replica(self, client: str, command: Any, wire: bytes = b"") -> m.Result:
        if not wire:
            wire = m.encode(m.ReplicaEnvelope(client, 1, next(self.numbers), command))
        self.wires[f"{client} {type(command).__name__}"] = wire
        return m.decode_reply(self.service.handle(wire)[0]).result

    def run(self, client: str, command: Any) -> m.Result:
        script = self.scheduler.handle(client, command)
        try:
            asks = next(script)
            while True:
                asks = script.send([ReplicaReply(self.replica("scheduler", ask.command)) for ask in asks])
        except StopIteration as end:
            result: m.Result = end.value
            return result
        except RaykError as error:
            return m.failure(error)

    def expire(self) -> None:
        """Only A is silent."""
        for _ in range(5):
            self.now += 1.0
            self.scheduler.leases.heard("B")
            for asks in self.scheduler.expire():
                for ask in asks:
                    self.replica("scheduler", ask.command)

    def context(self, client: str, what: str) -> TextContext:
        ctx = TextContext("r", TOKENS[client], 9)
        ctx.tokens.processed, ctx.tokens.end = WINDOWS[what]
        return ctx

    def say(self, client: str, what: str) -> m.Result:
        generation = self.generation[client]
        if what == "release":
            return self.replica(client, m.Release(["r"], generations=[generation]))
        ctx = self.context(client, what)
        if what in ("admit", "alloc"):
            contexts = ContextSender().pack([ctx], whole=True)
            if what == "alloc":
                return self.run(client, m.PlaceMany(contexts, [0], False, generations=[generation]))
            done = self.run(client, m.PlaceMany(contexts, [0]))
            assert isinstance(done, m.PlaceDone)
            if not done.failures:
                [self.generation[client]] = done.generations
            return done
        views = [ContextSender().view(ctx, whole=True, generation=generation)]
        fn = cloudpickle.dumps(mark)
        if what == "tick":
            return self.replica(client, m.RunTick(views, step=[0], alloc=[0], execute=[0], fn=fn))
        return self.replica(client, m.Step(views) if what == "step" else m.Execute(views, fn))

    @property
    def owner(self) -> str:
        request = self.core.requests.get("r")
        return request.client if request is not None else ""

    def pages(self) -> Any:
        """What the request's slots hold, who it is, and what is cached."""
        cached = [self.core.cached_pages(self.context(client, "admit")) for client in "AB"]
        blocks = self.core.blocks("r")
        held = self.core.read_pages(blocks)[0][:, 0].flatten().tolist() if blocks else []
        return self.owner, blocks, held, cached, self.core.usage


def failure_of(result: m.Result) -> RaykError | None:
    if isinstance(result, m.Failure):
        return m.to_error(result)
    if isinstance(result, m.PlaceDone) and result.failures:
        return m.to_error(result.failures[0])
    if isinstance(result, m.TickDone) and result.failure is not None:
        return m.to_error(result.failure)
    return None


def merged(*scripts: Sequence[str]) -> Iterator[list[str]]:
    """Every order that keeps that of each script."""
    left = [script for script in scripts if script]
    if not left:
        yield []
    for at, script in enumerate(left):
        for rest in merged(*left[:at], script[1:], *left[at + 1 :]):
            yield [script[0], *rest]


def play(order: Sequence[str]) -> None:
    world, computed = World(), set[str]()  # whose tokens are all in the pages of its claim
    for event in order:
        before, held = world.pages(), world.generation.copy()
        if event == "lease ends":
            world.expire()
            assert world.owner != "A" or held["A"] == 0
            continue
        if event.startswith("again"):
            wire = world.wires.get(event.removeprefix("again "))
            if wire is None:
                continue
            world.replica("A", None, wire)
            if before[0] == "B":
                assert world.pages() == before, (order, event)
            continue
        client, what = event.split()
        result = world.say(client, what)
        error = failure_of(result)
        if what == "admit":
            assert (error is None) == (before[0] == "") and isinstance(error, AlreadyClaimedError | None), (
                order,
                event,
            )
        elif before[0] == client:
            assert error is None, (order, event, error)
        else:  # a claim that has ended, or one that never was
            assert error is not None and world.pages() == before, (order, event)
            if held[client] or before[0]:
                assert isinstance(error, LeaseLostError), (order, event, error)
                assert (error.client, error.generation) == (client, held[client])
                assert (error.owner, error.owner_generation > 0) == (before[0], bool(before[0]))
            continue
        if what in ("execute", "tick") and error is None:
            read = cloudpickle.loads(result.data if isinstance(result, m.Value) else result.value)  # type: ignore[union-attr]
            assert all(value in (0.0, float(token)) for value, token in zip(read, TOKENS[client], strict=False))
        if what == "execute" and error is None:
            computed.add(client)
        if what in ("admit", "release"):
            computed.discard(client)
        if client in computed:
            assert world.pages()[2][: len(TOKENS[client])] == TOKENS[client], (order, event)
    world.core.check_integrity()


A = ["A admit", "A execute", "A step", "A release"]
B = ["B admit", "B execute", "B step"]


@pytest.mark.parametrize("again", ["Execute", "Step", "Release"])
def test_messages_that_arrive_once_more(again: str) -> None:
    word = {"Execute": 2, "Step": 3, "Release": 4}[again]
    played = 0
    for order in merged([*A[:word], f"again A {again}"], B, ["lease ends"]):
        play(order)
        played += 1
    assert played == {2: 140, 3: 280, 4: 504}[word]


@pytest.mark.parametrize(
    ("first", "second", "orders"),
    [
        (["A admit", "A alloc", "A tick", "A release"], B, 280),
        (["A admit", "A release", "A execute", "A tick"], ["B admit", "B tick", "B release"], 280),
        (["A admit", "A release", "A admit", "A execute"], ["B admit", "B release"], 105),
        (["A execute", "A alloc", "A step", "A tick", "A release"], ["B admit", "B execute"], 168),
    ],
)
def test_every_order_of_two_owners(first: list[str], second: list[str], orders: int) -> None:
    played = 0
    for order in merged(first, second, ["lease ends"]):
        play(order)
        played += 1
    assert played == orders
