"""What makes a plan fit: settings that were searched for and tried, each in a plan of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayk.errors import ConfigError
from rayk.planning.budget import last_that_fits
from rayk.planning.gpus import larger_gpus
from rayk.planning.model import Model
from rayk.planning.node_plan import DeviceMemory
from rayk.planning.plan import plan_replica
from rayk.planning.settings import PlanSettings

MOST = 6
MOST_TP = 64
PAGE_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)
SMALL_WEIGHTS = ("float8_e4m3fn", "int4")
SMALL_CACHE = "float8_e4m3fn"
SMALL_BATCHES = (4096, 2048, 1024, 512)
HIGH_UTILIZATION = 0.95


@dataclass(frozen=True)
class Remedy:
    """Settings to change, by the names of PlanSettings and "gpu". A replica then has `pages`; `gpus` are all GPUs."""

    changes: tuple[tuple[str, Any], ...]
    pages: int
    gpus: int

    @property
    def flags(self) -> str:
        """As typed to `rayk plan`."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.changes)


@dataclass(frozen=True)
class Trial:
    """Settings on one kind of device, and what was changed to come here. `real` devices cannot be exchanged."""

    model: Model
    settings: PlanSettings
    device: DeviceMemory
    real: bool = False
    most_tp: int = MOST_TP
    changes: tuple[tuple[str, Any], ...] = ()

    def change(self, name: str, value: Any) -> Trial:
        """One setting changed, or the device for "gpu" (a DeviceMemory)."""
        if name == "gpu":
            return replace(self, device=value, changes=(*self.changes, (name, value.name)))
        return replace(self, settings=replace(self.settings, **{name: value}), changes=(*self.changes, (name, value)))

    def pages(self) -> int | None:
        """Pages if it fits."""
        try:
            plan = plan_replica(self.model, self.settings, [self.device] * self.settings.gpus)
        except ConfigError:  # heads that do not split, weights whose size in that dtype is unknown
            return None
        return plan.pages if plan.fits else None

    def largest(self, name: str, upper: int) -> Trial | None:
        """The largest value of that setting up to `upper` with which it fits."""
        found = last_that_fits(lambda n: self.change(name, n).pages() is not None, upper)
        return None if found is None else self.change(name, found)

    def first(self, name: str, values: Sequence[Any]) -> Trial | None:
        """The first of these values with which it fits."""
        return next((t for t in (self.change(name, v) for v in values) if t.pages() is not None), None)


def remedies(trial: Trial) -> list[Remedy]:
    """At most MOST ways to make it fit: a single change, or two where no single one is enough. Empty when it fits."""
    if trial.pages() is not None:
        return []
    found = [t for t in _single(trial) if t is not None]
    if not found:
        found = [t for start in _drastic(trial) for t in _single(start) if t is not None]
    tried = {t.changes: Remedy(t.changes, pages, t.settings.devices) for t in found if (pages := t.pages()) is not None}
    return list(tried.values())[:MOST]


def _single(t: Trial) -> Iterator[Trial | None]:
    """One setting changed, each kind once, as little as possible."""
    s = t.settings
    kinds: list[tuple[str, Callable[[], Trial | None]]] = [
        ("max_length", lambda: t.largest("max_length", (s.max_length or 0) - 1)),
        ("max_batch_size", lambda: t.largest("max_batch_size", (s.max_batch_size or 0) - 1)),
        ("tp", lambda: t.first("tp", [n for n in range(s.tp + 1, t.most_tp + 1) if t.model.splits_over(n)])),
        ("gpu", lambda: t.first("gpu", [] if t.real else larger_gpus(t.device.free))),
        ("weights_dtype", lambda: t.first("weights_dtype", SMALL_WEIGHTS) if s.weights_dtype is None else None),
        ("kv_dtype", lambda: t.first("kv_dtype", [SMALL_CACHE])),
        ("page_size", lambda: t.first("page_size", [n for n in PAGE_SIZES if n < s.page_size])),
        ("activation_reserve", lambda: t.first("activation_reserve", _halves(s.activation_reserve or 0))),
        ("max_batch_tokens", lambda: t.first("max_batch_tokens", [n for n in SMALL_BATCHES if n < s.max_batch_tokens])),
        ("utilization", lambda: t.first("utilization", [HIGH_UTILIZATION] if s.utilization < HIGH_UTILIZATION else [])),
    ]
    changed = {name for name, _ in t.changes}
    for name, search in kinds:
        if name not in changed:
            yield search()


def _halves(size: int) -> list[int]:
    """Smaller reserves, down to none."""
    return [size // 2, size // 4, size // 8, 0] if size > 0 else []


def _drastic(t: Trial) -> Iterator[Trial]:
    """Starting points for a second change, the most natural first."""
    splits = [n for n in range(t.settings.tp + 1, t.most_tp + 1) if t.model.splits_over(n)]
    for tp in (n for n in (8, t.most_tp) if n in splits):
        yield t.change("tp", tp)
    if splits:
        yield t.change("tp", splits[-1])
    if not t.real and (larger := larger_gpus(t.device.free)):
        yield t.change("gpu", larger[-1])
    if t.settings.max_batch_size is not None:
        yield t.change("max_batch_size", 1)
    if t.settings.utilization < HIGH_UTILIZATION:
        yield t.change("utilization", HIGH_UTILIZATION)
    if t.settings.weights_dtype is None:
        yield t.change("weights_dtype", SMALL_WEIGHTS[-1])
