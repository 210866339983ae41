"""What a manager tells of its replicas, and how they come and go: the part of its calls that places nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from rayk.context import TextContext
from rayk.errors import ConfigError
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_hash import Mask
from rayk.kvcache.tick import HitCounts, PrefixCacheReset
from rayk.params import require_at_least
from rayk.protocol.lines import PathState
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad
from rayk.scheduler.supervisor import Replacement

if TYPE_CHECKING:
    from rayk.manager.calls import Calls
    from rayk.manager.cluster_view import Script
    from rayk.manager.local import LocalCalls

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class DeviceBuffer:
    """A replica's KV tensors: per leaf its TP shards' values, then their scales. Under Ray they are meta tensors."""

    all_buffers: list[torch.Tensor]


class ManagerQueries(ABC):
    """Each call checks its arguments, and gives what the call of that name of the manager's `Calls` results in."""

    @abstractmethod
    def _at(self, replica_idx: int) -> Calls | LocalCalls:
        """For a call about one replica: ReplicaIndexError, or ReplicaRemovedError, unless it runs."""

    @abstractmethod
    def _all(self) -> Calls | LocalCalls:
        """For a call about all of them: ClosedError after the end."""

    @abstractmethod
    def _run(self, call: Script[T] | T) -> T:
        """The result of a call: of a script, which it has carried out, or what a local call gave."""

    @abstractmethod
    def _then(self, call: Script[T] | T, then: Callable[[T], R]) -> R:
        """What `then` makes of the result of a call."""

    # -- replicas that come and go ---------------------------------------------------------------------------

    @property
    def num_replicas(self) -> int:
        """Replica indices in use or used before, holes of removed ones included: lists per replica have so many."""
        return self._all().indices

    def add_replicas(self, n: int = 1, timeout: float = 60.0) -> list[int]:
        """Start `n` more replicas while requests run, and return their indices; the router uses them from then on.

        Lost ones are replaced first, at their index, empty; others get the next indices. On Ray, nodes are measured and
        planned as at the start, and each new replica asks for a placement group of its own, for which an autoscaler
        may start a node within `timeout` seconds. PlanError says what is missing; then nothing is left behind.
        """
        require_at_least(1, n=n)
        return self._run(self._all().add_replicas(n, timeout))

    def replacements(self) -> list[Replacement]:
        """What is done about lost replicas: why each was lost or could not be started again, how often in a row that
        failed, whether it is given up, and seconds until the next attempt. Empty with replace=False, and inline."""
        return self._run(self._all().replacements())

    def drain_replica(self, replica_idx: int, deadline: float | None = None, handover: bool = True) -> Drained:
        """Give a replica no new requests. Those that it has go on; without a `deadline` they are named in the result.

        With one, it waits so many seconds for their release (0: not at all), then moves those that are left to other
        replicas, with what is cached of them. holder() says where a request is; calls that name its old replica raise
        NotClaimedError with the new one in `holder`. Its next alloc() there moves its window back to what was copied.
        DrainError names what could not be moved and why; the replica drains on. ReplicaStateError for a lost one.
        """
        return self._run(self._at(replica_idx).drain_replica(replica_idx, deadline, handover))

    def resume_replica(self, replica_idx: int) -> None:
        """Let a draining replica take requests again."""
        return self._run(self._at(replica_idx).resume_replica(replica_idx))

    def remove_replica(self, replica_idx: int) -> Removed:
        """End a replica on which no request is claimed, or a lost one, and give its place back. Its index stays a hole.

        DrainError, and nothing changes, while it has requests. Before it goes, the others are offered what it has
        cached, what was used last first; they take what fits into empty pages, for half a minute at most, and go on
        serving. The result says how much that was. Where there are tiers, these have its pages.
        """
        return self._run(self._at(replica_idx).remove_replica(replica_idx))

    def replica_loads(self) -> list[ReplicaLoad]:
        """How each replica index stands and what it carries; what rayk.desired_replicas() goes by."""
        return self._run(self._all().replica_loads())

    def replica_states(self) -> list[str]:
        """How each replica index stands: planned, starting, ready, draining, lost or removed."""
        return self._then(self._all().replica_loads(), lambda loads: [load.state for load in loads])

    def path_states(self) -> list[PathState]:
        """What carries messages to each replica that runs: a socket, or calls and why."""
        return self._all().path_states()

    def holder(self, request_id: str) -> int | None:
        """The replica that has this driver's request, as far as it knows; None when it has no claim of it."""
        return self._all().holder(request_id)

    # -- counters ----------------------------------------------------------------------------------------

    def num_free_blocks(self, replica_idx: int = 0) -> int:
        """Pages that can be handed out: empty ones and cached ones that nobody holds."""
        return self._then(self._at(replica_idx).usage(replica_idx), lambda usage: usage.free)

    def total_num_blocks(self, replica_idx: int = 0) -> int:
        """Pages of the replica, the null page not counted."""
        return self._then(self._at(replica_idx).usage(replica_idx), lambda usage: usage.total)

    def get_num_pages(self, replica_idx: int) -> int:
        """The same as total_num_blocks()."""
        return self.total_num_blocks(replica_idx)

    def get_num_used_pages(self, replica_idx: int) -> int:
        """Pages that a request or a transfer holds; shared ones count once."""
        return self._then(self._at(replica_idx).usage(replica_idx), lambda usage: usage.used)

    def get_num_host_pages(self, replica_idx: int) -> int:
        """Pages of the host tier on the replica's node, which all replicas there share; 0 without one."""
        return self._then(self._at(replica_idx).tier_count(replica_idx), lambda count: count.host_total)

    def get_num_used_host_pages(self, replica_idx: int) -> int:
        """Of these, pages in use."""
        return self._then(self._at(replica_idx).tier_count(replica_idx), lambda count: count.host_used)

    def get_num_disk_pages(self, replica_idx: int) -> int:
        """Pages that the disk budget of the replica's node is for, shared likewise; 0 without a disk tier."""
        return self._then(self._at(replica_idx).tier_count(replica_idx), lambda count: count.disk_total)

    def get_num_used_disk_pages(self, replica_idx: int) -> int:
        """Of these, pages in use."""
        return self._then(self._at(replica_idx).tier_count(replica_idx), lambda count: count.disk_used)

    def get_pct_used_blocks_after_allocation(self, ctx: TextContext, replica_idx: int) -> float:
        """Fraction (0..1) of the replica's pages in use if alloc(ctx) were called now. Changes nothing."""
        return self._run(self._at(replica_idx).used_fraction_after(ctx, replica_idx))

    def get_prefix_cache_hit_counts(self, ctx: TextContext) -> list[HitCounts]:
        """Per replica, the leading pages of the request that are cached there; 0 where a replica is lost or silent.
        Changes nothing."""
        return self._run(self._all().hit_counts(ctx))

    def get_metrics_aggregated(self) -> KVCacheMetrics:
        """Counters of all replicas since reset_metrics(); of those that are lost or silent nothing is counted."""
        return self._run(self._all().metrics())

    def reset_metrics(self) -> None:
        """Counters of all replicas to zero, those of a silent one before anything else that is asked of it."""
        return self._run(self._all().reset_metrics())

    def reset_prefix_cache(self, *, weights_changed: bool = False) -> PrefixCacheReset:
        """Forget cached pages that nobody holds, on all replicas and in the tiers; the answer says what is still held.

        As in MAX, what running requests hold can still be hit, which is wrong once the weights are others. After
        `weights_changed=True` no request that starts later reads what was computed before the call, or is computed by
        a request that has pages now, wherever it is: those requests go on with their own pages, which go when they end.

        CallTimeoutError names replicas that did not answer, when the others have done it. They do it when they answer
        again, before anything else that the scheduler asks of them.
        """
        token = Mask.new() if weights_changed else None
        return self._then(
            self._all().reset_prefix_cache(token), lambda held: PrefixCacheReset(held, hits=not weights_changed)
        )

    # -- contents and the end --------------------------------------------------------------------------------

    def get_device_buffer(self, replica_idx: int) -> DeviceBuffer:
        """The replica's KV tensors `[pages + 1, kv_dim, layers, page_size, heads per device, head_dim]`."""
        return DeviceBuffer(self._at(replica_idx).buffers(replica_idx))

    def read_pages(self, page_ids: Sequence[int], replica_idx: int) -> list[torch.Tensor]:
        """Host copies of those pages, one tensor `[len(page_ids), ...]` per buffer of get_device_buffer()."""
        return self._run(self._at(replica_idx).read_pages(page_numbers(page_ids), replica_idx))

    def poll_transfers(self) -> None:
        """Take note of finished transfers, so that what has landed can be reused. Never waits for one."""
        return self._run(self._all().poll_transfers())

    def drain(self) -> None:
        """Return when no host or disk transfer is pending; afterwards no page is held by one. CallTimeoutError names
        replicas that did not answer, when that is so for the others."""
        return self._run(self._all().drain())

    def get_node_names(self) -> list[str]:
        """The host name of each replica's node."""
        return self._all().node_names()

    def check_integrity(self) -> list[int]:
        """IntegrityError if any replica's bookkeeping contradicts itself (a bug in rayk). The replicas that could not
        be asked, because they are lost or do not answer."""
        return self._run(self._all().check_integrity())


def page_numbers(page_ids: Sequence[int]) -> list[int]:
    """Page ids as ints; ConfigError for what is no sequence of whole numbers. Their range is checked by the replica."""
    try:
        ids = list(page_ids)
        if any(isinstance(page, bool | np.bool_) for page in ids):
            raise TypeError("a truth value is no page")
        if any(not -(1 << 31) <= index(page) < 1 << 31 for page in ids):
            raise TypeError("no page has such a number")
        return [index(page) for page in ids]
    except TypeError as error:
        raise ConfigError(f"page ids must be a sequence of whole numbers, got {page_ids!r:.80}: {error}") from None
