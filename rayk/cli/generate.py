"""`rayk generate`: the prompts that its flags name, and the outputs printed. Serving is Cluster's."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import typer

import rayk
from rayk.bench.measure import Latency
from rayk.cli.cluster_flags import AS_GIVEN
from rayk.cli.flags import secret_of
from rayk.cli.generate_flags import GenerateFlags, GenerateFormat
from rayk.cluster import Cluster, attach
from rayk.dispatch.output import Output
from rayk.errors import ConfigError
from rayk.quantity import parse_duration
from rayk.sampling import SamplingParams
from rayk.session import InferenceSession
from rayk.values import printable

CHOSEN = ("temperature", "top_k", "top_p", "min_p", "seed")
"""Flags that --greedy excludes."""

log = logging.getLogger("rayk.engine")


def generate(flags: GenerateFlags) -> int:
    """Serve the prompts and print the outputs: 1 when a request failed."""
    if flags.more and not flags.prompt:
        raise ConfigError(f"{flags.more[0]!r} belongs to no flag; give text with --prompt")
    if (flags.prompt is None) == (flags.prompts is None):
        raise ConfigError("give either --prompt TEXT or --prompts FILE.jsonl")
    common = _sampling(flags)
    seconds = None if flags.timeout is None else parse_duration(flags.timeout)
    texts = [*(flags.prompt or []), *(flags.more or [])]
    asked = _lines(flags.prompts) if flags.prompts is not None else [{"text": text} for text in texts]
    ids = [i if line.get("id") is None else line["id"] for i, line in enumerate(asked)]
    sampling = [_changed(common, line) for line in asked]
    if flags.runtime == "inline" and flags.address is not None:
        raise ConfigError("--address is for --runtime ray")
    if (flags.model is None) == (flags.name is None):
        raise ConfigError("give either --model DIR or --name NAME of a Cluster that runs")
    if flags.secret_file is not None and flags.name is None:
        raise ConfigError("--secret-file is for --name")
    longest = _longest(asked, sampling) if flags.pages is None else None
    # Ray and transformers print to this process's stdout, which is for the outputs alone.
    with redirect_stdout(sys.stderr), _opened(flags, longest) as cluster:
        started = perf_counter()
        outputs = cluster.generate([_prompt(line, i) for i, line in enumerate(asked)], sampling, timeout=seconds)
        answer = report(cluster, ids, outputs, perf_counter() - started)
    _print(answer, outputs, flags.form)
    return 1 if answer["requests"]["failed"] else 0


@contextmanager
def _opened(flags: GenerateFlags, longest: int | None) -> Iterator[Cluster]:
    """The Cluster that runs under the name, or one for these prompts."""
    if flags.name is not None:
        with attach(flags.name, flags.address, secret=secret_of(flags.secret_file), log_to_driver=False) as cluster:
            yield cluster
        return
    assert flags.model is not None
    options: dict[str, Any] = {} if flags.runtime == "inline" else {"address": flags.address}
    began = perf_counter()
    with (
        InferenceSession(flags.runtime, **options) as session,
        Cluster(flags.model, session, longest=longest, **{name: getattr(flags, name) for name in AS_GIVEN}) as cluster,
    ):
        log.info("%s: %d replica(s) ready in %.1f s", flags.model, flags.replicas, perf_counter() - began)
        yield cluster


def _sampling(flags: GenerateFlags) -> SamplingParams:
    chosen = {name: value for name in CHOSEN if (value := getattr(flags, name)) is not None}
    if flags.greedy and chosen:
        raise ConfigError(f"--greedy and --{next(iter(chosen)).replace('_', '-')} exclude each other")
    if chosen:
        chosen = {"temperature": 1.0} | chosen
    sampling = SamplingParams(
        max_new_tokens=flags.max_new_tokens,
        repetition_penalty=flags.repetition_penalty,
        stop=tuple(flags.stop or ()),
        ignore_eos=flags.ignore_eos,
        **chosen,
    )
    problem = sampling.problem()
    if problem is not None:
        name, _, rest = problem.partition(" ")
        raise ConfigError(f"--{name.replace('_', '-')} {rest}")
    return sampling


def _lines(path: Path) -> list[dict[str, Any]]:
    """The file's requests. ConfigError names the line that is no JSON object; the rest is checked one by one."""
    try:
        raw = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None
    found: list[dict[str, Any]] = []
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ConfigError(f'{path}, line {number} is no object; lines are {{"id": .., "tokens": [..]}}')
        found.append(value)
    if not found:
        raise ConfigError(f"{path} has no prompts")
    return found


def _changed(sampling: SamplingParams, line: dict[str, Any]) -> SamplingParams:
    """The settings that a line has of its own go first. What is wrong with them is the matter of its request."""
    own = {name: line[name] for name in sampling.__struct_fields__ if name in line}
    if isinstance(own.get("stop"), str):
        own["stop"] = (own["stop"],)
    return msgspec.structs.replace(sampling, **own) if own else sampling


