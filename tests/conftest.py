"""What all tests share: where things are, one torch thread, patience, what is collected when, and markers by folder."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from .patience import scaled

REPO = Path(__file__).resolve().parent.parent
MARKED_FOLDERS = {"ray": pytest.mark.ray, "chaos": pytest.mark.ray, "gpu": pytest.mark.gpu}
# What starts clusters comes first: it waits a lot, and what computes alone then fills both processes to the end.
USES_RAY = ("tests/chaos/", "tests/ray/", "tests/conformance/", "tests/examples/")

# Threads of torch, Ray's processes and the test itself would share few cores; and with one thread the order
# of a sum, so its last bit, does not depend on the machine.
torch.set_num_threads(1)

# A deadline per example measures how busy the machine is; pytest-timeout catches what hangs.
settings.register_profile("rayk", deadline=None, print_blob=True)
settings.load_profile("rayk")


@pytest.hookimpl(tryfirst=True)  # before pytest-timeout looks
def pytest_configure(config: pytest.Config) -> None:
    """Give a test on a busy machine more than the `timeout` of a quiet one."""
    if config.getoption("timeout") is None:
        config.option.timeout = scaled(float(config.getini("timeout")))


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """What tests of a module left in cycles lets go of its memory, files and sockets here: not in another module's
    test, which its complaints would fail, and not never. What stays after that is not looked at again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of conformance cases and traces beside the clone; skips the test where there is none."""
    shared = REPO.parent / "shared"
    if not (shared / "conformance").is_dir():
        pytest.skip("../shared not found beside the clone: conformance skipped")
    return shared


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests/ray and tests/gpu by folder, and skip what needs a CUDA device where there is none."""
    no_cuda = pytest.mark.skip(reason="no CUDA device: GPU test skipped")
    has_cuda = torch.cuda.is_available()
    for item in items:
        for folder, marker in MARKED_FOLDERS.items():
            if item.path.resolve().is_relative_to(REPO / "tests" / folder):
                item.add_marker(marker)
        if not has_cuda and item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)
    gc.freeze()
    if hasattr(config, "workerinput"):  # it is one of several processes
        items.sort(key=lambda item: not item.nodeid.startswith(USES_RAY))
