"""What is served: requests from published traces or seeded generators, and when they arrive. Benchmark and simulation
serve the same ones.

    traces.py, generators.py ──> request.py (runs of tokens) ──> arrivals.py (when each is sent)
"""
