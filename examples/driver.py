"""The driver loop on Ray: two replicas, each an actor with pages of its own, and a scheduler in front of them.

Run it as it is (it starts a local Ray), against a cluster (RAY_ADDRESS), or with `ray job submit`.
"""

import rayk

PAGE = 16


def forward(inputs, batch):
    """Runs in the replica's process, beside its pages. Writes each token's id; returns a "sampled" token a request."""
    shard = inputs.shards[0]
    for row, ctx in enumerate(batch):
        start = ctx.tokens.processed_length
        for position, token in enumerate(ctx.tokens.active.tolist(), start):
            shard.kv_blocks[int(shard.lookup_table[row, position // PAGE]), :, :, position % PAGE] = token
    return {ctx.request_id: int(ctx.tokens.all.sum()) % 50_000 for ctx in batch}


def main() -> None:
    params = rayk.MHAKVCacheParams(
        dtype="float32",
        n_kv_heads=2,
        head_dim=8,
        num_layers=2,
        page_size=PAGE,
        devices=["cpu"] * 2,  # one TP shard for each of the two replicas; "cuda:0", .. where there are GPUs
        data_parallel_degree=2,
        enable_prefix_caching=True,
    )
    with rayk.InferenceSession(runtime="ray") as session:
        kv_manager = rayk.PagedKVCacheManager(params, session, total_num_pages=256, max_batch_size=16)
        system_prompt = list(range(2000, 2100))
        ctx1 = rayk.TextContext("alice", [*system_prompt, 1, 2, 3], max_length=512)
        ctx2 = rayk.TextContext("bob", [*system_prompt, 4, 5, 6], max_length=512)

        kv_manager.claim(ctx1.request_id, replica_idx=0)
        kv_manager.claim(ctx2.request_id, replica_idx=1)
        batches = [[ctx1], [ctx2]]  # one list per replica
        for _ in range(20):
            kv_manager.alloc(ctx1, replica_idx=0)
            kv_manager.alloc(ctx2, replica_idx=1)
            inputs = kv_manager.runtime_inputs(batches)  # the tables, should the driver need them
            assert [len(leaf.shards[0].lookup_table) for leaf in inputs] == [1, 1]
            sampled = kv_manager.execute(batches, forward)  # one message per replica
            ctx1.update(sampled[0]["alice"])
            ctx2.update(sampled[1]["bob"])
            kv_manager.step(batches)
        kv_manager.release(ctx1.request_id, replica_idx=0)
        kv_manager.release(ctx2.request_id, replica_idx=1)

        # A third request: the router chooses a replica, and the shared prompt is found there.
        ctx3 = rayk.TextContext("carol", [*system_prompt, 7, 8, 9], max_length=512)
        [replica] = kv_manager.admit([ctx3])
        print(f"carol went to replica {replica} and reused {ctx3.cached_prefix_length} of {len(ctx3.tokens)} tokens")
        # The same on the other replica: alice's answer is only on replica 0 and is copied to replica 1.
        ctx4 = rayk.TextContext("dave", [*ctx1.tokens.all, 10], max_length=512)
        kv_manager.claim(ctx4.request_id, replica_idx=1)
        kv_manager.alloc(ctx4, replica_idx=1)
        kv_manager.release(ctx3.request_id, replica)
        kv_manager.release(ctx4.request_id, 1)
        metrics = kv_manager.get_metrics_aggregated()
        print(f"dave reused {ctx4.cached_prefix_length} of {len(ctx4.tokens)} tokens on replica 1")
        print(
            f"all replicas: {metrics.input_tokens} tokens computed, {metrics.cache_tokens} reused, "
            f"{metrics.cross_replica_blocks_copied} page(s) copied between replicas"
        )
        print(f"free pages: {[kv_manager.num_free_blocks(r) for r in range(2)]}")


if __name__ == "__main__":
    main()
