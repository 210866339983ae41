"""What shape an answer must have: a JSON schema, any JSON object, an expression, one of some texts, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from rayk.errors import ConfigError
from rayk.values import has_utf8

LONGEST = 1 << 18  # characters of a schema, an expression or a grammar
MOST_CHOICES = 1024
GUIDED = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}
"""vLLM's names of settings that are one of these."""


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of: json: a schema as JSON text; json_object; regex: of the whole answer; choice: the answer is one
    of these; grammar: in Lark's form, as llguidance reads it."""

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    @classmethod
    def of(cls, given: Any) -> StructuredOutputs | None:
        """From a mapping with one of the fields; a schema may be JSON already. ConfigError for what is none."""
        if given is None or isinstance(given, StructuredOutputs):
            return given
        if not isinstance(given, Mapping) or not set(given) <= set(cls.__struct_fields__):
            raise ConfigError(f"structured_outputs has one of {', '.join(cls.__struct_fields__)}")
        fields = {name: value for name, value in given.items() if value is not None}
        if "json" in fields and not isinstance(fields["json"], str):
            try:
                fields["json"] = json.dumps(fields["json"], ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"structured_outputs: json is no schema: {error}") from None
        if isinstance(fields.get("choice"), list):
            fields["choice"] = tuple(fields["choice"])
        return cls(**fields)

    def problem(self) -> str | None:
        """Why this is none, or None."""
        texts = [each for each in (self.json, self.regex, self.grammar) if each is not None]
        if len(texts) + (self.json_object is True) + bool(self.choice) != 1:
            return "give exactly one of json, json_object, regex, choice and grammar"
        choices = self.choice if isinstance(self.choice, tuple) else (None,)
        if len(choices) > MOST_CHOICES:
            return f"{len(choices)} choices, at most {MOST_CHOICES}"
        for text in (*texts, *choices):
            if not isinstance(text, str) or not 0 < len(text) <= LONGEST or not has_utf8(text):
                return f"texts have 1 .. {LONGEST} characters that UTF-8 can carry"
        if (size := sum(map(len, choices if self.choice else ()))) > LONGEST:
            return f"the choices have {size} characters in all, at most {LONGEST} may be"
        return None
