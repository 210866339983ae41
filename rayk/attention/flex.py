"""FlexAttention over pages, for CUDA devices without vllm-flash-attn. Reads the pages in place.

The whole pool is one axis of tokens to FlexAttention: from the first slot of a layer's keys on, every `P` tokens are
one block, and the block of page p is number p * blocks_per_page. A block mask lists the blocks that a tile of queries
sees; the mask function says the same about single tokens, from the place that a page has in its row. Rows with one
token and rows with several are two calls, each padded to its longest and to powers of two, because every new shape is
compiled. FlexAttention must not run uncompiled on a real pool: it would score every slot of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from rayk.attention.backend import Needs, Rules
from rayk.attention.batch import PagedBatch
from rayk.attention.sdpa import TorchSdpa

QUERY_TILE = 128
MOST_ELEMENTS = 2**31 - 1
"""Of a pool: kernels that count further in 64 bits are generated, but some releases of Triton do not compile them."""
MOST_SHAPES = 512
"""Shapes compiled before torch would give up and run uncompiled; powers of two keep the real number far below."""


@dataclass(frozen=True)
class _Part:
    """Rows that are attended in one call, padded to B rows of Q tokens, both powers of two.

    rows: int64 `[B]` rows of the batch, None for all of them in order. tokens: int64 `[B, Q]` packed tokens, padding
    repeats one. places: int64 `[packed tokens of the part]`, where they are in B * Q. packed: the packed tokens, None
    for all in order. before, counts: int32 `[B]`, tokens before the first one, real tokens (0 in padding rows).
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    packed: torch.Tensor | None
    before: torch.Tensor
    counts: torch.Tensor


class TorchFlex:
    """`compiled=False` scores everything, on any device: for tests with small pools. Pools of more than `most_elements`
    are left to torch-sdpa."""

    name = "torch-flex"

    def __init__(self, compiled: bool = True, most_elements: int = MOST_ELEMENTS) -> None:
        self._compiled = compiled
        self._most = most_elements
        self._larger = TorchSdpa()
        self._flex: Any = None if compiled else flex_attention  # torch's compiler is loaded when first needed

    def unfit(self, needs: Needs) -> str | None:
        if self._compiled and needs.device.type != "cuda":
            return f"it needs a CUDA device, not {needs.device}"
        if self._compiled and importlib.util.find_spec("triton") is None:
            return "it needs triton, which is not installed"
        if needs.dtype not in (torch.float32, torch.float16, torch.bfloat16) or needs.cache_dtype != needs.dtype:
            return f"it takes float32, float16 or bfloat16 throughout, not {needs.dtype} with {needs.cache_dtype} pages"
        if needs.page_size < 16 or needs.page_size & (needs.page_size - 1):
            return f"pages of {needs.page_size} tokens: it takes powers of two from 16 on"
        if needs.head_dim < 16:
            return f"heads of {needs.head_dim} elements: at least 16"
        return None

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
    ) -> torch.Tensor:
        if keys.shape[0] * keys.stride(0) > self._most:
            return self._larger.attend(query, keys, values, batch, rules)
        per_page = keys.stride(0) // (keys.shape[1] * keys.shape[2] * keys.shape[3])
        out = torch.empty_like(query)
        score = None if rules.softcap is None else _softcap(rules.softcap)
        for i, part in enumerate(batch.once("torch-flex", lambda: _parts(batch))):
            mask = batch.once(
                ("torch-flex", i, rules.window, keys.shape[0], per_page),
                partial(_mask, batch, part, rules.window, keys.shape[0], per_page),
            )
            padded = query[part.tokens].transpose(1, 2)  # [B, heads, Q, dim]
            found = self._call(padded, _axis(keys, per_page), _axis(values, per_page), score, mask, rules)
            packed = found.transpose(1, 2).flatten(0, 1)[part.places]
            if part.packed is None:
                return packed
            out.index_copy_(0, part.packed, packed)
        return out

    def _call(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        score: Callable[..., torch.Tensor] | None,
        mask: BlockMask,
        rules: Rules,
    ) -> torch.Tensor:
        if self._flex is None:
            self._flex = torch.compile(flex_attention, dynamic=False)
        size = mask.BLOCK_SIZE[1]
        options = {"BLOCK_N": size} if size < QUERY_TILE else None  # the kernels' tiles must divide a page
        extra = {} if rules.sinks is None else {"return_aux": AuxRequest(lse=True)}
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            found = self._flex(
                query,
                keys,
                values,
                score_mod=score,
                block_mask=mask,
                scale=rules.scale,
                enable_gqa=query.shape[1] != keys.shape[1],
                kernel_options=options,
                **extra,
            )
        if rules.sinks is None:
            out: torch.Tensor = found
            return out
        out, aux = found  # a sink takes the weight exp(sink) / (exp(sink) + exp(lse))
        kept = torch.sigmoid(aux.lse - rules.sinks.float()[None, :, None])
        return (out * kept[..., None]).to(query.dtype)


def _softcap(cap: float) -> Callable[..., torch.Tensor]:
    def score(score: torch.Tensor, b: Any, h: Any, q: Any, kv: Any) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return score


