"""Cluster over engines in this process, and over replicas that a test lets die."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayk import InferenceSession, KVEventsConfig
from rayk.cluster import Cluster
from rayk.engine.engine import Engine
from rayk.engine.local_replicas import InlineReplicas
from rayk.errors import CheckpointError, ClosedError, ConfigError, ReplicaLostError
from rayk.protocol.engine import Report, Submit
from rayk.replica import kv_event_publisher
from rayk.request_errors import RequestCancelledError, RequestError, RequestTimeoutError
from rayk.sampling import SamplingParams

from ...kv_reader import Reader  # noqa: TID252  # tests/ is no package that has an absolute name
from ..engine.fake import POISON, VOCAB, PageModel, Tokenizer, expected  # noqa: TID252  # tests/ is no package
from ..engine.test_engine import prompts  # noqa: TID252  # tests/ is no package


class WithTokenizer(Tokenizer):
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 97 for c in text]}


def model(device: str) -> PageModel:
    assert device == "cpu"
    return PageModel(tokenizer=WithTokenizer())


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(model, replicas=2, page_size=4, pages=64, max_batch_size=4, chunk_size=16) as cluster:
        yield cluster


def test_outputs_in_the_order_of_the_prompts(cluster: Cluster) -> None:
    asked = prompts(20, 30, shared=9)
    outputs = cluster.generate(asked, max_new_tokens=9)
    assert [output.tokens for output in outputs] == [expected(p, 9) for p in asked]
    assert {output.replica for output in outputs} == {0, 1}, "both were used"
    assert all(
        o.finish_reason == "length" and o.error is None and o.prompt_length == len(p)
        for o, p in zip(outputs, asked, strict=True)
    )
    assert all(o.text == Tokenizer().decode(o.tokens) for o in outputs)
    assert all(o.ttft is not None and 0 <= o.ttft <= o.seconds for o in outputs)
    assert all(1 + sum(n for _, n in o.gaps) in (9, 10) for o in outputs)


def test_the_second_of_two_equal_requests_is_cached(cluster: Cluster) -> None:
    prompt = list(range(30))
    [first], [second] = cluster.generate(prompt), cluster.generate(np.array(prompt))
    assert (first.cached_tokens, second.cached_tokens) == (0, 28)
    assert first.tokens == second.tokens == expected(prompt, 64)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([VOCAB], "outside the vocabulary"),
        ([2**40], "out of int32"),
        ({"text": "ab", "tokens": [1]}, "either text or tokens"),
        ({"id": "x"}, "either text or tokens"),
        ({"text": 5}, "text must be a str"),
        ({"tokens": "ab"}, "flat sequence of ints"),
        ({"tokens": [1], "colour": 1}, "no field 'colour'"),
        ({"tokens": [1], "cache_salt": 1}, "cache_salt"),
        (list(range(90)) * 4, "can never fit"),
        ([1] * 5000, "no room for an answer"),
    ],
)
def test_one_bad_prompt_among_good_ones(cluster: Cluster, prompt: Any, message: str) -> None:
    good, bad, also_good = cluster.generate([[1, 2], prompt, {"id": "z", "text": "abc"}], max_new_tokens=5)
    assert good.tokens == expected([1, 2], 5) and also_good.tokens == expected([0, 1, 2], 5)
    assert also_good.id == "z"
    assert isinstance(bad.error, RequestError) and message in str(bad.error)
    assert bad.finish_reason == "error" and bad.tokens == []


def test_one_bad_setting_among_good_ones(cluster: Cluster) -> None:
    settings = [SamplingParams(max_new_tokens=3, temperature=t) for t in (0.0, float("nan"), 1.0)]
    good, bad, sampled = cluster.generate([[1, 2]] * 3, settings)
    assert good.tokens == expected([1, 2], 3) and len(sampled.tokens) == 3
    assert isinstance(bad.error, RequestError) and "temperature is nan" in str(bad.error)
    numpy_ones = cluster.generate([[1, 2]], max_new_tokens=np.int64(3), temperature=np.float32(0))
    assert numpy_ones[0].tokens == good.tokens
    [late] = cluster.generate([[1, 2]], timeout=float("nan"))
    assert "timeout" in str(late.error)


def test_wrong_use(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="2 sampling settings for 1"):
        cluster.generate([[1]], [SamplingParams(), SamplingParams()])
    with pytest.raises(ConfigError, match="'temp' is not a sampling setting"):
        cluster.generate([[1]], temp=1)
    assert cluster.generate([]) == []
    outputs = cluster.generate([{"id": "a", "tokens": [1]}, {"id": "a", "tokens": [2]}], max_new_tokens=2)
    assert outputs[0].tokens == expected([1], 2) and "in use" in str(outputs[1].error)
    with pytest.raises(CheckpointError, match="does not exist"):
        Cluster("/nowhere/at/all")
    for wrong in ({"replicas": 0}, {"pages": 0}, {"device": "tpu"}, {"router": "best"}, {"chunk_size": 0}):
        with pytest.raises(ConfigError):
            Cluster(model, **wrong)


def test_close_ends_everything() -> None:
    before = set(threading.enumerate())
    session = InferenceSession("inline")
    cluster = Cluster(model, session, page_size=4, pages=64)
    handle = cluster.submit([1, 2], max_new_tokens=200)
    session.close()
    output = handle.result(5)
    assert output.finish_reason in ("cancelled", "length")
    with pytest.raises(ClosedError):
        cluster.generate([[1]])
    cluster.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("rayk-") and t not in before]


@pytest.mark.parametrize("router", ["cost", "prefix"])
def test_requests_go_where_their_prefix_is(router: str) -> None:
    """Engines report their pages; the second turn of each conversation finds the first one's."""
    with Cluster(model, replicas=3, page_size=4, pages=300, max_batch_size=8, router=router) as cluster:
        first = [[i, *range(40 + i, 80 + i)] for i in range(9)]
        before = cluster.generate(first, max_new_tokens=10)
        again = [[*prompt, *output.tokens, 1, 2] for prompt, output in zip(first, before, strict=True)]
        order = [4, 8, 0, 2, 6, 1, 7, 3, 5]
        after = cluster.generate([again[i] for i in order], max_new_tokens=5)
        for i, output in zip(order, after, strict=True):
            assert output.tokens == expected(again[i], 5)
            assert output.replica == before[i].replica and output.cached_tokens == 48
        if router == "cost":
            assert {output.replica for output in before} == {0, 1, 2}


