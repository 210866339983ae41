"""`rayk bench core`: the work that it times is the work that it names, and a limit that is exceeded is said."""

import gc
import json
from pathlib import Path

import pytest

from rayk.bench.core import cache, command, decode
from rayk.bench.core.cache import PAGE_SIZE, Listener, make_contexts, make_manager, random_prompts
from rayk.bench.core.case import CoreResult, make_figure
from rayk.bench.core.clock import REFERENCE_US, Unit, quiet
from rayk.bench.core.command import notes, result_table
from rayk.bench.core.decode import Decode
from rayk.bench.core.limits import BOUNDS, Bound
from rayk.bench.core.lookups import OWN, SHARED, Indexed, Lookups
from rayk.bench.core.memory import measure_start
from rayk.bench.core.prompts import PROMPT, Prompts, SharedPrefix, filling, serve
from rayk.bench.core.run import GROUPS, make_cases
from rayk.bench.core.tiers import Copies, Miss, Offloading
from rayk.bench.core.trace_case import Served
from rayk.cli import main as cli
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.manager.manager import PagedKVCacheManager


def ran(workload: Prompts | SharedPrefix | Decode | Served) -> tuple[float, KVCacheMetrics]:
    prepared = workload.run(0.0)
    figure = prepared.work()
    assert prepared.manager is not None
    return figure, prepared.manager.get_metrics_aggregated()


def test_cold_prompts_share_nothing_and_fit() -> None:
    figure, metrics = ran(Prompts(5, pages=1000))
    assert figure > 0
    assert (metrics.input_tokens, metrics.cache_tokens, metrics.evicted_blocks) == (5 * PROMPT, 0, 0)


def test_a_full_pool_evicts_for_each_request() -> None:
    pages = 1000
    _, metrics = ran(Prompts(5, pages, filling(pages)))
    prompt_pages = PROMPT // PAGE_SIZE
    assert metrics.evicted_blocks == (filling(pages) + 5) * prompt_pages - pages


def test_requests_of_a_prefix_reuse_it() -> None:
    _, metrics = ran(SharedPrefix(10))
    assert metrics.cache_tokens == 9 * 4096 and metrics.input_tokens == 4096 + 10 * 128


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_hashed_runs_hash_every_cached_page(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    listeners: list[Listener] = []

    class Kept(Listener):
        def __init__(self) -> None:
            super().__init__()
            listeners.append(self)

    monkeypatch.setattr(cache, "Listener", Kept)
    prepared = Prompts(5, 1000, filling(1000), algorithm).run(0.0)
    prepared.work()
    prompt_pages = (filling(1000) + 5) * PROMPT // PAGE_SIZE
    assert (listeners[0].stored_pages, listeners[0].removed_pages) == (prompt_pages, prompt_pages - 1000)
    assert prepared.manager.params.kv_hash_algo == algorithm


@pytest.mark.parametrize("many", [False, True])
def test_each_decode_step_gives_a_page_to_a_sixteenth_of_the_batch(monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    managers: list[PagedKVCacheManager] = []
    monkeypatch.setattr(decode, "make_manager", lambda **wanted: managers.append(make_manager(**wanted)) or managers[0])
    prepared = Decode(32, 16, many).run(0.0)
    used = managers[0].get_num_used_pages(0)
    assert prepared.work() > 0
    assert managers[0].get_num_used_pages(0) == used + 16 * 32 // PAGE_SIZE
    assert managers[0].get_metrics_aggregated().input_tokens == sum(PROMPT + i % 16 for i in range(32)) + 16 * 32


def test_lookups_find_what_the_index_holds() -> None:
    indexed = Indexed(8, 5000)
    index = indexed.index
    assert 5000 - OWN < len(index) <= 5000 and len(indexed.requests) == (5000 - 8 * SHARED) // OWN
    for number, keys in enumerate(indexed.requests):
        assert index.best(keys) == (SHARED + OWN, number % 8)
        expected = [SHARED + OWN if replica == number % 8 else SHARED for replica in range(8)]
        assert index.reach(keys).device.tolist() == expected
    assert Lookups(indexed, scores=False, distinct=5).run(0.0).work() > 0
    assert Lookups(indexed, scores=True, distinct=5000).run(0.0).work() > 0


def test_served_chats_hit_what_an_independent_lru_hits() -> None:
    served = Served(None, 60)
    _, metrics = ran(served)
    assert served.workload.kind == "chat" and metrics.prompt_tokens == sum(
        request.prompt_length for request in served.workload.requests
    )
    assert metrics.cache_hit_rate == served.lru_hit_rate() > 0.1


def test_a_trace_is_read_and_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2 + i]} for i in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    served = Served(trace, 3)
    _, metrics = ran(served)
    assert metrics.cache_tokens == 2 * 512 and metrics.prompt_tokens == 1800
    assert (served.name, served.workload.kind) == ("trace.jsonl", "mooncake")


