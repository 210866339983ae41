"""What the scheduler answers."""

from __future__ import annotations

from rayk.protocol.admission import AdmissionState
from rayk.protocol.base import Failure, Message, MessagePart
from rayk.protocol.from_replica import LineState


class PlaceDone(Message, frozen=True):
    """`replicas[i]` is where context i went (-1: nowhere); the rest as in AdmitDone. `generations` are those of the
    claims that were made."""

    replicas: list[int]
    numbers: bytes
    seconds: bytes
    failures: dict[int, Failure] = {}
    generations: list[int] = []


class EnterDone(Message, frozen=True):
    """What became of the requests in `ids`, offered now or before; the rest as in PlaceDone, with a generation each. Of
    `open` more of the sender's it is not known yet."""

    ids: list[str]
    replicas: list[int]
    numbers: bytes
    seconds: bytes
    failures: dict[int, Failure] = {}
    open: int = 0
    generations: list[int] = []


class Claimed(Message, frozen=True):
    """The claim was made, with that number."""

    generation: int


class Released(Message, frozen=True):
    """The claims that were released by force."""

    generations: list[int]


class Counts(Message, frozen=True):
    """Leading pages of each replica, and after them, where there are tiers, pages in its host and disk tier."""

    counts: list[int]
    host: list[int] = []
    disk: list[int] = []


class RemoveDone(Message, frozen=True):
    """See rayk.scheduler.scaling.Removed."""

    cached: int = 0
    known: int = 0
    taken: int = 0


class Replacement(MessagePart, frozen=True):
    """See rayk.scheduler.supervisor.Replacement."""

    replica: int
    reason: str
    failures: int
    given_up: bool
    seconds: float


class Description(Message, frozen=True):
    """What the scheduler knows, by replica: how it stands, its start, requests and tokens that are placed there, tokens
    that wait to be prefilled, tokens that the pages of what runs there hold and that all its pages would. And who
    waits, where there is an admission policy; then `levels` are pages in use or promised. `transport` is the kind of
    line that was asked for, and `removed` what became of the pages of those that were removed. `target` replicas are
    kept, and `replacements` are under way or given up."""

    epochs: list[int]
    requests: list[int]
    tokens: list[int]
    clients: int
    states: list[str]
    waiting: list[int]
    held: list[int]
    capacity: list[int]
    transport: str = "auto"
    lines: list[LineState] = []
    admission: AdmissionState | None = None
    levels: list[int] = []
    removed: dict[int, RemoveDone] = {}
    replacements: list[Replacement] = []
    target: int | None = None


class Unasked(Message, frozen=True):
    """Done by all replicas but those, which are lost or silent."""

    replicas: list[int]


class Drained(Message, frozen=True):
    """Requests that are still there, with the reason, and where those went that were moved."""

    left: dict[str, str]
    moved: dict[str, int]


class Enlisted(Message, frozen=True):
    """The indices that were taken."""

    replicas: list[int]


class Located(Message, frozen=True):
    """The replica of each request, -1 for those that the sender has no claim of."""

    replicas: list[int]


class Explained(Message, frozen=True):
    """A choice of the router: `candidates` by cost, each the values of `names`; empty when it does not reckon so."""

    router: str
    replica: int
    tokens: int
    seconds_ago: float
    names: list[str]
    candidates: list[list[float]]
