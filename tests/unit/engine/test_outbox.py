"""Who reads what an engine reports, when several drivers use it."""

from __future__ import annotations

import numpy as np

from rayk.engine.outbox import SCHEDULER, Outbox
from rayk.protocol.base import Done
from rayk.protocol.engine import Report
from rayk.protocol.engine_reports import Answered, Begun, Event, Finished, PagesChanged, Text, TokenLogprobs, Tokens
from rayk.protocol.serving import DRIVER_SHIFT

ONE, TWO = (driver << DRIVER_SHIFT for driver in (1, 2))


def tokens(*pairs: tuple[int, int], logprobs: dict[int, TokenLogprobs] | None = None) -> Tokens:
    numbers, found = zip(*pairs, strict=True)
    return Tokens(np.array(numbers, np.int64), np.array(found, np.int64), logprobs or {})


def seen(events: list[Event]) -> list[tuple[int, int]]:
    numbers, found = Report.of(events, 0).columns()
    return list(zip(numbers.tolist(), found.tolist(), strict=True))


def test_the_only_driver_reads_all_and_may_be_behind() -> None:
    outbox = Outbox(shared=False)
    outbox.add([tokens((1, 5), (2, 6)), PagesChanged(True, b""), Finished(1, "stop")])
    assert outbox.unread == 2 and outbox.events[SCHEDULER]
    assert [type(event) for event in outbox.take(SCHEDULER)] == [Tokens, PagesChanged, Finished]
    assert outbox.unread == 0 and not outbox.events


def test_each_driver_reads_of_its_requests_and_the_scheduler_no_token() -> None:
    outbox = Outbox(shared=True)
    outbox.expect([ONE + 1, ONE + 2, TWO + 1])
    logprobs = {ONE + 1: TokenLogprobs(-1.0), TWO + 1: TokenLogprobs(-2.0)}
    outbox.add([tokens((ONE + 1, 5), (TWO + 1, 6), logprobs=logprobs), PagesChanged(True, b"")])
    outbox.add([tokens((ONE + 1, 7), (ONE + 2, 8)), Text(TWO + 1, "x"), Answered(TWO + 9, Done())])
    outbox.add([Finished(TWO + 1, "stop", text="whole"), Answered(3, Done())])
    mine, theirs, rest = outbox.take(1), outbox.take(2), outbox.take(SCHEDULER)
    assert seen(mine) == [(ONE + 1, 5), (ONE + 1, 7), (ONE + 2, 8)] and seen(theirs) == [(TWO + 1, 6)]
    assert Report.of(mine, 0).logprobs == {ONE + 1: [TokenLogprobs(-1.0)]}
    report = Report.of(theirs, 0)
    assert report.texts == [(TWO + 1, "x")] and report.answered[0].number == TWO + 9
    assert [(end.number, end.text) for end in report.ended] == [(TWO + 1, "whole")]
    known = Report.of(rest, 0, batch=4)
    assert known.tokens == b"" and known.texts == [] and known.batch == 4 and len(known.pages) == 1
    assert sorted(np.frombuffer(known.first, np.int64).tolist()) == [ONE + 1, ONE + 2, TWO + 1], "each once"
    assert [(end.number, end.text) for end in known.ended] == [(TWO + 1, None)]
    assert known.answered[0].number == 3 and outbox.unread == 0


def test_who_is_gone_reads_nothing_any_more() -> None:
    outbox = Outbox(shared=True)
    outbox.add([tokens((ONE + 1, 5), (TWO + 1, 6))])
    outbox.forget(1)
    outbox.add([tokens((ONE + 1, 7), (TWO + 1, 8)), Finished(ONE + 1, "cancelled")])
    assert outbox.take(1) == [] and seen(outbox.take(2)) == [(TWO + 1, 6), (TWO + 1, 8)]
    assert [event.number for event in outbox.take(SCHEDULER) if isinstance(event, Finished)] == [ONE + 1]
    assert not [event for event in outbox.take(SCHEDULER) if isinstance(event, Begun)]