def test_what_is_timed_leaves_nothing_claimed() -> None:
    manager = make_manager(1000)
    contexts = make_contexts(random_prompts(3, 40))
    serve(manager, contexts)
    assert manager.get_num_used_pages(0) == 0
    assert [ctx.tokens.length for ctx in contexts] == [41] * 3  # each got its first token


def test_clock_readings_are_taken_off() -> None:
    manager = make_manager(1000)
    with_readings = serve(manager, make_contexts(random_prompts(3, 40)), lap_ns=0)
    assert with_readings > 0
    assert serve(manager, make_contexts(random_prompts(3, 40), "again"), lap_ns=10**9) < -(10**9)


def test_the_unit_is_positive_and_garbage_waits() -> None:
    unit = Unit()
    unit.sample()
    assert unit.us > 0 and unit.speed == unit.us / REFERENCE_US
    with quiet():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_limits_scale_with_the_machine() -> None:
    slow = make_figure("w1", "t", "us", [20.0], 2.0, bound=Bound(13.0, 65.0, "x"))
    assert (slow.limit_here, slow.at_reference, slow.ok, slow.times_faster) == (26.0, 10.0, True, 6.5)
    fast = make_figure("w1", "t", "us", [8.0], 0.5, bound=Bound(13.0))
    assert (fast.limit_here, fast.at_reference, fast.ok, fast.times_faster) == (6.5, 16.0, False, None)
    memory = make_figure("m", "t", "MB", [300.0], 0.5, bound=Bound(400.0, scaled=False))
    assert (memory.limit_here, memory.at_reference, memory.ok) == (400.0, 300.0, True)
    assert make_figure("n", "t", "us", [1.0], bound=Bound()).ok is None


def test_tiers_cost_something_and_leave_nothing() -> None:
    miss, decoding = Miss(rounds=1), Offloading(steps=8)
    assert miss.run(0.0).work() > 0
    ratio = decoding.run(0.0).work()
    assert 0.1 < ratio < 10
    for workload in (miss, decoding):
        plain, tiered = workload._cores
        assert plain.connector is None and tiered.connector is not None
        tiered.connector.check_integrity()
    assert decoding._cores[1].metrics.disk_blocks_written == 32 + 2  # one of each prompt; every fourth step fills one
    assert Copies(2048, 8, out=True).run(0.0).work() > 0
    assert Copies(2048, 32, out=False).run(0.0).work() > 0


def test_every_case_has_its_bound() -> None:
    assert {case.key for case in make_cases(GROUPS, None, smoke=True)} <= BOUNDS.keys()


def test_a_core_starts_in_a_process_of_its_own() -> None:
    start = measure_start(1000)
    assert start.cpu_s > 0 and start.wall_s > 0 and start.beyond_bytes < 100e6


def result(value: float) -> CoreResult:
    figure = make_figure("w1", "cold", "us", [value], details={"hit_rate": 0.5})
    return CoreResult(command="bench core", version="0", environment={}, unit_us=REFERENCE_US, figures=[figure])


def test_the_table_says_what_is_over() -> None:
    rows = result_table(result(99.0))
    cells = {str(column.header): list(column.cells) for column in rows.columns}
    assert cells["here"] == ["99.0 us"] and cells["limit here"] == ["13.0"] and "over" in str(cells[" "][0])
    assert cells["times"] == ["0.7"] and notes(result(99.0)) == ["w1: hit rate 0.5"]


@pytest.mark.parametrize(("value", "code"), [(12.0, 0), (14.0, 1)])
def test_check_fails_when_a_limit_is_exceeded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, value: float, code: int
) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_: result(value))
    assert cli.main(["bench", "core", "--check", "--format", "json", "--out", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "core.json").read_text()) and ("w1 is 14 us" in err) == bool(code)
    assert cli.main(["bench", "core"]) == 0


def test_a_smoke_run_measures_what_was_picked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "core", "--smoke", "--only", "w2", "--format", "json"]) == 0
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert figure["key"] == "w2" and figure["details"] == {"hit_rate": pytest.approx(99 * 4096 / (100 * 4224))}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["core", "--only", "w9"], "--only 'w9' is not one of w1, w2"),
        (["core", "--repeat", "0"], "--repeat is 0"),
        (["core", "--smoke", "--check"], "too short to judge by"),
        (["core", "--only", "w4", "--trace", "/does/not/exist"], "cannot be read"),
        (["--smoke", "core"], "--smoke stands before core"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert cli.main(["bench", *argv]) == 2
    assert words in capsys.readouterr().err
