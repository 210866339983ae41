"""Settings are checked when made, and completed with pages that suit the workload."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rayk.bench.settings import LEAST_HOST_PAGES, BenchSettings, complete, default_pages, free_bytes, with_tiers
from rayk.errors import ConfigError
from rayk.workloads.request import RequestTooLargeError, Workload

Lengths = Callable[..., Workload]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"replicas": 0}, "--replicas is 0, at least 1"),
        ({"page_size": -4}, "--page-size is -4"),
        ({"token_budget": 0}, "--token-budget is 0"),
        ({"router": "magic"}, "--router 'magic' is not one of cost, round-robin, least-loaded, prefix, session"),
        ({"forward": "magic"}, "--forward 'magic'"),
        ({"runtime": "magic"}, "--runtime 'magic'"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        BenchSettings(**values)  # type: ignore[arg-type]


def test_pages_as_given_or_from_memory(lengths: Lengths) -> None:
    settings = BenchSettings(runtime="inline", page_size=4)
    page_bytes = settings.params().bytes_per_page
    workload = lengths([(4, 2)] * 3)
    assert complete(settings, workload, pages=7).pages == 7
    assert complete(settings, workload, memory=f"{5 * page_bytes + 1}").pages == 5
    half = complete(settings, workload, memory="0.5").pages
    assert half * page_bytes == pytest.approx(free_bytes(settings) / 2, rel=0.2)
    with pytest.raises(ConfigError, match="exclude each other"):
        complete(settings, workload, pages=7, memory="1GiB")
    with pytest.raises(ConfigError, match="--pages is 0"):
        complete(settings, workload, pages=0)
    with pytest.raises(ConfigError, match=r"--memory 10 is 10 B, one page takes 1.00 KiB; give more"):
        complete(settings, workload, memory="10")


def test_default_pages_hold_the_largest_request_and_a_few_batches(lengths: Lengths) -> None:
    settings = BenchSettings(runtime="inline", page_size=4, replicas=2, concurrency=8)
    assert default_pages(settings, lengths([(7, 2)] * 10)) == 3 * 4 * 2
    assert default_pages(settings, lengths([(7, 2)] * 9 + [(399, 2)])) >= 100
    assert complete(settings, lengths([(7, 2)])).pages == 24


def test_one_request_too_large_is_named_before_anything_starts(lengths: Lengths) -> None:
    settings = BenchSettings(runtime="inline", page_size=4)
    with pytest.raises(RequestTooLargeError, match=r"request 'r1' .* needs 5 pages .* a replica has 4"):
        complete(settings, lengths([(4, 2), (18, 2)]), pages=4)
    timed = BenchSettings(runtime="inline", page_size=4, duration_s=1.0)
    assert complete(timed, lengths([(4, 2), (18, 2)]), pages=4).pages == 4


def test_tiers_from_memory(tmp_path: Path) -> None:
    settings = BenchSettings(runtime="inline", page_size=4)
    page_bytes = settings.params().bytes_per_page
    none = with_tiers(settings, None, None, None)
    assert (none.host_pages, none.connector) == (0, "null")
    local = with_tiers(settings, f"{7 * page_bytes}", None, None)
    assert (local.host_pages, local.connector) == (7, "local")
    both = with_tiers(settings, "1MiB", tmp_path, "2MiB")
    assert (both.host_pages, both.disk_bytes, both.connector) == ((1 << 20) // page_bytes, 2 << 20, "tiered")
    assert with_tiers(settings, None, tmp_path, "2MiB").host_pages == (2 << 20) // 8 // page_bytes
    assert with_tiers(settings, None, tmp_path, f"{2 * page_bytes}").host_pages == LEAST_HOST_PAGES
    assert both.params().kv_connector_config.disk_offload_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("host", "folder", "disk", "problem"),
    [
        ("10", None, None, "--host-memory 10 is 10 B, one page takes"),
        (None, Path("x"), None, "go together"),
        (None, None, "1GiB", "go together"),
        (None, Path("/"), "10", "--disk-memory 10 does not hold a page"),
    ],
)
def test_tiers_that_cannot_be_had(host: str | None, folder: Path | None, disk: str | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        with_tiers(BenchSettings(runtime="inline"), host, folder, disk)
