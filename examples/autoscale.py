"""A small autoscaling loop: replicas are added while a burst lasts and drained when it is over.

python examples/autoscale.py          # in this process
python examples/autoscale.py ray      # on Ray: every added replica is a placement group of its own, for which Ray's
                                      # autoscaler starts a node if need be
"""

import sys

import rayk

params = rayk.MHAKVCacheParams(
    dtype="float32", n_kv_heads=1, head_dim=4, num_layers=1, page_size=16, devices=["cpu"], enable_prefix_caching=True
)
policy = rayk.ScalePolicy(least=1, most=3, full=0.8)


def scale(manager: rayk.PagedKVCacheManager) -> None:
    """One look at the loads: add what is missing, or let the idlest replica go, its requests moved to others."""
    loads = manager.replica_loads()
    ready = [load for load in loads if load.state == "ready"]
    wanted = rayk.desired_replicas(loads, policy)
    if wanted > len(ready):
        print(f"{len(ready)} replica(s) are full: {manager.add_replicas(wanted - len(ready))} added")
    elif wanted < len(ready):
        idlest = min(ready, key=lambda load: (load.held, -load.replica)).replica
        moved = manager.drain_replica(idlest, deadline=0).moved
        pages = manager.remove_replica(idlest)
        kept = f"others took {pages.taken} of its {pages.cached} cached pages"
        print(f"{len(ready)} replicas are too many: {idlest} removed, {len(moved)} request(s) moved, {kept}")


def forward(inputs, batch):
    """Stands for a model."""


def serve(manager: rayk.PagedKVCacheManager, bursts: tuple[int, ...]) -> None:
    """As many requests run at a time as each of the bursts says; the oldest finish first."""
    running: dict[str, rayk.TextContext] = {}
    made = 0
    for burst in bursts:
        for name in list(running)[: max(0, len(running) - burst)]:
            manager.release(name, manager.holder(name))
            del running[name]
        while len(running) < burst:
            ctx = rayk.TextContext(f"request {made}", range(100 * made, 100 * made + 90), max_length=512)
            manager.admit([ctx])
            running[ctx.request_id] = ctx
            made += 1
            scale(manager)
        batches = [[] for _ in range(manager.num_replicas)]
        for ctx in running.values():
            batches[manager.holder(ctx.request_id)].append(ctx)
        manager.alloc_many(batches)  # one that was moved goes on from what was copied
        manager.execute(batches, forward)
        for ctx in running.values():
            ctx.update(1)
        manager.step(batches)
        scale(manager)
    print(f"replicas: {', '.join(manager.replica_states())}; still running: {', '.join(running)}")


def main(runtime: str = "inline") -> None:
    with (
        rayk.InferenceSession(runtime=runtime) as session,
        rayk.PagedKVCacheManager(params, session, total_num_pages=32, max_batch_size=16) as manager,
    ):
        serve(manager, bursts=(1, 4, 10, 10, 3, 2, 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
