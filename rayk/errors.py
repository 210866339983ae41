"""Every error that rayk raises on purpose.

RaykError
├── ConfigError (ValueError)              parameters or arguments that cannot work
├── TokenError (ValueError)               tokens or a window operation that a context refuses
├── AlreadyClaimedError (ValueError)      the request id is claimed, here or on another replica
├── NotClaimedError (ValueError)          the request id is not claimed on that replica
│   └── LeaseLostError                    .. by the caller any more, or never was: its claim is not the present one
├── ReplicaIndexError (IndexError)        no replica has that index
│   └── ReplicaRemovedError (ValueError)  the replica of that index was removed
├── BatchError (ValueError)               batches that do not match the replicas or the requests' pages
├── RuntimeInputsError (ValueError, RuntimeError)   runtime_inputs cannot be built for this batch
├── LeafError (AssertionError)            a single-cache call on multi-cache parameters
├── AttentionError (ValueError)           no attention backend can do what was asked for
├── CheckpointError (ValueError)          a checkpoint that is missing, damaged or incomplete
├── ArchitectureError (ValueError)        a model that cannot run on pages
├── InsufficientBlocksError               not enough free pages; nothing was changed
├── OverloadedError (RuntimeError)        turned away: too much waits, or a deadline cannot be met; try again later
├── PlanError (RuntimeError)              the cluster cannot hold what was asked for; nothing was started
│   └── NoPlaceError                      .. now: no node has room, and none came in time
├── NotBuiltError (NotImplementedError)   a part of the reference that rayk does not have yet
├── ClosedError (RuntimeError)            use after shutdown() or close()
├── IntegrityError (AssertionError)       a core's own bookkeeping contradicts itself: a bug in rayk
└── ClusterError (RuntimeError)
    ├── ReplicaLostError                  a replica's process died; names what was lost
    ├── RankLostError                     one of the processes that a replica is split over; it takes all with it
    ├── SchedulerLostError                the scheduler's process died
    ├── CallTimeoutError (TimeoutError)   no answer in time
    ├── StaleEpochError                   the replica was replaced since the caller last talked to it
    ├── StaleContextError                 a replica misses tokens of a request; the client sends them again
    ├── NoReplicaError                    no replica takes requests: all are lost, draining or silent
    ├── NotOwnerError (ValueError)        another driver started the named cluster that is to be shut down
    ├── SecretError (ValueError)          a named cluster has another secret, or none where one was given
    ├── LineError                         a line between two replicas does not carry pages
    │   └── PagesGoneError                the source needed the pages of a copy itself; nothing is wrong with the line
    ├── ReplicaStateError (ValueError)    what was asked for does not fit how the replica stands, such as draining
    ├── DrainError                        a replica still has requests and cannot be removed; says which and why
    ├── MessageError (ValueError)         a message that cannot be decoded or is unknown
    │   └── UnsendableError               a message that cannot be encoded; nothing was sent
    └── RemoteError                       code that the caller shipped, or rayk itself, raised on a replica

An error's arguments are its fields, in the order of the class annotations, and its text is made in `__str__`:
so it crosses process borders (pickle and `messages.Failure`) with type and fields intact.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar


class RaykError(Exception):
    """Base of all errors that rayk raises on purpose; `fields` are its named values."""

    fields: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [n for n, t in inspect.get_annotations(cls).items() if not str(t).startswith("ClassVar")]
        cls.fields = (*cls.fields, *own)

    def __init__(self, *args: Any) -> None:
        if len(args) != len(self.fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.fields) or 'nothing'}; got {args!r}")
        super().__init__(*args)
        for name, value in zip(self.fields, args, strict=True):
            setattr(self, name, value)

    def __str__(self) -> str:
        return self.text.format(**{name: getattr(self, name) for name in self.fields})


class ConfigError(RaykError, ValueError):
    """Parameters or arguments that cannot work."""

    message: str
    text: ClassVar[str] = "{message}"


class TokenError(RaykError, ValueError):
    """Tokens or a window operation that a context refuses; the context is unchanged."""

    request_id: str
    message: str
    text: ClassVar[str] = "request {request_id!r}: {message}"


class AlreadyClaimedError(RaykError, ValueError):
    """The id is claimed already; `replica` is where, or -1 for a request that waits for admission."""

    request_id: str
    replica: int

    def __str__(self) -> str:
        if self.replica < 0:
            return f"request {self.request_id!r} waits for admission already; use another id"
        return (
            f"request {self.request_id!r} is already claimed on replica {self.replica}; "
            "release it there first or use another id"
        )


class NotClaimedError(RaykError, ValueError):
    """The id is not claimed on `replica`; `holder` is the replica that has it, or -1."""

    request_id: str
    replica: int
    holder: int

    def __str__(self) -> str:
        where = f"it is claimed on replica {self.holder}" if self.holder >= 0 else "call claim() first"
        return f"request {self.request_id!r} is not claimed on replica {self.replica}; {where}"


class LeaseLostError(NotClaimedError):
    """The caller's claim of the request is not the present one; nothing was done.

    A claim has a generation, a number that its cluster gives out once. `client` is the calling driver and `generation`
    that of its claim, 0 when it has none; `owner` and `owner_generation` are those of the present claim, '' and 0 when
    nobody has the id. In one process drivers have no names.
    """

    client: str
    generation: int
    owner: str
    owner_generation: int

    def __str__(self) -> str:
        who = f"driver {self.client}" if self.client else "the caller"
        now = "nobody has it now"
        if self.owner_generation:
            now = f"{f'driver {self.owner}' if self.owner else 'another'} has claim {self.owner_generation} of it"
        head = f"request {self.request_id!r} on replica {self.replica}: "
        if not self.generation:
            return f"{head}{who} has no claim of it, {now}; use another id, or release it with force=True"
        return (
            f"{head}claim {self.generation} of {who} has ended, by its lease, a release or force, and {now}; "
            "nothing was done; call claim() again or use another id"
        )


class ReplicaIndexError(RaykError, IndexError):
    """No replica has that index."""

    replica: int
    replicas: int
    text: ClassVar[str] = "replica index {replica} is out of range: this manager has {replicas} replica(s), from 0"


class ReplicaRemovedError(ReplicaIndexError, ValueError):
    """The replica of that index was removed. The index stays a hole."""

    text: ClassVar[str] = (
        "replica {replica} was removed and its index stays empty; replica_states() says who is there, and requests "
        "that were on it are where holder() says"
    )


class BatchError(RaykError, ValueError):
    """Batches that do not match the replicas, or requests that do not match their pages."""

    message: str
    text: ClassVar[str] = "{message}"


class RuntimeInputsError(RaykError, ValueError, RuntimeError):
    """runtime_inputs() cannot be built for this batch; nothing was changed."""

    replica: int
    message: str

    def __str__(self) -> str:
        return self.message if self.replica < 0 else f"replica {self.replica}: {self.message}"


class LeafError(RaykError, AssertionError):
    """A single-cache call on multi-cache parameters."""

    message: str
    text: ClassVar[str] = "{message}"


class AttentionError(RaykError, ValueError):
    """No attention backend, or not the one that was named, can do what was asked for."""

    message: str
    text: ClassVar[str] = "{message}"


class CheckpointError(RaykError, ValueError):
    """A checkpoint folder from which no model can be loaded; `file` is the one at fault, or ''."""

    folder: str
    file: str
    message: str

    def __str__(self) -> str:
        where = f"checkpoint {self.folder}"
        return f"{where}: {self.file}: {self.message}" if self.file else f"{where}: {self.message}"


class ArchitectureError(RaykError, ValueError):
    """A model that cannot run on a paged cache; `architecture` is its class or model type."""

    architecture: str
    message: str
    text: ClassVar[str] = "{architecture} cannot run on rayk's pages: {message}"


class InsufficientBlocksError(RaykError):
    """Not enough free pages for one request. Nothing was changed: window, pages, metrics, cache, eviction order."""

    request_id: str
    replica: int
    needed: int
    free: int
    total: int

    def __str__(self) -> str:
        head = f"request {self.request_id!r} needs {self.needed} more page(s) on replica {self.replica}"
        if self.needed > self.total:
            return f"{head}, which has {self.total} in all: it can never fit; use more pages or a shorter request"
        return f"{head}, {self.free} of {self.total} are free; release or preempt a request, or retry later"


class OverloadedError(RaykError, RuntimeError):
    """A request is turned away, as with HTTP status 429; it may succeed in `retry_after` seconds."""

    request_id: str
    reason: str
    retry_after: float
    text: ClassVar[str] = "request {request_id!r} is turned away: {reason}; try again in {retry_after:.2f} s"


class PlanError(RaykError, RuntimeError):
    """The cluster cannot hold what was asked for. Nothing was started."""

    message: str
    text: ClassVar[str] = "{message}"


class NoPlaceError(PlanError):
    """No node has room for a replica now, and none came in time. Nothing was started; it may be asked for again."""


class NotBuiltError(RaykError, NotImplementedError):
    """A part of the reference's surface that rayk does not have yet."""

    what: str
    text: ClassVar[str] = "{what} is not built yet"


