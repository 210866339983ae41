"""`rayk serve`: a model behind the OpenAI API, and `rayk batch`: a file of requests. What they do is rayk.server's."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
from typing import TYPE_CHECKING

from rayk.errors import ConfigError
from rayk.quantity import parse_duration, parse_size

if TYPE_CHECKING:
    from rayk.cli.serve_flags import BatchFlags, ServeFlags

MODULES = ("starlette", "uvicorn", "prometheus_client")

log = logging.getLogger("rayk.server")


def serve(flags: ServeFlags) -> int:
    """Serve until a signal ends it: 1 when it could not begin. One that comes before is obeyed when it has started."""
    check_installed("rayk serve")
    from rayk.protocol.admission import AdmissionPolicy
    from rayk.server.process import run, starting
    from rayk.server.settings import Limits, ServerSettings, read_keys

    settings = ServerSettings(
        models=flags.models,
        keys=read_keys(flags.api_key_file) if flags.api_key_file is not None else (),
        isolate_keys=flags.isolate_tenants,
        request_timeout=None if flags.request_timeout is None else parse_duration(flags.request_timeout),
        grace=parse_duration(flags.grace),
        tool_parser=flags.tool_parser,
        reasoning_parser=flags.reasoning_parser,
        vllm_metrics=flags.vllm_metrics,
        limits=Limits(body_bytes=parse_size(flags.max_body, 0), requests=flags.max_requests),
    )
    policy = None
    if flags.max_waiting is not None:
        policy = AdmissionPolicy(max_waiting=flags.max_waiting, patience=parse_duration(flags.patience))

    def say(port: int) -> None:
        log.info("http://%s:%d/v1 serves %s", flags.host, port, ", ".join(settings.models))
        if stopped():
            signal.raise_signal(signal.SIGTERM)  # the server has its handler by now

    more = {name: getattr(flags, name) for name in ("isolate_tenants", "vllm_metrics", "trace_share")}
    with starting() as stopped, flags.open(admission=policy, **more) as cluster:
        if stopped():
            log.info("stopped before it served anything")
            return 0
        return 0 if run(cluster, settings, flags.host, flags.port, say) else 1


def batch(flags: BatchFlags) -> int:
    """Answer the rows of a file that have no answer yet: 1 when one of all rows failed, or when it was stopped."""
    check_installed("rayk batch")
    from rayk.server.batch import Batch
    from rayk.server.settings import ServerSettings

    settings = ServerSettings(
        models=flags.models, tool_parser=flags.tool_parser, reasoning_parser=flags.reasoning_parser
    )
    job = Batch(flags.input, flags.output, flags.tries)
    with flags.open() as cluster:
        done = job.run(cluster, settings, flags.concurrency or 4 * flags.replicas * flags.max_batch_size)
    if flags.form == "json":
        print(json.dumps({"command": "batch", **done}))
    return 1 if done["failed"] or done["left"] else 0


def check_installed(command: str) -> None:
    """ConfigError that says how to get what the server needs and is not there."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{command} needs {', '.join(missing)}: pip install 'rayk[server]'")
