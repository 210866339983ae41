"""Engines of one model on several replicas: what they are made of, and what a Cluster needs of them.

`Replicas` are in this process (rayk.engine.local_replicas) or in actors (rayk.actors.engine).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rayk.engine.engine import Engine
from rayk.engine.graphs import with_graphs
from rayk.engine.page_sharing import PageSharing
from rayk.engine.ranked_pages import RankedCopier, RankedLine
from rayk.engine.ranks import Asked, RankedModel, Ranks
from rayk.engine.settings import EngineSettings, EngineStats
from rayk.engine.tiers import NodeTiers, TierConfig
from rayk.errors import ConfigError, RaykError
from rayk.kvcache.buffers import PageBuffers
from rayk.kvcache.page_hash import PageHasher
from rayk.kvcache.replica import ReplicaCore
from rayk.params import OBJECT_STORE, KVCacheParams, require, require_at_least
from rayk.planning.node_plan import Component, NodeMemory, plan_replica
from rayk.protocol.engine import Command, Report
from rayk.protocol.kv_events import KVEventsConfig
from rayk.protocol.lines import PathState
from rayk.replica.kv_event_publisher import publish_events
from rayk.tiers.opening import open_connector
from rayk.transport.choice import Endpoint, Peer
from rayk.transport.line import Line
from rayk.transport.port import PagePort, open_lines

if TYPE_CHECKING:
    from rayk.models.tensor_parallel import Rank

log = logging.getLogger("rayk.engine")

PAGE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a replica's model comes from: a checkpoint folder, or a function that makes one.

    model_id: distinguishes it from models of the same shapes; None: a digest of the checkpoint's files.
    """

    folder: Path | None = None
    make: Callable[[str], Any] | None = None
    dtype: str = "auto"
    attention: str | None = None
    model_id: str | None = None

    def load(self, device: str, rank: Rank | None = None) -> Any:
        """The model on that device, or its part of a rank that has joined the others."""
        if self.make is not None:
            return self.make(device)
        assert self.folder is not None
        from rayk.models import load_model

        return load_model(self.folder, dtype=self.dtype, device=device, attention=self.attention, rank=rank)

    def check_split(self, ranks: int) -> None:
        """ConfigError or ArchitectureError for a model that cannot be split over so many ranks."""
        if self.folder is None:
            raise ConfigError(f"tp={ranks} splits the matrices of a checkpoint; {self} is made by a function, use tp=1")
        from rayk.models.load import check_folder_split

        check_folder_split(self.folder, ranks)

    def planned_bytes(self, ranks: int = 1) -> int | None:
        """What `rayk plan` says that the weights take on each of so many ranks; None for a model that comes from no
        folder or is not planned."""
        if self.folder is None:
            return None
        from rayk.planning.reading import read_model

        try:
            return read_model(self.folder).rank_bytes(None if self.dtype == "auto" else self.dtype, ranks)
        except RaykError:
            return None

    def identity(self) -> str:
        """For pages that outlive this cluster. Reads all weights of a model without an id."""
        if self.model_id is not None:
            return self.model_id
        if self.folder is None:
            raise ConfigError(f"a disk tier has to tell {self} from other models; pass model_id=, its name and version")
        from rayk.models.checkpoint import identity

        return identity(self.folder)

    def __str__(self) -> str:
        return str(self.folder) if self.folder is not None else getattr(self.make, "__name__", "a model")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How replicas of one model are served. `pages` is per replica; None takes what fits and what can be used.

    longest: tokens of the longest request that will come, for that; the model's limit when None.
    """

    replicas: int = 1
    tp: int = 1  # ranks of a replica, over which its model is split
    page_size: int = 128
    pages: int | None = None
    max_batch_size: int = 64
    device: str = "auto"
    prefix_caching: bool = True
    utilization: float | None = None
    longest: int | None = None
    hash_seed: bytes | None = field(default=None, repr=False)  # of pages' hashes; None where they are not needed
    reset_token: bytes | None = None  # of the last reset of the prefix cache
    reports: bool = False  # whether engines report what they cache and drop
    tiers: TierConfig = field(default_factory=TierConfig)
    peer_copies: bool = False  # of prefixes, between replicas
    graphs: bool = True  # decode steps as CUDA graphs
    kv_dtype: str | None = None  # of the pages; None: the model's own
    kv_events: KVEventsConfig | None = None  # where replicas publish what they cache
    shared: bool = False  # by several drivers
    isolate_tenants: bool = False  # each has a root of its own
    replaced: bool = False  # lost replicas are: one that hangs is soon counted as lost
    vllm_metrics: bool = False  # metrics under vLLM's names, too
    threads: int | None = None  # of torch; None: one in a process of a replica's own, the caller's number inline
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        require_at_least(
            1,
            replicas=self.replicas,
            tp=self.tp,
            page_size=self.page_size,
            max_batch_size=self.max_batch_size,
            **({} if self.threads is None else {"threads": self.threads}),
            **({} if self.pages is None else {"pages": self.pages}),
        )
        require(
            self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:"),
            f"device {self.device!r} is not 'auto', 'cpu' or 'cuda'",
        )
        require(
            self.kv_dtype is None or self.kv_dtype in PAGE_DTYPES,
            f"kv_dtype {self.kv_dtype!r} is not one of {', '.join(PAGE_DTYPES)}, or None for the model's own",
        )
        require(self.prefix_caching or not self.tiers.wanted, "host and disk tiers need prefix_caching=True")

    @property
    def names_pages(self) -> bool:
        """Whether pages have to have the same names at all replicas, or roots the same salts at all drivers."""
        named = self.reports or self.peer_copies or self.tiers.wanted or self.kv_events is not None
        return named or self.isolate_tenants

    @property
    def tenant_key(self) -> bytes | None:
        """What the roots of tenants are made with; None where they share theirs."""
        return self.hash_seed if self.isolate_tenants else None

    @property
    def hash_algorithm(self) -> str:
        """Of pages. Where a tier is asked for a page by its hash alone, one that cannot be forged."""
        return "sha256" if self.tiers.wanted else "xxh3_128"

    @property
    def hasher(self) -> PageHasher | None:
        """What names the pages that engines report."""
        if not self.reports:
            return None
        assert self.hash_seed is not None
        return PageHasher(self.hash_algorithm, self.hash_seed, self.page_size)


class Replicas(Protocol):
    """Engines that take commands and report, `settings.replicas` of them at first. `facts[r]` tells what replica r is
    or was; `tokenizer` where it is at hand; `settings` are those that were given, with the hashes' seed.

    post, reports and stats may be called from any thread; the others by one at a time.
    """

    settings: ServeSettings
    facts: list[ReplicaFacts]
    tokenizer: Any

    def add(self, replicas: Sequence[int], timeout: float) -> None:
        """Start more, with these numbers: of replicas that were dropped, then the next ones. There is a place for them
        within `timeout` seconds, or PlanError, and nothing is left behind."""
        ...

    def post(self, replica: int, command: Command) -> None:
        """Give a replica a command. A lost one ignores it; its reports end."""
        ...

    def reports(self, replica: int) -> Iterator[Report]:
        """What it does, until it is removed; raises when there will be no more for another reason."""
        ...

    def path(self, replica: int) -> PathState:
        """What carries commands and reports."""
        ...

    def stats(self, replica: int) -> EngineStats:
        """Its counters. ReplicaLostError when it is gone."""
        ...

    def check(self, replica: int) -> None:
        """IntegrityError unless its pages are where they should be; waits for its transfers. ReplicaLostError."""
        ...

    def reset_prefix_cache(self, replicas: Sequence[int], token: bytes) -> dict[int, int]:
        """ReplicaCore.reset_prefix_cache() of these, and of those that are added later; pages that each still holds,
        without those that are gone. CallTimeoutError when one does not answer."""
        ...

    def remove(self, replica: int) -> None:
        """End a replica that has nothing to do any more, or that was dropped; its tiers are left in order."""
        ...

    def leaving(self) -> list[int]:
        """Those whose nodes are about to go, as far as it is known."""
        ...

    def give_up(self) -> None:
        """Have an add() that is under way fail soon. close() follows."""
        ...

    def drop(self, replica: int) -> None:
        """It counts as lost: nothing of it may go on."""
        ...

    def close(self) -> None:
        """End all of them."""
        ...


@dataclass(frozen=True)
class ReplicaFacts:
    """One replica as it was started."""

    replica: int
    node: str
    device: str
    backend: str
    pages: int
    page_bytes: int
    max_length: int
    vocab_size: int
    has_tokenizer: bool
    epoch: int = 0  # of its start, for its peers
    endpoint: Endpoint | None = None  # what lines to it there are; None: it copies nothing
    memory: tuple[Component, ...] = ()  # as planned and as taken
    pid: int = 0  # its process, on its node


def open_engine(
    model: Any,
    source: ModelSource,
    settings: ServeSettings,
    replica: int,
    device: str,
    sharing: int,
    node: NodeMemory,
    tiers: NodeTiers | None,
    lines: Callable[[PageBuffers], list[Line]] | None = None,
    address: str = "127.0.0.1",
    ranks: Ranks | None = None,
) -> Engine:
    """One replica's engine over new pages, as one of `sharing` replicas that are being started on that node.

    The model is loaded already. `lines` opens those that carry pages to and from peers (None: whatever there is between
    processes), `address` is where these reach this replica. `ranks` have the other parts of the model: they make as
    many pages. On CUDA its decode steps are captured. PlanError when not even one page fits.
    """
    split = settings.tp
    identity = "" if tiers is None or tiers.disk_dir is None else source.identity()
    more = {} if tiers is None else tiers.params(identity if split == 1 else f"{identity}/tp={split}")
    params = page_params(model, settings, device, **more)
    if not device.startswith("cuda"):
        sharing *= split
    pages = plan_pages(model, params, settings, sharing, node)
    opened_by_ranks: Asked | None = None
    if ranks is not None:
        pages = min(pages, *ranks.ask("plan", sharing, node).wait())
        opened_by_ranks = ranks.ask("open", pages, address)
    shared = settings.peer_copies and lines is None
    core = ReplicaCore(params, replica, pages, settings.max_batch_size, [device], shared_memory=shared)
    if settings.reset_token is not None:
        core.reset_prefix_cache(settings.reset_token)  # before there are tiers, which have pages of the others
    page_bytes = params.bytes_per_page * split
    try:
        served = with_graphs(model, core) if settings.graphs else model
        kinds = opened_by_ranks.wait() if opened_by_ranks is not None else []
        if tiers is not None:
            copier = RankedCopier(core, ranks, str(tiers.pool)) if ranks is not None else None
            host_pages = tiers.host_pages(page_bytes)
            core.connect(open_connector(params, core.buffers.all_bytes, host_pages, tiers.pool, copier))
        publish_events(core, settings.kv_events)
        peers = None
        if settings.peer_copies:
            me = Peer(replica, time.time_ns() // 1000)
            opened = lines(core.buffers) if lines is not None else open_lines(core.buffers, address)
            if ranks is not None:  # what goes beside messages would be rank 0's part alone
                everywhere = [each for each in opened if all(each.kind in has for has in kinds)]
                opened = [RankedLine(each, ranks) for each in everywhere if each.kind != OBJECT_STORE]
            peers = PageSharing(core, PagePort(me, core.exports, page_bytes, address, opened))
        return Engine(
            core,
            RankedModel(served, core, ranks) if ranks is not None else served,
            replace(settings.engine, report_pages=settings.reports),
            peers=peers,
        )
    except BaseException:
        core.shutdown()
        raise


def page_params(model: Any, settings: ServeSettings, device: str, **more: Any) -> KVCacheParams:
    """Of a replica's pages on that device, or of a rank's part of them."""
    params = model.cache_params(
        page_size=settings.page_size,
        devices=[device],
        data_parallel_degree=1,
        enable_prefix_caching=settings.prefix_caching,
        kv_hash_algo=settings.hash_algorithm,
        kv_hash_seed=settings.hash_seed,
        **({} if settings.kv_dtype is None else {"dtype": settings.kv_dtype}),
        **more,
    )
    assert isinstance(params, KVCacheParams)
    return params


def plan_pages(model: Any, params: KVCacheParams, settings: ServeSettings, sharing: int, node: NodeMemory) -> int:
    """The number of pages that was asked for, else what fits, up to a full batch of the longest requests."""
    plan = plan_replica(node, params, settings.pages, sharing, settings.utilization)
    if settings.pages is not None:
        return plan.pages
    longest = min(model.max_length, settings.longest or model.max_length)
    useful = settings.max_batch_size * -(-(longest + 1) // settings.page_size)
    return plan_replica(node, params, min(plan.pages, useful), sharing, settings.utilization).pages


def check_engine(engine: Engine) -> None:
    """IntegrityError unless its pages are where they should be, in the tiers too; waits for what is on its way."""
    core = engine.core
    core.drain()
    core.check_integrity()
    if core.connector is not None:
        core.connector.check_integrity()


def facts_of(engine: Engine, device: str, node: str, source: ModelSource | None = None, ranks: int = 1) -> ReplicaFacts:
    """What an engine's replica is, and what its rank 0 took of what was planned; a part that is off is warned of by
    name."""
    core = engine.core
    allocated = sum(tensor.nbytes for tensor in core.buffers.all_buffers)
    memory = [Component("pages", (core.num_pages + 1) * core.params.bytes_per_page, allocated)]
    loaded, planned = getattr(engine.model, "num_bytes", None), None if source is None else source.planned_bytes(ranks)
    if loaded is not None and planned is not None:
        memory.insert(0, Component("weights", planned, loaded))
    for part in memory:
        if part.is_off:
            log.warning("replica %d on %s is not as planned: %s", core.replica, node, part)
    return ReplicaFacts(
        core.replica,
        node,
        device,
        str(getattr(engine.model, "backend", "")),
        core.num_pages,
        core.params.bytes_per_page * ranks,
        engine.model.max_length,
        engine.model.vocab_size,
        engine.limits.has_tokenizer,
        engine.peers.port.me.epoch if engine.peers is not None else 0,
        engine.peers.port.endpoint if engine.peers is not None else None,
        tuple(memory),
        os.getpid(),
    )
