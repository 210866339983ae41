"""vLLM's kernel that writes keys and values into pages in one launch, where its library is installed.

Looked for once, when pages on a CUDA device are first written. Without it rayk writes with one index_copy_.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from rayk.attention.flash_library import package_folders

log = logging.getLogger("rayk.attention")

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(key, value, key view, value view, slots): shapes as in PagedPool.write."""


@lru_cache(maxsize=1)
def find_write() -> Write | None:
    """The kernel, or None. vLLM's own modules are not imported, only its libraries are loaded."""
    if not _registered():
        for folder in package_folders("vllm", ""):
            for library in sorted(folder.glob("_C*.so")):
                _load(library)
                if _registered():
                    break
    return _adapt(torch.ops._C_cache_ops.reshape_and_cache_flash) if _registered() else None


def _registered() -> bool:
    return hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash")


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    except (OSError, RuntimeError) as error:  # built for another torch, or for another device
        log.info("%s does not load: %s", library, error)


def _adapt(kernel: Callable[..., None]) -> Write:
    """The kernel with its arguments for pages of the model's own dtype."""
    ones: dict[torch.device, torch.Tensor] = {}

    def write(
        key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        if key.device not in ones:
            ones[key.device] = torch.ones(1, dtype=torch.float32, device=key.device)
        scale = ones[key.device]
        kernel(key, value, keys, values, slots, "auto", scale, scale)

    return write