class ClosedError(RaykError, RuntimeError):
    """Use after shutdown() or close()."""

    what: str
    text: ClassVar[str] = "{what} was shut down; make a new one"


class IntegrityError(RaykError, AssertionError):
    """A core's own bookkeeping contradicts itself: a bug in rayk, never the caller's fault."""

    where: str
    message: str
    text: ClassVar[str] = "{where}: {message} (this is a bug in rayk; please report it)"


class ClusterError(RaykError, RuntimeError):
    """Something between this process and the replicas failed."""


class ReplicaLostError(ClusterError):
    """A replica's process died. `requests` are those claimed on it, as far as this process knows."""

    replica: int
    epoch: int
    requests: list[str]
    reason: str

    def __str__(self) -> str:
        shown = ", ".join(map(repr, self.requests[:5])) + (", .." if len(self.requests) > 5 else "")
        return (
            f"replica {self.replica} (epoch {self.epoch}) is gone: {self.reason}. Lost: its cached pages and "
            f"{len(self.requests)} claimed request(s){': ' + shown if shown else ''}. "
            "Send these requests again; with replace=False put another in its place with add_replicas()"
        )


class RankLostError(ClusterError):
    """One of the processes that a replica's model is split over died, or failed where the others did not. The replica
    cannot go on without it: its requests go on elsewhere, and it is replaced as a whole."""

    replica: int
    rank: int
    reason: str
    text: ClassVar[str] = "rank {rank} of replica {replica} is lost: {reason}"


