"""Forward functions that tests ship to replicas, parameters, and waiting with a deadline."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from ray import cloudpickle

from rayk import MHAKVCacheParams, PagedKVCacheManager
from rayk.actors.replica import ReplicaActor

# Workers cannot import this module: its functions travel by value, as those of a user's script do.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PAGE = 16  # tokens
PAGES = 2048  # of a replica of the shared manager


def params(replicas: int = 2, **changes: Any) -> MHAKVCacheParams:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "head_dim": 4,
        "num_layers": 1,
        "n_kv_heads": 1,
        "page_size": PAGE,
        "enable_prefix_caching": True,
        "data_parallel_degree": replicas,
        "devices": ["cpu"] * replicas,
    }
    return MHAKVCacheParams(**settings | changes)


def chain(tokens: Sequence[int]) -> list[float]:
    """What stamp() writes for each position: it depends on every token up to there, exactly in float32."""
    values, value = [], 1
    for token in tokens:
        value = (31 * value + token + 7) % 1_000_003
        values.append(float(value))
    return values


def stamp(inputs: Any, batch: Sequence[Any]) -> int:
    """Fill the active window of each request; how many tokens."""
    import torch

    [shard] = inputs.shards
    written, size = 0, shard.kv_blocks.shape[3]
    for row, ctx in enumerate(batch):
        window = ctx.tokens
        start, stop = window.processed_length, window.processed_length + window.active_length
        at = torch.arange(start, stop)
        pages = shard.lookup_table[row][at // size].long()
        values = torch.tensor(chain(window.all.tolist())[start:stop])
        shard.kv_blocks[pages, :, :, at % size] = values[:, None, None, None, None]
        written += stop - start
    return written


def contents(manager: PagedKVCacheManager, request_id: str, replica: int, tokens: int) -> list[float]:
    """The value at each of the first `tokens` positions of a request, read back from its pages."""
    [pages] = manager.read_pages(manager.get_req_blocks(request_id, replica), replica)
    rows: list[float] = pages[:, 0, 0, :, 0, 0].flatten()[:tokens].tolist()
    return rows


def pid(inputs: Any, batch: Any) -> int:
    return os.getpid()


class BrokenReplica(ReplicaActor):
    """A replica whose constructor fails."""

    def __init__(self, *arguments: Any) -> None:
        raise MemoryError("no room")


def wait_for_file(folder: str) -> Callable[[Any, Any], int]:
    """A forward that says that it runs (a file `<pid>.runs`) and ends once there is a file `go`."""

    def forward(inputs: Any, batch: Any) -> int:
        Path(folder, f"{os.getpid()}.runs").touch()
        deadline = time.monotonic() + 60
        while not Path(folder, "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(batch)

    return forward


def running(pids: Sequence[int]) -> list[int]:
    """Those of `pids` that are alive, zombies left out."""
    alive = []
    for one in pids:
        try:
            if psutil.Process(one).status() != psutil.STATUS_ZOMBIE:
                alive.append(one)
        except psutil.NoSuchProcess:
            continue
    return alive
