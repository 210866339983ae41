"""One replica behind messages: repeated, late and misdirected ones, mirrors, exports, and bad input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rayk import TextContext
from rayk import protocol as m
from rayk.errors import (
    AlreadyClaimedError,
    BatchError,
    InsufficientBlocksError,
    MessageError,
    NotClaimedError,
    RaykError,
    RemoteError,
    StaleContextError,
    StaleEpochError,
)
from rayk.kvcache.replica import ReplicaCore
from rayk.protocol.columns import AdmitResults
from rayk.protocol.context_sync import ContextSender
from rayk.protocol.dedup import SENDERS_REMEMBERED
from rayk.replica.service import REMEMBERED, ReplicaService
from rayk.transport.port import EXPORT_SECONDS

from ..actors.fake import FakeRuntime, params  # noqa: TID252  # tests/ is no package that has an absolute name

EPOCH = 1_000
dumps = FakeRuntime().dumps


class Client:
    """A sender with its own numbers; keeps the last wire for sending it again."""

    def __init__(self, service: ReplicaService, name: str = "driver") -> None:
        self.service = service
        self.name = name
        self.seq = 0
        self.wire = b""
        self.data: list[Any] = []

    def raw(self, wire: bytes, attached: Sequence[Any] = ()) -> m.Reply:
        reply, self.data = self.service.handle(wire, attached)
        return m.decode_reply(reply)

    def send(self, command: Any, attached: Sequence[Any] = (), *, seq: int | None = None, epoch: int = EPOCH) -> Any:
        if seq is None:
            self.seq += not isinstance(command, m.READ_ONLY)
            seq = 0 if isinstance(command, m.READ_ONLY) else self.seq
        self.wire = m.encode(m.ReplicaEnvelope(self.name, epoch, seq, command))
        reply = self.raw(self.wire, attached)
        assert (reply.epoch, reply.seq) == (self.service.epoch, seq)
        return reply.result

    def error(self, command: Any, **options: Any) -> RaykError:
        result = self.send(command, **options)
        assert isinstance(result, m.Failure), result
        return m.to_error(result)


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def service(now: list[float]) -> ReplicaService:
    core = ReplicaCore(params(1), 0, 16, 8, runtime_checks=True)
    return ReplicaService(core, EPOCH, dumps, clock=lambda: now[0])


@pytest.fixture
def client(service: ReplicaService) -> Client:
    return Client(service)


def context(request_id: str, tokens: Sequence[int] = (1, 2, 3, 4, 5)) -> TextContext:
    return TextContext(request_id, list(tokens), 1000)


def view(ctx: TextContext) -> m.ContextView:
    return ContextSender().view(ctx, whole=True)


class Done:
    """An AdmitDone, readable."""

    def __init__(self, done: Any, rows: int) -> None:
        assert isinstance(done, m.AdmitDone)
        self.message = done
        self.outcomes = AdmitResults.received(done.numbers, done.seconds, done.failures, rows)
        self.landed = [row[0] >= 0 for row in self.outcomes.rows]

    def error(self, row: int) -> RaykError:
        return m.to_error(self.message.failures[row])


def admit(client: Client, *ctxs: TextContext, claim: bool = True, **options: Any) -> Done:
    return Done(client.send(m.Admit(ContextSender().pack(ctxs, whole=True), claim, **options)), len(ctxs))


# -- once and only once ----------------------------------------------------------------------------


def test_a_repeated_mutation_is_answered_from_memory(client: Client, service: ReplicaService) -> None:
    ctx = context("r")
    first = admit(client, ctx)
    metrics = service.core.metrics
    again = client.raw(client.wire)
    assert again.result == first.message
    assert service.core.metrics == metrics and list(service.core.requests) == ["r"]


def test_a_repeated_failure_is_the_same_failure(client: Client, service: ReplicaService) -> None:
    client.send(m.Claim("r"))
    assert isinstance(client.error(m.Claim("r")), AlreadyClaimedError)
    wire = client.wire
    service.core.release("r")
    assert isinstance(client.raw(wire).result, m.Failure), "the answer from memory, the claim is not tried"
    assert not service.core.requests


def test_a_forward_runs_once(client: Client) -> None:
    ctx = context("r")
    admit(client, ctx)
    calls = torch.zeros(1)
    SEEN["calls"] = calls
    result = client.send(m.RunTick([view(ctx)], execute=[0], fn=dumps(count)))
    assert result.value and client.raw(client.wire).result == result
    assert int(calls[0]) == 1


SEEN: dict[str, torch.Tensor] = {}


def count(inputs: Any, batch: Any) -> int:
    SEEN["calls"] += 1
    return len(batch)


def test_an_export_repeated_is_one_export(client: Client, service: ReplicaService) -> None:
    prefix = cached(client, service)
    first = client.send(m.Export(view(prefix), 0, 1))
    data = client.data
    again = client.raw(client.wire)
    assert again.result == first and [d.tolist() for d in client.data] == [d.tolist() for d in data]
    client.send(m.Acknowledge([first.export_id]))
    assert service.core.usage.used == 0, "one acknowledgement unpins it"


def test_a_late_number_is_refused(client: Client, service: ReplicaService) -> None:
    for request_id in "abc":
        client.send(m.Claim(request_id))
    client.send(m.Claim("d"), seq=9)
    error = client.error(m.Release(["a"]), seq=7)
    assert isinstance(error, MessageError) and "number 7 after 9" in str(error)
    for seq in range(10, 10 + REMEMBERED):
        client.send(m.ResetMetrics(), seq=seq)
    error = client.error(m.Release(["a"]), seq=2)
    assert isinstance(error, MessageError) and "number 2 after" in str(error), "its answer is forgotten"
    assert list(service.core.requests) == ["a", "b", "c", "d"]


def test_answers_are_remembered_for_messages_that_are_sent_again(client: Client, service: ReplicaService) -> None:
    wires = []
    for request_id in "abc":
        client.send(m.Claim(request_id))
        wires.append(client.wire)
    assert [client.raw(wire).result for wire in wires] == [m.Done()] * 3
    assert list(service.core.requests) == ["a", "b", "c"]


def test_numbers_belong_to_their_sender(client: Client, service: ReplicaService) -> None:
    client.send(m.Claim("a"))
    other = Client(service, "another")
    other.send(m.Claim("b"))
    assert list(service.core.requests) == ["a", "b"]
    for i in range(SENDERS_REMEMBERED):
        Client(service, f"later-{i}").send(m.ResetMetrics())
    other.seq = 0
    assert isinstance(other.error(m.Claim("b")), AlreadyClaimedError), "forgotten: done anew, not from memory"


def test_questions_have_no_number_and_are_answered_anew(client: Client, service: ReplicaService) -> None:
    client.send(m.Claim("a"))
    assert client.send(m.Blocks("a")).claimed
    service.core.release("a")
    assert not client.raw(client.wire).result.claimed


def test_another_epoch_is_refused(client: Client, service: ReplicaService) -> None:
    for epoch in (EPOCH - 1, EPOCH + 1):
        error = client.error(m.Claim("r"), epoch=epoch)
        assert isinstance(error, StaleEpochError)
        assert (error.replica, error.expected, error.actual) == (0, epoch, EPOCH)
    assert not service.core.requests
    client.seq = 0
    assert client.send(m.Claim("r")) == m.Done(), "what was refused was not remembered"


def test_a_message_for_the_scheduler_is_refused_by_name(client: Client) -> None:
    reply = client.raw(m.encode(m.SchedulerEnvelope("driver", EPOCH, 1, m.Describe())))
    assert isinstance(reply.result, m.Failure)
    assert "does not take Describe" in str(m.to_error(reply.result))


@pytest.mark.parametrize("wire", [b"", b"\xc1", b"\x00", b"garbage", m.encode(m.Reply(1, 1, m.Done()))])
def test_malformed_bytes_are_answered(client: Client, service: ReplicaService, wire: bytes) -> None:
    reply = client.raw(wire)
    assert isinstance(reply.result, m.Failure) and reply.result.kind == "MessageError"
    service.core.check_integrity()


# -- mirrors ---------------------------------------------------------------------------------------


def test_missing_tokens_are_asked_for(client: Client) -> None:
    ctx, sender = context("r"), ContextSender()
    sender.mark_sent(ctx, 0)
    client.send(m.Claim("r"))
    error = client.error(m.Step([sender.view(ctx, 0)]))
    assert isinstance(error, StaleContextError) and error.request_id == "r"


def test_mirrors_go_with_their_requests(client: Client, service: ReplicaService) -> None:
    ctxs = [context(name) for name in "abc"]
    admit(client, *ctxs)
    assert len(service._mirrors) == 3
    client.send(m.Release(["a"]))
    client.send(m.RunTick([view(ctxs[1])], step=[0], release=["b"]))
    client.send(m.Release(["c", "unknown"], missing_ok=True))
    assert len(service._mirrors) == 0
    client.send(m.Lookup([view(ctxs[0])]))
    client.send(m.UsedFraction(view(ctxs[0])))
    client.error(m.Step([view(ctxs[0])]))
    assert len(service._mirrors) == 0, "nothing is kept of a request that is not claimed"


def test_a_refused_admission_keeps_nothing(client: Client, service: ReplicaService) -> None:
    done = admit(client, context("big", range(500)))
    assert done.landed == [False] and isinstance(done.error(0), InsufficientBlocksError)
    assert not service.core.requests and len(service._mirrors) == 0 and service.core.usage.used == 0


def test_a_failed_forward_does_not_hold_on_to_what_the_tick_released(client: Client, service: ReplicaService) -> None:
    a, b = context("a"), context("b")
    admit(client, a, b)
    done = client.send(m.RunTick([view(b)], release=["a"], alloc=[0], execute=[0], fn=dumps(raise_value_error)))
    assert done.failure is not None and done.failure.kind == "RemoteError"
    assert (done.released, list(done.moved)) == (1, ["b"]), "what was done before is told"
    assert list(service.core.requests) == ["b"]
    assert len(service._mirrors) == 1


def test_a_tick_for_a_request_that_is_not_claimed_does_nothing(client: Client, service: ReplicaService) -> None:
    a, b = context("a"), context("b")
    admit(client, a, b)
    done = client.send(m.RunTick([view(b)], release=["a", "unknown"], alloc=[0]))
    assert done.failure is not None and done.failure.kind == "NotClaimedError"
    assert (done.released, sorted(service.core.requests)) == (0, ["a", "b"])


# -- admission ---------------------------------------------------------------------------------------


def test_stop_on_error_leaves_the_rest_untried(client: Client, service: ReplicaService) -> None:
    small, big, last = context("small"), context("big", range(500)), context("last")
    done = admit(client, small, big, last, stop_on_error=True)
    assert done.landed == [True, False, False] and list(done.message.failures) == [1]
    assert list(service.core.requests) == ["small"]


def test_without_it_each_stands_for_itself(client: Client, service: ReplicaService) -> None:
    small, big, last = context("small"), context("big", range(500)), context("last")
    done = admit(client, small, big, last)
    assert done.landed == [True, False, True]
    assert list(service.core.requests) == ["small", "last"]


def test_alloc_of_an_unclaimed_request(client: Client) -> None:
    assert isinstance(admit(client, context("r"), claim=False).error(0), NotClaimedError)


def test_a_claimed_request_is_not_claimed_twice(client: Client, service: ReplicaService) -> None:
    admit(client, context("r"))
    assert isinstance(admit(client, context("r")).error(0), AlreadyClaimedError)
    assert list(service.core.requests) == ["r"], "the first claim is not undone"


def test_release_does_nothing_when_an_id_is_unknown_unless_told(client: Client, service: ReplicaService) -> None:
    for request_id in "ab":
        client.send(m.Claim(request_id))
    assert isinstance(client.error(m.Release(["a", "x", "b"])), NotClaimedError)
    assert isinstance(client.error(m.Release(["a", "b", "a"])), BatchError)
    assert sorted(service.core.requests) == ["a", "b"]
    assert client.send(m.Release(["x", "a", "b"], missing_ok=True)) == m.Missing(["x"])
    assert not service.core.requests


# -- exports -------------------------------------------------------------------------------------------


def cached(client: Client, service: ReplicaService, tokens: Sequence[int] = range(9)) -> TextContext:
    """A context whose full pages are cached and held by nobody."""
    ctx = context("cached", tokens)
    admit(client, ctx)
    ctx.update(99)
    client.send(m.Step([view(ctx)]))
    client.send(m.Release(["cached"]))
    return context("cached", tokens)


def test_exported_pages_are_pinned_until_acknowledged(client: Client, service: ReplicaService) -> None:
    prefix = cached(client, service)
    done = client.send(m.Export(view(prefix), 0, 2))
    assert len(done.hashes) == 2 and [len(part) for part in client.data] == [2]
    assert service.core.usage.used == 2
    client.send(m.ResetPrefixCache())
    assert service.core.usage.cached == 2, "pinned pages stay cached"
    assert client.send(m.Acknowledge([done.export_id])) == m.Done()
    assert service.core.usage.used == 0
    assert client.send(m.Acknowledge([done.export_id, 12345])) == m.Done(), "again, or unknown: fine"


def test_an_export_whose_reader_is_gone_expires(client: Client, service: ReplicaService, now: list[float]) -> None:
    prefix = cached(client, service)
    client.send(m.Export(view(prefix), 0, 2))
    now[0] = EXPORT_SECONDS
    client.send(m.GetUsage())
    assert service.core.usage.used == 2
    now[0] = EXPORT_SECONDS + 1
    assert client.send(m.GetUsage()) == m.UsageDone(16, 16, 2)


def test_exported_data_does_not_change_with_the_pages(client: Client, service: ReplicaService) -> None:
    prefix = cached(client, service)
    service.core.buffers.all_buffers[0].fill_(7)
    client.send(m.Export(view(prefix), 0, 2))
    data = client.data
    before = [part.tolist() for part in data]
    service.core.buffers.all_buffers[0].fill_(9)
    assert [part.tolist() for part in data] == before


# -- shipped functions ------------------------------------------------------------------------------------


def raise_value_error(inputs: Any, batch: Any) -> None:
    raise ValueError("no such layer")


def raise_rayk_error(inputs: Any, batch: Any) -> None:
    raise InsufficientBlocksError("r", 0, 1, 2, 3)


def unpicklable(inputs: Any, batch: Any) -> Any:
    return (x for x in batch)


def test_an_exception_in_fn_is_reported_with_its_traceback(client: Client, service: ReplicaService) -> None:
    error = client.error(m.Execute([], dumps(raise_value_error)))
    assert isinstance(error, RemoteError)
    assert (error.replica, error.kind, error.message) == (0, "ValueError", "no such layer")
    assert "raise_value_error" in error.trace
    assert isinstance(client.error(m.Execute([], dumps(raise_rayk_error))), InsufficientBlocksError)
    assert client.error(m.Execute([], dumps(unpicklable))).kind == "TypeError"
    assert client.error(m.Execute([], b"no pickle")).kind == "UnpicklingError"
    assert client.send(m.Claim("alive")) == m.Done()


ONE = ContextSender().pack([context("r")])


def numbers(base: int, sent: int) -> bytes:
    return np.array([base, sent, 0, 1, 9, 0, -1], np.int64).tobytes()


@pytest.mark.parametrize(
    "command",
    [
        m.Step([m.ContextView("r", 0, b"\x01\x00\x00\x00", 0, 1)]),  # no origin
        m.Step([m.ContextView("r", 0, b"abc", 0, 1, origin=m.Origin(10))]),  # not whole int32s
        m.Step([m.ContextView("r", 0, b"", 0, 1, origin=m.Origin(10))]),  # no token
        m.Step([m.ContextView("r", 0, b"\x01\x00\x00\x00", 1, 1, origin=m.Origin(10))]),  # empty window
        m.Step([m.ContextView("r", 0, b"\x01\x00\x00\x00", 0, 2, origin=m.Origin(10))]),  # beyond the tokens
        m.Step([m.ContextView("r", -4, b"\x01\x00\x00\x00", 0, 1)]),  # negative base
        m.RunTick([], step=[0]),  # no such view
        m.Admit(ONE, True, uses={0: [3]}),
        m.Admit(m.Contexts([], b"", b""), True, [m.ImportHead(0, [])]),  # its data is missing
        m.Admit(m.Contexts(["r"], b"", b"\x01\x00\x00\x00")),  # no numbers
        m.Admit(m.Contexts(ONE.ids, ONE.numbers, ONE.tokens[:-1])),  # too few tokens
        m.Admit(m.Contexts(["r", "s"], numbers(0, -1) + numbers(0, 2), bytes(4))),  # a negative count
        m.ReadPages([99]),
        m.ReadPages([-1]),
    ],
)
def test_well_formed_nonsense_is_answered_and_changes_nothing(
    client: Client, service: ReplicaService, command: Any
) -> None:
    client.send(m.Claim("other"))
    before = service.core.usage
    assert isinstance(client.send(command), m.Failure)
    assert list(service.core.requests) == ["other"] and service.core.usage == before
    service.core.check_integrity()
