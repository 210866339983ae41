"""What the activations of the largest forward take, measured: a few layers of the model with random weights are run.

Layers come one after the other, so a few of them, one of each kind, need at a time what all of them need; the weights
are never loaded. On CUDA torch's allocator says the peak; elsewhere the storages of all results are counted.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rayk.errors import ConfigError
from rayk.planning import library
from rayk.planning.checkpoint import read_folder
from rayk.planning.reading import read_model
from rayk.planning.settings import PlanSettings

MOST_LAYERS = 4


class Peak(Protocol):
    """Something that says how many bytes were live at once beyond those at the start."""

    num_bytes: int


class CountedPeak(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the storages of all results of operations while they live. For devices whose allocator keeps no peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.num_bytes = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(s) for s in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if id(storage) in given or key in self._known or not storage.nbytes():
                continue
            self._known.add(key)
            self._live += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.num_bytes = max(self.num_bytes, self._live)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_iter(values):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()


class CudaPeak:
    """The peak of torch's allocator on one device."""

    def __init__(self, device: torch.device) -> None:
        self.num_bytes = 0
        self._device = device

    def __enter__(self) -> CudaPeak:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize(self._device)
        self.num_bytes = torch.cuda.max_memory_allocated(self._device) - self._before


class Measurements:
    """Measured bytes in a file, by model, batch, dtype, device and versions. A file that is damaged counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> int | None:
        found = self._read().get(key)
        return found if isinstance(found, int) and found > 0 else None

    def put(self, key: str, num_bytes: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps({**self._read(), key: num_bytes}))
        fresh.replace(self._path)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def measure_activations(path: Path, settings: PlanSettings, known: Measurements, device: str | None = None) -> int:
    """Bytes that a forward of `settings.max_batch_tokens` tokens takes beside weights, as measured before or now.

    ConfigError for a model that transformers does not make, for one that is split over GPUs, and where this machine has
    no CUDA device.
    """
    if settings.gpus > 1:
        raise ConfigError(
            f"--measure runs the model on one GPU; a replica of {settings.gpus} is estimated, or give it an "
            "--activation-reserve that its engine reports"
        )
    where = torch.device(device or "cuda:0")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--measure needs a CUDA device, and this process sees none; leave it out for an estimate")
    raw = read_folder(path).config
    dtype = read_model(path).dtype
    requests = min(settings.max_batch_size or 256, settings.max_batch_tokens)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    facts = [raw, settings.max_batch_tokens, requests, dtype, name, torch.__version__]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    found = known.get(key)
    if found is None:
        found = _forward(raw, settings.max_batch_tokens, requests, getattr(torch, dtype), where)
        known.put(key, found)
    return found


@torch.inference_mode()
def _forward(raw: Mapping[str, Any], tokens: int, requests: int, dtype: torch.dtype, device: torch.device) -> int:
    """The peak of one forward and of the logits of `requests` rows, sorted as a sampler does."""
    with _default(dtype), library.quiet():
        try:
            model = library.small_model(raw, MOST_LAYERS, device)
        except library.Unbuildable as error:
            raise ConfigError(f"--measure: {error}") from None
    words = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(tokens, device=device) * 7919 % words)[None]
    places = torch.arange(tokens, device=device)[None]
    rows = torch.linspace(0, tokens - 1, requests, device=device).long()
    peak: Any = CudaPeak(device) if device.type == "cuda" else CountedPeak()
    with peak:
        out = model(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=rows)
        torch.sort(out.logits[0].float(), descending=True).values.softmax(-1).cumsum(-1)
        del out
    return int(peak.num_bytes)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
