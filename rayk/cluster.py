"""Cluster: a model served from several replicas. Prompts in; answers, or tokens as they come, out.

rayk.dispatch.prompts makes requests of prompts, rayk.dispatch.dispatcher places and follows them, and
rayk.engine.replicas is what replicas are. Here they meet: each replica has one thread that reads its reports, and
replicas come and go.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace as changed
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from msgspec import structs

from rayk.dispatch.calls import AsyncNews, Call, News
from rayk.dispatch.chat import Message, chat_tokens
from rayk.dispatch.dispatcher import Dispatcher
from rayk.dispatch.keeper import Keeper
from rayk.dispatch.output import Handle, Output, Update
from rayk.dispatch.prompts import Prompt, Prompts, Sampling
from rayk.engine.local_replicas import InlineReplicas
from rayk.engine.replicas import ModelSource, ReplicaFacts, Replicas, ServeSettings
from rayk.engine.settings import EngineSettings, EngineStats
from rayk.engine.tiers import Size, TierConfig
from rayk.errors import ClosedError, ConfigError, NotOwnerError, ReplicaLostError
from rayk.kvcache.page_hash import Mask
from rayk.kvcache.tick import PrefixCacheReset
from rayk.params import require_at_least
from rayk.protocol.admission import AdmissionPolicy, AdmissionState
from rayk.protocol.kv_events import KVEventsConfig
from rayk.replica.kv_event_publisher import checked
from rayk.request_errors import RequestCancelledError
from rayk.sampling import SamplingParams
from rayk.scheduler.membership import State
from rayk.scheduler.scaling import Removed
from rayk.scheduler.supervisor import Replacement
from rayk.session import InferenceSession

if TYPE_CHECKING:
    from rayk.actors.describe import Decision
    from rayk.actors.interface import Actor
    from rayk.actors.serving_roster import ServingRoster
    from rayk.dispatch.named import NamedDispatcher
    from rayk.scheduler.router.router import RouterSettings

log = logging.getLogger("rayk.engine")

AT_ONCE = 100_000  # handles of one call
AHEAD = 8_192  # requests of one call that are made and sent before others of it end
REPLACE_SECONDS = 5.0  # to wait for a place for a replacement at a time
QUEUED_BATCHES = 2  # full batches that a replica is given at a time; what waits here can still go elsewhere


class Cluster:
    """`model` is a checkpoint folder, or a function `device -> model` (see rayk.engine.forward.Model).

    `session` says where: InferenceSession("inline") (the default) or InferenceSession("ray"). `pages` is per replica;
    None takes what fits and can be used, by requests of at most `longest` tokens if that is given. `chunk_size` bounds
    the tokens of one forward. `host_memory`, and `disk_memory` in `disk_dir`, are what the replicas of a node may take
    together for pages beyond their devices' (docs/tiers.md): "16GiB", bytes, or 0.9 for that share of what is free.
    Pages on disk serve the next Cluster of the same model; `model_id` names it, instead of a look at all its weights.
    `peer_copies`: a prefix that another replica holds is copied where that takes less time than computing it.
    `device`: "cpu", "cuda", or "auto" for CUDA where there are enough GPUs. `graphs`: on
    CUDA, capture decode steps. A request whose replica is lost is sent again `max_retries` times. With an
    `admission` policy requests wait for room and for their turn (tenant, priority and deadline of the prompt count, see
    rayk.scheduler.admission.queue), or are turned away with an OverloadedError. `tokenizer`: for
    text prompts, where the folder has none. `threads`: of torch on a CPU, for each replica; one unless given. Inline,
    as many as this process uses unless given: a number is set for all of this process (torch.set_num_threads), and
    taken back by close(), for the thread that calls it and for new ones. `kv_events`: "tcp://127.0.0.1:5557", or a
    KVEventsConfig, has replica r publish at port 5557 + r what it caches and drops, for routers that listen to vLLM
    (docs/kv-events.md).
    `kv_dtype`: of the pages, such as "float8_e4m3fn" for half of bfloat16's room (docs/models.md); the model's own
    unless given.
    A replica that is lost, hangs or is unfit (rayk.kvcache.poison) is replaced by itself, empty; one that cannot be
    started, or dies at once, is tried again later and later, and given up in the end: replacements() says how that
    stands, and add_replicas() begins anew. `replace=False`: lost ones stay lost.
    In a session with a name the Cluster of that name is started, or attached to if it runs with the same settings:
    several drivers use it at once, and it outlives them; attach() takes whatever runs. docs/engine.md says more.
    Safe to use from several threads and event loops. close() (also the end of a `with` block) ends it.
    """

    def __init__(
        self,
        model: str | Path | Callable[[str], Any],
        session: InferenceSession | None = None,
        *,
        replicas: int = 1,
        page_size: int = 128,
        pages: int | None = None,
        max_batch_size: int = 64,
        chunk_size: int = 512,
        device: str = "auto",
        dtype: str = "auto",
        attention: str | None = None,
        prefix_caching: bool = True,
        router: str = "cost",
        max_retries: int = 2,
        admission: AdmissionPolicy | None = None,
        watermark: float = 0.01,
        memory_utilization: float | None = None,
        host_memory: Size | None = None,
        disk_dir: str | Path | None = None,
        disk_memory: Size | None = None,
        model_id: str | None = None,
        peer_copies: bool = True,
        longest: int | None = None,
        graphs: bool = True,
        threads: int | None = None,
        tokenizer: Any = None,
        kv_events: str | KVEventsConfig | None = None,
        replace: bool = True,
        kv_dtype: str | None = None,
    ) -> None:
        from rayk.scheduler.router.policies import wants_keys
        from rayk.scheduler.router.router import RouterSettings
        from rayk.scheduler.transfers.indexed_copies import CopyPlanner
        from rayk.scheduler.transfers.links import LinkTable
        from rayk.scheduler.transfers.transfer import PageTransfers

        keyed = wants_keys(router)  # ConfigError for one that there is not
        require_at_least(0, max_retries=max_retries)
        folder = None if disk_dir is None else Path(disk_dir).expanduser().resolve()
        tiers = TierConfig(host_memory=host_memory, disk_dir=folder, disk_memory=disk_memory)
        settings = ServeSettings(
            replicas=replicas,
            page_size=page_size,
            pages=pages,
            max_batch_size=max_batch_size,
            device=device,
            prefix_caching=prefix_caching,
            utilization=memory_utilization,
            longest=longest,
            graphs=graphs,
            reports=prefix_caching and (peer_copies or keyed),
            peer_copies=prefix_caching and peer_copies,
            tiers=tiers,
            kv_events=checked(kv_events, prefix_caching, replicas),
            kv_dtype=kv_dtype,
            threads=threads,
            replaced=replace,
            engine=EngineSettings(chunk_size=chunk_size, watermark=watermark),
        )
        source = changed(model_source(model, dtype, attention), model_id=model_id)
        if disk_dir is not None and source.folder is None:
            source.identity()  # it has none: here, before anything is started
        self._own_session = session is None
        self._named = session is not None and session.name is not None
        self._session = session or InferenceSession("inline")
        self._session.check_open()
        limit: int | None = QUEUED_BATCHES * max_batch_size
        if admission is not None:  # which holds the limit, as one of its marks
            running = min(filter(None, (limit, admission.max_running)))
            admission, limit = structs.replace(admission, max_running=running), None

        def routing(replicas: Replicas) -> RouterSettings:
            settings = replicas.settings
            return RouterSettings(
                router,
                tuple(facts.pages for facts in replicas.facts),
                page_size,
                settings.hash_algorithm,
                settings.hash_seed or b"",
                settings.reports,
                admission=admission,
                limit=limit,
                plans_copies=settings.peer_copies,
                reports_backlog=False,
            )

        try:
            if self._session.name is not None:
                self._open_named(source, settings, routing, max_retries, tokenizer)
                return
            started = self._start(source, settings)
        except BaseException:
            if self._own_session:
                self._session.close()
            raise
        dispatcher = Dispatcher(started.post, routing(started), max_retries, replace=replace)
        if settings.peer_copies:
            index = dispatcher.router.index
            dispatcher.router.fetching = CopyPlanner(
                index, PageTransfers(LinkTable(monotonic), page_size), tiers.wanted
            )
        for facts in started.facts:
            dispatcher.meet(facts.replica, facts.epoch, facts.endpoint)
        self._use(started, dispatcher, Prompts(source, tokenizer or started.tokenizer, started.facts[0].has_tokenizer))

    def _start(self, source: ModelSource, settings: ServeSettings) -> Replicas:
        if settings.device == "auto":
            settings = changed(settings, device=_device(self._session, settings.replicas))
        if self._session.runtime == "inline":
            return InlineReplicas(source, settings)
        from rayk.actors.engine import RayReplicas

        return RayReplicas(self._session.ray, source, settings).start()

    def _open_named(
        self,
        source: ModelSource,
        settings: ServeSettings,
        routing: Callable[[Replicas], RouterSettings],
        max_retries: int,
        tokenizer: Any,
    ) -> None:
        """Start what others can attach to, or attach."""
        from rayk.actors.named_engines import NamedReplicas
        from rayk.actors.serving_startup import await_serving, check_same, cluster_name, find_serving, start_serving

        ray, name = self._session.ray, str(self._session.name)
        if settings.device == "auto":
            settings = changed(settings, device=_device(self._session, settings.replicas))
        replicas = NamedReplicas(ray, cluster_name(name), source, changed(settings, shared=True))
        replicas.max_retries, replicas.tokenizer = max_retries, tokenizer
        scheduler = find_serving(ray, name)
        if scheduler is None and (scheduler := start_serving(ray, name, replicas, routing)) is not None:
            self._attach(scheduler, owner=True)
            return
        self._attach(
            scheduler or await_serving(ray, name), lambda roster: check_same(roster, replicas, routing(replicas))
        )

    def _attach(
        self, scheduler: Actor, check: Callable[[ServingRoster], None] = lambda roster: None, owner: bool = False
    ) -> None:
        from rayk.actors.named_engines import NamedReplicas
        from rayk.actors.serving_link import SchedulerLink
        from rayk.dispatch.named import NamedDispatcher

        link = SchedulerLink(self._session.ray, scheduler)
        check(link.roster())
        roster = link.connect(owner)
        try:
            replicas = NamedReplicas.of(self._session.ray, roster)
            replicas.scheduler = scheduler
            dispatcher = NamedDispatcher(link, replicas, roster, owner)
            has_tokenizer = any(facts.has_tokenizer for facts in replicas.facts)
            dispatcher.follow = self._follow
            self._use(replicas, dispatcher, Prompts(replicas.source, replicas.tokenizer, has_tokenizer))
        except BaseException:
            link.leave()
            raise
        dispatcher.start()

    def _use(self, replicas: Replicas, dispatcher: Dispatcher | NamedDispatcher, prompts: Prompts) -> None:
        """Be the Cluster of these replicas, which run."""
        self._replicas = replicas
        self._dispatcher = dispatcher
        self._prompts = prompts
        self._membership = threading.Lock()  # one joins or leaves at a time
        self._session.adopt(self, counts=False)
        self._readers: dict[int, threading.Thread] = {}
        leaving = replicas.leaving if replicas.settings.replaced else None
        self._keeper = Keeper(dispatcher, self._start_due, leaving)
        for replica in dispatcher.live:
            self._follow(replica)
        self._keeper.start()

    @classmethod
    def attached(cls, session: InferenceSession, own_session: bool = False) -> Cluster:
        """The Cluster that runs in that named session; see attach()."""
        from rayk.actors.serving_startup import find_serving

        scheduler = find_serving(session.ray, str(session.name)) if session.name is not None else None
        if scheduler is None:
            raise ConfigError(
                f"no Cluster runs under the name {session.name!r}; start one by Cluster(.., "
                "session=InferenceSession('ray', name=..)), or look at the address"
            )
        cluster = cls.__new__(cls)
        cluster._session, cluster._own_session, cluster._named = session, own_session, True
        cluster._attach(scheduler)
        return cluster

    # -- asking ------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Iterable[Prompt], sampling: Sampling = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> list[Output]:  # fmt: skip
        """The outputs of all prompts, in their order. One that fails has its `error`; the others go on.

        `sampling` is for all, or one for each; `changes` are fields of SamplingParams, such as max_new_tokens=16.
        `timeout`: seconds for each request, from now on. Any number of prompts: they are sent as others end, and other
        calls take turns with this one. Whatever interrupts it ends its requests.
        """
        with self._call(prompts, sampling, timeout, None, changes) as call:
            return call.outputs()

    async def agenerate(
        self, prompts: Prompt | Iterable[Prompt], sampling: Sampling = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> list[Output]:  # fmt: skip
        """generate() for asyncio. A cancelled call cancels its requests."""
        with self._call(prompts, sampling, timeout, None, changes) as call:
            return await call.outputs_async()

    def stream(
        self, prompts: Prompt | Iterable[Prompt], sampling: Sampling = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> Iterator[Update]:  # fmt: skip
        """Tokens (and text, with a tokenizer) of all prompts as they come, in batches; each ends with its output.

        Nothing is sent before the first is asked for. Leaving the loop early cancels what is not finished.
        """
        news = News()
        with self._call(prompts, sampling, timeout, news.tell, changes) as call:
            while not call.over:
                update = call.news(news.next())
                if update is not None:
                    yield update

    async def astream(
        self, prompts: Prompt | Iterable[Prompt], sampling: Sampling = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> AsyncIterator[Update]:  # fmt: skip
        """stream() for asyncio."""
        news = AsyncNews()
        with self._call(prompts, sampling, timeout, news.tell, changes) as call:
            while not call.over:
                update = call.news(await news.next())
                if update is not None:
                    yield update

    def _call(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling,
        timeout: float | None,
        on_news: Callable[[Handle], None] | None,
        changes: Mapping[str, Any],
    ) -> Call:
        self._check_open()
        handles = self._prompts.handles(prompts, sampling, changes, timeout, on_news)
        lined_up = QUEUED_BATCHES * self._replicas.settings.max_batch_size * len(self.live)
        ahead = max(AHEAD, 2 * lined_up)
        admission = self._dispatcher.admission
        if admission is not None:  # one call alone is not turned away
            ahead = max(1, min(2 * lined_up, admission.max_waiting))
        return Call(self._dispatcher, handles, ahead)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling: Sampling = None,
        *, tools: Sequence[Message] | None = None, timeout: float | None = None, chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None, **changes: Any,
    ) -> list[Output]:  # fmt: skip
        """generate() of one chat, or of several: messages ({"role": .., "content": ..}) go through the tokenizer's chat
        template, or that one. ConfigError where it cannot make a prompt of them."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        more = dict(template_variables or {}, tools=tools, chat_template=chat_template)
        prompts = [chat_tokens(self.tokenizer, chat, **more) for chat in chats]  # type: ignore[arg-type]  # as above
        return self.generate(list[Prompt](prompts), sampling, timeout=timeout, **changes)

    def submit(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, timeout: float | None = None, **changes: Any
    ) -> Handle:
        """Send one prompt; its handle."""
        prompts: list[Prompt] = [prompt]
        [handle] = self.submit_all(prompts, sampling, timeout=timeout, **changes)
        return handle

    def submit_all(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: Sampling = None,
        *,
        timeout: float | None = None,
        on_news: Callable[[Handle], None] | None = None,
        **changes: Any,
    ) -> list[Handle]:
        """Send prompts; a handle for each. `on_news` is called with a handle that has news, from another thread; it
        must not block, and when it raises it is not called again. At most AT_ONCE prompts, or ConfigError."""
        self._check_open()
        handles = list(self._prompts.handles(prompts, sampling, changes, timeout, on_news, AT_ONCE))
        for handle in handles:
            handle.canceller = self._dispatcher.cancel
        try:
            self._dispatcher.submit(handles)
        except BaseException:
            self._dispatcher.cancel(*handles)
            raise
        return handles

    # -- hearing ---------------------------------------------------------------------------------------

    def _follow(self, replica: int) -> None:
        """Read a replica's reports from now on, in a thread of its own."""
        name, era = f"rayk-reports-{replica}", self._dispatcher.era
        reader = threading.Thread(target=self._read, args=(replica, era), name=name, daemon=True)
        self._readers[replica] = reader
        reader.start()

    def _read(self, replica: int, era: int) -> None:
        """Follow one replica's reports to their end."""
        reason = "its engine was stopped"
        try:
            for report in self._replicas.reports(replica):
                self._dispatcher.on_report(replica, report)
        except BaseException as error:  # whatever it was, nobody reads what comes from there any more
            reason = str(error) or type(error).__name__
        if self._dispatcher.closed or self._readers.get(replica) is not threading.current_thread():
            return  # or another has its place, and a reader of its own
        if self._dispatcher.states[replica] is State.removed:
            return
        try:
            self._replicas.drop(replica)
        except Exception as error:
            log.warning("replica %d is lost and could not be ended", replica, exc_info=error)
        finally:
            self._dispatcher.lose(replica, reason, era)
            self._keeper.wake()

    # -- replicas that come and go -----------------------------------------------------------------------

    def replica_states(self) -> list[str]:
        """The state of each replica: ready, draining, lost or removed, or starting in place of a lost one."""
        return [str(state) for state in self._dispatcher.states[: len(self.facts)]]

    def add_replicas(self, n: int = 1, timeout: float = 60.0) -> list[int]:
        """Start `n` more replicas while requests run, and return their indices; requests go there from then on.

        Lost ones are replaced first, at their index, empty; others get the next indices. On Ray each one of these asks
        for a placement group of its own, for which an autoscaler may start a node within `timeout` seconds. PlanError
        says what is missing; then nothing is left behind.
        """
        require_at_least(1, n=n)
        with self._membership:
            self._check_open()
            added = self._dispatcher.enlist(n)
            self._start_replicas(added, timeout)
            return added

    def _start_replicas(self, replicas: Sequence[int], timeout: float) -> None:
        try:
            self._replicas.add(replicas, timeout)
        except BaseException as error:
            self._dispatcher.give_up(replicas, error)
            raise
        for at, replica in enumerate(replicas):
            facts = self.facts[replica]
            try:
                self._dispatcher.join(replica, facts.pages, facts.epoch, facts.endpoint)
            except BaseException:  # nobody else knows of them
                for unknown in replicas[at:]:
                    self._replicas.remove(unknown)
                raise
            self._follow(replica)

    def _start_due(self) -> None:
        """Start what is due in place of lost replicas, one after the other: one that fails keeps no other away."""
        with self._membership:
            for replica in self._dispatcher.take_due():
                try:
                    self._start_replicas([replica], REPLACE_SECONDS)
                    log.warning("replica %d was lost and is replaced", replica)
                except Exception as error:
                    if not self._dispatcher.closed:
                        log.warning("replica %d was lost and cannot be replaced: %s", replica, error)

    def replacements(self) -> list[Replacement]:
        """What is done about lost replicas: why each was lost or could not be started again, how often in a row that
        failed, whether it is given up, and seconds until the next attempt. Empty with replace=False."""
        return self._dispatcher.replacements()

    def drain_replica(self, replica: int, *, hand_over: bool = False) -> None:
        """Give a replica no new requests. Those that it has end there, or with `hand_over` go on elsewhere at once:
        nothing that was streamed changes, and it is no retry. ReplicaStateError for a lost one."""
        self._dispatcher.drain(replica)
        if hand_over:
            self._dispatcher.hand_over(replica)

    def resume_replica(self, replica: int) -> None:
        """Let a draining replica take requests again."""
        self._dispatcher.resume(replica)

    def remove_replica(self, replica: int, *, hand_over: bool = True, timeout: float | None = None) -> Removed:
        """Drain a replica, wait until its requests are elsewhere or have ended, end it and give its place back.

        Before it goes, the others are offered what it has cached, what was used last first: they take what fits into
        empty pages, for half a minute at most, and go on serving; the result says how much. Not with peer_copies=False,
        and not with tiers, which have its pages. Its index stays a hole. A lost one is just forgotten.

        DrainError after `timeout` seconds: it drains on, and resume_replica() takes that back. ReplicaStateError, and
        nothing changes, for the last one that takes requests.
        """
        with self._membership:
            self._check_open()
            if self._dispatcher.check_removable(replica) is not State.lost:
                self.drain_replica(replica, hand_over=hand_over)
            removed = self._dispatcher.remove(replica, timeout)
            self._check_open()
            self._replicas.remove(replica)
            return removed

    # -- the cluster -----------------------------------------------------------------------------------

    @property
    def facts(self) -> Sequence[ReplicaFacts]:
        """What each replica is, lost ones included."""
        return self._replicas.facts

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model. RequestError where there is none."""
        return self._prompts.tokenizer("chat")

    @property
    def longest(self) -> int:
        """Most tokens that prompt and answer of one request may have: the model's limit, and what a replica holds."""
        size = self._replicas.settings.page_size
        return min(min(each.max_length, each.pages * size + 1) for each in self.facts)

    @property
    def live(self) -> list[int]:
        """Replicas that answer, draining ones included."""
        return self._dispatcher.live

    def stats(self, replica: int = 0) -> EngineStats:
        """Counters of one replica's engine. ReplicaLostError for a lost one, CallTimeoutError for one that hangs."""
        self._check_open()
        self._dispatcher.check_live(replica)
        return self._replicas.stats(replica)

    def explain(self, request_id: str) -> Decision:
        """Why a request went where it went, with the costs of the best candidates. ConfigError when that is not
        remembered: the latest 4,096 decisions are."""
        from rayk.actors.describe import Decision

        self._check_open()
        return Decision.of(self._dispatcher.explain(request_id), request_id)

    def admission_state(self) -> AdmissionState | None:
        """What waits and what was turned away; None without an admission policy."""
        return self._dispatcher.admission_state()

    def reset_prefix_cache(self) -> PrefixCacheReset:
        """Forget what is cached, at all replicas and in their tiers, as after the weights were changed in place: call
        it when they are what they shall be. The answer says how many pages requests that run now, and copies of
        prefixes, still hold at each replica.

        Those requests go on with the KV that they have, which the weights of before made, and nobody else gets it: no
        request that has no pages yet reads what was computed before this call or by one of them, and their pages are
        empty when they end. Cancel them where that is not enough. Replicas that are added later take nothing of before,
        either. CallTimeoutError names a replica that does not answer; it has to be removed, or asked again.
        """
        with self._membership:
            self._check_open()
            token = Mask.new()
            self._dispatcher.note_reset(token)
            return PrefixCacheReset(self._replicas.reset_prefix_cache(self.live, token), hits=False)

    def check_integrity(self) -> None:
        """IntegrityError unless the pages of all replicas are where they should be, in their tiers too.

        Waits for what is on its way to a tier, and keeps each engine from its work meanwhile.
        """
        self._check_open()
        for replica in self.live:
            with suppress(ReplicaLostError):  # it has no pages
                self._replicas.check(replica)

    def _check_open(self) -> None:
        if self._dispatcher.closed:
            raise ClosedError("this Cluster")

    def close(self) -> None:
        """End the replicas; requests that are not finished are cancelled. Safe to call twice. A named Cluster that
        belongs to another driver goes on without this one."""
        try:
            self.shutdown()
        except NotOwnerError:
            self.leave()

    def shutdown(self, force: bool = False) -> None:
        """close(), for all drivers. A named Cluster belongs to the driver that started it, until that leaves or its
        lease ends: NotOwnerError for others, and nothing is done, unless `force`."""
        if self._dispatcher.closed:
            return
        if not force:
            self._dispatcher.check_owned()
        self._end(self._replicas.close)

    def leave(self) -> None:
        """Cancel what this driver has and go; a named Cluster goes on for others. Without a name it ends."""
        if not self._dispatcher.closed:
            self._end(self._replicas.close if not self._named else lambda: None)

    def _end(self, end_replicas: Callable[[], None]) -> None:
        for handle in self._dispatcher.close():
            handle.end(RequestCancelledError(handle.id, len(handle.tokens)))
        self._keeper.stop()
        self._replicas.give_up()
        with self._membership:
            self._dispatcher.go()
            end_replicas()
        for reader in self._readers.values():
            if reader is not threading.current_thread():
                reader.join(timeout=10)
        self._session.dismiss(self)
        if self._own_session:
            self._session.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def attach(name: str, address: str | None = None, **ray_options: Any) -> Cluster:
    """The Cluster that runs in sessions called `name`, whatever it serves, in a session of its own: several drivers may
    use it at once. `address` and Ray's options as for InferenceSession; an address is looked for, never started.
    ConfigError when no Cluster runs there."""
    session = InferenceSession("ray", address or "auto", name, **ray_options)
    try:
        return Cluster.attached(session, own_session=True)
    except BaseException:
        session.close()
        raise


def _device(session: InferenceSession, replicas: int) -> str:
    """Where replicas run if nobody says: on GPUs if each has one (in this process they may share)."""
    if session.runtime == "inline":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = sum(int(node.resources.get("GPU", 0)) for node in session.ray.nodes())
    return "cuda" if gpus >= replicas else "cpu"


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
