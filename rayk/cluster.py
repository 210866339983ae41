"""Cluster: a model served from several replicas. Prompts in; answers, or tokens as they come, out.

Requests wait here until a replica has room for them, go where the router says, and are followed by number. When a
replica is lost, those it had go on elsewhere: prompt and answer so far become the prompt, and nothing that was
streamed changes. Each replica has one thread here that reads its reports.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Any

import msgspec
import numpy as np

from rayk.context import IntArray, as_int32
from rayk.engine.errors import RequestCancelledError, RequestError, RequestTimeoutError
from rayk.engine.inline import InlineReplicas
from rayk.engine.output import Handle, Output, Update
from rayk.engine.request import Request, timeout_problem
from rayk.engine.sampling import SamplingParams
from rayk.engine.serve import ModelSource, ReplicaFacts, Replicas, ServeSettings
from rayk.engine.settings import EngineSettings, EngineStats
from rayk.engine.tiers import Size, TierWish
from rayk.engine.wire import Ask, Cancel, Report, Submit
from rayk.errors import ClosedError, ConfigError, NotBuiltError, RaykError, ReplicaLostError, TokenError
from rayk.params import require_at_least
from rayk.session import InferenceSession

MESSAGE_BYTES = 90_000  # of one message: beyond 100 KiB Ray goes through its object store, which costs twice
LINED_UP = 2  # full batches that a replica is given at a time; what waits here can still go elsewhere

Prompt = str | Sequence[int] | IntArray | Mapping[str, Any]
"""Text, token ids, or a mapping with "text" or "tokens" and, if wanted, "id", "cache_salt" and "session"."""


class Cluster:
    """`model` is a checkpoint folder, or a function `device -> model` (see rayk.engine.forward.Model).

    `session` says where: InferenceSession("inline") (the default) or InferenceSession("ray"). `pages` is per replica;
    None takes what fits and can be used, by requests of at most `longest` tokens if that is given. `chunk_size` bounds
    the tokens of one forward. `host_memory`, and `disk_memory` in `disk_dir`, are what the replicas of a node may take
    together for pages beyond their devices' (docs/tiers.md): "16GiB", bytes, or 0.9 for that share of what is free.
    Pages on disk serve the next Cluster of the same model; `model_id` names it, instead of a look at all its weights.
    `device`: "cpu", "cuda", or "auto" for CUDA where there are enough GPUs. `graphs`: on
    CUDA, capture decode steps. A request whose replica is lost is sent again `max_retries` times. `tokenizer`: for
    text prompts, where the folder has none.
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
        watermark: float = 0.01,
        memory_utilization: float | None = None,
        host_memory: Size | None = None,
        disk_dir: str | Path | None = None,
        disk_memory: Size | None = None,
        model_id: str | None = None,
        longest: int | None = None,
        graphs: bool = True,
        threads: int = 1,
        tokenizer: Any = None,
    ) -> None:
        from rayk.scheduler.steering import Steering, wants_pages

        hears = wants_pages(router) and replicas > 1 and prefix_caching
        require_at_least(0, max_retries=max_retries)
        folder = None if disk_dir is None else Path(disk_dir).expanduser().resolve()
        tiers = TierWish(host_memory=host_memory, disk_dir=folder, disk_memory=disk_memory)
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
            reports=hears,
            tiers=tiers,
            threads=threads,
            engine=EngineSettings(chunk_size=chunk_size, watermark=watermark),
        )
        source = replace(model_source(model, dtype, attention), model_id=model_id)
        if disk_dir is not None and source.folder is None:
            source.identity()  # it has none: here, before anything is started
        self._source = source
        self._tokenizer = tokenizer
        self._max_retries = max_retries
        self._numbers = count(1)
        self._handles: dict[int, Handle] = {}  # not finished
        self._ids: set[str] = set()
        self._pending: deque[Handle] = deque()
        self._lock = threading.RLock()
        self._closed = False
        self._own_session = session is None
        self._session = session or InferenceSession("inline")
        self._session.check_open()
        try:
            self._replicas = self._start(source, settings)
        except BaseException:
            if self._own_session:
                self._session.close()
            raise
        capacities = [facts.pages * page_size for facts in self.facts]
        hasher = self._replicas.settings.hasher
        self._steering = Steering(router, page_size, capacities, LINED_UP * max_batch_size, hasher)
        self._live = list(range(replicas))
        self._why_lost = ""
        self._session.adopt(self)
        self._readers = [
            threading.Thread(target=self._read, args=(r,), name=f"rayk-reports-{r}", daemon=True)
            for r in range(replicas)
        ]
        for reader in self._readers:
            reader.start()

    def _start(self, source: ModelSource, settings: ServeSettings) -> Replicas:
        if self._session.name is not None:
            raise NotBuiltError("Cluster in a named session")
        if settings.device == "auto":
            settings = replace(settings, device=_device(self._session, settings.replicas))
        if self._session.runtime == "inline":
            return InlineReplicas(source, settings)
        from rayk.actors.engine import RayReplicas

        return RayReplicas(self._session.ray, source, settings)

    # -- asking ------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Iterable[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> list[Output]:  # fmt: skip
        """The outputs of all prompts, in their order. One that fails has its `error`; the others go on.

        `sampling` is for all, or one for each; `changes` are fields of SamplingParams, such as max_new_tokens=16.
        `timeout`: seconds for each request, from now on.
        """
        handles = self.submit_all(prompts, sampling, timeout=timeout, **changes)
        try:
            return [handle.result() for handle in handles]
        except BaseException:
            self._give_up(handles)
            raise

    async def agenerate(
        self, prompts: Prompt | Iterable[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> list[Output]:  # fmt: skip
        """generate() for asyncio. A cancelled call cancels its requests."""
        handles = self.submit_all(prompts, sampling, timeout=timeout, **changes)
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(handle.future) for handle in handles)))
        except BaseException:
            self._give_up(handles)
            raise

    def stream(
        self, prompts: Prompt | Iterable[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> Iterator[Update]:  # fmt: skip
        """Tokens (and text, with a tokenizer) of all prompts as they come, in batches; each ends with its output.

        Leaving the loop early cancels what is not finished.
        """
        news: SimpleQueue[Handle] = SimpleQueue()
        handles = self.submit_all(prompts, sampling, timeout=timeout, on_news=news.put, **changes)
        open_ = {handle.number for handle in handles}
        try:
            while open_:
                update = _next_update(news.get(), open_)
                if update is not None:
                    yield update
        finally:
            self._give_up(handles)

    async def astream(
        self, prompts: Prompt | Iterable[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *, timeout: float | None = None, **changes: Any,
    ) -> AsyncIterator[Update]:  # fmt: skip
        """stream() for asyncio."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Handle]()

        def tell(handle: Handle) -> None:
            loop.call_soon_threadsafe(news.put_nowait, handle)

        handles = self.submit_all(prompts, sampling, timeout=timeout, on_news=tell, **changes)
        open_ = {handle.number for handle in handles}
        try:
            while open_:
                update = _next_update(await news.get(), open_)
                if update is not None:
                    yield update
        finally:
            self._give_up(handles)

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
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout: float | None = None,
        on_news: Callable[[Handle], None] | None = None,
        **changes: Any,
    ) -> list[Handle]:
        """Send prompts; a handle for each. `on_news` is called with a handle that has news, from another thread."""
        listed = _listed(prompts)
        settings = _settings(sampling, changes, len(listed))
        handles = [
            self._handle(i, prompt, each, timeout, on_news)
            for i, (prompt, each) in enumerate(zip(listed, settings, strict=True))
        ]
        with self._lock:
            self._check_open()
            for handle in handles:
                if handle.done:
                    continue
                if handle.id in self._ids:
                    _end(handle, RequestError(handle.id, "this id is in use; wait for its end or take another"))
                    continue
                self._handles[handle.number] = handle
                self._ids.add(handle.id)
                self._pending.append(handle)
            over = self._pump()
        for handle, error in over:
            _end(handle, error)
        return handles

    def _handle(
        self,
        index: int,
        prompt: Prompt,
        sampling: SamplingParams,
        timeout: float | None,
        on_news: Callable[[Handle], None] | None,
    ) -> Handle:
        """A handle for one prompt; already finished, with its error, if the prompt is none."""
        number = next(self._numbers)
        fields = dict(prompt) if isinstance(prompt, Mapping) else {}
        if not fields:
            fields["text" if isinstance(prompt, str) else "tokens"] = prompt
        request_id = str(fields.pop("id", f"request-{number}"))
        tokens, error = np.empty(0, np.int32), None
        try:
            tokens = self._tokens(request_id, fields)
        except RaykError as refused:
            error = refused
        problem = sampling.problem() or timeout_problem(timeout)
        if problem is None:
            sampling = sampling.plain()
            if sampling.seed is None and not sampling.greedy:  # given here, so that it can go on elsewhere
                sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        elif error is None:
            error = RequestError(request_id, problem)
        salt, stream = fields.get("cache_salt"), on_news is not None and self.facts[0].has_tokenizer
        handle = Handle(
            index, number, request_id, tokens, sampling, timeout=timeout, stream_text=stream, cache_salt=salt
        )
        handle.session = fields.get("session")
        handle.on_news = on_news
        handle.cancel = lambda: self._cancel(handle)
        if error is not None:
            _end(handle, error)
        return handle

    def _tokens(self, request_id: str, fields: Mapping[str, Any]) -> IntArray:
        unknown = set(fields) - {"text", "tokens", "cache_salt", "session"}
        if unknown:
            raise RequestError(request_id, f"a prompt has no field {min(unknown)!r}; it has text or tokens, and an id")
        if ("text" in fields) == ("tokens" in fields):
            raise RequestError(request_id, "a prompt has either text or tokens")
        for name in ("cache_salt", "session"):
            if not isinstance(fields.get(name), str | None):
                raise RequestError(request_id, f"{name} must be a string, got {fields[name]!r}")
        if "tokens" in fields:
            try:
                return as_int32(fields["tokens"], request_id)
            except TokenError as error:
                raise RequestError(request_id, error.message) from None
        if not isinstance(fields["text"], str):
            raise RequestError(request_id, f"text must be a string, got {fields['text']!r}")
        return as_int32(self._tokenize(request_id)(fields["text"])["input_ids"], request_id)

    def _tokenize(self, request_id: str) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._replicas.tokenizer
        if self._tokenizer is None:
            if self._source.folder is None or not self.facts[0].has_tokenizer:
                raise RequestError(request_id, f"{self._source} has no tokenizer; send token ids, or pass tokenizer=")
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(str(self._source.folder), local_files_only=True)
        return self._tokenizer

    def _give_up(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            if not handle.done:
                handle.cancel()

    def _cancel(self, handle: Handle) -> None:
        with self._lock:
            if handle.number not in self._handles:
                return
            if handle.replica is not None:
                self._replicas.post(handle.replica, Cancel([handle.number]))
                return
            self._pending.remove(handle)
            self._forget(handle)
        _end(handle, RequestCancelledError(handle.id, len(handle.tokens)))

    # -- sending -----------------------------------------------------------------------------------

    def _pump(self) -> list[tuple[Handle, RaykError]]:
        """Send what waits to replicas with room (the lock is held); what cannot go on any more, to be ended."""
        asks: dict[int, list[Ask]] = {}
        over = self._expired()
        while self._pending:
            if not self._live:
                handle = self._pending.popleft()
                over.append((handle, self._lost_error(handle)))
                self._forget(handle)
                continue
            handle = self._pending[0]
            keys = self._steering.keys(handle.prompt, handle.cache_salt)
            replica = self._steering.place(handle.number, len(handle.prompt), keys, handle.session)
            if replica < 0:
                break
            self._pending.popleft()
            handle.replica = replica
            asks.setdefault(replica, []).append(self._ask(handle))
        for replica, batch in asks.items():
            for part in _parts(batch):
                self._replicas.post(replica, Submit(part))
        return over

    def _ask(self, handle: Handle) -> Ask:
        tokens, left = handle.prompt, handle.timeout
        if handle.tokens:
            tokens = np.concatenate((tokens, np.array(handle.tokens, np.int32)))
        if left is not None:
            left = max(1e-3, left - (monotonic() - handle.submitted_at))
        return Ask.of(
            Request(
                handle.number,
                handle.id,
                tokens,
                handle.sampling,
                len(handle.tokens),
                left,
                handle.stream_text,
                handle.cache_salt,
            )
        )

    def _expired(self) -> list[tuple[Handle, RaykError]]:
        """Requests whose time was up before a replica had room."""
        over: list[tuple[Handle, RaykError]] = []
        if any(handle.timeout is not None for handle in self._pending):
            now, kept = monotonic(), deque[Handle]()
            for handle in self._pending:
                timeout = handle.timeout
                if timeout is not None and timeout <= now - handle.submitted_at:
                    over.append((handle, RequestTimeoutError(handle.id, timeout)))
                    self._forget(handle)
                else:
                    kept.append(handle)
            self._pending = kept
        return over

    def _forget(self, handle: Handle) -> None:
        self._handles.pop(handle.number, None)
        self._ids.discard(handle.id)
        self._steering.remove(handle.number)

    # -- hearing ---------------------------------------------------------------------------------------

    def _read(self, replica: int) -> None:
        """Follow one replica's reports to their end."""
        reason = "its engine was stopped"
        try:
            for report in self._replicas.reports(replica):
                self._hear(replica, report)
        except Exception as error:  # whatever it was, nothing more will come from there
            reason = str(error)
        if not self._closed:
            self._lose(replica, reason)

    def _hear(self, replica: int, report: Report) -> None:
        first: list[int] = []
        numbers, tokens = report.columns()
        order = np.argsort(numbers, kind="stable")
        numbers, tokens = numbers[order], tokens[order]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for number, part in zip(numbers[starts].tolist(), np.split(tokens, starts[1:]), strict=False):
            handle = self._handles.get(number)
            if handle is not None:
                if not handle.tokens:
                    first.append(number)
                handle.add(part.tolist(), report.logprobs.get(number, []))
        for number, piece in report.texts:
            if (handle := self._handles.get(number)) is not None:
                handle.add_text(piece)
        with self._lock:
            self._steering.hear(replica, report.pages)
            for number in first:
                self._steering.prefilled(number)
            ended = [(self._handles[e.number], e) for e in report.ended if e.number in self._handles]
            for handle, _ in ended:
                self._forget(handle)
            over = self._pump() if self._pending and not self._closed else []
        for handle, end in ended:
            handle.finish(end.reason, end.error, end.text, end.cached, end.preemptions, end.admitted_after)
        for handle, error in over:
            _end(handle, error)

    def _lose(self, replica: int, reason: str) -> None:
        """A replica is gone: what it had goes on elsewhere, as often as was allowed."""
        self._replicas.drop(replica)
        with self._lock:
            self._live.remove(replica)
            self._why_lost = reason
            self._steering.lose(replica)
            had = [handle for handle in self._handles.values() if handle.replica == replica]
            over: list[tuple[Handle, RaykError]] = []
            for handle in reversed(had):
                self._steering.remove(handle.number)
                if handle.retries >= self._max_retries or not self._live:
                    over.append((handle, self._lost_error(handle)))
                    self._forget(handle)
                else:
                    handle.retries += 1
                    handle.replica = None
                    self._pending.appendleft(handle)
            over += self._pump()
        for handle, error in over:
            _end(handle, error)

    def _lost_error(self, handle: Handle) -> RaykError:
        return ReplicaLostError(-1 if handle.replica is None else handle.replica, 0, [handle.id], self._why_lost)

    # -- the cluster -----------------------------------------------------------------------------------

    @property
    def facts(self) -> Sequence[ReplicaFacts]:
        """What each replica is, lost ones included."""
        return self._replicas.facts

    @property
    def live(self) -> list[int]:
        """Replicas that answer."""
        with self._lock:
            return list(self._live)

    def stats(self, replica: int = 0) -> EngineStats:
        """Counters of one replica's engine."""
        self._check_open()
        return self._replicas.stats(replica)

    def check_integrity(self) -> None:
        """IntegrityError unless the pages of all replicas are where they should be, in their tiers too.

        Waits for what is on its way to a tier, and keeps each engine from its work meanwhile.
        """
        self._check_open()
        for replica in self.live:
            self._replicas.check(replica)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this Cluster")

    def close(self) -> None:
        """End the replicas; requests that are not finished are cancelled. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = list(self._handles.values())
            self._handles.clear()
            self._pending.clear()
        self._replicas.close()
        for handle in left:
            _end(handle, RequestCancelledError(handle.id, len(handle.tokens)))
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join(timeout=10)
        self._session.dismiss(self)
        if self._own_session:
            self._session.close()

    shutdown = leave = close  # what a session calls at its end

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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


def _listed(prompts: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if hasattr(prompts, "ndim"):  # an array or a tensor: one prompt, or one in each row
        return [prompts] if prompts.ndim == 1 else list(prompts)
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], (int, np.integer)) else listed


def _settings(
    sampling: SamplingParams | Sequence[SamplingParams] | None, changes: Mapping[str, Any], prompts: int
) -> list[SamplingParams]:
    listed = [sampling or SamplingParams()] * prompts if isinstance(sampling, SamplingParams | None) else list(sampling)
    if len(listed) != prompts:
        raise ConfigError(f"got {len(listed)} sampling settings for {prompts} prompts; pass one, or one for each")
    unknown = set(changes) - set(SamplingParams.__struct_fields__)
    if unknown:
        known = ", ".join(SamplingParams.__struct_fields__)
        raise ConfigError(f"{min(unknown)!r} is not a sampling setting; there are {known}")
    if isinstance(changes.get("stop"), str):
        changes = {**changes, "stop": (changes["stop"],)}
    return [msgspec.structs.replace(each, **changes) for each in listed] if changes else listed


def _parts(asks: list[Ask]) -> Iterator[list[Ask]]:
    """Split so that a message stays small, unless one request is large."""
    part: list[Ask] = []
    size = 0
    for ask in asks:
        if part and size + len(ask.tokens) > MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append(ask)
        size += len(ask.tokens) + 100
    if part:
        yield part


def _end(handle: Handle, error: RaykError) -> None:
    reasons = {RequestCancelledError: "cancelled", RequestTimeoutError: "timeout"}
    handle.finish(reasons.get(type(error), "error"), error)


def _next_update(handle: Handle, open_: set[int]) -> Update | None:
    """What is new of a handle that told so; None when that was read already."""
    if handle.number not in open_:
        return None
    update = handle.take()
    if update.output is not None:
        open_.discard(handle.number)
    return update if update.output is not None or update.tokens or update.text else None
