"""AsyncPagedKVCacheManager: the manager's calls as coroutines, many of them in flight at once.

What is called in one turn of the event loop travels together: all admissions in one message to the scheduler, all
releases and all steps in one message to each replica. A cancelled call returns at once, and is still carried out: its
messages are on their way. What a cancelled claim or admission claims is released as soon as that is known.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from rayk.context import TextContext
from rayk.errors import InsufficientBlocksError, NotOwnerError, RaykError, RuntimeInputsError
from rayk.kvcache.connector import TierCount
from rayk.kvcache.iteration import Batches, Forward
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.kvcache.page_hash import Mask
from rayk.kvcache.runtime_inputs import BatchCharacteristics, RuntimeInputs
from rayk.kvcache.tick import Admission, HitCounts, PrefixCacheReset, Tick, TickResult
from rayk.manager.manager import DeviceBuffer, PagedKVCacheManager, check_size, page_numbers
from rayk.manager.waiting import AsyncAdmission
from rayk.params import KVCacheParams, require_at_least
from rayk.protocol.admission import AdmissionPolicy
from rayk.scheduler.scaling import Drained, Removed, ReplicaLoad
from rayk.session import InferenceSession

log = logging.getLogger("rayk")

MOST_TOGETHER = 512  # requests of one message


class _Together:
    """Calls of one kind that were made in this turn of the event loop, to be carried out as one."""

    def __init__(self, carry_out: Callable[[list[Any]], Coroutine[Any, Any, list[Any]]]) -> None:
        self._carry_out = carry_out
        self._due: list[tuple[Any, asyncio.Future[Any]]] = []
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references

    def add(self, work: Any) -> asyncio.Future[Any]:
        """For the result of `work`, or its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._due.append((work, future))
        if len(self._due) == 1:
            loop.call_soon(self._start)
        return future

    def _start(self) -> None:
        due, self._due = self._due, []
        task = asyncio.get_running_loop().create_task(self._run(due))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, due: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            results = await self._carry_out([work for work, _ in due])
        except Exception as error:
            results = [error] * len(due)
        for (_, future), result in zip(due, results, strict=True):
            if future.done():
                continue  # cancelled: carried out all the same
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class AsyncPagedKVCacheManager:
    """PagedKVCacheManager for an event loop; same arguments, same results, same errors. One event loop, any tasks.

    With an `admission` policy, admit() and try_admit() without replicas wait until there is room for a request and it
    is its turn, or turn it away with OverloadedError.

    A cancelled admit(), try_admit(), claim() or alloc_dummy() (asyncio.timeout(), a client that went away) leaves
    nothing claimed: holder() is None at once, and another call about the same ids waits until they are released. Any
    other cancelled call is carried out; the request stays claimed until release().

    Messages leave in the order in which the calls were made. Two calls about one request should be awaited one
    after the other; calls about different requests need not.
    """

    def __init__(
        self,
        params: KVCacheParams,
        session: InferenceSession,
        total_num_pages: int | None,
        total_num_host_pages: int = 0,
        enable_runtime_checks: bool = False,
        *,
        admission: AdmissionPolicy | None = None,
        **options: Any,
    ) -> None:
        if options.pop("fast_lane", False):
            log.warning("no fast lanes for an event loop, which could not await their answers: it has calls")
        self.sync = PagedKVCacheManager(
            params,
            session,
            total_num_pages,
            total_num_host_pages,
            enable_runtime_checks,
            admission=admission,
            **options,
        )
        self.params = params
        self._admissions = _Together(self._admit_together)
        self._releases = _Together(self._release_together)
        self._steps = _Together(self._step_together)
        self._under_way: set[asyncio.Future[Any]] = set()
        self._undoing: dict[str, asyncio.Task[None]] = {}  # requests of cancelled calls, until they are released
        self._door = AsyncAdmission(partial(self._run, "enter"), self.release) if admission is not None else None

    async def _run(self, name: str, *arguments: Any) -> Any:
        """Carry a call of the backend out; on Ray without blocking the event loop."""
        return await asyncio.shield(self._begin(name, *arguments))

    def _begin(self, name: str, *arguments: Any) -> asyncio.Future[Any]:
        """Have a call of the backend carried out, whether or not somebody waits for it."""
        loop, backend = asyncio.get_running_loop(), self.sync._backend
        calls: Any = getattr(backend, "calls", None)
        if calls is None:
            done: asyncio.Future[Any] = loop.create_future()
            try:
                done.set_result(getattr(backend, name)(*arguments))
            except Exception as error:
                done.set_exception(error)
            return done
        from rayk.manager.cluster_view import await_for

        return self._keep(loop.create_task(await_for(getattr(calls, name)(*arguments))))

    def _keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """The loop itself keeps only weak references, and shutdown() waits for what is under way."""
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _placing(self, begin: Callable[[], asyncio.Future[Any]], request_ids: Sequence[str], replica: int) -> Any:
        """The result of a call that claims requests. If that is cancelled, they are released when it is there."""
        while self._undoing and (waits := {self._undoing[i] for i in request_ids if i in self._undoing}):
            await asyncio.wait(waits)
        future = begin()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                undo = asyncio.get_running_loop().create_task(self._undo(future, request_ids, replica))
                self._undoing.update((i, undo) for i in request_ids)
                self._keep(undo)
            raise

    async def _undo(self, future: asyncio.Future[Any], request_ids: Sequence[str], replica: int) -> None:
        """Release what a cancelled call claims, once it has: a list of admissions, or all on `replica`."""
        try:
            with suppress(Exception):  # then it claimed nothing
                result = await future
                placed = (
                    {i: a.replica for i, a in zip(request_ids, result, strict=True) if a.error is None}
                    if isinstance(result, list)
                    else dict.fromkeys(request_ids, replica)
                )
                await self._release_all(placed)
        finally:
            for request_id in request_ids:
                self._undoing.pop(request_id, None)

    async def _release_all(self, placed: dict[str, int]) -> None:
        """Release those; where that fails, they are gone already."""
        releases = [asyncio.ensure_future(self._released(i, r)) for i, r in placed.items()]
        if releases:
            await asyncio.wait(releases)
        for release in releases:
            if not release.cancelled() and (error := release.exception()) is not None:
                log.debug("a request of a cancelled call was not released: %s", error)

    # -- the life of a request ---------------------------------------------------------------------

    async def claim(self, request_id: str, replica_idx: int) -> None:
        """See PagedKVCacheManager.claim()."""
        self.sync._at(replica_idx)
        await self._placing(partial(self._begin, "claim", request_id, replica_idx), [request_id], replica_idx)

    async def contains(self, request_id: str, replica_idx: int) -> bool:
        """Whether the request is claimed on that replica."""
        self.sync._at(replica_idx)
        found: bool = await self._run("contains", request_id, replica_idx)
        return found

    async def alloc(self, data: TextContext, replica_idx: int) -> None:
        """See PagedKVCacheManager.alloc()."""
        self.sync._at(replica_idx)
        await self._run("alloc", data, replica_idx)

    async def alloc_many(self, replica_batches: Batches) -> list[dict[str, InsufficientBlocksError]]:
        """See PagedKVCacheManager.alloc_many()."""
        self.sync._for(replica_batches)
        refused: list[dict[str, InsufficientBlocksError]] = await self._run("alloc_many", replica_batches)
        return refused

    async def alloc_dummy(self, request_id: str, replica_idx: int) -> None:
        """See PagedKVCacheManager.alloc_dummy()."""
        self.sync._at(replica_idx)
        await self._placing(partial(self._begin, "claim", request_id, replica_idx, True), [request_id], replica_idx)

    async def get_req_blocks(self, request_id: str, replica_idx: int) -> list[int]:
        """See PagedKVCacheManager.get_req_blocks()."""
        self.sync._at(replica_idx)
        blocks: list[int] = await self._run("blocks", request_id, replica_idx)
        return blocks

    async def release(self, request_id: str, replica_idx: int, force: bool = False) -> None:
        """See PagedKVCacheManager.release()."""
        while undo := self._undoing.get(request_id):
            await asyncio.wait([undo])
        await self._released(request_id, replica_idx, force)

    async def _released(self, request_id: str, replica_idx: int, force: bool = False) -> None:
        self.sync._at(replica_idx)
        calls = getattr(self.sync._backend, "calls", None)
        if calls is None or force or calls.holder(request_id) != replica_idx:
            await self._run("release", request_id, replica_idx, force)
        else:
            await asyncio.shield(self._releases.add(request_id))
        if self._door is not None:
            self._door.released()

    async def _release_together(self, request_ids: list[str]) -> list[RaykError | None]:
        calls: Any = getattr(self.sync._backend, "calls", None)
        once = list(dict.fromkeys(request_ids))
        known = [request_id for request_id in once if calls.holder(request_id) is not None]
        lost: dict[str, RaykError] = await self._run("release_many", known)
        return [lost.get(request_id) for request_id in request_ids]

    # -- batches -----------------------------------------------------------------------------------

    async def admit(self, ctxs: Sequence[TextContext]) -> list[int]:
        """Route, claim and allocate a batch: the replica of each, or an error and none of them claimed."""
        before = [(c.tokens.processed, c.tokens.end, c.cached_prefix_length) for c in ctxs]
        admissions = await self.try_admit(ctxs)
        failed = next((a.error for a in admissions if a.error is not None), None)
        if failed is None:
            return [a.replica for a in admissions]
        placed = {c.request_id: a.replica for c, a in zip(ctxs, admissions, strict=True) if a.error is None}
        release = self._keep(asyncio.get_running_loop().create_task(self._release_all(placed)))
        self._undoing.update((i, release) for i in placed)
        release.add_done_callback(lambda _: [self._undoing.pop(i, None) for i in placed])
        await asyncio.shield(release)
        for ctx, admission, (processed, end, cached) in zip(ctxs, admissions, before, strict=True):
            if admission.error is None:
                ctx.tokens.processed, ctx.tokens.end, ctx.cached_prefix_length = processed, end, cached
        raise failed

    async def try_admit(self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None = None) -> list[Admission]:
        """Claim and allocate each context, on replicas[i] or where the router says; one result each."""
        check_size(ctxs)
        if replicas is not None:
            self.sync._check_targets(ctxs, replicas)
            begin = partial(self._begin, "try_admit", ctxs, replicas, False)
        elif self._door is not None:
            begin = partial(self._enter, self._door, ctxs)
        else:
            begin = partial(self._admissions.add, ctxs)
        self.sync._all()
        try:
            done: list[Admission] = await self._placing(begin, [ctx.request_id for ctx in ctxs], -1)
            return done
        except asyncio.CancelledError:
            if self._door is not None and replicas is None:
                self._door.give_up(ctxs)
            raise

    def _enter(self, door: AsyncAdmission, ctxs: Sequence[TextContext]) -> asyncio.Future[Any]:
        return self._keep(asyncio.get_running_loop().create_task(door.enter(ctxs)))

    async def _admit_together(self, groups: list[Sequence[TextContext]]) -> list[list[Admission]]:
        flat = [ctx for group in groups for ctx in group]
        parts = [flat[i : i + MOST_TOGETHER] for i in range(0, len(flat), MOST_TOGETHER)]
        done: list[list[Admission]] = await asyncio.gather(*map(self._admit_part, parts))
        admissions = iter([admission for part in done for admission in part])
        return [[next(admissions) for _ in group] for group in groups]

    async def _admit_part(self, part: list[TextContext]) -> list[Admission]:
        try:
            admissions: list[Admission] = await self._run("try_admit", part, None, False)
        except RaykError as error:  # of this part, and not of what others placed meanwhile
            return [Admission(-1, error)] * len(part)
        return admissions

    async def tick(
        self, ticks: Sequence[Tick], fn: Forward | None = None, *, raise_errors: bool = True
    ) -> list[TickResult]:
        """See PagedKVCacheManager.tick()."""
        self.sync._for(ticks)
        results: list[TickResult] = await self._run("tick", ticks, fn)
        if self._door is not None and any(result.released for result in results):
            self._door.released()
        for result in results:
            if result.error is not None and raise_errors:
                raise result.error
        return results

    async def runtime_inputs(
        self,
        batches: Batches,
        *,
        max_cache_length: int | None = None,
        batch_characteristics: BatchCharacteristics | None = None,
    ) -> RuntimeInputs:
        """See PagedKVCacheManager.runtime_inputs()."""
        if len(batches) != self.sync._all().indices:
            self.sync._check_count(len(batches), partial(RuntimeInputsError, -1))
        return RuntimeInputs(await self._run("runtime_inputs", batches, max_cache_length, batch_characteristics))

    async def execute(self, batches: Batches, fn: Forward) -> list[Any]:
        """See PagedKVCacheManager.execute()."""
        self.sync._for(batches)
        results: list[Any] = await self._run("execute", batches, fn)
        return results

    async def step(self, batches: Batches) -> None:
        """See PagedKVCacheManager.step()."""
        self.sync._for(batches)
        await asyncio.shield(self._steps.add(batches))

    async def _step_together(self, calls: list[Batches]) -> list[RaykError | None]:
        """One step for all; should it fail, each call of its own, so that it hears of its own error only."""
        merged = [
            [ctx for batches in calls if r < len(batches) for ctx in batches[r]] for r in range(max(map(len, calls)))
        ]
        try:
            await self._run("step", merged)
        except RaykError as error:
            return [error] if len(calls) == 1 else [await self._step_alone(batches) for batches in calls]
        return [None] * len(calls)

    async def _step_alone(self, batches: Batches) -> RaykError | None:
        try:
            await self._run("step", batches)
        except RaykError as error:
            return error
        return None

    # -- replicas that come and go ---------------------------------------------------------------------------

    @property
    def num_replicas(self) -> int:
        """See PagedKVCacheManager.num_replicas."""
        return self.sync.num_replicas

    async def add_replicas(self, n: int = 1, timeout: float = 60.0) -> list[int]:
        """See PagedKVCacheManager.add_replicas(). Other calls go on while it waits."""
        require_at_least(1, n=n)
        self.sync._all()
        added: list[int] = await self._run("add_replicas", n, timeout)
        return added

    async def drain_replica(self, replica_idx: int, deadline: float | None = None, handover: bool = True) -> Drained:
        """See PagedKVCacheManager.drain_replica(). Other calls go on while it waits."""
        self.sync._at(replica_idx)
        drained: Drained = await self._run("drain_replica", replica_idx, deadline, handover)
        return drained

    async def resume_replica(self, replica_idx: int) -> None:
        """See PagedKVCacheManager.resume_replica()."""
        self.sync._at(replica_idx)
        await self._run("resume_replica", replica_idx)

    async def remove_replica(self, replica_idx: int) -> Removed:
        """See PagedKVCacheManager.remove_replica()."""
        self.sync._at(replica_idx)
        removed: Removed = await self._run("remove_replica", replica_idx)
        return removed

    async def replica_loads(self) -> list[ReplicaLoad]:
        """See PagedKVCacheManager.replica_loads()."""
        self.sync._all()
        loads: list[ReplicaLoad] = await self._run("replica_loads")
        return loads

    async def replica_states(self) -> list[str]:
        """See PagedKVCacheManager.replica_states()."""
        return [load.state for load in await self.replica_loads()]

    def holder(self, request_id: str) -> int | None:
        """See PagedKVCacheManager.holder(); None for what a cancelled call claimed."""
        return self.sync.holder(request_id) if request_id not in self._undoing else None

    # -- counters ----------------------------------------------------------------------------------------

    async def num_free_blocks(self, replica_idx: int = 0) -> int:
        """See PagedKVCacheManager.num_free_blocks()."""
        self.sync._at(replica_idx)
        free: int = (await self._run("usage", replica_idx)).free
        return free

    async def get_num_used_pages(self, replica_idx: int) -> int:
        """See PagedKVCacheManager.get_num_used_pages()."""
        self.sync._at(replica_idx)
        used: int = (await self._run("usage", replica_idx)).used
        return used

    async def total_num_blocks(self, replica_idx: int = 0) -> int:
        """See PagedKVCacheManager.total_num_blocks()."""
        self.sync._at(replica_idx)
        total: int = (await self._run("usage", replica_idx)).total
        return total

    async def get_pct_used_blocks_after_allocation(self, ctx: TextContext, replica_idx: int) -> float:
        """See PagedKVCacheManager.get_pct_used_blocks_after_allocation()."""
        self.sync._at(replica_idx)
        fraction: float = await self._run("used_fraction_after", ctx, replica_idx)
        return fraction

    async def get_prefix_cache_hit_counts(self, ctx: TextContext) -> list[HitCounts]:
        """See PagedKVCacheManager.get_prefix_cache_hit_counts()."""
        self.sync._all()
        counts: list[HitCounts] = await self._run("hit_counts", ctx)
        return counts

    async def get_metrics_aggregated(self) -> KVCacheMetrics:
        """See PagedKVCacheManager.get_metrics_aggregated()."""
        self.sync._all()
        metrics: KVCacheMetrics = await self._run("metrics")
        return metrics

    async def reset_metrics(self) -> None:
        """See PagedKVCacheManager.reset_metrics()."""
        self.sync._all()
        await self._run("reset_metrics")

    async def reset_prefix_cache(self, *, weights_changed: bool = False) -> PrefixCacheReset:
        """See PagedKVCacheManager.reset_prefix_cache()."""
        self.sync._all()
        held = await self._run("reset_prefix_cache", Mask.new() if weights_changed else None)
        return PrefixCacheReset(held, hits=not weights_changed)

    async def _tiers(self, replica_idx: int) -> TierCount:
        self.sync._at(replica_idx)
        count: TierCount = await self._run("tier_count", replica_idx)
        return count

    async def get_num_host_pages(self, replica_idx: int) -> int:
        """See PagedKVCacheManager.get_num_host_pages()."""
        return (await self._tiers(replica_idx)).host_total

    async def get_num_used_host_pages(self, replica_idx: int) -> int:
        """See PagedKVCacheManager.get_num_used_host_pages()."""
        return (await self._tiers(replica_idx)).host_used

    async def get_num_disk_pages(self, replica_idx: int) -> int:
        """See PagedKVCacheManager.get_num_disk_pages()."""
        return (await self._tiers(replica_idx)).disk_total

    async def get_num_used_disk_pages(self, replica_idx: int) -> int:
        """See PagedKVCacheManager.get_num_used_disk_pages()."""
        return (await self._tiers(replica_idx)).disk_used

    async def poll_transfers(self) -> None:
        """See PagedKVCacheManager.poll_transfers()."""
        self.sync._all()
        await self._run("poll_transfers")

    async def drain(self) -> None:
        """See PagedKVCacheManager.drain()."""
        self.sync._all()
        await self._run("drain")

    async def check_integrity(self) -> list[int]:
        """See PagedKVCacheManager.check_integrity()."""
        self.sync._all()
        unasked: list[int] = await self._run("check_integrity")
        return unasked

    # -- contents and the end --------------------------------------------------------------------------------

    def get_device_buffer(self, replica_idx: int) -> DeviceBuffer:
        """See PagedKVCacheManager.get_device_buffer()."""
        return self.sync.get_device_buffer(replica_idx)

    async def read_pages(self, page_ids: Sequence[int], replica_idx: int) -> list[torch.Tensor]:
        """See PagedKVCacheManager.read_pages()."""
        self.sync._at(replica_idx)
        pages: list[torch.Tensor] = await self._run("read_pages", page_numbers(page_ids), replica_idx)
        return pages

    async def shutdown(self, force: bool = False) -> None:
        """Wait for what is under way, then give everything back; see PagedKVCacheManager.shutdown()."""
        if not force:
            self.sync.check_owned()
        if self._door is not None:
            self._door.close()
        while self._under_way:
            await asyncio.gather(*self._under_way, return_exceptions=True)
        self.sync.shutdown(force)

    async def __aenter__(self) -> AsyncPagedKVCacheManager:
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            await self.shutdown()
        except NotOwnerError:
            self.sync.leave()
