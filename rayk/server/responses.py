"""/v1/responses: its input as a chat, and its answers. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from rayk.dispatch.output import Output, Update
from rayk.server.errors import HttpError
from rayk.server.generation import Usage, new_id, now
from rayk.server.parsing import Part
from rayk.server.requests import ChatBody, GenerationBody, Json, ResponsesBody

REFUSED = ("previous_response_id", "conversation", "background")


def as_chat(body: ResponsesBody) -> ChatBody:
    """The same as a chat. HttpError 400 for what is not done here."""
    for name in REFUSED:
        if getattr(body, name):
            raise HttpError(400, f"{name}: nothing is kept here between requests; send the conversation as input", name)
    if body.n not in (None, 1):
        raise HttpError(400, "n: a response has one answer", "n")
    given = {name: getattr(body, name) for name in GenerationBody.__struct_fields__}
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items: list[Json] = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    chat = ChatBody(**given, messages=messages + [_message(item, at) for at, item in enumerate(items) if _says(item)])
    chat.max_tokens = body.max_tokens if body.max_output_tokens is None else body.max_output_tokens
    chat.tools = [_tool(tool) for tool in body.tools] if body.tools else None
    chat.tool_choice = body.tool_choice
    chat.chat_template_kwargs = body.chat_template_kwargs
    effort = (body.reasoning or {}).get("effort")
    chat.reasoning_effort = effort if isinstance(effort, str) else None
    shape = (body.text or {}).get("format")
    if isinstance(shape, dict) and shape.get("type") != "text":
        chat.response_format = {"type": shape.get("type"), "json_schema": {"schema": shape.get("schema")}}
    return chat


def _says(item: Any) -> bool:
    return not (isinstance(item, dict) and item.get("type") == "reasoning")


def _message(item: Any, at: int) -> Json:
    where = f"input[{at}]"
    kind = item.get("type", "message")
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind != "message":
        raise HttpError(400, f"{where}: items of type {kind!r:.100} are not understood here", f"{where}.type")
    return {"role": item.get("role"), "content": item.get("content")}


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise HttpError(400, f"tools: a tool of type {tool.get('type')!r:.100} is not here; give functions", "tools")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


class Responses:
    """The answer of one request. See Form."""

    def __init__(self, body: ResponsesBody, name: str, model: str, parser: Any) -> None:
        self._parser = parser()
        self._base: Json = {
            "id": name,
            "object": "response",
            "created_at": now(),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "text": body.text or {"format": {"type": "text"}},
        }
        self._items: list[Json] = []
        self._number = 0
        self._open: Json | None = None  # the item that grows
        self._reason = "stop"

    def whole(self, outputs: Sequence[Output], usage: Usage) -> Json:
        """See Form."""
        output = outputs[0]
        self._take(self._parser.feed(output.text or "", final=True))
        self._close()
        self._reason = output.finish_reason
        return self._response(usage)

    def _response(self, usage: Usage | None, status: str | None = None) -> Json:
        cut = self._reason == "length"
        made = self._base | {"status": status or ("incomplete" if cut else "completed"), "output": self._items}
        if cut and status is None:
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        return made | {"usage": None if usage is None else _usage(usage)}

    # -- events ------------------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """See Form."""
        response = self._response(None, "in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def more(self, update: Update) -> bytes:
        """See Form."""
        events = self._take(self._parser.feed(update.text, final=update.output is not None))
        if update.output is not None:
            self._reason = update.output.finish_reason
        return events

    def end(self, usage: Usage) -> bytes:
        """See Form."""
        closed = self._close()
        kind = "response.incomplete" if self._reason == "length" else "response.completed"
        return closed + self._event(kind, response=self._response(usage))

    def fail(self, error: HttpError) -> bytes:
        """See Form."""
        said = {"code": error.code or error.kind, "message": error.message}
        response = self._response(None, "failed") | {"error": said}
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))

    # -- items -------------------------------------------------------------------------------------------

    def _take(self, part: Part) -> bytes:
        """Events of what the model said."""
        events = b""
        for kind, text in (("reasoning", part.reasoning), ("message", part.content)):
            if text:
                events += self._grow(kind, text)
        for call in part.calls:
            events += self._close() + self._called(call)
        return events

    def _grow(self, kind: str, text: str) -> bytes:
        events = b""
        if self._open is None or self._open["type"] != kind:
            events = self._close() + self._begin(kind)
        assert self._open is not None
        self._open["content"][0]["text"] += text
        said = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
        more: Json = {"logprobs": []} if kind == "message" else {}
        return events + self._event(said, **self._where(), delta=text, **more)

    def _where(self) -> Json:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _begin(self, kind: str) -> bytes:
        if kind == "message":
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item: Json = {
                "id": new_id("msg"),
                "type": kind,
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": new_id("rs"), "type": kind, "status": "in_progress", "summary": []}
        item["content"] = []
        self._items.append(item)
        events = self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        self._open = item
        item["content"] = [part]
        return events + self._event("response.content_part.added", **self._where(), part=part)

    def _close(self) -> bytes:
        """The item that grows is whole."""
        if self._open is None:
            return b""
        item, part, where = self._open, self._open["content"][0], self._where()
        item["status"], self._open = "completed", None
        text = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
        more: Json = {"logprobs": []} if item["type"] == "message" else {}
        return (
            self._event(text, **where, text=part["text"], **more)
            + self._event("response.content_part.done", **where, part=part)
            + self._event("response.output_item.done", output_index=where["output_index"], item=item)
        )

    def _called(self, call: Json) -> bytes:
        item = {"id": new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call["id"],
                "name": call["name"], "arguments": ""}  # fmt: skip
        self._items.append(item)
        at, arguments = len(self._items) - 1, call["arguments"]
        events = self._event("response.output_item.added", output_index=at, item=item)
        item |= {"status": "completed", "arguments": arguments}
        where = {"item_id": item["id"], "output_index": at}
        return (
            events
            + self._event("response.function_call_arguments.delta", **where, delta=arguments)
            + self._event("response.function_call_arguments.done", **where, arguments=arguments, name=call["name"])
            + self._event("response.output_item.done", output_index=at, item=item)
        )


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": usage.prompt_tokens_details,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
