"""How a Cluster starts: in this process, on Ray, or under a name, where others may have started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from msgspec import structs

from rayk.dispatch.dispatcher import Dispatcher
from rayk.dispatch.prompts import Prompts
from rayk.engine.local_replicas import InlineReplicas
from rayk.engine.replicas import ModelSource, Replicas, ServeSettings
from rayk.errors import ConfigError
from rayk.protocol.admission import AdmissionPolicy
from rayk.scheduler.router.router import RouterSettings
from rayk.scheduler.transfers.indexed_copies import CopyPlanner
from rayk.scheduler.transfers.links import LinkTable
from rayk.scheduler.transfers.transfer import PageTransfers
from rayk.session import InferenceSession

if TYPE_CHECKING:
    from rayk.actors.interface import Actor
    from rayk.actors.serving_roster import ServingRoster
    from rayk.dispatch.named import NamedDispatcher

QUEUED_BATCHES = 2  # full batches that a replica is given at a time; what waits here can still go elsewhere


@dataclass(frozen=True)
class Started:
    """Replicas that run, who places requests on them, and what makes requests of prompts."""

    replicas: Replicas
    dispatcher: Dispatcher | NamedDispatcher
    prompts: Prompts


@dataclass(frozen=True)
class Startup:
    """What shall run, and where. In a session with a name it may run already, with the same settings."""

    session: InferenceSession
    source: ModelSource
    settings: ServeSettings
    router: str
    admission: AdmissionPolicy | None
    max_retries: int
    tokenizer: Any = None

    def run(self) -> Started:
        """Start it, or attach to it."""
        settings = self.settings
        if settings.device == "auto":
            settings = changed(settings, device=_device(self.session, settings.replicas * settings.tp))
        if self.session.name is not None:
            return self._open_named(settings)
        replicas: Replicas
        title = ""
        if self.session.runtime == "inline":
            replicas = InlineReplicas(self.source, settings)
        else:
            from rayk.actors.engine import RayReplicas

            replicas = on_ray = RayReplicas(self.session.ray, self.source, settings).start()
            title = on_ray.title
        dispatcher = Dispatcher(replicas.post, self.routing(replicas), self.max_retries, replace=settings.replaced)
        if settings.peer_copies:
            transfers = PageTransfers(LinkTable(monotonic), settings.page_size)
            dispatcher.router.fetching = CopyPlanner(dispatcher.router.index, transfers, settings.tiers.wanted)
        for facts in replicas.facts:
            dispatcher.meet(facts.replica, facts.epoch, facts.endpoint)
        if title:
            from rayk.actors.report import start_reporting

            own = {"cluster": title}
            dispatcher.reporter = start_reporting(self.session.ray, lambda labels: dispatcher.readings(labels | own))
        return Started(replicas, dispatcher, _prompts(replicas, self.source, self.tokenizer or replicas.tokenizer))

    def routing(self, replicas: Replicas) -> RouterSettings:
        """How requests are placed on these replicas."""
        settings = replicas.settings
        limit: int | None = QUEUED_BATCHES * settings.max_batch_size
        admission = self.admission
        if admission is not None:  # which holds the limit, as one of its marks
            running = min(filter(None, (limit, admission.max_running)))
            admission, limit = structs.replace(admission, max_running=running), None
        return RouterSettings(
            self.router,
            tuple(facts.pages for facts in replicas.facts),
            settings.page_size,
            settings.hash_algorithm,
            settings.hash_seed or b"",
            settings.reports,
            admission=admission,
            limit=limit,
            plans_copies=settings.peer_copies,
            reports_backlog=False,
        )

    def _open_named(self, settings: ServeSettings) -> Started:
        """Start what others can attach to, or attach."""
        from rayk.actors.named_engines import NamedReplicas
        from rayk.actors.serving_startup import await_serving, check_same, cluster_name, find_serving, start_serving

        ray, name = self.session.ray, str(self.session.name)
        replicas = NamedReplicas(ray, cluster_name(name), self.source, changed(settings, shared=True))
        replicas.max_retries, replicas.tokenizer = self.max_retries, self.tokenizer
        scheduler = find_serving(ray, name)
        if scheduler is None and (scheduler := start_serving(ray, name, replicas, self.routing)) is not None:
            return _attach(self.session, scheduler, owner=True)
        return _attach(
            self.session,
            scheduler or await_serving(ray, name),
            lambda roster: check_same(roster, replicas, self.routing(replicas)),
        )


def attach(session: InferenceSession) -> Started:
    """What runs in that named session. ConfigError where nothing does."""
    from rayk.actors.serving_startup import find_serving

    scheduler = find_serving(session.ray, str(session.name)) if session.name is not None else None
    if scheduler is None:
        raise ConfigError(
            f"no Cluster runs under the name {session.name!r}; start one by Cluster(.., "
            "session=InferenceSession('ray', name=..)), or look at the address"
        )
    return _attach(session, scheduler)


def _attach(
    session: InferenceSession,
    scheduler: Actor,
    check: Callable[[ServingRoster], None] = lambda roster: None,
    owner: bool = False,
) -> Started:
    from rayk.actors.named_engines import NamedReplicas
    from rayk.actors.serving_link import SchedulerLink
    from rayk.dispatch.named import NamedDispatcher

    link = SchedulerLink(session.ray, scheduler)
    check(link.roster())
    roster = link.connect(owner)
    try:
        replicas = NamedReplicas.of(session.ray, roster)
        replicas.scheduler = scheduler
        dispatcher = NamedDispatcher(link, replicas, roster, owner)
        return Started(replicas, dispatcher, _prompts(replicas, replicas.source, replicas.tokenizer))
    except BaseException:
        link.leave()
        raise


def _prompts(replicas: Replicas, source: ModelSource, tokenizer: Any) -> Prompts:
    has_tokenizer = any(facts.has_tokenizer for facts in replicas.facts)
    return Prompts(source, tokenizer, has_tokenizer, replicas.settings.tenant_key)


def model_source(
    model: str | Path | Callable[[str], Any], dtype: str = "auto", attention: str | None = None
) -> ModelSource:
    """Where the model comes from; CheckpointError when the folder has none."""
    if callable(model):
        return ModelSource(make=model, dtype=dtype, attention=attention)
    from rayk.models.checkpoint import check_folder

    folder = Path(model).expanduser().resolve()
    check_folder(folder)  # here, before anything is started
    return ModelSource(folder=folder, dtype=dtype, attention=attention)


def _device(session: InferenceSession, ranks: int) -> str:
    """Where replicas run if nobody says: on GPUs if each rank has one (in this process they may share)."""
    if session.runtime == "inline":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = sum(int(node.resources.get("GPU", 0)) for node in session.ray.nodes())
    return "cuda" if gpus >= ranks else "cpu"
