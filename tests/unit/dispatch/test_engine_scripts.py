"""Scripts over engines' reports, without engines: rounds, replicas that go, and what comes too late."""

from __future__ import annotations

from itertools import count
from typing import Any

from rayk import protocol as m
from rayk.protocol.engine import Command, Query, Report
from rayk.protocol.engine_reports import Answered
from rayk.scheduler.script import ReplicaCall
from rayk.scheduler.serving.engine_scripts import EngineScripts, Rounds

LOOKUP = m.Lookup([])


class Engines:
    """What they are told, and answers to it; `live` can be changed."""

    def __init__(self, replicas: int = 2) -> None:
        self.live = set(range(replicas))
        self.posted: list[tuple[int, Query]] = []
        self.scripts = EngineScripts(self._post, lambda: self.live, count(1))
        self.ended: list[Any] = []

    def _post(self, replica: int, command: Command) -> None:
        assert isinstance(command, Query)
        self.posted.append((replica, command))

    def start(self, rounds: Rounds) -> None:
        self.scripts.start("a script", rounds, self.ended.append)

    def answer(self, at: int, result: m.Result) -> None:
        self.scripts.on_report(Report(answered=[Answered(self.posted[at][1].number, result)]))

    @property
    def told(self) -> list[tuple[int, Any]]:
        return [(replica, query.command) for replica, query in self.posted]


def pair(*second: ReplicaCall) -> Rounds:
    """Asks replicas 0 and 1, goes on with `second`, and ends with what all of them said."""
    replies = yield [ReplicaCall(0, LOOKUP), ReplicaCall(1, LOOKUP)]
    if second:
        replies += yield list(second)
    return [type(reply.result).__name__ for reply in replies]


def test_a_round_ends_with_its_last_reply() -> None:
    engines = Engines()
    engines.start(pair())
    assert engines.told == [(0, LOOKUP), (1, LOOKUP)] and "a script" in engines.scripts
    engines.answer(1, m.Found([], []))
    engines.answer(1, m.Done())
    assert not engines.ended, "one reply, however often it comes"
    engines.answer(0, m.Done())
    assert engines.ended == [["Done", "Found"]] and not engines.scripts


def test_nobody_waits_for_an_acknowledgement() -> None:
    engines = Engines()
    engines.start(pair(ReplicaCall(1, m.Acknowledge([3])), ReplicaCall(0, m.DropLines([1]))))
    engines.answer(0, m.Done())
    engines.answer(1, m.Done())
    assert engines.told[2:] == [(1, m.Acknowledge([3])), (0, m.DropLines([1]))]
    assert [query.number for _, query in engines.posted[2:]] == [0, 0] and engines.ended == [["Done"] * 4]


def test_a_replica_that_goes_answers_with_its_loss_and_the_one_in_its_place_is_not_asked() -> None:
    engines = Engines()
    engines.start(pair(ReplicaCall(1, LOOKUP), ReplicaCall(1, m.Acknowledge([3])), ReplicaCall(0, LOOKUP)))
    engines.scripts.lose(1)  # and another one is there at once
    engines.answer(0, m.Done())
    assert engines.told[2:] == [(0, LOOKUP)]
    engines.answer(2, m.Done())
    assert engines.ended == [["Done", "Failure", "Failure", "Failure", "Done"]]
    engines.live.remove(0)
    engines.start(pair())
    assert engines.told[3:] == [(1, LOOKUP)], "another script means the new one"


def test_what_comes_for_a_script_that_was_given_up_is_taken_back() -> None:
    engines = Engines()

    def exports() -> Rounds:
        late = [ReplicaCall(1, m.Acknowledge([3]))]
        yield [ReplicaCall(0, LOOKUP), ReplicaCall(1, LOOKUP, late=lambda result: late)]

    engines.start(exports())
    engines.scripts.give_up("a script")
    engines.start(pair())  # of the same name: it gets none of the other's replies
    engines.answer(0, m.Done())
    engines.answer(1, m.Done())
    assert engines.told[4:] == [(1, m.Acknowledge([3]))] and not engines.ended
    engines.scripts.give_up("a script")
    engines.scripts.lose(0)
    engines.scripts.lose(1)
    engines.answer(2, m.Done())
    assert not engines.ended and not engines.scripts
