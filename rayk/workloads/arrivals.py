"""When requests arrive: as recorded, spread over the tick of the clock that recorded them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rayk.workloads.request import Workload

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def clock_tick(times: FloatArray) -> float:
    """The tick of the clock behind `times` (seconds, any order), 0.0 when all are one: the first percentile of the
    steps between different times. Not the smallest, so that one odd time among thousands does not hide the tick."""
    steps = np.diff(np.unique(times))
    return float(np.quantile(steps, 0.01, method="higher")) if len(steps) else 0.0


def arrivals(workload: Workload, seed: int) -> tuple[IntArray, FloatArray]:
    """The order in which requests arrive, as their indices [n], and the time of each in that order [n], from 0 on.

    A recorded time t may mean any moment in [t, t + tick), and never one after the next recorded time; requests with
    one time arrive in random order. A request never arrives before the one that it follows.
    """
    times = np.array([request.arrival_s for request in workload.requests], np.float64)
    different, place = np.unique(times, return_inverse=True)
    tick = clock_tick(times)
    room = np.minimum(np.diff(different, append=different[-1] + tick), tick)
    jittered = times + np.random.default_rng(seed).random(len(times)) * room[place]
    for request in workload.requests:
        if request.after is not None:
            jittered[request.index] = max(jittered[request.index], jittered[request.after])
    order = np.argsort(jittered, kind="stable")
    return order, jittered[order] - jittered[order[0]]
