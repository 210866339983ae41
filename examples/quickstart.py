"""Two requests with a common prompt in one process: the second finds its prefix cached."""

import rayk

params = rayk.MHAKVCacheParams(
    dtype="float32", n_kv_heads=2, head_dim=8, num_layers=2, page_size=16, devices=["cpu"], enable_prefix_caching=True
)


def forward(inputs, batch):
    """A model would compute attention here; this one writes each token's id into its slot."""
    shard = inputs.shards[0]
    for row, ctx in enumerate(batch):
        start = ctx.tokens.processed_length
        for position, token in enumerate(ctx.tokens.active.tolist(), start):
            page = int(shard.lookup_table[row, position // 16])
            shard.kv_blocks[page, :, :, position % 16] = token


with rayk.InferenceSession() as session, rayk.PagedKVCacheManager(params, session, 64, max_batch_size=8) as cache:
    prompt = list(range(1000, 1100))
    for name, question in (("first", [1, 2, 3]), ("second", [4, 5, 6])):
        ctx = rayk.TextContext(name, prompt + question, max_length=256)
        cache.claim(name, replica_idx=0)
        cache.alloc(ctx, replica_idx=0)  # moves the window past what is cached
        print(f"{name}: {ctx.cached_prefix_length} of {len(ctx.tokens)} tokens reused")
        cache.execute([[ctx]], forward)
        ctx.update(42)  # the sampled token
        cache.step([[ctx]])  # full pages can be reused from now on
        cache.release(name, replica_idx=0)
    print(f"pages free again: {cache.num_free_blocks()} of {cache.total_num_blocks()}")
