"""Typed reading of a config.json: what is missing or makes no sense is an error that says what to pass by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from rayk.memory.errors import ModelConfigError

BY_HAND = ["layers", "kv-heads", "head-dim", "weights", "max-length"]
LARGEST = 1 << 40  # no field of a model is that large


class Fields:
    """The fields of one config, null like absent. `notes` collects what was assumed."""

    def __init__(self, path: str, values: Mapping[str, Any], notes: list[str] | None = None) -> None:
        self.path = path
        self.values = {name: value for name, value in values.items() if value is not None}
        self.notes: list[str] = [] if notes is None else notes
        self._library: Mapping[str, Any] | None = None

    def error(self, message: str) -> ModelConfigError:
        """A refusal of this config."""
        return ModelConfigError(message, self.path, BY_HAND)

    def has(self, name: str) -> bool:
        return name in self.values

    def number(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer field of at least `least`; its default, or transformers' default, when it is absent."""
        value = self.values.get(name, default)
        if value is None:
            value = self._library_default(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{name} must be an integer, got {value!r}")
        if not least <= value < LARGEST:
            raise self.error(f"{name} must be at least {least} and no absurd number, got {value}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, got {value!r}")
        return value

    def part(self, name: str) -> Fields:
        """A nested config."""
        value = self.values.get(name)
        if not isinstance(value, Mapping):
            raise self.error(f"{name} must be an object, got {value!r}")
        return Fields(f"{self.path}: {name}", value, self.notes)

    def _library_default(self, name: str) -> Any:
        """What transformers would assume for an absent field; an error where it is not installed or has none."""
        if self._library is None:
            self._library = library_defaults(str(self.values.get("model_type", "")))
        if self._library.get(name) is None:
            raise self.error(f"{name} is missing")
        self.notes.append(f"{name} is not in {self.path}; transformers assumes {self._library[name]}")
        self.values[name] = self._library[name]
        return self.values[name]


def library_defaults(model_type: str) -> Mapping[str, Any]:
    """The defaults of transformers' config class for that model type; empty where transformers is not installed."""
    try:
        mapping: Mapping[str, Callable[[], Any]] = import_module("transformers").CONFIG_MAPPING
    except ImportError:
        return {}
    if model_type not in mapping:
        return {}
    defaults: Mapping[str, Any] = mapping[model_type]().to_dict()
    return defaults
