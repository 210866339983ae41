"""All calls to Ray: the only module that imports it.

`Runtime` is what the rest of rayk asks of a cluster; unit tests use a fake of it. `RayRuntime` maps Ray's
errors to two of its own, ActorGoneError and CallTimeoutError: who calls knows which replica it was.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray import PlacementGroupID
from ray import exceptions as ray_errors
from ray.actor import ActorHandle
from ray.experimental import internal_kv
from ray.util import list_named_actors
from ray.util import metrics as ray_metrics
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rayk.actors.address import host_and_port, knock, make_temp_dir, refusal, running_address, same_place, unheard
from rayk.actors.interface import (
    CONTROL_GROUP,
    Actor,
    ActorAwayError,
    ActorGoneError,
    ActorSpec,
    NameTakenError,
    Node,
    Placement,
    SocketAddress,
)
from rayk.actors.listener import sweep
from rayk.actors.reasons import REASON_LENGTH, one_line, why_gone
from rayk.actors.secret import Secret
from rayk.actors.signals import own_sigterm
from rayk.errors import CallTimeoutError, ConfigError, NoPlaceError, RaykError, RemoteError
from rayk.metrics.ray_exporter import CountingExporter
from rayk.metrics.reading import Labels
from rayk.tiers.folder import sweep_memory

KEPT = "rayk"  # the part of Ray's store that keep() uses
HEAD = "node:__internal_head__"  # a resource that only the head has
EMBEDDED_SETTINGS = {  # a dead replica is noticed in 0.2 s instead of 1.5 s, a dead node in 3 s instead of 16 s
    "RAY_timeout_ms_task_wait_for_death_info": "100",
    "RAY_core_worker_internal_heartbeat_ms": "100",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


GONE = object()
"""In place of a reference: the actor was gone before the call."""


def check_joined() -> None:
    """ActorGoneError in a process that left Ray: threads of ours may still run there, and Ray would start a cluster of
    its own to answer them."""
    if not ray.is_initialized():
        raise ActorGoneError("this process is not connected to Ray any more")


class RayActor:
    """A Ray actor handle; picklable, so that actors can be given each other. A detached one travels as its `name` and
    namespace: Ray can read no handle of a dead actor any more once the driver that started it is gone."""

    def __init__(
        self,
        handle: ActorHandle[Any] | None,
        socket: SocketAddress | None = None,
        name: tuple[str, str | None] | None = None,
    ) -> None:
        self._handle = handle
        self.socket = socket
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return RayActor, (self._handle if self._name is None else None, self.socket, self._name)

    @property
    def name(self) -> str | None:
        """Of a detached one."""
        return self._name[0] if self._name is not None else None

    @property
    def handle(self) -> ActorHandle[Any] | None:
        """Ray's; None when nobody has that name any more."""
        if self._handle is None and self._name is not None:
            with contextlib.suppress(ValueError, ray_errors.RayError):
                self._handle = ray.get_actor(*self._name)
        return self._handle

    def call(self, method: str, *args: Any, returns: int = 1, control: bool = False, lane: str = "") -> Any:
        check_joined()
        handle, lane = self.handle, CONTROL_GROUP if control else lane
        if handle is None:
            return GONE if returns == 1 else [GONE] * returns
        if returns == 1 and not lane:
            return getattr(handle, method).remote(*args)
        options: dict[str, Any] = {"num_returns": returns}
        if lane:
            options["concurrency_group"] = lane
        return getattr(handle, method).options(**options).remote(*args)


