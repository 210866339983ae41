"""The loop against a model that reads its pages: whatever happens, every request gets its own tokens."""

from __future__ import annotations

import numpy as np
import pytest

from rayk.context import TextContext
from rayk.engine.settings import EngineSettings
from rayk.errors import ConfigError
from rayk.request_errors import (
    ForwardError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
)

from .fake import EOS, POISON, VOCAB, Bench, PageModel, Tokenizer, digest, expected, scores


def prompts(count: int, longest: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    head = rng.integers(0, POISON, shared).tolist()
    return [
        [*(head if i % 2 else []), *rng.integers(0, POISON, rng.integers(1, longest)).tolist()] for i in range(count)
    ]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_every_request_gets_the_tokens_of_the_model(page_size: int, chunk_size: int) -> None:
    bench = Bench(4000 // page_size, page_size, chunk_size=chunk_size)
    asked = {bench.submit(p, 5): p for p in prompts(20, 40, shared=20)}
    bench.run()
    assert all(bench.tokens[n] == expected(p, 5) for n, p in asked.items())
    assert {each.reason for each in bench.ended.values()} == {"length"}


@pytest.mark.parametrize("caching", [True, False])
def test_pages_run_out_and_nobody_notices(caching: bool) -> None:
    bench = Bench(24, 4, chunk_size=16, caching=caching)
    asked = {bench.submit(p, 20): p for p in prompts(24, 30, shared=9)}
    bench.run()
    assert all(bench.tokens[n] == expected(p, 20) for n, p in asked.items())
    stats = bench.engine.stats()
    assert stats.preemptions >= 5, "this test is about preemption"
    assert 20 <= stats.peak_used_pages <= 24 == stats.free_pages
    assert sum(each.preemptions for each in bench.ended.values()) == stats.preemptions


def test_the_oldest_is_never_preempted() -> None:
    bench = Bench(12, 4, chunk_size=64, watermark=0.0)
    first = bench.submit(range(8), 30)
    others = [bench.submit([40 + i, *range(8)], 30) for i in range(4)]
    bench.run()
    assert bench.ended[first].preemptions == 0
    assert sum(bench.ended[n].preemptions for n in others) > 0
    order = list(bench.ended)
    assert order[0] == first and order == sorted(order)


def test_chunks_share_the_budget_with_decoding_rows() -> None:
    bench = Bench(chunk_size=6)
    bench.submit(range(4), 10)
    bench.step()
    bench.submit(range(50, 70), 4)
    bench.step()
    bench.step()
    assert bench.model.forwards == [[4], [1, 5], [1, 5]]
    bench.run()


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("caching", [True, False])
def test_whatever_fits_alone_comes_to_its_end(page_size: int, chunk_size: int, caching: bool) -> None:
    """All slots of all pages: the last token of an answer needs none."""
    slots = 48 // page_size * page_size
    for watermark in (0.0, 0.5):
        bench = Bench(slots // page_size, page_size, chunk_size=chunk_size, watermark=watermark, caching=caching)
        asked = [(slots, 1), (slots - 1, 2), (slots // 2, slots - slots // 2 + 1), (1, slots), (slots, 1)]
        numbers = [bench.submit([i] * prompt, count) for i, (prompt, count) in enumerate(asked)]
        with pytest.raises(RequestError, match="can never fit"):
            bench.submit([1] * slots, 2)
        bench.run(20_000)
        for i, (number, (prompt, count)) in enumerate(zip(numbers, asked, strict=True)):
            assert bench.tokens[number] == expected([i] * prompt, count) and bench.ended[number].reason == "length"


def test_pages_that_are_pinned_for_a_peer_fail_nobody() -> None:
    """Neither a request that comes, nor one that grows into them."""
    bench = Bench(12, 4, chunk_size=64)
    for prompt, count in (([7] * 40, 4), ([8] * 4, 44)):
        bench.submit(range(30), 2)
        bench.run()
        ctx = TextContext("peer", range(30), 99)
        assert len(bench.core.exports.export(ctx, 0, 7).pages) == 7
        number = bench.submit(prompt, count)
        bench.run()
        assert bench.tokens[number] == expected(prompt, count) and not bench.core.exports.tips


def test_rows_are_bounded() -> None:
    bench = Bench(rows=3)
    for i in range(7):
        bench.submit([i, 1, 2], 4)
    bench.run()
    assert max(len(counts) for counts in bench.model.forwards) == 3


def test_a_second_request_reuses_the_first_ones_pages() -> None:
    bench = Bench()
    prompt = list(range(18))
    first = bench.submit(prompt, 8)
    bench.run()
    second = bench.submit(prompt, 8)
    bench.run()
    assert bench.tokens[first] == bench.tokens[second] == expected(prompt, 8)
    assert [bench.ended[n].cached.total for n in (first, second)] == [0, 16]
    third = bench.submit([*prompt, *bench.tokens[first], 5], 8)  # the next turn reuses the answer too
    bench.run()
    assert bench.ended[third].cached.total == 24


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    bench = Bench(chunk_size=8)
    prompt = list(range(21))
    numbers = [bench.submit(prompt, 4) for _ in range(3)]
    bench.run()
    assert [bench.ended[n].cached.total for n in numbers] == [0, 20, 20]
    assert all(bench.tokens[n] == expected(prompt, 4) for n in numbers)


def test_salts_do_not_share() -> None:
    bench = Bench()
    for salt in ("a", "b", None):
        bench.submit(range(18), 2, cache_salt=salt)
        bench.run()
    assert [each.cached.total for each in bench.ended.values()] == [0, 0, 0]


def test_an_answer_is_continued() -> None:
    prompt = list(range(10))
    answer = expected(prompt, 12)
    bench = Bench()
    number = bench.submit([*prompt, *answer[:5]], 12, generated=5)
    bench.run()
    assert bench.tokens[number] == answer[5:]
    sampled = Bench()
    whole = sampled.submit(prompt, 12, temperature=1.0, seed=4)
    sampled.run()
    half = sampled.submit([*prompt, *sampled.tokens[whole][:7]], 12, temperature=1.0, seed=4, generated=7)
    sampled.run()
    assert sampled.tokens[half] == sampled.tokens[whole][7:], "and draws as it would have drawn"


# -- the end of a request ---------------------------------------------------------------------------


def test_stop_tokens_end_an_answer_and_stay_in_it() -> None:
    prompt = list(range(10))
    answer = expected(prompt, 20)
    at = next(i for i in range(5, 20) if answer[i] not in answer[:i])
    bench = Bench()
    number = bench.submit(prompt, 20, stop_token_ids=(answer[at],))
    bench.run()
    assert bench.tokens[number] == answer[: at + 1]
    assert bench.ended[number].reason == "stop"


def test_the_models_end_of_sequence() -> None:
    prompt = list(range(10))
    answer = expected(prompt, 20)
    model = PageModel()
    model.eos_token_ids = (EOS, answer[3])
    end = answer.index(answer[3]) + 1
    bench = Bench(model=model)
    stops, goes_on = bench.submit(prompt, 20), bench.submit(prompt, 20, ignore_eos=True)
    bench.run()
    assert bench.tokens[stops] == answer[:end] and bench.tokens[goes_on] == answer


def test_the_models_length_limits_an_answer() -> None:
    bench = Bench(model=PageModel(max_length=16))
    number = bench.submit(range(10), 50)
    bench.run()
    assert bench.tokens[number] == expected(range(10), 6) and bench.ended[number].reason == "length"


def test_stop_strings_and_text() -> None:
    prompt = list(range(10))
    answer = expected(prompt, 30)
    text = Tokenizer().decode(answer)
    stop = text[9:12]
    end = text.index(stop)
    bench = Bench(model=PageModel(tokenizer=Tokenizer()))
    whole = bench.submit(prompt, 30)
    stopped = bench.submit(prompt, 30, stop=("zzz9", stop), stream_text=True)
    streamed = bench.submit(prompt, 30, stream_text=True)
    bench.run()
    assert bench.ended[whole].text == bench.ended[streamed].text == bench.text[streamed] == text
    assert bench.ended[stopped].text == bench.text[stopped] == text[:end]
    assert bench.ended[stopped].reason == "stop"
    assert bench.tokens[stopped] == answer[: end + 3]


def test_a_stop_token_is_not_in_the_text() -> None:
    prompt = list(range(10))
    answer = expected(prompt, 8)
    end = answer.index(answer[5]) + 1
    bench = Bench(model=PageModel(tokenizer=Tokenizer()))
    for stream in (False, True):
        number = bench.submit(prompt, 8, stop_token_ids=(answer[5],), stream_text=stream)
        bench.run()
        assert bench.ended[number].text == Tokenizer().decode(answer[: end - 1])


# -- one request's trouble is not another's ------------------------------------------------------------


def mixed(bench: Bench) -> dict[int, list[int]]:
    return {bench.submit(p, 12): p for p in prompts(6, 20, seed=3)}


def test_cancelling_changes_no_others_tokens() -> None:
    bench = Bench(chunk_size=8)
    asked = mixed(bench)
    decoding, waiting = next(iter(asked)), list(asked)[-1]
    for _ in range(4):
        bench.step()
    bench.engine.cancel(decoding)
    bench.engine.cancel(waiting)
    bench.engine.cancel(999)
    bench.run()
    bench.engine.cancel(decoding)
    for number, prompt in asked.items():
        if number in (decoding, waiting):
            assert bench.ended[number].reason == "cancelled"
            assert isinstance(bench.ended[number].error, RequestCancelledError)
            assert bench.tokens[number] == expected(prompt, 12)[: len(bench.tokens[number])]
        else:
            assert bench.tokens[number] == expected(prompt, 12)
    assert not bench.tokens[waiting] and 0 < len(bench.tokens[decoding]) < 12


def test_a_deadline_changes_no_others_tokens() -> None:
    bench = Bench(chunk_size=8)
    late = bench.submit(range(30, 50), 40, timeout=5.0)
    asked = mixed(bench)
    for _ in range(5):
        bench.step()
        bench.clock.now += 1.1
    bench.run()
    error = bench.ended[late].error
    assert bench.ended[late].reason == "timeout" and isinstance(error, RequestTimeoutError)
    assert 0 < len(bench.tokens[late]) < 40 and "within 5 s" in str(error)
    assert all(bench.tokens[n] == expected(p, 12) for n, p in asked.items())


def test_a_forward_that_raises_fails_the_request_at_fault() -> None:
    bench = Bench(chunk_size=64)
    bench.model.broken = POISON
    good = {bench.submit(p, 3): p for p in prompts(5, 20, seed=3)}
    bad = bench.submit([1, 2, POISON, 3], 3)
    good |= {bench.submit(p, 3): p for p in prompts(2, 20, seed=4)}
    bench.run()
    error = bench.ended[bad].error
    assert isinstance(error, ForwardError) and error.kind == "RuntimeError" and f"token {POISON}" in str(error)
    assert not bench.tokens[bad]
    assert all(bench.tokens[n] == expected(p, 3) for n, p in good.items())


def test_a_forward_that_raises_for_a_decoding_row() -> None:
    bench = Bench(chunk_size=64)
    one, two = [1, 2, 3], [4, 5, 6, 7]
    poison = next(t for t in expected(one, 9)[3:] if t not in [*expected(one, 3), *expected(two, 9), *one, *two])
    bench.model.broken = poison
    bad, good = bench.submit(one, 9), bench.submit(two, 9)
    bench.run()
    assert bench.ended[bad].reason == "error" and bench.tokens[bad][-1] == poison
    assert bench.tokens[bad] == expected(one, len(bench.tokens[bad]))
    assert bench.tokens[good] == expected(two, 9)


def test_logits_that_are_no_numbers() -> None:
    bench = Bench(chunk_size=64)
    bench.model.not_a_number = POISON
    good, bad = bench.submit([1, 2], 6), bench.submit([POISON, 2], 6)
    sampled = bench.submit([POISON, 3], 6, temperature=1.0)
    bench.run()
    assert bench.tokens[good] == expected([1, 2], 6)
    for number in (bad, sampled):
        assert isinstance(bench.ended[number].error, ForwardError) and "not finite" in str(bench.ended[number].error)


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ([], {}, "empty"),
        ([1, VOCAB], {}, "position 1 is outside the vocabulary of 97"),
        ([-1], {}, "outside the vocabulary"),
        ([2**40], {}, "out of int32"),
        ([1.5], {}, "flat sequence of ints"),
        ([[1], [2]], {}, "flat sequence of ints"),
        (range(90), {}, "no room for an answer within the model's 60"),
        (range(30), {"count": 20}, "need 13 pages of 4 tokens, the replica has 12: it can never fit"),
        ([1], {"temperature": float("nan")}, "temperature is nan, it must be a finite number"),
        ([1], {"temperature": float("inf")}, "temperature"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": "hot"}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.5}, "top_p"),
        ([1], {"top_p": float("nan")}, "top_p"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"top_k": 1.5}, "top_k"),
        ([1], {"min_p": 2.0}, "min_p"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"repetition_penalty": float("inf")}, "repetition_penalty"),
        ([1], {"seed": -1}, "seed"),
        ([1], {"count": 0}, "max_new_tokens is 0"),
        ([1], {"count": True}, "max_new_tokens is True"),
        ([1], {"logprobs": 1000}, "logprobs"),
        ([1], {"stop": ("",)}, "stop"),
        ([1], {"stop": "abc"}, "stop is 'abc'"),
        ([1], {"stop": ("a",)}, "need a tokenizer"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop token 97 is outside"),
        ([1], {"timeout": 0.0}, "timeout"),
        ([1], {"timeout": float("nan")}, "timeout"),
    ],
)
def test_bad_input_is_refused_and_the_others_go_on(prompt, more, message: str) -> None:
    bench = Bench(12, model=PageModel(max_length=60))
    good = bench.submit([1, 2, 3], 6)
    with pytest.raises(RequestError, match=message) as caught:
        bench.submit(prompt, **{"count": 4, "request_id": "bad"} | more)
    assert caught.value.request_id == "bad" and isinstance(caught.value, ValueError)
    bench.run()
    assert bench.tokens[good] == expected([1, 2, 3], 6) and list(bench.ended) == [good]


def test_an_id_in_use_is_refused() -> None:
    bench = Bench()
    bench.submit([1, 2], 4, request_id="x")
    with pytest.raises(RequestError, match="in use"):
        bench.submit([1, 2], 4, request_id="x")
    bench.run()
    bench.submit([1, 2], 4, request_id="x")
    bench.run()


def test_a_full_queue() -> None:
    bench = Bench(max_queue=2)
    bench.submit([1], 2), bench.submit([2], 2)
    with pytest.raises(QueueFullError, match="2 requests"):
        bench.submit([3], 2)
    bench.run()
    bench.submit([3], 2)
    bench.run()


@pytest.mark.parametrize("settings", [{"chunk_size": 0}, {"max_queue": 0}, {"watermark": 1.0}, {"watermark": -0.1}])
def test_settings_are_checked(settings) -> None:
    with pytest.raises(ConfigError):
        EngineSettings(**settings)


# -- pauses ------------------------------------------------------------------------------------------------


def test_a_paused_request_waits_and_goes_on() -> None:
    bench = Bench(chunk_size=8)
    asked = mixed(bench)
    first, last = next(iter(asked)), list(asked)[-1]
    for _ in range(3):
        bench.step()
    bench.engine.pause(first), bench.engine.pause(last)
    had = len(bench.tokens[first])
    for _ in range(60):
        bench.step()
    assert not bench.engine.busy
    assert len(bench.tokens[first]) == had and first not in bench.ended and last not in bench.ended
    assert len(bench.ended) == len(asked) - 2
    bench.engine.resume(first), bench.engine.resume(last)
    bench.run()
    assert all(bench.tokens[n] == expected(p, 12) for n, p in asked.items())


def test_a_paused_request_makes_way_and_is_cancelled() -> None:
    bench = Bench(12, 4, chunk_size=64, watermark=0.0)
    old = bench.submit(range(8), 36)
    new = bench.submit(range(20, 36), 20)
    bench.step(), bench.step()
    bench.engine.pause(new)
    for _ in range(60):
        bench.step()
    assert old in bench.ended and new not in bench.ended
    bench.engine.cancel(new)
    bench.run()
    assert bench.ended[new].preemptions == 1 and bench.tokens[old] == expected(range(8), 36)


# -- sampling ------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_tokens_in_any_company() -> None:
    prompt = list(range(12))
    alone = Bench()
    number = alone.submit(prompt, 16, temperature=0.9, seed=11)
    alone.run()
    crowd = Bench(24, 4, chunk_size=16)
    for p in prompts(8, 20, seed=5):
        crowd.submit(p, 16, temperature=0.7, top_k=20, seed=1)
    same = crowd.submit(prompt, 16, temperature=0.9, seed=11)
    other = crowd.submit(prompt, 16, temperature=0.9, seed=12)
    unseeded = [crowd.submit(prompt, 16, temperature=0.9) for _ in range(2)]
    crowd.run()
    assert crowd.engine.stats().preemptions > 0
    assert crowd.tokens[same] == alone.tokens[number] != crowd.tokens[other]
    assert crowd.tokens[unseeded[0]] != crowd.tokens[unseeded[1]]


def test_log_probabilities() -> None:
    prompt = [5, 6, 7]
    bench = Bench()
    number = bench.submit(prompt, 4, logprobs=3)
    bench.run()
    tokens = list(prompt)
    assert len(bench.logprobs[number]) == 4
    for token, found in zip(bench.tokens[number], bench.logprobs[number], strict=True):
        raw = scores(digest(tokens)).astype(np.float64)
        want = raw - np.log(np.exp(raw).sum())
        assert found.chosen == pytest.approx(want[token], abs=1e-5)
        assert found.top_ids == tuple(np.argsort(-raw)[:3]) and found.top[0] == found.chosen
        tokens.append(token)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_log_probabilities_of_a_prompt(chunk_size: int) -> None:
    """In chunks, beside others, and where it has to start over: each position once, all of them."""
    bench = Bench(20, 4, chunk_size=chunk_size)
    asked = [[*p, 3] for p in prompts(6, 24, seed=2)]
    numbers = [bench.submit(p, 16, prompt_logprobs=2, cache_salt=str(i)) for i, p in enumerate(asked)]
    plain = bench.submit(range(9), 16)
    bench.run()
    assert bench.tokens[plain] == expected(range(9), 16)
    for number, prompt in zip(numbers, asked, strict=True):
        assert bench.tokens[number] == expected(prompt, 16)
        found = bench.prompt_logprobs.get(number, [])
        assert len(found) == len(prompt) - 1
        for at, each in enumerate(found, 1):
            raw = scores(digest(prompt[:at])).astype(np.float64)
            want = raw - np.log(np.exp(raw).sum())
            assert each.chosen == pytest.approx(want[prompt[at]], abs=1e-5)
            assert each.top_ids == tuple(np.argsort(-raw)[:2])


def test_log_probabilities_of_a_prompt_beside_one_that_fails() -> None:
    bench = Bench(chunk_size=64)
    bench.model.broken = POISON
    bad = bench.submit([1, POISON, 2], 4, prompt_logprobs=0, cache_salt="bad")
    good = [bench.submit([i, 8, 9, 10], 4, prompt_logprobs=0, cache_salt=str(i)) for i in range(3)]
    bench.run()
    assert isinstance(bench.ended[bad].error, ForwardError)
    assert all(len(bench.prompt_logprobs[n]) == 3 and bench.ended[n].error is None for n in good)


def test_stop_strings_count_from_min_tokens_on() -> None:
    prompt = [5, 6, 7]
    letters = Tokenizer().decode(expected(prompt, 12))
    first = letters[1:3]
    bench = Bench(model=PageModel(tokenizer=Tokenizer()))
    early = bench.submit(prompt, 12, stop=(first,))
    late = bench.submit(prompt, 12, stop=(first,), min_tokens=12)
    bench.run()
    assert bench.ended[early].reason == "stop" and bench.ended[early].text == letters[:1]
    assert bench.ended[late].text == letters and len(bench.tokens[late]) == 12
