"""The flags of commands that serve a model, and the Cluster that they describe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from rayk.cli.flags import SECRET_TEXT, group, secret_of
from rayk.errors import ConfigError

if TYPE_CHECKING:
    from rayk.cluster import Cluster

served = group("Cluster")

AS_GIVEN = (
    *("replicas", "tp", "page_size", "pages", "max_batch_size", "chunk_size", "device", "dtype", "attention", "router"),
    *("kv_dtype", "threads", "peer_copies", "host_memory", "disk_dir", "disk_memory"),
)
"""Flags that are settings of the cluster."""

log = logging.getLogger("rayk.server")


@dataclass(frozen=True, kw_only=True)
class PlaceFlags:
    """How many replicas, and where."""

    replicas: Annotated[int, served("Data-parallel replicas.")] = 1
    tp: Annotated[int, served("Ranks of a replica, over which its model is split: GPUs of one node.")] = 1
    runtime: Annotated[str, served("ray, or inline: everything in this process.")] = "ray"
    address: Annotated[str | None, served("Ray cluster to join; otherwise one that runs, or a new one.")] = None


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """What replicas are."""

    router: Annotated[str, served("cost, round-robin, least-loaded, prefix, session, or module:Class.")] = "cost"
    chunk_size: Annotated[int, served("Tokens of one forward.")] = 512
    max_batch_size: Annotated[int, served("Requests of one forward.")] = 64
    page_size: Annotated[int, served("Tokens of a page.")] = 128
    pages: Annotated[int | None, served("Pages of a replica; as many as fit.")] = None
    peer_copies: Annotated[
        bool, served("Do not copy prefixes between replicas.", " /--no-peer-copies", show_default=False)
    ] = True
    host_memory: Annotated[
        str | None, served("A host tier for the replicas of each node: 16GiB, bytes, or 0.5 of what is free.")
    ] = None
    disk_dir: Annotated[Path | None, served("A disk tier in this folder of each node, kept for the next run.")] = None
    disk_memory: Annotated[str | None, served("What --disk-dir may hold on each node.")] = None
    device: Annotated[str, served("cpu, cuda, or auto: cuda if there are enough GPUs.")] = "auto"
    dtype: Annotated[str, served("auto (as the checkpoint has it), float32, bfloat16.")] = "auto"
    kv_dtype: Annotated[str | None, served("Of the pages, such as float8_e4m3fn; the model's own.")] = None
    attention: Annotated[str | None, served("An attention backend; the fastest that can.")] = None
    threads: Annotated[int | None, served("Threads of each replica on a CPU: 1, and inline all.")] = None


@dataclass(frozen=True, kw_only=True)
class ModelFlag:
    """Which model."""

    model: Annotated[Path, served("Folder of a Hugging Face checkpoint.")]


@dataclass(frozen=True, kw_only=True)
class NameFlags:
    """Which named cluster."""

    name: Annotated[
        str | None, served("A named cluster: attach to it, or start it. It outlives this command; rayk down ends it.")
    ] = None
    secret_file: Annotated[Path | None, served(SECRET_TEXT)] = None


@dataclass(frozen=True, kw_only=True)
class ClusterFlags(EngineFlags, NameFlags, PlaceFlags, ModelFlag):  # the last one's come first in --help
    """A model on replicas."""

    @contextmanager
    def open(self, **more: Any) -> Iterator[Cluster]:
        """The cluster while it is needed; what Ray and transformers print goes to stderr meanwhile."""
        from rayk.cluster import Cluster
        from rayk.session import InferenceSession

        options: dict[str, Any] = {"address": self.address, "name": self.name}
        if self.runtime == "inline":
            for name in ("address", "name"):
                if options.pop(name) is not None:
                    raise ConfigError(f"--{name} is for --runtime ray")
        if self.name is not None:
            options["secret"] = secret_of(self.secret_file)
        elif self.secret_file is not None:
            raise ConfigError("--secret-file is for --name")
        began = perf_counter()
        # The session's end leaves a named cluster, and ends one without a name.
        with redirect_stdout(sys.stderr), InferenceSession(self.runtime, **options) as session:
            cluster = Cluster(self.model, session, **{name: getattr(self, name) for name in AS_GIVEN}, **more)
            log.info("%s: %d replica(s) ready in %.1f s", self.model, len(cluster.live), perf_counter() - began)
            yield cluster
