"""The flags of `rayk serve` and `rayk batch`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rayk.cli.cluster_flags import ClusterFlags
from rayk.cli.flags import FORMAT, Format, group

SERVE_EPILOG = "Example: rayk example-model ./tiny && rayk serve --model ./tiny --port 8000"
BATCH_EPILOG = "Example: rayk batch --model ./tiny --input requests.jsonl --output answers.jsonl"

server, limits, parsed, files = group("Server"), group("Limits"), group("Parsers"), group("Files")


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(ClusterFlags):
    """How answers are read."""

    served_model_name: Annotated[
        list[str] | None, parsed("Name that requests use; several may follow each other. The folder's.")
    ] = None
    tool_parser: Annotated[str | None, parsed("How the model writes tool calls: hermes, qwen, llama3_json.")] = None
    reasoning_parser: Annotated[str | None, parsed("How it marks reasoning: qwen3, deepseek_r1.")] = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the model."""
        return tuple(self.served_model_name or (self.model.expanduser().resolve().name,))


@dataclass(frozen=True, kw_only=True)
class ServeFlags(AnswerFlags):
    """Serve a model over HTTP, as OpenAI's API has it, until SIGTERM. Exit code 1 when it could not begin."""

    host: Annotated[str, server("Address to listen at.")] = "127.0.0.1"
    port: Annotated[int, server("Port; 0 takes a free one.")] = 8000
    trace_share: Annotated[float, server("Share of requests, 0 to 1, whose spans OpenTelemetry gets.")] = 0.0
    vllm_metrics: Annotated[bool, server("Metrics under vLLM's names, too.", "--vllm-metrics")] = False
    api_key_file: Annotated[Path | None, server("Keys, one a line; clients need one of them.")] = None
    grace: Annotated[str, server("How long streams may go on after SIGTERM.")] = "30s"
    request_timeout: Annotated[str | None, limits("Longest time of a request: 30s, 2m.")] = None
    max_requests: Annotated[int, limits("Requests that are open at once; more get 429.")] = 4096
    max_body: Annotated[str, limits("Longest body.")] = "16MiB"
    max_waiting: Annotated[int | None, limits("Requests that may wait for room; more get 429. No limit.")] = None
    isolate_tenants: Annotated[
        bool, limits("No request reuses pages of one with another API key or user (its field).", "--isolate-tenants")
    ] = False
    patience: Annotated[str, limits("With --max-waiting, how long one waits for room.")] = "30s"


@dataclass(frozen=True, kw_only=True)
class BatchFlags(AnswerFlags):
    """Answer a file of requests (OpenAI's batch form). Goes on where it stopped; exit code 1 when a row failed."""

    input: Annotated[Path, files("Requests, one a line.")]
    output: Annotated[Path, files("Answers, one a line, in the order of their ends. What is there is kept.")]
    concurrency: Annotated[int | None, files("Rows at a time; four batches a replica.")] = None
    tries: Annotated[int, files("Of a row that failed for no fault of its own.")] = 3
    form: Annotated[Format, FORMAT] = Format.table
