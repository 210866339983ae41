"""A Cluster with a name: several drivers, in one process and in their own, that come, go and are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import cloudpickle

from rayk import Cluster, Handle, InferenceSession
from rayk.actors.describe_cluster import describe_cluster
from rayk.actors.removal import remove_session
from rayk.cli.cluster_view import ClusterView
from rayk.cli.describe import _show_cluster, taken
from rayk.errors import (
    ConfigError,
    DrainError,
    NotOwnerError,
    ReplicaRemovedError,
    ReplicaStateError,
    SchedulerLostError,
    SecretError,
)
from rayk.request_errors import RequestCancelledError, RequestError

from ..patience import scaled, until  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine import fake  # noqa: TID252  # tests/ is no package that has an absolute name
from ..unit.engine.fake import PageModel, Tokenizer, expected  # noqa: TID252  # as above
from .forwards import running
from .heads import Start, said, stderr, tell

cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SETTINGS = {"replicas": 2, "page_size": 4, "pages": 200, "max_batch_size": 8, "chunk_size": 32}


def model(device: str) -> PageModel:
    class Slow(PageModel):
        def logits(self, inputs, tokens, counts):  # type: ignore[no-untyped-def]
            time.sleep(0.005)  # so that there is something to interrupt
            return super().logits(inputs, tokens, counts)

    return Slow(tokenizer=Tokenizer())


@pytest.fixture(scope="module")
def named(session: InferenceSession) -> Iterator[InferenceSession]:
    with InferenceSession("ray", name="prod") as named:
        yield named


@pytest.fixture(scope="module")
def owner(named: InferenceSession) -> Iterator[Cluster]:
    cluster = Cluster(model, named, **SETTINGS)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def guest(owner: Cluster, named: InferenceSession) -> Iterator[Cluster]:
    with Cluster.attached(named) as guest:
        yield guest


def quiet(cluster: Cluster) -> None:
    """Nobody has anything, and the scheduler knows."""
    state = cluster._dispatcher._link.state  # type: ignore[union-attr]  # it has a name
    until(lambda: not any(state().requests) and not any(d[1] + d[2] for d in state().drivers.values()))
    for replica in cluster.live:
        until(lambda replica=replica: cluster.stats(replica).free_pages == 200)
    cluster.check_integrity()


# -- in one process ------------------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_a_cluster_in_this_process(owner: Cluster, guest: Cluster) -> None:
    """Whoever asks, with equal ids at once, greedy and seeded."""
    prompts = [{"id": f"same-{i}", "tokens": [i, *range(20), i]} for i in range(24)]
    with Cluster(model, **SETTINGS) as inline:
        wanted = [inline.generate(prompts, max_new_tokens=10, **how) for how in ({}, {"temperature": 1.0, "seed": 7})]
    for how, answers in zip(({}, {"temperature": 1.0, "seed": 7}), wanted, strict=True):
        handles = guest.submit_all(prompts, max_new_tokens=10, **how)
        mine = owner.generate(prompts, max_new_tokens=10, **how)
        theirs = [handle.result(60) for handle in handles]
        assert [output.tokens for output in mine] == [output.tokens for output in answers]
        assert [output.tokens for output in theirs] == [output.tokens for output in answers]
        assert {output.replica for output in mine} == {0, 1} and [o.id for o in mine] == [p["id"] for p in prompts]
    assert guest.explain("same-3").replica in (0, 1) and owner.explain("same-3").tokens == 22
    quiet(owner)


def test_bad_requests_are_told_to_who_sent_them(owner: Cluster, guest: Cluster) -> None:
    good, bad, late = guest.generate([[1, 2], {"id": "bad", "tokens": [500]}, [3]], max_new_tokens=3)
    assert good.tokens == expected([1, 2], 3) and late.tokens == expected([3], 3)
    assert isinstance(bad.error, RequestError) and bad.error.request_id == "bad" and "vocabulary" in str(bad.error)
    [late] = owner.generate([[7]], max_new_tokens=150, timeout=0.05)
    assert late.finish_reason == "timeout" and "request-" in str(late.error)
    quiet(owner)


def test_cancelled_streams_end_everywhere(owner: Cluster, guest: Cluster) -> None:
    for update in guest.stream([[i, 5] for i in range(30)], max_new_tokens=100):
        if update.tokens:
            break
    handle = owner.submit([9, 9], max_new_tokens=100)
    handle.cancel()
    assert isinstance(handle.result(20).error, RequestCancelledError)
    quiet(owner)


def test_neither_calls_nor_drivers_hold_up_each_other(owner: Cluster, guest: Cluster) -> None:
    many = owner.submit_all([[i % 90, 1] for i in range(400)], max_new_tokens=20)
    more = owner.submit_all([[i % 90, 2] for i in range(400)], max_new_tokens=20)
    mine = guest.generate([[i, 3] for i in range(10)], max_new_tokens=5)
    assert [output.tokens for output in mine] == [expected([i, 3], 5) for i in range(10)]
    assert sum(handle.done for handle in many + more) < 400, "they wait for their turn"
    owner._dispatcher.cancel(*many, *more)
    quiet(owner)


def test_any_driver_adds_drains_and_removes(owner: Cluster, guest: Cluster) -> None:
    assert guest.add_replicas() == [2]
    until(lambda: owner.replica_states() == ["ready"] * 3)
    handles = owner.submit_all([[i, 4] for i in range(40)], max_new_tokens=60)
    until(lambda: all(handle.tokens for handle in handles[:20]))
    guest.drain_replica(2, hand_over=True)
    assert owner.remove_replica(2).cached >= 0
    assert [handle.result(60).tokens for handle in handles] == [expected([i, 4], 60) for i in range(40)]
    assert all(handle.retries == 0 for handle in handles)
    until(lambda: guest.replica_states() == owner.replica_states() == ["ready", "ready", "removed"])
    with pytest.raises(ReplicaRemovedError):
        owner.stats(2)
    handle = owner.submit([1, 6], max_new_tokens=150)
    until(lambda: handle.tokens)
    with pytest.raises(DrainError):
        guest.remove_replica(handle.replica, hand_over=False, timeout=0.05)  # type: ignore[arg-type]  # it is placed
    with pytest.raises(ReplicaStateError, match="last one"):
        guest.remove_replica(1 - handle.replica)  # type: ignore[operator]  # as above
    guest.resume_replica(handle.replica)  # type: ignore[arg-type]  # as above
    assert handle.result(60).tokens == expected([1, 6], 150)
    quiet(owner)


def test_a_killed_replica_costs_no_token_and_comes_back(owner: Cluster, guest: Cluster) -> None:
    import ray

    mine = owner.submit_all([[i, 7] for i in range(12)], max_new_tokens=150)
    theirs = guest.submit_all([[i, 8] for i in range(12)], max_new_tokens=150)

    def run_there(handles: list[Handle]) -> bool:
        return any(handle.replica == 0 and 0 < len(handle.tokens) < 75 for handle in handles)

    until(lambda: run_there(mine) and run_there(theirs))
    ray.kill(guest._replicas.handles[0].actor.handle)  # type: ignore[attr-defined]  # a named one's
    assert [handle.result(60).tokens for handle in mine] == [expected([i, 7], 150) for i in range(12)]
    assert [handle.result(60).tokens for handle in theirs] == [expected([i, 8], 150) for i in range(12)]
    assert any(handle.retries for handle in mine) and any(handle.retries for handle in theirs)
    until(lambda: owner.replica_states()[:2] == ["ready", "ready"] == guest.replica_states()[:2], 60)
    prompts = [[i, 9] for i in range(30)]
    for cluster in (owner, guest):
        outputs = cluster.generate(prompts, max_new_tokens=4)
        assert [output.tokens for output in outputs] == [expected(prompt, 4) for prompt in prompts]
        assert {output.replica for output in outputs} == {0, 1}
    quiet(owner)


def test_a_hung_replica_is_replaced(owner: Cluster, guest: Cluster, named: InferenceSession) -> None:
    handle = owner._replicas.handles[1]  # type: ignore[attr-defined]  # a named one's
    pid, began = named.ray.get(handle.actor.call("pid", control=True), "it", 10), time.monotonic()
    mine = owner.submit_all([[i, 13] for i in range(12)], max_new_tokens=150)
    until(lambda: any(each.replica == 1 and each.tokens for each in mine))
    os.kill(pid, signal.SIGSTOP)
    assert [(each.result(60).error, each.retries) for each in mine if each.result(60).error is not None] == []
    assert [each.result(60).tokens for each in mine] == [expected([i, 13], 150) for i in range(12)]
    until(lambda: owner._replicas.handles[1].start != handle.start, 60)  # type: ignore[attr-defined]  # as above
    assert time.monotonic() - began < scaled(40), "not after the minute that it takes where nobody is replaced"
    until(lambda: guest.replica_states()[:2] == ["ready", "ready"] and not running([pid]))
    quiet(owner)


def test_it_belongs_to_who_started_it(owner: Cluster, guest: Cluster, named: InferenceSession) -> None:
    with pytest.raises(NotOwnerError, match="was started by driver"):
        guest.shutdown()
    with pytest.raises(ConfigError, match="page_size, pages"):
        Cluster(model, named, **SETTINGS | {"page_size": 8, "pages": 100})
    with Cluster(model, named, **SETTINGS) as same:  # attaches, and leaves
        assert same.generate([[5]], max_new_tokens=2)[0].tokens == expected([5], 2)
    assert owner.generate([[5]], max_new_tokens=2)[0].tokens == expected([5], 2)
    with InferenceSession("ray", name="nobody") as other, pytest.raises(ConfigError, match="no Cluster runs"):
        Cluster.attached(other)


def test_it_is_described(
    owner: Cluster, guest: Cluster, named: InferenceSession, capsys: pytest.CaptureFixture
) -> None:  # type: ignore[type-arg]
    from rich.console import Console

    state = describe_cluster(named.ray, "prod")
    assert state is not None and state.model == "model" and len(state.drivers) == 2
    assert [each.state for each in state.replicas] == ["ready", "ready"]
    assert [driver.owner for driver in state.drivers] == [True, False]
    _show_cluster(state, Console(width=200))
    assert "which owns it" in capsys.readouterr().out
    view = ClusterView()
    view.take(0.0, *taken(named.ray, "prod"))
    owner.generate([[7, 8, 9]] * 4, max_new_tokens=5)
    view.take(1.0, *taken(named.ray, "prod"))
    assert [row.state for row in view.rows] == ["ready", "ready"]
    assert sum(row.generated or 0 for row in view.rows) == 20 and sum(row.prompt or 0 for row in view.rows) == 12
    assert all((row.used or 0) + (row.cached or 0) + (row.free or 0) == state.replicas[0].pages for row in view.rows)
    names = {each.metric.name for each in guest.readings()}
    assert {"rayk_placement_seconds", "rayk_replica_state", "rayk_tokens_total", "rayk_ttft_seconds"} <= names
    assert view.line.startswith("2 ready")


def test_the_command_line_takes_its_name(owner: Cluster, tmp_path: Path) -> None:
    import ray

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "tokens": [4, 4], "max_new_tokens": 5}')
    address = ray.get_runtime_context().gcs_address
    flags = ["--name", "prod", "--address", address, "--prompts", str(prompts), "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "rayk", "generate", *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["tokens"] == expected([4, 4], 5)
    quiet(owner)


def test_a_driver_that_was_stopped_for_long_goes_on(owner: Cluster, guest: Cluster) -> None:
    """Its lease has ended, and its requests everywhere: it comes again and asks for what is not over."""
    link = guest._dispatcher._link  # type: ignore[union-attr]  # it has a name
    handles = guest.submit_all([[i, 11] for i in range(20)], max_new_tokens=60)
    until(lambda: all(handle.tokens for handle in handles[:4]))
    before = link.number
    link._ask("leave", before)  # as the scheduler's timer does
    assert [handle.result(60).tokens for handle in handles] == [expected([i, 11], 60) for i in range(20)]
    assert link.number > before
    quiet(owner)


def test_a_secret_keeps_others_out(session: InferenceSession, tmp_path: Path) -> None:
    """And tenants that are kept apart are, whichever driver they come by."""
    import ray

    word = "correct horse battery"
    with InferenceSession("ray", name="locked", secret=word) as first:
        cluster = Cluster(model, first, isolate_tenants=True, **SETTINGS)
        for secret in (None, "another secret"):
            with (
                InferenceSession("ray", name="locked", secret=secret) as other,
                pytest.raises(SecretError, match="locked"),
            ):
                Cluster.attached(other)
        with InferenceSession("ray", name="locked", secret=word) as second, Cluster.attached(second) as guest:
            for driver, tenant, cached in ((cluster, "a", 0), (guest, "b", 0), (guest, "a", 16), (cluster, "b", 16)):
                [output] = driver.generate([{"tokens": list(range(17)), "tenant": tenant}], max_new_tokens=2)
                assert output.tokens == expected(list(range(17)), 2) and output.cached_tokens == cached
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "rayk", "down", "locked", "--address", address]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 2 and "'locked/cluster': it was started with a secret" in refused.stderr
        assert cluster.replica_states() == ["ready", "ready"]
        (tmp_path / "secret").write_text(word)
        done = subprocess.run(
            [*command, "--secret-file", str(tmp_path / "secret")], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and "3 actor(s) ended" in done.stdout
        assert word not in done.stdout + done.stderr + refused.stderr
        cluster.leave()


def test_it_can_always_be_removed(session: InferenceSession) -> None:
    with InferenceSession("ray", name="leftover") as left:
        cluster = Cluster(model, left, **SETTINGS)
        pids = [
            left.ray.get(handle.actor.call("pid", control=True), "it", 10)
            for handle in cluster._replicas.handles.values()  # type: ignore[attr-defined]  # it has a name
        ]
        handle = cluster.submit([1, 2], max_new_tokens=150)
        ended = remove_session(left.ray, "leftover")  # as `rayk down` does
        assert ended == (3, 1)
        assert handle.result(30).error is not None
        cluster.leave()
    until(lambda: not running(pids))


def scheduler_pid(cluster: Cluster, session: InferenceSession) -> int:
    actor = cluster._dispatcher._link.actor  # type: ignore[union-attr]  # it has a name
    pid: int = session.ray.get(actor.call("pid", control=True), "the scheduler", 10)
    return pid


class Pauses:
    """The longest time between two tokens of any of these streams, from now on."""

    def __init__(self, handles: list[Handle]) -> None:
        self.handles, self.longest = handles, 0.0
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        last = {id(handle): (time.monotonic(), -1) for handle in self.handles}
        while not all(handle.done for handle in self.handles):
            for handle in self.handles:
                now, count, (since, before) = time.monotonic(), len(handle.tokens), last[id(handle)]
                if handle.done or count != before:
                    self.longest = max(self.longest, now - since if before >= 0 and not handle.done else 0.0)
                    last[id(handle)] = now, count
            time.sleep(0.005)

    def seconds(self) -> float:
        self.thread.join(60)
        return self.longest


def test_a_killed_scheduler_begins_anew_and_nobody_loses_anything(
    owner: Cluster, guest: Cluster, named: InferenceSession
) -> None:
    """Streams go on meanwhile, what waits gets its place, calls made meanwhile are answered."""
    prompts = [[i, 12] for i in range(60)]
    mine, theirs = (cluster.submit_all(prompts, max_new_tokens=100) for cluster in (owner, guest))
    until(lambda: sum(bool(handle.tokens) for handle in mine + theirs) >= 8)
    running_ = [handle for handle in mine + theirs if handle.tokens]
    assert any(handle.replica is None for handle in mine + theirs), "some wait"
    pid, watched = scheduler_pid(owner, named), Pauses(running_)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    [added] = owner.add_replicas()  # a call made meanwhile
    [first] = guest.generate([[7, 7]], max_new_tokens=1)
    assert first.error is None and time.monotonic() - began < 30
    assert watched.seconds() < 1.0
    assert [handle.result(60).tokens for handle in mine] == [expected(p, 100) for p in prompts]
    assert [handle.result(60).tokens for handle in theirs] == [expected(p, 100) for p in prompts]
    assert all(handle.retries == 0 for handle in mine + theirs)
    assert scheduler_pid(owner, named) != pid
    assert owner.remove_replica(added).cached >= 0
    quiet(owner)
    assert owner._dispatcher._link.owner() == owner._dispatcher._link.client  # type: ignore[union-attr]  # as above


def test_a_scheduler_that_hangs_is_ended_and_begins_anew(
    owner: Cluster, guest: Cluster, named: InferenceSession
) -> None:
    handles = owner.submit_all([[i, 15] for i in range(8)], max_new_tokens=150)
    until(lambda: all(handle.tokens for handle in handles))
    pid, watched = scheduler_pid(owner, named), Pauses(handles)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert watched.seconds() < 1.0
    assert [handle.result(60).tokens for handle in handles] == [expected([i, 15], 150) for i in range(8)]
    [output] = guest.generate([[3, 3]], max_new_tokens=3, timeout=60)
    assert output.tokens == expected([3, 3], 3) and time.monotonic() - began < 25
    until(lambda: not running([pid]))
    quiet(owner)


def test_one_that_is_ended_on_purpose_says_so(session: InferenceSession) -> None:
    import ray

    with InferenceSession("ray", name="lone") as lone:
        cluster = Cluster(model, lone, **SETTINGS | {"replicas": 1})
        pid = lone.ray.get(cluster._replicas.handles[0].actor.call("pid", control=True), "it", 10)  # type: ignore[attr-defined]
        handles = cluster.submit_all([[i, 12] for i in range(40)], max_new_tokens=100)
        until(lambda: all(handle.tokens for handle in handles[:8]))
        placed = [handle for handle in handles if handle.replica is not None]
        ray.kill(cluster._dispatcher._link.actor.handle)  # type: ignore[union-attr]  # it has a name
        for i, handle in enumerate(handles):
            output = handle.result(60)
            if handle in placed:
                assert output.tokens == expected([i, 12], 100)
            else:
                assert output.error is None or isinstance(output.error, SchedulerLostError)
        assert any(handle.result().error is not None for handle in handles), "some waited"
        [late] = cluster.generate([[1, 2]])
        assert isinstance(late.error, SchedulerLostError)
        cluster.close()
    until(lambda: not running([pid]))


# -- in processes of their own -----------------------------------------------------------------------------------------

DRIVER = f"""
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ray import cloudpickle
import rayk.actors.serving_link as link
from tests.unit.engine import fake
cloudpickle.register_pickle_by_value(fake)
cloudpickle.register_pickle_by_value(sys.modules["__main__"])
link.LEASE_SECONDS = 2.0 * SCALE

