"""The flags of `rayk generate`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rayk.cli.cluster_flags import EngineFlags, PlaceFlags, served
from rayk.cli.flags import SECRET_TEXT, group

GENERATE_EPILOG = 'Example: rayk generate --model ./Qwen3-0.6B --prompt "The capital of France is" --max-new-tokens 16'

given, sampled, printed = group("Prompts"), group("Sampling"), group("Output")


class GenerateFormat(StrEnum):
    """How outputs are printed."""

    text = "text"
    json = "json"


@dataclass(frozen=True, kw_only=True)
class AskedFlags:
    """What is asked, and how it is answered."""

    model: Annotated[Path | None, given("Folder of a Hugging Face checkpoint.")] = None
    name: Annotated[str | None, given("Or the name of a Cluster that runs; it has its own settings.")] = None
    secret_file: Annotated[Path | None, given(SECRET_TEXT)] = None
    prompt: Annotated[list[str] | None, given("Text; several may follow each other.")] = None
    prompts: Annotated[
        Path | None,
        given(
            'Or a file with a line {"id": .., "text": ..} or {"id": .., "tokens": [..]} for each; other fields of '
            "a line that are sampling settings (max_new_tokens, temperature, ..) go before the flags. A line with a "
            "field that there is not fails; the others are served."
        ),
    ] = None
    max_new_tokens: Annotated[int, sampled("Most tokens of an answer.")] = 64
    greedy: Annotated[bool, sampled("The most likely token; so without these.", "--greedy")] = False
    temperature: Annotated[float | None, sampled("1 where another of these is given.")] = None
    top_k: Annotated[int | None, sampled("Of the k most likely.")] = None
    top_p: Annotated[float | None, sampled("Of the most likely with this probability.")] = None
    min_p: Annotated[float | None, sampled("Of those at least so likely, relative to the most likely.")] = None
    seed: Annotated[int | None, sampled("The same again for the same seed.")] = None
    repetition_penalty: Annotated[float, sampled("Above 1 makes repetitions less likely.")] = 1.0
    stop: Annotated[list[str] | None, sampled("A string that ends an answer; repeatable.")] = None
    ignore_eos: Annotated[bool, sampled("Go on after end-of-sequence tokens.", "--ignore-eos")] = False
    timeout: Annotated[str | None, sampled("Time for each request: 30s, 2m.")] = None


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(EngineFlags, PlaceFlags, AskedFlags):  # the last one's come first in --help
    """Text or token ids from a Hugging Face checkpoint on the cache. Exit code 1 when a request failed."""

    pages: Annotated[int | None, served("Pages of a replica; as many as these prompts can use and fit.")] = None
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None
    form: Annotated[GenerateFormat, printed("json: one object on stdout.", "--format")] = GenerateFormat.text
