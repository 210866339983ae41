"""A plan as JSON and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayk.planning.plan import NULL_PAGES, DeviceUse, MemoryPlan
from rayk.planning.plan_request import PlanAnswer, PlanQuestion
from rayk.planning.sweep import Variant
from rayk.quantity import show_bytes

GIB = 1 << 30
LENGTHS = (1024, 4096, 16_384, 65_536, 131_072)
BAR = 60
MOST_BARS = 8
PARTS = (  # attribute of DeviceUse, title, letter in the bar, style
    ("weights", "weights", "W", "blue"),
    ("activations", "overhead", "A", "magenta"),
    ("signal_buffers", "signal buffers", "S", "yellow"),
    ("kv_cache", "KV cache", "K", "green"),
)


def concurrency(plan: MemoryPlan) -> dict[int, int]:
    """Length in tokens -> requests of that length at once; up to the longest that is possible."""
    longest = plan.max_sequence_length
    lengths = sorted({*(n for n in LENGTHS if n < longest), longest}) if longest else []
    return {length: plan.requests_of(length) for length in lengths}


def as_json(answer: PlanAnswer, variants: Sequence[Variant] = ()) -> dict[str, Any]:
    """The object that `--format json` prints. Bytes; `free` is negative by what is missing when it does not fit."""
    plan, question = answer.plan, answer.question
    found: dict[str, Any] = {
        "command": "plan",
        "per_replica": replica_json(plan.typical),
        "nodes": [
            {
                "node": use.host_name,
                "node_id": use.node_id,
                "gpus": use.gpus,
                "replicas": [
                    {"index": i, "gpus": list(plan.replicas[i].gpus)} | replica_json(plan.replicas[i].plan)
                    for i in use.replicas
                ],
                "reason": use.reason,
            }
            for use in plan.nodes
        ],
        "fits": plan.fits,
        "suggestions": [dict(remedy.changes) for remedy in answer.suggestions],
        "suggestion_gpus": [remedy.gpus for remedy in answer.suggestions],
        "problems": list(plan.problems),
        "notes": list(plan.typical.notes),
        "concurrency": [{"length": n, "requests": count} for n, count in concurrency(plan.typical).items()],
        "total": {
            "gpus": sum(use.gpus for use in plan.nodes),
            "gpus_used": sum(len(replica.gpus) for replica in plan.replicas),
            "replicas": len(plan.replicas),
            "tokens": sum(replica.plan.tokens for replica in plan.replicas),
            "max_batch_size": sum(replica.plan.max_batch_size for replica in plan.replicas),
        },
        "model": _model_json(question),
        "settings": asdict(question.settings) | {"gpu": question.gpu.name if question.gpu else None},
    }
    if variants:
        found["sweep"] = [_variant_json(variant) for variant in variants]
    return found


def replica_json(plan: MemoryPlan) -> dict[str, Any]:
    """One replica, all its devices together."""
    sums = {name: sum(getattr(device, name) for device in plan.devices) for name, *_ in PARTS}
    return sums | {
        "free": plan.memory - plan.used,
        "pages": plan.pages,
        "page_bytes": plan.page_bytes,
        "token_bytes": plan.token_bytes,
        "tokens": plan.tokens,
        "max_sequence_length": plan.max_sequence_length,
        "max_batch_size": plan.max_batch_size,
        "bound": plan.bound,
        "null_page": NULL_PAGES * plan.page_bytes if plan.pages else 0,
        "memory": plan.memory,
        "limit": plan.limit,
        "token_bytes_per_gpu": max(device.kv_cache for device in plan.devices)
        // ((plan.pages // plan.groups + NULL_PAGES) * plan.page_size)
        if plan.pages
        else 0,
        "kv_dtype": plan.cache_dtype,
        "overhead": plan.overhead,
        "groups": plan.groups,
        "state_pages": plan.state_pages,
    }


def _model_json(question: PlanQuestion) -> dict[str, Any]:
    model = question.model
    return {
        "name": model.name,
        "layers": model.num_layers,
        "cached_layers": model.cached_layers,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "latent": model.latent,
        "max_length": model.max_length,
        "parameters": model.weights.total if model.weights else None,
        "window": model.window._asdict() if model.window else None,
        "dtype": model.dtype,
        "weight_format": weight_format(question),
        "cached": [c._replace(layers=(len(c.layers),))._asdict() | {"layers": len(c.layers)} for c in model.all_cached],
        "state_bytes": model.state.num_bytes(model.dtype),
        "rayk_refuses": model.refused,
        "draft": model.draft.name if model.draft else None,
    }


def weight_format(question: PlanQuestion) -> str:
    """How the weights are planned, for people."""
    model = question.model
    if question.settings.weights_dtype is not None:
        return f"{question.settings.weights_dtype}, as asked for"
    if model.storage is None:
        return f"{model.dtype}, by hand" if model.unknown is None else "by the files beside the config"
    return model.storage.title + (", size by the files beside the config" if model.stored_bytes is not None else "")


def _variant_json(variant: Variant) -> dict[str, Any]:
    shown: dict[str, Any] = {"settings": dict(variant.changes), "fits": False}
    if variant.plan is None:
        return shown | {"error": variant.error}
    plan = variant.plan
    return shown | {"fits": plan.fits, "problems": list(plan.problems), "per_replica": replica_json(plan.typical)}


def show(answer: PlanAnswer, variants: Sequence[Variant], console: Console) -> None:
    """Tables: where each GiB goes, a bar a device, requests by length; then notes and what would fit."""
    plan, question = answer.plan.typical, answer.question
    where = question.gpu.name if question.gpu else f"{len(question.nodes)} node(s)"
    parameters = f" ({question.model.weights.total / 1e9:.1f} B parameters)" if question.model.weights else ""
    set_up = question.settings
    more = f" pp={set_up.pp}" * (set_up.pp > 1) + f" attention-dp={set_up.attention_dp}" * (set_up.attention_dp > 1)
    console.print(f"{question.model.name}{parameters} on {where}, tp={set_up.tp}{more} dp={set_up.dp}", soft_wrap=True)
    console.print(f"weights {weight_format(question)}; cache {plan.cache_dtype}", soft_wrap=True)
    console.print(f"overhead: {plan.overhead}", soft_wrap=True)
    console.print(_memory_table(plan, question))
    for device in plan.devices[:MOST_BARS]:
        console.print(_bar(device))
    if len(plan.devices) > MOST_BARS:
        console.print(f"and {len(plan.devices) - MOST_BARS} more devices of this replica")
    legend = ", ".join(f"{letter} {title}" for _, title, letter, _ in PARTS)
    console.print(f"{legend}, . unused, - kept free", style="dim", soft_wrap=True)
    if plan.pages:
        console.print(_facts(answer, plan))
    if question.gpu is None:
        console.print(_nodes_table(answer))
    if variants:
        console.print(_sweep_table(variants))
        for reason in dict.fromkeys(filter(None, map(_refusal, variants))):
            console.print(f"no: {reason}", soft_wrap=True, markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    _verdict(answer, console)


def _memory_table(plan: MemoryPlan, question: PlanQuestion) -> Table:
    table = Table(title="Memory of one replica", title_justify="left")
    table.add_column("")
    for column in ("a GPU", "share", "replica"):
        table.add_column(column, justify="right")
    device = min(plan.devices, key=lambda d: d.memory)
    kept = device.memory - device.limit
    rows = [(title, getattr(device, name), sum(getattr(d, name) for d in plan.devices)) for name, title, *_ in PARTS]
    rows.append(("unused", device.limit - device.used, plan.limit - plan.used))
    rows.append((f"kept free (utilization {question.settings.utilization:g})", kept, plan.memory - plan.limit))
    for title, one, all_of_it in rows:
        table.add_row(title, show_bytes_signed(one), f"{one / device.memory:.1%}", show_bytes_signed(all_of_it))
    table.add_section()
    table.add_row("memory", show_bytes(device.memory), "100.0%", show_bytes(plan.memory))
    return table


def show_bytes_signed(size: int) -> str:
    """Bytes for people; a negative size is one that is missing."""
    return show_bytes(size) if size >= 0 else f"-{show_bytes(-size)}"


def _bar(device: DeviceUse) -> Text:
    """One device, BAR characters for its memory; it ends with > when what it should hold is more than that."""
    bar = Text(f"{device.name} {device.index:>2} |", no_wrap=True)
    at = done = 0
    parts = [(getattr(device, name), letter, style) for name, _, letter, style in PARTS]
    parts += [(max(0, device.limit - device.used), ".", "dim"), (device.memory - device.limit, "-", "dim")]
    for size, letter, style in parts:
        at += size
        end = min(BAR, round(at * BAR / device.memory))
        bar.append(letter * (end - done), style=style)
        done = max(done, end)
    return bar.append("|" if device.free >= 0 else ">")


def _facts(answer: PlanAnswer, plan: MemoryPlan) -> Table:
    table = Table(title="What it serves", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("pages a replica", f"{plan.pages:,} of {plan.page_size} tokens, {show_bytes(plan.page_bytes)} each")
    table.add_row("bound by", plan.bound)
    table.add_row("tokens", f"{plan.tokens:,} at {plan.token_bytes:,} bytes")
    if plan.state_pages:
        table.add_row("recurrent state", f"{plan.state_pages:,} pages a sequence")
    table.add_row("longest request", f"{plan.max_sequence_length:,} tokens")
    table.add_row("largest batch", f"{plan.max_batch_size:,} requests")
    replicas = len(answer.plan.replicas)
    if replicas > 1:
        gpus = sum(len(replica.gpus) for replica in answer.plan.replicas)
        tokens = sum(replica.plan.tokens for replica in answer.plan.replicas)
        table.add_row(f"all {replicas} replicas, {gpus} GPUs", f"{tokens:,} tokens")
    table.add_section()
    for length, count in concurrency(plan).items():
        table.add_row(f"requests of {length:,} tokens at once", f"{count:,}")
    return table


def _nodes_table(answer: PlanAnswer) -> Table:
    table = Table(title="Nodes", title_justify="left")
    for column in ("node", "GPUs", "replicas", "pages each", "left out because"):
        table.add_column(column)
    for use in answer.plan.nodes:
        pages = sorted({answer.plan.replicas[i].plan.pages for i in use.replicas})
        table.add_row(
            use.host_name,
            str(use.gpus),
            str(len(use.replicas)),
            ", ".join(f"{n:,}" for n in pages) or "-",
            use.reason or "",
        )
    return table


def _sweep_table(variants: Sequence[Variant]) -> Table:
    """One line a variant within 80 columns: what never differs is in the title."""
    same = [name for at, (name, _) in enumerate(variants[0].changes) if len({v.changes[at] for v in variants}) == 1]
    kept = ", ".join(f"{name.replace('_', '-')}={value}" for name, value in variants[0].changes if name in same)
    title = "Variants: weights of a GPU, cache of a replica" + (f"; {kept}" if kept else "")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for name, _ in variants[0].changes:
        if name not in same:
            table.add_column(name.replace("_", "-"), justify="right", overflow="fold")
    for column in ("weights", "cache", "tokens", "longest", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    for variant in variants:
        values = [str(value) for name, value in variant.changes if name not in same]
        if variant.plan is None:
            table.add_row(*values, "-", "-", "-", "-", "no")
            continue
        plan = variant.plan.typical
        table.add_row(
            *values,
            show_bytes(max(device.weights for device in plan.devices)),
            show_bytes(sum(device.kv_cache for device in plan.devices)),
            f"{plan.tokens:,}",
            f"{plan.max_sequence_length:,}",
            "yes" if variant.plan.fits else "no",
        )
    return table


def _refusal(variant: Variant) -> str | None:
    """Why a variant does not fit."""
    if variant.plan is not None and variant.plan.fits:
        return None
    settings = ", ".join(f"{name.replace('_', '-')}={value}" for name, value in variant.changes)
    return f"{settings}: {variant.error if variant.plan is None else '; '.join(variant.plan.problems)}"


def _verdict(answer: PlanAnswer, console: Console) -> None:
    if answer.fits:
        used = sum(len(replica.gpus) for replica in answer.plan.replicas)
        apart = "" if used <= 1 else f" {used} GPUs in all."
        console.print(f"It fits.{apart}")
        return
    console.print(f"It does not fit: {'; '.join(answer.plan.problems)}.", soft_wrap=True, markup=False)
    if not answer.suggestions:
        console.print("No single setting, nor two together, make it fit.")
    for remedy in answer.suggestions:
        gpus = f", {remedy.gpus} GPUs in all" if remedy.gpus > 1 else ""
        own = "; not with rayk's own runner, which splits by tp alone" if "pp" in dict(remedy.changes) else ""
        text = f"fits with {remedy.flags}: {remedy.pages:,} page(s) a replica{gpus}{own}"
        console.print(text, soft_wrap=True, markup=False)
