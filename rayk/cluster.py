"""Cluster: a model served from several replicas. Prompts in; answers, or tokens as they come, out.

rayk.dispatch.startup starts it, rayk.dispatch.prompts makes requests of prompts, rayk.dispatch.dispatcher places and
follows them, and by rayk.dispatch.lifecycle replicas come and go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayk.dispatch import startup
from rayk.dispatch.calls import AsyncNews, Call, News
from rayk.dispatch.chat import Message, chat_tokens
from rayk.dispatch.lifecycle import Lifecycle
from rayk.dispatch.output import Handle, Output, Update
from rayk.dispatch.prompts import Prompt, Sampling
from rayk.dispatch.startup import QUEUED_BATCHES, Started, Startup, model_source
from rayk.dispatch.tracing import Tracing
from rayk.engine.local_replicas import InlineReplicas
from rayk.engine.readings import read_engine
from rayk.engine.replicas import ReplicaFacts, ServeSettings
from rayk.engine.settings import EngineSettings, EngineStats
from rayk.engine.tiers import Size, TierConfig
from rayk.errors import NotOwnerError, RaykError
from rayk.kvcache.tick import PrefixCacheReset
from rayk.metrics.reading import Reading
from rayk.params import require_at_least
from rayk.protocol.admission import AdmissionPolicy, AdmissionState
from rayk.protocol.kv_events import KVEventsConfig
from rayk.protocol.lines import PathState
from rayk.replica.kv_event_publisher import checked
from rayk.sampling import SamplingParams
from rayk.scheduler.scaling import Removed
from rayk.scheduler.supervisor import Replacement
from rayk.session import InferenceSession

if TYPE_CHECKING:
    from rayk.actors.describe import Decision

AT_ONCE = 100_000  # handles of one call
AHEAD = 8_192  # requests of one call that are made and sent before others of it end


class Cluster:
    """`model` is a checkpoint folder, or a function `device -> model` (see rayk.engine.forward.Model).

    `session` says where: InferenceSession("inline") (the default) or InferenceSession("ray"). `pages` is per replica;
    None takes what fits and can be used, by requests of at most `longest` tokens if that is given. `chunk_size` bounds
    the tokens of one forward. `host_memory`, and `disk_memory` in `disk_dir`, are what the replicas of a node may take
    together for pages beyond their devices' (docs/tiers.md): "16GiB", bytes, or 0.9 for that share of what is free.
    Pages on disk serve the next Cluster of the same model; `model_id` names it, instead of a look at all its weights.
    `peer_copies`: a prefix that another replica holds is copied where that takes less time than computing it.
    `tp`: ranks of each replica, over which its model and pages are split: as many GPUs of one node, or processes on a
    CPU (docs/engine.md). `device`: "cpu", "cuda", or "auto" for CUDA where there are enough GPUs. `graphs`: on
    CUDA, capture decode steps. A request whose replica is lost is sent again `max_retries` times. With an
    `admission` policy requests wait for room and for their turn (tenant, priority and deadline of the prompt count, see
    rayk.scheduler.admission.queue), or are turned away with an OverloadedError. `tokenizer`: for
    text prompts, where the folder has none. `threads`: of torch on a CPU, for each replica; one unless given. Inline,
    as many as this process uses unless given: a number is set for all of this process (torch.set_num_threads), and
    taken back by close(), for the thread that calls it and for new ones. `kv_events`: "tcp://127.0.0.1:5557", or a
    KVEventsConfig, has replica r publish at port 5557 + r what it caches and drops, for routers that listen to vLLM
    (docs/kv-events.md).
    `kv_dtype`: of the pages, such as "float8_e4m3fn" for half of bfloat16's room (docs/models.md); the model's own
    unless given. `isolate_tenants`: no request reuses, counts or is sped up by pages of another `tenant`; those without
    one share theirs. It costs what tenants have in common, such as a system prompt.
    `vllm_metrics`: replicas on Ray export their metrics under vLLM's names, too (docs/metrics.md). `trace_share`:
    of so many of this driver's requests, 0 to 1, OpenTelemetry gets spans.
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
        tp: int = 1,
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
        isolate_tenants: bool = False,
        vllm_metrics: bool = False,
        trace_share: float = 0.0,
    ) -> None:
        from rayk.scheduler.router.policies import wants_keys

        keyed = wants_keys(router)  # ConfigError for one that there is not
        self._tracing = Tracing(trace_share)
        require_at_least(0, max_retries=max_retries)
        folder = None if disk_dir is None else Path(disk_dir).expanduser().resolve()
        settings = ServeSettings(
            replicas=replicas,
            tp=tp,
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
            tiers=TierConfig(host_memory=host_memory, disk_dir=folder, disk_memory=disk_memory),
            kv_events=checked(kv_events, prefix_caching, replicas),
            kv_dtype=kv_dtype,
            threads=threads,
            isolate_tenants=isolate_tenants,
            vllm_metrics=vllm_metrics,
            replaced=replace,
            engine=EngineSettings(chunk_size=chunk_size, watermark=watermark),
        )
        source = changed(model_source(model, dtype, attention), model_id=model_id)
        if tp > 1:
            source.check_split(tp)
        if disk_dir is not None and source.folder is None:
            source.identity()  # it has none: here, before anything is started
        where = session or InferenceSession("inline")
        where.check_open()
        self._open(
            where, session is None, Startup(where, source, settings, router, admission, max_retries, tokenizer).run
        )

    @classmethod
    def attached(cls, session: InferenceSession, own_session: bool = False) -> Cluster:
        """The Cluster that runs in that named session; see attach()."""
        cluster = cls.__new__(cls)
        cluster._tracing = Tracing(0.0)
        cluster._open(session, own_session, lambda: startup.attach(session))
        return cluster

    def _open(self, session: InferenceSession, own_session: bool, start: Callable[[], Started]) -> None:
        self._session, self._own_session = session, own_session
        try:
            started = start()
        except BaseException:
            if own_session:
                session.close()
            raise
        self._replicas, self._dispatcher, self._prompts = started.replicas, started.dispatcher, started.prompts
        self._lifecycle = Lifecycle(started.replicas, started.dispatcher)
        session.adopt(self, counts=False)
        self._lifecycle.start()

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
        handles = self._tracing.follow(self._prompts.handles(prompts, sampling, changes, timeout, on_news))
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
        made = self._prompts.handles(prompts, sampling, changes, timeout, on_news, AT_ONCE)
        handles = list(self._tracing.follow(made))
        for handle in handles:
            handle.canceller = self._dispatcher.cancel
        try:
            self._dispatcher.submit(handles)
        except BaseException:
            self._dispatcher.cancel(*handles)
            raise
        return handles

    def deliver_in(self, call_soon_threadsafe: Callable[[Callable[[], None]], object] | None) -> None:
        """Have what replicas in this process report told in that event loop, so that no thread has to run between an
        engine and who waits there; None takes it back. Replicas elsewhere have a thread each all the same."""
        if isinstance(self._replicas, InlineReplicas):
            self._replicas.deliver_in(call_soon_threadsafe, self._dispatcher.on_report)

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
        return self._lifecycle.add(n, timeout)

    def replacements(self) -> list[Replacement]:
        """What is done about lost replicas: why each was lost or could not be started again, how often in a row that
        failed, whether it is given up, and seconds until the next attempt. Empty with replace=False."""
        return self._dispatcher.replacements()

    def drain_replica(self, replica: int, *, hand_over: bool = False) -> None:
        """Give a replica no new requests. Those that it has end there, or with `hand_over` go on elsewhere at once:
        nothing that was streamed changes, and it is no retry. ReplicaStateError for a lost one."""
        self._lifecycle.drain(replica, hand_over)

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
        return self._lifecycle.remove(replica, hand_over, timeout)

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
    def inline(self) -> bool:
        """Whether the replicas are in this process, so that no call waits for another one."""
        return self._session.runtime == "inline"

    @property
    def longest(self) -> int:
        """Most tokens that prompt and answer of one request may have: the model's limit, and what a replica holds."""
        size = self._replicas.settings.page_size
        return min(min(each.max_length, each.pages * size + 1) for each in self.facts)

    @property
    def live(self) -> list[int]:
        """Replicas that answer, draining ones included."""
        return self._dispatcher.live

    def path_states(self) -> list[PathState]:
        """What carries this driver's messages to each replica that answers, and its reports: a socket, or Ray's calls,
        and then why."""
        return [self._replicas.path(replica) for replica in self.live]

    def stats(self, replica: int = 0) -> EngineStats:
        """Counters of one replica's engine. ReplicaLostError for a lost one, CallTimeoutError for one that hangs."""
        self._check_open()
        self._dispatcher.check_live(replica)
        return self._replicas.stats(replica)

    def readings(self) -> list[Reading]:
        """Metrics of its scheduler and of the replicas that answer, as of now (docs/metrics.md)."""
        self._lifecycle.check_open()
        labels = {"cluster": f"{self._session.name}/cluster" if self._session.name else "", "node": ""}
        found = self._dispatcher.readings(labels)
        for replica in self.live:
            facts = self.facts[replica]
            with suppress(RaykError):  # lost, or it does not answer: the others are told of
                of = labels | {"replica_idx": str(replica), "node": facts.node}
                found += read_engine(self._replicas.stats(replica), facts.page_bytes, of)
        return found

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
        return self._lifecycle.reset_prefix_cache()

    def check_integrity(self) -> None:
        """IntegrityError unless the pages of all replicas are where they should be, in their tiers too.

        Waits for what is on its way to a tier, and keeps each engine from its work meanwhile.
        """
        self._check_open()
        self._lifecycle.check_integrity()

    def _check_open(self) -> None:
        self._lifecycle.check_open()

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
            self._end(self._replicas.close if self._session.name is None else lambda: None)

    def _end(self, end_replicas: Callable[[], None]) -> None:
        self._lifecycle.end(end_replicas)
        self._session.dismiss(self)
        if self._own_session:
            self._session.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def attach(name: str, address: str | None = None, *, secret: str | bytes | None = None, **ray_options: Any) -> Cluster:
    """The Cluster that runs in sessions called `name`, whatever it serves, in a session of its own: several drivers may
    use it at once. `address`, `secret` and Ray's options as for InferenceSession; an address is looked for, never
    started. ConfigError when no Cluster runs there, SecretError when it has another secret."""
    session = InferenceSession("ray", address or "auto", name, secret=secret, **ray_options)
    try:
        return Cluster.attached(session, own_session=True)
    except BaseException:
        session.close()
        raise
