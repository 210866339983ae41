"""The engine's thread: reports, bounds, and what crosses the wire."""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
import pytest

from rayk.engine.engine import Engine
from rayk.engine.engine_thread import AHEAD, EngineThread
from rayk.engine.measure import loop_cost
from rayk.errors import RemoteError
from rayk.kvcache.request import Reused
from rayk.protocol.engine import Ask, Cancel, Report, Submit, decode_command, decode_report, encode
from rayk.protocol.engine_reports import Finished, Text, TokenLogprobs, Tokens
from rayk.protocol.engine_request import Request
from rayk.protocol.serving import DRIVER_SHIFT
from rayk.request_errors import ForwardError, RequestCancelledError
from rayk.sampling import SamplingParams

from .fake import Bench, expected


def ask(number: int, count: int = 8, **more: Any) -> Ask:
    return Ask.of(Request(number, f"r{number}", [number, 1, 2], SamplingParams(max_new_tokens=count), **more))


def host(*benches: Bench, **settings: Any) -> EngineThread:
    return EngineThread([bench.engine for bench in benches], **settings).start()


def collect(reports, count: int) -> tuple[dict[int, list[int]], dict[int, str]]:
    tokens: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    for report in reports:
        report = decode_report(encode(report))
        for number, token in zip(*report.columns(), strict=True):
            tokens.setdefault(int(number), []).append(int(token))
        ended |= {end.number: end.reason for end in report.ended}
        if len(ended) == count:
            break
    return tokens, ended


def test_commands_and_reports_survive_the_wire() -> None:
    request = Request(
        3, "r", [1, 2], SamplingParams(temperature=0.5, seed=2**64 - 1, stop=("x",)), 1, 2.5, True, "salt", "lora"
    )
    command = decode_command(encode(Submit([Ask.of(request)])))
    assert isinstance(command, Submit)
    [back] = [each.request() for each in command.asks]
    assert back.tokens.tolist() == [1, 2]
    for name in ("number", "request_id", "sampling", "generated", "timeout", "stream_text", "cache_salt", "adapter"):
        assert getattr(back, name) == getattr(request, name)
    assert decode_command(encode(Cancel([1, 2]))) == Cancel([1, 2])

    found = TokenLogprobs(-0.5, (7, 8), (-0.5, -1.5))
    events = [
        Tokens(np.array([4, 5]), np.array([7, 8]), {4: found}),
        Text(5, "äöü"),
        Tokens(np.array([4]), np.array([9]), {4: found}),
        Finished(4, "stop", Reused(9, 1, 4, 2), "text", None, 2, 0.1, 0.2, 0.3),
        Finished(5, "error", error=ForwardError("r", 1, "ValueError", "bad")),
    ]
    report = decode_report(encode(Report.of(events, 12)))
    numbers, tokens = report.columns()
    assert numbers.tolist() == [4, 5, 4] and tokens.tolist() == [7, 8, 9] and report.steps == 12
    assert report.logprobs == {4: [found, found]} and report.texts == [(5, "äöü")]
    first, second = report.ended
    assert (first.cached, first.text, first.preemptions, first.error) == (Reused(9, 1, 4, 2), "text", 2, None)
    assert isinstance(second.error, ForwardError) and second.error.kind == "ValueError"
    empty = decode_report(encode(Report.of([], 12)))
    assert [len(column) for column in empty.columns()] == [0, 0] and not empty.ended


def test_several_engines_in_one_thread() -> None:
    one, two = Bench(), Bench()
    hosted = host(one, two)
    for engine in (0, 1):
        hosted.post(engine, Submit([ask(10 * engine + i) for i in range(3)]))
    for engine in (0, 1):
        tokens, ended = collect(hosted.reports(engine), 3)
        assert tokens == {10 * engine + i: expected([10 * engine + i, 1, 2], 8) for i in range(3)}
        assert set(ended.values()) == {"length"}
    hosted.stop()
    assert list(hosted.reports(0)) == []


