"""Small workloads whose prompts share a lot."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rayk.workloads.request import BenchRequest, Workload

Made = Callable[..., list[BenchRequest]]
Tangled = Callable[[int, int], list[BenchRequest]]
PageTexts = Callable[[BenchRequest, int], tuple[list[bytes], int]]


def _made(prompts: Sequence[Sequence[tuple[int, int]]], outputs: int = 5, step: float = 1.0) -> list[BenchRequest]:
    """Requests with these runs as prompts, one every `step` seconds; answer i is -1000 * (i + 1), .., going down."""
    return [
        BenchRequest(
            i, f"r{i}", i * step, None, sum(n for _, n in runs), outputs, np.array(runs, np.int64), -1000 * (i + 1)
        )
        for i, runs in enumerate(prompts)
    ]


def _tangled(seed: int, requests: int) -> list[BenchRequest]:
    """Random prompts that share system text, extend each other (answers quoted, whole or cut) and branch."""
    random = np.random.default_rng(seed)
    prompts: list[list[tuple[int, int]]] = []
    out: list[BenchRequest] = []
    for i in range(requests):
        fresh = (1_000 + 100 * i, int(random.integers(1, 30)))
        kind = random.random()
        if not prompts or kind < 0.4:
            runs = [(0, int(random.integers(1, 20))), fresh]
        else:
            before = int(random.integers(len(prompts)))
            runs = list(prompts[before])
            if kind < 0.7:
                runs.append((-1000 * (before + 1), int(random.integers(1, 8))))
            else:
                first, count = runs[-1]
                runs[-1] = (first, int(random.integers(1, count + 1)))
            runs += [fresh] if kind < 0.9 else []
        prompts.append(runs)
        tokens, answer = sum(n for _, n in runs), int(random.integers(1, 9))
        out.append(BenchRequest(i, f"r{i}", float(i), None, tokens, answer, np.array(runs, np.int64), -1000 * (i + 1)))
    return out


def _page_texts(request: BenchRequest, page_size: int) -> tuple[list[bytes], int]:
    """The prefixes that end with each full page that the request fills, and how many of them its prompt may reuse."""
    tokens = np.concatenate([request.prompt(), request.output()])[:-1]
    ends = range(page_size, len(tokens) + 1, page_size)
    return [tokens[:end].tobytes() for end in ends], (request.prompt_length - 1) // page_size


@pytest.fixture
def made() -> Made:
    """Makes requests of given runs."""
    return _made


@pytest.fixture
def tangled() -> Tangled:
    """Makes a number of random requests by seed."""
    return _tangled


@pytest.fixture
def page_texts() -> PageTexts:
    """What the pages of a request hold, and how many its prompt may reuse."""
    return _page_texts


@pytest.fixture
def workload() -> Workload:
    """A hundred tangled requests, one a second."""
    return Workload("test", "test", _tangled(1, 100), {})
