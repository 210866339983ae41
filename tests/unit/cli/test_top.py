"""What `rayk top` makes of snapshots."""

from __future__ import annotations

import os
import sys
import termios
from io import StringIO

import pytest
from rich.console import Console

from rayk.actors.describe_cluster import ClusterState, EngineState
from rayk.cli.cluster_view import ClusterView
from rayk.cli.top import _live, _logged, render
from rayk.protocol.admission import AdmissionState, TenantState


def engine(index: int, state: str = "ready", prompt: int = 0, device: int = 0, generated: int = 0) -> EngineState:
    if state == "lost":
        return EngineState(index, state, reason="its process ended")
    reused = {"device": device, "peer": 0, "host": 0, "disk": 0}
    return EngineState(
        index, state, "node-of-this-name", 64, 3 + index, 2, 40 - index, generated,
        waiting=1, cached_pages=30, prompt_tokens=prompt, reused_tokens=reused, preemptions=0,
    )  # fmt: skip


def snapshot(*engines: EngineState) -> ClusterState:
    tenants = {"big": TenantState(7, 21, 5, 2, 1.5), "": TenantState(1, 3, 1, 0, 0.1)}
    admission = AdmissionState(8, 24, 24, 6, 2, 1.0, 0.5, tenants)
    return ClusterState("prod/cluster", "tiny", "cost", 16, list(engines), [], admission)


def shown(view: ClusterView, width: int = 120) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(render(view, "prod"))
    return console.export_text()


def test_rates_are_of_the_time_between_two_looks() -> None:
    view = ClusterView()
    assert view.take(100.0, [], snapshot(engine(0, prompt=100, generated=10))) == []
    assert view.rows[0].generated is None and view.rows[0].hits is None, "nothing is known of one look"
    view.take(102.0, [], snapshot(engine(0, prompt=300, device=50, generated=40)))
    [row] = view.rows
    assert row.generated == 15.0 and row.prompt == 100.0 and row.hits is not None
    assert row.hits["device"] == row.hit_rate == 0.25
    assert (row.used, row.cached, row.free) == (24, 30, 10)
    assert "15.0 tokens/s" in view.line and "hit rate 0.250" in view.line and "8 waiting" in view.line
    view.take(104.0, [], snapshot(engine(0, prompt=20, generated=4)))
    assert view.rows[0].generated is None, "another one is at its index, which began at 0"


def test_a_loss_and_its_end_are_events() -> None:
    view = ClusterView()
    view.take(0.0, [], snapshot(engine(0), engine(1)))
    [lost] = view.take(10.0, [], snapshot(engine(0), engine(1, "lost")))
    assert lost == "prod/cluster: replica 1 is lost, it was ready: its process ended"
    view.take(11.0, [], snapshot(engine(0), engine(1, "starting")))
    [back] = view.take(13.5, [], snapshot(engine(0), engine(1)))
    assert back.endswith("it was starting; it was gone for 3.5 s")
    assert "gone for 3.5 s" in shown(view) and "its process ended" in shown(view)


def test_keys_sort_and_end_it() -> None:
    view = ClusterView()
    view.take(0.0, [], snapshot(engine(0), engine(1)))
    assert [row.replica for row in view.sorted] == [0, 1]
    assert view.press("s") and view.sort == "requests" and [row.replica for row in view.sorted] == [1, 0]
    assert view.press("r") and [row.replica for row in view.sorted] == [0, 1]
    assert view.press("x") and not view.press("q")


def test_the_screen_has_everything_at_80_columns() -> None:
    view = ClusterView()
    view.take(0.0, [], snapshot(engine(0)))
    view.take(1.0, [], snapshot(engine(0, prompt=10, device=5, generated=9)))
    text = shown(view, 80)
    for word in ("ready", "cached", "50.0%", "big", "longest wait", "1.50 s"):
        assert word in text, text


def test_elsewhere_it_is_lines(capsys: object) -> None:
    view, looked = ClusterView(), []

    def look() -> list[str]:
        looked.append(1)
        return view.take(float(len(looked)), [], snapshot(engine(0, "lost" if len(looked) == 2 else "ready")))

    _logged(view, look, 0.0, 2)
    lines = capsys.readouterr().out.splitlines()  # type: ignore[attr-defined]  # pytest's fixture
    assert len(lines) == 3 and "1 ready" in lines[0] and "is lost" in lines[1] and "1 lost" in lines[2]


def test_on_a_terminal_it_is_drawn_and_takes_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pseudo-terminal: s, then q."""
    main, other = os.openpty()
    view, drawn = ClusterView(), StringIO()
    console = Console(file=drawn, force_terminal=True, width=100, height=40, legacy_windows=False)
    with os.fdopen(other, "r") as terminal, os.fdopen(main, "w", buffering=1) as keyboard:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(terminal)

        def look() -> list[str]:
            keyboard.write("sq")
            keyboard.flush()
            return view.take(1.0, [], snapshot(engine(0), engine(1)))

        _live(console, "prod", view, look, 30.0, None)
        assert termios.tcgetattr(terminal) == before, "the terminal is as it was"
    assert view.sort == "requests" and "by requests" in drawn.getvalue() and "replicas, by index" in drawn.getvalue()
