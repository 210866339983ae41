"""What a driver of a named Cluster makes of news that crossed its own, without processes."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np

from rayk.actors.serving_link import SchedulerLink
from rayk.actors.serving_roster import ServingRoster
from rayk.dispatch.named import NamedDispatcher
from rayk.dispatch.output import Handle
from rayk.errors import ReplicaLostError
from rayk.protocol.base import failure
from rayk.protocol.engine import Cancel, Command, Report, Submit
from rayk.protocol.lines import Post, decode_line
from rayk.protocol.serving import (
    DRIVER_SHIFT,
    DriverNews,
    Placed,
    Refused,
    SchedulerNews,
    decode_driver_news,
    driver_of,
)
from rayk.request_errors import RequestCancelledError, RequestTimeoutError
from rayk.sampling import SamplingParams
from rayk.scheduler.router.router import RouterSettings


class Driver:
    """A driver with number 3, whose scheduler and replicas are this test."""

    def __init__(self, replicas: int = 2) -> None:
        self.told: list[DriverNews] = []
        self.posted: list[tuple[int, Command]] = []
        self.followed: list[int] = []
        settings = RouterSettings("cost", (50,) * replicas, 4, plans_copies=True, reports_backlog=False)
        running = [SimpleNamespace(start=7 + r, endpoint=None, epoch=0) for r in range(replicas)]
        roster = ServingRoster(
            "x/cluster", b"", "a model", settings, False, False, tuple(running), states=("ready",) * replicas
        )  # type: ignore[arg-type]  # stand-ins
        self.engines = SimpleNamespace(
            handles=dict(enumerate(running)), max_retries=2, post=lambda *sent: self.posted.append(sent)
        )
        actor: Any = SimpleNamespace(call=self._call, socket=None)
        runtime = SimpleNamespace(get=lambda ref, target, seconds: ref, sockets=False)
        self.link = SchedulerLink(runtime, actor)  # type: ignore[arg-type]  # as above
        self.link.number = 3
        self.dispatcher = NamedDispatcher(self.link, self.engines, roster, True)  # type: ignore[arg-type]  # as above
        self.dispatcher._follow = self.followed.append
        self._news = count(1)

    def _call(self, method: str, *args: Any, control: bool = False) -> Any:
        if method == "handle":
            post = decode_line(args[0])
            assert isinstance(post, Post) and post.driver == 3 and post.number == len(self.told) + 1
            self.told.append(decode_driver_news(post.body))
        return method == "renew"

    def submit(self, *prompts: list[int], **more: Any) -> list[Handle]:
        handles = [
            Handle(i, i, f"r{i}", np.array(p, np.int32), SamplingParams(max_new_tokens=4), **more)
            for i, p in enumerate(prompts)
        ]
        self.dispatcher.submit(handles)
        return handles

    def hear(self, *placed: tuple[Handle, int], refused: tuple[Refused, ...] = ()) -> None:
        told = [Placed(handle.ticket, replica) for handle, replica in placed]
        with self.dispatcher._turn():
            self.link.keep(SchedulerNews(next(self._news), 1, told, list(refused)))

    @property
    def sent(self) -> list[tuple[int, str]]:
        return [
            (r, ask.request_id) for r, command in self.posted if isinstance(command, Submit) for ask in command.asks
        ]


def test_the_scheduler_hears_of_lengths_and_keys_and_the_replica_of_prompts() -> None:
    driver = Driver()
    [handle] = driver.submit(list(range(9)), tenant="t", timeout=5.0)
    [news] = driver.told
    [want] = news.wants
    assert (want.tokens, len(want.keys), want.tenant, want.timeout) == (9, 16, "t", 5.0)
    assert driver_of(want.ticket) == 3 and not driver.posted
    driver.hear((handle, 1))
    [(replica, command)] = driver.posted
    assert isinstance(command, Submit) and replica == 1 and command.asks[0].request().key == "3/r0"
    assert command.asks[0].request().tokens.tolist() == list(range(9))


def test_many_requests_go_in_messages_of_bounded_size() -> None:
    driver = Driver()
    driver.submit(*[list(range(4000))] * 60)
    assert len(driver.told) == 6 and sum(len(news.wants) for news in driver.told) == 60


def test_refusals_and_cancelled_ones() -> None:
    driver = Driver()
    late, gone = driver.submit([1], [2])
    driver.hear(refused=(Refused(late.ticket, failure(RequestTimeoutError("r0", 1.0))),))
    assert late.result(0).finish_reason == "timeout"
    ticket = gone.ticket
    driver.dispatcher.cancel(gone)
    assert gone.result(0).finish_reason == "cancelled" and driver.told[-1].dropped == [ticket]
    driver.hear((gone, 0))  # it was on its way
    assert not driver.posted


def test_a_place_at_a_replica_that_was_just_lost_here_is_tried() -> None:
    """The scheduler decided before it knew: whoever listens there hears at once that it is gone."""
    driver = Driver()
    first, second = driver.submit([1], [2])
    driver.hear((first, 0))
    before = first.ticket
    driver.dispatcher.lose(0, "it died", (3, 7))
    assert driver.told[-1].unheard == [(0, 7)] and driver.told[-1].wants[0].again == before
    assert first.retries == 1 and driver.followed == []
    driver.hear((second, 0))
    assert driver.followed == [0] and driver.sent == [(0, "r0")], "who listened before may still take what is said"
    driver.dispatcher.on_report(0, Report())
    assert driver.sent == [(0, "r0"), (0, "r1")]
    assert driver.posted[1] == (0, Cancel([before])), "it may still run there, by the same id"
    driver.dispatcher.lose(0, "it died", (3, 7))
    assert (first.retries, second.retries) == (1, 1) and driver.told[-1].wants[0].request_id == "r1"
    for _ in range(2):
        driver.hear((second, 0))
        driver.dispatcher.lose(0, "it died", (3, 7))
    assert isinstance(second.result(0).error, ReplicaLostError) and not first.done


def test_what_waits_to_be_heard_can_be_cancelled_and_is_not_sent() -> None:
    driver = Driver()
    first, second, third = driver.submit([1], [2], [3])
    driver.hear((first, 0))
    driver.dispatcher.lose(0, "it was silent", (3, 7))
    driver.hear((second, 0), (third, 0))
    driver.dispatcher.cancel(second)
    driver.dispatcher.on_report(0, Report())
    assert driver.sent == [(0, "r0"), (0, "r2")] and isinstance(second.result(0).error, RequestCancelledError)


def test_a_place_at_a_replica_that_has_left_is_asked_for_again() -> None:
    driver = Driver()
    [handle] = driver.submit([1, 2])
    before = handle.ticket
    del driver.engines.handles[1]
    driver.hear((handle, 1))
    assert not driver.posted and driver.told[-1].wants[0].again == before and handle.ticket > before
    driver.hear((handle, 0))
    assert driver.sent == [(0, "r0")] and handle.retries == 0


def test_streams_of_an_earlier_coming_end_without_a_loss() -> None:
    driver = Driver()
    [handle] = driver.submit([1])
    driver.hear((handle, 0))
    driver.dispatcher.lose(0, "it takes this driver for gone", (2, 7))
    assert handle.retries == 0 and handle.replica == 0 and handle.ticket >> DRIVER_SHIFT == 3