def test_what_is_refused_is_reported() -> None:
    hosted = host(Bench())
    hosted.post(0, Submit([ask(1, count=0), ask(2), ask(2), ask(3, count=200)]))
    hosted.post(0, Cancel([3]))
    endings = []
    for report in hosted.reports(0):
        endings += report.ended
        if len(endings) == 4:
            break
    errors = {(end.number, type(end.error).__name__) for end in endings}
    assert {(1, "RequestError"), (2, "RequestError"), (2, "NoneType"), (3, "RequestCancelledError")} == errors
    assert any(isinstance(end.error, RequestCancelledError) for end in endings)
    hosted.stop()


def test_the_engine_rests_while_its_reader_is_behind() -> None:
    bench = Bench(pages=200)
    stepped = threading.Semaphore(0)
    step = bench.engine.step

    def watched() -> list[Any]:
        stepped.release()
        return step()

    bench.engine.step = watched  # type: ignore[method-assign]
    hosted = host(bench, backlog=10, heartbeat=0.02)
    hosted.post(0, Submit([ask(1, count=100)]))
    for _ in range(10):
        assert stepped.acquire(timeout=5)
    assert not stepped.acquire(timeout=0.1), "ten tokens wait to be read"
    assert hosted.stats(0).generated_tokens == 10, "and it answers"
    tokens, _ = collect(hosted.reports(0), 1)
    assert tokens == {1: expected([1, 1, 2], 100)}
    hosted.stop()
    assert hosted.stats(0).finished == 1


def test_deadlines_pass_while_it_rests() -> None:
    bench = Bench(pages=200)
    hosted = host(bench, backlog=1, heartbeat=0.01)
    hosted.post(0, Submit([ask(1, count=100, timeout=5.0)]))
    reports = hosted.reports(0)
    first = next(report for report in reports if report.tokens)
    bench.clock.now += 10
    assert len(first.tokens) == 4
    _, ended = collect(reports, 1)
    assert ended == {1: "timeout"}
    hosted.stop()


def test_an_idle_engine_reports_that_it_lives() -> None:
    hosted = host(Bench(), heartbeat=0.01)
    reports = hosted.reports(0)
    assert [next(reports).ended for _ in range(3)] == [[], [], []]
    hosted.stop()


def test_a_bug_ends_the_reports_with_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Engine) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Engine, "step", broken)
    hosted = host(Bench())
    hosted.post(0, Submit([ask(1)]))
    with pytest.raises(RemoteError, match="ZeroDivisionError: a bug") as caught:
        list(hosted.reports(0))
    assert "def broken" in caught.value.trace or "in broken" in caught.value.trace
    hosted.stop()


def test_a_loop_delivers_what_engines_do_and_threads_hear_of_the_end_alone() -> None:
    bench, got, ended, calls = Bench(pages=200), list[Report](), threading.Event(), list[Any]()

    def on_report(engine: int, report: Report) -> None:
        assert engine == 0
        got.append(report)
        if report.ended:
            ended.set()

    hosted = host(bench, heartbeat=0.01)
    hosted.deliver_in(lambda call: calls.append(call), on_report)
    reports = hosted.reports(0)
    hosted.post(0, Submit([ask(1, count=30), ask(2, count=5)]))
    while not ended.is_set() or sum(len(report.ended) for report in got) < 2:
        assert not next(reports).tokens, "the loop has them"
        while calls:
            calls.pop()()
    tokens, reasons = collect(got, 2)
    assert tokens == {1: expected([1, 1, 2], 30), 2: expected([2, 1, 2], 5)} and reasons == {1: "length", 2: "length"}

    def closed(call: Any) -> None:
        raise RuntimeError("Event loop is closed")

    hosted.deliver_in(closed, on_report)
    hosted.post(0, Submit([ask(3, count=9)]))
    assert collect(reports, 1)[0] == {3: expected([3, 1, 2], 9)}, "threads have them again"
    hosted.stop()


