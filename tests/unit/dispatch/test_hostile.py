"""Whatever one request brings, its own end is all that comes of it: others get their tokens, no replica is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rayk.cluster import Cluster
from rayk.engine.engine import Engine
from rayk.errors import ConfigError
from rayk.kvcache.page_hash import PageKeys
from rayk.protocol.engine import Command, Submit
from rayk.request_errors import ForwardError, RequestError
from rayk.sampling import SamplingParams
from rayk.scheduler.router.router import Router
from rayk.scheduler.transfers.indexed_copies import CopyPlanner

from ..engine.fake import PageModel, Tokenizer, expected  # noqa: TID252  # tests/ is no package
from .conftest import Gated

LONE, HUGE = "\ud800", 10**5000


class Raises:
    """An object that raises at whatever is done to it."""

    def __iter__(self) -> Iterator[int]:
        raise KeyError("no")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise KeyError("no")

    def __repr__(self) -> str:
        raise KeyError("no")


PROMPTS: list[tuple[Any, str]] = [
    ({"tokens": [5], "id": LONE}, "a request id cannot be sent as UTF-8"),
    ({"tokens": [5], "id": "a" + LONE + "b"}, "a request id cannot be sent as UTF-8"),
    ({"tokens": [5], "cache_salt": "\udfff"}, "cache_salt cannot be sent as UTF-8"),
    ({"tokens": [5], "session": LONE}, "session cannot be sent as UTF-8"),
    ({"text": "ab" + LONE}, "text cannot be sent as UTF-8"),
    ({"tokens": [5], "id": HUGE}, "a request id must be an integer of"),
    ({"tokens": [5], "id": 2**64}, "a request id must be an integer of"),
    ({"tokens": [5], "id": True}, "a request id must be an integer"),
    ({"tokens": [5], "id": ["a"]}, "a request id must be a str"),
    ({"tokens": [5], "id": b"a"}, "a request id must be a str"),
    ({"tokens": [5], "cache_salt": 5}, "cache_salt must be a str"),
    ({"tokens": [5], "session": HUGE}, "session must be a str"),
    ({"tokens": [2**70]}, "flat sequence of ints"),
    ({"tokens": [HUGE, 1]}, "flat sequence of ints"),
    ({"tokens": [-(2**63)]}, "out of int32"),
    ({"tokens": b"abc"}, "flat sequence of ints"),
    ({"tokens": None}, "flat sequence of ints"),
    ({"tokens": {"a": 1}}, "flat sequence of ints"),
    ({"tokens": [[5], [6, 7]]}, "flat sequence of ints"),
    ({"tokens": np.array([1.0, 2.0])}, "float64"),
    ({"tokens": np.array([True, False])}, "bool"),
    ({"tokens": np.array([5], object)}, "object"),
    ({"tokens": torch.tensor([1.5])}, "float32"),
    ({"tokens": Raises()}, "it cannot be read: KeyError"),
    ({"tokens": [5], "max_tokens": 3}, "did you mean 'max_new_tokens'"),
    ({"tokens": [5], "temprature": 3}, "did you mean 'temperature'"),
    ({"tokens": [5], "temperature": 3}, "a sampling setting"),
    ({"tokens": [5], 7: 3}, "no field 7"),
    ({"tokens": [5], "token": 1, LONE: 2}, "no field 'token' (did you mean 'tokens'?), '\\ud800'"),
    (b"abc", "flat sequence of ints"),
    (None, "flat sequence of ints"),
    (1.5, "flat sequence of ints"),
    ([], "empty"),
    (np.empty(0), "empty"),
    ({}, "either text or tokens"),
]


def test_hostile_prompts_among_good_ones(cluster: Cluster) -> None:
    asked = [each for i, (prompt, _) in enumerate(PROMPTS) for each in ([i, 8], prompt)]
    outputs = cluster.generate(asked, max_new_tokens=6)
    for i, (_, message) in enumerate(PROMPTS):
        good, bad = outputs[2 * i : 2 * i + 2]
        assert good.tokens == expected([i, 8], 6)
        assert isinstance(bad.error, RequestError) and message in str(bad.error) and bad.finish_reason == "error"
        str(bad.error).encode(), repr(bad)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 2**63}, "max_new_tokens"),
    ({"max_new_tokens": HUGE}, "max_new_tokens is one of"),
    ({"max_new_tokens": -HUGE}, "max_new_tokens is one of"),
    ({"max_new_tokens": None}, "max_new_tokens is None"),
    ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0"),
    ({"top_k": 2**70}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop_token_ids": (2**70,)}, "stop_token_ids"),
    ({"stop_token_ids": (2**31,)}, "stop_token_ids"),
    ({"stop_token_ids": (HUGE,)}, "stop_token_ids is <tuple>"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"logprobs": 2**80}, "logprobs"),
    ({"temperature": HUGE}, "temperature is one of"),
    ({"temperature": Fraction(HUGE)}, "temperature"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": [1]}, "temperature"),
    ({"temperature": 1j}, "temperature"),
    ({"top_p": HUGE}, "top_p"),
    ({"min_p": -HUGE}, "min_p"),
    ({"repetition_penalty": HUGE}, "repetition_penalty"),
    ({"repetition_penalty": Raises()}, "repetition_penalty is <Raises>"),
    ({"stop": (LONE,)}, "stop"),
    ({"stop": ("x" * 2000,)}, "stop"),
    ({"stop": (b"x",)}, "stop"),
    ({"stop": 5}, "stop"),
    ({"ignore_eos": "false"}, "ignore_eos is 'false'"),
    ({"ignore_eos": np.array([1, 2])}, "ignore_eos"),
]


def test_hostile_settings_among_good_ones(cluster: Cluster) -> None:
    good = SamplingParams(max_new_tokens=6)
    settings = [each for setting, _ in SETTINGS for each in (good, SamplingParams(**setting))]
    outputs = cluster.generate([[i, 8] for i in range(len(settings))], settings)
    for i, (_, message) in enumerate(SETTINGS):
        assert outputs[2 * i].tokens == expected([2 * i, 8], 6)
        error = outputs[2 * i + 1].error
        assert isinstance(error, RequestError) and message in str(error)


def test_hostile_timeouts(cluster: Cluster) -> None:
    timeout: Any
    for timeout in (HUGE, 0, -1, float("nan"), float("inf"), "soon", True, [1]):
        [bad] = cluster.generate([[5]], timeout=timeout)
        assert isinstance(bad.error, RequestError) and "timeout is" in str(bad.error)


def test_what_can_be_carried_is(cluster: Cluster) -> None:
    class Text(str):
        pass

    outputs = cluster.generate(
        [{"tokens": [5], "id": Text("ä"), "cache_salt": np.str_("ö"), "session": Text("ü")}, {"tokens": (5,), "id": 7}],
        max_new_tokens=np.int64(5),
        top_k=2**63 - 1,
        temperature=10**300,
        stop=(Text("never"),),
        seed=np.uint64(2**64 - 1),
        timeout=2**70,
    )
    assert [(output.error, len(output.tokens), output.id) for output in outputs] == [(None, 5, "ä"), (None, 5, "7")]
    [output] = cluster.generate([{"tokens": torch.tensor([5]), "id": None}], max_new_tokens=2**63 - 1)
    assert "it can never fit" in str(output.error)


def test_what_is_no_list_of_prompts(cluster: Cluster) -> None:
    prompts: Any
    for prompts in (None, 5, 1.5, b"abc", bytearray(b"abc"), memoryview(b"abc"), np.array(5), object(), len):
        with pytest.raises(ConfigError, match="prompts are"):
            cluster.generate(prompts)
    sampling: Any
    for sampling in (5, {"temperature": 1}, [None], ["hot"], "hot"):
        with pytest.raises(ConfigError, match="sampling"):
            cluster.generate([[1]], sampling)


def test_arrays_of_texts_are_several_prompts(cluster: Cluster) -> None:
    outputs = cluster.generate(np.array([[5, 6], [7, 8]]), max_new_tokens=3)
    assert [output.tokens for output in outputs] == [expected([5, 6], 3), expected([7, 8], 3)]
    outputs = cluster.generate(np.array(["ab", "c"]), max_new_tokens=3)
    assert len(outputs) == 2, "and these replicas cannot read text"


# -- when it goes wrong all the same: the one at fault ends -------------------------------------------------


def test_a_request_that_cannot_be_sent_ends_alone(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    placing = cluster._dispatcher
    post = placing._post

    def pickled(replica: int, command: Command) -> None:
        if isinstance(command, Submit) and any(ask.request_id == "bad" for ask in command.asks):
            raise OverflowError("does not fit")
        post(replica, command)

    monkeypatch.setattr(placing, "_post", pickled)
    good, bad, other = cluster.generate([[7, 8], {"tokens": [5], "id": "bad"}, [9]], max_new_tokens=4)
    assert good.tokens == expected([7, 8], 4) and other.tokens == expected([9], 4)
    assert isinstance(bad.error, RequestError) and "OverflowError: does not fit" in str(bad.error)


@pytest.mark.parametrize("where", [(PageKeys, "of"), (Router, "choose"), (CopyPlanner, "plan"), (Router, "place")])
def test_a_router_that_raises_ends_one_request(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, where: tuple[type, str]
) -> None:
    """While others report: it must not be their replica's end."""
    sound, raised = getattr(*where), []
    fatal = {"of": lambda tokens, root: len(tokens) == 20, "plan": lambda replica, keys: bool(keys)}
    is_bad = fatal.get(where[1], lambda request_id, *rest: request_id == bad.id)

    def broken(self: Any, *given: Any) -> Any:
        if is_bad(*given):
            raised.append(1)
            raise ZeroDivisionError("a bug")
        return sound(self, *given)

    Gated.watermarks.clear()
    running = cluster.submit_all([[i, i] for i in range(20)], max_new_tokens=9)  # they fill both replicas
    bad = cluster.submit([5, 5, 5, 5, 5])
    monkeypatch.setattr(*where, broken)
    after = cluster.submit([6, 6], max_new_tokens=9)
    Gated.watermarks.set()
    assert "ZeroDivisionError: a bug" in str(bad.result(20).error) and raised
    assert [handle.result(20).tokens for handle in running] == [expected([i, i], 9) for i in range(20)]
    assert after.result(20).tokens == expected([6, 6], 9)


