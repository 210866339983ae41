"""What a forward pass needs to know about a batch: runtime inputs, per replica, leaf and TP shard.

A replica builds its part from its block table into arrays that it keeps and reuses: the views that one call
returns are overwritten by the next call on that replica. On CUDA they go through pinned host memory, which is not
written again before the device has read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from rayk.kvcache.block_table import Int32Array
from rayk.kvcache.buffers import PageBuffers
from rayk.params import KVCacheParams


class BatchCharacteristics(NamedTuple):
    """Upper bounds of a batch's shape, so that differing batches can run one captured graph."""

    batch_size: int
    max_prompt_length: int
    max_cache_valid_length: int


class BatchShape(NamedTuple):
    """The scalars of one replica's batch."""

    rows: int
    max_prompt_length: int
    max_cache_length: int


@dataclass(frozen=True)
class ShardInputs:
    """Inputs of one leaf on one TP shard. Integer tensors are on the shard's device.

    kv_blocks: `[pages + 1, kv_dim, layers, page_size, heads, head_dim]`, the cache itself; None in a driver under Ray.
    kv_scales: the scale buffer or None.
    lookup_table: int32 `[rows, width]`, page ids, null page beyond a request's pages.
    cache_lengths: int32 `[rows]`, tokens already in the cache.
    max_prompt_length, max_cache_length: int32 `[1]`, host.
    attention_dispatch_metadata: int64 `[4]`, host: rows (or the bound), max prompt, partitions (1: split by the
        attention backend itself), max cache.
    """

    kv_blocks: torch.Tensor | None
    kv_scales: torch.Tensor | None
    lookup_table: torch.Tensor
    cache_lengths: torch.Tensor
    max_prompt_length: torch.Tensor
    max_cache_length: torch.Tensor
    attention_dispatch_metadata: torch.Tensor


@dataclass(frozen=True)
class LeafInputs:
    """One cache of one replica; `shards[i]` is TP shard i."""

    shards: tuple[ShardInputs, ...]


ReplicaInputs = LeafInputs | dict[str, LeafInputs]


class RuntimeInputs(list[ReplicaInputs]):
    """One entry per replica: LeafInputs, or a mapping from leaf name to LeafInputs for multi-cache parameters."""

    @property
    def inputs(self) -> list[ShardInputs]:
        """The flat list over (replica, TP shard) of a single cache, replica-major."""
        return self.leaf("")

    def leaf(self, name: str) -> list[ShardInputs]:
        """The flat list over (replica, TP shard) of one cache of multi-cache parameters."""
        leaves = [entry if isinstance(entry, LeafInputs) else entry[name] for entry in self]
        return [shard for leaf in leaves for shard in leaf.shards]


def assemble(leaves: Iterable[tuple[str, LeafInputs]]) -> ReplicaInputs:
    """A replica's entry from its named leaves: a lone unnamed leaf stands for itself."""
    named = dict(leaves)
    return named[""] if list(named) == [""] else named


_KEPT_SHAPES = 64  # tensors of so many batch shapes are kept; then it starts over


