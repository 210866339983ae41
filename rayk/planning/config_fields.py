"""Typed reading of a config.json: what is missing or makes no sense is an error that says what to pass by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayk.planning.errors import ModelConfigError

BY_HAND = ["layers", "kv-heads", "head-dim", "weights", "max-length"]
LARGEST = 1 << 40  # no field of a model is that large


class Fields:
    """The fields of one config, null like absent; `given` has the nulls, which a class may tell from its default.
    `notes` collects what was assumed.
    """

    def __init__(self, path: str, values: Mapping[str, Any], notes: list[str] | None = None) -> None:
        self.path = path
        self.given = dict(values)
        self.values = {name: value for name, value in values.items() if value is not None}
        self.notes: list[str] = [] if notes is None else notes

    def error(self, message: str) -> ModelConfigError:
        """A refusal of this config."""
        return ModelConfigError(message, self.path, BY_HAND)

    def has(self, name: str) -> bool:
        return name in self.values

    def number(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer field of at least `least`, or its default."""
        value = self.values.get(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
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
