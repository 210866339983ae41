"""The memory plan of one replica: what each of its devices holds, how many pages fit, and what bounds them.

Pure arithmetic. Pipeline stages have layers in equal numbers, embeddings are in the first, the output head in the last.
Each TP shard of a stage holds an equal share of its weights and of every page (MLA: a whole copy; a KV head on several
shards where there are fewer heads), the same overhead, and with TP its buffers for collectives; so one device decides.
The cache has one page more than requests can use, the null page that pads block tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rayk.errors import ConfigError
from rayk.planning.budget import SIGNAL_BUFFER_BYTES
from rayk.planning.estimator import DEFAULT_BATCH_SIZE
from rayk.planning.model import Model
from rayk.planning.node_plan import DeviceMemory
from rayk.planning.overhead import Overhead, estimate
from rayk.planning.settings import PlanSettings
from rayk.planning.weights import Kind, Module
from rayk.quantity import show_bytes

NULL_PAGES = 1
MEMORY, ALLOCATION, BATCH, WANTED = "memory", "largest allocation", "batch x length", "pages asked for"


@dataclass(frozen=True)
class DeviceUse:
    """One device of a replica, in bytes. `memory` is what was free before; `limit` what the plan may use of it."""

    name: str
    index: int
    memory: int
    limit: int
    weights: int
    activations: int
    signal_buffers: int
    kv_cache: int

    @property
    def used(self) -> int:
        return self.weights + self.activations + self.signal_buffers + self.kv_cache

    @property
    def free(self) -> int:
        """What nobody uses; negative: so much is missing."""
        return self.memory - self.used


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of one replica. `problems` is empty when it fits; `bound` says what limits `pages`.

    `pages` are those of all `groups` that share experts and not pages (1 without attention_dp); a request is in one of
    them. `page_bytes` are over all GPUs that hold a part of the page, `state_pages` what a sequence's recurrent state
    takes. `tokens` and `max_sequence_length` are in tokens.
    """

    devices: tuple[DeviceUse, ...]
    pages: int
    page_size: int
    page_bytes: int
    bound: str
    max_sequence_length: int
    max_batch_size: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    cache_dtype: str = "bfloat16"
    overhead: str = ""
    groups: int = 1
    state_pages: int = 0

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size

    @property
    def token_bytes(self) -> int:
        return self.page_bytes // self.page_size

    @property
    def memory(self) -> int:
        return sum(device.memory for device in self.devices)

    @property
    def limit(self) -> int:
        """Bytes that the utilization allows on all devices."""
        return sum(device.limit for device in self.devices)

    @property
    def used(self) -> int:
        return sum(device.used for device in self.devices)

    def requests_of(self, length: int) -> int:
        """How many requests of that many tokens fit at once, when no prefix is shared."""
        return self.groups * (self.pages // self.groups // (-(-length // self.page_size) + self.state_pages))


@dataclass(frozen=True)
class Shard:
    """Bytes that one GPU of a stage holds: its weights, and its part of a page and of a sequence's state."""

    weights: int
    page: int
    state: int


def shards(model: Model, settings: PlanSettings) -> tuple[Shard, ...]:
    """By stage. ConfigError for heads that do not split and layers that are fewer than stages."""
    model.check_tp(settings.attention_tp)
    s, layers = settings, model.num_layers + (model.draft.num_layers if model.draft is not None else 0)
    if s.pp > layers:
        raise ConfigError(f"{model.name}: {layers} layers are fewer than pp={s.pp} stages")
    dtype = model.cache_dtype(s.kv_dtype, s.weights_dtype)
    total, found = model.loaded_bytes(s.weights_dtype), []
    copied = 0.0
    if s.attention_dp > 1:
        copied = model.shares(s.weights_dtype, {"attention": is_attention})["attention"]
    for stage in range(s.pp):
        inside = range(layers * stage // s.pp, layers * (stage + 1) // s.pp)
        share = 1.0
        if s.pp > 1:
            share = model.stage_share(s.weights_dtype, inside, stage == 0, stage == s.pp - 1)
        split = share * total * ((1 - copied) / s.tp + copied / s.attention_tp)
        weights = -(-total // s.tp) if s.pp == s.attention_dp == 1 else int(split) + 1
        state = -(-model.state.num_bytes(model.dtype) * len(inside) // layers // s.attention_tp)
        page = model.token_bytes(dtype, s.attention_tp, inside) * s.page_size
        found.append(Shard(weights, page, state))
    return tuple(found)


def is_attention(module: Module) -> bool:
    """What each group of attention data parallelism has a copy of."""
    return "attn" in module.name or "attention" in module.name or module.kind is Kind.embedding


def plan_replica(
    model: Model, settings: PlanSettings, devices: Sequence[DeviceMemory], wanted_pages: int | None = None
) -> MemoryPlan:
    """The plan of one replica on these `settings.gpus` devices, those of a stage together, with `wanted_pages` if they
    fit, else as many as fit.

    ConfigError for settings that cannot work on any device, such as heads that do not split.
    """
    if len(devices) != settings.gpus:
        what = f"tp={settings.tp}" + (f" pp={settings.pp}" if settings.pp > 1 else "")
        raise ConfigError(f"a replica of {what} cannot be planned on {len(devices)} device(s)")
    model = model.expanded() if settings.mla == "expanded" else model
    parts = [part for part in shards(model, settings) for _ in range(settings.tp)]
    extra = [estimate(model, settings, device.total, device.free < device.total) for device in devices]
    signals = SIGNAL_BUFFER_BYTES if settings.tp > 1 else 0
    limits = [int(device.free * settings.utilization) for device in devices]
    static = [part.weights + over.total + signals for part, over in zip(parts, extra, strict=True)]
    rooms = [limit - taken for limit, taken in zip(limits, static, strict=True)]
    holding = [(room, part.page) for room, part in zip(rooms, parts, strict=True) if part.page]
    if not holding:
        raise ConfigError(f"{model.name}: a page takes no bytes; the parameters describe no cache")
    groups = settings.attention_dp
    state_pages = max((-(-part.state // part.page) for part in parts if part.page), default=0)
    length = settings.max_length or model.max_length
    caps = {MEMORY: groups * min(min(room // page for room, page in holding) - NULL_PAGES, 1 << 60)}
    if settings.largest_allocation is not None:
        caps[ALLOCATION] = groups * (settings.largest_allocation // max(page for _, page in holding) - NULL_PAGES)
    if settings.max_batch_size is not None and length is not None:
        a_request = -(-length // settings.page_size) + state_pages
        caps[BATCH] = groups * -(-settings.max_batch_size // groups) * a_request
    if wanted_pages is not None:
        caps[WANTED] = wanted_pages
    bound = min(caps, key=lambda name: caps[name])  # of equal ones the first, so memory
    pages = max(0, caps[bound])
    short = min(range(len(devices)), key=lambda i: rooms[i] // max(1, parts[i].page))
    problems = _problems(settings, parts[short], static[short], rooms[short], caps, pages, state_pages)
    if wanted_pages is not None and bound != WANTED and not problems and pages < wanted_pages:
        problems = [f"{wanted_pages} pages were asked for, {pages} fit (bound by {bound})"]
    uses = tuple(
        DeviceUse(
            device.name,
            device.index,
            device.free,
            limit,
            part.weights,
            over.total,
            signals,
            (pages // groups + NULL_PAGES) * part.page if pages else 0,
        )
        for device, limit, part, over in zip(devices, limits, parts, extra, strict=True)
    )
    one = max(0, pages // groups - state_pages) * settings.page_size
    made = MemoryPlan(
        devices=uses,
        pages=pages,
        page_size=settings.page_size,
        page_bytes=sum(part.page for part in parts) // groups,
        bound=bound,
        max_sequence_length=min(one, length) if length else one,
        max_batch_size=settings.max_batch_size or min(DEFAULT_BATCH_SIZE, pages // (1 + state_pages)),
        problems=tuple(problems),
        notes=(),
        cache_dtype=model.cache_dtype(settings.kv_dtype, settings.weights_dtype),
        overhead=extra[short].reason,
        groups=groups,
        state_pages=state_pages,
    )
    return _noted(made, model, settings, extra[short])


def _problems(
    settings: PlanSettings, part: Shard, static: int, room: int, caps: dict[str, int], pages: int, state_pages: int
) -> list[str]:
    """Why the plan does not fit; empty when it does."""
    page = show_bytes(part.page)
    where = " of each GPU" if settings.gpus > 1 else ""
    if room < 0:
        return [f"without any cache {show_bytes(static)}{where} are needed, {show_bytes(static + room)} may be used"]
    if caps[MEMORY] < 1:
        return [f"{show_bytes(room)}{where} are left for the cache; one page and the null page take {page} each"]
    if pages < 1:
        return [f"one page and the null page take {page} each, beyond the largest allocation"]
    problems = []
    held = max(0, pages // settings.attention_dp - state_pages) * settings.page_size
    if settings.max_length is not None and settings.max_length > held:
        problems.append(f"the cache holds {held} tokens, max_length is {settings.max_length}")
    most = pages // (1 + state_pages)
    if settings.max_batch_size is not None and settings.max_batch_size > most:
        each = "a page each" if not state_pages else f"{1 + state_pages} pages each, their state included"
        problems.append(f"{settings.max_batch_size} requests need {each}, there are {pages} pages")
    if not problems and held < 1:
        problems.append(f"a sequence's recurrent state takes {state_pages} pages, there are {pages}")
    return problems


def _noted(plan: MemoryPlan, model: Model, settings: PlanSettings, over: Overhead) -> MemoryPlan:
    """With remarks on what was asked for and what was found."""
    notes, longest = list(model.notes), plan.max_sequence_length
    if settings.max_length is None and model.max_length is not None and 0 < longest < model.max_length:
        notes.append(f"one request can have {longest} tokens at most; the model could take {model.max_length}")
    if settings.max_length is not None and model.max_length is not None and settings.max_length > model.max_length:
        notes.append(f"max_length {settings.max_length} is beyond the {model.max_length} that the model was made for")
    if settings.max_length is not None and settings.max_batch_size is not None and plan.fits:
        at_once = plan.requests_of(settings.max_length)
        if at_once < settings.max_batch_size:
            do = "does" if at_once == 1 else "do"
            notes.append(
                f"{settings.max_batch_size} requests of {settings.max_length:,} tokens do not fit at once: "
                f"{at_once} {do}; the others are shorter, or wait"
            )
    if settings.attention_tp > 1:
        copied = [c for c in model.all_cached if not c.latent and c.heads < settings.attention_tp]
        if model.latent and settings.mla == "latent":
            notes.append(
                f"each of the {settings.attention_tp} shards has a copy of the latent: TP does not make room for more "
                "tokens"
            )
        elif copied:
            each = settings.attention_tp // copied[0].heads
            notes.append(f"each of the {copied[0].heads} KV heads is on {each} GPUs: tp is beyond the KV heads")
    if settings.pp > 1 or settings.attention_dp > 1:
        notes.append("rayk's own model runner splits by tp alone; this layout is for an engine that has it")
    elif settings.tp > 1:
        notes += _of_own_runner(model, settings)
    if settings.attention_dp > 1:
        notes.append(
            f"{settings.attention_dp} groups of {settings.attention_tp} GPU(s) have all attention weights and pages of "
            f"their own; experts are spread over {settings.tp} GPUs"
        )
    if model.draft is not None:
        notes.append(
            f"a token takes {model.draft.token_bytes(plan.cache_dtype):,} bytes in {model.draft.name}'s cache too"
        )
    return replace(plan, notes=tuple(notes))


def _of_own_runner(model: Model, settings: PlanSettings) -> Iterator[str]:
    """Where rayk's own runner, which splits as transformers does, has more on a GPU than this plan says."""
    if model.split is None:
        yield "rayk's own model runner does not split this model: transformers has no plan for that"
        return
    total, own = model.loaded_bytes(settings.weights_dtype), model.rank_bytes(settings.weights_dtype, settings.tp)
    if own > WHOLE * total / settings.tp:
        yield f"rayk's own model runner has {show_bytes(own)} of weights on each GPU: transformers leaves some whole"
    if not model.split.heads and not model.latent:
        yield f"rayk's own model runner keeps all KV heads on each of the {settings.tp} GPUs, as transformers does"


WHOLE = 1.05
