"""How many threads torch uses while an inline Cluster serves, and after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rayk import Cluster
from rayk.engine.threads import TorchThreads
from rayk.errors import ConfigError

from .fake import PageModel


@pytest.fixture(autouse=True)
def two() -> Iterator[None]:
    """The caller's own number, unlike any that the tests ask for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Counting(PageModel):
    """Notes the number of threads of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def logits(self, *args: Any) -> torch.Tensor:
        self.threads.add(torch.get_num_threads())
        return super().logits(*args)


def serving(threads: int | None, counting: Counting) -> Cluster:
    def make(device: str) -> Counting:
        counting.threads.add(torch.get_num_threads())  # where a model is tried out
        return counting

    return Cluster(make, page_size=4, pages=8, threads=threads, device="cpu")


@pytest.mark.parametrize(("threads", "used"), [(1, 1), (3, 3), (None, 2)])
def test_the_number_is_used_and_given_back(threads: int | None, used: int) -> None:
    counting = Counting()
    with serving(threads, counting) as cluster:
        cluster.generate([[5, 6]], max_new_tokens=2)
        assert counting.threads == {used} and torch.get_num_threads() == used
    assert torch.get_num_threads() == 2


def test_clusters_that_overlap_keep_their_own() -> None:
    one, three = Counting(), Counting()
    first = serving(1, one)
    with serving(3, three) as second:
        for cluster in (first, second, first):
            cluster.generate([[5, 6]], max_new_tokens=2)
        first.close()
        assert torch.get_num_threads() == 3
    assert (one.threads, three.threads) == ({1}, {3})
    assert torch.get_num_threads() == 2


def test_what_the_caller_sets_meanwhile_is_left() -> None:
    held = TorchThreads(1)
    torch.set_num_threads(4)
    held.release()
    held.release()
    assert torch.get_num_threads() == 4


def test_a_cluster_that_does_not_start_gives_it_back() -> None:
    def broken(device: str) -> Any:
        raise ConfigError("no model")

    with pytest.raises(ConfigError, match="no model"):
        Cluster(broken, threads=1, device="cpu")
    assert torch.get_num_threads() == 2


def test_none_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="threads"):
        Cluster(lambda device: Counting(), threads=0)
