"""rayk's router in a Serve application that is not rayk's: who computed a prefix before is asked again, unless busy.

    pip install 'ray[serve]' rayk
    python examples/serve/foreign.py    # two replicas of a deployment, four chats that grow; in a Ray of its own

PageRouter is for deployments that are called with a prompt first, as text or token ids. Serve tells it nothing of what
replicas have cached: what went to one counts as cached there, as long as its `pages` last.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from time import monotonic

import numpy as np
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from rayk.scheduler.router.policy import RouteRequest
from rayk.scheduler.router.router import Router, RouterSettings


class PageRouter(RequestRouter):
    """`request_router_kwargs`: `page_size` (tokens, of text bytes) and `pages` of a replica, `policy` as in rayk."""

    def initialize_state(self, page_size: int = 16, pages: int = 4096, policy: str = "cost") -> None:
        self._settings = RouterSettings(policy, (), page_size)
        self._pages, self._keys = pages, self._settings.keys()
        self._router = Router(self._settings, monotonic)
        self._router.follow(self._keys)
        self._numbers: dict[ReplicaID, int] = {}
        self._cached: list[OrderedDict[int, None]] = []  # keys of a replica's pages, used last at the end
        self._asked: dict[str, RouteRequest] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list of replicas is another one."""
        for replica_id in {each.replica_id for each in replicas} - self._numbers.keys():
            self._numbers[replica_id] = len(self._numbers)
            self._cached.append(OrderedDict())
            self._router.join()
            self._router.renew(self._numbers[replica_id], self._pages * self._settings.page_size)
        for replica_id in self._numbers.keys() - {each.replica_id for each in replicas}:
            self._router.cordon(self._numbers[replica_id])
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica of rayk's choice, then the others."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        prompt, name = pending_request.args[0], pending_request.metadata.internal_request_id
        tokens = np.frombuffer(prompt.encode(), np.uint8) if isinstance(prompt, str) else np.asarray(prompt)
        request = RouteRequest(len(tokens), self._keys.of(tokens.astype(np.int32).tobytes(), (None, None)))
        self._asked[name] = request
        open_ = np.zeros(len(self._numbers), np.bool_)
        open_[[self._numbers[each.replica_id] for each in candidate_replicas]] = True
        chosen = self._router.choose(name, request, open_)
        first = [each for each in candidate_replicas if self._numbers[each.replica_id] == chosen]
        return [first, [each for each in candidate_replicas if each not in first]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """It went there."""
        name, replica = pending_request.metadata.internal_request_id, self._numbers[replica_id]
        request = self._asked.pop(name, None)
        if request is not None:
            self._router.place(name, replica, request)
            self._note(replica, request)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It is over."""
        self._router.remove(internal_request_id)

    def _note(self, replica: int, request: RouteRequest) -> None:
        """Its pages count as cached there; the oldest give way."""
        cached = self._cached[replica]
        for key in request.keys:
            cached[key] = None
            cached.move_to_end(key)
        gone = [cached.popitem(last=False)[0] for _ in range(len(cached) - self._pages)]
        changes = [(True, np.array(request.keys, "<u8").tobytes()), (False, np.array(gone, "<u8").tobytes())]
        self._router.apply_cache_changes(replica, changes)


@serve.deployment(
    num_replicas=2, ray_actor_options={"num_cpus": 0.1},
    request_router_config=RequestRouterConfig(request_router_class=PageRouter, request_router_kwargs={"pages": 512}),
)  # fmt: skip
class Model:
    """Stands for an engine with a prefix cache."""

    def __call__(self, prompt: str) -> str:
        return serve.get_replica_context().replica_id.unique_id


def main() -> None:
    """Four chats of six turns: each stays where it began."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        handle = serve.run(Model.bind(), name="foreign", route_prefix=None)
        chats, places = [f"{i}: " + "once upon a time " * 8 for i in range(4)], [list[str]() for _ in range(4)]
        for turn in range(6):
            for at in random.Random(turn).sample(range(4), 4):
                places[at].append(handle.remote(chats[at]).result())
                chats[at] += f"turn {turn} " * 4
        for at, seen in enumerate(places):
            print(f"chat {at}: {len(set(seen))} replica(s) in {len(seen)} turns")
        moved = sum(len(set(seen)) > 1 for seen in places)
        print(f"{len({seen[0] for seen in places})} replicas served; {moved} chats moved")
        assert not moved
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