def _prompt(line: dict[str, Any], index: int) -> dict[str, Any]:
    """A line without its settings. What a prompt does not have stays in, and is refused with the request."""
    fields = {name: value for name, value in line.items() if name not in SamplingParams.__struct_fields__}
    return fields | {"id": index if line.get("id") is None else line["id"]}


def _longest(asked: Sequence[dict[str, Any]], sampling: Sequence[SamplingParams]) -> int:
    """At least as many tokens as any of the requests can come to. A token has at least a byte of text."""
    longest = 1
    for line, each in zip(asked, sampling, strict=True):
        prompt = line.get("tokens", line.get("text"))
        size = len(prompt) if isinstance(prompt, list) else 0
        if isinstance(prompt, str):
            size = len(prompt.encode("utf-8", "surrogatepass")) + 8
        new = each.max_new_tokens if isinstance(each.max_new_tokens, int) else 0
        longest = max(longest, size + max(new, 0))
    return longest


def report(cluster: Cluster, ids: Sequence[Any], outputs: Sequence[Output], seconds: float) -> dict[str, Any]:
    """The JSON of a run: outputs in the order of the prompts, totals, latencies and rates."""
    latency = {"ttft": Latency(), "itl": Latency(), "e2e": Latency()}
    for output in outputs:
        if output.ttft is not None:
            latency["ttft"].add(output.ttft)
        for gap, count in output.gaps:
            latency["itl"].add(gap / count, count)
        if output.error is None:
            latency["e2e"].add(output.seconds)
    generated = sum(len(output.tokens) for output in outputs)
    failed = sum(output.error is not None for output in outputs)
    good = [output for output in outputs if output.error is None]
    return {
        "command": "generate",
        "version": rayk.__version__,
        "outputs": [_output(given, output) for given, output in zip(ids, outputs, strict=True)],
        "requests": {
            "submitted": len(outputs),
            "completed": len(good),
            "failed": failed,
            "preempted": sum(output.preemptions for output in outputs),
            "retried": sum(output.retries for output in outputs),
        },
        "tokens": {
            "prompt": sum(output.prompt_length for output in good),
            "cached": sum(output.cached_tokens for output in good),
            "computed": sum(output.prompt_length - output.cached_tokens for output in good),
            "generated": generated,
        },
        "cached_by_tier": {
            tier: sum(output.cached[at] for output in good)
            for at, tier in enumerate(("device", "peer", "host", "disk"))
        },
        "latency": {
            name: dict(zip(("p50", "p90", "p99"), each.quantiles([0.5, 0.9, 0.99]), strict=True))
            for name, each in latency.items()
            if each
        },
        "throughput": {
            "requests_per_s": len(good) / seconds,
            "prompt_tokens_per_s": sum(output.prompt_length for output in good) / seconds,
            "generated_tokens_per_s": generated / seconds,
        },
        "replicas": [
            {
                "index": facts.replica,
                "node": facts.node,
                "device": facts.device,
                "attention": facts.backend,
                "pages": facts.pages,
                "memory": {part.component: {"planned": part.planned, "taken": part.taken} for part in facts.memory},
                "requests": sum(output.replica == facts.replica for output in outputs),
            }
            for facts in cluster.facts
        ],
        "elapsed": seconds,
    }


def _output(given: Any, output: Output) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": given,
        "tokens": output.tokens,
        "text": output.text,
        "cached_tokens": output.cached_tokens,
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        found["logprobs"] = [
            {"chosen": _finite(each.chosen), "top_ids": list(each.top_ids), "top": [_finite(one) for one in each.top]}
            for each in output.logprobs
        ]
    if output.error is not None:
        found["error"] = {"kind": type(output.error).__name__, "message": str(output.error)}
    return found


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def _print(answer: dict[str, Any], outputs: Sequence[Output], form: GenerateFormat) -> None:
    if form is GenerateFormat.json:
        typer.echo(json.dumps(answer))
        return
    for output in outputs:
        if len(outputs) > 1:
            typer.echo(f"--- {printable(output.id)} ({output.finish_reason}, {output.cached_tokens} tokens cached)")
        if output.error is not None:
            typer.echo(f"rayk generate: {output.error}", err=True)
        typer.echo(printable(output.text) if output.text is not None else " ".join(map(str, output.tokens)))
    tokens, rates = answer["tokens"], answer["throughput"]
    log.info(
        "%d prompt tokens (%d cached), %d generated in %.2f s: %.1f tokens/s",
        tokens["prompt"],
        tokens["cached"],
        tokens["generated"],
        answer["elapsed"],
        rates["generated_tokens_per_s"],
    )
