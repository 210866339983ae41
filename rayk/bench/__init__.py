"""The benchmark: workloads and traces served by a continuous-batching loop over the cache, measured and reported.

    traces.py, workloads.py ──> request.py ──> loop.py ──> measure.py ──> result.py ──> report.py
                                                 │  ^           │
                                     manager.tick│  │verify.py  └──> lru.py  (what other caches would have given)

Nothing here touches Ray: the loop talks to a `PagedKVCacheManager`, in whichever runtime that was made.
"""
