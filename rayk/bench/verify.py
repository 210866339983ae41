"""The `--forward verify` model: it writes what a slot must hold, and checks slots against it.

The right content of a slot is a function of *all* tokens up to it, its layer, its kv index, its shard and its place
within the slot:

    word[page slot, layer, kv, j] = mix(chain(tokens[0 .. slot])) + key[leaf, shard, layer, kv, j]      (64 bit)

with one pseudo-random key per place, written as raw bits whatever the dtype, and compared as raw bits (so a NaN
pattern is as good as any other). A page of another prefix, a page that was evicted or overwritten, a copy with a
missing layer, swapped layers or shards, and a shifted row all show up. Work is whole pages at a time in torch: no
Python loop over tokens, on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rayk.workloads.chain import mix64, prefix_chain

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What one forward checked: slots (each in all layers and shards), how many were wrong, and the first of them."""

    slots_checked: int = 0
    mismatches: int = 0
    first: str | None = None


def verify_forward(inputs: Any, batch: Sequence[Any], *, whole: Collection[str] = ()) -> Verified:
    """The forward of one replica: fill every row's active window, then check the rows.

    `inputs` and `batch` are what `execute` hands to its function. Of a row whose request id is in `whole` every slot
    up to the end of its window is checked, of any other row the page that holds the end of the window.
    """
    if not batch:
        return Verified()
    pools = [pool for name, leaf in _leaves(inputs) for pool in _pools(name, leaf)]
    rows = [_Row(context, pools[0].page_size, context.request_id in whole) for context in batch]
    bad: dict[tuple[int, int], str] = {}  # (row, slot) -> where it was first seen to be wrong
    for pool in pools:
        pool.write(rows)
    for pool in pools:
        pool.check(rows, bad)
    checked = sum(row.end - row.check_from for row in rows)
    first = None
    if bad:
        (row, slot), where = min(bad.items())
        first = f"request {rows[row].request_id!r}, slot {slot}: {where}"
    return Verified(checked, len(bad), first)


def forward(whole: Collection[str]) -> Callable[..., Verified]:
    """`verify_forward` bound to the request ids that are checked as a whole; cheap to pickle."""
    return functools.partial(verify_forward, whole=tuple(whole)) if whole else verify_forward


