"""A driver that was silent for longer than its lease, and wakes: what it says about its requests is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rayk import PagedKVCacheManager, TextContext, Tick
from rayk.errors import LeaseLostError, NotClaimedError, NotOwnerError, by_name
from rayk.manager.lease import LEASE_SECONDS

from ..actors.fake import FakeRuntime, chain, contents, stamp  # noqa: TID252  # tests/ is no package that has an absolute name
from .test_lease import Attach, Pass, attach, client_of, first, now, pass_, runtime  # noqa: F401  # fixtures

Call = Callable[[PagedKVCacheManager, TextContext], Any]
CALLS: dict[str, Call] = {
    "alloc": lambda m, c: m.alloc(c, 0),
    "alloc_many": lambda m, c: m.alloc_many([[c], []]),
    "step": lambda m, c: m.step([[c], []]),
    "execute": lambda m, c: m.execute([[c], []], stamp),
    "runtime_inputs": lambda m, c: m.runtime_inputs([[c], []]),
    "tick": lambda m, c: m.tick([Tick(step=[c], alloc=[c], execute=[c]), Tick()], stamp),
    "tick-release": lambda m, c: m.tick([Tick(release=["r"]), Tick()]),
    "blocks": lambda m, c: m.get_req_blocks("r", 0),
    "release": lambda m, c: m.release("r", 0),
}


def started(manager: PagedKVCacheManager, tokens: list[int]) -> TextContext:
    """The request r, prefilled, on replica 0."""
    ctx = TextContext("r", tokens, 100)
    [admission] = manager.try_admit([ctx], [0])
    assert admission.error is None
    manager.execute([[ctx], []], stamp)
    ctx.update(7)
    manager.step([[ctx], []])
    manager.alloc(ctx, 0)
    return ctx


@pytest.mark.parametrize("elsewhere", [False, True])
def test_calls_about_what_another_driver_has_now_are_refused(
    runtime: FakeRuntime,  # noqa: F811
    first: PagedKVCacheManager,  # noqa: F811
    pass_: Pass,  # noqa: F811
    attach: Attach,  # noqa: F811
    elsewhere: bool,
) -> None:
    frozen, other = attach(), attach()
    mine = started(frozen, list(range(9)))
    pass_(LEASE_SECONDS + 1)
    theirs = started(other, [50 + i for i in range(9)]) if not elsewhere else None
    before = other.get_req_blocks("r", 0), mine.tokens.all.tolist(), mine.tokens.processed
    for _ in range(2):
        for name, call in CALLS.items():
            if theirs is None and name == "blocks":
                assert call(frozen, mine) == []
                continue
            with pytest.raises(LeaseLostError, match="'r' on replica 0") as caught:
                call(frozen, mine)
            error = caught.value
            assert (error.request_id, error.replica, error.client) == ("r", 0, client_of(frozen))
            assert error.owner == (client_of(other) if theirs is not None else "")
            assert (error.owner_generation > error.generation > 0) == (theirs is not None)
            assert by_name("LeaseLostError") is LeaseLostError and isinstance(error, NotClaimedError)
            assert (other.get_req_blocks("r", 0), mine.tokens.all.tolist(), mine.tokens.processed) == before
    if theirs is not None:
        other.execute([[theirs], []], stamp)
        assert contents(other, "r", 0, 10) == chain(theirs.tokens.all.tolist())
        with pytest.raises(LeaseLostError):
            first.release("r", 0)
        first.release("r", 0, force=True)
        with pytest.raises(LeaseLostError):
            other.step([[theirs], []])
    again = started(frozen, [80 + i for i in range(9)])
    assert contents(frozen, "r", 0, 9) == chain(again.tokens.all.tolist())[:9]
    with pytest.raises((LeaseLostError, ValueError)):
        frozen.step([[mine], []])
    frozen.release("r", 0)
    with pytest.raises(NotClaimedError, match="call claim"):
        frozen.release("r", 0)
    frozen.check_integrity()


def test_a_cluster_is_shut_down_by_who_started_it(
    runtime: FakeRuntime,  # noqa: F811
    first: PagedKVCacheManager,  # noqa: F811
    pass_: Pass,  # noqa: F811
    attach: Attach,  # noqa: F811
) -> None:
    with attach() as guest:
        with pytest.raises(NotOwnerError, match=client_of(first)):
            guest.shutdown()
        guest.check_integrity()
    first.check_integrity()
    second, third = attach(), attach()
    with pytest.raises(NotOwnerError):
        second.shutdown()
    pass_(LEASE_SECONDS + 1)
    second.shutdown()
    assert all(actor.stopped for actor in runtime.actors)
    third.leave()


def test_force_ends_a_cluster_for_all(runtime: FakeRuntime, first: PagedKVCacheManager, attach: Attach) -> None:  # noqa: F811
    guest = attach()
    guest.shutdown(force=True)
    with pytest.raises(RuntimeError):
        first.check_integrity()
