"""`rayk bench core`: what the control plane costs, in CPU time of the calling thread, judged against stored limits.

No Ray and no forward: a manager of this process. Workloads: prompts.py (W1, W2), decode.py (W3), trace_case.py (W4),
lookups.py (W5), one_off.py; limits.py has their limits and what peers need, clock.py the unit of time of a machine.
"""
