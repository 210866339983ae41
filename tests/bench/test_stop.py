"""A run that is told to end, or breaks, still tells what it did: numbers first, before anything is closed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rayk import InferenceSession
from rayk.bench import command
from rayk.bench.manager_driver import ManagerDriver
from rayk.bench.progress import LoggedProgress
from rayk.bench.run import run_bench
from rayk.bench.settings import BenchSettings, complete
from rayk.bench.stop import Stopped, StopSignals
from rayk.cli.main import main
from rayk.cluster import Cluster
from rayk.workloads.generators import GENERATORS

from ..unit.models.checkpoints import write  # noqa: TID252  # tests/ is no package that has an absolute name

SMALL = ["--runtime", "inline", "--workload", "chat", "--scale", "0.02", "--requests", "12", "--page-size", "16"]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayk.bench.report.FIGURES", {})


class Once:
    """Shows a run by sending a signal, a few ticks into it."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.ticks = number, 0

    def show(self, driver: Any) -> None:
        self.ticks += 1
        if self.ticks == 4:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_run_and_not_its_report(number: signal.Signals) -> None:
    workload = GENERATORS["random"](20, seed=0, scale=0.05)
    settings = complete(BenchSettings(runtime="inline", forward="none", page_size=16), workload, None, None)
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def report(result: Any, final: bool) -> None:
        if number is not signal.SIGINT:
            signal.raise_signal(number)  # once more: nothing is lost by it
        seen.append((result, final, [session for session in sessions if not session._closed]))

    sessions: list[InferenceSession] = []
    made = InferenceSession.__init__

    def remembered(self: InferenceSession, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        sessions.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InferenceSession, "__init__", remembered)
        outcome = run_bench(settings, workload, Once(number).show, report)
    [(first, early, still_open), (result, final, closed)] = seen
    assert isinstance(outcome.error, KeyboardInterrupt) and outcome.result is result
    assert (early, final) == (False, True) and len(still_open) == 1 and closed == []
    assert first.requests == result.requests and first.faults == result.faults
    assert first.hit_rate.infinite is None  # takes too long, and is in the final one
    assert 0 < result.requests.submitted and result.requests.failed > 0 and not result.ok
    assert len(result.faults) == 1
    if number is not signal.SIGINT:
        assert result.faults[0].message == f"stopped by {number.name}"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_when_all_is_served_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = ManagerDriver.run

    def stopped_then(driver: ManagerDriver) -> Any:
        monkeypatch.setattr("rayk.bench.run._tiers", lambda driver: signal.raise_signal(signal.SIGTERM))
        return serve(driver)

    monkeypatch.setattr(ManagerDriver, "run", stopped_then)
    workload = GENERATORS["random"](5, seed=0, scale=0.05)
    settings = BenchSettings(runtime="inline", forward="none", page_size=16, host_pages=4)
    outcome = run_bench(complete(settings, workload, None, None), workload)
    assert isinstance(outcome.error, Stopped) and outcome.result.requests.completed == 5
    assert [fault.message for fault in outcome.result.faults] == ["stopped by SIGTERM"]


def test_a_folder_that_takes_nothing_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_words", full)
    assert main(["bench", *SMALL, "--out", str(tmp_path), "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["requests"]["completed"] == 12  # the numbers are not lost with the folder
    assert "cannot be written (No space left on device): the report is not whole" in err and "Traceback" not in err


def test_what_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Stopped, match="stopped by SIGTERM"):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_leaves_the_same_files_as_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(LoggedProgress, "show", Once(number).show)
        out = tmp_path / number.name
        code = main(["bench", *SMALL, "--out", str(out)])
        files[number] = sorted(path.name for path in out.iterdir())
        assert code == 1 and json.loads((out / "result.json").read_text())["requests"]["failed"] > 0
    assert files[signal.SIGTERM] == files[signal.SIGINT] == ["report.html", "result.json", "summary.md"]
    assert "the run stopped: stopped by SIGTERM" in capsys.readouterr().err


def test_a_folder_for_nothing_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> None:
        raise Stopped("stopped by SIGTERM")

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(command, "run_bench", stopped)
    for name in ("new", "mine"):
        assert main(["bench", *SMALL, "--out", str(tmp_path / name)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # an empty folder of the user's stays


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=1))


def hf(model: str, out: Path) -> tuple[int, dict[str, Any]]:
    flags = ["--forward", "hf", "--model", model, "--runtime", "inline", "--page-size", "16", "--requests", "10"]
    code = main(["bench", *flags, "--out", str(out)])
    return code, json.loads((out / "result.json").read_text())


def test_a_replica_that_is_lost_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests go on elsewhere, or fail each by itself; what it cannot tell any more is left out."""
    asked = Cluster.stats

    def stats(self: Cluster, replica: int = 0) -> Any:
        if replica == 1:
            raise LookupError("its process ended")  # of whatever class
        return asked(self, replica)

    monkeypatch.setattr(Cluster, "stats", stats)
    code, result = hf(model, tmp_path)
    assert code == 1 and result["requests"]["completed"] == 10
    [fault] = result["faults"]
    assert (fault["kind"], fault["replica"]) == ("ReplicaLostError", 1) and "replica 1" in fault["message"]


def test_what_breaks_the_run_is_in_its_report(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit = Cluster.submit_all

    def submit_all(self: Cluster, prompt: Any, *args: Any, **options: Any) -> Any:
        if prompt["id"] == "r7":
            raise OSError("the cluster is gone")
        return submit(self, prompt, *args, **options)

    monkeypatch.setattr(Cluster, "submit_all", submit_all)
    code, result = hf(model, tmp_path)
    err = capsys.readouterr().err
    assert code == 1 and "the run stopped: OSError: the cluster is gone" in err and "Traceback" not in err
    assert [fault["kind"] for fault in result["faults"]] == ["OSError"]
    assert result["requests"]["completed"] + result["requests"]["failed"] >= 7
    assert (tmp_path / "report.html").exists()