def _scalar(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def table_only(leaf_shards: dict[str, int], table: Int32Array, lengths: Int32Array, shape: BatchShape) -> ReplicaInputs:
    """Inputs without buffers, for a driver whose replicas are elsewhere: leaf name -> number of TP shards."""
    shard = _shard(torch.from_numpy(table), torch.from_numpy(lengths), shape)
    return assemble((name, LeafInputs((shard,) * count)) for name, count in leaf_shards.items())


def no_inputs(params: KVCacheParams) -> ReplicaInputs:
    """Inputs of an empty batch without buffers, for an index at which no replica is."""
    shards = dict.fromkeys(params.leaves, params.tensor_parallel_degree)
    return table_only(shards, np.zeros((0, 16), np.int32), np.zeros(0, np.int32), BatchShape(0, 0, 0))


def _shard(table: torch.Tensor, lengths: torch.Tensor, shape: BatchShape) -> ShardInputs:
    return ShardInputs(
        kv_blocks=None,
        kv_scales=None,
        lookup_table=table,
        cache_lengths=lengths,
        max_prompt_length=_scalar(shape.max_prompt_length),
        max_cache_length=_scalar(shape.max_cache_length),
        attention_dispatch_metadata=torch.tensor(
            [shape.rows, shape.max_prompt_length, 1, shape.max_cache_length], dtype=torch.int64
        ),
    )


class InputStage:
    """The persistent arrays behind one replica's runtime inputs: host staging and one copy per CUDA device."""

    def __init__(self, buffers: PageBuffers, devices: tuple[str, ...], max_rows: int) -> None:
        self._buffers = buffers
        self._devices = devices
        self._max_rows = max_rows
        self.shown: object = None  # what the table shows, see show()
        self._made: dict[tuple[int, int], tuple[ReplicaInputs, list[_Scalars]]] = {}
        self._resize(64)

    def _resize(self, width: int) -> None:
        self._table = torch.zeros(self._max_rows * width, dtype=torch.int32)
        self._lengths = torch.zeros(self._max_rows, dtype=torch.int32)
        self._capacity = width
        self._made.clear()
        self.table: Int32Array = self._table.numpy()
        self.lengths: Int32Array = self._lengths.numpy()
        self._copies = {
            d: _DeviceCopy(self._table, self._lengths, d) for d in set(self._devices) if d.startswith("cuda")
        }

    def host_views(self, rows: int, width: int) -> tuple[Int32Array, Int32Array]:
        """Host arrays to fill: table [rows, width] and lengths [rows]. They are anybody's until the next call."""
        self.shown = None
        if width > self._capacity:
            self._resize(max(width, 2 * self._capacity))
        return self.table[: rows * width].reshape(rows, width), self.lengths[:rows]

    def show(self, what: object) -> None:
        """Remember what the host arrays were filled with, until they are given out again."""
        self.shown = what

    def build(self, rows: int, width: int, shape: BatchShape) -> ReplicaInputs:
        """The inputs over the filled host views, copied to each CUDA device of the replica.

        Tensors are kept per rows and width: a batch of the same shape gets the same ones, refilled.
        """
        made = self._made.get((rows, width))
        if made is None:
            if len(self._made) >= _KEPT_SHAPES:
                self._made.clear()
            made = self._made[rows, width] = self._make(rows, width)
        inputs, scalars = made
        for each in scalars:
            each.set(shape)
        for copy in self._copies.values():
            copy.refresh(self._table[: rows * width], self._lengths[:rows])
        return inputs

    def _make(self, rows: int, width: int) -> tuple[ReplicaInputs, list[_Scalars]]:
        by_device, scalars = {}, []
        for device in set(self._devices):
            copy = self._copies.get(device)
            table, lengths = (copy.table, copy.lengths) if copy is not None else (self._table, self._lengths)
            shard = _shard(table[: rows * width].view(rows, width), lengths[:rows], BatchShape(0, 0, 0))
            by_device[device] = shard
            scalars.append(_Scalars(shard))
        inputs = assemble(
            (
                name,
                LeafInputs(
                    tuple(
                        replace(by_device[d], kv_blocks=values, kv_scales=leaf.scales[i] if leaf.scales else None)
                        for i, (d, values) in enumerate(zip(self._devices, leaf.values, strict=True))
                    )
                ),
            )
            for name, leaf in self._buffers.leaves.items()
        )
        return inputs, scalars


class _DeviceCopy:
    """Table and lengths on one CUDA device, and the pinned memory that they are copied through.

    The arrays that are filled are other ones, so a batch may be laid out while the copy of the one before waits behind
    a forward pass. Only the next refresh() waits, until the device has read what is pinned.
    """

    def __init__(self, table: torch.Tensor, lengths: torch.Tensor, device: str) -> None:
        self.table, self.lengths = table.to(device), lengths.to(device)
        self._pinned = table.clone().pin_memory(), lengths.clone().pin_memory()
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def refresh(self, table: torch.Tensor, lengths: torch.Tensor) -> None:
        """Copy the first cells and lengths, in the order of the device's current stream."""
        self._read.synchronize()
        for new, pinned, there in zip((table, lengths), self._pinned, (self.table, self.lengths), strict=True):
            there[: len(new)].copy_(pinned[: len(new)].copy_(new), non_blocking=True)
        self._read.record(torch.cuda.current_stream(self.table.device))


class _Scalars:
    """The host scalars of one shard's inputs, as arrays that share their memory."""

    def __init__(self, shard: ShardInputs) -> None:
        self._prompt = shard.max_prompt_length.numpy()
        self._cache = shard.max_cache_length.numpy()
        self._metadata = shard.attention_dispatch_metadata.numpy()

    def set(self, shape: BatchShape) -> None:
        rows, prompt, cache = shape
        self._prompt[0] = prompt
        self._cache[0] = cache
        self._metadata[:] = (rows, prompt, 1, cache)
