"""All replicas in this process: one model for each device, one thread for all engines."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from socket import gethostname
from typing import Any, TypeVar

import torch

from rayk.engine.engine import Engine
from rayk.engine.engine_thread import EngineThread, InLoop, OnReport
from rayk.engine.replicas import ModelSource, ReplicaFacts, ServeSettings, check_engine, facts_of, open_engine
from rayk.engine.settings import EngineStats
from rayk.engine.threads import TorchThreads
from rayk.engine.tiers import NodeTiers
from rayk.errors import ConfigError, ReplicaLostError
from rayk.kvcache.buffers import PageBuffers
from rayk.planning.node_plan import NodeMemory, measure_node
from rayk.protocol.engine import Command, Report
from rayk.protocol.lines import PathState
from rayk.tiers.identity import take_seed
from rayk.transport.choice import Peer
from rayk.transport.direct import DirectLine
from rayk.transport.line import Line

T = TypeVar("T")


class InlineReplicas:
    """Implements rayk.engine.replicas.Replicas."""

    def __init__(self, source: ModelSource, settings: ServeSettings) -> None:
        if settings.tp > 1:
            raise ConfigError(
                f"tp={settings.tp} needs a process for each rank, and here all replicas are in this one: "
                'pass InferenceSession("ray"), or use tp=1'
            )
        folder = settings.tiers.disk_dir
        if settings.names_pages:
            seed = take_seed(folder) if folder is not None else secrets.token_bytes(32)
            settings = replace(settings, hash_seed=seed)
        self.settings = settings
        self.facts: list[ReplicaFacts] = []
        self.tokenizer: Any = None
        self._source = source
        self._models: dict[str, Any] = {}
        self._tiers: NodeTiers | None = None
        self._pools: dict[Peer, PageBuffers] = {}
        self._torch_threads = None if settings.threads is None else TorchThreads(settings.threads)
        self._thread = EngineThread().start()
        self._delivery: tuple[InLoop | None, OnReport] = (None, lambda replica, report: None)
        self._thread_of: list[EngineThread] = []  # by replica: a thread that died takes its replicas with it
        try:
            self.add(range(settings.replicas), 0)
        except BaseException:
            self.close()
            raise

    def add(self, replicas: Sequence[int], timeout: float) -> None:
        devices = {replica: self._device(replica) for replica in replicas}
        for device in devices.values():
            if device.startswith("cuda") and not torch.cuda.is_available():
                raise ConfigError("this process sees no CUDA device; use device='cpu'")
            if device not in self._models:
                self._models[device] = self._source.load(device)
        if self._thread.failed:
            self._thread = EngineThread().start()
            self._thread.deliver_in(*self._delivery)
        node, sharing, added = self._node(), Counter(devices.values()), list[ReplicaFacts]()
        try:
            for replica, device in devices.items():
                more = (self.settings, replica, device, sharing[device], node, self._tiers, self._lines)
                model = self._models[device]
                engine = self._thread.add(replica, lambda m=model, a=more: self._open(m, *a))  # type: ignore[misc]  # mypy does not infer defaults
                added.append(facts_of(engine, device, node.host_name, self._source))
                self._pools[Peer(replica, added[-1].epoch)] = engine.core.buffers
                self.tokenizer = engine.model.tokenizer
        except BaseException:
            for facts in added:
                self._thread.remove(facts.replica)
                self._pools.pop(Peer(facts.replica, facts.epoch))
            raise
        for facts in added:
            if facts.replica < len(self.facts):
                self.facts[facts.replica], self._thread_of[facts.replica] = facts, self._thread
            else:
                self.facts.append(facts)
                self._thread_of.append(self._thread)

    def _open(self, model: Any, *more: Any) -> Engine:
        """In the thread of the engines."""
        if self._torch_threads is not None:
            self._torch_threads.apply()
        return open_engine(model, self._source, *more)

    def _lines(self, buffers: PageBuffers) -> list[Line]:
        return [DirectLine(buffers, self._pools)]

    def _device(self, replica: int) -> str:
        if self.settings.device != "cuda":
            return self.settings.device
        return f"cuda:{replica % max(1, torch.cuda.device_count())}"

    def _node(self) -> NodeMemory:
        """This machine's memory now; the first time it is decided what the tiers get of it."""
        config, folder = self.settings.tiers, self.settings.tiers.disk_dir
        node = measure_node(host_name=gethostname(), disk_dir=str(folder) if folder is not None else None)
        if config.wanted and self._tiers is None:
            if folder is not None:
                self._source = replace(self._source, model_id=self._source.identity())  # read once for all replicas
            self._tiers, node = config.reserve(node, f"engines-{os.getpid()}-{os.urandom(8).hex()}")
        return node

    def post(self, replica: int, command: Command) -> None:
        self._thread_of[replica].post(replica, command)

    def reports(self, replica: int) -> Iterator[Report]:
        return self._thread_of[replica].reports(replica)

    def deliver_in(self, loop: InLoop | None, on_report: OnReport) -> None:
        """See EngineThread: from now on."""
        self._delivery = (loop, on_report)
        self._thread.deliver_in(loop, on_report)

    def path(self, replica: int) -> PathState:
        return PathState(replica, "direct", "in this process")

    def stats(self, replica: int) -> EngineStats:
        return self._call(replica, Engine.stats)

    def check(self, replica: int) -> None:
        self._call(replica, check_engine)

    def reset_prefix_cache(self, replicas: Sequence[int], token: bytes) -> dict[int, int]:
        self.settings, held = replace(self.settings, reset_token=token), dict[int, int]()
        for replica in replicas:
            with suppress(ReplicaLostError):
                held[replica] = self._call(replica, lambda engine: engine.core.reset_prefix_cache(token))
        return held

    def _call(self, replica: int, what: Callable[[Engine], T]) -> T:
        try:
            return self._thread_of[replica].call(replica, what)
        except KeyError:
            raise ReplicaLostError(replica, self.facts[replica].epoch, [], "its engine was ended") from None

    def remove(self, replica: int) -> None:
        self._thread_of[replica].remove(replica)
        self._pools.pop(Peer(replica, self.facts[replica].epoch), None)

    def leaving(self) -> list[int]:
        return []

    def give_up(self) -> None:
        pass  # a model that is being loaded in this process cannot be interrupted

    def drop(self, replica: int) -> None:
        self.remove(replica)

    def close(self) -> None:
        for thread in {id(thread): thread for thread in [*self._thread_of, self._thread]}.values():
            thread.stop()
        if self._torch_threads is not None:
            self._torch_threads.release()
