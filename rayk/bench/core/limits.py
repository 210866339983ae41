"""Limits of `rayk bench core`, and what the best peers need for the same work.

All numbers are those of the reference machine (clock.py): a limit here is limit x unit / REFERENCE_US. Peers were
measured there with page size 16 and prefix caching on: vLLM 0.33.0, SGLang 0.5.23, mini-sglang 20fcd7f,
ai-dynamo-runtime 1.6.1 (its find_matches answers for all replicas at once).
"""

from __future__ import annotations

from typing import NamedTuple


class Bound(NamedTuple):
    """What a figure is held against, in the figure's own unit; None where there is nothing.

    `scaled` is False for what does not depend on the machine's speed, such as memory. `peer` names the best one.
    """

    limit: float | None = None
    best: float | None = None
    peer: str = ""
    scaled: bool = True


TIER_COPIES = ((2048, 8), (2048, 32), (128, 8), (128, 64), (32, 64))  # KiB of a page of 128 tokens, pages a call
_COPY = Bound(1 / 0.6, scaled=False)

_W1 = Bound(13.0, 65.0, "SGLang")

BOUNDS = {
    "w1": _W1,
    "w1-8k": Bound(18.0, 105.0, "SGLang"),
    "w1e": Bound(18.0, 246.0, "SGLang"),
    "w2": Bound(17.0, 87.5, "SGLang"),
    "w1-xxh3": Bound(25.0, 206.0, "vLLM"),
    "w1-8k-xxh3": Bound(25.0, 220.0, "vLLM"),
    "w2-xxh3": Bound(25.0, 630.0, "vLLM"),
    "w1-sha256": Bound(50.0, 229.0, "vLLM"),
    "w1-8k-sha256": Bound(50.0, 239.0, "vLLM"),
    "w2-sha256": Bound(50.0, 744.0, "vLLM"),
    "w3-1": Bound(),
    "w3-32": Bound(),
    "w3-256": Bound(1.0, 6.5, "vLLM"),
    "w3-1-batch": Bound(),
    "w3-32-batch": Bound(),
    "w3-256-batch": Bound(0.15, 0.26, "SGLang"),
    "w4": Bound(150.0, 550.0, "mini-sglang"),
    "w4-misses": Bound(1.0, scaled=False),
    "w5-8": Bound(8.0, 14.3, "Dynamo"),
    "w5-8-cold": Bound(),
    "w5-8-all": Bound(None, 14.3, "Dynamo"),
    "w5-32": Bound(8.0, 19.0, "Dynamo"),
    "w5-32-cold": Bound(),
    "w5-32-all": Bound(None, 19.0, "Dynamo"),
    "w5-64": Bound(8.0, 25.0, "Dynamo"),
    "w5-64-cold": Bound(),
    "w5-64-all": Bound(None, 25.0, "Dynamo"),
    "tier-miss": Bound(3.0),
    "tier-decode": Bound(1.1, scaled=False),
    "start-time": Bound(1.0),
    "start-memory": Bound(400.0, scaled=False),
    "page-bytes": Bound(96.0, scaled=False),  # 64 of them are the page's tokens
    "lone-page-bytes": Bound(640.0, scaled=False),
    "request-bytes": Bound(1024.0, scaled=False),
    "entry-bytes": Bound(200.0, scaled=False),  # 10 million entries in 2 GB
    "full-memory": Bound(400.0, scaled=False),
    "slower-w1": Bound(scaled=False),
    "slower-w3": Bound(scaled=False),
    "engine-loop": Bound(0.5),
    "attention": Bound(1.5, scaled=False),
    "i-w1": Bound(scaled=False),
    "i-w2": Bound(scaled=False),
    "i-w3": Bound(scaled=False),
    "i-w3-batch": Bound(scaled=False),
    "flat-w1": Bound(1.2, scaled=False),
    "flat-w3": Bound(1.2, scaled=False),
    "flat-w3-batch": Bound(1.2, scaled=False),
    "ray-calls": Bound(1.0, scaled=False),
    "ray-sent": Bound(44.0, scaled=False),
    "ray-received": Bound(12.0, scaled=False),
    "ray-driver": Bound(),
    "ray-replica": Bound(),
} | {
    f"tier-{way}-{kib}-{at_once}": _COPY if kib > 32 else Bound(scaled=False)
    for way in ("out", "in")
    for kib, at_once in TIER_COPIES
}
"""By the key of the figure."""
