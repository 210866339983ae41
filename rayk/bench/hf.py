"""The checkpoint of `rayk bench --forward hf`: its cache's shape, workloads that fit its length, a Cluster of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rayk.bench.settings import BenchSettings
from rayk.errors import ConfigError
from rayk.params import DTYPE_BYTES
from rayk.workloads.request import Workload

if TYPE_CHECKING:
    from rayk.cluster import Cluster

AS_SET = ("replicas", "tp", "page_size", "pages", "max_batch_size", "router", "disk_dir", "peer_copies")
UNBOUNDED = 1_000_000
FITS = 0.97  # of a model's length, when lengths are scaled to it


class ModelShape(msgspec.Struct, frozen=True):
    """What a checkpoint's config says of its cache. `length` counts prompt and answer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    length: int

    def applied(self, settings: BenchSettings) -> BenchSettings:
        """The settings with this model's cache."""
        return msgspec.structs.replace(
            settings, layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype
        )


def model_shape(folder: Path) -> ModelShape:
    """Read from the checkpoint's config, without loading it. CheckpointError or ConfigError when that cannot be."""
    from transformers import AutoConfig

    from rayk.models.checkpoint import check_folder

    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{folder}: {str(error).splitlines()[0]}") from None
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return ModelShape(
        text.num_hidden_layers,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype if dtype in DTYPE_BYTES else "float32",
        text.max_position_embeddings,
    )


def fitted(make: Callable[[float], Workload], length: int) -> Workload:
    """A generated workload whose lengths are scaled down as far as `length` tokens for a request demand."""
    scale, workload = 1.0, make(1.0)
    while workload.longest > length and scale > 1e-3:
        scale *= min(0.9, FITS * length / workload.longest)
        workload = make(scale)
    if workload.longest > length:
        raise ConfigError(f"no request of this workload fits a model of {length} tokens; use another workload")
    return workload


def start(settings: BenchSettings, session: Any, workload: Workload) -> Cluster:
    """The model's replicas. Under faults a request goes on however many of them it loses."""
    from rayk.cluster import Cluster

    assert settings.model is not None
    options: dict[str, Any] = {name: getattr(settings, name) for name in AS_SET}
    if settings.chaos is not None:
        options["max_retries"] = UNBOUNDED
    return Cluster(
        settings.model,
        session,
        chunk_size=settings.token_budget or workload.longest,
        host_memory=settings.host_pages * settings.params().bytes_per_page or None,
        disk_memory=settings.disk_bytes or None,
        **options,
    )


def start_undisturbed(settings: BenchSettings, workload: Workload) -> Cluster:
    """One replica of the same model, in this process, without tiers: what the others are compared with."""
    from rayk.cluster import Cluster

    assert settings.model is not None
    return Cluster(
        settings.model,
        page_size=settings.page_size,
        pages=settings.pages,
        max_batch_size=settings.max_batch_size,
        chunk_size=settings.token_budget or workload.longest,
        threads=1,
    )
