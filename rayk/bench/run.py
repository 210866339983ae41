"""One run of the benchmark: workload in, result out. Makes the session and the manager, and ends them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from rayk.bench.chaos.run import ChaosResult, check_removed, prepared
from rayk.bench.chaos.undisturbed import Comparison, compare
from rayk.bench.cluster_driver import ClusterDriver
from rayk.bench.hf import start, start_undisturbed
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
    session = _session(settings)
    error: BaseException | None = None
    troubles: list[Exception] = []
    tiers: TierUse | None = None
    chaos: ChaosResult | None = None
    over = False
    with StopSignals() as signals, ExitStack() as stack:
        stack.callback(_end, session.close, troubles)
        if settings.named:
            stack.callback(_end, partial(check_removed, session), troubles)
        faults = stack.enter_context(prepared(settings, session))
        driver, nodes = _driver(settings, session, workload, clock, on_tick)
        served = driver.manager if isinstance(driver, ManagerDriver) else driver.cluster
        stack.callback(_end, partial(served.shutdown, force=True), troubles)  # one with a name would go on
        stack.callback(faults.end)
        signals.listen()
        try:
            faults.start(driver, clock)
            driver.run()
            over = True
            if settings.chaos is not None:
                driver.measured.faults += faults.end()
                chaos = ChaosResult(faults.left(), _comparison(settings, workload, driver))
            if settings.connector != "null":
                tiers = _tiers(driver)
        except (Exception, KeyboardInterrupt) as stopped:  # whatever it is, what was done is not lost with it
            error = stopped
            if over:  # else the run has noted it
                driver.measured.fault(error, driver.elapsed)
        signals.ignore()
        if error is not None:
            report(make_result(settings, workload, driver.measured, nodes, tiers, chaos, simulated=False), False)
        stack.close()
        result = make_result(settings, workload, driver.measured, nodes, tiers, chaos)
        report(result, True)
    return Outcome(result, troubles[0] if error is None and result.ok and troubles else error)


def _end(close: Callable[[], None], troubles: list[Exception]) -> None:
    try:
        close()
    except Exception as error:  # of Ray too, when its cluster is gone
        troubles.append(error)


def _session(settings: BenchSettings) -> InferenceSession:
    """Under faults a Ray of its own; with a name where another driver attaches."""
    if settings.runtime != "ray":
        return InferenceSession(settings.runtime)
    if settings.chaos is None and settings.nodes == 1:
        return InferenceSession("ray", settings.address)
    return InferenceSession("ray", "local", f"bench-{os.urandom(4).hex()}" if settings.named else None)


def _comparison(
    settings: BenchSettings, workload: Workload, driver: ManagerDriver | ClusterDriver
) -> Comparison | None:
    """A Cluster's answers beside those of one that nothing befell."""
    if isinstance(driver, ManagerDriver):
        return None
    assert settings.model is not None
    with start_undisturbed(settings, workload) as undisturbed:
        return compare(undisturbed, driver.asked, settings.model)


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
    options = settings.manager_options()
    manager = PagedKVCacheManager(settings.params(), session, settings.pages, settings.host_pages, **options)
    return ManagerDriver(manager, workload, settings, clock, on_tick), manager.get_node_names()


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
