"""AsyncPagedKVCacheManager: the manager's calls as coroutines, many of them in flight at once.

What is called in one turn of the event loop travels together: all admissions in one message to the scheduler, all
releases and all steps in one message to each replica. A cancelled call returns at once, and is still carried out: its
messages are on their way. What a cancelled claim or admission claims is released as soon as that is known.

A call's arguments, checks and docstring are those of PagedKVCacheManager, whose methods hand their `Calls` to `_run` or
`_then`: awaited() makes a coroutine of one. Only calls that travel together, or that can be cancelled half done, are
written here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from rayk.context import TextContext
from rayk.errors import NotOwnerError, RaykError
from rayk.kvcache.iteration import Batches, Forward
from rayk.kvcache.tick import Admission, Settled, Tick, TickResult, first_error, placed, rewind, unless_failed, windows
from rayk.manager.manager import PagedKVCacheManager, check_size
from rayk.manager.queries import DeviceBuffer
from rayk.manager.waiting import AsyncAdmission
from rayk.params import KVCacheParams
from rayk.protocol.admission import AdmissionPolicy
from rayk.session import InferenceSession

if TYPE_CHECKING:
    from rayk.manager.cluster_view import Script

log = logging.getLogger("rayk")

MOST_TOGETHER = 512  # requests of one message

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def awaited(
    method: Callable[Concatenate[PagedKVCacheManager, P], T],
) -> Callable[Concatenate[AsyncPagedKVCacheManager, P], Coroutine[Any, Any, T]]:
    """The same call as a coroutine: what it gives is what `_run` or `_then` of an AsyncPagedKVCacheManager gave it."""
    start = cast("Callable[..., Coroutine[Any, Any, T]]", method)

    @wraps(method, assigned=("__name__", "__doc__"))
    async def run(self: AsyncPagedKVCacheManager, /, *arguments: P.args, **named: P.kwargs) -> T:
        return await start(self, *arguments, **named)

    run.__qualname__ = f"AsyncPagedKVCacheManager.{method.__name__}"
    return run


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
        self._at, self._all, self._for = self.sync._at, self.sync._all, self.sync._for
        self._check_count = self.sync._check_count
        self._calls = self.sync._calls
        self._admissions = _Together(self._admit_together)
        self._releases = _Together(self._release_together)
        self._steps = _Together(self._step_together)
        self._under_way: set[asyncio.Future[Any]] = set()
        self._undoing: dict[str, asyncio.Task[None]] = {}  # requests that were given up, until they are released
        self._admission = AsyncAdmission(self._enter, self._undo) if admission is not None else None

    # -- carrying calls out ------------------------------------------------------------------------

    async def _run(self, call: Script[T] | T) -> T:
        """Have a call carried out, whether or not its caller goes on waiting, and without blocking the event loop."""
        if self.sync._wait is None:
            return cast("T", call)
        return await asyncio.shield(self._begin(call))

    async def _then(self, call: Script[T] | T, then: Callable[[T], R]) -> R:
        return then(await self._run(call))

    def _begin(self, call: Script[T] | T) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        if self.sync._wait is None:
            done: asyncio.Future[T] = loop.create_future()
            done.set_result(cast("T", call))
            return done
        from rayk.manager.cluster_view import await_for

        return self._keep(loop.create_task(await_for(cast("Script[T]", call))))

    def _keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """The loop itself keeps only weak references, and shutdown() waits for what is under way."""
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _placing(self, start: Callable[[], asyncio.Future[T]], request_ids: Sequence[str]) -> T:
        """The result of a call that claims requests. If that is cancelled, they are released once it is known."""
        while self._undoing and (waits := {self._undoing[i] for i in request_ids if i in self._undoing}):
            await asyncio.wait(waits)
        future = start()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                self._undo(request_ids, future)
            raise

    def _undo(self, request_ids: Sequence[str], claiming: asyncio.Future[Any] | None = None) -> asyncio.Task[None]:
        """Release those, or what of them a call claims that is under way. Until then, other calls about them wait."""
        undo = self._keep(asyncio.get_running_loop().create_task(self._release_unwanted(request_ids, claiming)))
        self._undoing.update((i, undo) for i in request_ids)
        undo.add_done_callback(lambda _: [self._undoing.pop(i, None) for i in request_ids])
        return undo

    async def _release_unwanted(self, request_ids: Sequence[str], claiming: asyncio.Future[Any] | None) -> None:
        with suppress(Exception):  # then it claimed nothing
            result = await claiming if claiming is not None else None
            if isinstance(result, list):
                request_ids = [i for i, a in zip(request_ids, result, strict=True) if a.error is None]
            if request_ids:
                await self._run(self._calls.give_back(request_ids))
                self._released()

    def _released(self) -> None:
        if self._admission is not None:
            self._admission.released()

    async def _enter(self, ctxs: Sequence[TextContext], given_up: Sequence[str]) -> Settled:
        return await self._run(self._calls.enter(ctxs, given_up))

    # -- the life of a request ---------------------------------------------------------------------

    async def claim(self, request_id: str, replica_idx: int) -> None:
        """See PagedKVCacheManager.claim()."""
        self._at(replica_idx)
        await self._placing(lambda: self._begin(self._calls.claim(request_id, replica_idx)), [request_id])

    async def alloc_dummy(self, request_id: str, replica_idx: int) -> None:
        """See PagedKVCacheManager.alloc_dummy()."""
        self._at(replica_idx)
        await self._placing(lambda: self._begin(self._calls.claim(request_id, replica_idx, True)), [request_id])

    async def alloc(self, data: TextContext, replica_idx: int) -> None:
        """See PagedKVCacheManager.alloc()."""
        await self._run(self._at(replica_idx).alloc(data, replica_idx))

    async def release(self, request_id: str, replica_idx: int, force: bool = False) -> None:
        """See PagedKVCacheManager.release()."""
        while undo := self._undoing.get(request_id):
            await asyncio.wait([undo])
        calls = self._at(replica_idx)
        if force or calls.holder(request_id) != replica_idx:
            await self._run(calls.release(request_id, replica_idx, force))
        else:
            await asyncio.shield(self._releases.add(request_id))
        self._released()

    async def _release_together(self, request_ids: list[str]) -> list[RaykError | None]:
        once = list(dict.fromkeys(request_ids))
        known = [request_id for request_id in once if self._calls.holder(request_id) is not None]
        lost = await self._run(self._calls.release_many(known))
        return [lost.get(request_id) for request_id in request_ids]

    contains = awaited(PagedKVCacheManager.contains)
    alloc_many = awaited(PagedKVCacheManager.alloc_many)
    get_req_blocks = awaited(PagedKVCacheManager.get_req_blocks)

    # -- batches -----------------------------------------------------------------------------------

    async def admit(self, ctxs: Sequence[TextContext]) -> list[int]:
        """See PagedKVCacheManager.admit()."""
        before = windows(ctxs)
        admissions = await self.try_admit(ctxs)
        failed = first_error(admissions)
        if failed is None:
            return [a.replica for a in admissions]
        await asyncio.shield(self._undo(placed(ctxs, admissions)))
        rewind(ctxs, admissions, before)
        raise failed

    async def try_admit(self, ctxs: Sequence[TextContext], replicas: Sequence[int] | None = None) -> list[Admission]:
        """See PagedKVCacheManager.try_admit()."""
        check_size(ctxs)
        calls, waits = self._all(), self._admission if replicas is None else None
        if replicas is not None:
            self.sync._check_targets(ctxs, replicas)

        def start() -> asyncio.Future[list[Admission]]:
            if replicas is not None:
                return self._begin(calls.try_admit(ctxs, replicas, False))
            if waits is not None:
                return self._keep(asyncio.get_running_loop().create_task(waits.enter(ctxs)))
            return self._admissions.add(ctxs)

        try:
            return await self._placing(start, [ctx.request_id for ctx in ctxs])
        except asyncio.CancelledError:
            if waits is not None:
                waits.give_up(ctxs)
            raise

    async def _admit_together(self, groups: list[Sequence[TextContext]]) -> list[list[Admission]]:
        flat = [ctx for group in groups for ctx in group]
        parts = [flat[i : i + MOST_TOGETHER] for i in range(0, len(flat), MOST_TOGETHER)]
        done: list[list[Admission]] = await asyncio.gather(*map(self._admit_part, parts))
        admissions = iter([admission for part in done for admission in part])
        return [[next(admissions) for _ in group] for group in groups]

    async def _admit_part(self, part: list[TextContext]) -> list[Admission]:
        try:
            return await self._run(self._calls.try_admit(part, None, False))
        except RaykError as error:  # of this part, and not of what others placed meanwhile
            return [Admission(-1, error)] * len(part)

    async def tick(
        self, ticks: Sequence[Tick], fn: Forward | None = None, *, raise_errors: bool = True
    ) -> list[TickResult]:
        """See PagedKVCacheManager.tick()."""
        results = await self._run(self._for(ticks).tick(ticks, fn))
        if any(result.released for result in results):
            self._released()
        return unless_failed(results) if raise_errors else results

    async def step(self, batches: Batches) -> None:
        """See PagedKVCacheManager.step()."""
        self._for(batches)
        await asyncio.shield(self._steps.add(batches))

    async def _step_together(self, calls: list[Batches]) -> list[RaykError | None]:
        """One step for all; should it fail, each call of its own, so that it is told of its own error only."""
        merged = [
            [ctx for batches in calls if r < len(batches) for ctx in batches[r]] for r in range(max(map(len, calls)))
        ]
        error = await self._step_alone(merged)
        if error is None or len(calls) == 1:
            return [error] * len(calls)
        return [await self._step_alone(batches) for batches in calls]

    async def _step_alone(self, batches: Batches) -> RaykError | None:
        try:
            await self._run(self._calls.step(batches))
        except RaykError as error:
            return error
        return None

    runtime_inputs = awaited(PagedKVCacheManager.runtime_inputs)
    execute = awaited(PagedKVCacheManager.execute)

    # -- replicas that come and go: other calls go on while these wait -------------------------------

    add_replicas = awaited(PagedKVCacheManager.add_replicas)
    drain_replica = awaited(PagedKVCacheManager.drain_replica)
    resume_replica = awaited(PagedKVCacheManager.resume_replica)
    remove_replica = awaited(PagedKVCacheManager.remove_replica)
    replica_loads = awaited(PagedKVCacheManager.replica_loads)
    replacements = awaited(PagedKVCacheManager.replacements)
    replica_states = awaited(PagedKVCacheManager.replica_states)

    @property
    def num_replicas(self) -> int:
        """See PagedKVCacheManager.num_replicas."""
        return self.sync.num_replicas

    def holder(self, request_id: str) -> int | None:
        """See PagedKVCacheManager.holder(); None for what a cancelled call claimed."""
        return self.sync.holder(request_id) if request_id not in self._undoing else None

    # -- counters and contents -----------------------------------------------------------------------

    num_free_blocks = awaited(PagedKVCacheManager.num_free_blocks)
    total_num_blocks = awaited(PagedKVCacheManager.total_num_blocks)
    get_num_used_pages = awaited(PagedKVCacheManager.get_num_used_pages)
    get_num_host_pages = awaited(PagedKVCacheManager.get_num_host_pages)
    get_num_used_host_pages = awaited(PagedKVCacheManager.get_num_used_host_pages)
    get_num_disk_pages = awaited(PagedKVCacheManager.get_num_disk_pages)
    get_num_used_disk_pages = awaited(PagedKVCacheManager.get_num_used_disk_pages)
    get_pct_used_blocks_after_allocation = awaited(PagedKVCacheManager.get_pct_used_blocks_after_allocation)
    get_prefix_cache_hit_counts = awaited(PagedKVCacheManager.get_prefix_cache_hit_counts)
    get_metrics_aggregated = awaited(PagedKVCacheManager.get_metrics_aggregated)
    reset_metrics = awaited(PagedKVCacheManager.reset_metrics)
    reset_prefix_cache = awaited(PagedKVCacheManager.reset_prefix_cache)
    read_pages = awaited(PagedKVCacheManager.read_pages)
    poll_transfers = awaited(PagedKVCacheManager.poll_transfers)
    drain = awaited(PagedKVCacheManager.drain)
    check_integrity = awaited(PagedKVCacheManager.check_integrity)

    def get_device_buffer(self, replica_idx: int) -> DeviceBuffer:
        """See PagedKVCacheManager.get_device_buffer()."""
        return self.sync.get_device_buffer(replica_idx)

    async def shutdown(self, force: bool = False) -> None:
        """Wait for what is under way, then give everything back; see PagedKVCacheManager.shutdown()."""
        if not force:
            self.sync.check_owned()
        if self._admission is not None:
            self._admission.close()
        while self._under_way:
            await asyncio.gather(*self._under_way, return_exceptions=True)
            await asyncio.sleep(0)  # since Python 3.12 gather() of what is done gives nobody a turn to take it off
        self.sync.shutdown(force)

    async def __aenter__(self) -> AsyncPagedKVCacheManager:
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            await self.shutdown()
        except NotOwnerError:
            self.sync.leave()
