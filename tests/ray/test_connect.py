"""Joining a cluster that asks for a token: one line for people, and nothing of Ray's own below it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .heads import Head, ray_head

JOIN = """
import sys
from rayk import InferenceSession, RaykError
try:
    with InferenceSession("ray", sys.argv[1], log_to_driver=False, logging_level="error"):
        print("joined")
except RaykError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def guarded(ray_tmpdir: Path) -> Iterator[Head]:
    """A cluster that lets in who has its token."""
    folder = ray_tmpdir / "tok"
    folder.mkdir()
    with ray_head(folder, 1, 80_000_000, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="the right one") as head:
        yield head


def join(guarded: Head, **own: str) -> tuple[str, str]:
    """What a driver says on stdout and on stderr."""
    place, environment = guarded
    done = subprocess.run(
        [sys.executable, "-c", JOIN, place], env=environment | own, capture_output=True, text=True, timeout=120
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({}, "it is not set here"),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_TOKEN is not set here"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a wrong one"}, "RAY_AUTH_TOKEN here has another"),
    ],
)
def test_who_has_no_token_is_told_what_to_set(guarded: Head, own: dict[str, str], says: str) -> None:
    out, err = join(guarded, **own)
    assert out.startswith("ConfigError the Ray cluster at '127.0.0.1:") and says in out and "RAY_AUTH_MODE" in out
    assert out.count("\n") == 1 and err == ""


def test_who_has_it_is_let_in(guarded: Head) -> None:
    out, _ = join(guarded, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="the right one")
    assert out == "joined\n"