def test_pages_that_were_dropped_are_not_sought() -> None:
    with Cluster(model, replicas=2, page_size=4, pages=24, max_batch_size=8) as cluster:
        [old] = cluster.generate([list(range(40))], max_new_tokens=2)
        cluster.generate([[i] * 40 for i in range(50, 60)], max_new_tokens=2)
        router = cluster._dispatcher.router
        index = router.index
        index.check_integrity()
        for replica in range(2):
            assert index.pages(replica) <= 24
        assert not any(index.reach(router.keys.of(np.arange(40, dtype=np.int32).tobytes(), (None, None))).device)
        [new] = cluster.generate([list(range(40))], max_new_tokens=2)
        assert new.tokens == old.tokens and new.cached_tokens == 0


# -- streams and handles --------------------------------------------------------------------------------


def test_a_stream_tells_all_tokens_and_text(cluster: Cluster) -> None:
    asked = prompts(6, 20)
    tokens: dict[int, list[int]] = {i: [] for i in range(6)}
    text, outputs = dict.fromkeys(range(6), ""), {}
    for update in cluster.stream(asked, max_new_tokens=30):
        assert update.index not in outputs
        tokens[update.index] += update.tokens
        text[update.index] += update.text
        if update.output is not None:
            outputs[update.index] = update.output
    for i, prompt in enumerate(asked):
        assert tokens[i] == outputs[i].tokens == expected(prompt, 30)
        assert text[i] == outputs[i].text == Tokenizer().decode(tokens[i])


