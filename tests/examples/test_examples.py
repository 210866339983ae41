"""The examples run as a user would run them, and print what docs/manager.md shows."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(repo: Path, name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(repo / "examples" / name)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(repo: Path) -> None:
    out = run(repo, "quickstart.py")
    assert "first: 0 of 103 tokens reused" in out
    assert "second: 96 of 103 tokens reused" in out
    assert "pages free again: 64 of 64" in out
    assert out in (repo / "docs" / "manager.md").read_text()


@pytest.mark.ray
def test_driver(repo: Path) -> None:
    out = run(repo, "driver.py")
    assert "carol went to replica 0 and reused 96 of 103 tokens" in out
    assert "dave reused 112 of 124 tokens on replica 1" in out
    assert "1 page(s) copied between replicas" in out
    assert "free pages: [256, 256]" in out
    assert out in (repo / "docs" / "manager.md").read_text()


def test_autoscale(repo: Path) -> None:
    out = run(repo, "autoscale.py")
    assert out in (repo / "docs" / "manager.md").read_text()
