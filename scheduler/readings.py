"""Readings of a scheduler: who is there, who waits, what was copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rayk.metrics.reading import Labels, Reading, reading
from rayk.protocol.admission import AdmissionState
from rayk.protocol.from_replica import LineState
from rayk.scheduler.core import SchedulerCore
from rayk.scheduler.membership import State
from rayk.scheduler.serving.core import ServingCore
from rayk.scheduler.supervisor import Supervisor


def read_scheduler(core: SchedulerCore, labels: Labels) -> Iterator[Reading]:
    """Of a manager's."""
    admission = core.controller.state() if core.controller is not None else None
    yield from _read(core.members.states, core.supervisor, core.links.table(), admission, labels)
    yield reading("rayk_drivers", len(core.leases.drivers), labels)
    yield reading("rayk_placed_requests", sum(core.placer.counts()[0]), labels)
    yield reading("rayk_waiting_requests", admission.waiting if admission is not None else 0, labels)


def read_serving(core: ServingCore, drivers: int, labels: Labels) -> Iterator[Reading]:
    """Of a Cluster's, which so many drivers use."""
    lines = core.router.fetching.links.table() if core.router.fetching is not None else []
    yield from _read(core.members.states, core.supervisor, lines, core.admission_state(), labels)
    yield reading("rayk_drivers", drivers, labels)
    placed = sum(request.replica >= 0 for request in core.requests)
    yield reading("rayk_placed_requests", placed, labels)
    yield reading("rayk_waiting_requests", len(core.waiting), labels)
    yield reading("rayk_retries_total", core.retries, labels)
    yield reading("rayk_placement_seconds", core.placing.read(), labels)


def _read(
    states: Sequence[State],
    supervisor: Supervisor,
    lines: Sequence[LineState],
    admission: AdmissionState | None,
    labels: Labels,
) -> Iterator[Reading]:
    for replica, now in enumerate(states):
        for state in State:
            yield reading("rayk_replica_state", float(now == state), labels, replica_idx=str(replica), state=str(state))
    yield reading("rayk_replicas_lost_total", supervisor.lost, labels)
    yield reading("rayk_replacements_total", supervisor.replaced, labels)
    given_up = sum(each.given_up for each in supervisor.replacements())
    yield reading("rayk_replacements_given_up", given_up, labels)
    copies, size, failed = Counter[str](), Counter[str](), Counter[str]()
    for line in lines:
        copies[line.kind] += line.copies
        size[line.kind] += line.bytes
        failed[line.kind] += line.failures
    for kind in copies:
        yield reading("rayk_copies_total", copies[kind], labels, kind=kind)
        yield reading("rayk_copied_bytes_total", size[kind], labels, kind=kind)
        yield reading("rayk_transfers_failed_total", failed[kind], labels, kind=kind)
    if admission is not None:
        yield reading("rayk_admissions_total", admission.admitted, labels, outcome="admitted")
        yield reading("rayk_admissions_total", admission.refused, labels, outcome="refused")
