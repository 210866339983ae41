"""The recorded traffic of ../shared/conformance, replayed through rayk's public surface: no answer may differ.

In this process all cases, on Ray a few that cross process borders in each way.
Where the clone has no ../shared beside it, this module is skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rayk

CONFORMANCE = Path(__file__).resolve().parents[3] / "shared" / "conformance"
CASES = CONFORMANCE / "public"
ON_RAY = ("c05", "c10", "c12", "c16", "c17", "c18", "c22b", "c22d", "c25")

if not CASES.is_dir():
    pytest.skip("../shared/conformance not found beside the clone: conformance skipped", allow_module_level=True)


def import_replay() -> ModuleType:
    """The harness, which finds its neighbours by plain imports; sys.path is as before afterwards."""
    sys.path.insert(0, str(CONFORMANCE))
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is not ours
    try:
        import replay
    finally:
        sys.dont_write_bytecode = write_bytecode
        sys.path.remove(str(CONFORMANCE))
    return replay


replay = import_replay()
FILES = {name: (ops, outs) for name, ops, outs in replay.find_cases(CASES, "")}


def load(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    ops, outs = FILES[name]
    return replay.read_jsonl(ops), replay.read_jsonl(outs)


@pytest.fixture(scope="module")
def inline() -> Iterator[rayk.InferenceSession]:
    with rayk.InferenceSession("inline") as session:
        yield session


@pytest.fixture(scope="module")
def on_ray() -> Iterator[rayk.InferenceSession]:
    import ray

    # The workers cannot import the harness, which is on no path of theirs: its functions travel by value.
    ray.cloudpickle.register_pickle_by_value(replay)
    try:
        with rayk.InferenceSession("ray", address=None if ray.is_initialized() else "local") as session:
            yield session
    finally:
        ray.cloudpickle.unregister_pickle_by_value(replay)


def test_there_are_cases() -> None:
    assert len(FILES) >= 32
    assert all(any(name.startswith(prefix) for name in FILES) for prefix in ON_RAY)


@pytest.mark.parametrize("name", list(FILES))
def test_inline(name: str, inline: rayk.InferenceSession) -> None:
    assert replay.replay_case(*load(name), inline, "inline") == []


@pytest.mark.ray
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(ON_RAY)])
def test_on_ray(name: str, on_ray: rayk.InferenceSession) -> None:
    assert replay.replay_case(*load(name), on_ray, "ray") == []


def test_a_wrong_answer_is_noticed(inline: rayk.InferenceSession) -> None:
    ops, outs = load("c18_hits_other_replica")
    at = next(i for i, op in enumerate(ops) if op["op"] == "hit_counts")
    outs[at]["value"][0][0] += 1
    problems = replay.replay_case(ops, outs, inline, "inline")
    assert len(problems) == 1 and problems[0].startswith(f"op {at} hit_counts")


def test_a_page_with_wrong_content_is_noticed(inline: rayk.InferenceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_to_land(exports: object, pages: Sequence[int], *_: object) -> int:
        """Pages copied from another replica keep whatever they held, and count as copied."""
        return len(pages)

    monkeypatch.setattr("rayk.kvcache.page_pins.PagePins.land", forget_to_land)
    problems = replay.replay_case(*load("c05_two_replicas"), inline, "inline")
    assert problems and all(" check " in problem for problem in problems)
