"""Any caches, offered in any portions, with any faults: nothing that was there is lost, and nothing wrong is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk import protocol as m
from rayk.errors import LineError, ReplicaLostError
from rayk.kvcache.evacuation import spare_pages
from rayk.kvcache.replica import ReplicaCore
from rayk.scheduler.membership import State
from rayk.scheduler.script import ReplicaCall
from rayk.scheduler.transfers import evacuation as offering

from ..unit.conftest import values  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.kvcache.test_page_pins import serve  # noqa: TID252  # as above
from ..unit.scheduler.transfers.test_evacuation import Replicas  # noqa: TID252  # as above

FAULTS = [m.failure(ReplicaLostError(9, 7, [], "it died")), m.failure(LineError("shared-memory", 1, "a fault"))]
PROMPT = st.lists(st.integers(0, 2), min_size=3, max_size=17)
HISTORY = st.lists(st.tuples(PROMPT, st.booleans()), max_size=9)


def cached(at: ReplicaCore) -> dict[tuple[object, bytes], int]:
    """Every cached page by salt and the tokens up to its end; what is in each is right."""
    found: dict[tuple[object, bytes], int] = {}
    paths: dict[int, bytes] = {}
    for node in at.tree.segments():
        assert node.parent is not None
        above = paths.get(id(node.parent), b"")
        paths[id(node)] = whole = above + node.tokens
        root = node
        while root.parent is not None:
            root = root.parent
        [content] = at.buffers.read(node.pages)
        want = values(np.frombuffer(whole, np.int32))[len(above) // 4 :]
        assert content[:, 0, 0, :, 0, 0].flatten().tolist() == want.tolist()
        for i, page in enumerate(node.pages.tolist()):
            found[root.key, whole[: len(above) + 8 * (i + 1)]] = page  # type: ignore[attr-defined]  # a root has one
    return found


def resident(found: dict[tuple[object, bytes], int], prefix: m.CachedPrefix) -> int:
    """Pages of a prefix that are among those."""
    key, tokens = (prefix.cache_salt, prefix.adapter), prefix.tokens
    return sum((key, tokens[: 8 * (i + 1)]) in found for i in range(len(tokens) // 8))


@settings(settings.get_profile("rayk-machines"))
@given(
    histories=st.lists(HISTORY, min_size=2, max_size=4),
    sizes=st.lists(st.integers(9, 40), min_size=4, max_size=4),
    states=st.lists(st.sampled_from([State.ready, State.ready, State.draining]), min_size=4, max_size=4),
    portions=st.tuples(st.integers(1, 5), st.integers(1, 120), st.integers(1, 200)),
    faults=st.dictionaries(st.integers(0, 40), st.sampled_from(FAULTS), max_size=3),
)
def test_any_offering(
    histories: list[list[tuple[list[int], bool]]],
    sizes: list[int],
    states: list[State],
    portions: tuple[int, int, int],
    faults: dict[int, m.Failure],
) -> None:
    replicas = Replicas(*sizes[: len(histories)])
    for at, history in zip(replicas.cores, histories, strict=True):
        for i, (tokens, salted) in enumerate(history):
            serve(at, f"r{i}", tokens, cache_salt="s" if salted else None)
    running = [serve(at, "runs", [5] * 5, keep=True) for at in replicas.cores[1:]]
    replicas.ready = [r for r, state in enumerate(states[: len(histories)]) if state is State.ready]
    before, spaces = [cached(at) for at in replicas.cores], {at.replica: spare_pages(at) for at in replicas.cores}
    asked = 0

    def fault(ask: ReplicaCall) -> m.Result | None:
        nonlocal asked
        asked += 1
        failure = faults.get(asked)
        if failure is not None and isinstance(ask.command, m.Acknowledge):
            replicas.exchanges[0].answer(ask.command)  # or its pins would stay until their time is up
        return failure

    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("PREFIXES", "TOKEN_BYTES", "ROUND_BYTES"), portions, strict=True):
            patch.setattr(offering, name, value)
        removed = replicas.go(change=fault)
    after = [cached(at) for at in replicas.cores]
    assert after[0] == before[0]
    targets = [r for r in replicas.ready if r]
    for r, (was, now) in enumerate(zip(before, after, strict=True)):
        assert all(now[key] == page for key, page in was.items()), "it is where it was"
        assert set(now) <= set(was) | set(before[0])
        assert len(now) == len(was) or r in targets
    gained = sum(len(now) - len(was) for was, now in zip(before, after, strict=True))
    assert removed.taken <= gained if faults else removed.taken == gained
    assert removed.known <= removed.cached <= len(before[0])
    if not faults and any(space >= len(before[0]) for r, space in spaces.items() if r in targets):
        known = set(before[0]) & set().union(*(before[r] for r in targets))
        assert (removed.cached, removed.known) == (len(before[0]), len(known))
        done, _ = replicas.exchanges[0].answer(m.GetPrefixes(0, 999, 1 << 30))
        assert isinstance(done, m.PrefixesDone)
        for prefix in done.prefixes:
            assert max(resident(after[r], prefix) for r in targets) == len(prefix.tokens) // 8, "somebody has all of it"
    for at, ctx in zip(replicas.cores[1:], running, strict=True):
        at.release(ctx.request_id)
        at.check_integrity()
