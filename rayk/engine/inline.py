"""All replicas in this process: one model for each device, one thread for all engines."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from socket import gethostname

import msgspec
import torch

from rayk.engine.host import EngineHost
from rayk.engine.serve import ModelSource, ReplicaFacts, ServeSettings, check_engine, facts_of, open_engine
from rayk.engine.settings import EngineStats
from rayk.engine.wire import Command, Report
from rayk.errors import ConfigError
from rayk.planning import measure_node
from rayk.tiers.identity import read_seed


class InlineReplicas:
    """Implements rayk.engine.serve.Replicas."""

    def __init__(self, source: ModelSource, settings: ServeSettings) -> None:
        folder = settings.tiers.disk_dir
        if settings.reports or settings.tiers.wanted:
            seed = (read_seed(Path(folder)) if folder is not None else None) or secrets.token_bytes(32)
            settings = replace(settings, hash_seed=seed)
        self.settings = settings
        devices = [self._device(settings, replica) for replica in range(settings.replicas)]
        sharing, models = Counter(devices), {}
        for device in sharing:
            if device.startswith("cuda") and not torch.cuda.is_available():
                raise ConfigError("this process sees no CUDA device; use device='cpu'")
            models[device] = source.load(device)
        node = measure_node(host_name=gethostname(), disk_dir=str(folder) if folder is not None else None)
        tiers = None
        if settings.tiers.wanted:
            tiers = settings.tiers.on(node, f"engines-{os.getpid()}-{os.urandom(8).hex()}")
            node = msgspec.structs.replace(node, host_free=max(0, node.host_free - tiers.host_bytes))
            if tiers.disk_dir is not None and source.model_id is None:
                source = replace(source, model_id=source.identity())  # read once for all replicas
        engines = []
        try:
            for replica, device in enumerate(devices):
                model = models[device]
                engines.append(open_engine(model, source, settings, replica, device, sharing[device], node, tiers))
        except BaseException:
            for engine in engines:
                engine.core.shutdown()
            raise
        self.facts: Sequence[ReplicaFacts] = [
            facts_of(engine, devices[replica], node.host_name) for replica, engine in enumerate(engines)
        ]
        self.tokenizer = engines[0].model.tokenizer
        self._host = EngineHost(engines).start()

    @staticmethod
    def _device(settings: ServeSettings, replica: int) -> str:
        if settings.device != "cuda":
            return settings.device
        return f"cuda:{replica % max(1, torch.cuda.device_count())}"

    def post(self, replica: int, command: Command) -> None:
        self._host.post(replica, command)

    def reports(self, replica: int) -> Iterator[Report]:
        return self._host.reports(replica)

    def stats(self, replica: int) -> EngineStats:
        return self._host.stats(replica)

    def check(self, replica: int) -> None:
        """IntegrityError unless its pages are where they should be."""
        self._host.call(replica, check_engine)

    def drop(self, replica: int) -> None:
        """It is lost, and with it all others: they share a thread."""

    def close(self) -> None:
        self._host.stop()
