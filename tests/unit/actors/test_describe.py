"""The plan that a running cluster keeps: compared with what replicas took, and shown in a snapshot."""

from __future__ import annotations

import logging
import re
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from rayk import AdmissionPolicy, KVConnectorConfig, PagedKVCacheManager, TextContext
from rayk.actors.describe import Decision, describe
from rayk.actors.replica import ReplicaActor, ReplicaFacts
from rayk.cli.describe import _show, _show_decision, _tier_line
from rayk.errors import ConfigError

from .fake import FakeRuntime, manager_on, params, session_on, stamp


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.02, False), (1.05, True), (0.9, True)])
def test_a_plan_that_was_off_is_warned_of(
    runtime: FakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    factor: float,
    warned: bool,
) -> None:
    real = ReplicaActor.facts

    def facts(self: ReplicaActor) -> ReplicaFacts:
        found = real(self)
        return msgspec.structs.replace(found, allocated=int(found.allocated * factor))

    monkeypatch.setattr(ReplicaActor, "facts", facts)
    with caplog.at_level(logging.WARNING, "rayk"), manager_on(runtime):
        pass
    assert len(caplog.records) == 2 * warned
    if warned:
        assert "not as planned: pages: " in caplog.text and f"({100 * (factor - 1):+.1f} %)" in caplog.text


def test_a_snapshot_shows_plan_pages_and_claims(runtime: FakeRuntime) -> None:
    with manager_on(runtime, name="prod", router="round-robin") as manager:
        ctxs = [TextContext(name, range(9), 100) for name in "abc"]
        manager.admit(ctxs)
        [state] = describe(runtime, "prod")
        assert (state.name, state.router, state.drivers) == ("prod/0", "round-robin", 1)
        assert [r.requests for r in state.replicas] == [2, 1]
        assert [r.used_pages for r in state.replicas] == [manager.get_num_used_pages(r) for r in range(2)]
        assert all(r.state == "ready" and r.pages == r.plan.pages == 16 for r in state.replicas)
        assert all(r.allocated_bytes == r.plan.bytes == 17 * state.bytes_per_page for r in state.replicas)
        assert state.metrics == manager.get_metrics_aggregated()


def test_a_lost_replica_is_shown_as_lost(runtime: FakeRuntime) -> None:
    with manager_on(runtime, name="prod"):
        runtime.kill("replica-1")
        [state] = describe(runtime, "prod")
    assert [r.state for r in state.replicas] == ["ready", "lost"]
    assert state.replicas[1].reason and state.replicas[1].used_pages is None and state.metrics is not None


def test_who_waits_is_shown(runtime: FakeRuntime) -> None:
    out = StringIO()
    with session_on(runtime, "prod") as session:
        manager = PagedKVCacheManager(
            params(), session, 8, max_batch_size=8, admission=AdmissionPolicy(high=0.75, low=0.75)
        )
        manager.enter([TextContext(f"r{i}", range(9 * i, 9 * i + 9), 100, tenant="acme") for i in range(6)])
        [state] = describe(runtime, "prod")
    _show(state, Console(file=out, width=120))
    shown = " ".join(out.getvalue().split())
    assert "2 request(s) wait for 6 pages; 4 were let in, 0 turned away; try again in" in shown
    assert re.search(r"acme . 2 . 12 . 4 . 0 . 0\.\d\d s", shown)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_column_is_lost_in_a_narrow_terminal(runtime: FakeRuntime, width: int) -> None:
    out = StringIO()
    with manager_on(runtime, name="prod") as manager:
        manager.claim("a", 0)
        [state] = describe(runtime, "prod")
    big = {"used_pages": 1_234_567, "pages": 2_345_678, "cached_pages": 345_678, "allocated_bytes": 141 << 30}
    nodes = ["gpu-node-17.eu-central-1.compute.internal", "[b]n-2[/b]"]
    replicas = [
        msgspec.structs.replace(each, node=node, free_bytes=73 << 30, **big)
        for each, node in zip(state.replicas, nodes, strict=True)
    ]
    console = Console(file=out, width=width)
    _show(msgspec.structs.replace(state, replicas=replicas), console)
    shown = out.getvalue()
    assert all(len(line.rstrip()) <= width for line in shown.splitlines()) and "…" not in shown
    text = "".join(re.sub(r"[^\w/\-.,\[\]]", "", shown).split())  # what was folded is whole without the borders
    for part in ("used/pages", "cached", "planned", "taken", "free", "claims", "1,234,567/2,345,678", "345,678"):
        assert part in text
    if width >= 80:
        headings = [line for line in shown.splitlines() if "#" in line]
        assert len(headings) == (1 if width == 200 else 2)
        assert all(node in shown for node in nodes)
        assert "1,234,567 / 2,345,678" in shown and "141.00 GiB" in shown and "73.00 GiB" in shown


@pytest.mark.parametrize("width", [80, 200])
def test_all_costs_of_a_decision_are_shown(width: int) -> None:
    names = ("replica", "prefill", "queued prefill", "running", "decode", "memory", "copies", "tiers", "cost")
    candidates = [{name: 1e6 * (at + 1) for at, name in enumerate(names)} | {"replica": r} for r in range(2)]
    out = StringIO()
    decision = Decision("q", "prod/0", "cost", 1, 5000, 0.1, candidates)
    _show_decision(decision, Console(file=out, width=width))
    shown = out.getvalue()
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    assert all(name in shown for name in names) and shown.count("9,000,000") == 2 and "*1" in shown


def test_an_unknown_name(runtime: FakeRuntime) -> None:
    with pytest.raises(ConfigError, match="'nobody'"):
        describe(runtime, "nobody")


def test_tiers_are_shown_with_occupancy_and_health(runtime: FakeRuntime, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    tiers = {
        "kv_connector": "tiered",
        "kv_connector_config": KVConnectorConfig(disk_offload_dir=blocked, disk_offload_max_bytes=1 << 20),
    }
    with manager_on(runtime, 1, name="prod", total_num_host_pages=6, **tiers) as manager:
        ctx = TextContext("a", range(9), 100)
        manager.admit([ctx])
        manager.execute([[ctx]], stamp)
        ctx.update(1)
        manager.step([[ctx]])
        [state] = describe(runtime, "prod")
        [replica] = state.replicas
        assert replica.tiers is not None
        assert (replica.tiers.host_pages, replica.tiers.host_used, replica.tiers.disk_used) == (6, 2, 0)
        assert "cannot be used" in replica.tiers.trouble
        assert "2 of 6 host pages used" in _tier_line(0, replica.tiers)
