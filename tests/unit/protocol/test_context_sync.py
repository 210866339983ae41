"""A context sent in pieces is, on the other side, the context: whatever happened to either in between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import TextContext
from rayk import protocol as m
from rayk.errors import MessageError, StaleContextError, TokenError, UnsendableError
from rayk.protocol.context_sync import ContextMirrors, ContextSender, apply_move, moved

TOKEN = st.integers(-(2**31), 2**31 - 1)
REPLICAS = 2
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), TOKEN),
        st.tuples(st.just("chunk"), st.integers(1, 9)),
        st.tuples(st.just("skip"), st.integers(1, 3)),
        st.tuples(st.just("rewind"), st.integers(1, 3)),
        st.tuples(st.just("reset")),
        st.tuples(st.just("placeholder")),
        st.tuples(st.just("realize"), TOKEN),
        st.tuples(st.just("drafts"), st.lists(TOKEN, max_size=3)),
        st.tuples(st.just("send"), st.integers(0, REPLICAS - 1), st.sampled_from(["kept", "lost", "whole", "unheard"])),
        st.tuples(st.just("send"), st.just(0), st.just("kept")),
        st.tuples(st.just("forget")),
        st.tuples(st.just("drop"), st.integers(0, REPLICAS - 1)),
        st.tuples(st.just("another"), st.lists(TOKEN, min_size=1, max_size=9)),
    ),
    max_size=30,
)


def travelled(view: m.ContextView) -> m.ContextView:
    """The view after a trip over the wire."""
    envelope = m.decode_envelope(m.encode(m.ReplicaEnvelope("driver", 1, 1, m.Step([view]))))
    assert isinstance(envelope.command, m.Step)
    [again] = envelope.command.views
    return again


def state(ctx: TextContext) -> Any:
    window = ctx.tokens
    return (
        ctx.request_id, window.all.tolist(), window.processed, window.end, ctx.max_length, ctx.cache_salt, ctx.adapter,
        ctx.session_id, ctx.tenant, ctx.root_key, ctx.pending_future_count, ctx.cached_prefix_length,
        list(ctx.draft_tokens_to_verify), list(ctx.maybe_accepted_draft_tokens),
    )  # fmt: skip


class Wire:
    """One sender, a few mirrors, and one context that changes."""

    def __init__(self, tokens: list[int]) -> None:
        self.sender = ContextSender()
        self.mirrors = [ContextMirrors(r) for r in range(REPLICAS)]
        self.kept: set[int] = set()  # replicas that have a mirror
        self.made = 0
        self.another(tokens)

    def another(self, tokens: list[int]) -> None:
        """A new request under the same id."""
        self.made += 1
        salt = f"salt-{self.made}"
        self.ctx = TextContext("r", tokens, 10_000, salt, adapter="a", session_id=salt, tenant="t")

    def update(self, token: int) -> None:
        self.ctx.update(token)

    def chunk(self, n: int) -> None:
        if n < self.ctx.tokens.active_length:
            self.ctx.tokens.chunk(n)

    def skip(self, n: int) -> None:
        if n < self.ctx.tokens.active_length:
            self.ctx.tokens.skip(n)

    def rewind(self, n: int) -> None:
        self.ctx.tokens.rewind(min(n, self.ctx.tokens.processed))

    def reset(self) -> None:
        self.ctx.reset()

    def placeholder(self) -> None:
        self.ctx.update_with_future_token()

    def realize(self, token: int) -> None:
        if self.ctx.pending_future_count:
            self.ctx.realize_future_token(token)

    def drafts(self, tokens: list[int]) -> None:
        self.ctx.draft_tokens_to_verify, self.ctx.maybe_accepted_draft_tokens = tokens, tokens[:1]

    def forget(self) -> None:
        self.sender.forget("r")

    def drop(self, replica: int) -> None:
        self.mirrors[replica].drop("r")
        self.kept.discard(replica)

    def send(self, replica: int, how: str) -> None:
        """`lost` on the way there, `unheard`: done, but the answer was lost; `whole`: all tokens, for any replica."""
        view = travelled(self.sender.view(self.ctx, replica, whole=how == "whole"))
        if how == "lost":
            return
        mirrors = self.mirrors[replica]
        if replica not in self.kept and view.base:
            with pytest.raises(StaleContextError) as caught:
                mirrors.context(view)
            assert (caught.value.request_id, caught.value.replica) == ("r", replica)
            self.sender.forget("r")
            view = travelled(self.sender.view(self.ctx, replica))
            assert view.base == 0
        mirror = mirrors.context(view)
        self.kept.add(replica)
        assert state(mirror) == state(self.ctx)
        assert mirror is not self.ctx and len(mirrors) == 1
        if how != "unheard":
            self.sender.mark_sent(self.ctx, replica)


@settings(max_examples=250, derandomize=True)
@given(tokens=st.lists(TOKEN, min_size=1, max_size=20), steps=STEPS)
def test_a_mirror_is_the_original(tokens: list[int], steps: list[tuple[Any, ...]]) -> None:
    wire = Wire(tokens)
    for name, *arguments in [*steps, ("send", 0, "kept"), ("send", 1, "whole")]:
        getattr(wire, name)(*arguments)


def test_only_new_tokens_travel() -> None:
    ctx, sender = TextContext("r", range(1000), 2000), ContextSender()
    first = sender.view(ctx, 0)
    assert (first.base, len(first.tokens)) == (0, 4000) and first.origin is not None
    sender.mark_sent(ctx, 0)
    ctx.update(7)
    ctx.update(8)
    second = sender.view(ctx, 0)
    assert (second.base, len(second.tokens), second.origin) == (1000, 8, None)
    assert sender.view(ctx, 1).base == 0, "another replica has seen nothing"
    assert sender.view(ctx).base == 0, "nor has an unknown one"
    assert sender.view(ctx, 0, whole=True).base == 0
    assert sender.view(TextContext("r", range(1000), 2000), 0).base == 0, "nor anyone this context"


def test_placeholders_travel_again_once_they_are_filled_in() -> None:
    ctx, sender, mirrors = TextContext("r", [1, 2, 3], 100), ContextSender(), ContextMirrors(0)
    ctx.update_with_future_token()
    ctx.update_with_future_token()
    mirrors.context(sender.view(ctx, 0))
    sender.mark_sent(ctx, 0)
    ctx.realize_future_token(44)
    view = sender.view(ctx, 0)
    assert view.base == 3 and view.pending == 1
    assert mirrors.context(view).tokens.all.tolist() == [1, 2, 3, 44, -1]


def test_moves_come_back() -> None:
    ctx, sender, mirrors = TextContext("r", range(9), 100), ContextSender(), ContextMirrors(0)
    mirror = mirrors.context(sender.view(ctx, 0))
    mirror.tokens.processed, mirror.cached_prefix_length = 8, 8
    apply_move(ctx, moved(mirror))
    assert state(ctx) == state(mirror)


def test_a_context_that_is_not_kept_leaves_no_trace() -> None:
    ctx, mirrors = TextContext("r", range(9), 100), ContextMirrors(0)
    mirrors.context(ContextSender().view(ctx), keep=False)
    assert len(mirrors) == 0
    mirrors.drop("r")


@pytest.mark.parametrize(
    ("view", "problem"),
    [
        (m.ContextView("r", 0, b"\x01\0\0\0", 0, 1), "came without their origin"),
        (m.ContextView("r", 0, b"\x01\0\0\0", 1, 1, origin=m.Origin(9)), r"window 1\.\.1 over 1 tokens"),
        (m.ContextView("r", 0, b"\x01\0\0\0", -1, 1, origin=m.Origin(9)), r"window -1\.\.1"),
        (m.ContextView("r", 0, b"\x01\0\0\0", 0, 2, origin=m.Origin(9)), r"window 0\.\.2"),
    ],
)
def test_a_view_that_contradicts_itself_is_refused(view: m.ContextView, problem: str) -> None:
    with pytest.raises(MessageError, match=problem):
        ContextMirrors(0).context(view)


def test_missing_tokens_are_noticed() -> None:
    mirrors = ContextMirrors(3)
    with pytest.raises(StaleContextError, match="replica 3 does not have the earlier tokens of request 'r'"):
        mirrors.context(m.ContextView("r", 2, b"\x01\0\0\0", 0, 1))
    mirrors.context(m.ContextView("r", 0, b"\x01\0\0\0", 0, 1, origin=m.Origin(9)))
    with pytest.raises(StaleContextError):
        mirrors.context(m.ContextView("r", 2, b"\x01\0\0\0", 0, 1))


# -- contexts that were spoilt after they were made ----------------------------------------------------


@pytest.mark.parametrize("name", ["draft_tokens_to_verify", "maybe_accepted_draft_tokens"])
@pytest.mark.parametrize("drafts", [[2**31], [2**70], [1.5], ["a"], [[1]], [None]])
def test_drafts_that_are_no_tokens_are_refused_with_the_request(name: str, drafts: list[Any]) -> None:
    ctx, filled = TextContext("r", [1, 2], 9), list[Any]()
    setattr(ctx, name, filled)
    filled += drafts
    for send in (lambda: ContextSender().view(ctx), lambda: ContextSender().pack([TextContext("other", [1], 9), ctx])):
        with pytest.raises(TokenError, match="'r'"):
            send()


@pytest.mark.parametrize("value", [2**63, 2**70, "9", None, 1.5])
def test_numbers_that_no_message_carries_are_refused_with_the_request(value: Any) -> None:
    ctx = TextContext("r", [1, 2], 9)
    ctx.max_length = value
    with pytest.raises(TokenError, match=r"'r'.*must be an integer"):
        ContextSender().pack([TextContext("other", [1], 9), ctx])


@pytest.mark.parametrize(
    "command",
    [
        m.Release(["\ud800"]),
        m.Release([2**70]),  # type: ignore[list-item]  # what a caller may hand over
        m.Blocks(object()),  # type: ignore[arg-type]  # likewise
        m.Step([m.ContextView("r", 0, b"", 0, 1, origin=m.Origin(2**70))]),
    ],
)
def test_a_message_that_cannot_be_encoded_says_which(command: Any) -> None:
    with pytest.raises(UnsendableError, match=type(command).__name__):
        m.encode(m.ReplicaEnvelope("driver", 1, 1, command))