class _Row:
    """A row of the batch: its active window, where checking starts, and the chain from the earlier of the two on."""

    __slots__ = ("_base", "_chain", "check_from", "end", "request_id", "start")

    def __init__(self, context: Any, page_size: int, whole: bool) -> None:
        tokens = context.tokens
        self.request_id: str = context.request_id
        self.start: int = tokens.processed_length
        self.end: int = self.start + tokens.active_length
        self.check_from = 0 if whole else (self.end - 1) // page_size * page_size
        self._base = min(self.start, self.check_from)
        self._chain = mix64(prefix_chain(tokens.all[: self.end])[self._base :]).view(np.int64)

    def chain(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Mixed chain values of slots begin..end-1, [end - begin] int64."""
        return self._chain[begin - self._base : end - self._base]


def _leaves(inputs: Any) -> list[tuple[str, Any]]:
    return list(inputs.items()) if hasattr(inputs, "items") else [("kv", inputs)]


def _pools(name: str, leaf: Any) -> list[_Pool]:
    out = []
    for index, shard in enumerate(leaf.shards):
        table = torch.as_tensor(shard.lookup_table).cpu().numpy()
        out.append(_Pool(f"{name} shard {index}", shard.kv_blocks, table))
        if shard.kv_scales is not None:
            out.append(_Pool(f"{name} scales of shard {index}", shard.kv_scales, table))
    return out


class _Pool:
    """One buffer seen as integers: [pages + 1, a, b, page_size, words], where a and b are layer and kv index.

    The buffer is used in the order in which it lies in memory (page-major pools are handed out transposed), so that a
    page is one contiguous stretch; `transposed` says whether a is the layer.
    """

    def __init__(self, name: str, blocks: torch.Tensor, table: npt.NDArray[Any]) -> None:
        self.name = name
        self.table = table.astype(np.int64)
        self.transposed = not blocks.is_contiguous() and blocks.transpose(1, 2).is_contiguous()
        lying = blocks.transpose(1, 2) if self.transposed else blocks
        pages, a, b, self.page_size = lying.shape[:4]
        size = lying[0, 0, 0, 0].numel() * lying.element_size()
        width = next(w for w in _WORDS if size % w == 0)
        self.words = lying.view(pages, a, b, self.page_size, -1).view(_WORDS[width])
        self.null = pages - 1
        layers, kv = (a, b) if self.transposed else (b, a)
        keys = _keys(name, layers, kv, size // width)
        if not self.transposed:
            keys = np.ascontiguousarray(keys.transpose(1, 0, 2))
        self.keys = torch.from_numpy(keys).to(lying.device)[None, :, :, None, :]
        self.piece = max(1, _PIECE_BYTES // (8 * self.words[0].numel()))  # pages worked on at a time

    def expected(self, chain: torch.Tensor) -> torch.Tensor:
        """Right content of pages whose slots have `chain` ([n, slots] int64): [n, a, b, slots, words]."""
        return (chain[:, None, None, :, None] + self.keys).to(self.words.dtype)

    def write(self, rows: Sequence[_Row]) -> None:
        """Fill the rows' active windows: full pages as pages, what is left slot by slot."""
        size = self.page_size
        pages: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        slots: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        for index, row in enumerate(rows):
            first = min(-(-row.start // size) * size, row.end)  # start of the first page that is written as a whole
            last = max(first, row.end // size * size)
            if last > first:
                chosen = self.table[index, first // size : last // size]
                pages.append((chosen, row.chain(first, last).reshape(-1, size)))
            for begin, end in ((row.start, first), (last, row.end)):
                if end > begin:
                    at = np.arange(begin, end)
                    slots.append((self.table[index, at // size], at % size, row.chain(begin, end)))
        if pages:
            where, chain = (np.concatenate(part) for part in zip(*pages, strict=True))
            for begin in range(0, len(where), self.piece):
                piece = slice(begin, begin + self.piece)
                self.words[self._on(where[piece])] = self.expected(self._on(chain[piece]))
        if slots:
            where, offset, chain = (np.concatenate(part) for part in zip(*slots, strict=True))
            content = self.expected(self._on(chain)[:, None])[:, :, :, 0]
            self.words[self._on(where), :, :, self._on(offset)] = content

    def check(self, rows: Sequence[_Row], bad: dict[tuple[int, int], str]) -> None:
        """Compare the rows' slots from `check_from` on; what is wrong goes to `bad`."""
        size = self.page_size
        where: list[npt.NDArray[np.int64]] = []
        chains: list[npt.NDArray[np.int64]] = []
        origin: list[tuple[int, int, int]] = []  # row, first slot, end
        for index, row in enumerate(rows):
            first = row.check_from
            count = -(-(row.end - first) // size)
            chain = np.zeros(count * size, np.int64)
            chain[: row.end - first] = row.chain(first, row.end)
            where.append(self.table[index, first // size : first // size + count])
            chains.append(chain.reshape(-1, size))
            origin += [(index, first + page * size, row.end) for page in range(count)]
        pages, chain = np.concatenate(where), np.concatenate(chains)
        ends = np.array([min(size, end - slot) for _, slot, end in origin])
        for at in range(0, len(pages), self.piece):
            piece = slice(at, at + self.piece)
            self._compare(pages[piece], chain[piece], ends[piece], origin[piece], rows, bad)

    def _compare(
        self,
        pages: npt.NDArray[np.int64],
        chain: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        origin: Sequence[tuple[int, int, int]],
        rows: Sequence[_Row],
        bad: dict[tuple[int, int], str],
    ) -> None:
        size = self.page_size
        full = ends == size
        for chosen, width in [(np.flatnonzero(full), size)] + [
            (np.flatnonzero(~full & (ends == end)), int(end)) for end in np.unique(ends[~full])
        ]:
            if not len(chosen):
                continue
            found = self.words[self._on(pages[chosen])][:, :, :, :width]
            wanted = self.expected(self._on(chain[chosen, :width]))
            null = pages[chosen] == self.null
            if torch.equal(found, wanted) and not null.any():
                continue
            wrong = (found != wanted).any(-1)  # [pages, a, b, slots]
            for page, slot in torch.nonzero(wrong.any(1).any(1)).tolist():
                row, first, _ = origin[int(chosen[page])]
                a, b = torch.nonzero(wrong[page, :, :, slot])[0].tolist()
                layer, kv = (a, b) if self.transposed else (b, a)
                text = f"{self.name}, layer {layer}, kv {kv}, page {int(pages[chosen[page]])} holds other bytes"
                bad.setdefault((row, first + slot), text)
            for lost in np.flatnonzero(null).tolist():
                row, first, _ = origin[int(chosen[lost])]
                bad.setdefault((row, first), f"{self.name}: the block table has the null page for this slot")

    def _on(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.words.device)


@functools.lru_cache(maxsize=64)
def _keys(name: str, layers: int, kv: int, words: int) -> npt.NDArray[np.int64]:
    """One key per place of a slot: [layers, kv, words] int64, the same for the same arguments in every process."""
    seed = [*name.encode(), layers, kv, words]
    return np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, (layers, kv, words), dtype=np.int64)