def test_a_stream_that_is_left_early_cancels(cluster: Cluster) -> None:
    for _ in cluster.stream([[1, 2], [3, 4]], max_new_tokens=180):
        break
    again = cluster.generate([[1, 2]], max_new_tokens=4)
    assert again[0].tokens == expected([1, 2], 4)
    while any(cluster.stats(r).running for r in range(2)):
        threading.Event().wait(0.005)
    assert sum(cluster.stats(r).finished for r in range(2)) >= 1


def test_cancelling_a_handle(cluster: Cluster) -> None:
    handles = cluster.submit_all([[i, i + 1] for i in range(40)], max_new_tokens=20)
    handles[-1].cancel(), handles[0].cancel()
    outputs = [handle.result(20) for handle in handles]
    assert isinstance(outputs[-1].error, RequestCancelledError) and outputs[-1].finish_reason == "cancelled"
    for i in range(1, 39):
        assert outputs[i].tokens == expected([i, i + 1], 20)
    handles[0].cancel()


def test_timeouts(cluster: Cluster) -> None:
    outputs = cluster.generate([[i, i] for i in range(30)], max_new_tokens=200, timeout=0.05)
    late = [output for output in outputs if output.error is not None]
    assert late and {(type(o.error), o.finish_reason) for o in late} == {(RequestTimeoutError, "timeout")}
    for i, output in enumerate(outputs):
        assert output.tokens == expected([i, i], 200)[: len(output.tokens)]


def test_who_is_told_may_be_gone(cluster: Cluster) -> None:
    def gone(handle: Any) -> None:
        raise RuntimeError("Event loop is closed")

    [handle] = cluster.submit_all([[1, 2]], max_new_tokens=20, on_news=gone)
    assert handle.result(20).tokens == expected([1, 2], 20)
    assert cluster.live == [0, 1]


def test_asyncio(cluster: Cluster) -> None:
    async def run() -> None:
        both = await asyncio.gather(
            cluster.agenerate([[1, 2]], max_new_tokens=6), cluster.agenerate([[3, 4]], max_new_tokens=6)
        )
        assert [o[0].tokens for o in both] == [expected([1, 2], 6), expected([3, 4], 6)]
        tokens: list[int] = []
        async for update in cluster.astream([5, 6], max_new_tokens=12):
            tokens += update.tokens
        assert tokens == expected([5, 6], 12)
        task = asyncio.create_task(cluster.agenerate([[7, 8]] * 3, max_new_tokens=180))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await cluster.agenerate([[1, 2]], max_new_tokens=6))[0].tokens == expected([1, 2], 6)

    asyncio.run(run())


