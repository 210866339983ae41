"""GPUs by name: the memory that their driver reports, error correction on. A size stands for a GPU without a name."""

from __future__ import annotations

import difflib
import re

from rayk.errors import ConfigError
from rayk.planning.node_plan import DeviceMemory
from rayk.quantity import parse_size

MIB = 1 << 20
SMALLEST, LARGEST = 64 * MIB, 1 << 44  # 16 TiB: beyond this a size is a typing error
MOST = 8192

# MiB, as nvidia-smi and rocm-smi print them; below what the name promises.
GPU_MIB = {
    "rtx-3060": 12_288,
    "rtx-4070": 12_282,
    "t4": 15_360,
    "v100-16": 16_384,
    "p100": 16_384,
    "rtx-4080": 16_376,
    "rtx-5080": 16_303,
    "a4000": 16_376,
    "rtx-4000-ada": 20_475,
    "l4": 23_034,
    "a10g": 23_028,
    "a10": 23_028,
    "a30": 24_576,
    "rtx-3090": 24_576,
    "a5000": 24_564,
    "rtx-4090": 24_564,
    "rtx-5090": 32_607,
    "rtx-5000-ada": 32_760,
    "v100-32": 32_768,
    "a100-40": 40_960,
    "a40": 46_068,
    "l20": 46_068,
    "l40": 46_068,
    "l40s": 46_068,
    "rtx-8000": 46_080,
    "a6000": 49_140,
    "rtx-6000-ada": 49_140,
    "rtx-pro-5000": 48_935,
    "mi210": 65_520,
    "a800-80": 81_920,
    "h800": 81_559,
    "h100-pcie": 81_559,
    "h100": 81_559,
    "a100-80": 81_920,
    "h100-nvl": 95_830,
    "rtx-pro-6000": 97_887,
    "h20": 97_871,
    "gh200": 97_871,
    "gh200-144": 147_456,
    "mi250x": 131_056,
    "h200": 143_771,
    "h200-nvl": 143_771,
    "b200": 183_359,
    "gb200": 189_471,
    "mi300x": 196_592,
    "mi325x": 262_128,
    "b300": 275_040,
    "gb300": 284_208,
    "mi350x": 294_896,
    "mi355x": 294_896,
}
ALIASES = {
    "a100-pcie-40": "a100-40",
    "a100-sxm-40": "a100-40",
    "a100-pcie-80": "a100-80",
    "a100-sxm-80": "a100-80",
    "a100-80-pcie": "a100-80",
    "a800-sxm-80": "a800-80",
    "gh200-480": "gh200",
    "gh200-96": "gh200",
    "h100-80": "h100",
    "h100-80-hbm3": "h100",
    "h100-80-hbm3-sxm": "h100",
    "h100-sxm": "h100",
    "h200-141": "h200",
    "h200-sxm": "h200",
    "rtx-6000": "rtx-6000-ada",
    "rtx-a4000": "a4000",
    "rtx-a5000": "a5000",
    "rtx-a6000": "a6000",
    "v100-pcie-16": "v100-16",
    "v100-sxm-16": "v100-16",
    "v100-pcie-32": "v100-32",
    "v100-sxm-32": "v100-32",
}
NOISE = ("nvidia", "amd", "instinct", "geforce", "tesla", "generation", "blackwell", "workstation", "server", "edition")


def named_gpu(name: str) -> DeviceMemory | None:
    """The GPU of that name, all of its memory free; None for another name. Names of nvidia-smi are understood."""
    words = re.split(r"[\s_-]+", name.strip().lower())
    words = [re.sub(r"^(sxm|pcie)\d$", r"\1", word.removesuffix("gb")) for word in words if word not in NOISE]
    key = re.sub(r"\brtx(?=\d)", "rtx-", "-".join(words))
    candidates = (key, f"rtx-{key}", key.removesuffix("-pcie"), key.removesuffix("-sxm"), key.removesuffix("-hbm3"))
    found = next((n for c in candidates if (n := ALIASES.get(c, c)) in GPU_MIB), None)
    return None if found is None else DeviceMemory(0, found, GPU_MIB[found] * MIB, GPU_MIB[found] * MIB)


def parse_gpus(text: str) -> tuple[DeviceMemory, int | None]:
    """A GPU, and how many of it there are: `8xh200`, `4 x a100-80`; None where only the GPU is named."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX*]\s*(\S.*)", text)
    if match is None:
        return parse_gpu(text), None
    count = int(match[1])
    if not 1 <= count <= MOST:
        raise ConfigError(f"--gpu {text}: {count} GPUs; write 1 to {MOST}, as in 8xh200")
    return parse_gpu(match[2]), count


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
