"""What a dispatcher counts of the requests that it places, without engines."""

from __future__ import annotations

import numpy as np
import pytest

from rayk.dispatch.dispatcher import Dispatcher
from rayk.dispatch.output import Handle, deliver
from rayk.protocol.admission import AdmissionPolicy
from rayk.protocol.engine import Command, Ended, Report
from rayk.sampling import SamplingParams
from rayk.scheduler.router.router import RouterSettings


def report(number: int, *tokens: int, ended: bool = False) -> Report:
    numbers = np.full(len(tokens), number, np.int64).tobytes()
    ends = [Ended(number, "length")] if ended else []
    return Report(numbers, np.array(tokens, np.int32).tobytes(), ended=ends, used_pages=1)


@pytest.mark.parametrize("policy", [None, AdmissionPolicy()])
def test_a_request_that_lost_its_replica_is_prefilled_again(policy: AdmissionPolicy | None) -> None:
    """Its prompt and answer so far are backlog of the next replica until it has a token from there."""
    posted: list[tuple[int, Command]] = []
    settings = RouterSettings("cost", (50, 50), 4, limit=4, reports_backlog=False, admission=policy)
    dispatcher = Dispatcher(lambda *sent: posted.append(sent), settings, 2)
    handle = Handle(0, 1, "a", np.array([1, 2, 3], np.int32), SamplingParams(max_new_tokens=5))
    dispatcher.submit([handle])
    loads, first = dispatcher.router.loads, handle.replica
    assert first is not None and loads.prefill_backlog[first] == 3
    dispatcher.on_report(first, report(1, 7))
    assert not loads.prefill_backlog.any()
    dispatcher.lose(first, "it died")
    second = handle.replica
    assert second == 1 - first and loads.prefill_backlog[second] == 4
    dispatcher.on_report(second, report(handle.ticket, 8))
    assert not loads.prefill_backlog.any() and loads.requests[second] == 1
    admission = dispatcher.core.admission
    assert admission is None or not admission._promised
    dispatcher.on_report(second, report(handle.ticket, 9, ended=True))
    assert handle.result(0).tokens == [7, 8, 9] and not loads.requests.any() and not loads.held.any()
    assert [replica for replica, _ in posted] == [first, second]


def test_tokens_of_an_attempt_that_was_given_up_meanwhile_do_not_count() -> None:
    """A report is read by one thread while another asks again: what comes too late is brought by the next attempt."""
    posted: list[tuple[int, Command]] = []
    settings = RouterSettings("cost", (50, 50), 4, limit=4, reports_backlog=False)
    dispatcher = Dispatcher(lambda *sent: posted.append(sent), settings, 2)
    handle = Handle(0, 1, "a", np.array([1, 2, 3], np.int32), SamplingParams(max_new_tokens=3))
    dispatcher.submit([handle])
    first = handle.replica
    assert first is not None
    known = dict(dispatcher._handles)  # as the reader has looked them up
    dispatcher.lose(first, "it died")
    deliver(report(1, 7), known)
    assert handle.tokens == [] and handle.prefilling
    second = handle.replica
    assert second is not None
    dispatcher.on_report(second, report(handle.ticket, 7, 8, 9, ended=True))
    assert handle.result(0).tokens == [7, 8, 9]
