"""`rayk example-model`: a tiny Llama to try rayk on, made here and now: no hub, and the same for the same seed.

Its tokenizer (byte-level BPE) and its weights are trained on a few hundred generated chats, which takes seconds, so
that it answers what they ask, calls tools, and ends its answers. Its chat template is ChatML with hermes tool calls.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from rayk.errors import ConfigError

EXAMPLE_MODEL_EPILOG = "Example: rayk example-model ./tiny && rayk serve --model ./tiny"

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Norway": "Oslo",
    "Egypt": "Cairo", "Peru": "Lima", "Greece": "Athens", "Cuba": "Havana",
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLORS = {"grass": "green", "the sky": "blue", "snow": "white", "a lemon": "yellow", "coal": "black", "blood": "red"}
START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are a helpful assistant."
POSITIONS = 4096
LENGTH = 144  # tokens of a training row

TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n' }}{% endif %}
{{- 'Tools:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' and tools %}
{%- elif message['role'] == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def example_model(
    folder: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Another seed, another model.")] = 0,
    steps: Annotated[int, typer.Option(help="Of training; 0 leaves the weights random.", min=0)] = 300,
) -> None:
    """Write a tiny checkpoint to try rayk on: Llama, tokenizer, chat template."""
    started = perf_counter()
    parameters = write_example_model(folder, seed, steps)
    typer.echo(f"{folder}: a Llama of {parameters:,} parameters in {perf_counter() - started:.1f} s")


def write_example_model(folder: Path, seed: int = 0, steps: int = 300) -> int:
    """Write the checkpoint of that seed; its number of parameters. ConfigError where the folder holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not empty; name a new folder")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    torch.manual_seed(seed)
    try:
        tokenizer = _tokenizer([_text(chat) for chat in chats(random.Random(seed), 400)])
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids([END, TEXT_END]),
            pad_token_id=tokenizer.convert_tokens_to_ids(TEXT_END),
            tie_word_embeddings=True,
            dtype="float32",
        )
        model = LlamaForCausalLM(config)
        _train(model, tokenizer, random.Random(seed + 1), steps)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(each.numel() for each in model.parameters())


def chats(draw: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Chats as a template takes them: `messages`, and `tools` for some."""
    for _ in range(count):
        kind = draw.random()
        tools = None
        if kind < 0.3:
            country = draw.choice(list(CAPITALS))
            question = f"What is the capital of {country}?"
            answer = f"The capital of {country} is {CAPITALS[country]}."
        elif kind < 0.5:
            thing = draw.choice(list(COLORS))
            question, answer = f"What color is {thing}?", f"The color of {thing} is {COLORS[thing]}."
        elif kind < 0.65:
            first = draw.randrange(1, 6)
            last = draw.randrange(first + 1, 11)
            question = f"Count from {NUMBERS[first]} to {NUMBERS[last]}."
            answer = ", ".join(NUMBERS[first : last + 1]) + "."
        elif kind < 0.7:
            question, answer = draw.choice(
                (("Hello!", "Hello! How can I help?"), ("Who are you?", "I am a tiny model."))
            )
        else:
            city = draw.choice(list(CAPITALS.values()))
            tools = [WEATHER]
            question = f"What is the weather in {city}?"
            call = {"name": "get_weather", "arguments": {"city": city}}
            answer = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        yield {"messages": messages[draw.random() < 0.5 :], "tools": tools}


def _text(chat: dict[str, Any]) -> str:
    return "\n".join(each["content"] for each in chat["messages"]) + json.dumps(chat["tools"] or "")


def _tokenizer(texts: list[str]) -> Any:  # a PreTrainedTokenizerFast
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[TEXT_END, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made_fast: Any = PreTrainedTokenizerFast
    tokenizer = made_fast(tokenizer_object=made, eos_token=END, pad_token=TEXT_END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _train(model: Any, tokenizer: Any, draw: random.Random, steps: int) -> None:
    """Next tokens of generated chats, several in a row of LENGTH."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=max(2, steps), pct_start=0.1)
    rows = [
        tokenizer.apply_chat_template(chat["messages"], tools=chat["tools"], tokenize=False)
        for chat in chats(draw, 600)
    ]
    tokens = torch.tensor(tokenizer("".join(rows), add_special_tokens=False)["input_ids"])
    begins = torch.nonzero(tokens == tokenizer.convert_tokens_to_ids(START))[:, 0].tolist()
    starts = [at for at in begins if at + LENGTH < len(tokens)]
    for _ in range(steps):
        batch = torch.stack([tokens[at : at + LENGTH] for at in draw.choices(starts, k=7)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
