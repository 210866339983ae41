"""What a decode iteration costs on a real cluster, as `rayk bench core --only ray` measures it."""

from __future__ import annotations

from rayk import InferenceSession, PagedKVCacheManager
from rayk.bench.core.ray_path import decode_cost, ray_params


def test_a_decode_iteration_is_one_small_message_to_each_replica(session: InferenceSession) -> None:
    with PagedKVCacheManager(ray_params(2), session, 1000, max_batch_size=8) as manager:
        cost = decode_cost(manager, replicas=2, batch=8, iterations=20, warm_up=2)
    assert cost.calls == 1
    assert 0 < cost.sent < 60 and 0 < cost.received < 30  # with a message's own bytes spread over 8 requests only
    assert cost.driver_us > 0 and cost.iteration_ms > 0
