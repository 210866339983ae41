"""Stand-ins for the configs that the estimator reads, and the folder of config files."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayk import MHAKVCacheParams

GIB = 1 << 30


class Arch:
    """An architecture with a KV cache whose default length is 131,072."""

    def __init__(self, params: Any, model: Any, longest: int = 131_072) -> None:
        self.params, self.model, self.longest, self.devices = params, model, longest, ()

    def get_max_seq_len(self) -> int:
        return int(self.model.max_length or self.longest)

    def get_kv_params(self) -> Any:
        return self.params


@pytest.fixture
def configs() -> Path:
    return Path(__file__).parent / "configs"


@pytest.fixture(scope="session")
def llama_page() -> MHAKVCacheParams:
    """One shard of an 8B Llama: a page of 128 tokens has 16 MiB."""
    return MHAKVCacheParams(dtype="bfloat16", n_kv_heads=8, head_dim=128, num_layers=32, devices=["cpu"])


@pytest.fixture(scope="session")
def pipeline(llama_page: MHAKVCacheParams) -> Callable[..., tuple[Any, Any, Arch]]:
    """(pipeline_config, model_config, arch_config) with the settings given."""

    def make(
        batch: int | None = None, length: int | None = None, utilization: Any = 0.9, **runtime: Any
    ) -> tuple[Any, Any, Arch]:
        cache = SimpleNamespace(device_memory_utilization=utilization, _available_cache_memory=None)
        model = SimpleNamespace(kv_cache=cache, max_length=length, quantization_encoding=None, huggingface_config=None)
        config = SimpleNamespace(
            model=model, draft_model=None, runtime=SimpleNamespace(max_batch_size=batch, **runtime)
        )
        return config, model, Arch(llama_page, model)

    return make


def device(free: int, **more: Any) -> Any:
    return SimpleNamespace(stats={"free_memory": free}, **({"max_single_alloc_size": 1 << 62, "is_host": False} | more))


@pytest.fixture(scope="session", name="device")
def _device() -> Callable[..., Any]:
    return device
