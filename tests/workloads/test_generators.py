"""The generators have the shape that their docstrings promise, and are the same for the same seed."""

import numpy as np
import pytest

from rayk.simulate.replay import Event, replay
from rayk.workloads.generators import GENERATORS, agent, chat, random
from rayk.workloads.request import Workload


def infinite_hit_rate(workload: Workload, page_size: int) -> float:
    events = []
    for request in workload.requests:
        whole = request.prompt_length + request.output_length - 1
        events += [Event("admit", request.index, request.prompt_length), Event("release", request.index, whole)]
    rate = replay(events, workload.requests, page_size, None).hit_rate
    assert rate is not None
    return rate


@pytest.mark.parametrize("name", GENERATORS)
def test_same_seed_same_requests(name: str) -> None:
    one, two, other = (GENERATORS[name](60, seed=seed) for seed in (3, 3, 4))
    assert [r.prompt().tobytes() for r in one.requests] == [r.prompt().tobytes() for r in two.requests]
    assert [r.prompt_length for r in one.requests] != [r.prompt_length for r in other.requests]
    assert [r.index for r in one.requests] == list(range(60))
    assert len({r.request_id for r in one.requests}) == 60


@pytest.mark.parametrize("name", GENERATORS)
def test_lengths_are_those_of_the_tokens(name: str) -> None:
    for request in GENERATORS[name](30, seed=1, scale=0.02).requests:
        assert len(request.prompt()) == request.prompt_length >= 1
        assert len(request.output()) == request.output_length >= 2


@pytest.mark.parametrize("make", [chat, agent])
def test_the_next_turn_quotes_the_answer(make: object) -> None:
    requests = make(300, seed=0, scale=0.02).requests  # type: ignore[operator]
    followed = [r for r in requests if r.after is not None]
    assert followed
    for request in followed:
        before = requests[request.after]
        said = np.concatenate([before.prompt(), before.output()])
        assert before.index < request.index and before.session_id == request.session_id
        assert np.array_equal(request.prompt()[: len(said)], said)


def test_chat_has_the_shape_of_conversations() -> None:
    requests = chat(3000, seed=0, scale=1.0).requests
    continued = np.mean([r.after is not None for r in requests])
    system = requests[0].prompt()[:512]
    opening = [r for r in requests if r.after is None]
    branched = [r for r in opening if r.runs[0, 1] == 512 and len(r.runs) > 2]
    assert 0.28 < continued < 0.38
    assert 0.03 < len(branched) / len(requests) < 0.09
    assert all(np.array_equal(r.prompt()[:512], system[: r.prompt_length]) for r in opening[:200])
    turns: dict[str | None, int] = {}
    for request in requests:
        turns[request.session_id] = turns.get(request.session_id, 0) + 1
    assert 1.3 < np.mean(list(turns.values())) < 1.6 and 4 <= np.percentile(list(turns.values()), 99) <= 9
    assert 5000 < np.percentile([r.prompt_length for r in requests], 50) < 10_000
    assert 320 < np.mean([r.output_length for r in requests]) < 380


def test_agents_reuse_almost_everything_and_random_nothing() -> None:
    assert infinite_hit_rate(agent(400, seed=0), 64) > 0.85
    assert 0.25 < infinite_hit_rate(chat(400, seed=0), 64) < 0.55
    assert infinite_hit_rate(random(50, seed=0), 16) == 0
