"""A small checkpoint, and copies of it to damage."""

import shutil
from pathlib import Path

import pytest

from .checkpoints import write


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint to change or damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))
