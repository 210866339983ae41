"""One embedded cluster for all tests of this folder, and one that somebody else started."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray._private.node

from rayk import InferenceSession, PagedKVCacheManager

from ..patience import scaled  # noqa: TID252  # tests/ is no package that has an absolute name
from .forwards import PAGES, params
from .heads import CHECKPOINTS, ONCE, Driver, Head, Start, ray_head, warm_workers


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
    with warm_workers(ray_tmpdir, CHECKPOINTS) as settings, ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            for unused in ("start_log_monitor", "start_monitor"):  # nobody reads logs, and nothing scales
                patch.setattr(ray._private.node.Node, unused, lambda node: None)
            session = InferenceSession(
                runtime="ray", address="local", num_cpus=2, object_store_memory=150_000_000, log_to_driver=False
            )
        yield stack.enter_context(session)


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


@pytest.fixture(scope="session")
def operated(ray_tmpdir: Path) -> Iterator[Head]:
    """A cluster of one node, started as an operator would."""
    folder = ray_tmpdir / "op"
    folder.mkdir()
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_metrics_report_interval_ms": "1000"}  # every 10 s otherwise
    with (
        warm_workers(folder) as warm,
        ray_head(folder, 2, 100_000_000, **settings, **warm) as (address, environment),
    ):
        yield address, environment | settings


@pytest.fixture
def start(operated: Head, tmp_path: Path) -> Iterator[Start]:
    """Start a driver of that cluster; all are ended with the test."""
    address, environment = operated
    drivers: list[Driver] = []

    def run(code: str, name: str = "") -> Driver:
        script = tmp_path / f"driver_{len(drivers)}.py"
        script.write_text(f"SCALE = {scaled(1.0)}\n" + ONCE + code)
        command = [sys.executable, str(script), address, name]
        with (tmp_path / f"driver_{len(drivers)}.err").open("w") as errors:
            drivers.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
        return drivers[-1]

    yield run
    for driver in drivers:
        driver.kill()
        driver.communicate(timeout=30)
