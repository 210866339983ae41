"""`rayk generate`: its flags, the prompts that they name, and the outputs printed. Serving is Cluster's."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayk.errors import ConfigError
from rayk.values import printable

if TYPE_CHECKING:
    from rayk.cluster import Cluster
    from rayk.dispatch.output import Output
    from rayk.sampling import SamplingParams

GENERATE_EPILOG = 'Example: rayk generate --model ./Qwen3-0.6B --prompt "The capital of France is" --max-new-tokens 16'
_PROMPTS, _SAMPLING, _CLUSTER, _OUTPUT = "Prompts", "Sampling", "Cluster", "Output"

log = logging.getLogger("rayk.engine")


class GenerateFormat(StrEnum):
    """How outputs are printed."""

    text = "text"
    json = "json"


def generate(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face checkpoint.", rich_help_panel=_PROMPTS)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text; several may follow each other.", rich_help_panel=_PROMPTS)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Or a file with a line {"id": .., "text": ..} or {"id": .., "tokens": [..]} for each; other fields of '
            "a line that are sampling settings (max_new_tokens, temperature, ..) go before the flags. A line with a "
            "field that there is not fails; the others are served.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", rich_help_panel=_SAMPLING)] = 64,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="The most likely token; so without these.", rich_help_panel=_SAMPLING),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="1 where another of these is given.", rich_help_panel=_SAMPLING)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the k most likely.", rich_help_panel=_SAMPLING)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of the most likely with this probability.", rich_help_panel=_SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Of those at least so likely, relative to the most likely.", rich_help_panel=_SAMPLING),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same again for the same seed.", rich_help_panel=_SAMPLING)
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes repetitions less likely.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends an answer; repeatable.", rich_help_panel=_SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens.", rich_help_panel=_SAMPLING)
    ] = False,
    timeout: Annotated[
        str | None, typer.Option(help="Time for each request: 30s, 2m.", rich_help_panel=_SAMPLING)
    ] = None,
    replicas: Annotated[int, typer.Option(help="Data-parallel replicas.", rich_help_panel=_CLUSTER)] = 1,
    runtime: Annotated[
        str, typer.Option(help="ray, or inline: everything in this process.", rich_help_panel=_CLUSTER)
    ] = "ray",
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join; otherwise one that runs, or a new one.", rich_help_panel=_CLUSTER),
    ] = None,
    router: Annotated[
        str,
        typer.Option(
            help="cost, round-robin, least-loaded, prefix, session, or module:Class.", rich_help_panel=_CLUSTER
        ),
    ] = "cost",
    chunk_size: Annotated[int, typer.Option(help="Tokens of one forward.", rich_help_panel=_CLUSTER)] = 512,
    max_batch_size: Annotated[int, typer.Option(help="Requests of one forward.", rich_help_panel=_CLUSTER)] = 64,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.", rich_help_panel=_CLUSTER)] = 128,
    pages: Annotated[
        int | None,
        typer.Option(help="Pages of a replica; as many as these prompts can use and fit.", rich_help_panel=_CLUSTER),
    ] = None,
    peer_copies: Annotated[
        bool,
        typer.Option(
            " /--no-peer-copies",
            show_default=False,
            help="Do not copy prefixes between replicas.",
            rich_help_panel=_CLUSTER,
        ),
    ] = True,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="A host tier for the replicas of each node: 16GiB, bytes, or 0.5 of what is free.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    disk_dir: Annotated[
        Path | None,
        typer.Option(help="A disk tier in this folder of each node, kept for the next run.", rich_help_panel=_CLUSTER),
    ] = None,
    disk_memory: Annotated[
        str | None, typer.Option(help="What --disk-dir may hold on each node.", rich_help_panel=_CLUSTER)
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda if there are enough GPUs.", rich_help_panel=_CLUSTER)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (as the checkpoint has it), float32, bfloat16.", rich_help_panel=_CLUSTER)
    ] = "auto",
    attention: Annotated[
        str | None, typer.Option(help="An attention backend; the fastest that can.", rich_help_panel=_CLUSTER)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of each replica on a CPU: 1, and inline all.", rich_help_panel=_CLUSTER),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    form: Annotated[
        GenerateFormat, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = GenerateFormat.text,
) -> int:
    """Text or token ids from a Hugging Face checkpoint on the cache. Exit code 1 when a request failed."""
    from rayk.cluster import Cluster
    from rayk.quantity import parse_duration
    from rayk.session import InferenceSession

    if more and not prompt:
        raise ConfigError(f"{more[0]!r} belongs to no flag; give text with --prompt")
    if (prompt is None) == (prompts is None):
        raise ConfigError("give either --prompt TEXT or --prompts FILE.jsonl")
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    common = _sampling(
        greedy,
        {name: value for name, value in chosen.items() if value is not None},
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    seconds = None if timeout is None else parse_duration(timeout)
    asked = _lines(prompts) if prompts is not None else [{"text": text} for text in [*(prompt or []), *(more or [])]]
    ids = [i if line.get("id") is None else line["id"] for i, line in enumerate(asked)]
    sampling = [_changed(common, line) for line in asked]
    if runtime == "inline" and address is not None:
        raise ConfigError("--address is for --runtime ray")
    options: dict[str, Any] = {} if runtime == "inline" else {"address": address}
    began = perf_counter()
    # Ray and transformers print to this process's stdout, which is for the outputs alone.
    with (
        redirect_stdout(sys.stderr),
        InferenceSession(runtime, **options) as session,
        Cluster(
            model,
            session,
            replicas=replicas,
            page_size=page_size,
            pages=pages,
            max_batch_size=max_batch_size,
            longest=_longest(asked, sampling) if pages is None else None,
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
            attention=attention,
            router=router,
            threads=threads,
            peer_copies=peer_copies,
            host_memory=host_memory,
            disk_dir=disk_dir,
            disk_memory=disk_memory,
        ) as cluster,
    ):
        started = perf_counter()
        log.info("%s: %d replica(s) ready in %.1f s", model, replicas, started - began)
        outputs = cluster.generate([_prompt(line, i) for i, line in enumerate(asked)], sampling, timeout=seconds)
        answer = report(cluster, ids, outputs, perf_counter() - started)
    _print(answer, outputs, form)
    return 1 if answer["requests"]["failed"] else 0


def _sampling(greedy: bool, chosen: dict[str, Any], **fixed: Any) -> SamplingParams:
    from rayk.sampling import SamplingParams

    if greedy and chosen:
        raise ConfigError(f"--greedy and --{next(iter(chosen)).replace('_', '-')} exclude each other")
    if chosen:
        chosen = {"temperature": 1.0} | chosen
    sampling = SamplingParams(**fixed, **chosen)
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
    import msgspec

    own = {name: line[name] for name in sampling.__struct_fields__ if name in line}
    if isinstance(own.get("stop"), str):
        own["stop"] = (own["stop"],)
    return msgspec.structs.replace(sampling, **own) if own else sampling


def _prompt(line: dict[str, Any], index: int) -> dict[str, Any]:
    """A line without its settings. What a prompt does not have stays in, and is refused with the request."""
    from rayk.sampling import SamplingParams

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
    import rayk
    from rayk.bench.measure import Latency

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
