"""A router that somebody wrote in a file of their own is used by name, everywhere that takes one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from rayk import Cluster, InferenceSession, PagedKVCacheManager, TextContext
from rayk.cli.main import main

from ..unit.engine.fake import PageModel  # noqa: TID252  # tests/ is no package

ROUTER = '''
"""Everything goes to the last replica that takes requests."""
import numpy as np
from rayk.scheduler.router.policy import Decision

chosen = []

class Last:
    wants_keys = True

    def __init__(self, index, page_size):
        self.index = index

    def choose(self, request, loads):
        chosen.append(len(request.keys))
        return Decision(int(np.flatnonzero(loads.ready)[-1]))
'''


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_router.py").write_text(ROUTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "my_router:Last"
    sys.modules.pop("my_router", None)


def test_in_the_manager_and_the_cluster(name: str) -> None:
    import my_router

    from ..unit.actors.fake import params  # noqa: TID252  # tests/ is no package

    with PagedKVCacheManager(params(3), InferenceSession(), 8, max_batch_size=4, router=name) as manager:
        assert manager.admit([TextContext("r", range(9), 100)]) == [2]
        assert my_router.chosen == [2], "it was given the keys of both pages that may be reused"
    with Cluster(lambda device: PageModel(), replicas=2, page_size=4, pages=16, device="cpu", router=name) as cluster:
        outputs = cluster.generate([[5, 6, 7], [8, 9]], max_new_tokens=2)
        assert [output.replica for output in outputs] == [1, 1] and not any(output.error for output in outputs)


def test_on_the_command_line(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    work = ["--workload", "chat", "--requests", "20", "--page-size", "16"]
    simulate = ["simulate", *work, "--replicas", "2", "--capacity", "4096", "--router", f"cost,{name}"]
    assert main([*simulate, "--format", "json"]) == 0
    cost, last = msgspec.json.decode(capsys.readouterr().out)["rows"]
    assert (last["router"], last["imbalance"]) == (name, 2.0) and cost["imbalance"] < 2
    bench = ["bench", *work, "--replicas", "2", "--pages", "2000", "--runtime", "inline", "--router", name]
    assert main([*bench, "--forward", "verify", "--out", str(tmp_path / "out")]) == 0
    result = msgspec.json.decode((tmp_path / "out" / "result.json").read_bytes())
    assert result["config"]["router"] == name
    assert main([*bench[:-1], "my_router:First"]) == 2
    assert "router 'my_router:First' cannot be loaded" in capsys.readouterr().err
