"""`rayk bench core`: what the control plane costs, in CPU time of the calling thread, judged against stored limits.

No Ray and no forward: requests go through the public API of a manager in this process. What the workloads are is in
prompts.py (W1, W2), decode.py (W3), trace_case.py (W4), lookups.py (W5) and one_off.py; limits.py has their limits and
what the best peers need; clock.py how time is taken, and the unit that makes figures of different machines comparable.
"""
