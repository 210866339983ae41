"""Attention with plain torch: pages are gathered into a workspace that stays in the processor's caches, then SDPA.

Measured on CPU, gathering one row at a time into a reused workspace and packing the query heads of a group into one
matrix costs about what SDPA costs on unpaged keys and values. Rows that are short are taken several at a time, since
there the calls cost more than the work. What stands in a slot beyond a row's length is another request's: it is never
read, or overwritten with zeros before it is multiplied by a weight of zero (which would not make a NaN vanish).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from rayk.attention.backend import FP8, Needs, Rules
from rayk.attention.batch import PagedBatch
from rayk.attention.gathering import Chunk, Plan, plan_rows, query_blocks


class TorchSdpa:
    """Any device and any rule. On CUDA a batch with several tokens a row waits for the device; decoding does not."""

    name = "torch-sdpa"

    def __init__(self) -> None:
        self._spaces_by_thread = threading.local()  # forwards in two threads must not share a workspace

    def unfit(self, needs: Needs) -> str | None:
        if needs.cache_dtype != needs.dtype and needs.cache_dtype not in FP8:
            return f"it reads {needs.dtype} or float8 pages, not {needs.cache_dtype} for {needs.dtype} queries"
        return None

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
    ) -> torch.Tensor:
        if batch.is_decode and query.device.type != "cpu":
            return _padded_decode(query, keys, values, batch, rules)
        slot_bytes = keys[0, 0].numel() * query.element_size()
        plan = batch.once(("plan", rules.window, slot_bytes), lambda: plan_rows(batch, rules.window, slot_bytes))
        if plan.shared:
            return self._cascade(query, keys, values, plan, rules, batch)
        out = torch.empty_like(query)
        if plan.groups:
            found, _ = self._decode(query, keys, values, plan, rules)
            if not plan.chunks and plan.in_order:
                return found
            out.index_copy_(0, plan.tokens, found)
        for chunk in plan.chunks:
            self._prefill(query, keys, values, out, chunk, rules, batch)
        return out

    def _cascade(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: Plan, rules: Rules, batch: PagedBatch
    ) -> torch.Tensor:
        """What rows share is scored once for all their tokens, what is left of each row as ever; then every token's
        parts are weighed by the sums of their exponents, of which the logarithms are kept: exact, not approximate."""
        own = replace(rules, sinks=None)
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        if plan.groups:
            found, parts = self._decode(query, keys, values, plan, own, sums=True)
            out.index_copy_(0, plan.tokens, found)
            sums.index_copy_(0, plan.tokens, parts)
        for chunk in plan.chunks:
            self._prefill(query, keys, values, out, chunk, own, batch, sums)
        heads, dim = keys.shape[2:]
        for part in plan.shared:
            gathered = self._gathered(keys, values, part.pages, query.dtype)
            k, v = (each.flatten(0, 1).transpose(0, 1) for each in gathered)
            q = query.index_select(0, part.tokens).view(len(part.tokens), heads, -1, dim)
            found, parts = _summed(q.transpose(0, 1).reshape(1, heads, -1, dim), k[None], v[None], None, own)
            shape = heads, len(part.tokens), -1
            theirs = found[0].reshape(*shape, dim).transpose(0, 1).flatten(1, 2)
            their_sums = parts[0].reshape(shape).transpose(0, 1).flatten(1, 2)
            ours, our_sums = out.index_select(0, part.tokens), sums.index_select(0, part.tokens)
            together = torch.logaddexp(our_sums, their_sums)
            weights = ((each - together).exp()[..., None].to(out.dtype) for each in (our_sums, their_sums))
            out.index_copy_(0, part.tokens, ours * next(weights) + theirs * next(weights))
            sums.index_copy_(0, part.tokens, together)
        if rules.sinks is not None:
            out *= (sums - torch.logaddexp(sums, rules.sinks.float())).exp()[..., None].to(out.dtype)
        return out

    def _spaces(self, view: torch.Tensor, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for `pages` pages of keys and of values, `[pages.., page_size, heads, dim]` in the dtype of `view`.

        Both are overwritten by the next call in this thread.
        """
        key = (view.dtype, view.device, tuple(view.shape[1:]))
        known = self._spaces_by_thread.__dict__.setdefault("spaces", {})
        if key not in known or len(known[key][0]) < pages:
            shape = (pages, *view.shape[1:])
            known[key] = tuple(torch.empty(shape, dtype=view.dtype, device=view.device) for _ in range(2))
        spaces: tuple[torch.Tensor, torch.Tensor] = known[key]
        return spaces

    def _gathered(
        self, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """These pages of both, `[pages, page_size, heads, dim]` of that dtype, in this thread's workspace until the
        next call. A latent, key and value at once, is gathered once."""
        same = values.data_ptr() == keys.data_ptr()
        keys, values, as_query = _readable(keys, values, dtype)
        first, second = (space[: len(pages)] for space in self._spaces(keys, len(pages)))
        k = as_query(torch.index_select(keys, 0, pages, out=first))
        return k, k if same else as_query(torch.index_select(values, 0, pages, out=second))

    def _decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: Plan,
        rules: Rules,
        sums: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan's rows of one token, `[rows, heads, dim]` in the plan's order, and, if asked for, the logarithms of
        the sums of their exponents, float32 `[rows, heads]`."""
        _, size, heads, dim = keys.shape
        if not plan.in_order:
            query = query.index_select(0, plan.tokens)
        q = query.view(len(query), heads, -1, dim)  # [rows, kv heads, query heads of each, dim]
        sinks = None if rules.sinks is None else rules.sinks.view(heads, 1, -1)
        found, logs, at = [], [], 0
        for group in plan.groups:
            rows, pages = group.rows, len(group.pages)
            shape = (rows, heads, group.end - group.first, dim)
            strides = (pages // rows * size * heads * dim, dim, heads * dim, 1)
            gathered = self._gathered(keys, values, group.pages, query.dtype)
            k, v = (each.as_strided(shape, strides, group.first * heads * dim) for each in gathered)
            for start, end, outside in group.foreign:
                k[:, :, start:end].masked_fill_(outside, 0)
                v[:, :, start:end].masked_fill_(outside, 0)
            if sums:
                scored, log = _summed(q[at : at + rows], k, v, group.seen, rules)
                logs.append(log)
            else:
                scored = _scored(q[at : at + rows], k, v, group.seen, rules, sinks)
            found.append(scored)
            at += rows
        together = torch.cat(found) if len(found) > 1 else found[0]
        return together.flatten(1, 2), torch.cat(logs).flatten(1, 2) if sums else together

    def _prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        chunk: Chunk,
        rules: Rules,
        batch: PagedBatch,
        sums: torch.Tensor | None = None,
    ) -> None:
        sinks = None if rules.sinks is None else rules.sinks.view(keys.shape[2], -1, 1)
        gathered = self._gathered(keys, values, chunk.pages, query.dtype)
        k, v = (each.flatten(0, 1).transpose(0, 1)[None] for each in gathered)
        for start, end, first, last, seen in batch.once(
            ("blocks", rules.window, chunk.start), lambda: list(query_blocks(chunk, rules.window, query.device))
        ):
            q = query[start:end].transpose(0, 1)[None]  # [1, query heads, tokens, dim]
            if sums is None:
                found = _scored(q, k[:, :, first:last], v[:, :, first:last], seen, rules, sinks)
            else:
                found, logs = _summed(q, k[:, :, first:last], v[:, :, first:last], seen, rules)
                sums[start:end] = logs[0].transpose(0, 1)
            out[start:end] = found[0].transpose(0, 1)


def _readable(
    keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Views that can be gathered, and what makes gathered pages the query's dtype: float8 is gathered as bytes."""
    stored = keys.dtype
    if stored not in FP8:
        return keys, values, lambda gathered: gathered
    return keys.view(torch.uint8), values.view(torch.uint8), lambda gathered: gathered.view(stored).to(dtype)


def _scored(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    rules: Rules,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[batch, heads, tokens, dim]` for a query of that shape, keys and values of as many heads or a divisor.

    In decoding the query heads of a group are passed as tokens. sinks: `[kv heads, heads of each, tokens]` or 1 there.
    """
    if rules.softcap is None and sinks is None:
        gqa = query.shape[1] != keys.shape[1]
        return scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=rules.scale, enable_gqa=gqa)
    scores = _scores(query, keys, seen, rules)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, ..., None].expand(*scores.shape[:4], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[2]].to(values.dtype)
    return torch.matmul(weights, values[:, :, None]).flatten(1, 2)


def _scores(query: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor | None, rules: Rules) -> torch.Tensor:
    """float32 `[batch, kv heads, heads of each, tokens, slots]`."""
    batch, heads, tokens, dim = query.shape
    q = query.view(batch, keys.shape[1], heads // keys.shape[1], tokens, dim)  # heads by their kv head
    scores = (q @ keys[:, :, None].transpose(-1, -2)).float() * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if seen is not None:
        scores = scores.masked_fill(~(seen if seen.dim() == 2 else seen[:, :, None]), float("-inf"))
    return scores


def _summed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _scored() without sinks, and the logarithms of the sums of exponents, float32 `[batch, heads, tokens]`."""
    if rules.softcap is None and query.device.type == "cpu":
        return _fused_sums(query, keys, values, seen, rules.scale)
    scores = _scores(query, keys, seen, rules)
    logs = scores.logsumexp(-1)
    weights = scores.sub_(logs[..., None]).exp_().to(values.dtype)
    return torch.matmul(weights, values[:, :, None]).flatten(1, 2), logs.flatten(1, 2)


def _fused_sums(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel that SDPA calls on CPU, which gives the sums; the query heads of a group are passed as tokens."""
    batch, heads, tokens, dim = query.shape
    each = heads // keys.shape[1]
    mask = None if seen is None else torch.zeros((), dtype=query.dtype).where(seen, float("-inf"))
    if mask is not None and mask.dim() == 2:
        mask = mask[None, None].expand(1, each, *mask.shape).reshape(1, 1, -1, mask.shape[1])
    q = query.reshape(batch, keys.shape[1], each * tokens, dim)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logs = kernel(q, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, tokens, dim), logs.reshape(batch, heads, tokens).float()


def _padded_decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, rules: Rules
) -> torch.Tensor:
    """One token a row without waiting for the device: all rows are padded to the longest."""
    size, heads = batch.page_size, keys.shape[2]
    pages = batch.table[:, : -(-batch.max_kv // size)].long()
    slots = torch.arange(pages.shape[1] * size, device=query.device)
    seen = slots < batch.kv_lengths[:, None]
    if rules.window is not None:
        seen &= slots >= (batch.kv_lengths - rules.window)[:, None]
    keys, values, as_query = _readable(keys, values, query.dtype)
    k, v = (
        as_query(view[pages]).flatten(1, 2).masked_fill_(~seen[:, :, None, None], 0).transpose(1, 2)
        for view in (keys, values)
    )
    sinks = None if rules.sinks is None else rules.sinks.view(heads, 1, -1)
    q = query.view(len(query), heads, -1, query.shape[2])
    return _scored(q, k, v, seen[:, None, None], rules, sinks).flatten(1, 2)
