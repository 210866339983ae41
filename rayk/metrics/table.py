"""All metrics of rayk: the one place where their names, kinds, units, labels and meanings stand.

Exporters, the table of docs/metrics.md and the check of the dashboard's expressions are made from it. Counters end in
`_total` and count since the start of the process that reports them. Nobody's labels have ids of requests or names of
tenants: there are too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
MICROSECONDS = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 1.0)
REPLICA = ("cluster", "replica_idx", "node")
CLUSTER = ("cluster",)


class Metric(NamedTuple):
    """One metric. `kind`: "counter", "gauge" or "histogram", which has `buckets` (upper bounds)."""

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    help: str
    buckets: Sequence[float] = ()


def _seconds(name: str, labels: tuple[str, ...], text: str, buckets: Sequence[float] = SECONDS) -> Metric:
    return Metric(name, "histogram", "seconds", labels, text, buckets)


_ALL = (
    # of a replica, by itself
    Metric("rayk_pages", "gauge", "pages", (*REPLICA, "state"),
           "Pages of a replica: used by requests, cached without a holder, or free and empty."),
    Metric("rayk_requests", "gauge", "requests", (*REPLICA, "phase"),
           "Requests at a replica: waiting and running; claimed ones of a manager."),
    Metric("rayk_prefix_tokens_queried_total", "counter", "tokens", REPLICA,
           "Prompt tokens for which a cached prefix was looked for (of a manager, all that alloc was asked for)."),
    Metric("rayk_prefix_tokens_hit_total", "counter", "tokens", (*REPLICA, "tier"),
           "Of these, found cached: on the device, copied from a peer, in the host tier or on disk."),
    Metric("rayk_evictions_total", "counter", "pages", REPLICA, "Cached pages given up for new content."),
    Metric("rayk_tier_bytes_total", "counter", "bytes", (*REPLICA, "tier", "direction"),
           "Bytes that went out to a tier below the device pages, or came in from it."),
    Metric("rayk_tier_pages", "gauge", "pages", (*REPLICA, "tier", "state"),
           "Pages of the tiers of a replica's node, which its replicas share."),
    Metric("rayk_tier_loads_failed_total", "counter", "pages", REPLICA,
           "Pages that a tier had and that did not arrive: they were computed."),
    Metric("rayk_tier_files_rejected_total", "counter", "files", REPLICA,
           "Page files that were damaged, foreign or of another version."),
    Metric("rayk_copied_pages_total", "counter", "pages", REPLICA, "Pages copied in from other replicas."),
    _seconds("rayk_claim_seconds", REPLICA, "Time of a claim inside a replica of a manager.", MICROSECONDS),
    _seconds("rayk_alloc_seconds", REPLICA, "Time of an admission's alloc in a replica of a manager.", MICROSECONDS),
    # of a replica's engine
    Metric("rayk_tokens_total", "counter", "tokens", (*REPLICA, "kind"),
           "Tokens of an engine: prompt (at first admissions), generated, recomputed (after preemptions)."),
    Metric("rayk_engine_steps_total", "counter", "steps", REPLICA, "Forwards."),
    Metric("rayk_requests_ended_total", "counter", "requests", (*REPLICA, "outcome"),
           "Requests that ended at an engine: finished or failed (cancelled and late ones too)."),
    Metric("rayk_preemptions_total", "counter", "requests", REPLICA, "Requests that made way for others."),
    _seconds("rayk_queue_seconds", REPLICA, "From a request's arrival at its replica to its admission there."),
    _seconds("rayk_ttft_seconds", REPLICA, "From a request's arrival at its replica to its first token."),
    _seconds("rayk_itl_seconds", REPLICA, "Between tokens: how long the rows of a decode step waited, a step each."),
    _seconds("rayk_e2e_seconds", REPLICA, "From a request's arrival at its replica to its end there, errors left out."),
    # of the scheduler
    Metric("rayk_replica_state", "gauge", "1", ("cluster", "replica_idx", "state"),
           "1 for the state that a replica is in, 0 for the others."),
    Metric("rayk_replicas_lost_total", "counter", "replicas", CLUSTER, "Replicas that died or were taken out."),
    Metric("rayk_replacements_total", "counter", "replicas", CLUSTER, "Replicas that took the place of a lost one."),
    Metric("rayk_replacements_given_up", "gauge", "replicas", CLUSTER, "Lost replicas that are not tried again."),
    Metric("rayk_drivers", "gauge", "drivers", CLUSTER, "Drivers that are attached."),
    Metric("rayk_waiting_requests", "gauge", "requests", CLUSTER, "Requests that wait at the scheduler for a place."),
    Metric("rayk_placed_requests", "gauge", "requests", CLUSTER, "Requests that have a place at a replica."),
    Metric("rayk_admissions_total", "counter", "requests", (*CLUSTER, "outcome"),
           "What became of requests under an admission policy: admitted, or refused with a time to try again."),
    Metric("rayk_retries_total", "counter", "requests", CLUSTER,
           "Requests placed again, since their replica was lost or handed them over."),
    _seconds("rayk_placement_seconds", CLUSTER, "From a request's arrival at the scheduler of a Cluster to its place."),
    Metric("rayk_copies_total", "counter", "copies", (*CLUSTER, "kind"),
           "Copies of prefixes between replicas, by the kind of line."),
    Metric("rayk_copied_bytes_total", "counter", "bytes", (*CLUSTER, "kind"), "Bytes of these."),
    Metric("rayk_transfers_failed_total", "counter", "copies", (*CLUSTER, "kind"), "Copies that did not arrive."),
    # of an HTTP server
    Metric("rayk_server_requests_total", "counter", "requests", ("status",), "Requests for tokens, by HTTP status."),
    Metric("rayk_server_tokens_total", "counter", "tokens", ("kind",), "Their tokens: prompt, cached, generated."),
    Metric("rayk_server_open_requests", "gauge", "requests", (), "Requests for tokens that are not over."),
    _seconds("rayk_server_request_seconds", (), "Until the last byte of an answer."),
    _seconds("rayk_server_first_token_seconds", (), "Until its first token."),
)  # fmt: skip
METRICS = {each.name: each for each in _ALL}
"""By name."""

VLLM = ("model_name", "engine")


class Alias(NamedTuple):
    """A metric as vLLM names it: readings of rayk's metric `of` whose labels are among `where`, added up by replica;
    `share`: as a part of all readings of that replica."""

    metric: Metric
    of: str
    where: tuple[tuple[str, str], ...] = ()
    share: bool = False


def _alias(name: str, unit: str, of: str, text: str, *where: tuple[str, str], share: bool = False) -> Alias:
    source = METRICS[of]
    return Alias(Metric(f"vllm:{name}", source.kind, unit, VLLM, text, source.buckets), of, where, share)


ALIASES = (
    _alias("num_requests_running", "requests", "rayk_requests", "Requests in the batch.", ("phase", "running")),
    _alias("num_requests_waiting", "requests", "rayk_requests", "Requests that wait.", ("phase", "waiting")),
    _alias("kv_cache_usage_perc", "1", "rayk_pages", "Part of the pages in use.", ("state", "used"), share=True),
    _alias("prefix_cache_queries_total", "tokens", "rayk_prefix_tokens_queried_total", "Prompt tokens looked for."),
    _alias("prefix_cache_hits_total", "tokens", "rayk_prefix_tokens_hit_total", "Of these, found cached."),
    _alias("prompt_tokens_total", "tokens", "rayk_tokens_total", "Prompt tokens.", ("kind", "prompt")),
    _alias("generation_tokens_total", "tokens", "rayk_tokens_total", "Generated tokens.", ("kind", "generated")),
    _alias("num_preemptions_total", "requests", "rayk_preemptions_total", "Preemptions."),
    _alias("request_success_total", "requests", "rayk_requests_ended_total", "Requests.", ("outcome", "finished")),
    _alias("time_to_first_token_seconds", "seconds", "rayk_ttft_seconds", "Seconds to the first token."),
    _alias("inter_token_latency_seconds", "seconds", "rayk_itl_seconds", "Seconds between tokens."),
    _alias("e2e_request_latency_seconds", "seconds", "rayk_e2e_seconds", "Seconds of a whole request."),
    _alias("request_queue_time_seconds", "seconds", "rayk_queue_seconds", "Seconds until admission."),
)
"""What dashboards made for vLLM look for; by a flag only."""


def markdown() -> str:
    """The table of docs/metrics.md."""
    lines = ["| metric | kind | unit | labels | meaning |", "|---|---|---|---|---|"]
    for each in _ALL:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        lines.append(f"| `{each.name}` | {each.kind} | {each.unit} | {labels} | {each.help} |")
    lines += ["", "| vLLM's name | is | |", "|---|---|---|"]
    for alias in ALIASES:
        where = ",".join(f'{label}="{value}"' for label, value in alias.where)
        of = f"{alias.of}{{{where}}}" if where else alias.of
        lines.append(f"| `{alias.metric.name}` | `{of}` | {'as a part of all states' if alias.share else ''} |")
    return "\n".join(lines)
