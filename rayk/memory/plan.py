"""The memory plan of one replica: what each of its devices holds, how many pages fit, and what bounds them.

Pure arithmetic. Each TP shard holds an equal share of the weights and of every page (MLA: a whole copy of the page),
the same reserve, and with TP its buffers for collectives; so the device with the least memory decides. The cache has
one page more than requests can use, the null page that pads block tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayk.bench.quantity import show_bytes
from rayk.errors import ConfigError
from rayk.memory.budget import SIGNAL_BUFFER_BYTES
from rayk.memory.estimator import DEFAULT_BATCH_SIZE
from rayk.memory.model import Model
from rayk.memory.settings import PlanSettings
from rayk.params import KVCacheParams
from rayk.planning import DeviceMemory

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

    `tokens` and `max_sequence_length` are in tokens, `page_bytes` and `token_bytes` over all TP shards.
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
        return self.pages // -(-length // self.page_size)


def plan_replica(
    model: Model, settings: PlanSettings, devices: Sequence[DeviceMemory], wanted_pages: int | None = None
) -> MemoryPlan:
    """The plan of one replica on these `settings.tp` devices, with `wanted_pages` if they fit, else as many as fit.

    ConfigError for settings that cannot work on any device, such as heads that do not split.
    """
    if len(devices) != settings.tp:
        raise ConfigError(f"a replica of tp={settings.tp} cannot be planned on {len(devices)} device(s)")
    params = model.kv_params(tp=settings.tp, page_size=settings.page_size, kv_dtype=settings.kv_dtype)
    weights = -(-model.loaded_bytes(settings.weights_dtype) // settings.tp)
    signals = SIGNAL_BUFFER_BYTES if settings.tp > 1 else 0
    static = weights + settings.activation_reserve + signals
    shard_page = params.bytes_per_page // settings.tp
    limits = [int(device.free * settings.utilization) for device in devices]
    length = settings.max_length or model.max_length
    room = min(limits) - static
    caps = {MEMORY: room // shard_page - NULL_PAGES}
    if settings.largest_allocation is not None:
        caps[ALLOCATION] = settings.largest_allocation // shard_page - NULL_PAGES
    if settings.max_batch_size is not None and length is not None:
        caps[BATCH] = settings.max_batch_size * -(-length // settings.page_size)
    if wanted_pages is not None:
        caps[WANTED] = wanted_pages
    bound = min(caps, key=lambda name: caps[name])  # of equal ones the first, so memory
    pages = max(0, caps[bound])
    problems = _problems(settings, params, static, room, caps, pages)
    if wanted_pages is not None and bound != WANTED and not problems and pages < wanted_pages:
        problems = [f"{wanted_pages} pages were asked for, {pages} fit (bound by {bound})"]
    kv = (pages + NULL_PAGES) * shard_page if pages else 0
    uses = tuple(
        DeviceUse(d.name, d.index, d.free, limit, weights, settings.activation_reserve, signals, kv)
        for d, limit in zip(devices, limits, strict=True)
    )
    tokens = pages * settings.page_size
    return MemoryPlan(
        devices=uses,
        pages=pages,
        page_size=settings.page_size,
        page_bytes=params.bytes_per_page,
        bound=bound,
        max_sequence_length=min(tokens, length) if length else tokens,
        max_batch_size=settings.max_batch_size or min(DEFAULT_BATCH_SIZE, pages),
        problems=tuple(problems),
        notes=_notes(model, settings, tokens, pages),
    )


def _problems(
    settings: PlanSettings, params: KVCacheParams, static: int, room: int, caps: dict[str, int], pages: int
) -> list[str]:
    """Why the plan does not fit; empty when it does."""
    page = show_bytes(params.bytes_per_page // settings.tp)
    where = " of each GPU" if settings.tp > 1 else ""
    if room < 0:
        return [f"without any cache {show_bytes(static)}{where} are needed, {show_bytes(static + room)} may be used"]
    if caps[MEMORY] < 1:
        return [f"{show_bytes(room)}{where} are left for the cache; one page and the null page take {page} each"]
    if pages < 1:
        return [f"one page and the null page take {page} each, beyond the largest allocation"]
    problems = []
    if settings.max_length is not None and settings.max_length > pages * settings.page_size:
        problems.append(f"the cache holds {pages * settings.page_size} tokens, max_length is {settings.max_length}")
    if settings.max_batch_size is not None and settings.max_batch_size > pages:
        problems.append(f"{settings.max_batch_size} requests need a page each, there are {pages} pages")
    return problems


def _notes(model: Model, settings: PlanSettings, tokens: int, pages: int) -> tuple[str, ...]:
    notes = list(model.notes)
    if settings.max_length is None and model.max_length is not None and 0 < tokens < model.max_length:
        notes.append(f"one request can have {tokens} tokens at most; the model could take {model.max_length}")
    if settings.max_length is not None and model.max_length is not None and settings.max_length > model.max_length:
        notes.append(f"max_length {settings.max_length} is beyond the {model.max_length} that the model was made for")
    if model.latent and settings.tp > 1:
        notes.append(
            f"each of the {settings.tp} shards has a copy of the latent: TP does not make room for more tokens"
        )
    return tuple(notes)
