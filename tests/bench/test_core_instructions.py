"""Counting instructions, as far as it goes without valgrind; `make bench-instructions` does the rest."""

import platform
import shutil
import subprocess

import pytest

from rayk.bench.core import one_off
from rayk.bench.core.cache import PAGE_SIZE
from rayk.bench.core.callgrind import Callgrind
from rayk.bench.core.clock import Unit
from rayk.bench.core.instruction_mix import kind_of
from rayk.bench.core.instructions import Counted, CountError, Total, count_instructions, per_iteration, read_total
from rayk.bench.core.prompts import PAGES_PER_RUNNING, crowded
from rayk.cli import main as cli

FILE = """# callgrind format
version: 1
creator: callgrind-3.19.0
desc: Timerange: Basic block 10 - 20
desc: Trigger: Client Request: w1-10k 20

positions: line
events: Ir
summary: 1000

ob=(1) /usr/lib/libpython3.11.so.1.0
fl=(1) ceval.c
fn=(1) _PyEval_EvalFrameDefault
7 500
fi=(2) object.h
+3 50
cob=(2) /usr/lib/libc.so.6
cfn=(2) __memcpy_avx_unaligned_erms
calls=3 7
* 40
fn=(3) PyLong_Add
9 200
ob=(2)
fn=(2)
0 40
ob=(3) /site-packages/numpy/_core/_multiarray_umath.cpython-311.so
fn=(4) array_subscript
0 150
ob=(4) /usr/lib/libstdc++.so
fn=(5) f
-2 60

totals: 1000
"""


def test_a_count_is_read_from_callgrinds_file() -> None:
    shares = {"interpreter": 0.55, "objects": 0.2, "numpy": 0.15, "work": 0.04, "other": 0.06}
    assert read_total(FILE) == Total("w1-10k", 20, 1000, pytest.approx(shares))
    with pytest.raises(CountError, match="another form"):
        read_total(FILE.replace("totals", "total"))


def test_what_is_done_once_does_not_count() -> None:
    totals = [("a", 10, 1500, {}), ("a", 20, 2500, {"work": 1.0}), ("b", 1, 7, {}), ("b", 3, 7, {})]
    counted = per_iteration([Total(*total) for total in totals])
    assert counted == {"a": (100.0, {"work": 1.0}), "b": (0.0, {})}


def test_kinds_of_code() -> None:
    assert kind_of("/bin/python3.11", "_PyFrame_Push") == "interpreter"
    assert kind_of("/usr/lib/libc.so.6", "_int_malloc") == "objects"
    assert kind_of("/usr/lib/libc.so.6", "__memcmp_avx2_movbe") == kind_of("/bin/python3.11", "siphash13") == "work"
    assert kind_of("???", "0x0000000004936788") == "other"


def test_without_valgrind_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert cli.main(["bench", "core", "--only", "instructions", "--check"]) == 1
    assert "there is no valgrind; install it (Debian, Ubuntu: apt-get" in capsys.readouterr().err


def test_what_fails_under_valgrind_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/valgrind")
    failed = subprocess.CompletedProcess([], 1, "", "Illegal instruction")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CountError, match="Illegal instruction"):
        count_instructions()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the request is x86-64 machine code")
def test_a_request_does_nothing_without_valgrind() -> None:
    with pytest.raises(OSError, match="does not run under valgrind"):
        Callgrind()


def test_figures_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"w1": 5.0, "w2": 6.0, "w3": 7.0, "w1-10k": 10.0, "w1-1m": 11.0, "w3-10k": 10.0, "w3-1m": 13.0}
    numbers |= {"w3-batch": 8.0, "w3-batch-10k": 10.0, "w3-batch-1m": 9.0}
    counted = {key: Counted(value, {"work": 0.5}) for key, value in numbers.items()}
    monkeypatch.setattr(one_off, "count_instructions", lambda: counted)
    figures = {figure.key: figure for figure in one_off.instruction_figures(Unit(), 1, lambda _: None)}
    assert (figures["i-w1"].value, figures["i-w1"].ok, figures["i-w1"].details) == (5.0, None, {"work": 0.5})
    assert (figures["flat-w1"].value, figures["flat-w1"].ok) == (1.1, True)
    assert (figures["flat-w3"].value, figures["flat-w3"].ok) == (1.3, False)


def test_a_crowded_replica_is_full() -> None:
    pages = 1500
    manager = crowded(pages)
    assert manager.get_num_used_pages(0) == pages // PAGES_PER_RUNNING * 65
    backend = manager._calls
    (core,) = backend.cores  # type: ignore[attr-defined]
    assert len(core.requests) == pages // PAGES_PER_RUNNING
    assert core.usage.cached > pages - manager.get_num_used_pages(0) - 1024 // PAGE_SIZE
