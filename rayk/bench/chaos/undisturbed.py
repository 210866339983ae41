"""The same requests without faults: every token that a disturbed Cluster answered with has to be that of another one,
in this process, that nothing befell."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from rayk.sampling import SamplingParams
from rayk.workloads.request import IntArray

log = logging.getLogger("rayk.bench")

if TYPE_CHECKING:
    from rayk.cluster import Cluster


class Asked(msgspec.Struct, frozen=True):
    """A request of a Cluster and its answer. `prompt`: [length] int32."""

    request_id: str
    prompt: IntArray
    sampling: SamplingParams
    tokens: list[int]
    retries: int = 0  # replicas that it lost


class Comparison(msgspec.Struct, frozen=True, omit_defaults=True):
    """Requests that were asked again, and how many had other tokens; `first` says where the first one differs."""

    requests: int
    differing: int
    first: str | None = None


def compare(cluster: Cluster, asked: Sequence[Asked]) -> Comparison:
    """Ask `cluster` the same."""
    outputs = cluster.generate(
        [{"id": each.request_id, "tokens": each.prompt} for each in asked], [each.sampling for each in asked]
    )
    differing, first = 0, None
    for each, output in zip(asked, outputs, strict=True):
        if output.tokens != each.tokens:
            differing += 1
            same = [one == other for one, other in zip(each.tokens, output.tokens, strict=False)]
            at = same.index(False) if False in same else len(same)
            lengths = f"{len(each.tokens)} and {len(output.tokens)} tokens, {each.retries} replicas lost"
            log.warning("request %r: %s and undisturbed %s (%s)", each.request_id, each.tokens, output.tokens, lengths)
            first = first or f"request {each.request_id!r} at token {at} ({lengths}; {output.error or 'no error'})"
    return Comparison(len(asked), differing, first)
