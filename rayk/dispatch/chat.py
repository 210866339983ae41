"""Chats as prompts: messages through a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayk.errors import ConfigError
from rayk.values import told

Message = Mapping[str, Any]


def chat_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> list[int]:
    """Token ids of a chat. `variables` are the template's own. ConfigError where there is no template, or where it
    cannot make a prompt of these messages."""
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template; pass chat_template=, or send the prompt as text")
    if continue_final_message and add_generation_prompt:
        raise ConfigError("add_generation_prompt and continue_final_message exclude each other")
    if not messages:
        raise ConfigError("messages are empty; a chat has at least one")
    more = {} if chat_template is None else {"chat_template": chat_template}
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **more,
            **variables,
        )
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as raised:  # of the template: what it does not like it raises
        raise ConfigError(f"the chat template refuses these messages: {told(raised)}") from None
    return ids
