"""Messages that Ray would put into its object store go in pieces, and arrive whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayk import TextContext
from rayk.actors.chunks import LONGEST, PIECE, cut, joined

from .fake import FakeRuntime, manager_on


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 7, LONGEST, LONGEST + 1])
def test_what_was_cut_is_joined(size: int) -> None:
    wire = np.random.default_rng(size).bytes(size)
    first, *rest = cut(wire)
    assert joined(first, [*rest, "page data"]) == (wire, ["page data"])
    assert (len(rest) > 0) == (PIECE < size <= LONGEST)
    assert all(len(piece) <= PIECE for piece in rest)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_large_batch_arrives_in_pieces(lazy: bool) -> None:
    runtime = FakeRuntime(lazy=lazy)
    calls: dict[str, list[int]] = {}

    def watch(label: str) -> None:
        instance, handle = runtime.actor(label).instance, runtime.actor(label).instance.handle

        def handled(*args: Any) -> bytes:
            calls.setdefault(label, []).append(len(args))
            reply: bytes = handle(*args)
            return reply

        instance.handle = handled

    with manager_on(runtime, pages=11_000, enable_dp_cross_replica_prefix_copy=False) as manager:
        for label in ("scheduler", "replica-0", "replica-1"):
            watch(label)
        prompts = np.random.default_rng(1).integers(0, 1000, (12, 5000), np.int32)  # 20,000 bytes each
        ctxs = [TextContext(f"r{i}", prompt, 6000) for i, prompt in enumerate(prompts)]
        assert all(a.error is None for a in manager.try_admit(ctxs, [0] * 4 + [1] * 8))
        assert calls == {"scheduler": [1 + 3], "replica-0": [1], "replica-1": [1 + 2]}
        mirrors = runtime.actor("replica-1").service._mirrors._contexts
        assert all(np.array_equal(mirrors[f"r{i}"].tokens.all, prompts[i]) for i in range(4, 12))
