"""A replica in parts: rank 0's engine and another rank in a thread, each with a model that reads its own pages back.

So a rank whose pages, tables or order of work differed from rank 0's would have other logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from socket import SHUT_RDWR, socket
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from rayk.engine import ranks as ranks_module
from rayk.engine.rank import RankWorker
from rayk.engine.ranks import Ranks
from rayk.engine.replicas import ModelSource, ServeSettings, open_engine
from rayk.engine.tiers import NodeTiers
from rayk.errors import LineError, RankLostError
from rayk.params import GROUP, SHARED_MEMORY
from rayk.planning.node_plan import measure_node
from rayk.protocol.engine_reports import Finished, Tokens
from rayk.protocol.engine_request import Request
from rayk.request_errors import ForwardError
from rayk.sampling import SamplingParams
from rayk.transport.line import PageExportRef

from .fake import PageModel, expected
from .test_engine import prompts

SETTINGS = ServeSettings(
    tp=2, device="cpu", page_size=4, pages=12, max_batch_size=4, hash_seed=bytes(32), peer_copies=True, graphs=False
)


class Part(PageModel):
    """Keeps what it found."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def logits(self, inputs: Any, tokens: torch.Tensor, counts: Sequence[int], **more: bool) -> torch.Tensor:
        self.found.append(super().logits(inputs, tokens, counts, **more))
        return self.found[-1]


class Replica:
    """Rank 0's engine, the other rank, and what connects them."""

    def __init__(self, number: int = 0, tiers: NodeTiers | None = None) -> None:
        own, self.end = Pipe()
        self.parts = (Part(), Part())
        self.worker = RankWorker(1, 2, self.parts[1], SETTINGS, number, "cpu")
        self.thread = Thread(target=self.worker.serve, args=(self.end,), daemon=True)
        self.thread.start()
        self.ranks = Ranks(number, [own])
        source = ModelSource(make=lambda device: Part(), model_id="fake")
        self.engine = open_engine(
            self.parts[0], source, SETTINGS, number, "cpu", 1, measure_node(), tiers, ranks=self.ranks
        )

    def serve(self, asked: list[list[int]], count: int = 6) -> list[list[int]]:
        """Greedy answers; those that failed are empty."""
        found: dict[int, list[int]] = {number: [] for number in range(len(asked))}
        sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
        for number, prompt in enumerate(asked):
            self.engine.submit(Request(number, str(number), prompt, sampling))
        while self.engine.busy:
            for event in self.engine.step():
                if isinstance(event, Tokens):
                    for each, token in zip(event.numbers, event.tokens, strict=True):
                        found[int(each)].append(int(token))
                elif isinstance(event, Finished) and event.error is not None:
                    assert isinstance(event.error, ForwardError)
                    found[event.number] = []
        return list(found.values())

    def check(self) -> None:
        """Both ranks did the same."""
        self.engine.core.check_integrity()
        self.ranks.ask("plan", 1, None).wait()  # by then it has done what came before
        one, other = (part.found for part in self.parts)
        assert len(one) == len(other) and all(map(torch.equal, one, other))

    def close(self) -> None:
        with suppress(RankLostError):
            self.engine.core.shutdown()
        self.ranks.close()
        self.thread.join(5)
        assert not self.thread.is_alive()


Made = Callable[..., Replica]


@pytest.fixture
def made() -> Iterator[Made]:
    replicas: list[Replica] = []

    def make(*arguments: Any) -> Replica:
        replicas.append(Replica(*arguments))
        return replicas[-1]

    yield make
    for replica in replicas:
        replica.close()


def test_ranks_see_the_same_batches(made: Made) -> None:
    replica, asked = made(), prompts(12, 30, seed=1)
    assert replica.serve(asked) == [expected(prompt, 6) for prompt in asked]
    assert replica.engine.stats().preemptions > 0
    replica.check()


def test_a_page_in_the_tiers_has_the_parts_of_all_ranks(made: Made, tmp_path: Any) -> None:
    tiers = NodeTiers(20 * 128, str(tmp_path), 1 << 20, f"ranks-{os.getpid()}")
    replica, asked = made(0, tiers), prompts(10, 40, seed=2)
    for order in (asked, asked[::-1]):  # the last ones are on the host yet
        assert replica.serve(order) == [expected(prompt, 6) for prompt in order]
        replica.engine.core.drain()
    reused = replica.engine.stats().reused
    assert reused.host_tokens > 0 and reused.disk_tokens > 0
    assert {file.stat().st_size for file in tmp_path.rglob("*.kv")} == {2 * 64 + 64}
    replica.check()


@pytest.mark.parametrize("kind", [SHARED_MEMORY, GROUP])
def test_each_rank_copies_from_the_same_rank_of_another_replica(made: Made, kind: str) -> None:
    source, target = made(0), made(1)
    [prompt] = prompts(1, 40, seed=3)
    source.serve([prompt])
    ports = [replica.engine.peers.port for replica in (source, target)]
    assert ports[0].endpoint.lines == [SHARED_MEMORY, GROUP] and ports[0].endpoint.page_bytes == 128
    own, theirs = ports[0]._lines[kind], ports[1]._lines[kind]
    ids = np.arange(4, dtype=np.int32)
    offer = own.offer(ports[1].me, 1, ids)
    theirs.fetch(PageExportRef(ports[0].me, 1, ids, offer, float("inf")), 0, ids)
    for core in (lambda each: each.engine.core, lambda each: each.worker._core):
        have, want = (core(each).buffers.read(ids) for each in (target, source))
        assert all(map(torch.equal, have, want))
    if kind == GROUP:
        return  # an end of which the target would hear by waiting
    own.end(1)
    with pytest.raises(LineError):
        theirs.fetch(PageExportRef(ports[0].me, 1, ids, offer, float("inf")), 0, ids)


def test_what_no_rank_can_do_is_the_requests_own_failure(made: Made) -> None:
    replica, asked = made(), [[1, 2, 3], [4, 50, 6], [7, 8]]
    for part in replica.parts:
        part.broken = 50
    assert replica.serve(asked) == [expected([1, 2, 3], 6), [], expected([7, 8], 6)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_fails_alone_takes_the_replica(made: Made, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "FAIL_SECONDS", 0.1)
    replica, lost = made(), list[RankLostError]()
    replica.ranks.on_loss = lost.append
    replica.parts[number].broken = 50
    with pytest.raises(RankLostError, match=rf"rank {number} of replica 0 is lost: .*cannot do token 50"):
        replica.serve([[4, 50, 6]], 30)
    assert lost


def test_a_rank_that_ends_takes_the_replica(made: Made) -> None:
    replica = made()
    with socket(fileno=os.dup(replica.end.fileno())) as end:
        end.shutdown(SHUT_RDWR)
    with pytest.raises(RankLostError, match="rank 1 of replica 0 is lost: its process ended"):
        replica.serve([[1, 2, 3]])
