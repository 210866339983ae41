"""All kinds of faults at once, as `rayk bench --chaos` injects them: no request is lost, no slot and no token
is wrong, and nothing is left behind.

Each run is a process in a mount namespace of its own, with its own /dev/shm, /tmp and a small file system for the disk
tier, so that what it leaves is seen, and its disk can be frozen and filled. Where that is not permitted, those two
faults are left out, and the test of them is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from rayk.bench.chaos.schedule import KINDS
from rayk.cli.example_model import write_example_model

from ..patience import scaled, until  # noqa: TID252  # tests/ is no package that has an absolute name

MARK = "RAYK_CHAOS_TEST"
WHOLE_DISK = {"slow-disk", "fill-disk"}
OWN_DISK = """
truncate -s 64M "$1/image" && mkfs.ext4 -q -F "$1/image" && mount -o loop "$1/image" "$1/disk" &&
mount -t tmpfs -o size=800m tmpfs /dev/shm
"""
LEAVE = """
find /dev/shm -type f >"$1/left"
find "$1/disk" -type f ! -name '*.kv' ! -name lock ! -name .lock ! -name seed >>"$1/left"
umount "$1/disk"
"""


class World(NamedTuple):
    """Where a run lives: a folder, and whether it has a disk and a /dev/shm of its own."""

    folder: Path
    own: bool


@pytest.fixture(scope="module")
def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/disk")
        command = ["unshare", "-m", "sh", "-c", f"{OWN_DISK} umount $1/disk", "sh", folder]
        try:
            return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
        except OSError:
            return False


@pytest.fixture
def world(may_mount: bool) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="rk-") as name:  # the paths of Ray's sockets may have 107 bytes
        folder = Path(name)
        (folder / "disk").mkdir()
        (folder / "tmp").mkdir()
        yield World(folder, may_mount)


def bench(world: World, rates: Mapping[str, int], *flags: str) -> dict[str, Any]:
    """The result of a run with so many faults a minute, after which nothing is left."""
    folder = world.folder
    chaos = ",".join(f"{kind}:{rate}/min" for kind, rate in sorted(rates.items()))
    tiers = ["--disk-dir", f"{folder}/disk", "--disk-memory", "24MiB", "--host-memory", "4MiB"]
    command = [sys.executable, "-m", "rayk", "bench", *flags, *tiers, "--chaos", chaos, "--page-size", "16"]
    command += ["--seed", SEED, "--out", f"{folder}/out", "--format", "json"]
    if world.own:
        script = f'{OWN_DISK.strip()} || exit 9\nd=$1; shift; "$@"; rc=$?; set -- "$d"\n{LEAVE}\nexit $rc'
        command = ["unshare", "-m", "sh", "-c", script, "sh", str(folder), *command]
    temporary = f"{folder}/tmp"
    environment = os.environ | {MARK: temporary, "TMPDIR": temporary, "RAY_TMPDIR": temporary, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=scaled(250))
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    told = json.dumps({name: result[name] for name in ("requests", "faults", "chaos")}) + done.stderr[-3000:]
    assert done.returncode == 0, told
    if world.own:
        assert (folder / "left").read_text() == "", "in /dev/shm, or on the disk"
    until(lambda: not processes(temporary))
    assert [path.name for path in Path(temporary).rglob("*") if not path.is_dir()] == [], "sockets, and Ray's files"
    return result


def processes(mark: str) -> list[str]:
    """Whatever runs with that mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:100])
        except psutil.Error:
            continue
    return found


SEED = "3535"  # the node and the driver first, which take longest to be there and to be back


def some(world: World, rate: int) -> dict[str, int]:
    """Faults of all kinds that can be had: so many of each a minute, more of those that cost little."""
    kinds = set(KINDS) if world.own else set(KINDS) - WHOLE_DISK
    often = {"cut-socket": 6, "corrupt-disk": 3}
    return {kind: rate * often.get(kind, 1) for kind in kinds}


def check(result: dict[str, Any], rates: Mapping[str, int], least: int) -> None:
    requests, replicas = result["requests"], result["config"]["replicas"]
    assert requests["completed"] == requests["submitted"] > least and requests["failed"] == 0
    injected = {fault["kind"] for fault in result["faults"]}
    assert injected <= set(rates), "there was no error"
    assert len(set(rates) - injected) <= 2, "where the machine is busy, one or the other finds nobody to be hit in time"
    assert all(fault["recovered_s"] > 0 for fault in result["faults"])
    assert result["chaos"]["left"] == [[0, 0]] * replicas


def test_a_manager_loses_no_request_and_no_slot(world: World) -> None:
    rates = some(world, 2)
    flags = ["--workload", "chat", "--scale", "0.05", "--pages", "1200", "--duration", "30s"]
    result = bench(world, rates, *flags, "--replicas", "4", "--nodes", "3")
    check(result, rates, 20)
    assert result["verify"]["mismatches"] == 0 and result["verify"]["slots_checked"] > 10_000
    assert sum(replica["restarts"] for replica in result["replicas"]) >= 2


def test_a_cluster_answers_as_if_nothing_had_happened(world: World, tmp_path: Path) -> None:
    """Also where its scheduler dies while drivers start others in place of lost replicas."""
    write_example_model(tmp_path / "model", steps=1)
    rates = some(world, 4)
    flags = ["--forward", "hf", "--model", str(tmp_path / "model"), "--duration", "15s"]
    result = bench(world, rates, *flags, "--replicas", "3", "--nodes", "2")
    check(result, rates, 5)  # half as long, while most of it is being started again
    same = result["chaos"]["undisturbed"]
    assert (same["requests"], same.get("differing", 0)) == (result["requests"]["completed"], 0), same


def test_a_disk_of_its_own_was_frozen_and_filled(may_mount: bool) -> None:
    if not may_mount:
        pytest.skip("no file system can be mounted in a namespace here: slow-disk and fill-disk are left out")
