"""The command line: exit codes, one-line errors, one JSON object on stdout."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from rayk.bench import command
from rayk.bench.result import BenchResult
from rayk.bench.run import Outcome, run_bench
from rayk.cli import main as cli
from rayk.errors import ReplicaLostError

SMALL = [
    "bench",
    "--runtime",
    "inline",
    "--workload",
    "chat",
    "--scale",
    "0.02",
    "--requests",
    "12",
    "--page-size",
    "16",
]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are one empty file; drawing is tested elsewhere and takes a second."""

    def stand_in(result: object, out: Path) -> list[Path]:
        (out / "report.html").touch()
        return [out / "report.html"]

    monkeypatch.setattr(command, "write_report", stand_in)


@pytest.mark.usefixtures("no_figures")
def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, *SMALL, "--format", "json", "--out", str(tmp_path / "new"))
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    assert result["requests"]["completed"] == 12 and result["verify"]["mismatches"] == 0
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result
    assert (tmp_path / "new" / "report.html").exists() and "12 requests" in err


@pytest.mark.usefixtures("no_figures")
def test_a_table_for_people_and_the_report_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, *SMALL, "--out", str(tmp_path))
    assert code == 0 and "12 of 12 completed" in out and str(tmp_path / "report.html") in out.replace("\n", "")
    (tmp_path / "report.html").unlink()
    code, out, _ = run(capsys, "report", str(tmp_path / "result.json"))
    assert code == 0 and (tmp_path / "report.html").exists()
    (tmp_path / "b").mkdir()
    code, out, _ = run(
        capsys, "report", str(tmp_path / "result.json"), "--out", str(tmp_path / "b"), "--format", "json"
    )
    assert code == 0 and str(tmp_path / "b" / "report.html") in json.loads(out)["files"]


def test_a_trace_is_served(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    lines = [{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2 + i]} for i in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = run(
        capsys, "bench", "--runtime", "inline", "--trace", str(trace), "--forward", "none", "--format", "json"
    )
    result = json.loads(out)
    assert code == 0 and result["requests"]["completed"] == 5 and result["config"]["source"]["kind"] == "mooncake"
    assert result["config"]["peer_copies"] is False and "verify" not in result


def test_smoke_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "--runtime", "inline", "--smoke", "--format", "json")
    assert code == 0 and json.loads(out)["requests"]["submitted"] == command.SMOKE_REQUESTS


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bench", "--bogus"], "No such option: --bogus"),
        (["bench", "--replicas", "two"], "--replicas"),
        (["bench", "chat"], "No such command 'chat'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["bench", "--requests", "-3"], "--requests is -3, at least 1"),
        (["bench", "--requests", "3", "--duration", "2s"], "exclude each other"),
        (["bench", "--trace", "x", "--workload", "chat"], "--trace and --workload exclude each other"),
        (["bench", "--trace", "/does/not/exist"], "cannot be read"),
        (["bench", "--trace", "x", "--scale", "2"], "--scale is for --workload"),
        (["bench", "--workload", "poetry"], "--workload 'poetry' is not one of chat, agent, documents, random"),
        (["bench", "--router", "magic"], "--router 'magic' is not one of"),
        (["bench", "--duration", "soon"], "is not a duration"),
        (["bench", "--memory", "much"], "is not a size"),
        (["bench", "--scale", "0"], "--scale is 0"),
        (["bench", "--concurrency", "0"], "--concurrency is 0"),
        (["bench", "--concurrency", "4", "--speed", "2"], "--concurrency and --speed exclude each other"),
        (["bench", "--prefill-rate", "9"], "--prefill-rate is for --forward none"),
        (["bench", "--page-size", "-1"], "--page-size is -1"),
        (["bench", "--pages", "2"], "a replica has 2; use --pages"),
        (["bench", "--dtype", "float12"], "float12"),
        (["bench", "--tp", "3"], "3 TP shards"),
        (["bench", "--runtime", "inline", "--pages", str(10**12)], "ask for at most"),
        (["report", "/does/not/exist"], "cannot be read"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    code, out, err = run(capsys, *argv)
    last = err.rstrip("\n").splitlines()[-1]
    assert code == 2 and not out and words in last and last.startswith("rayk")


def test_help_has_groups_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "--help")
    assert code == 0 and "Example: rayk bench" in out
    assert all(f"─ {group} ─" in out for group in ("Workload", "Cluster", "Load", "Cache", "Faults", "Output"))
    assert run(capsys)[0] == 2 and run(capsys, "--version")[1].startswith("rayk ")


def _stopped_by(error: BaseException | None, mismatches: int) -> object:
    def stand_in(
        settings: object, workload: object, on_tick: object, report: Callable[[BenchResult, bool], None]
    ) -> Outcome:
        print("(raylet) a line that Ray prints")
        result = run_bench(settings, workload).result  # type: ignore[arg-type]
        assert result.verify is not None
        wrong = msgspec.structs.replace(result.verify, mismatches=mismatches)
        report(msgspec.structs.replace(result, verify=wrong), True)
        return Outcome(msgspec.structs.replace(result, verify=wrong), error)

    return stand_in


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("error", "mismatches", "words"),
    [
        (ReplicaLostError(1, 1, ["r3"], "its process died"), 0, "the run stopped: replica 1 (epoch 1) is gone"),
        (KeyboardInterrupt(), 0, "the run stopped: stopped by the user"),
        (None, 3, ""),
    ],
)
def test_a_run_that_fails_still_writes_its_result(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException | None,
    mismatches: int,
    words: str,
) -> None:
    monkeypatch.setattr(command, "run_bench", _stopped_by(error, mismatches))
    code, out, err = run(capsys, *SMALL, "--out", str(tmp_path), "--format", "json")
    assert code == 1 and words in err and json.loads(out)["verify"]["mismatches"] == mismatches
    assert (tmp_path / "result.json").exists()


def test_a_shell_completes_flags_and_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_RAYK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "rayk plan --gpu h20")
    monkeypatch.setenv("COMP_CWORD", "3")
    with pytest.raises(SystemExit):
        cli.main([])
    assert {"h20", "h200", "h200-nvl"} <= set(capsys.readouterr().out.split())
