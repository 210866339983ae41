"""The benchmark: workloads and traces served by a continuous-batching loop over the cache, measured and reported.

    rayk/workloads ──> loop.py ──> measure.py ──> result.py ──> report.py
                        │              └──> rayk.simulate.replay (what other caches would have given)
                        ├── manager_driver.py: try_admit and tick of a manager, verify.py as the forward
                        └── cluster_driver.py: requests of a Cluster

Nothing here touches Ray: the drivers talk to a manager or a Cluster, in whichever runtime that was made.
"""
