"""Schedules of faults, what is refused, and how faults are injected and seen to be over."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat, takewhile
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayk.actors.connection import Connection
from rayk.actors.frames import SocketError
from rayk.actors.listener import Listener
from rayk.bench.chaos import injector
from rayk.bench.chaos.disk import BALLAST, check_folder, damage, fill
from rayk.bench.chaos.injector import Injector
from rayk.bench.chaos.schedule import KINDS, Planned, parse_chaos, schedule
from rayk.bench.chaos.targets import Left, Replica, cut_one
from rayk.bench.settings import BenchSettings, check_chaos
from rayk.errors import ConfigError

from ..patience import until  # noqa: TID252  # tests/ is no package that has an absolute name

ALL = ",".join(f"{kind}:6/min" for kind in KINDS)


def test_a_specification_is_rates_by_kind() -> None:
    assert parse_chaos("kill-replica:2/min, slow-disk:6/h,cut-socket:0.5/s") == {
        "kill-replica": 2 / 60,
        "slow-disk": 6 / 3600,
        "cut-socket": 0.5,
    }
    assert set(parse_chaos(ALL)) == set(KINDS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no fault; there are kill-replica, "),
        ("kill-replicas:2/min", "'kill-replicas' is no fault"),
        ("kill-replica", "has the rate ''; give it one such as 2/min"),
        ("kill-replica:2", "'2'"),
        ("kill-replica:2/day", "'2/day'"),
        ("kill-replica:-1/min", "'-1/min'"),
        ("kill-replica:0/min", "'0/min'"),
        ("kill-replica:nan/min", "'nan/min'"),
        ("kill-replica:inf/min", "'inf/min'"),
        ("kill-replica:two/min", "'two/min'"),
        ("kill-replica:2/s", "more than one fault a second"),
        ("kill-replica:1/min,kill-replica:2/min", "names kill-replica twice"),
        ("kill-replica:1/min,", "'' is no fault"),
    ],
)
def test_a_bad_specification_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_chaos(text)
    assert words in str(caught.value) and str(caught.value).startswith("--chaos")


def test_a_schedule_is_a_function_of_specification_and_seed() -> None:
    rates = parse_chaos(ALL)
    one, two, other = (list(islice(schedule(rates, seed), 200)) for seed in (1, 1, 2))
    assert one == two != other
    assert [planned.at for planned in one] == sorted(planned.at for planned in one)
    for kind in KINDS:
        times = [planned.at for planned in one if planned.kind == kind]
        assert [int(at // 10) for at in times] == list(range(len(times))), "one in each period"
    assert len({planned.draw for planned in one}) == 200


def test_kinds_do_not_change_each_other() -> None:
    def kills(text: str) -> list[Any]:
        faults = takewhile(lambda planned: planned.at < 600, schedule(parse_chaos(text), 7))
        return [planned for planned in faults if planned.kind == "kill-replica"]

    assert kills("kill-replica:2/min") == kills("cut-socket:9/min,kill-replica:2/min,kill-node:1/min")
    assert len(kills("kill-replica:2/min")) == 20


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"runtime": "inline", "chaos": "kill-replica:1/min,cut-socket:1/min"},
            "cut-socket, kill-replica: with",
        ),
        ({"chaos": "corrupt-disk:1/min"}, "corrupt-disk: there is no disk tier"),
        ({"chaos": "kill-node:1/min"}, "kill-node: there is one node"),
        ({"chaos": "kill-replica:1/min", "address": "10.0.0.1:6379"}, "leave out --address"),
        ({"chaos": "slow-disk:1/min", "disk_dir": "."}, "slow-disk is for a whole file system"),
        ({"chaos": "fill-disk:1/min", "disk_dir": "."}, "fill-disk is for a whole file system"),
    ],
)
def test_faults_that_it_cannot_have_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_chaos(BenchSettings(**settings))
    assert words in str(caught.value)


def test_what_applies_is_not_refused(tmp_path: Path) -> None:
    check_chaos(BenchSettings())
    check_chaos(BenchSettings(runtime="inline", chaos="corrupt-disk:1/min", disk_dir=str(tmp_path)))
    everywhere = "kill-replica:1/min,hang-replica:1/min,kill-driver:1/min,kill-node:1/min,corrupt-disk:1/min"
    everywhere += ",cut-socket:1/min,kill-scheduler:1/min"
    check_chaos(BenchSettings(chaos=everywhere, nodes=3, disk_dir=str(tmp_path)))
    check_chaos(BenchSettings(chaos=everywhere, nodes=3, disk_dir=str(tmp_path), forward="hf", model="m"))
    assert BenchSettings(chaos=everywhere).shared and not BenchSettings(chaos="kill-replica:1/min").named
    assert BenchSettings(chaos="kill-scheduler:1/min", forward="hf", model="m").named
    assert not BenchSettings(chaos="kill-scheduler:1/min").named, "a manager's is always an actor"


@pytest.mark.parametrize("settings", [{"runtime": "inline"}, {"address": "10.0.0.1:6379"}])
def test_simulated_nodes_need_a_ray_of_their_own(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--nodes"):
        BenchSettings(nodes=3, **settings)


def test_one_file_in_ten_is_damaged(tmp_path: Path) -> None:
    lane = tmp_path / "0123456789abcdef-0" / "0"
    lane.mkdir(parents=True)
    content = {lane / f"{i:x}.kv": random.Random(i).randbytes(300) for i in range(40)}
    for path, data in content.items():
        path.write_bytes(data)
    (lane.parent / "lock").write_bytes(b"x" * 300)
    assert damage(tmp_path, 5) == 4
    assert sum(path.read_bytes() != data for path, data in content.items()) == 4
    assert (lane.parent / "lock").read_bytes() == b"x" * 300
    assert damage(tmp_path / "nowhere", 5) == 0


def test_a_shared_file_system_is_neither_frozen_nor_filled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mount one"):
        check_folder(tmp_path, {"fill-disk", "slow-disk"})
    check_folder(tmp_path, {"corrupt-disk"})


def test_a_full_disk_is_as_before_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 40 << 20
    taken = 0

    def allocate(fd: int, at: int, size: int) -> None:
        nonlocal taken
        if at + size > room:
            raise OSError(28, "No space left on device")
        taken = at + size

    monkeypatch.setattr("rayk.bench.chaos.disk.os.posix_fallocate", allocate)
    end = fill(tmp_path)
    assert taken == room and (tmp_path / BALLAST).exists()
    end()
    assert not (tmp_path / BALLAST).exists()


class House:
    """One replica, which is a process of this test; who replaces it is the test, too."""

    def __init__(self) -> None:
        self.process = self.start()
        self.state = "ready"

    @staticmethod
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"])

    def replicas(self) -> list[Replica] | None:
        if self.process.poll() is not None:
            self.state = "lost"
        return [Replica(self.state, self.process.pid)]

    def replace(self) -> None:
        self.process, self.state = self.start(), "ready"

    def scheduler(self) -> int | None:
        return None

    def drivers(self) -> int | None:
        return None

    def left(self) -> list[Left]:
        return []


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(injector, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(injector, "SETTLED_SECONDS", 0.1)
    monkeypatch.setattr(injector, "HELD_SECONDS", 0.1)
    monkeypatch.setattr(injector, "PATIENCE_SECONDS", 0.2)
    house = House()
    yield house
    house.process.kill()
    house.process.wait()


def begin(house: House, *kinds: str, folder: Path | None = None) -> Injector:
    """Those faults, all due at once."""
    never = Planned(1e9, "kill-replica", 0)
    began = time.monotonic()
    planned = chain((Planned(0.0, kind, 0) for kind in kinds), repeat(never))
    made = Injector(house, planned, lambda: time.monotonic() - began, folder)
    made.start()
    return made


def test_a_killed_replica_is_over_when_another_takes_requests(house: House) -> None:
    chaos, first = begin(house, "kill-replica", "hang-replica"), house.process
    until(lambda: chaos.injected)
    assert chaos.injected[0].at >= 0.1, "not before it had settled"
    until(lambda: first.poll() is not None and chaos.injected[0].noticed_s is not None)
    assert chaos.injected[0].recovered_s is None and len(chaos.injected) == 1, "there is nobody to be hit"
    house.replace()
    until(lambda: len(chaos.injected) == 2)
    stopped = psutil.Process(house.process.pid)
    assert stopped.status() == psutil.STATUS_STOPPED
    killed, hung = chaos.stop()
    assert (killed.kind, hung.kind) == ("kill-replica", "hang-replica")
    assert killed.recovered_s is not None and killed.recovered_s >= (killed.noticed_s or 0) > 0
    assert hung.recovered_s is None and str(house.process.pid) in str(hung.target)
    assert stopped.status() != psutil.STATUS_STOPPED, "one that nobody took out goes on"


def test_a_disk_is_hit_by_one_fault_at_a_time_and_is_as_before(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaging the files of a frozen file system would wait for the thread that has to thaw it."""
    now = set[str]()

    def hold(name: str) -> Callable[[Path], Callable[[], None]]:
        def begin(folder: Path) -> Callable[[], None]:
            assert not now
            now.add(name)
            return lambda: now.remove(name)

        return begin

    def hurt(folder: Path, draw: int) -> int:
        assert not now
        return 3

    monkeypatch.setattr(injector, "freeze", hold("freeze"))
    monkeypatch.setattr(injector, "fill", hold("fill"))
    monkeypatch.setattr(injector, "damage", hurt)
    chaos = begin(house, "slow-disk", "fill-disk", "corrupt-disk", "slow-disk", folder=tmp_path)
    until(lambda: len(chaos.injected) == 4)
    faults = chaos.stop()
    assert not now and faults[0].kind == "slow-disk"
    assert all(fault.recovered_s is not None for fault in faults)
    assert {fault.target for fault in faults if fault.kind == "corrupt-disk"} == {"3 files"}


def test_what_goes_wrong_in_the_injector_is_not_kept_quiet(house: House, tmp_path: Path) -> None:
    chaos = begin(house, "fill-disk", folder=tmp_path / "nowhere")
    until(lambda: not chaos._thread.is_alive())
    with pytest.raises(FileNotFoundError):
        chaos.stop()


def test_a_socket_of_this_process_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    listener = Listener(lambda wire: wire, "127.0.0.1")
    assert cut_one(0) is None, "none that is connected to an actor"
    line = Connection(listener.address)
    for draw in range(3):
        assert line.wait(line.send(b"x"), 10) == b"x"
        cut = cut_one(draw)
        assert cut is not None and cut.path == listener.address.path and not cut.closed
        with pytest.raises(SocketError):
            line.wait(line.send(b"x"), 10)
        assert cut.closed and not cut.mended
        line = Connection(listener.address)
        assert cut.mended
    line.close()
    listener.close()
