"""Cache events of replicas in processes of their own: each publishes at its own port, until its process ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from rayk import InferenceSession, KVEventsConfig, PagedKVCacheManager, TextContext
from rayk.cluster import Cluster

from ..kv_reader import Reader  # noqa: TID252  # tests/ is no package that has an absolute name
from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine import fake  # noqa: TID252  # as above
from .forwards import PAGE, params, stamp
from .test_generate import SETTINGS, engine_pids, model

cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[model.__module__])

zmq = pytest.importorskip("zmq", reason="pyzmq is not installed (extra `events`)")


def two_free_ports() -> int:
    """The first of two that follow each other."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            try:
                two.bind(("127.0.0.1", one.getsockname()[1] + 1))
            except OSError:
                continue
            port: int = one.getsockname()[1]
            return port


def test_a_router_of_somebody_else_foresees_hits(session: InferenceSession) -> None:
    port, replay = two_free_ports(), two_free_ports()
    events = KVEventsConfig(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{replay}")
    readers = [Reader(zmq, f"tcp://127.0.0.1:{port + r}", f"tcp://127.0.0.1:{replay + r}") for r in (0, 1)]
    prompts = [[i % 7, *range(i * PAGE)] for i in range(1, 12)]
    with PagedKVCacheManager(params(), session, 12, max_batch_size=4, kv_events=events) as manager:
        for i, prompt in enumerate(prompts):
            ctx = TextContext("r", prompt, 1_000_000)
            [admission] = manager.try_admit([ctx], [i % 2])
            assert admission.error is None
            batches: list[list[TextContext]] = [[], []]
            batches[i % 2] = [ctx]
            manager.execute(batches, stamp)
            ctx.update(1)
            manager.step(batches)
            manager.release("r", i % 2)
        asked = [TextContext("q", [*prompt, 0], 1_000_000) for prompt in prompts]
        found = [[each.device_blocks for each in manager.get_prefix_cache_hit_counts(ctx)] for ctx in asked]
        for r, reader in enumerate(readers):
            reader.ask(reader.replay or "")  # nothing may come any more
            reader.until(
                lambda at=reader, r=r: [at.hits([*p, 0], PAGE) for p in prompts] == [each[r] for each in found]
            )
            assert reader.ranks == {r} and 0 < len(reader.pages) <= 12
        manager.reset_prefix_cache()
        for reader in readers:
            reader.until(lambda at=reader: not at.pages)
            reader.close()


def test_one_that_was_killed_is_followed_by_one_that_begins_anew(session: InferenceSession, tmp_path: Path) -> None:
    others = engine_pids()
    events: Any = KVEventsConfig(*(f"ipc://{tmp_path}/{name}" for name in ("live", "replay", "all")))
    with Cluster(model, session, kv_events=events, replace=False, **SETTINGS | {"replicas": 1}) as cluster:
        reader = Reader(zmq, f"ipc://{tmp_path}/live", f"ipc://{tmp_path}/replay")
        reader.until(lambda: reader.next > 0)
        prompt = list(range(30))
        cluster.generate([prompt], max_new_tokens=3)
        reader.until(lambda: reader.hits([*prompt, 0], 4) == 7)
        [doomed] = engine_pids() - others
        os.kill(doomed, signal.SIGKILL)
        until(lambda: cluster.replica_states() == ["lost"])
        cleared = reader.clears
        assert cluster.add_replicas() == [0]
        reader.until(lambda: reader.clears > cleared and not reader.pages)
        [output] = cluster.generate([prompt], max_new_tokens=3)
        assert output.cached_tokens == 0
        reader.until(lambda: reader.hits([*prompt, 0], 4) == 7)
        reader.close()
