"""The simulator: a workload against cache policies, capacities, replica counts and routers, in one process.

    workloads/traces.py, generators.py ──> paths.py ──> caches.py ──┐
                                            arrivals.py ────────────>├─> model.py ──> command.py
                                rayk.scheduler: policies and index ──┘

It has no tensors, no tokens and no Ray; routers and prefix index are the scheduler's own.
"""