def test_an_engine_that_cannot_take_a_request_ends_it(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    submit = Engine.submit

    def broken(self: Engine, request: Any) -> None:
        if request.request_id == "bad":
            raise ZeroDivisionError(f"a bug {LONE}")
        submit(self, request)

    monkeypatch.setattr(Engine, "submit", broken)
    good, bad = cluster.generate([[7, 8], {"tokens": [5], "id": "bad"}], max_new_tokens=4)
    assert good.tokens == expected([7, 8], 4)
    assert "ZeroDivisionError: a bug \\ud800" in str(bad.error)


def test_a_tokenizer_that_raises_ends_one_request(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    decode = Tokenizer.decode

    def broken(self: Tokenizer, ids: Any, skip_special_tokens: bool = True) -> str:
        if expected([5], 2)[1] in ids:
            raise ZeroDivisionError("no such letter")
        return LONE + decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", broken)
    for streamed in (False, True):
        stop = ("never",) if streamed else ()
        good, bad = cluster.generate([[7, 8], [5]], max_new_tokens=4, stop=stop)
        assert good.tokens == expected([7, 8], 4) and good.text is not None
        good.text.encode()
        assert isinstance(bad.error, ForwardError) and "no such letter" in str(bad.error)


def test_a_replica_that_raises_is_lost_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in one thread; what the lost one had goes on at the other."""
    step = Engine.step

    def broken(self: Engine) -> Any:
        if self.core.replica == 0 and self.busy:
            raise ZeroDivisionError("a bug")
        return step(self)

    monkeypatch.setattr(Engine, "step", broken)
    with Cluster(lambda device: PageModel(), replicas=2, page_size=4, pages=64, replace=False) as cluster:
        outputs = cluster.generate([[i, i] for i in range(8)], max_new_tokens=9)
        assert [output.tokens for output in outputs] == [expected([i, i], 9) for i in range(8)]
        assert cluster.replica_states() == ["lost", "ready"]
        monkeypatch.setattr(Engine, "step", step)
        assert cluster.add_replicas() == [0]
        outputs = cluster.generate([[i, i] for i in range(8)], max_new_tokens=9)
        assert {output.replica for output in outputs} == {0, 1} and not any(output.error for output in outputs)


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, GeneratorExit, asyncio.CancelledError, KeyboardInterrupt])
def test_a_callback_that_raises_ends_nothing(cluster: Cluster, raised: type[BaseException]) -> None:
    def gone(_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise raised("gone")

    [handle] = cluster.submit_all([[1, 2]], max_new_tokens=20, on_news=gone)
    handle.future.add_done_callback(gone)
    after = cluster.submit([3, 4], max_new_tokens=20)
    assert handle.result(20).tokens == expected([1, 2], 20)
    assert after.result(20).tokens == expected([3, 4], 20)


def test_an_error_that_cannot_be_read_still_ends_its_request(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    def broken(self: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rayk.protocol.engine.Ended.error", property(broken))
    assert "ZeroDivisionError" in str(cluster.submit([1, 2], max_new_tokens=3).result(20).error)
