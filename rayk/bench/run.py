"""One run of the benchmark: workload in, result out. Makes the session and the manager, and ends them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from rayk.bench.cluster_driver import ClusterDriver
from rayk.bench.hf import start
from rayk.bench.loop import ClosedLoop
from rayk.bench.manager_driver import ManagerDriver
from rayk.bench.result import BenchResult, TierUse, make_result
from rayk.bench.settings import BenchSettings
from rayk.bench.stop import StopSignals
from rayk.kvcache.connector import TierCount
from rayk.kvcache.metrics import KVCacheMetrics
from rayk.manager.manager import PagedKVCacheManager
from rayk.session import InferenceSession
from rayk.workloads.request import Workload


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run's result, complete or up to the error that stopped it (None: it was not stopped)."""

    result: BenchResult
    error: BaseException | None = None


def run_bench(
    settings: BenchSettings,
    workload: Workload,
    on_tick: Callable[[ClosedLoop], None] = lambda driver: None,
    report: Callable[[BenchResult, bool], None] = lambda result, final: None,
    clock: Callable[[], float] = perf_counter,
) -> Outcome:
    """Serve `workload` as `settings` say. Errors before the first request is sent are raised, later ones returned.

    A run stopped by an error, by Ctrl-C or by SIGTERM still has a result, with the fault in it. `report` gets the
    result and whether it is the final one. A stopped run gives it a first one at once, without simulated caches: these,
    and closing, may take longer than a process is given to end. The session is closed either way; what cannot be closed
    any more after a lost replica is not an error of its own.
    """
    session = InferenceSession(settings.runtime, settings.address if settings.runtime == "ray" else None)
    error: BaseException | None = None
    with StopSignals() as signals:
        try:
            driver, nodes = _driver(settings, session, workload, clock, on_tick)
            tiers: TierUse | None = None
            signals.listen()
            try:
                driver.run()
                if settings.connector != "null":
                    tiers = _tiers(driver)
            except (Exception, KeyboardInterrupt) as stopped:  # whatever it is, what was done is not lost with it
                error = stopped
            signals.ignore()
            if error is not None:
                report(make_result(settings, workload, driver.measured, nodes, tiers, simulated=False), False)
        except BaseException:
            _close(session)
            raise
        closing = _close(session)
        result = make_result(settings, workload, driver.measured, nodes, tiers)
        report(result, True)
    return Outcome(result, closing if error is None and result.ok else error)


def _driver(
    settings: BenchSettings,
    session: InferenceSession,
    workload: Workload,
    clock: Callable[[], float],
    on_tick: Callable[[ClosedLoop], None],
) -> tuple[ManagerDriver | ClusterDriver, list[str]]:
    """What serves the workload, and the replicas' nodes."""
    if settings.forward == "hf":
        cluster = start(settings, session, workload)
        nodes = [facts.node for facts in cluster.facts]
        return ClusterDriver(cluster, workload, settings, clock, on_tick), nodes
    options: dict[str, Any] = {"max_batch_size": settings.max_batch_size, "router": settings.router, "replace": False}
    manager = PagedKVCacheManager(settings.params(), session, settings.pages, settings.host_pages, **options)
    return ManagerDriver(manager, workload, settings, clock, on_tick), manager.get_node_names()


def _close(session: InferenceSession) -> Exception | None:
    """What went wrong, if anything did."""
    try:
        session.close()
    except Exception as error:  # of Ray too, when its cluster is gone
        return error
    return None


def _tiers(driver: ManagerDriver | ClusterDriver) -> TierUse | None:
    """Wait for the tiers and look at them; None when a replica of a manager, or all of a cluster's, are lost.

    IntegrityError when a page is held that nobody uses.
    """
    if isinstance(driver, ClusterDriver):
        driver.cluster.check_integrity()
        stats = [driver.cluster.stats(replica) for replica in driver.cluster.live]
        if not stats:
            return None
        metrics, counts = sum((each.cache for each in stats), KVCacheMetrics()), stats[0].tiers
    else:
        if driver.lost:
            return None
        manager = driver.manager
        manager.drain()
        manager.check_integrity()
        metrics, host = manager.get_metrics_aggregated(), manager.get_num_host_pages(0)
        disk = (manager.get_num_disk_pages(0), manager.get_num_used_disk_pages(0))
        counts = TierCount(host, manager.get_num_used_host_pages(0), *disk)
    return TierUse(
        offloaded=metrics.d2h_blocks_copied,
        loaded=metrics.h2d_blocks_copied,
        disk_written=metrics.disk_blocks_written,
        disk_read=metrics.disk_blocks_read,
        failed_loads=metrics.failed_loads,
        rejected_files=metrics.rejected_files,
        host_pages=counts.host_total,
        host_used=counts.host_used,
        disk_pages=counts.disk_total,
        disk_used=counts.disk_used,
    )
