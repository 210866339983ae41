"""`rayk serve`: a model behind the OpenAI API. What it does is rayk.server's."""

from __future__ import annotations

import importlib.util
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from rayk.errors import ConfigError

SERVE_EPILOG = "Example: rayk example-model ./tiny && rayk serve --model ./tiny --port 8000"
_SERVER, _LIMITS, _CLUSTER = "Server", "Limits", "Cluster"
MODULES = ("starlette", "uvicorn", "prometheus_client")

log = logging.getLogger("rayk.server")


def serve(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face checkpoint.", rich_help_panel=_SERVER)],
    host: Annotated[str, typer.Option(help="Address to listen at.", rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", rich_help_panel=_SERVER)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys, one a line; clients need one of them.", rich_help_panel=_SERVER),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients use; several may follow each other.", rich_help_panel=_SERVER),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(help="How the model writes tool calls: hermes, qwen, llama3_json.", rich_help_panel=_SERVER),
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="How it marks reasoning: qwen3, deepseek_r1.", rich_help_panel=_SERVER)
    ] = None,
    grace: Annotated[
        str, typer.Option(help="How long streams may go on after SIGTERM.", rich_help_panel=_SERVER)
    ] = "30s",
    request_timeout: Annotated[
        str | None, typer.Option(help="Longest time of a request: 30s, 2m.", rich_help_panel=_LIMITS)
    ] = None,
    max_requests: Annotated[
        int, typer.Option(help="Requests that are open at once; more get 429.", rich_help_panel=_LIMITS)
    ] = 4096,
    max_body: Annotated[str, typer.Option(help="Longest body: 16MiB.", rich_help_panel=_LIMITS)] = "16MiB",
    max_waiting: Annotated[
        int | None,
        typer.Option(help="Requests that may wait for room; more get 429. No limit.", rich_help_panel=_LIMITS),
    ] = None,
    patience: Annotated[
        str, typer.Option(help="With --max-waiting, how long one waits for room.", rich_help_panel=_LIMITS)
    ] = "30s",
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
        int | None, typer.Option(help="Pages of a replica; as many as fit.", rich_help_panel=_CLUSTER)
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="A host tier on each node: 16GiB, or 0.5.", rich_help_panel=_CLUSTER)
    ] = None,
    disk_dir: Annotated[
        Path | None, typer.Option(help="A disk tier in this folder of each node.", rich_help_panel=_CLUSTER)
    ] = None,
    disk_memory: Annotated[
        str | None, typer.Option(help="What --disk-dir may hold on each node.", rich_help_panel=_CLUSTER)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.", rich_help_panel=_CLUSTER)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel=_CLUSTER)] = "auto",
    attention: Annotated[str | None, typer.Option(help="An attention backend.", rich_help_panel=_CLUSTER)] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each replica on a CPU.", rich_help_panel=_CLUSTER)
    ] = None,
) -> int:
    """Serve a model over HTTP, as OpenAI's API has it, until SIGTERM. Exit code 1 when it could not begin."""
    check_installed()
    from rayk.cluster import Cluster
    from rayk.protocol.admission import AdmissionPolicy
    from rayk.quantity import parse_duration, parse_size
    from rayk.server.process import run
    from rayk.server.settings import Limits, ServerSettings, read_keys
    from rayk.session import InferenceSession

    if runtime == "inline" and address is not None:
        raise ConfigError("--address is for --runtime ray")
    settings = ServerSettings(
        models=tuple(served_model_name or (model.expanduser().resolve().name,)),
        keys=read_keys(api_key_file) if api_key_file is not None else (),
        request_timeout=None if request_timeout is None else parse_duration(request_timeout),
        grace=parse_duration(grace),
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        limits=Limits(body_bytes=parse_size(max_body, 0), requests=max_requests),
    )
    policy = None
    if max_waiting is not None:
        policy = AdmissionPolicy(max_waiting=max_waiting, patience=parse_duration(patience))
    options: dict[str, Any] = {} if runtime == "inline" else {"address": address}
    began = perf_counter()
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
            chunk_size=chunk_size,
            device=device,
            dtype=dtype,
            attention=attention,
            router=router,
            threads=threads,
            admission=policy,
            host_memory=host_memory,
            disk_dir=disk_dir,
            disk_memory=disk_memory,
        ) as cluster,
    ):
        log.info("%s: %d replica(s) ready in %.1f s", model, replicas, perf_counter() - began)

        def say(found: int) -> None:
            log.info("http://%s:%d/v1 serves %s", host, found, ", ".join(settings.models))

        return 0 if run(cluster, settings, host, port, say) else 1


def check_installed() -> None:
    """ConfigError that says how to get what the server needs and is not there."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"rayk serve needs {', '.join(missing)}: pip install 'rayk[server]'")
