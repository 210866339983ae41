"""The errors of memory planning, part of the tree in rayk/errors.py.

RaykError
├── ConfigError (ValueError)
│   └── ModelConfigError            a config.json that is unknown, incomplete or contradicts itself
├── PlanError (RuntimeError)
│   └── MemoryPlanError             the settings do not fit; says what was needed, what there is, and what fits
└── CacheProtocolError (TypeError)  a model config without what a planner needs
"""

from __future__ import annotations

from typing import ClassVar

from rayk.errors import ConfigError, PlanError, RaykError


class MemoryPlanError(PlanError):
    """Settings that do not fit into the memory. `needed` and `available` are bytes.

    `suggestions` are settings, such as {"max_length": 8192, "max_batch_size": 4}, each of which was tried and fits;
    empty when no setting of a length or a batch size helps.
    """

    needed: int
    available: int
    suggestions: list[dict[str, int]]

    def __str__(self) -> str:
        if not self.suggestions:
            return self.message
        advice = [" and ".join(f"{name} to {value}" for name, value in s.items()) for s in self.suggestions]
        return f"{self.message} What fits: set {', or '.join(advice)}."


class ModelConfigError(ConfigError):
    """A config.json from which no plan can be made. `missing` are the numbers to pass by hand instead."""

    path: str
    missing: list[str]

    def __str__(self) -> str:
        remedy = f'; pass the numbers by hand: --params "{" ".join(f"{n}=.." for n in self.missing)}"'
        return f"{self.path}: {self.message}{remedy if self.missing else ''}"


class CacheProtocolError(RaykError, TypeError):
    """A model config that has no KV cache to plan for: it lacks `missing`."""

    planner: str
    config: str
    missing: list[str]

    text: ClassVar[str] = "{planner} needs a config with `devices` and `get_kv_params`; {config} has no {missing}"
