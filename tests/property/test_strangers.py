"""Any decodable message of a stranger: replicas and the scheduler answer, stay sound, and no other request is changed.

What is not decodable is refused before (tests/unit/protocol/test_messages.py). Execute is left out: it runs code, for
whom Ray lets in (SECURITY.md).
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect as shape
from msgspec import structs

from rayk import MHAKVCacheParams, TextContext
from rayk import protocol as m
from rayk.errors import RaykError
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.admission import AdmissionPolicy
from rayk.protocol.context_sync import ContextSender
from rayk.replica.service import ReplicaService
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.script import ReplicaReply
from tests.unit.protocol.strategies import LEAVES, messages

PAGE, PAGES = 2, 16
PARAMS = MHAKVCacheParams(
    dtype="float32", head_dim=1, num_layers=1, n_kv_heads=1, page_size=PAGE, devices=["cpu"],
    data_parallel_degree=1, enable_prefix_caching=True,
)  # fmt: skip
TOKENS = np.arange(1, 6, dtype=np.int32)
NEAR = {  # what a driver of this cluster would send, more or less
    shape.IntType: st.integers(-2, 9) | st.sampled_from([2**31, 2**63 - 1, -(2**63)]),
    shape.StrType: st.sampled_from(["honest", "other", "", "stranger"]),
    shape.BytesType: st.sampled_from([TOKENS.tobytes(), TOKENS[:4].tobytes(), b"", b"abc"]) | st.binary(max_size=80),
}
COMMANDS = [cls for cls in (*get_args(m.ReplicaCommand), *get_args(m.SchedulerCommand)) if cls is not m.Execute]


class World:
    """Two replicas and their scheduler; the request "honest" runs on one of them, and its pages are marked."""

    def __init__(self, admission: AdmissionPolicy | None) -> None:
        self.cores = [ReplicaCore(PARAMS, replica, PAGES, 4) for replica in range(2)]
        self.services = [ReplicaService(core, 1, journal=True) for core in self.cores]
        settings = RouterSettings("cost", (PAGES, PAGES), PAGE, admission=admission)
        self.scheduler = SchedulerCore([1, 1], settings, True, lambda: 0.0)
        self.numbers = itertools.count(1)
        self.schedule("driver", m.Connect(3.0, True))
        self.place("honest", TOKENS)
        for core in self.cores:
            for page in core.blocks("honest") if "honest" in core.requests else ():
                for buffer in core.buffers.all_buffers:
                    buffer[page] = 100.0 + page
        self.before = self.state()
        assert any(self.before)

    def replica(self, client: str, replica: int, command: Any, attached: Any = ()) -> ReplicaReply:
        wire = m.encode(m.ReplicaEnvelope(client, 1, next(self.numbers), command))
        reply, data = self.services[replica].handle(wire, attached)
        return ReplicaReply(m.decode_reply(reply).result, data)

    def schedule(self, client: str, command: Any) -> m.Result:
        try:
            script = self.scheduler.handle(client, command)
            asked = next(script)
            while True:
                asked = script.send([self.replica("scheduler", a.replica, a.command, a.attached) for a in asked])
        except StopIteration as end:
            result: m.Result = end.value
            return result
        except RaykError as error:
            return m.failure(error)

    def place(self, request_id: str, tokens: Any) -> None:
        contexts = ContextSender().pack([TextContext(request_id, tokens, 16)], whole=True)
        done = self.schedule("driver", m.PlaceMany(contexts))
        assert isinstance(done, m.PlaceDone) and not done.failures

    def state(self) -> Any:
        """Who has the request, where, and what its pages hold."""
        found = []
        for core in self.cores:
            request = core.requests.get("honest")
            blocks = core.blocks("honest") if request is not None else []
            pages = [buffer[page].tolist() for page in blocks for buffer in core.buffers.all_buffers]
            found.append((request.client, request.generation, blocks, pages) if request is not None else None)
        return found

    def check(self) -> None:
        for core in self.cores:
            core.check_integrity()
        self.scheduler.members.check_integrity()
        assert self.state() == self.before
        if self.scheduler.members.ready:
            self.place("later", [9, 8, 7])


@pytest.mark.parametrize("cls", COMMANDS)
@settings(max_examples=12, derandomize=True, database=None)
@given(data=st.data(), waits=st.booleans())
def test_a_stranger_changes_nothing_of_others(cls: Any, data: st.DataObject, waits: bool) -> None:
    world, command = World(AdmissionPolicy() if waits else None), data.draw(messages(cls, {**LEAVES, **NEAR}))
    if isinstance(command, m.RunTick):
        command = structs.replace(command, fn=b"")  # as Execute
    if isinstance(command, m.Release):
        command = structs.replace(command, force=False)  # says that it means others' claims
    for _ in range(2):
        if cls in get_args(m.ReplicaCommand):
            world.replica("stranger", 0, command)
        else:
            world.schedule("stranger", command)
    world.check()


@pytest.mark.parametrize("count", [0, -1, 4095, sys.maxsize])
def test_a_cluster_has_a_most(count: int) -> None:
    world = World(None)
    refused = world.schedule("stranger", m.Enlist(count))
    assert isinstance(refused, m.Failure) and "at most 4,096" in str(m.to_error(refused))
    assert world.scheduler.members.states == ["ready", "ready"]
    world.check()
