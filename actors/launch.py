"""The launcher of actors, of cache replicas and of engines: measure nodes, place, start, add and end.

The first actors of a set share one placement group. Each later one has a group of its own, so that Ray's autoscaler
sees the request while it waits, and so that its resources go back when the actor is removed. The successor of a lost
actor takes its bundle if others use the same group. Whatever fails, nothing is left behind.

The two kinds differ in the actors' class and arguments, and in what they are asked until they are ready.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rayk.actors.interface import Actor, ActorGoneError, ActorSpec, Bundle, Node, Placement, Runtime
from rayk.actors.replica import measure
from rayk.actors.secret import Challenge, Proof
from rayk.errors import PlanError, RaykError
from rayk.planning.node_plan import NodeMemory
from rayk.tiers.identity import read_seed, take_seed

log = logging.getLogger("rayk.scheduler")

PLACE_SECONDS = 60.0
START_SECONDS = 180.0  # for an actor without a model, or a task on a node
SLIVER = 0.001  # of a CPU: Ray refuses an empty bundle, and many replicas must fit a small machine


@dataclass(frozen=True)
class PlacedActor:
    """A started actor in its bundle."""

    actor: Actor
    bundle: Bundle


class Places(NamedTuple):
    """A bundle for each index; `groups` were made for them."""

    bundles: dict[int, Bundle]
    groups: list[Placement]


def proof_for(runtime: Runtime, scheduler: Actor, seconds: float) -> Proof | None:
    """What the secret of this driver's session, if it has one, gives that scheduler; see Authenticator.challenge()."""
    if runtime.secret is None:
        return None
    asked: Challenge = runtime.get(scheduler.call("challenge", control=True), "the scheduler", seconds)
    return runtime.secret.prove(asked)


# -- nodes -----------------------------------------------------------------------------------------------


def measure_nodes(
    runtime: Runtime,
    nodes: Sequence[Node] | None = None,
    disk_dir: Path | None = None,
    taken: Mapping[str, int] | None = None,
) -> list[NodeMemory]:
    """What nodes (None: all live ones) offer, measured by a task on each that holds none of it; the disk at `disk_dir`
    too. `taken`: bytes by node id that are promised already of what Ray was told of."""

    def limit(node: Node) -> int | None:
        memory = node.resources.get("memory")  # what Ray was told that it may use there
        return max(0, int(memory) - (taken or {}).get(node.node_id, 0)) if memory else None

    given, disk = nodes, str(disk_dir) if disk_dir is not None else None
    if given is None:
        going = runtime.draining_nodes()  # Ray starts nothing there any more
        nodes = [node for node in runtime.nodes() if node.node_id not in going]
    assert nodes is not None
    refs = [runtime.run_on(node.node_id, measure, node.node_id, node.host_name, limit(node), disk) for node in nodes]
    measured = list[NodeMemory]()
    for ref, node in zip(refs, nodes, strict=True):
        try:
            measured.append(runtime.get(ref, f"the planner on node {node.host_name}", START_SECONDS))
        except ActorGoneError as error:
            if given is not None or node in runtime.nodes():
                raise PlanError(f"a node could not be measured: {error}") from None
            log.warning("node %s went while it was measured", node.host_name)
    return measured


def tier_seed(runtime: Runtime, folder: Path | None, nodes: Sequence[Node] | None = None) -> bytes:
    """The seed that the tier directories at `folder` of nodes (None: all) were used with before, else a new one."""
    if folder is None or not (nodes := runtime.nodes() if nodes is None else nodes):
        return os.urandom(32)
    refs = [runtime.run_on(node.node_id, read_seed, folder) for node in nodes]
    try:
        for node, ref in zip(nodes, refs, strict=True):
            found: bytes | None = runtime.get(ref, f"node {node.host_name}", START_SECONDS)
            if found is not None:
                return found
        made: bytes = runtime.get(  # others may start on the same folder: who is first decides
            runtime.run_on(nodes[0].node_id, take_seed, folder), f"node {nodes[0].host_name}", START_SECONDS
        )
        return made
    except ActorGoneError as error:
        raise PlanError(f"a node could not be asked for its tier's seed: {error}") from None


# -- placement -------------------------------------------------------------------------------------------