def model(device):
    class Slow(fake.PageModel):
        def logits(self, inputs, tokens, counts):
            time.sleep(0.01)
            return super().logits(inputs, tokens, counts)
    return Slow(tokenizer=fake.Tokenizer())

def read(cluster, salt, count, length=150):
    tokens = {{i: [] for i in range(count)}}
    prompts = [{{"id": f"r{{i}}", "tokens": [i, salt]}} for i in range(count)]
    for update in cluster.stream(prompts, max_new_tokens=length):
        tokens[update.index] += update.tokens
        if update.output is not None and update.output.error is not None:
            say(error=str(update.output.error))
        if all(tokens.values()) and not read.said:
            read.said = True
            say(streams=True)
    return list(tokens.values())
read.said = False
"""


def test_two_drivers_die_and_a_third_goes_on(start: Start) -> None:
    first = start(
        DRIVER
        + """
cluster = Cluster(model, join(), replicas=2, page_size=4, pages=400, max_batch_size=16)
say(pids=[os.getpid()], states=cluster.replica_states())
sys.stdin.readline()
say(tokens=read(cluster, 1, 12))
sys.stdin.readline()
while len(cluster._dispatcher._link.state().drivers) > 1:
    time.sleep(.05)
state = cluster._dispatcher._link.state()
used = [cluster.stats(r).pages - cluster.stats(r).free_pages for r in range(2)]
say(requests=state.requests, used=used)
read.said = False
read(cluster, 5, 12, 390)
""",
        "served",
    )
    assert said(first)["states"] == ["ready", "ready"]
    second = start(DRIVER + "cluster = rayk.attach(NAME, ADDRESS)\nsay(up=True)\nread(cluster, 2, 12, 390)\n", "served")
    assert said(second) == {"up": True}
    tell(first)
    assert said(second) == said(first) == {"streams": True}
    second.send_signal(signal.SIGKILL)
    second.wait(10)
    assert said(first) == {"tokens": [expected([i, 1], 150) for i in range(12)]}
    tell(first)
    assert said(first) == {"requests": [0, 0], "used": [0, 0]}, "what the killed one had is gone with its lease"
    assert said(first) == {"streams": True}
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    third = start(
        DRIVER
        + """