def test_engines_rest_while_the_event_loop_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop and they take turns at one interpreter: a loop that takes new requests would be kept from it."""
    monkeypatch.setattr("rayk.engine.engine_thread.GIVE_WAY", 60.0)
    bench, got, calls = Bench(pages=200), list[Report](), queue.SimpleQueue[Any]()
    hosted = host(bench)
    hosted.deliver_in(calls.put, lambda engine, report: got.append(report))
    hosted.post(0, Submit([ask(1, count=3 * AHEAD + 1)]))
    deliver = calls.get(timeout=10)
    while bench.engine.steps < AHEAD:
        pass
    answer = threading.Thread(target=hosted.stats, args=(0,))  # it is answered between two steps
    answer.start()
    answer.join(0.05)
    assert answer.is_alive() and bench.engine.steps == AHEAD
    deliver()
    answer.join(10)
    while not any(report.ended for report in got):
        calls.get(timeout=10)()
    assert collect(got, 1)[0] == {1: expected([1, 1, 2], 3 * AHEAD + 1)}
    assert max(len(report.columns()[0]) for report in got) == AHEAD
    hosted.stop()


def test_engines_go_on_without_an_event_loop_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayk.engine.engine_thread.GIVE_WAY", 0.001)
    bench = Bench(pages=200)
    hosted = host(bench)
    hosted.deliver_in(lambda call: None, lambda engine, report: None)
    hosted.post(0, Submit([ask(1, count=3 * AHEAD)]))
    while hosted.stats(0).finished == 0:
        pass
    hosted.stop()


def test_what_a_thread_has_taken_comes_before_what_the_loop_takes() -> None:
    """And what lies there when the loop comes is told to it, though nothing more happens."""
    bench, got = Bench(pages=200), list[Report]()
    hosted = host(bench, heartbeat=0.01)
    hosted.post(0, Submit([ask(1, count=12)]))
    taken, go_on = threading.Event(), threading.Event()

    def read() -> None:
        for report in hosted.reports(0):
            if report.tokens:
                taken.set()
                go_on.wait(10)
                got.append(report)

    reader = threading.Thread(target=read)
    reader.start()
    assert taken.wait(10)
    while hosted.stats(0).finished == 0:
        pass
    switch = threading.Thread(
        target=hosted.deliver_in, args=(lambda call: threading.Thread(target=call).start(), lambda _, r: got.append(r))
    )
    switch.start()
    assert not got and switch.is_alive(), "it waits for the reader"
    go_on.set()
    switch.join(10)
    while not any(report.ended for report in got):
        pass
    assert collect(got, 1)[0] == {1: expected([1, 1, 2], 12)}
    hosted.stop()
    reader.join(10)


def test_what_the_loop_has_not_taken_is_reported_before_the_failure() -> None:
    hosted = host(Bench(pages=200), heartbeat=0.01)
    taken = threading.Event()
    hosted.deliver_in(lambda call: taken.set(), lambda engine, report: None)
    reports = hosted.reports(0)
    hosted.post(0, Submit([ask(1, count=4)]))
    assert taken.wait(10)
    hosted.call(0, lambda engine: None)  # two steps later
    hosted.fail(0, ZeroDivisionError("a bug"))
    found = list[int]()
    with pytest.raises(RemoteError, match="a bug"):
        found.extend(token for report in reports for token in report.columns()[1].tolist())
    assert found and found == expected([1, 1, 2], 4)[: len(found)]
    hosted.stop()


def test_the_loops_cost_is_measured() -> None:
    cost = loop_cost(8, 20)
    assert (cost.batch, cost.steps) == (8, 20) and 0 < cost.seconds < 0.05


def test_who_listens_again_has_all_of_it_and_who_listened_before_takes_nothing() -> None:
    """A driver gave a stream up that still waits in the engine's process: tokens that it took would be nobody's."""
    driver = 3
    number = (driver << DRIVER_SHIFT) + 1
    thread = host(Bench(), shared=True, heartbeat=0.05)
    before = thread.reports(0, driver)
    next(before)
    taken: list[Report] = []
    waiting = threading.Thread(target=lambda: taken.extend(before))
    waiting.start()
    now = thread.reports(0, driver)
    next(now)
    waiting.join(10)
    assert not waiting.is_alive(), "the one before is over"
    thread.post(0, Submit([Ask.of(Request(number, "r", [5, 1, 2], SamplingParams(max_new_tokens=8)))]))
    tokens, ended = collect(now, 1)
    assert tokens == {number: expected([5, 1, 2], 8)} and ended == {number: "length"}
    assert not any(report.numbers for report in taken)
    thread.stop()