def place_actors(
    runtime: Runtime,
    placed: Mapping[int, PlacedActor],
    indices: Sequence[int],
    gpus: int,
    refused: Mapping[str, str],
    timeout: float,
    name: str | None = None,
) -> Places:
    """Bundles for actors of those indices, beside the actors that are `placed`, on nodes that are not `refused` (for a
    reason each); groups of detached actors bear a `name`. PlanError, and nothing is held, when there are none within
    `timeout` seconds."""
    deadline, wanted = time.monotonic() + timeout, {"CPU": SLIVER} | ({"GPU": float(gpus)} if gpus else {})
    bundles: dict[int, Bundle] = {}
    for index in [each for each in indices if shares_group(placed, each)]:
        placement, at = placed[index].bundle
        bundles[index] = Bundle(runtime.await_place(placement, deadline - time.monotonic()), at)
    new, groups = [index for index in indices if index not in bundles], list[Placement]()
    if new:
        wish = [wanted] * len(new), list(refused), max(0.0, deadline - time.monotonic())
        try:
            groups = runtime.place_each(*wish, name) if placed else [runtime.place(*wish, name)]
        except PlanError as error:
            why = "; ".join(refused.values())
            raise type(error)(f"{error}; left out: {why}" if why else str(error)) from None
    free = [Bundle(group, at) for group in groups for at in range(len(group.node_ids))]
    bundles |= dict(zip(new, free, strict=True))
    return Places({index: bundles[index] for index in indices}, groups)


def shares_group(placed: Mapping[int, PlacedActor], index: int) -> bool:
    """Whether others use the placement group of that one."""
    group = placed[index].bundle.placement.group if index in placed else None
    return any(each.bundle.placement.group == group for other, each in placed.items() if other != index)


# -- start and end ---------------------------------------------------------------------------------------


@contextmanager
def ended_on_failure(runtime: Runtime, actors: Sequence[Actor], groups: Iterable[Placement] = ()) -> Iterator[None]:
    """Where this fails, actors (also those that come to the list in it) are ended, and groups are given back."""
    try:
        yield
    except BaseException:
        stop_actors(runtime, (), groups, actors)
        raise


@contextmanager
def starting(runtime: Runtime, specs: Iterable[ActorSpec]) -> Iterator[list[Actor]]:
    """Actors that start side by side. They are ended when one fails, or what is done here until they are ready."""
    started: list[Actor] = []
    with ended_on_failure(runtime, started):
        for spec in specs:
            started.append(runtime.start(spec))
        yield started


def first_answers(runtime: Runtime, calls: Mapping[str, Any], timeout: float) -> list[Any]:
    """What actors that are being started answer, by their names in errors. PlanError says which could not start."""
    answers = []
    for target, ref in calls.items():
        try:
            answers.append(runtime.get(ref, target, timeout))
        except ActorGoneError as error:
            raise PlanError(f"{target} could not start: {error}") from None
    return answers


def find_sockets(runtime: Runtime, actors: Mapping[str, Actor]) -> None:
    """Have actors, by their names in errors, listen on sockets, and note where."""
    if runtime.sockets:
        calls = {target: actor.call("listen", control=True) for target, actor in actors.items()}
        for actor, socket in zip(actors.values(), first_answers(runtime, calls, START_SECONDS), strict=True):
            actor.socket = socket


def close_actors(runtime: Runtime, actors: Iterable[Actor], timeout: float) -> None:
    """Have actors write out what is on its way to their tiers, and let go of them, as long as they live."""
    closing = []
    for actor in actors:
        with suppress(ActorGoneError):
            closing.append(actor.call("close"))
    deadline = time.monotonic() + timeout
    for ref in closing:
        with suppress(ActorGoneError, RaykError):  # a dead or hung replica's share is cleaned up by the next
            runtime.get(ref, "a replica", max(0.0, deadline - time.monotonic()))


def vacate(runtime: Runtime, placed: Mapping[int, PlacedActor], indices: Iterable[int]) -> None:
    """End what is left of actors of those indices, and give placement groups back unless others use them."""
    for index in indices:
        if index in placed:
            group = None if shares_group(placed, index) else placed[index].bundle.placement
            runtime.stop([placed[index].actor], group)


def stop_actors(
    runtime: Runtime,
    placed: Iterable[PlacedActor],
    groups: Iterable[Placement] = (),
    others: Sequence[Actor] = (),
) -> None:
    """End actors, also `others`, and give their placement groups back, also `groups`; returns when they are gone."""
    placed = list(placed)
    unique = {each.group: each for each in (*groups, *(each.bundle.placement for each in placed))}
    first, *more = unique.values() or [None]
    runtime.stop([*others, *(each.actor for each in placed)], first)
    for group in more:
        runtime.stop((), group)