cluster = rayk.attach(NAME, ADDRESS)
pids = [cluster._session.ray.get(h.actor.call("pid", control=True), "an engine", 10)
        for h in cluster._replicas.handles.values()]
say(tokens=[o.tokens for o in cluster.generate([[i, 3] for i in range(8)], max_new_tokens=20)], pids=pids)
while cluster._dispatcher._link.owner():
    time.sleep(.05)
cluster.shutdown()
say(groups=groups())
""",
        "served",
    )
    answer = said(third)
    assert answer["tokens"] == [expected([i, 3], 20) for i in range(8)], stderr(third)
    assert said(third) == {"groups": 0} and third.wait(30) == 0
    until(lambda: not running(answer["pids"]))
    assert "Traceback" not in stderr(third), stderr(third)


def test_what_a_killed_driver_was_starting_is_taken_back(start: Start) -> None:
    """Its engine runs, and never joined: it ends with the driver's lease, and its place is given back."""
    first = start(
        DRIVER
        + """
from rayk.actors.runtime import RayRuntime
cluster = Cluster(model, join(), replicas=1, page_size=4, pages=100, max_batch_size=4)
runtime = RayRuntime(f"rayk-{NAME}")
def left():
    return [len(runtime.actor_names()), groups()]
say(left=left())
sys.stdin.readline()
say(left=left())
deadline = time.monotonic() + 30 * SCALE
while left() != [2, 1] and time.monotonic() < deadline:
    time.sleep(.05)
say(left=left(), states=cluster.replica_states())
cluster.shutdown()
""",
        "strays",
    )
    assert said(first) == {"left": [2, 1]}, "an engine and the scheduler"
    second = start(
        DRIVER
        + """
cluster = rayk.attach(NAME, ADDRESS)
cluster._dispatcher.join = lambda *given: (say(started=True), time.sleep(300))
cluster.add_replicas()
""",
        "strays",
    )
    assert said(second) == {"started": True}
    second.send_signal(signal.SIGKILL)
    second.wait(10)
    tell(first)
    assert said(first) == {"left": [3, 2]}
    told = said(first)
    assert told["left"] == [2, 1] and told["states"][0] == "ready"
    assert first.wait(30) == 0


def test_two_drivers_that_start_it_at_once_share_it(start: Start) -> None:
    code = """
session = join()
say(ready=True)
sys.stdin.readline()
cluster = Cluster(model, session, replicas=1, page_size=4, pages=100, max_batch_size=4)
say(tokens=cluster.generate([[4, 2]], max_new_tokens=5)[0].tokens, number=cluster._dispatcher._link.number)
sys.stdin.readline()
cluster.close()
say(groups=groups())
"""
    drivers = [start(DRIVER + code, "race") for _ in range(2)]
    for driver in drivers:
        assert said(driver) == {"ready": True}
    for driver in drivers:
        tell(driver)
    answers = [said(driver) for driver in drivers]
    assert [answer["tokens"] for answer in answers] == [expected([4, 2], 5)] * 2
    assert sorted(answer["number"] for answer in answers) == [1, 2], json.dumps(answers)
    for driver in drivers:
        tell(driver)
    assert {"groups": 0} in [said(driver) for driver in drivers]
