"""Sizes and durations as people write them."""

import pytest

from rayk.errors import ConfigError
from rayk.quantity import parse_duration, parse_size, show_bytes, show_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 << 30),
        ("2 MiB", 2 << 20),
        ("1.5KiB", 1536),
        ("1GB", 10**9),
        ("4096", 4096),
        ("0.5", 500),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, free_bytes=1000) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "0.0", "GiB", "3 apples", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write 16GiB"):
        parse_size(text, free_bytes=1000)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("2m", 120), ("1.5h", 5400), ("250ms", 0.25), ("7", 7)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0s", "-2m", "2 years", "m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_duration(text)


def test_what_people_read() -> None:
    assert [show_bytes(n) for n in (12, 2048, 3 << 30, 5 << 40)] == ["12 B", "2.00 KiB", "3.00 GiB", "5.00 TiB"]
    assert [show_seconds(s) for s in (2e-6, 0.0123, 5, 2000)] == ["2 µs", "12.3 ms", "5 s", "2000 s"]