def test_many_threads(cluster: Cluster) -> None:
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask(i: int) -> None:
        results.put((i, cluster.generate([[i, j] for j in range(5)], max_new_tokens=6)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for _ in threads:
        i, outputs = results.get(timeout=1)
        assert [o.tokens for o in outputs] == [expected([i, j], 6) for j in range(5)]


# -- replicas that die ---------------------------------------------------------------------------------


class Dying(InlineReplicas):
    """Real engines whose reports of replica `doomed` end after so many tokens."""

    doomed: dict[int, int]

    def reports(self, replica: int) -> Iterator[Report]:
        left = self.doomed.get(replica)
        for report in super().reports(replica):
            count = len(report.tokens) // 4
            if left is not None:
                left -= count
                if left < 0:
                    raise RuntimeError("its process ended")
            yield report


def dying(monkeypatch: pytest.MonkeyPatch, doomed: dict[int, int], **settings: Any) -> Cluster:
    monkeypatch.setattr(Dying, "doomed", doomed, raising=False)
    monkeypatch.setattr("rayk.dispatch.startup.InlineReplicas", Dying)
    settings = {"replicas": len(doomed) + 1, "replace": False} | settings
    return Cluster(model, page_size=4, pages=64, max_batch_size=4, **settings)


@pytest.mark.parametrize("tokens", [0, 7, 25])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_lost_replicas_requests_go_on_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tokens: int, temperature: float
) -> None:
    asked = prompts(12, 20)
    settings = [SamplingParams(max_new_tokens=14, temperature=temperature, seed=i, stop=("never",)) for i in range(12)]
    with Cluster(model, page_size=4, pages=64) as whole:
        wanted = [output.tokens for output in whole.generate(asked, settings)]
    with dying(monkeypatch, {0: tokens}) as cluster:
        streamed: dict[int, list[int]] = {i: [] for i in range(12)}
        text = dict.fromkeys(range(12), "")
        outputs = {}
        for update in cluster.stream(asked, settings):
            streamed[update.index] += update.tokens
            text[update.index] += update.text
            if update.output is not None:
                outputs[update.index] = update.output
        assert cluster.live == [1]
        assert [streamed[i] for i in range(12)] == [outputs[i].tokens for i in range(12)] == wanted
        assert [text[i] for i in range(12)] == [outputs[i].text for i in range(12)]
        assert any(o.retries == 1 and o.replica == 1 for o in outputs.values())


def test_a_request_is_not_sent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with dying(monkeypatch, {0: 0, 1: 0, 2: 0}, max_retries=1) as cluster:
        outputs = cluster.generate([[i] for i in range(8)], max_new_tokens=4)
        lost = [o for o in outputs if o.error is not None]
        assert lost and all(isinstance(o.error, ReplicaLostError) and o.retries == 1 for o in lost)
        assert "its process ended" in str(lost[0].error)
        for i, output in enumerate(outputs):
            assert output.error is not None or output.tokens == expected([i], 4)


def test_no_replica_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with dying(monkeypatch, {0: 0, 1: 0}, replicas=2) as cluster:
        outputs = cluster.generate([[i] for i in range(8)], max_new_tokens=4)
        outputs += cluster.generate([[1]])
        assert {type(o.error) for o in outputs} <= {ReplicaLostError, type(None)}
        assert isinstance(outputs[-1].error, ReplicaLostError)


def test_a_bug_in_the_engine_is_a_lost_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Engine) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Engine, "step", broken)
    with Cluster(model, page_size=4, pages=64, replace=False) as cluster:
        [output] = cluster.generate([[1, 2]])
        assert isinstance(output.error, ReplicaLostError) and "ZeroDivisionError: a bug" in str(output.error)


def test_a_model_that_fails_on_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(device: str) -> PageModel:
        made = PageModel()
        made.broken = POISON
        return made

    with Cluster(poisoned, page_size=4, pages=64) as cluster:
        good, bad = cluster.generate([[1, 2], [POISON]], max_new_tokens=4)
        assert good.tokens == expected([1, 2], 4) and f"token {POISON}" in str(bad.error)


def test_large_batches_are_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    post = InlineReplicas.post

    def watch(self: Any, replica: int, command: Any) -> None:
        if isinstance(command, Submit):
            sizes.append(sum(len(ask.tokens) for ask in command.asks))
        post(self, replica, command)

    monkeypatch.setattr(InlineReplicas, "post", watch)
    with Cluster(model, page_size=16, pages=200, max_batch_size=60, chunk_size=4000) as cluster:
        outputs = cluster.generate([[i % 90] * 1200 for i in range(60)], max_new_tokens=1)
    assert all(o.error is None for o in outputs)
    assert sum(sizes) == 60 * 4800 and max(sizes) < 100_000 and len(sizes) >= 3


# -- cache events ------------------------------------------------------------------------------------------