def _axis(view: torch.Tensor, per_page: int) -> torch.Tensor:
    """A layer's keys or values `[pages, P, heads, dim]` as `[1, heads, tokens, dim]` over the pool from there on."""
    pages, size, heads, dim = view.shape
    tokens = ((pages - 1) * per_page + 1) * size
    return view.as_strided((1, heads, tokens, dim), (0, dim, heads * dim, 1))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _parts(batch: PagedBatch) -> list[_Part]:
    """The whole batch if all rows have one token; else the rows with one and the rows with several."""
    device = batch.table.device
    if batch.is_decode:  # nothing is copied from the host: this may be under capture
        pad = _power(batch.rows)
        index = torch.arange(pad, device=device)
        rows = index.clamp(max=batch.rows - 1)
        real = (index < batch.rows).int()
        return [_Part(rows, rows[:, None], index[: batch.rows], None, batch.cached[rows], real)]
    single = [i for i, count in enumerate(batch.counts) if count == 1]
    several = [i for i, count in enumerate(batch.counts) if count > 1]
    return [_part(batch, rows, device) for rows in (single, several) if rows]


def _part(batch: PagedBatch, rows: list[int], device: torch.device) -> _Part:
    ends = torch.tensor(batch.counts).cumsum(0)
    chosen = torch.tensor(rows + [rows[-1]] * (_power(len(rows)) - len(rows)))
    sizes = torch.tensor(batch.counts)[chosen]
    starts = ends[chosen] - sizes
    width = _power(int(sizes.max()))
    offsets = torch.arange(width)
    tokens = starts[:, None] + offsets.clamp(max=sizes[:, None] - 1)
    sizes[len(rows) :] = 0
    places = torch.nonzero((offsets < sizes[:, None]).flatten())[:, 0]
    packed = tokens.flatten()[places]

    def there(host: torch.Tensor) -> torch.Tensor:
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    on_device = there(chosen)
    return _Part(on_device, there(tokens), there(places), there(packed), batch.cached[on_device], there(sizes.int()))


def _mask(batch: PagedBatch, part: _Part, window: int | None, pages: int, per_page: int) -> BlockMask:
    """Which blocks each tile of queries sees, wholly or in part, and the exact rule for single tokens."""
    size, device = batch.page_size, batch.table.device
    rows, length = part.tokens.shape
    columns = min(batch.table.shape[1], -(-batch.max_kv // size))
    table = batch.table[part.rows][:, :columns].long()
    place = torch.full((rows, pages), -1, dtype=torch.int32, device=device)  # of a page in its row
    place.scatter_(1, table, torch.arange(columns, dtype=torch.int32, device=device).expand(rows, -1))
    place[:, pages - 1] = -1  # the null page is nobody's
    before, counts = part.before, part.counts

    def sees(b: Any, h: Any, q: Any, kv: Any) -> Any:
        block = kv // size
        where = place[b, torch.clamp(block // per_page, max=pages - 1)]
        position = where * size + kv % size
        own = before[b] + q
        seen = (block % per_page == 0) & (where >= 0) & (position <= own) & (q < counts[b])
        return seen if window is None else seen & (position > own - window)

    # First and last own position of each tile, [rows, tiles]; a tile without real queries sees nothing.
    tile = torch.arange(0, length, QUERY_TILE, dtype=torch.int32, device=device)
    first = before[:, None] + tile
    last = before[:, None] + torch.minimum(tile + QUERY_TILE, counts[:, None]) - 1
    empty = tile >= counts[:, None]
    low = torch.zeros_like(first) if window is None else (first - window + 1).clamp(min=0) // size
    high = last // size + 1
    whole_low = low if window is None else torch.maximum(low, -(-(last - window + 1).clamp(min=0) // size))
    whole_high = torch.maximum(whole_low, (first + 1) // size)
    wholes = (whole_high - whole_low).masked_fill(empty, 0)
    partly = ((whole_low - low).clamp(min=0) + (high - whole_high).clamp(min=0)).masked_fill(empty, 0)
    wide = torch.arange(_power(columns), dtype=torch.int32, device=device)
    ahead = (whole_low - low)[..., None]
    in_part = torch.where(wide < ahead, low[..., None] + wide, whole_high[..., None] + wide - ahead)
    blocks = (pages - 1) * per_page + 1

    def listed(at: torch.Tensor) -> torch.Tensor:
        """Block numbers `[rows, 1, tiles, blocks]`, of which a tile reads only as many as it sees."""
        tiles, width = at.shape[1:]
        index = at.clamp(0, columns - 1).long().flatten(1)
        numbers = (table.gather(1, index) * per_page).int().flatten()
        # The kernels want a list as long as the pool has blocks; it is never read beyond the count.
        room = torch.zeros(numbers.numel() + blocks, dtype=torch.int32, device=device)
        room[: numbers.numel()] = numbers
        return room.as_strided((rows, 1, tiles, blocks), (tiles * width, tiles * width, width, 1))

    return BlockMask.from_kv_blocks(
        partly.int()[:, None],
        listed(in_part),
        wholes.int()[:, None],
        listed(whole_low[..., None] + wide),
        BLOCK_SIZE=(QUERY_TILE, size),
        mask_mod=sees,
        seq_lengths=(length, blocks * size),
        compute_q_blocks=False,
    )
