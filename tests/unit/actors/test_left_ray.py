"""A process that is not connected to Ray: what threads of rayk still ask there must not start a Ray of their own."""

import subprocess
import sys

ASK = """
import ray
from rayk.actors.interface import ActorGoneError, ActorSpec
from rayk.actors.runtime import RayActor, RayRuntime

runtime = RayRuntime()
questions = {
    "get": lambda: runtime.get(None, "replica 0", 1.0),
    "nodes": runtime.nodes,
    "draining_nodes": runtime.draining_nodes,
    "run_on": lambda: runtime.run_on("node", print),
    "place": lambda: runtime.place([{"CPU": 1}], (), 1.0),
    "start": lambda: runtime.start(ActorSpec(dict, ())),
    "find": lambda: runtime.find("scheduler"),
    "groups": lambda: runtime.groups("manager"),
    "call": lambda: RayActor(None).call("ping"),
}
for name, question in questions.items():
    try:
        question()
    except ActorGoneError as error:
        assert "not connected to Ray" in str(error), name
    else:
        raise AssertionError(name)
assert runtime.get_all([None], 1.0) is None
runtime.stop([], None)
runtime.keep("key", None)
assert not ray.is_initialized()
print("none was started")
"""


def test_nothing_that_is_asked_starts_one() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=120)
    assert "none was started" in done.stdout, done.stderr