class RayRuntime:
    """A connection to Ray. Inside an actor make it with RayRuntime(); a driver uses connect()."""

    def __init__(self, namespace: str | None = None, sockets: bool = True) -> None:
        self.sockets = sockets
        self.secret: Secret | None = None
        self._namespace = namespace
        self._temp_dir: str | None = None
        self._owns_connection = False
        self._saved_environment: dict[str, str | None] = {}
        self._starts = itertools.count()

    # -- the connection ------------------------------------------------------------------------

    @classmethod
    def connect(cls, address: str | None, namespace: str | None, sockets: bool = True, **options: Any) -> RayRuntime:
        """Join the cluster at `address` (None: a running one if there is one), or start an embedded one ("local")."""
        runtime = cls(namespace, sockets)
        if ray.is_initialized():
            own = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray leaves it unannotated
            if address not in (None, "auto") and not same_place(address, ray.get_runtime_context().gcs_address, own):
                raise ConfigError(f"this process is connected to Ray already; address {address!r} is another cluster")
            return runtime
        found = address in (None, "auto")
        if found:
            running = running_address()
            address = running if running is not None else address or "local"
        assert address is not None
        runtime._owns_connection = True
        if address == "local":
            runtime._start_embedded(options)
            return runtime
        try:
            knock(address)
            _enter(address, found)
            with own_sigterm(ray):
                ray.init(address=address, namespace=namespace, **{"logging_level": "warning", **options})
        except ray_errors.AuthenticationError:
            raise ConfigError(refusal(address)) from None
        except ConnectionError as error:
            raise ConfigError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from error
        except (ValueError, RuntimeError, ImportError, OSError) as error:  # Ray names no errors of its own here
            if isinstance(error, RaykError):
                raise
            raise ConfigError(
                f"cannot join the Ray cluster at {address!r}: {one_line(str(error))[:REASON_LENGTH]}"
            ) from error
        return runtime

    def _start_embedded(self, options: dict[str, Any]) -> None:
        self._temp_dir = make_temp_dir()
        for name, value in EMBEDDED_SETTINGS.items():
            self._saved_environment[name] = os.environ.get(name)
            os.environ.setdefault(name, value)
        settings = {"include_dashboard": False, "logging_level": "error", "_temp_dir": self._temp_dir, **options}
        try:
            with own_sigterm(ray):
                ray.init(address="local", namespace=self._namespace, **settings)
        except BaseException:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """End the embedded Ray with all its processes and files, or leave the cluster that was joined."""
        if not self._owns_connection:
            return
        self._owns_connection = False
        ray.shutdown()
        sweep_memory()
        for name, value in self._saved_environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None

    @staticmethod
    def address() -> str:
        """Where other nodes of the cluster reach this one; loopback in a process without Ray."""
        if not ray.is_initialized():
            return "127.0.0.1"
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray leaves it unannotated

    @staticmethod
    def joins_at() -> str:
        """The address at which nodes and drivers join this cluster."""
        return str(ray.get_runtime_context().gcs_address)

    # -- nodes and placement --------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Live nodes, ordered by id."""
        check_joined()
        found = [
            Node(n["NodeID"], n.get("NodeManagerHostname", n["NodeManagerAddress"]), dict(n["Resources"]))
            for n in ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it unannotated
            if n["Alive"]
        ]
        return sorted(found)

    @staticmethod
    def draining_nodes() -> dict[str, float]:
        """Nodes of which Ray was told that they go (a drain, a preemption), and the time (seconds since the epoch) at
        which they will; 0 where none was named."""
        check_joined()
        from ray._private.state import state  # it has no public name; Ray's own Train library asks so

        return {node_id: deadline / 1e3 for node_id, deadline in state.get_draining_nodes().items()}

    def run_on(self, node_id: str, task: Callable[..., Any], *args: Any) -> Any:
        """Start a task on that very node, holding no CPU or GPU; a reference to its result."""
        check_joined()
        remote = ray.remote(num_cpus=0, num_gpus=0, max_calls=1, max_retries=0)(task)
        affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return remote.options(scheduling_strategy=affinity).remote(*args)

    def place(
        self, bundles: list[dict[str, float]], avoid: Sequence[str], timeout: float, name: str | None = None
    ) -> Placement:
        """One bundle per replica, spread over the nodes not in `avoid`; NoPlaceError when they do not fit in time."""
        [placement] = self._await_groups([self._group(bundles, avoid, name)], bundles, timeout)
        return placement

    def place_each(
        self, bundles: list[dict[str, float]], avoid: Sequence[str], timeout: float, name: str | None = None
    ) -> list[Placement]:
        """A placement of its own for each bundle, all asked for at once; NoPlaceError, and none is left, when not all
        of them fit in time. An autoscaler sees them as long as they wait."""
        return self._await_groups([self._group([bundle], avoid, name) for bundle in bundles], bundles, timeout)

    def _group(self, bundles: list[dict[str, float]], avoid: Sequence[str], name: str | None) -> PlacementGroup:
        """Detached ones bear the name of what they are for, so that they are found though nobody knows of them."""
        check_joined()
        selector = [{"ray.io/node-id": f"!in({','.join(avoid)})"}] * len(bundles) if avoid else None
        lifetime = "detached" if self._namespace is not None else None
        named = f"{self._namespace}/{name}/{os.urandom(6).hex()}" if lifetime is not None else ""
        group: PlacementGroup = placement_group(
            bundles, "SPREAD", name=named, lifetime=lifetime, bundle_label_selector=selector
        )
        return group

    def _await_groups(
        self, groups: list[PlacementGroup], bundles: list[dict[str, float]], timeout: float
    ) -> list[Placement]:
        """Placements of those groups; when one of them is not there in time, all are removed."""
        deadline = time.monotonic() + timeout
        try:
            if not all(group.wait(max(0.0, deadline - time.monotonic())) for group in groups):
                raise NoPlaceError(
                    f"no place for {len(bundles)} replica(s) of {bundles[0]} within {math.ceil(timeout)} s; "
                    f"the cluster offers {_free_resources()}"
                )
        except BaseException:
            for group in groups:
                remove_placement_group(group)
            raise
        return [_placement(group) for group in groups]

    def await_place(self, placement: Placement, timeout: float) -> Placement:
        """The placement as it is now, once all its bundles have nodes: those of a dead node get another one."""
        check_joined()
        deadline = time.monotonic() + timeout
        while placement_group_table(placement.group).get("state") != "CREATED":
            if time.monotonic() > deadline:
                late = f"a bundle of a dead node found no other node within {timeout:.0f} s"
                raise NoPlaceError(f"{late}; add a node, or remove the replica")
            time.sleep(0.05)
        return _placement(placement.group)

    # -- actors ---------------------------------------------------------------------------------

    def start(self, spec: ActorSpec) -> RayActor:
        """Start an actor; its constructor runs in the background. No call is ever repeated by Ray."""
        check_joined()
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": spec.gpus,
            "max_restarts": -1 if spec.restarts else 0,
            "max_task_retries": 0,
            "max_concurrency": spec.threads,
        }
        if spec.bundle is not None:
            group: PlacementGroup = spec.bundle.placement.group
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, spec.bundle.number)
        elif spec.home is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(spec.home, soft=True)
        name = None
        if spec.name is not None and self._namespace is not None:
            name = spec.name, self._namespace
            options |= {"name": spec.name, "namespace": self._namespace, "lifetime": "detached"}
        elif spec.title:  # for the dashboard
            options["name"] = f"{spec.title}-{next(self._starts)}"
        wrap: Any = ray.remote  # its overloads leave concurrency_groups out
        actor_class = wrap(
            concurrency_groups={CONTROL_GROUP: 1, **dict.fromkeys(spec.lanes, spec.lane_threads)}, num_cpus=0
        )(spec.cls)
        try:
            return RayActor(actor_class.options(**options).remote(*spec.args), name=name)
        except (ray_errors.ActorAlreadyExistsError, ValueError) as error:
            if spec.name is not None and self.find(spec.name) is not None:
                raise NameTakenError(spec.name) from error
            raise

    def find(self, name: str) -> RayActor | None:
        """The detached actor of that name in this session's namespace, or None."""
        check_joined()
        try:
            handle: ActorHandle[Any] = ray.get_actor(name, namespace=self._namespace)
            return RayActor(handle, name=(name, self._namespace))
        except ValueError:
            return None

    def actor_names(self) -> list[str]:
        """The names of all detached actors in this session's namespace."""
        check_joined()
        named = list_named_actors(all_namespaces=True)
        return sorted(each["name"] for each in named if each["namespace"] == self._namespace)

    def groups(self, name: str) -> list[Placement]:
        """Placement groups that were made for what is called `name`, or for parts of it; waiting ones have no nodes."""
        check_joined()
        begin, found = f"{self._namespace}/{name}/", list[Placement]()
        for key, each in placement_group_table().items():
            if each["state"] != "REMOVED" and each["name"].startswith(begin):
                found.append(Placement(PlacementGroup(PlacementGroupID.from_hex(key)), ()))
        return found

    def get(self, ref: Any, target: str, timeout: float) -> Any:
        """The result of a call to `target`. ActorGoneError, CallTimeoutError, or what rayk raised there."""
        check_joined()
        if ref is GONE:
            raise ActorGoneError("it has ended")
        try:
            return ray.get(ref, timeout=timeout)
        except ray_errors.GetTimeoutError:
            raise CallTimeoutError(target, timeout) from None
        except ray_errors.ActorUnavailableError as error:
            raise ActorAwayError(why_gone(error)) from None
        except (ray_errors.RayActorError, ray_errors.ActorUnschedulableError) as error:
            raise ActorGoneError(why_gone(error)) from None
        except ray_errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaykError):
                raise cause from None
            raise RemoteError(-1, type(cause).__name__, one_line(str(cause)), str(error)) from error
        except ray_errors.RayError as error:  # a lost worker, object or node: whoever answered is gone
            raise ActorGoneError(why_gone(error)) from None

    def get_all(self, refs: Sequence[Any], timeout: float) -> list[Any] | None:
        """All results, or None when any of them failed or is late: get() says which and how."""
        if not ray.is_initialized() or any(ref is GONE for ref in refs):
            return None
        try:
            results: list[Any] = ray.get(list(refs), timeout=timeout)
            return results
        except (ray_errors.RayError, RaykError):
            return None

    def future(self, ref: Any) -> Future[Any]:
        """Done when get() would not wait; of its result and its errors only get() knows the meaning."""
        future: Future[Any]
        if ref is not GONE:
            future = ref.future()
        else:
            future = Future()
            future.set_result(None)
        return future

    def stop(self, actors: Sequence[Actor], placement: Placement | None) -> None:
        """Kill actors and remove their placement group, and wait until both are gone; dead ones are fine."""
        if not ray.is_initialized():
            return
        for actor in actors:
            if isinstance(actor, RayActor) and (handle := actor.handle) is not None:
                with contextlib.suppress(ValueError, ray_errors.RayError):
                    ray.kill(handle, no_restart=True)
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.get(actor.call("ping", control=True), timeout=5)
        sweep([actor.socket.path for actor in actors if actor.socket is not None])
        sweep_memory()
        if placement is not None:
            remove_placement_group(placement.group)
            deadline = time.monotonic() + 5
            while placement_group_table(placement.group).get("state") != "REMOVED" and time.monotonic() < deadline:
                time.sleep(0.01)

    @staticmethod
    def restart(actor: Actor) -> None:
        """End the process of an actor that restarts, hung or not; returns at once."""
        if isinstance(actor, RayActor) and (handle := actor.handle) is not None:
            with contextlib.suppress(ValueError, ray_errors.RayError):
                ray.kill(handle, no_restart=False)

    @staticmethod
    def keep(key: str, value: Any) -> None:
        """Have Ray's head keep a value (None: no more), which outlives this process."""
        if not ray.is_initialized():
            return
        if value is None:
            internal_kv._internal_kv_del(key, namespace=KEPT)
        else:
            wire = ray.cloudpickle.dumps(value)  # type: ignore[no-untyped-call]  # Ray leaves it unannotated
            internal_kv._internal_kv_put(key, wire, overwrite=True, namespace=KEPT)

    @staticmethod
    def kept(key: str) -> Any:
        """What keep() was given last, None if nothing was."""
        wire: bytes | None = internal_kv._internal_kv_get(key, namespace=KEPT)
        return pickle.loads(wire) if wire is not None else None

    @staticmethod
    def forget(prefix: str) -> None:
        """Have nothing kept any more whose key begins so."""
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=KEPT)

    @staticmethod
    def group_key(placement: Placement) -> str:
        """What tells a placement group from others."""
        return str(placement.group.id.hex())

    @staticmethod
    def home(detached: bool) -> str | None:
        """The node of this process; of what is `detached` from it, the head."""
        if not detached:
            return str(ray.get_runtime_context().get_node_id())
        nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it unannotated
        heads = [n["NodeID"] for n in nodes if n["Alive"] and HEAD in n["Resources"]]
        return heads[0] if heads else None

    @staticmethod
    def exporter() -> tuple[CountingExporter, Labels] | None:
        """What takes this process's metrics to its node's agent, and what says whose they are; None without Ray."""
        if not ray.is_initialized():
            return None
        context = ray.get_runtime_context()
        name = (context.get_actor_name() if context.worker.mode == ray.WORKER_MODE else None) or ""
        exporter = CountingExporter(lambda kind, *given: getattr(ray_metrics, kind.capitalize())(*given))
        return exporter, {"cluster": name.rpartition("/")[0], "node": socket.gethostname()}

    def dumps(self, value: Any) -> bytes:
        """Pickle a function or value the way Ray does: by reference where the other side can import it."""
        return bytes(ray.cloudpickle.dumps(value))  # type: ignore[no-untyped-call]  # Ray leaves it unannotated


def serve_library() -> Any:
    """Ray Serve. ConfigError that says how to get what it needs and is not there."""
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"Ray Serve cannot be loaded ({error}): pip install 'ray[serve]'") from None
    return serve


def _free_resources() -> dict[str, float]:
    """What nobody holds, without the names that Ray makes up for nodes and for bundles of groups."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]  # Ray leaves it unannotated
    return {name: amount for name, amount in free.items() if "_group_" not in name and not name.startswith("node:")}


def _enter(address: str, found: bool) -> None:
    """AuthenticationError at once where the cluster refuses this process; ray.init() would ask it twenty times, each
    with a line on stderr from below Python. `found` as Ray itself finds one: then a token that lies ready is used."""
    from ray._private.authentication import authentication_token_setup as tokens
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled, and its stub leaves it out

    if found:
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    tokens.ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one the client ends the process
    if host_and_port(address) is not None:
        with unheard():
            GcsClient(address=address)


def _placement(group: PlacementGroup) -> Placement:
    where = placement_group_table(group)["bundles_to_node_id"]
    return Placement(group, tuple(where[i] for i in range(len(where))))