def test_readers_of_its_events_foresee_what_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zmq = pytest.importorskip("zmq", reason="pyzmq is not installed (extra `events`)")
    monkeypatch.setattr(kv_event_publisher, "HEARTBEAT_MS", 20)
    events = KVEventsConfig(*(f"ipc://{tmp_path}/{name}" for name in ("live", "replay", "all")))
    settings = {"replicas": 2, "page_size": 4, "pages": 30, "max_batch_size": 4, "peer_copies": False}
    readers = [Reader(zmq, f"ipc://{tmp_path}/live{r}", f"ipc://{tmp_path}/replay{r}") for r in ("", "_dp1")]
    with Cluster(model, kv_events=events, replace=False, **settings) as cluster:
        asked, hits = prompts(12, 40, shared=9), set()
        for prompt in [*asked, *asked]:
            for r, reader in enumerate(readers):
                reader.snapshot(f"ipc://{tmp_path}/all{'_dp1' if r else ''}")
            foreseen = [4 * reader.hits(prompt, 4) for reader in readers]
            [output] = cluster.generate([prompt], max_new_tokens=3)
            assert output.replica is not None and output.cached_tokens == foreseen[output.replica]
            hits.add(output.cached_tokens)
        assert len(hits) > 2 and {len(reader.pages) <= 30 for reader in readers} == {True}
        cluster._replicas.drop(0)
        while cluster.replica_states() != ["lost", "ready"]:
            threading.Event().wait(0.005)
        cleared = readers[0].clears
        assert cluster.add_replicas() == [0]
        readers[0].until(lambda: readers[0].clears > cleared and not readers[0].pages)  # it began anew, with nothing
        cleared = readers[1].clears
        cluster.reset_prefix_cache()
        readers[1].until(lambda: readers[1].clears > cleared and not readers[1].pages)
    for reader in readers:
        reader.close()
    with pytest.raises(ConfigError, match="without prefix caching"):
        Cluster(model, page_size=4, prefix_caching=False, kv_events="tcp://127.0.0.1:5557")


def test_several_answers_share_the_pages_of_their_prompt(cluster: Cluster) -> None:
    prompt = list(range(33))
    outputs = cluster.generate([prompt, [4, 5]], max_tokens=6, temperature=0.9, seed=3, n=3)
    assert [output.id.rpartition("/")[2] for output in outputs[1:3]] == ["1", "2"] and len(outputs) == 6
    assert len({output.replica for output in outputs[:3]}) == 1
    assert [output.cached_tokens for output in outputs[:3]] == [0, 32, 32]
    for choice in range(3):
        [alone] = cluster.generate(prompt, max_tokens=6, temperature=0.9, seed=3 + choice)
        assert outputs[choice].tokens == alone.tokens
    assert len({tuple(output.tokens) for output in outputs[:3]}) == 3
    updates = list(cluster.stream(prompt, max_tokens=6, n=2, logprobs=1))
    assert {update.index for update in updates} == {0, 1}
    for index in (0, 1):
        own = [update for update in updates if update.index == index]
        assert sum(len(update.logprobs) for update in own) == 6
        assert [each for update in own for each in update.logprobs] == own[-1].output.logprobs
    bad = cluster.generate([[VOCAB]], n=2) + cluster.generate({"txt": "a"}, n=2)
    assert all(isinstance(output.error, RequestError) for output in bad) and len(bad) == 4


def test_log_probabilities_of_prompts(cluster: Cluster) -> None:
    prompt = list(range(40))
    cluster.generate(prompt, max_tokens=1)
    outputs = cluster.generate(prompt, max_tokens=1, prompt_logprobs=1, n=2)
    for output in outputs:
        assert output.cached_tokens == 0, "all of it is computed"
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 40
        assert output.prompt_logprobs[0] is None and output.prompt_logprobs[1:] == outputs[0].prompt_logprobs[1:]
    assert cluster.generate(prompt, max_tokens=1)[0].prompt_logprobs is None
