"""Finding vllm-flash-attn: in vLLM's folder, or as a package of its own.

`import vllm` changes the environment of the process and takes seconds, so the interface module is loaded from its
folder under a name of rayk's, without its parents being executed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

INTERFACE = "flash_attn_interface"
PLACES = (("vllm", "vllm_flash_attn"), ("vllm_flash_attn", ""))
"""Top-level package, folder below it."""


@dataclass(frozen=True)
class FlashLibrary:
    """`module` is a loaded interface, or None; `reason` says why there is none, `origin` where it is from."""

    module: Any
    origin: str
    reason: str


@lru_cache(maxsize=1)
def find_flash() -> FlashLibrary:
    """The first interface that loads and speaks today's signature. Looks once per process."""
    return load_first([folder for top, sub in PLACES for folder in package_folders(top, sub)])


def package_folders(top: str, sub: str) -> list[Path]:
    """Folders of a package or of a folder in it, found without importing anything."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place) / sub for place in places or []]


def load_first(folders: list[Path]) -> FlashLibrary:
    """The first folder whose interface can be used, or the reasons why none can."""
    reasons = []
    for folder in folders:
        if not (folder / f"{INTERFACE}.py").is_file():
            reasons.append(f"{folder} has no {INTERFACE}.py")
            continue
        try:
            module = _load(folder)
        except Exception as error:  # whatever foreign code and a foreign binary may raise
            reasons.append(f"{folder}: {type(error).__name__}: {error}")
            continue
        code = getattr(getattr(module, "flash_attn_varlen_func", None), "__code__", None)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()
        if missing := {"seqused_k", "block_table", "fa_version"} - set(names):
            reasons.append(f"{folder}: a release without {', '.join(sorted(missing))}")
            continue
        return FlashLibrary(module, str(folder), "")
    return FlashLibrary(None, "", "; ".join(reasons) or "neither vllm nor vllm_flash_attn is installed")


def _load(folder: Path) -> ModuleType:
    """The interface of that folder as a module of an otherwise empty package, so that its relative imports work."""
    alias = f"_rayk_flash_{abs(hash(str(folder))):x}"
    if alias not in sys.modules:
        package = ModuleType(alias)
        package.__path__ = [str(folder)]
        package.__spec__ = importlib.machinery.ModuleSpec(alias, None, is_package=True)
        sys.modules[alias] = package
    try:
        return importlib.import_module(f"{alias}.{INTERFACE}")
    except BaseException:
        for name in [n for n in sys.modules if n == alias or n.startswith(f"{alias}.")]:
            del sys.modules[name]
        raise
