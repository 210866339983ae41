"""Calls that a request demands (`tool_choice` required, or a function by its name): the schema of such an answer."""

from __future__ import annotations

from typing import Any

from rayk.server.errors import HttpError
from rayk.server.requests import ChatBody, Json


def forced_call(body: ChatBody) -> Json | None:
    """The JSON schema of a call that must be made; None where the model is free to. HttpError 400 names what is
    wrong with the tools."""
    functions = dict(_function(tool, at) for at, tool in enumerate(body.tools or ()))
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return None
    if isinstance(choice, dict):
        name = _name(choice)
        if name not in functions:
            raise HttpError(400, f"tool_choice: there is no tool {name!r:.100}", "tool_choice")
        functions = {name: functions[name]}
    elif choice != "required":
        raise HttpError(
            400, f"tool_choice is {choice!r:.100}, it must be none, auto, required or a tool", "tool_choice"
        )
    if not functions:
        raise HttpError(400, "tool_choice: there are no tools", "tool_choice")
    calls = [_call(name, function) for name, function in functions.items()]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _function(tool: Any, at: int) -> tuple[str, Json]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise HttpError(400, f"tools[{at}].function: a tool is a function with a name", f"tools[{at}].function")
    return function["name"], function


def _name(choice: Json) -> Any:
    """Of {"type": "function", "function": {"name": ..}}, or as responses have it."""
    function = choice.get("function", choice)
    return function.get("name") if isinstance(function, dict) else None


def _call(name: str, function: Json) -> Json:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": function.get("parameters") or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