class SchedulerLostError(ClusterError):
    """The scheduler's process died."""

    reason: str
    text: ClassVar[str] = "the scheduler is gone: {reason}. Shut this manager down and start a new one"


class CallTimeoutError(ClusterError, TimeoutError):
    """No answer in time; the call may still have been executed."""

    target: str
    seconds: float
    text: ClassVar[str] = (
        "{target} did not answer within {seconds:.0f} s; it may be hung or overloaded (the call may have been executed)"
    )


class StaleEpochError(ClusterError):
    """The replica was replaced since the caller last talked to it."""

    replica: int
    expected: int
    actual: int
    text: ClassVar[str] = "replica {replica} has epoch {actual}, the caller expected {expected}: it was restarted"


class StaleContextError(ClusterError):
    """A replica does not have the tokens of a request that a message builds on."""

    request_id: str
    replica: int
    text: ClassVar[str] = "replica {replica} does not have the earlier tokens of request {request_id!r}"


class NoReplicaError(ClusterError):
    """No replica takes requests."""

    request_id: str
    text: ClassVar[str] = (
        "request {request_id!r} has no place: all replicas are lost or draining, or do not answer; add one"
    )


class NotOwnerError(ClusterError, ValueError):
    """A named cluster belongs to the driver that started it, until that leaves or its lease ends. Nothing was done."""

    name: str
    owner: str
    text: ClassVar[str] = (
        "cluster {name!r} was started by driver {owner}, which still uses it: leave() goes without it, and "
        "shutdown(force=True) ends it for all"
    )


class SecretError(ClusterError, ValueError):
    """A driver does not have the secret of a named cluster. Nothing was done."""

    name: str
    message: str
    text: ClassVar[str] = "cluster {name!r}: {message}; give its secret (secret=, --secret-file or RAYK_SECRET)"


class LineError(ClusterError):
    """A line does not carry pages, now or at all: the next one is tried, and what was not copied is computed."""

    kind: str
    peer: int
    reason: str
    text = "line {kind} with replica {peer}: {reason}"


class PagesGoneError(LineError):
    """The source took the pages of this copy back, because it needed them. What was not copied is computed."""


class ReplicaStateError(ClusterError, ValueError):
    """What was asked for does not fit how the replica stands; nothing was changed."""

    replica: int
    state: str
    action: str
    text: ClassVar[str] = "replica {replica} is {state}: it cannot {action}; replica_states() says how all stand"


class DrainError(ClusterError):
    """A replica that should leave still has requests. It drains on; `left` says, for each, why it is still there."""

    replica: int
    left: dict[str, str]

    def __str__(self) -> str:
        shown = [f"{request_id!r}: {why}" for request_id, why in self.left.items()]
        shown[5:] = [".."] * (len(shown) > 5)
        head = f"replica {self.replica} still has {len(self.left)} request(s): {'; '.join(shown)}"
        return f"{head}. Release or preempt them, add a replica, or call drain_replica() again later"


class MessageError(ClusterError, ValueError):
    """A message that cannot be decoded, or one that this receiver does not know."""

    message: str
    text: ClassVar[str] = "{message}"


class UnsendableError(MessageError):
    """A message that cannot be encoded: a caller's object holds what no message can carry. Nothing was sent."""


class RemoteError(ClusterError):
    """Code that ran on a replica raised; `trace` is its traceback as text."""

    replica: int
    kind: str
    message: str
    trace: str

    def __str__(self) -> str:
        return f"{f'replica {self.replica}' if self.replica >= 0 else 'a task'} raised {self.kind}: {self.message}"


def _tree(cls: type[RaykError]) -> dict[str, type[RaykError]]:
    return {cls.__name__: cls, **{k: v for sub in cls.__subclasses__() for k, v in _tree(sub).items()}}


def by_name(name: str) -> type[RaykError] | None:
    """The error class of that name, or None."""
    return _tree(RaykError).get(name)


def cannot_be_sent(request_id: str, error: Exception) -> RaykError:
    """Why a request has no place that says what no message can carry; a RaykError stands for itself."""
    if isinstance(error, RaykError) and not isinstance(error, UnsendableError):
        return error
    return BatchError(f"request {request_id!r} cannot be sent: {error}; give it values that fit a message")
