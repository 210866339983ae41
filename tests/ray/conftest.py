"""One embedded cluster for all tests of this folder, and a look at what runs on it from outside."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayk import InferenceSession, PagedKVCacheManager

from .forwards import PAGES, params


@pytest.fixture(scope="session")
def ray_tmpdir() -> Iterator[Path]:
    """Where Ray's files go. Not in pytest's own folder: the paths of Ray's sockets may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="rk-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def session(ray_tmpdir: Path) -> Iterator[InferenceSession]:
    with InferenceSession(
        runtime="ray", address="local", num_cpus=2, object_store_memory=150_000_000, log_to_driver=False
    ) as session:
        yield session


@pytest.fixture(scope="module")
def shared(session: InferenceSession) -> Iterator[PagedKVCacheManager]:
    """Two replicas for the tests of one module that leave nothing claimed behind."""
    with PagedKVCacheManager(params(), session, PAGES, enable_runtime_checks=True, max_batch_size=64) as manager:
        yield manager


@pytest.fixture
def manager(shared: PagedKVCacheManager) -> Iterator[PagedKVCacheManager]:
    """`shared`, checked to be as it was and emptied for the next test."""
    before = [shared.get_num_used_pages(r) for r in range(2)]
    yield shared
    shared.check_integrity()
    assert [shared.get_num_used_pages(r) for r in range(2)] == before, "the test left something claimed"
    shared.reset_prefix_cache()
    shared.reset_metrics()
