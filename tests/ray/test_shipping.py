"""A checkout that is shipped as a working directory: replicas run from it, the linked packages included."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from rayk import InferenceSession
from rayk.actors.interface import ActorSpec
from rayk.errors import RaykError

from ..unit.protocol.test_errors import KINDS  # noqa: TID252  # tests/ is no package that has an absolute name

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Failing:
    """An actor that raises what it is given."""

    def ping(self) -> None:
        pass

    def fail(self, wire: bytes) -> None:
        raise pickle.loads(wire)


def test_every_error_arrives_with_its_type_and_fields(session: InferenceSession) -> None:
    actor = session.ray.start(ActorSpec(Failing, ()))
    kinds = [kind for kind in KINDS if kind is not RaykError]
    for kind in kinds:
        values = {"str": "some {text}", "int": 3, "float": 2.5, "list[str]": ["a", "b"], "dict[str, str]": {"a": "why"}}
        types = {k: v for base in reversed(kind.__mro__) for k, v in vars(base).get("__annotations__", {}).items()}
        error = kind(*(values.get(types[name], [{"x": 1}]) for name in kind.fields))
        with pytest.raises(kind) as caught:
            session.ray.get(actor.call("fail", pickle.dumps(error)), "it", 20)
        assert type(caught.value) is kind and caught.value.args == error.args and str(caught.value) == str(error)
        assert {n: getattr(caught.value, n) for n in kind.fields} == {n: getattr(error, n) for n in kind.fields}
    assert len(kinds) > 40
    session.ray.stop([actor], None)


SCRIPT = """
import json, os, sys
from rayk import InferenceSession, MHAKVCacheParams, PagedKVCacheManager

def where(inputs, batch):
    import rayk.actors.replica, rayk.scheduler.core
    return [rayk.__file__, rayk.actors.replica.__file__, rayk.scheduler.core.__file__]

p = MHAKVCacheParams(dtype="float32", n_kv_heads=1, head_dim=4, num_layers=1, page_size=4, devices=["cpu"])
with InferenceSession("ray", "local", runtime_env={"working_dir": sys.argv[1]}, log_to_driver=False) as session:
    with PagedKVCacheManager(p, session, 8, max_batch_size=4) as manager:
        print(json.dumps(manager.execute([[]], where)[0]))
"""


def test_replicas_run_from_a_shipped_checkout(repo: Path, ray_tmpdir: Path) -> None:
    checkout = ray_tmpdir / "checkout"
    checkout.mkdir()
    for name in ("rayk", "actors", "scheduler"):
        shutil.copytree(repo / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    folder = ray_tmpdir / "w"
    folder.mkdir()
    script = folder / "driver.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(script), str(checkout)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout.splitlines()[-1])
    assert all("working_dir_files" in file for file in files), files
