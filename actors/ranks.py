"""The other ranks of a replica as actors in its bundle, each with a GPU of it. Rank 0's process starts and owns them,
so Ray ends them with it; what they do is rayk.engine.rank's.

They talk over sockets of this node, since a bundle is on one: a call of Ray for each forward would take longer than
many a forward.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from threading import Event, Thread, Timer
from typing import TYPE_CHECKING, Any, NamedTuple

from rayk.actors.interface import Actor, ActorGoneError, ActorSpec, Bundle, Runtime
from rayk.errors import PlanError, RankLostError

if TYPE_CHECKING:
    from rayk.engine.ranks import Ranks
    from rayk.engine.replicas import ModelSource, ServeSettings

log = logging.getLogger("rayk.engine")

HOST = "127.0.0.1"
LOOK_SECONDS = 0.2  # between looks at ranks that are being started
END_SECONDS = 5.0  # for the load to fail by itself when a rank is lost in it


class Meeting(NamedTuple):
    """Where ranks find rank 0: its socket, what opens it, and the port of torch's store."""

    address: str
    key: bytes
    port: int


class RankActor:
    """A rank other than 0; serve() lasts as long as its replica."""

    def serve(self, number: int, replica: int, source: ModelSource, settings: ServeSettings, meeting: Meeting) -> None:
        """Load this rank's part and do what rank 0 says, until that ends."""
        import torch
        from torch._C._distributed_c10d import TCPStore

        from rayk.engine.rank import RankWorker
        from rayk.models.tensor_parallel import Rank, join

        torch.set_num_threads(settings.threads or 1)
        device = "cuda:0" if settings.device.startswith("cuda") else settings.device
        with Client(meeting.address, "AF_UNIX", authkey=meeting.key) as connection:
            connection.send(number)
            rank = Rank(number, settings.tp)
            try:
                join(rank, TCPStore(HOST, meeting.port, settings.tp, False), torch.device(device))
                model = source.load(device, rank)
                worker = RankWorker(number, settings.tp, model, settings, replica, device)
            except Exception as error:
                connection.send((0, None, error))
                raise
            worker.serve(connection)

    def pid(self) -> int:
        """This process, on its node."""
        return os.getpid()

    def ping(self) -> int:
        """Once its constructor is done."""
        return self.pid()


def start_ranks(
    runtime: Runtime, replica: int, source: ModelSource, settings: ServeSettings, bundle: Bundle, device: str
) -> Ranks:
    """Start the other ranks of a replica in its bundle and join them, as rank 0. RankLostError or PlanError when one
    cannot."""
    import torch
    from torch._C._distributed_c10d import TCPStore

    from rayk.engine.ranks import Ranks
    from rayk.models.tensor_parallel import Rank, join

    store = TCPStore(HOST, 0, settings.tp, True, wait_for_workers=False)
    meeting = Meeting(f"\0rayk-ranks-{secrets.token_hex(16)}", secrets.token_bytes(32), store.port)
    gpus, calls = int(device.startswith("cuda")), dict[str, Any]()
    with Listener(meeting.address, "AF_UNIX", authkey=meeting.key, backlog=settings.tp) as listener:
        for number in range(1, settings.tp):
            actor = runtime.start(ActorSpec(RankActor, (), gpus, bundle))
            _owned.append(actor)
            call = actor.call("serve", number, replica, source, settings, meeting)
            calls[f"rank {number} of replica {replica}"] = call
        ranks = Ranks(replica, _accept(runtime, replica, listener, calls))
    ranks.on_loss = _end_soon
    try:
        join(Rank(0, settings.tp), store, torch.device(device))
    except Exception:
        if ranks.lost is not None:
            raise ranks.lost from None
        raise
    return ranks


_owned: list[Actor] = []  # Ray ends an actor of which nobody has the handle


def _accept(runtime: Runtime, replica: int, listener: Listener, calls: Mapping[str, Any]) -> list[Connection]:
    """The connections of the ranks that were called, in their order. PlanError when one ends before it comes."""
    found: dict[int, Connection] = {}
    over = Event()

    def accept() -> None:
        while len(found) < len(calls) and not over.is_set():
            with suppress(AuthenticationError, EOFError, OSError):
                connection = listener.accept()
                found[connection.recv()] = connection

    thread = Thread(target=accept, name="rayk-ranks", daemon=True)
    thread.start()
    futures = {target: runtime.future(call) for target, call in calls.items()}
    try:
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            for target, future in futures.items():
                if future.done() and thread.is_alive():
                    runtime.get(calls[target], target, 1.0)
                    raise PlanError(f"{target} ended while it was started")
    except ActorGoneError as error:
        raise PlanError(f"a rank of replica {replica} could not start: {error}") from None
    finally:
        over.set()
    return [found[number] for number in sorted(found)]


def _end_soon(error: RankLostError) -> None:
    """A rank was lost before there is an engine that could say so: end with it, also out of a collective that waits."""
    log.error("%s", error)
    timer = Timer(END_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
