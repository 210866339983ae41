"""GPUs by name: the memory that their driver reports, error correction on. A size stands for a GPU without a name."""

from __future__ import annotations

import difflib

from rayk.bench.quantity import parse_size
from rayk.errors import ConfigError
from rayk.planning import DeviceMemory

MIB = 1 << 20
SMALLEST, LARGEST = 64 * MIB, 1 << 44  # 16 TiB: beyond this a size is a typing error

# MiB, as nvidia-smi and rocm-smi print them; below what the name promises.
GPU_MIB = {
    "t4": 15_360,
    "l4": 23_034,
    "a10g": 23_028,
    "rtx-4090": 24_564,
    "rtx-5090": 32_607,
    "v100-32": 32_768,
    "a100-40": 40_960,
    "a40": 46_068,
    "l40": 46_068,
    "l40s": 46_068,
    "a6000": 49_140,
    "rtx-6000-ada": 49_140,
    "h100": 81_559,
    "a100-80": 81_920,
    "h100-nvl": 95_830,
    "rtx-pro-6000": 97_887,
    "h20": 97_871,
    "gh200": 97_871,
    "h200": 143_771,
    "b200": 183_359,
    "mi300x": 196_592,
    "mi325x": 262_128,
    "b300": 275_040,
    "mi355x": 294_896,
}
ALIASES = {"h100-80": "h100", "h100-sxm": "h100", "h200-sxm": "h200", "rtx-a6000": "a6000"}


def named_gpu(name: str) -> DeviceMemory | None:
    """The GPU of that name, all of its memory free; None for another name."""
    key = name.strip().lower().replace(" ", "-").replace("_", "-").removeprefix("nvidia-").removeprefix("amd-")
    key = ALIASES.get(key.removesuffix("gb"), key.removesuffix("gb"))
    return DeviceMemory(0, key, GPU_MIB[key] * MIB, GPU_MIB[key] * MIB) if key in GPU_MIB else None


def parse_gpu(text: str) -> DeviceMemory:
    """A GPU by name or by size, such as h200 or 141GiB. ConfigError with names that are close otherwise."""
    known = named_gpu(text)
    if known is not None:
        return known
    if text[:1].isdigit():
        size = parse_size(text, 0)
        if not SMALLEST <= size <= LARGEST:
            raise ConfigError(f"--gpu {text}: {size} bytes are no GPU; write a size such as 141GiB, or a name")
        return DeviceMemory(0, text, size, size)
    near = [n for n in GPU_MIB if n.startswith(text.lower())] or difflib.get_close_matches(text.lower(), GPU_MIB)
    raise ConfigError(f"--gpu {text!r} is not known; use {', '.join(near or GPU_MIB)}, or a size such as 141GiB")


def larger_gpus(memory: int) -> list[DeviceMemory]:
    """The known GPUs with more than `memory` bytes, smallest first; of equal ones the first."""
    found: dict[int, DeviceMemory] = {}
    for name in sorted(GPU_MIB, key=GPU_MIB.__getitem__):
        gpu = named_gpu(name)
        if gpu is not None and gpu.total > memory:
            found.setdefault(gpu.total, gpu)
    return list(found.values())
