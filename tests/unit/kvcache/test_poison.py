"""Errors after which a replica is unfit, and those that are about one call."""

from __future__ import annotations

import pytest
import torch

from rayk.errors import ConfigError, IntegrityError
from rayk.kvcache.poison import Poison


@pytest.mark.parametrize(
    "error",
    [
        IntegrityError("pool", "page 3 is in two places"),
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be .."),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_at_once(error: Exception) -> None:
    poison = Poison()
    assert poison.note(error) and poison.reason.startswith(f"{type(error).__name__}: ")
    assert "\n" not in poison.reason
    poison.note(ValueError("another"))
    assert poison.reason.startswith(type(error).__name__), "the first one is the reason"


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_memory_has_to_run_out_three_times_in_a_row(kind: type[Exception]) -> None:
    poison = Poison()
    assert not poison.note(kind("no room")) and not poison.note(kind("no room"))
    poison.clear()
    assert not poison.note(kind("no room")) and not poison.note(kind("no room")) and poison.note(kind("no room"))


def test_what_is_about_one_call_leaves_it_fit() -> None:
    poison = Poison()
    for error in (ValueError("CUDA is not an error here"), ConfigError("x"), RuntimeError("shapes differ"), KeyError()):
        assert not poison.note(error)
    assert poison.reason == ""
